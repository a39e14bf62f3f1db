//! What all layers of one pass share: the device, the precision, the adapter, the packed documents.

use std::sync::Arc;

use brightrun_kernels::ops::{Precision, RopeTable};
use brightrun_kernels::{Backend, DType, Segments, Shape, Tensor};

use crate::error::Result;
use crate::model::linear::Linear;
use crate::model::loads::ExpertLoads;
use crate::model::lora::{LoraSet, ModuleId};

/// The surroundings of one forward or forward-and-backward pass.
pub struct Pass<'a, B: Backend> {
    /// Where tensors live.
    pub device: &'a B,
    /// Precision of products.
    pub precision: Precision,
    /// Dtype of activations.
    pub dtype: DType,
    /// The adapter, if any.
    pub lora: Option<&'a LoraSet<B>>,
    /// i32 `[T]`: position of each token in its document.
    pub positions: &'a Tensor<B>,
    /// Rotations for all those positions.
    pub rope: Arc<RopeTable<B>>,
    /// The packed documents.
    pub segments: &'a Segments,
    /// Where routers count how many tokens they send to each expert, if anybody asks.
    pub loads: Option<&'a ExpertLoads>,
}

impl<B: Backend> Pass<'_, B> {
    /// An unwritten activation tensor.
    ///
    /// # Errors
    /// The backend's own.
    pub fn activation(&self, shape: impl Into<Shape>) -> Result<Tensor<B>> {
        Ok(self.device.alloc(self.dtype, shape)?)
    }

    /// A copy of an activation.
    ///
    /// # Errors
    /// The backend's own.
    pub fn duplicate(&self, source: &Tensor<B>) -> Result<Tensor<B>> {
        let mut copy = self.device.alloc(source.dtype(), source.shape())?;
        self.device.copy(source, &mut copy)?;
        Ok(copy)
    }

    /// The same values in another dtype, f32 or bf16.
    ///
    /// # Errors
    /// The backend's own.
    pub fn converted(&self, tensor: Tensor<B>, dtype: DType) -> Result<Tensor<B>> {
        if tensor.dtype() == dtype {
            return Ok(tensor);
        }
        let mut converted = self.device.alloc(dtype, tensor.shape())?;
        self.device.copy(&tensor, &mut converted)?;
        Ok(converted)
    }

    /// Whether the pass has an adapter for any of these modules.
    pub fn adapts_any(&self, modules: &[ModuleId]) -> bool {
        self.lora
            .is_some_and(|lora| modules.iter().any(|module| lora.adapts(*module)))
    }

    /// Bytes of the adapters' `u` of some projections: f32 `[T, R]` each.
    pub fn hidden_bytes(&self, linears: &[&Linear<B>]) -> u64 {
        let Some(lora) = self.lora else { return 0 };
        let adapted = linears.iter().filter(|linear| lora.adapts(linear.module)).count();
        (adapted * self.tokens() * lora.config().rank * DType::F32.size_bytes()) as u64
    }

    /// `T`.
    pub fn tokens(&self) -> usize {
        self.segments.tokens()
    }
}
