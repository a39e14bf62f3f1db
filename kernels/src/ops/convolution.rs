//! Short causal convolution of each channel by itself, then SiLU, over packed documents.
//!
//! With `x` before a document's first row taken as zero:
//!
//! ```text
//! z_tc  = bias_c + Σ_{j < K} w_cj · x_{t − (K − 1) + j, c}        w_c,K−1 meets the current token
//! y     = silu(z)
//!
//! dz    = dy · σ(z) · (1 + z (1 − σ(z)))
//! dx_tc = Σ_{j < K} w_cj · dz_{t + (K − 1) − j, c}                rows of the same document only
//! ```
//!
//! *Generation.* `state` takes in and gives out the last `K − 1` inputs of every document, so a prompt is one call, and each
//! further token of `n` sequences is a call with `n` documents of one token.

use crate::error::Result;
use crate::ops::Device;
use crate::tensor::{Segments, Tensor};

/// Arguments of [`ConvolutionOps::convolution_forward`].
pub struct ConvolutionForward<'a, D: Device> {
    /// Activation `[T, C]`.
    pub x: &'a Tensor<D>,
    /// Frozen f32 or bf16 `[C, K]`, any `K` from 1.
    pub weight: &'a Tensor<D>,
    /// Frozen f32 or bf16 `[C]`.
    pub bias: Option<&'a Tensor<D>>,
    /// Documents.
    pub segments: &'a Segments,
    /// In and out: the `K − 1` inputs before each document and the last `K − 1` up to its end, oldest first, f32
    /// `[documents, K − 1, C]`. `None`: zero before each document, and not kept.
    pub state: Option<&'a mut Tensor<D>>,
    /// Out: activation `[T, C]`.
    pub y: &'a mut Tensor<D>,
}

/// Arguments of [`ConvolutionOps::convolution_backward`], for a forward pass without a state.
pub struct ConvolutionBackward<'a, D: Device> {
    /// Activation `[T, C]`: the forward input.
    pub x: &'a Tensor<D>,
    /// Frozen f32 or bf16 `[C, K]`.
    pub weight: &'a Tensor<D>,
    /// Frozen f32 or bf16 `[C]`.
    pub bias: Option<&'a Tensor<D>>,
    /// Documents.
    pub segments: &'a Segments,
    /// Gradient of the output, activation `[T, C]`.
    pub dy: &'a Tensor<D>,
    /// Out: activation `[T, C]`.
    pub dx: &'a mut Tensor<D>,
}

/// Depthwise causal convolution with SiLU. The weights are frozen: there is no gradient for them.
pub trait ConvolutionOps: Device {
    /// `y = silu(convolution(x))`. Sums in f32.
    ///
    /// # Errors
    /// Shapes or dtypes outside the contract.
    fn convolution_forward(&self, call: ConvolutionForward<'_, Self>) -> Result<()>;

    /// `dx` from `dy`; `z` is recomputed.
    ///
    /// # Errors
    /// Shapes or dtypes outside the contract.
    fn convolution_backward(&self, call: ConvolutionBackward<'_, Self>) -> Result<()>;
}
