//! Rotary position embedding (Su et al. 2021, arXiv 2104.09864) in the half-split layout of
//! Hugging Face's Llama and Qwen models.
//!
//! With `P = rotary / 2` pairs, for pair `p` at position `t` and angle `θ = t · f_p`:
//!
//! ```text
//! y[p]     = x[p] · cos θ − x[p + P] · sin θ
//! y[p + P] = x[p + P] · cos θ + x[p] · sin θ
//! ```
//!
//! Elements beyond `rotary` pass unchanged (partial rotary). The backward pass is the rotation by `−θ`.

use crate::error::Result;
use crate::ops::Device;
use crate::tensor::Tensor;

/// Cosines and sines of every position and frequency, computed once.
pub struct RopeTable<D: Device> {
    /// f32 `[positions, rotary / 2]`.
    pub cos: Tensor<D>,
    /// f32 `[positions, rotary / 2]`.
    pub sin: Tensor<D>,
}

/// Which way to rotate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RopeDirection {
    /// By `+θ`.
    Forward,
    /// By `−θ`: the transpose, for gradients.
    Backward,
}

/// Rotary embedding.
pub trait RopeOps: Device {
    /// Rotates `x`, activation `[T, H, D]`, **in place**. `positions` is i32 `[T]`, each below the table's length.
    ///
    /// # Errors
    /// Shapes or dtypes outside the contract; a position beyond the table.
    fn rope(
        &self,
        x: &mut Tensor<Self>,
        positions: &Tensor<Self>,
        table: &RopeTable<Self>,
        direction: RopeDirection,
    ) -> Result<()>;
}
