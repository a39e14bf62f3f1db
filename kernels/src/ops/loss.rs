//! The frozen head and cross-entropy in one op, so that logits `[T, V]` never exist as a whole
//! (Wijmans et al. 2024, arXiv 2411.09009).
//!
//! ```text
//! z_t    = x_t · Wᵀ                         [V], f32, a chunk of rows at a time
//! loss_t = log Σ_v exp(z_tv) − z_t,label    0 where label = −100
//! dx_t   = g · (softmax(z_t) − onehot(label)) · W
//! ```

use crate::error::Result;
use crate::ops::{Device, Precision};
use crate::tensor::Tensor;
use crate::weight::Weight;

/// Arguments of [`LossOps::linear_cross_entropy`].
pub struct LinearCrossEntropy<'a, D: Device> {
    /// Activation `[T, C]`: the final hidden state.
    pub x: &'a Tensor<D>,
    /// Frozen `[V, C]`.
    pub head: &'a Weight<D>,
    /// i32 `[T]`: the token that follows position `t`, or −100 where nothing is learnt. Already shifted by the caller.
    pub labels: &'a Tensor<D>,
    /// Precision of the products.
    pub precision: Precision,
    /// Out: f32 `[T]`, the loss of each position, 0 where it is not supervised.
    pub losses: &'a mut Tensor<D>,
    /// Out: gradient of `g · Σ loss_t` for `x`, activation `[T, C]`, with `g`, f32 `[1]`: it is another number in each step, and a
    /// recording of the op repeats numbers but reads tensors. `None` when only losses are wanted.
    pub dx: Option<(&'a mut Tensor<D>, &'a Tensor<D>)>,
}

/// Cross-entropy.
pub trait LossOps: Device {
    /// Per-position losses and, if asked for, the gradient of the hidden state. Softmax in f32. Rows that are not supervised
    /// get a zero gradient, and cost nothing where the host knows which they are.
    ///
    /// # Errors
    /// Shapes or dtypes outside the contract; a label that is neither −100 nor below `V`.
    fn linear_cross_entropy(&self, call: LinearCrossEntropy<'_, Self>) -> Result<()>;
}
