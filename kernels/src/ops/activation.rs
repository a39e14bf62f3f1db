//! Element-wise ops.
//!
//! SwiGLU (Shazeer 2020, arXiv 2002.05202), with `σ` the logistic function and `silu(g) = g σ(g)`:
//!
//! ```text
//! y     = silu(gate) · up
//! dup   = dy · silu(gate)
//! dgate = dy · up · σ(gate) · (1 + gate · (1 − σ(gate)))
//! ```

use crate::error::Result;
use crate::ops::Device;
use crate::tensor::Tensor;

/// Element-wise ops. All tensors of one call have the same shape and dtype.
pub trait ActivationOps: Device {
    /// `y += x`: the residual connection.
    ///
    /// # Errors
    /// Shapes or dtypes outside the contract.
    fn add_assign(&self, y: &mut Tensor<Self>, x: &Tensor<Self>) -> Result<()>;

    /// `y = silu(gate) · up`, all `[T, F]`.
    ///
    /// # Errors
    /// Shapes or dtypes outside the contract.
    fn swiglu_forward(&self, gate: &Tensor<Self>, up: &Tensor<Self>, y: &mut Tensor<Self>) -> Result<()>;

    /// Writes `dgate` and `dup`, all `[T, F]`.
    ///
    /// # Errors
    /// Shapes or dtypes outside the contract.
    fn swiglu_backward(
        &self,
        gate: &Tensor<Self>,
        up: &Tensor<Self>,
        dy: &Tensor<Self>,
        dgate: &mut Tensor<Self>,
        dup: &mut Tensor<Self>,
    ) -> Result<()>;
}
