//! Gradient norm and AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) as torch 2 computes them.
//!
//! ```text
//! g  = gradient_scale · gradient
//! w ← w − lr · decay · w
//! m ← β₁ m + (1 − β₁) g          v ← β₂ v + (1 − β₂) g²
//! w ← w − lr / (1 − β₁ᵗ) · m / (sqrt(v) / sqrt(1 − β₂ᵗ) + ε)
//! ```
//!
//! *8-bit moments* (Dettmers et al. 2022, arXiv 2110.02861), as bitsandbytes 0.50 has them: blocks of [`MOMENT_BLOCK`] elements
//! in row-major order share a scale; an element is `map[code] · absmax` with the signed [dynamic map](crate::dynamic) for `m` and
//! the unsigned one for `v`. A step decodes, updates in f32 as above, and encodes again:
//!
//! ```text
//! absmax_b = max |x| over the block        code = the map's value nearest to x / absmax_b, of two the lower
//! ```
//!
//! One difference: a positive `v` never gets the code of 0. Rounded to 0 beside an `m` that is not, the next step with no
//! gradient (a routed expert without tokens) would divide by ε alone.

use crate::contract;
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::Device;
use crate::tensor::{Shape, Tensor};

/// Settings of one optimizer step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Learning rate of this step.
    pub learning_rate: f32,
    /// β₁.
    pub beta1: f32,
    /// β₂.
    pub beta2: f32,
    /// ε.
    pub epsilon: f32,
    /// Decoupled weight decay.
    pub weight_decay: f32,
    /// `t`, counted from 1.
    pub step: u64,
    /// Factor of the gradient: the clipping coefficient, or 1.
    pub gradient_scale: f32,
}

/// Elements that share one scale in 8-bit moments.
pub const MOMENT_BLOCK: usize = 256;

/// A moment in 8 bits, block by block.
#[derive(Debug)]
pub struct BlockMoment<D: Device> {
    /// u8, shaped as the parameter.
    pub codes: Tensor<D>,
    /// f32 `[ceil(elements / 256)]`.
    pub absmax: Tensor<D>,
}

impl<D: Device> BlockMoment<D> {
    /// A moment of zeros: scales of 0.
    ///
    /// # Errors
    /// As [`Device::alloc`].
    pub fn zeros(device: &D, shape: Shape) -> Result<Self> {
        Ok(Self {
            codes: device.zeros(DType::U8, shape)?,
            absmax: device.zeros(DType::F32, [shape.elements().div_ceil(MOMENT_BLOCK)])?,
        })
    }

    /// Bytes of codes and scales.
    pub fn size_bytes(&self) -> usize {
        self.codes.size_bytes() + self.absmax.size_bytes()
    }
}

/// Both moments of a parameter, to be updated.
#[derive(Debug)]
pub enum MomentsMut<'a, D: Device> {
    /// f32, shaped as the parameter.
    Single {
        /// Mean of gradients.
        m: &'a mut Tensor<D>,
        /// Mean of squared gradients.
        v: &'a mut Tensor<D>,
    },
    /// In 8 bits.
    Blocks {
        /// Mean of gradients.
        m: &'a mut BlockMoment<D>,
        /// Mean of squared gradients.
        v: &'a mut BlockMoment<D>,
    },
}

/// One of many parameters to be updated.
#[derive(Debug)]
pub struct Trained<'a, D: Device> {
    /// f32.
    pub parameter: &'a mut Tensor<D>,
    /// f32, shaped as the parameter.
    pub gradient: &'a Tensor<D>,
    /// Its moments.
    pub moments: MomentsMut<'a, D>,
}

impl<D: Device> Trained<'_, D> {
    /// Whether [`OptimizerOps::adamw_step`], or its form in 8 bits, would take it.
    ///
    /// # Errors
    /// Shapes or dtypes outside the contract.
    pub(crate) fn checked(&self, settings: &AdamW) -> Result<()> {
        match &self.moments {
            MomentsMut::Single { m, v } => contract::adamw_step(self.parameter, self.gradient, m, v, settings),
            MomentsMut::Blocks { m, v } => {
                contract::adamw_8bit_step(self.parameter, self.gradient, (&**m, &**v), settings)
            }
        }
    }
}

/// Optimizer arithmetic on f32 tensors.
pub trait OptimizerOps: Device {
    /// `Σ x²` over all tensors in f64, in a fixed order. Non-finite when any element is.
    ///
    /// # Errors
    /// Dtypes outside the contract.
    fn squared_norm(&self, tensors: &[&Tensor<Self>]) -> Result<f64>;

    /// One AdamW step on one tensor; updates `parameter`, `m` and `v` in place. All f32 and of one shape.
    ///
    /// # Errors
    /// Shapes or dtypes outside the contract.
    fn adamw_step(
        &self,
        parameter: &mut Tensor<Self>,
        gradient: &Tensor<Self>,
        m: &mut Tensor<Self>,
        v: &mut Tensor<Self>,
        settings: &AdamW,
    ) -> Result<()>;

    /// As [`OptimizerOps::adamw_step`] with both moments in 8 bits; updates all three in place.
    ///
    /// # Errors
    /// Shapes or dtypes outside the contract.
    fn adamw_8bit_step(
        &self,
        parameter: &mut Tensor<Self>,
        gradient: &Tensor<Self>,
        m: &mut BlockMoment<Self>,
        v: &mut BlockMoment<Self>,
        settings: &AdamW,
    ) -> Result<()>;

    /// The step of each of many parameters, bit for bit as [`OptimizerOps::adamw_step`] and [`OptimizerOps::adamw_8bit_step`] do
    /// it: that is what it means, and what a backend does for which a call costs nothing.
    ///
    /// # Errors
    /// Shapes or dtypes outside the contract, of any of them and before anything is updated.
    fn adamw_step_many(&self, trained: Vec<Trained<'_, Self>>, settings: &AdamW) -> Result<()> {
        trained.iter().try_for_each(|one| one.checked(settings))?;
        for one in trained {
            match one.moments {
                MomentsMut::Single { m, v } => self.adamw_step(one.parameter, one.gradient, m, v, settings)?,
                MomentsMut::Blocks { m, v } => self.adamw_8bit_step(one.parameter, one.gradient, m, v, settings)?,
            }
        }
        Ok(())
    }

    /// Sets every element of many f32 tensors to zero, as [`Device::fill_zero`] does.
    ///
    /// # Errors
    /// Dtypes outside the contract, before anything is changed.
    fn zero_many(&self, tensors: Vec<&mut Tensor<Self>>) -> Result<()> {
        tensors.iter().try_for_each(|tensor| contract::zero_many(tensor))?;
        tensors.into_iter().try_for_each(|tensor| self.fill_zero(tensor))
    }
}
