//! Whole steps without a checkpoint, on the CPU: the bench itself, not its figures.
#![allow(clippy::unwrap_used)]

use brightrun_kernels::cpu::Cpu;
use brightrun_worker::bench::{BenchModel, BenchRequest, BenchStep, NoMeter, bench, serve};
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
        steps: 2,
    }
}

#[test]
fn steps_of_every_length_are_measured_on_a_model_without_a_checkpoint() {
    let device = Cpu::new(Some(2)).unwrap();
    let (mut models, mut steps) = (Vec::new(), Vec::new());
    bench(
        &device,
        &NoMeter,
        &request(vec![128, 512]),
        &mut |model| {
            models.push(model.clone());
            Ok(())
        },
        &mut |step| {
            steps.push(step.clone());
            Ok(())
        },
    )
    .unwrap();
    assert_eq!((models.len(), models[0].layers), (1, 4));
    assert!(models[0].weight_bytes > 0 && models[0].trainable_parameters > 0);
    assert_eq!(steps.iter().map(|step| step.tokens).collect::<Vec<_>>(), [128, 512]);
    for step in &steps {
        // The loss of a model that knows nothing is near ln(320).
        assert!((4.0..8.0).contains(&step.loss), "{step:?}");
        assert!(step.tokens_per_second > 0.0 && step.tensor_peak_bytes > 0 && !step.is_recorded);
        assert_eq!((step.idle_share, step.device_bytes), (None, None));
        let routing = step.routing.unwrap();
        assert!(routing.max_over_mean > 1.3 && routing.entropy < 0.99, "{routing:?}");
    }
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
        let (mut model, mut step) = (|_: &BenchModel| Ok(()), |_: &BenchStep| Ok(()));
        let failure = bench(&device, &NoMeter, &request(vec![tokens]), &mut model, &mut step).unwrap_err();
        assert_eq!(failure.code, "BENCH_OUT_OF_RANGE");
    }
}
