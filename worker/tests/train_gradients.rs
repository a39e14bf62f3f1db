//! Gradients: against finite differences, against themselves under other memory and thread settings.
#![allow(clippy::unwrap_used)]

mod train_support;

use brightrun_kernels::cpu::Cpu;
use brightrun_kernels::ops::Device;
use brightrun_worker::model::{BackwardSettings, Batch, Family, LoraGradients, LoraSet, Model};
use brightrun_worker::spec::TrainSpec;
use brightrun_worker::train::step::packed;
use train_support::{
    ALL_FAMILIES, REFERENCE, all_targets, examples, groups_of_targets, model, smooth_model, spec, stirred_lora,
};

/// Every module of a family adapted.
fn everything(family: Family) -> TrainSpec {
    TrainSpec {
        targets: all_targets(family),
        ..spec()
    }
}

fn batch() -> Batch {
    packed(&examples(3))
}

fn gradients(model: &Model<Cpu>, lora: &LoraSet<Cpu>, batch: &Batch, budget: u64) -> Vec<Vec<f32>> {
    let settings = BackwardSettings {
        gradient_scale: 1.0 / batch.supervised_tokens() as f32,
        activation_budget_bytes: budget,
    };
    let mut gradients = LoraGradients::zeros(model.device(), lora).unwrap();
    model.forward_backward(lora, &mut gradients, batch, settings).unwrap();
    let read = |tensor| model.device().read_f32(tensor).unwrap();
    gradients.pairs().iter().flat_map(|(a, b)| [read(a), read(b)]).collect()
}

fn mean_loss(model: &Model<Cpu>, lora: &LoraSet<Cpu>, batch: &Batch) -> f64 {
    let losses = model.forward_losses(Some(lora), batch).unwrap();
    losses.iter().map(|loss| f64::from(*loss)).sum::<f64>() / batch.supervised_tokens() as f64
}

/// Moves all factors along their gradient, by `distance` of its length, and gives the loss there.
fn loss_along(model: &Model<Cpu>, spec: &TrainSpec, batch: &Batch, directions: &[Vec<f32>], distance: f64) -> f64 {
    let mut moved = stirred_lora(model, spec);
    let length = directions
        .iter()
        .flatten()
        .map(|value| f64::from(*value).powi(2))
        .sum::<f64>()
        .sqrt();
    for (pair, direction) in moved.pairs_mut().iter_mut().zip(directions.chunks(2)) {
        for (tensor, direction) in [&mut pair.a, &mut pair.b].into_iter().zip(direction) {
            let mut values = model.device().read_f32(tensor).unwrap();
            for (value, slope) in values.iter_mut().zip(direction) {
                *value += (distance * f64::from(*slope) / length) as f32;
            }
            model.device().write(tensor, bytemuck::cast_slice(&values)).unwrap();
        }
    }
    mean_loss(model, &moved, batch)
}

/// Along the gradient `g` the loss changes by `|g|` per unit of distance. The four-point difference is off by O(h⁴) and by the
/// loss's rounding over h. Where h moves the loss by 2e-3, as here, that rounding is some 1e-4 of it, and the curvature less. Mixtures of experts send every token to all experts, as
/// the loss jumps where a token changes its experts: a slope exists only between such places.
#[test]
fn the_gradient_is_the_slope_of_the_loss() {
    for family in ALL_FAMILIES {
        let (model, batch) = (smooth_model(family), batch());
        for targets in groups_of_targets(family) {
            let spec = TrainSpec {
                targets: targets.iter().map(ToString::to_string).collect(),
                ..spec()
            };
            let directions = gradients(&model, &stirred_lora(&model, &spec), &batch, 0);
            let length = directions
                .iter()
                .flatten()
                .map(|value| f64::from(*value).powi(2))
                .sum::<f64>()
                .sqrt();
            let h = 2e-3 / length;
            let loss = |distance| loss_along(&model, &spec, &batch, &directions, distance);
            let slope = (8.0 * (loss(h) - loss(-h)) - (loss(2.0 * h) - loss(-2.0 * h))) / (12.0 * h);
            assert!(length > 1e-3, "{targets:?}: a gradient of {length} proves nothing");
            assert!(
                (slope / length - 1.0).abs() < 1e-3,
                "{family:?} {targets:?}: slope {slope}, gradient {length}"
            );
        }
    }
}

