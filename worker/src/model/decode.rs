//! One document, continued token by token.

use brightrun_kernels::{Backend, Weight};

use crate::error::Result;
use crate::model::batch::Batch;
use crate::model::lora::LoraSet;
use crate::model::mixer::MixerState;
use crate::model::transformer::Model;

/// Decodes one document with a cache of what it has read.
pub struct Decoder<'a, B: Backend> {
    model: &'a Model<B>,
    lora: Option<&'a LoraSet<B>>,
    states: Vec<MixerState<B>>,
    length: usize,
}

impl<'a, B: Backend> Decoder<'a, B> {
    /// A decoder for a document of up to `capacity` tokens.
    ///
    /// # Errors
    /// The backend's own.
    pub fn new(model: &'a Model<B>, lora: Option<&'a LoraSet<B>>, capacity: usize) -> Result<Self> {
        let dtype = model.device.activation_dtype(model.precision);
        Ok(Self {
            model,
            lora,
            states: model
                .layers
                .iter()
                .map(|layer| layer.mixer.state(&model.device, dtype, capacity))
                .collect::<Result<_>>()?,
            length: 0,
        })
    }

    /// Tokens it has read.
    pub fn length(&self) -> usize {
        self.length
    }

    /// Reads the next tokens, at least one, and gives the logits `[V]` of what follows the last of them.
    ///
    /// # Errors
    /// `MODEL_TOO_LONG` beyond the model's positions; the backend's own, also beyond the capacity.
    pub fn read(&mut self, ids: &[i32]) -> Result<Vec<f32>> {
        let mut batch = Batch::prompt(ids);
        for position in &mut batch.positions {
            *position += self.length as i32;
        }
        let model = self.model;
        let inputs = model.inputs(&batch, 0.0)?;
        let pass = model.pass(self.lora, &inputs);
        let mut x = model.embed(&pass, &inputs)?;
        for (layer, state) in model.layers.iter().zip(&mut self.states) {
            layer.forward_cached(&pass, &mut x, state)?;
        }
        self.length += ids.len();
        let last = model.device.upload_i32([1], &[ids.len() as i32 - 1])?;
        let mut row = pass.activation([1, model.config.hidden])?;
        model.device.gather_rows(&Weight::Dense(x), &last, &mut row)?;
        model.project_logits(&pass, &row)
    }
}
