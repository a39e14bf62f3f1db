//! Whole steps without a checkpoint, on the CPU and on the emulated device: the bench itself, not its figures.
#![allow(clippy::unwrap_used, clippy::panic)]

use brightrun_kernels::cpu::Cpu;
use brightrun_kernels::{Backend, Error, emu};
use brightrun_worker::bench::{BenchEvent, BenchModel, BenchRequest, BenchStep, NoMeter, WARM_UP, bench, serve};
use brightrun_worker::model::{Family, ModelConfig};
use brightrun_worker::spec::{BaseDtype, TrainSpec};

fn request(tokens: Vec<usize>) -> BenchRequest {
    BenchRequest {
        config: ModelConfig::miniature(Family::Qwen3Next, 320),
        spec: TrainSpec {
            base_dtype: BaseDtype::Nf4Experts,
            rank: 4,
            ..TrainSpec::default()
        },
        tokens,
        documents: 2,
        warm_up: WARM_UP,
        steps: 2,
    }
}

/// What was told of the model and of each length, and of how many lengths measuring began.
fn measured<B: Backend>(device: &B, request: &BenchRequest) -> (BenchModel, Vec<BenchStep>, Vec<usize>) {
    let (mut model, mut steps, mut begun) = (None, Vec::new(), Vec::new());
    bench(device, &NoMeter, request, &mut |event| {
        match event {
            BenchEvent::Model(told) => model = Some(told.clone()),
            BenchEvent::Measuring(tokens) => begun.push(tokens),
            BenchEvent::Step(step) => steps.push(step.clone()),
        }
        Ok(())
    })
    .unwrap();
    (model.unwrap(), steps, begun)
}

#[test]
fn steps_of_every_length_are_measured_on_a_model_without_a_checkpoint() {
    let device = Cpu::new(Some(2)).unwrap();
    let (model, steps, begun) = measured(&device, &request(vec![128, 512]));
    assert_eq!(
        (model.layers, model.device_bytes_before, begun),
        (4, None, vec![128, 512])
    );
    assert!(model.weight_bytes > 0 && model.trainable_parameters > 0);
    assert_eq!(steps.iter().map(|step| step.tokens).collect::<Vec<_>>(), [128, 512]);
    for step in &steps {
        // The loss of a model that knows nothing is near ln(320).
        assert!((4.0..8.0).contains(&step.loss), "{step:?}");
        assert!(step.tokens_per_second > 0.0 && step.tensor_peak_bytes > 0 && !step.is_recorded);
        assert_eq!((step.idle_share, step.device_bytes), (None, None));
        // A step is planned for a GPU, whose activations take half.
        assert!(step.planned_bytes > model.weight_bytes, "{step:?}");
        let routing = step.routing.unwrap();
        assert!(routing.max_over_mean > 1.3 && routing.entropy < 0.99, "{routing:?}");
    }
    assert!(
        steps[1].flops > 4 * steps[0].flops,
        "attention grows faster than tokens"
    );
}

/// The step that a GPU is measured with: the same kernels, and from the second on a replay.
#[test]
fn steps_of_the_kernels_are_replayed_and_give_the_loss_of_a_model_that_knows_nothing() {
    let device = match emu::emulated(Some(2)) {
        Ok(device) => device,
        Err(Error::Unsupported { reason, .. }) => {
            println!("bench on `emulated`: absent ({reason}); nothing was tested");
            return;
        }
        Err(error) => panic!("{error}"),
    };
    let (_, steps, _) = measured(&device, &request(vec![64]));
    assert!(steps[0].is_recorded && (4.0..8.0).contains(&steps[0].loss), "{steps:?}");
}

#[test]
fn a_server_of_steps_warms_up_and_then_does_as_many_as_it_is_asked_for() {
    let device = Cpu::new(Some(2)).unwrap();
    let mut answers = Vec::new();
    serve(
        &device,
        &request(vec![64]),
        &mut [2, 1].into_iter(),
        &mut |times, loss| {
            assert!(loss.is_finite() && times.iter().all(|time| *time > 0.0));
            answers.push(times.len());
            Ok(())
        },
    )
    .unwrap();
    assert_eq!(answers, [0, 2, 1]);
}

#[test]
fn documents_that_no_model_could_read_are_refused() {
    let device = Cpu::new(Some(1)).unwrap();
    for tokens in [2, 1 << 20] {
        let failure = bench(&device, &NoMeter, &request(vec![tokens]), &mut |_| Ok(())).unwrap_err();
        assert_eq!(failure.code, "BENCH_OUT_OF_RANGE");
    }
}
