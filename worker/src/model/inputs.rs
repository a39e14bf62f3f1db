//! A batch in a backend's memory.

use std::sync::Arc;

use brightrun_kernels::ops::RopeTable;
use brightrun_kernels::{Backend, DType, Segments, Tensor};

use crate::error::Result;
use crate::model::batch::Batch;
use crate::model::transformer::Model;

/// What a pass reads of a batch. All that differs between two batches of one shape is in these tensors, so a pass that was
/// recorded is done again for another batch by [`Inputs::replace`] alone.
pub struct Inputs<B: Backend> {
    /// i32 `[T]`.
    pub(crate) ids: Tensor<B>,
    /// i32 `[T]`.
    pub(crate) labels: Tensor<B>,
    /// i32 `[T]`: position of each token in its document.
    pub(crate) positions: Tensor<B>,
    /// f32 `[1]`: factor of the summed loss whose gradient is taken.
    pub(crate) gradient_scale: Tensor<B>,
    /// Rotations for all those positions.
    pub(crate) rope: Arc<RopeTable<B>>,
    /// The packed documents.
    pub(crate) segments: Segments,
}

/// What two batches must have in common for one recording to serve both.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct InputShape {
    /// Tokens.
    pub tokens: usize,
    /// Documents, empty ones included.
    pub documents: usize,
    /// Rows of the rotary table.
    pub rotations: usize,
}

impl<B: Backend> Model<B> {
    /// A batch in the memory of this model's device.
    ///
    /// # Errors
    /// `MODEL_TOO_LONG`; the backend's own.
    pub fn inputs(&self, batch: &Batch, gradient_scale: f32) -> Result<Inputs<B>> {
        let rope = self.rotations(batch)?;
        let tokens = [batch.tokens()];
        Ok(Inputs {
            ids: self.device.upload_i32(tokens, &batch.input_ids)?,
            labels: self.device.upload_i32(tokens, &batch.labels)?,
            positions: self.device.upload_i32(tokens, &batch.positions)?,
            gradient_scale: self.device.upload_f32([1], &[gradient_scale])?,
            rope,
            segments: batch.segments.clone(),
        })
    }

    /// The shape of a batch.
    ///
    /// # Errors
    /// `MODEL_TOO_LONG`; the backend's own.
    pub fn input_shape(&self, batch: &Batch) -> Result<InputShape> {
        Ok(InputShape {
            tokens: batch.tokens(),
            documents: batch.segments.len(),
            rotations: self.rotations(batch)?.cos.shape().rows(),
        })
    }
}

impl<B: Backend> Inputs<B> {
    /// Puts another batch of the same shape in the place of this one.
    ///
    /// # Errors
    /// The backend's own, also for another shape.
    pub fn replace(&mut self, device: &B, batch: &Batch, gradient_scale: f32) -> Result<()> {
        let parts = [
            (&mut self.ids, &batch.input_ids),
            (&mut self.labels, &batch.labels),
            (&mut self.positions, &batch.positions),
        ];
        for (tensor, values) in parts {
            device.write(tensor, &little_endian(values))?;
        }
        device.write(&mut self.gradient_scale, &gradient_scale.to_le_bytes())?;
        self.segments = batch.segments.clone();
        Ok(())
    }

    /// `T`.
    pub fn tokens(&self) -> usize {
        self.segments.tokens()
    }

    /// Room for the loss of each position, f32 `[T]`.
    ///
    /// # Errors
    /// The backend's own.
    pub fn losses(&self, device: &B) -> Result<Tensor<B>> {
        Ok(device.alloc(DType::F32, [self.tokens()])?)
    }
}

fn little_endian(values: &[i32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}
