//! Forward and backward of micro-batches, recorded where the backend can.
//!
//! A step of a deep model is thousands of launches, which a fast device finishes sooner than a host queues them. Their order and
//! addresses depend on the shape of a micro-batch alone, so a shape that comes again is recorded the second time it is seen and
//! replayed from then on, as one call. What does not depend on the shape stays outside: the learning rate, clipping and the
//! optimizer's corrections are queued anew in every step.
//!
//! A backend that does not record runs every micro-batch as it is, without filling it up to another shape.

use std::collections::{BTreeSet, HashMap};

use brightrun_kernels::ops::{Recorded, Recording};
use brightrun_kernels::{Backend, Tensor};

use crate::error::Result;
use crate::model::{BackwardSettings, Batch, InputShape, Inputs, LoraGradients, LoraSet, Model};

/// Shapes that are kept at once. A recording of 48 layers is some megabytes, and micro-batches filled to one limit have few shapes.
const MOST_SHAPES: usize = 32;

/// How often a shape that could not be recorded is tried.
const MOST_ATTEMPTS: usize = 3;

/// What was seen of each shape of micro-batch, for one adapter and its gradients.
pub struct Repeats<B: Backend> {
    activation_budget_bytes: u64,
    shapes: HashMap<InputShape, Shape<B>>,
    passes: u64,
    /// Reasons that were logged.
    said: BTreeSet<String>,
}

struct Shape<B: Backend> {
    inputs: Inputs<B>,
    losses: Tensor<B>,
    recording: Option<Box<dyn Recording>>,
    attempts: usize,
    /// The pass that used it last, counted from 1; 0 for none.
    last_use: u64,
}

impl<B: Backend> Repeats<B> {
    /// Nothing seen yet. `activation_budget_bytes` is that of [`BackwardSettings`].
    pub fn new(activation_budget_bytes: u64) -> Self {
        Self {
            activation_budget_bytes,
            shapes: HashMap::new(),
            passes: 0,
            said: BTreeSet::new(),
        }
    }

    /// How many shapes are replayed.
    pub fn recorded(&self) -> usize {
        self.shapes.values().filter(|shape| shape.recording.is_some()).count()
    }

    /// As [`Model::forward_backward`]: the loss of each position, with the gradient of `gradient_scale · Σ losses` added to the
    /// adapter's gradients. All calls must be for the same model, adapter and gradients.
    ///
    /// # Errors
    /// `MODEL_TOO_LONG`; the backend's own.
    pub fn forward_backward(
        &mut self,
        model: &Model<B>,
        (lora, gradients): (&LoraSet<B>, &mut LoraGradients<B>),
        batch: &Batch,
        gradient_scale: f32,
    ) -> Result<Vec<f32>> {
        let device = model.device();
        if !device.can_record() {
            let settings = BackwardSettings {
                gradient_scale,
                activation_budget_bytes: self.activation_budget_bytes,
            };
            return model.forward_backward(lora, gradients, batch, settings);
        }
        let tokens = batch.tokens();
        let batch = batch.in_few_shapes();
        let key = model.input_shape(&batch)?;
        self.passes += 1;
        self.make(model, key, &batch)?;
        let Some(shape) = self.shapes.get_mut(&key) else {
            return Ok(Vec::new());
        };
        shape.inputs.replace(device, &batch, gradient_scale)?;
        let budget = self.activation_budget_bytes;
        let (inputs, losses) = (&shape.inputs, &mut shape.losses);
        let work = || model.queue_forward_backward(lora, gradients, (inputs, &mut *losses), budget);
        let is_first = shape.last_use == 0;
        let state = (&mut shape.recording, &mut shape.attempts);
        let reason = device.step(|| queue(device, &batch, is_first, state, work))?;
        shape.last_use = self.passes;
        let mut losses = device.read_f32(&shape.losses)?;
        losses.truncate(tokens);
        self.say(key, reason);
        Ok(losses)
    }

    fn make(&mut self, model: &Model<B>, key: InputShape, batch: &Batch) -> Result<()> {
        if self.shapes.contains_key(&key) {
            return Ok(());
        }
        if self.shapes.len() >= MOST_SHAPES {
            let oldest = self.shapes.iter().min_by_key(|(_, shape)| shape.last_use);
            if let Some(oldest) = oldest.map(|(key, _)| *key) {
                self.shapes.remove(&oldest);
            }
        }
        let inputs = model.inputs(batch, 0.0)?;
        let losses = inputs.losses(model.device())?;
        let shape = Shape {
            inputs,
            losses,
            recording: None,
            attempts: 0,
            last_use: 0,
        };
        self.shapes.insert(key, shape);
        Ok(())
    }

    /// Logs why a micro-batch was queued op by op, each reason once.
    fn say(&mut self, shape: InputShape, reason: Option<String>) {
        let Some(reason) = reason.filter(|reason| self.said.insert(reason.clone())) else {
            return;
        };
        let InputShape { tokens, documents, .. } = shape;
        tracing::info!(
            tokens,
            documents,
            reason,
            "A micro-batch runs op by op, not as a recording"
        );
    }
}

/// Replays, records or simply does the work; when it was neither recorded nor replayed, why.
fn queue<B: Backend>(
    device: &B,
    batch: &Batch,
    is_first: bool,
    (recording, attempts): (&mut Option<Box<dyn Recording>>, &mut usize),
    mut work: impl FnMut() -> Result<()>,
) -> Result<Option<String>> {
    if let Some(known) = recording {
        if known.replay(&batch.segments)? {
            return Ok(None);
        }
        *recording = None;
    }
    if is_first {
        work()?;
        return Ok(Some("its shape is new".to_owned()));
    }
    if *attempts >= MOST_ATTEMPTS {
        work()?;
        return Ok(None);
    }
    *attempts += 1;
    match device.record(&batch.segments, work)? {
        Recorded::Yes(made) => {
            *recording = Some(made);
            *attempts = 0;
            Ok(None)
        }
        Recorded::Not(reason) => Ok(Some(reason)),
    }
}
