//! Gates and the norms that go with them, and moving columns between fused and separate projections.
//!
//! With `σ` the logistic function:
//!
//! ```text
//! sigmoid gate    y = x · σ(g)                      dx = dy · σ(g)        dg = dy · x · σ(g) (1 − σ(g))
//!
//! gated norm      r = 1 / sqrt(mean(x²) + eps)      n = x · r · w         y = n · silu(z)
//!                 dz = dy · n · σ(z) (1 + z (1 − σ(z)))
//!                 h  = dy · silu(z) · w             dx = r (h − x · r² · mean(h · x))
//!
//! l2 norm         r = 1 / sqrt(Σ x² + eps)          y = x · r
//!                 dx = r (dy − x · r² · Σ dy · x)
//! ```
//!
//! `eps` keeps `r` finite for a row of zeros, forward and backward.

use crate::error::Result;
use crate::ops::{Device, Write};
use crate::tensor::Tensor;

/// Arguments of [`GateOps::sigmoid_gate_backward`].
pub struct SigmoidGateBackward<'a, D: Device> {
    /// Activation `[N, C]`: the forward input.
    pub x: &'a Tensor<D>,
    /// Activation `[N, C]` or `[N, 1]`: the forward gate.
    pub gate: &'a Tensor<D>,
    /// Gradient of the output, `[N, C]`.
    pub dy: &'a Tensor<D>,
    /// Out: `[N, C]`.
    pub dx: &'a mut Tensor<D>,
    /// Out: shaped as `gate`; for `[N, 1]` the sum over the row.
    pub dgate: &'a mut Tensor<D>,
}

/// Arguments of [`GateOps::gated_norm_forward`].
pub struct GatedNormForward<'a, D: Device> {
    /// Activation `[N, C]` (outer extents are multiplied into `N`).
    pub x: &'a Tensor<D>,
    /// `z`, shaped as `x`.
    pub gate: &'a Tensor<D>,
    /// Frozen f32 or bf16 `[C]`, applied as it is.
    pub weight: &'a Tensor<D>,
    /// Added to the mean square.
    pub eps: f32,
    /// Out: shaped as `x`.
    pub y: &'a mut Tensor<D>,
    /// Out: `r`, f32 `[N]`; the backward pass needs it.
    pub rstd: &'a mut Tensor<D>,
}

/// Arguments of [`GateOps::gated_norm_backward`].
pub struct GatedNormBackward<'a, D: Device> {
    /// Activation `[N, C]`: the forward input.
    pub x: &'a Tensor<D>,
    /// `z`, shaped as `x`.
    pub gate: &'a Tensor<D>,
    /// Frozen f32 or bf16 `[C]`.
    pub weight: &'a Tensor<D>,
    /// f32 `[N]` from the forward pass.
    pub rstd: &'a Tensor<D>,
    /// Gradient of the output, shaped as `x`.
    pub dy: &'a Tensor<D>,
    /// Out: shaped as `x`.
    pub dx: &'a mut Tensor<D>,
    /// Out: gradient of `z`, shaped as `x`.
    pub dgate: &'a mut Tensor<D>,
}

/// Which columns [`GateOps::copy_columns`] copies: in each of `groups` equal parts of a row, `width` columns.
///
/// Group `g` of the source is its columns `g · S / groups ..`, with `S` the length of its row, and likewise for the target. So one
/// group with offsets cuts a plain concatenation, and several undo the interleaving of fused projections: the gated attention's
/// query and gate (`H` groups of `2 · D`), or DeltaNet's `q, k, v, z` per key head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Columns {
    /// Parts of a row, at least 1; divides both rows' lengths.
    pub groups: usize,
    /// First column within a group of the source.
    pub source: usize,
    /// First column within a group of the target.
    pub target: usize,
    /// Columns of each group that are copied.
    pub width: usize,
}

/// Gates, gated and l2 norms, and columns.
pub trait GateOps: Device {
    /// `y = x · σ(gate)`, replacing or adding to `y`. `x` and `y` are `[N, C]`; `gate` is the same or `[N, 1]`, one gate for a
    /// whole row.
    ///
    /// # Errors
    /// Shapes or dtypes outside the contract.
    fn sigmoid_gate_forward(
        &self,
        x: &Tensor<Self>,
        gate: &Tensor<Self>,
        y: &mut Tensor<Self>,
        write: Write,
    ) -> Result<()>;

    /// Writes `dx` and `dgate`.
    ///
    /// # Errors
    /// Shapes or dtypes outside the contract.
    fn sigmoid_gate_backward(&self, call: SigmoidGateBackward<'_, Self>) -> Result<()>;

    /// `y = norm(x) · w · silu(gate)`, also writing `rstd`. Mean of squares in f32 or wider.
    ///
    /// # Errors
    /// Shapes or dtypes outside the contract.
    fn gated_norm_forward(&self, call: GatedNormForward<'_, Self>) -> Result<()>;

    /// Writes `dx` and `dgate`. The weight is frozen.
    ///
    /// # Errors
    /// Shapes or dtypes outside the contract.
    fn gated_norm_backward(&self, call: GatedNormBackward<'_, Self>) -> Result<()>;

    /// `y = x · r` over the innermost extent, also writing `r`, f32 `[N]`.
    ///
    /// # Errors
    /// Shapes or dtypes outside the contract.
    fn l2_norm_forward(&self, x: &Tensor<Self>, eps: f32, y: &mut Tensor<Self>, rnorm: &mut Tensor<Self>)
    -> Result<()>;

    /// `dx` from `dy`; `x` is the forward input and `rnorm` the forward `r`.
    ///
    /// # Errors
    /// Shapes or dtypes outside the contract.
    fn l2_norm_backward(
        &self,
        x: &Tensor<Self>,
        rnorm: &Tensor<Self>,
        dy: &Tensor<Self>,
        dx: &mut Tensor<Self>,
    ) -> Result<()>;

    /// Copies columns; the target's other columns stay as they are. Rows are the first extent, so `[T, H, D]` has `T` rows of
    /// `H · D` columns. Exact; the two dtypes are the same.
    ///
    /// # Errors
    /// Shapes or dtypes outside the contract; columns beyond a group's end.
    fn copy_columns(&self, source: &Tensor<Self>, target: &mut Tensor<Self>, columns: Columns) -> Result<()>;
}
