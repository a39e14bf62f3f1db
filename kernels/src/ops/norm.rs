//! RMS normalisation (Zhang & Sennrich 2019, arXiv 1910.07467) over the innermost extent.
//!
//! ```text
//! rstd = 1 / sqrt(mean(x²) + eps)
//! y    = x · rstd · w            (Plain)
//! y    = x · rstd · (1 + w)      (ZeroCentred, Qwen3-Next)
//!
//! g    = dy · w   (or dy · (1 + w))
//! dx   = rstd · (g − x · rstd² · mean(g · x))
//! ```

use crate::error::Result;
use crate::ops::{ActivationOps, Device, Write};
use crate::tensor::Tensor;

/// How the stored weight scales the normalised value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NormWeight {
    /// Multiply by `w`.
    Plain,
    /// Multiply by `1 + w`.
    ZeroCentred,
}

/// Arguments of [`NormOps::rms_norm_forward`]. `N` is the number of rows, `C` the innermost extent.
pub struct NormForward<'a, D: Device> {
    /// Activation `[N, C]` (outer extents are multiplied into `N`).
    pub x: &'a Tensor<D>,
    /// f32 or bf16 `[C]`.
    pub weight: &'a Tensor<D>,
    /// How `weight` is applied.
    pub style: NormWeight,
    /// Added to the mean square.
    pub eps: f32,
    /// Out: activation, shaped as `x`.
    pub y: &'a mut Tensor<D>,
    /// Out: f32 `[N]`; the backward pass needs it.
    pub rstd: &'a mut Tensor<D>,
}

/// Arguments of [`NormOps::add_rms_norm_forward`].
pub struct AddNormForward<'a, D: Device> {
    /// In and out: the residual stream, activation `[N, C]`, to which `added` is added.
    pub x: &'a mut Tensor<D>,
    /// Activation, shaped as `x`.
    pub added: &'a Tensor<D>,
    /// f32 or bf16 `[C]`.
    pub weight: &'a Tensor<D>,
    /// How `weight` is applied.
    pub style: NormWeight,
    /// Added to the mean square.
    pub eps: f32,
    /// Out: the norm of the sum, shaped as `x`.
    pub y: &'a mut Tensor<D>,
    /// Out: f32 `[N]`; the backward pass needs it.
    pub rstd: &'a mut Tensor<D>,
}

/// Arguments of [`NormOps::rms_norm_backward`].
pub struct NormBackward<'a, D: Device> {
    /// Activation `[N, C]`: the forward input.
    pub x: &'a Tensor<D>,
    /// f32 or bf16 `[C]`.
    pub weight: &'a Tensor<D>,
    /// How `weight` is applied.
    pub style: NormWeight,
    /// f32 `[N]` from the forward pass.
    pub rstd: &'a Tensor<D>,
    /// Gradient of the output, shaped as `x`.
    pub dy: &'a Tensor<D>,
    /// Gradient of the input, shaped as `x`, and how it is written.
    pub dx: (&'a mut Tensor<D>, Write),
}

/// RMS norms. The weight is frozen: there is no gradient for it.
pub trait NormOps: Device {
    /// `y = norm(x) · w`, also writing `rstd`. Mean of squares in f32 or wider.
    ///
    /// # Errors
    /// Shapes or dtypes outside the contract.
    fn rms_norm_forward(&self, call: NormForward<'_, Self>) -> Result<()>;

    /// `x += added`, then `y = norm(x) · w` of the sum as it is stored: [`ActivationOps::add_assign`] and
    /// [`NormOps::rms_norm_forward`] in one pass over the rows.
    ///
    /// # Errors
    /// Shapes or dtypes outside the contract.
    fn add_rms_norm_forward(&self, call: AddNormForward<'_, Self>) -> Result<()>
    where
        Self: ActivationOps,
    {
        self.add_assign(call.x, call.added)?;
        self.rms_norm_forward(NormForward {
            x: call.x,
            weight: call.weight,
            style: call.style,
            eps: call.eps,
            y: call.y,
            rstd: call.rstd,
        })
    }

    /// `dx` from `dy`; see the module's formula.
    ///
    /// # Errors
    /// Shapes or dtypes outside the contract.
    fn rms_norm_backward(&self, call: NormBackward<'_, Self>) -> Result<()>;
}