#[test]
fn recomputed_activations_give_the_same_bits_as_kept_ones() {
    for family in ALL_FAMILIES {
        let (model, batch) = (model(family, 2, REFERENCE), batch());
        let lora = stirred_lora(&model, &everything(family));
        let kept = gradients(&model, &lora, &batch, u64::MAX);
        let kept_peak = peak(&model, || gradients(&model, &lora, &batch, u64::MAX));
        let one_layer = kept_peak.1 - peak(&model, || gradients(&model, &lora, &batch, 0)).1;
        for budget in [0, one_layer * 3 / 4, u64::MAX] {
            assert_eq!(gradients(&model, &lora, &batch, budget), kept, "budget {budget}");
        }
        assert!(one_layer > 0, "recomputing must save memory");
    }
}

fn peak<T>(model: &Model<Cpu>, work: impl FnOnce() -> T) -> (T, u64) {
    model.device().reset_peak();
    let before = model.device().memory().in_use_bytes;
    let result = work();
    (result, model.device().memory().peak_bytes - before)
}

#[test]
fn gradients_do_not_depend_on_the_number_of_threads() {
    let batch = batch();
    for family in [Family::Qwen3, Family::Qwen3Moe, Family::Qwen3Next] {
        let with = |threads| {
            let model = model(family, threads, REFERENCE);
            let lora = stirred_lora(&model, &everything(family));
            gradients(&model, &lora, &batch, 0)
        };
        let one = with(1);
        for threads in [2, 3, 7] {
            assert_eq!(with(threads), one, "{family:?} {threads} threads");
        }
    }
}

#[test]
fn gradients_of_packed_documents_are_the_sum_of_each_alone() {
    for family in [Family::Qwen3, Family::Qwen3Moe, Family::Qwen3Next] {
        packed_is_the_sum_of_each_alone(family);
    }
}

fn packed_is_the_sum_of_each_alone(family: Family) {
    let model = model(family, 2, REFERENCE);
    let lora = stirred_lora(&model, &everything(family));
    let documents = examples(3);
    let whole = batch();
    let together = gradients(&model, &lora, &whole, 0);
    let mut sum: Vec<Vec<f64>> = together.iter().map(|tensor| vec![0.0; tensor.len()]).collect();
    for document in &documents {
        let alone = packed([document]);
        let share = alone.supervised_tokens() as f64 / whole.supervised_tokens() as f64;
        for (sum, part) in sum.iter_mut().zip(gradients(&model, &lora, &alone, 0)) {
            sum.iter_mut()
                .zip(part)
                .for_each(|(sum, part)| *sum += share * f64::from(part));
        }
    }
    // Sums over at most 256 terms in another order, seven to a layer and the head, forward and back, and one over tokens:
    // 2·λ·depth·√n·u with λ = 4 (Higham & Mary 2019).
    let depth = 2.0 * (7.0 * model.config().layers as f64 + 1.0) + 1.0;
    let bound = 2.0 * 4.0 * depth * 16.0 * f64::from(f32::EPSILON) / 2.0;
    for (together, sum) in together.iter().zip(&sum) {
        let largest = sum.iter().fold(0.0f64, |largest, value| largest.max(value.abs()));
        let worst = together
            .iter()
            .zip(sum)
            .fold(0.0f64, |worst, (one, other)| worst.max((f64::from(*one) - other).abs()));
        assert!(worst <= bound * largest, "{worst} of {largest}");
    }
}

#[test]
fn layers_below_the_lowest_adapter_are_not_walked_back() {
    let model = model(Family::Qwen3, 2, REFERENCE);
    let batch = batch();
    let all = stirred_lora(&model, &spec());
    let reference = gradients(&model, &all, &batch, 0);
    let top_only = TrainSpec {
        targets: vec!["layers.1.mlp.down_proj".to_owned()],
        ..spec()
    };
    let lora = stirred_lora(&model, &top_only);
    assert_eq!(lora.pairs().len(), 1);
    let alone = gradients(&model, &lora, &batch, 0);
    assert_eq!(alone.len(), 2);
    assert_eq!(alone[0].len(), reference[reference.len() - 2].len());
    assert!(alone.iter().flatten().any(|value| *value != 0.0));
}
