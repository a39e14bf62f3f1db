//! Gradient norm and AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) as torch 2 computes them.
//!
//! ```text
//! g  = gradient_scale · gradient
//! w ← w − lr · decay · w
//! m ← β₁ m + (1 − β₁) g          v ← β₂ v + (1 − β₂) g²
//! w ← w − lr / (1 − β₁ᵗ) · m / (sqrt(v) / sqrt(1 − β₂ᵗ) + ε)
//! ```

use crate::error::Result;
use crate::ops::Device;
use crate::tensor::Tensor;

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
}
