//! One training step of a model without weights, on a backend that counts.

use std::collections::BTreeMap;

use brightrun_kernels::DType;
use brightrun_kernels::counting::{Counting, Habits, Work};
use brightrun_kernels::ops::Device;
use serde::Serialize;

use super::lora_config;
use super::skeleton::skeleton;
use crate::error::Result;
use crate::model::lora::Module;
use crate::model::{BackwardSettings, Batch, LoadOptions, LoraGradients, LoraSet, ModelConfig};
use crate::spec::TrainSpec;
use crate::train::optimizer::Optimizer;

/// A micro-batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Documents.
    pub sequences: usize,
    /// Tokens of each.
    pub length: usize,
}

impl Shape {
    /// Tokens of all documents.
    pub fn tokens(self) -> usize {
        self.sequences * self.length
    }

    fn batch(self) -> Batch {
        let (ids, learnt) = (vec![0; self.length], vec![true; self.length]);
        Batch::pack((0..self.sequences).map(|_| (ids.as_slice(), learnt.as_slice())))
    }
}

/// Bytes by component, at the moment when most are in use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Bytes {
    /// Frozen weights, scales included, and the rotary table.
    pub weights: u64,
    /// The adapter's factors.
    pub lora: u64,
    /// Their gradients.
    pub gradients: u64,
    /// The optimizer's moments.
    pub optimizer: u64,
    /// Inputs of all layers, from which the rest is computed again.
    pub checkpoints: u64,
    /// Everything else of a step: activations of the layer at work, those kept, logits, the ops' own memory.
    pub workspace: u64,
    /// What no tensor can have: the driver's context, gaps.
    pub reserve: u64,
}

impl Bytes {
    /// All of it.
    pub fn total(&self) -> u64 {
        let state = self.weights + self.lora + self.gradients + self.optimizer;
        state + self.checkpoints + self.workspace + self.reserve
    }

    pub(super) fn with_reserve(self, reserve: u64) -> Self {
        Self { reserve, ..self }
    }
}

/// What a step takes.
#[derive(Clone, Debug)]
pub struct Footprint {
    /// By component.
    pub bytes: Bytes,
    /// Frozen weights by encoding.
    pub weight_bytes: BTreeMap<&'static str, u64>,
    /// The work of every op of one micro-batch, forward and backward.
    pub work: Vec<Work>,
    /// The modules that may carry an adapter.
    pub modules: Vec<Module>,
}

/// Runs one micro-batch of a model without weights, whose checkpoint holds tensors of dtype `stored`, on a backend of these
/// habits. It takes milliseconds.
///
/// # Errors
/// `LORA_TARGET_UNKNOWN`, `MODEL_TOO_LONG`.
pub fn footprint(
    config: &ModelConfig,
    stored: DType,
    spec: &TrainSpec,
    habits: Habits,
    shape: Shape,
) -> Result<Footprint> {
    let device = Counting::new(habits);
    let in_use = || device.memory().in_use_bytes;
    let model = skeleton(
        &device,
        config.clone(),
        LoadOptions::from(spec.base_dtype),
        stored,
        shape.length,
    )?;
    let weights = in_use();
    let lora = LoraSet::unwritten(&device, lora_config(spec), model.modules())?;
    let with_lora = in_use();
    let mut gradients = LoraGradients::zeros(&device, &lora)?;
    let with_gradients = in_use();
    let optimizer = Optimizer::new(&device, spec, &lora)?;
    let with_optimizer = in_use();
    let batch = shape.batch();
    let settings = BackwardSettings {
        gradient_scale: 1.0,
        activation_budget_bytes: spec.activation_budget_bytes,
    };
    device.reset_peak();
    device.record();
    model.forward_backward(&lora, &mut gradients, &batch, settings)?;
    let work = device.recorded();
    let step = device.memory().peak_bytes - with_optimizer;
    let layer_input = shape.tokens() * config.hidden * device.activation_dtype(model.precision).size_bytes();
    let checkpoints = (config.layers * layer_input) as u64;
    drop(optimizer);
    Ok(Footprint {
        bytes: Bytes {
            weights,
            lora: with_lora - weights,
            gradients: with_gradients - with_lora,
            optimizer: with_optimizer - with_gradients,
            checkpoints: checkpoints.min(step),
            workspace: step - checkpoints.min(step),
            reserve: 0,
        },
        weight_bytes: model.weight_bytes().clone(),
        work,
        modules: model.modules().to_vec(),
    })
}
