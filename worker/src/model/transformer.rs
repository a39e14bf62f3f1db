//! The whole model: embedding, layers, head; forward, and forward with backward.

use std::collections::BTreeMap;
use std::sync::Arc;

use brightrun_kernels::ops::{LinearCrossEntropy, LinearForward, Precision, RopeTable, Write};
use brightrun_kernels::{Backend, Tensor, Weight};

use crate::error::{Failure, Result};
use crate::model::batch::Batch;
use crate::model::config::ModelConfig;
use crate::model::inputs::Inputs;
use crate::model::layer::{Layer, LayerTrace};
use crate::model::loads::ExpertLoads;
use crate::model::lora::{LoraGradients, LoraSet, Module};
use crate::model::norm::Norm;
use crate::model::pass::Pass;
use crate::model::rope::RopeCache;

/// A frozen base model in a backend's memory. It is never changed: adapters lie beside it.
pub struct Model<B: Backend> {
    pub(crate) device: B,
    pub(crate) config: ModelConfig,
    pub(crate) precision: Precision,
    pub(crate) modules: Vec<Module>,
    pub(crate) embedding: Weight<B>,
    pub(crate) layers: Vec<Layer<B>>,
    pub(crate) final_norm: Norm<B>,
    /// `None` when the embedding is also the head.
    pub(crate) head: Option<Weight<B>>,
    pub(crate) rope: RopeCache<B>,
    pub(crate) weight_bytes: BTreeMap<&'static str, u64>,
    pub(crate) fingerprint: String,
}

/// Settings of one forward-and-backward pass.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BackwardSettings {
    /// Factor of the summed loss whose gradient is taken: 1 / number of supervised tokens of the optimizer step.
    pub gradient_scale: f32,
    /// Bytes of activations that may be kept instead of being computed again, checkpoints apart.
    pub activation_budget_bytes: u64,
}

impl<B: Backend> Model<B> {
    /// The model's numbers.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// In which precision products are computed.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Where it lies.
    pub fn device(&self) -> &B {
        &self.device
    }

    /// All modules that may carry an adapter, in the model's order.
    pub fn modules(&self) -> &[Module] {
        &self.modules
    }

