//! Micro-batches that are recorded and replayed, on the emulated device: what it launches, copies and allocates, and that the
//! numbers are those of the ops called one by one.
#![allow(clippy::unwrap_used, clippy::panic)]

mod train_support;

use brightrun_kernels::emu::Emulation;
use brightrun_kernels::gpu::Gpu;
use brightrun_kernels::ops::{Device, Precision};
use brightrun_kernels::testing::{Calls, Watched};
use brightrun_kernels::{Error, Tensor};
use brightrun_worker::model::batch::SHAPES_PER_OCTAVE;
use brightrun_worker::model::synthetic::write_checkpoint;
use brightrun_worker::model::{
    BackwardSettings, Batch, Encoding, Family, LoadOptions, LoraConfig, LoraGradients, LoraSet, Model, ModelConfig,
};
use brightrun_worker::spec::TrainSpec;
use brightrun_worker::train::EncodedExample;
use brightrun_worker::train::repeat::Repeats;
use brightrun_worker::train::step::{Trainer, packed};
use train_support::{ALL_FAMILIES, REFERENCE, VOCABULARY, all_targets, spec};

type Watch = Gpu<Watched<Emulation>>;

/// A device on which everything asked of it is counted; `None`, said aloud, where no compiler is.
fn device() -> Option<Watch> {
    match Emulation::new(None) {
        Ok(emulation) => Some(Gpu::new(Watched::new(emulation)).unwrap()),
        Err(Error::Unsupported { reason, .. }) => {
            println!("emulated: absent (not tested): {reason}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

fn model(device: &Watch, family: Family, options: LoadOptions) -> Model<Watch> {
    let folder = tempfile::tempdir().unwrap();
    write_checkpoint(folder.path(), &ModelConfig::miniature(family, VOCABULARY), 11).unwrap();
    Model::load(device, folder.path(), options, &mut |_| {}).unwrap()
}

fn in_bf16(encoding: Encoding) -> LoadOptions {
    LoadOptions {
        encoding,
        precision: Precision::Bf16,
        ..REFERENCE
    }
}

fn everything(family: Family) -> TrainSpec {
    TrainSpec {
        targets: all_targets(family),
        ..spec()
    }
}

fn lora(model: &Model<Watch>, spec: &TrainSpec) -> LoraSet<Watch> {
    let config = LoraConfig {
        rank: spec.rank,
        alpha: spec.lora_alpha(),
        targets: spec.targets.clone(),
    };
    LoraSet::initialise(model.device(), config, model.modules(), spec.seed).unwrap()
}

/// Documents of these lengths; what they say depends on `seed`.
fn documents(lengths: &[usize], seed: usize) -> Vec<EncodedExample> {
    let ids = |length: usize, place: usize| (0..length).map(move |t| ((seed + 13 * place + 7 * t) % VOCABULARY) as i32);
    let of = |(place, length): (usize, &usize)| EncodedExample {
        ids: ids(*length, place).collect(),
        supervised: (0..*length).map(|t| t % 3 != 0).collect(),
        line: place as u64 + 1,
    };
    lengths.iter().enumerate().map(of).collect()
}

fn values<'a>(
    device: &Watch,
    tensors: impl IntoIterator<Item = (&'a Tensor<Watch>, &'a Tensor<Watch>)>,
) -> Vec<Vec<f32>> {
    let read = |tensor| device.read_f32(tensor).unwrap();
    tensors.into_iter().flat_map(|(a, b)| [read(a), read(b)]).collect()
}

/// Losses and gradients of a batch, its ops called one by one and without anything added to it.
fn one_by_one(model: &Model<Watch>, lora: &LoraSet<Watch>, batch: &Batch, scale: f32) -> (Vec<f32>, Vec<Vec<f32>>) {
    let settings = BackwardSettings {
        gradient_scale: scale,
        activation_budget_bytes: 0,
    };
    let mut gradients = LoraGradients::zeros(model.device(), lora).unwrap();
    let losses = model.forward_backward(lora, &mut gradients, batch, settings).unwrap();
    let gradients = values(model.device(), gradients.pairs().iter().map(|(a, b)| (a, b)));
    (losses, gradients)
}

/// How each family's frozen weights are kept, in the order of `ALL_FAMILIES`.
const ENCODINGS: [Encoding; 4] = [Encoding::Bf16, Encoding::Nf4, Encoding::Nf4, Encoding::Nf4Experts];

/// Batches of one shape and different documents: the first is queued, the second recorded, the others replayed.
const LAYOUTS: [&[usize]; 4] = [&[20, 13, 34], &[34, 13, 20], &[1, 65, 1], &[40, 2, 25]];

#[test]
fn a_replayed_micro_batch_has_the_losses_and_gradients_of_its_ops_called_one_by_one() {
    let Some(device) = device() else { return };
    let in_halves = ALL_FAMILIES.into_iter().zip(ENCODINGS.map(in_bf16));
    for (family, options) in in_halves.chain([(Family::Qwen2, REFERENCE)]) {
        let model = model(&device, family, options);
        let lora = lora(&model, &everything(family));
        let mut gradients = LoraGradients::zeros(&device, &lora).unwrap();
        let mut repeats = Repeats::new(0);
        for (place, lengths) in LAYOUTS.into_iter().enumerate() {
            let what = format!("{family:?} {options:?} {lengths:?}");
            let batch = packed(&documents(lengths, place));
            let scale = 1.0 / (10 + place) as f32;
            gradients.clear(&device).unwrap();
            device.runtime().calls();
            let adapter = (&lora, &mut gradients);
            let losses = repeats.forward_backward(&model, adapter, &batch, scale).unwrap();
            let calls = device.runtime().calls();
            let expected = ((place == 1).into(), (place > 0).into());
            assert_eq!((calls.captures, calls.replays), expected, "{what}");
            if place > 1 {
                assert_eq!((calls.launches, calls.allocations), (0, 0), "{what}");
            }
            let found = values(&device, gradients.pairs().iter().map(|(a, b)| (a, b)));
            assert!(found.iter().flatten().any(|value| *value != 0.0));
            assert!(
                (losses, found) == one_by_one(&model, &lora, &batch, scale),
                "{what}: other bits"
            );
        }
        assert_eq!(repeats.recorded(), 1);
    }
}

/// Steps of different examples whose micro-batches have one shape.
fn steps() -> Vec<Vec<EncodedExample>> {
    LAYOUTS
        .iter()
        .enumerate()
        .map(|(place, lengths)| documents(lengths, 100 + place))
        .collect()
}

#[test]
fn no_step_after_the_second_allocates_launches_a_layer_or_copies_more_than_its_batch() {
    let Some(device) = device() else { return };
    let family = Family::Qwen3Next;
    let model = model(&device, family, in_bf16(Encoding::Nf4Experts));
    let spec = TrainSpec {
        micro_batch_tokens: 100,
        ..everything(family)
    };
    let mut adapter = lora(&model, &spec);
    let mut trainer = Trainer::new(&model, &mut adapter, &spec).unwrap();
    let steps = steps();
    trainer.rehearse(&steps[0]).unwrap();
    let mut seen = Vec::new();
    for (place, examples) in steps.iter().enumerate() {
        device.runtime().calls();
        let examples: Vec<&EncodedExample> = examples.iter().collect();
        trainer.step(&examples, place, 1e-3, &mut || true).unwrap().unwrap();
        seen.push(device.runtime().calls());
    }
    let tokens = 67_u64.next_multiple_of(2);
    for (place, calls) in seen.iter().enumerate().skip(1) {
        let Calls {
            allocations,
            writes,
            written_bytes,
            reads,
            launches,
            replays,
            ..
        } = *calls;
        assert_eq!((allocations, replays), (0, 1), "step {place}: {calls:?}");
        // Ids, labels, positions and the loss's factor; then what the ops know of the documents: three of attention, two of the
        // delta rule and the offsets, each of fewer numbers than the tokens.
        assert!(writes <= 4 + 6, "step {place}: {calls:?}");
        assert!(written_bytes <= (3 + 6) * 4 * tokens + 4, "step {place}: {calls:?}");
        // The losses, the norm of the gradient, and the note of faults after either.
        assert!(reads <= 4, "step {place}: {calls:?}");
        // The gradients become zero, two are for their norm, and one for the update: of all factors at once.
        assert_eq!(launches, 4, "step {place}: {calls:?}");
    }
}

#[test]
fn a_step_of_a_new_shape_is_queued_and_one_that_needs_no_more_memory_allocates_nothing() {
    let Some(device) = device() else { return };
    let family = Family::Qwen3;
    let model = model(&device, family, in_bf16(Encoding::Bf16));
    let spec = everything(family);
    let mut adapter = lora(&model, &spec);
    let mut trainer = Trainer::new(&model, &mut adapter, &spec).unwrap();
    let longest = documents(&[40], 1);
    trainer.rehearse(&longest).unwrap();
    let mut step = |lengths: &[usize]| {
        let examples = documents(lengths, 2);
        let examples: Vec<&EncodedExample> = examples.iter().collect();
        device.runtime().calls();
        trainer.step(&examples, 0, 1e-3, &mut || true).unwrap().unwrap();
        device.runtime().calls()
    };
    step(&[40]);
    let shorter = step(&[31]);
    assert_eq!((shorter.captures, shorter.replays), (0, 0));
    // The batch's own tensors: ids, labels, positions, factor, losses; and attention's three tables of tiles.
    assert!(shorter.allocations <= 5 + 3, "{shorter:?}");
    assert_eq!(step(&[31]).allocations, 0);
    assert_eq!(step(&[31]).launches, step(&[40]).launches);
}

#[test]
fn few_shapes_hold_the_same_documents_and_nothing_to_learn_beyond_them() {
    let ids: Vec<i32> = (0..1000).collect();
    for tokens in [1, 31, 63, 64, 65, 700, 1000] {
        let learnt = vec![true; tokens];
        let batch = Batch::pack([(&ids[..tokens], learnt.as_slice()), (&[1, 2][..], &[true, true][..])]);
        let filled = batch.in_few_shapes();
        assert_eq!(filled.supervised_tokens(), batch.supervised_tokens());
        assert_eq!(filled.input_ids[..batch.tokens()], batch.input_ids);
        assert_eq!(filled.positions[..batch.tokens()], batch.positions);
        let of_first = |batch: &Batch| batch.segments.offsets()[..3].to_vec();
        assert_eq!(of_first(&filled), of_first(&batch));
        assert_eq!(filled.segments.tokens(), filled.tokens());
        assert_eq!(
            (filled.labels.len(), filled.positions.len()),
            (filled.tokens(), filled.tokens())
        );
        assert!(filled.segments.len().is_power_of_two());
        assert!(filled.tokens() - batch.tokens() <= batch.tokens() / SHAPES_PER_OCTAVE);
        assert_eq!(filled.in_few_shapes().tokens(), filled.tokens());
    }
    let of = |tokens: usize| Batch::prompt(&vec![0; tokens]).in_few_shapes().tokens();
    assert_eq!([of(4096), of(4097), of(4224), of(8191)], [4096, 4224, 4224, 8192]);
}