    /// Bytes of the frozen weights by encoding: `bf16`, `nf4-nested`, …
    pub fn weight_bytes(&self) -> &BTreeMap<&'static str, u64> {
        &self.weight_bytes
    }

    /// Tells this model, so loaded, from every other: SHA-256 over configuration, encoding, precision, all tensor headers
    /// and the beginning of each tensor, in hexadecimal.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    fn head(&self) -> &Weight<B> {
        self.head.as_ref().unwrap_or(&self.embedding)
    }

    /// The decoder layers, first to last.
    pub fn layers(&self) -> &[Layer<B>] {
        &self.layers
    }

    /// Rotations for all positions of a batch.
    pub(crate) fn rotations(&self, batch: &Batch) -> Result<Arc<RopeTable<B>>> {
        let longest = batch
            .positions
            .iter()
            .copied()
            .max()
            .map_or(0, |last| last as usize + 1);
        if longest > self.config.max_positions {
            return Err(Failure::user(
                "MODEL_TOO_LONG",
                format!(
                    "A document reaches position {longest}, but the model was made for {} positions",
                    self.config.max_positions
                ),
            )
            .hint("Lower max_length, or shorten the example"));
        }
        self.rope.table(&self.device, longest)
    }

    /// The surroundings of a pass over a batch.
    pub fn pass<'a>(&'a self, lora: Option<&'a LoraSet<B>>, inputs: &'a Inputs<B>) -> Pass<'a, B> {
        Pass {
            device: &self.device,
            precision: self.precision,
            dtype: self.device.activation_dtype(self.precision),
            lora,
            positions: &inputs.positions,
            rope: Arc::clone(&inputs.rope),
            segments: &inputs.segments,
            loads: None,
        }
    }

    pub(crate) fn embed(&self, pass: &Pass<'_, B>, inputs: &Inputs<B>) -> Result<Tensor<B>> {
        let mut x = pass.activation([pass.tokens(), self.config.hidden])?;
        self.device.gather_rows(&self.embedding, &inputs.ids, &mut x)?;
        Ok(x)
    }

    /// The residual stream after all layers, without traces.
    pub(crate) fn hidden(&self, pass: &Pass<'_, B>, inputs: &Inputs<B>) -> Result<Tensor<B>> {
        let mut x = self.embed(pass, inputs)?;
        for layer in &self.layers {
            layer.forward(pass, &mut x)?;
        }
        Ok(x)
    }

    /// Logits of a residual stream's rows, row-major `[T, V]`.
    pub(crate) fn project_logits(&self, pass: &Pass<'_, B>, x: &Tensor<B>) -> Result<Vec<f32>> {
        let normed = self.final_norm.forward(pass, x)?.y;
        let mut y = pass.activation([x.shape().rows(), self.config.vocabulary])?;
        self.device.linear_forward(LinearForward {
            x: &normed,
            weight: self.head(),
            bias: None,
            lora: None,
            precision: self.precision,
            y: &mut y,
        })?;
        Ok(self.device.read_f32(&y)?)
    }

    /// All logits of a batch, row-major `[T, V]`. For tests and inspection: training never holds them as a whole.
    ///
    /// # Errors
    /// `MODEL_TOO_LONG`; the backend's own.
    pub fn logits(&self, lora: Option<&LoraSet<B>>, batch: &Batch) -> Result<Vec<f32>> {
        let inputs = self.inputs(batch, 0.0)?;
        let pass = self.pass(lora, &inputs);
        let x = self.hidden(&pass, &inputs)?;
        self.project_logits(&pass, &x)
    }

    /// The loss of each position, 0 where it has no label.
    ///
    /// # Errors
    /// `MODEL_TOO_LONG`; the backend's own.
    pub fn forward_losses(&self, lora: Option<&LoraSet<B>>, batch: &Batch) -> Result<Vec<f32>> {
        self.forward_losses_counting(lora, batch, None)
    }

    /// As [`Model::forward_losses`]; routers add what they do to `loads`.
    ///
    /// # Errors
    /// `MODEL_TOO_LONG`; the backend's own.
    pub fn forward_losses_counting(
        &self,
        lora: Option<&LoraSet<B>>,
        batch: &Batch,
        loads: Option<&ExpertLoads>,
    ) -> Result<Vec<f32>> {
        if let Some(loads) = loads {
            loads.begin();
        }
        let inputs = self.inputs(batch, 0.0)?;
        let mut losses = inputs.losses(&self.device)?;
        self.device.step(|| {
            let pass = Pass {
                loads,
                ..self.pass(lora, &inputs)
            };
            let x = self.hidden(&pass, &inputs)?;
            let normed = self.final_norm.forward(&pass, &x)?.y;
            drop(x);
            self.losses(&pass, &inputs, &normed, (&mut losses, None))
        })?;
        Ok(self.device.read_f32(&losses)?)
    }

    /// The loss of each position, and the gradient of `gradient_scale · Σ losses` **added** to `gradients`.
    ///
    /// # Errors
    /// `MODEL_TOO_LONG`; the backend's own.
    pub fn forward_backward(
        &self,
        lora: &LoraSet<B>,
        gradients: &mut LoraGradients<B>,
        batch: &Batch,
        settings: BackwardSettings,
    ) -> Result<Vec<f32>> {
        let inputs = self.inputs(batch, settings.gradient_scale)?;
        let mut losses = inputs.losses(&self.device)?;
        let budget = settings.activation_budget_bytes;
        self.device
            .step(|| self.queue_forward_backward(lora, gradients, (&inputs, &mut losses), budget))?;
        Ok(self.device.read_f32(&losses)?)
    }

    /// The ops of [`Model::forward_backward`]: they read the inputs and write the losses, and nothing in them depends on anything
    /// else of the batch than its shape. Of activations `budget_bytes` may be kept instead of being computed again.
    ///
    /// # Errors
    /// The backend's own.
    pub fn queue_forward_backward(
        &self,
        lora: &LoraSet<B>,
        gradients: &mut LoraGradients<B>,
        (inputs, losses): (&Inputs<B>, &mut Tensor<B>),
        budget_bytes: u64,
    ) -> Result<()> {
        let pass = self.pass(Some(lora), inputs);
        let lowest = self.lowest_adapted(&pass);
        let (x, mut traces) = self.forward_traced(&pass, inputs, lowest, budget_bytes)?;
        let normed = self.final_norm.forward(&pass, &x)?;
        let mut dnormed = pass.activation(x.shape())?;
        self.losses(&pass, inputs, &normed.y, (losses, Some(&mut dnormed)))?;
        let mut gradient = pass.activation(x.shape())?;
        let saved = (&x, &normed.rstd);
        self.final_norm
            .backward(&pass, saved, &dnormed, (&mut gradient, Write::Overwrite))?;
        drop((x, normed, dnormed));
        for (place, layer) in self.layers.iter().enumerate().rev() {
            let Some(trace) = traces.pop() else { break };
            layer.backward(&pass, gradients, trace, &mut gradient, place > lowest)?;
        }
        Ok(())
    }

    /// The first layer with an adapter: no gradient is needed below it.
    fn lowest_adapted(&self, pass: &Pass<'_, B>) -> usize {
        self.layers.iter().take_while(|layer| !layer.is_adapted(pass)).count()
    }

    /// The forward pass with one trace for each layer from `lowest` on. As many of the last layers as the budget allows keep
    /// everything: their traces are freed first on the way back, just when the others need memory to compute theirs again.
    fn forward_traced(
        &self,
        pass: &Pass<'_, B>,
        inputs: &Inputs<B>,
        lowest: usize,
        budget_bytes: u64,
    ) -> Result<(Tensor<B>, Vec<LayerTrace<B>>)> {
        let mut kept_bytes = 0;
        let fits = |layer: &&Layer<B>| {
            kept_bytes += layer.inner_trace_bytes(pass);
            kept_bytes <= budget_bytes
        };
        let first_kept = self.layers.len() - self.layers.iter().rev().take_while(fits).count();
        let mut x = self.embed(pass, inputs)?;
        let mut traces = Vec::new();
        for (place, layer) in self.layers.iter().enumerate() {
            if place < lowest {
                layer.forward(pass, &mut x)?;
            } else {
                traces.push(layer.forward_traced(pass, &mut x, place >= first_kept)?);
            }
        }
        Ok((x, traces))
    }

    fn losses(
        &self,
        pass: &Pass<'_, B>,
        inputs: &Inputs<B>,
        x: &Tensor<B>,
        (losses, dx): (&mut Tensor<B>, Option<&mut Tensor<B>>),
    ) -> Result<()> {
        self.device.linear_cross_entropy(LinearCrossEntropy {
            x,
            head: self.head(),
            labels: &inputs.labels,
            precision: pass.precision,
            losses,
            dx: dx.map(|dx| (dx, &inputs.gradient_scale)),
        })?;
        Ok(())
    }
}
