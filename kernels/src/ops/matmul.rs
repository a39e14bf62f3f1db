//! Frozen linear layers with LoRA on top.
//!
//! The adapter is applied in split form and never merged (Hu et al. 2021, arXiv 2106.09685):
//!
//! ```text
//! u  = x · Aᵀ                       [T, R]
//! y  = x · Wᵀ + bias + s · u · Bᵀ   [T, O]
//!
//! dx = dy · W + s · (dy · B) · A
//! dA = s · (dy · B)ᵀ · x
//! dB = s · dyᵀ · u
//! ```
//!
//! `W` and `bias` are frozen, so there is no dW.

use crate::error::Result;
use crate::ops::Device;
use crate::tensor::Tensor;
use crate::weight::Weight;

/// In which precision the factors of a product enter it. Sums are always f32 or wider.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Precision {
    /// Activations as they are, in f32; weights widened exactly. The reference.
    F32,
    /// Activations rounded to bf16 (nearest even) before the product; weights are bf16 already, or rounded.
    Bf16,
}

/// Whether a result replaces what is there or is added to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Write {
    /// Replace.
    Overwrite,
    /// Add.
    Accumulate,
}

/// The adapter of one linear layer, going forward.
pub struct LoraForward<'a, D: Device> {
    /// f32 `[R, I]`.
    pub a: &'a Tensor<D>,
    /// f32 `[O, R]`.
    pub b: &'a Tensor<D>,
    /// `s = alpha / R`.
    pub scale: f32,
    /// Out: `u`, f32 `[T, R]`; the backward pass needs it.
    pub hidden: &'a mut Tensor<D>,
}

/// Arguments of [`MatmulOps::linear_forward`].
pub struct LinearForward<'a, D: Device> {
    /// Activation `[T, I]`.
    pub x: &'a Tensor<D>,
    /// Frozen `[O, I]`.
    pub weight: &'a Weight<D>,
    /// Frozen f32 or bf16 `[O]`.
    pub bias: Option<&'a Tensor<D>>,
    /// The adapter, if this layer has one.
    pub lora: Option<LoraForward<'a, D>>,
    /// Precision of the products.
    pub precision: Precision,
    /// Out: activation `[T, O]`.
    pub y: &'a mut Tensor<D>,
}

/// The adapter of one linear layer, going backward.
pub struct LoraBackward<'a, D: Device> {
    /// The layer's input, activation `[T, I]`.
    pub x: &'a Tensor<D>,
    /// f32 `[R, I]`.
    pub a: &'a Tensor<D>,
    /// f32 `[O, R]`.
    pub b: &'a Tensor<D>,
    /// `s = alpha / R`.
    pub scale: f32,
    /// `u` of the forward pass, f32 `[T, R]`.
    pub hidden: &'a Tensor<D>,
    /// In and out: dA is **added** here, f32 `[R, I]`.
    pub gradient_a: &'a mut Tensor<D>,
    /// In and out: dB is **added** here, f32 `[O, R]`.
    pub gradient_b: &'a mut Tensor<D>,
}

/// Arguments of [`MatmulOps::linear_backward`].
pub struct LinearBackward<'a, D: Device> {
    /// Gradient of the output, activation `[T, O]`.
    pub dy: &'a Tensor<D>,
    /// Frozen `[O, I]`.
    pub weight: &'a Weight<D>,
    /// The adapter, if this layer has one.
    pub lora: Option<LoraBackward<'a, D>>,
    /// Precision of the products.
    pub precision: Precision,
    /// Gradient of the input, activation `[T, I]`, and how it is written; `None` where nothing below is trained.
    pub dx: Option<(&'a mut Tensor<D>, Write)>,
}

/// Products with frozen matrices.
pub trait MatmulOps: Device {
    /// `y = x · Wᵀ + bias + s · (x · Aᵀ) · Bᵀ`, also writing `u = x · Aᵀ`.
    ///
    /// `W` may be f32, bf16, f16 or NF4; NF4 is decoded to bf16 values (see [`Nf4Weight`](crate::Nf4Weight)) and then used
    /// like bf16. Bytes: `W` once, `x` and `y` once.
    ///
    /// # Errors
    /// Shapes or dtypes outside the contract.
    fn linear_forward(&self, call: LinearForward<'_, Self>) -> Result<()>;

    /// `dx = dy · W + s · (dy · B) · A`, `dA += s · (dy · B)ᵀ · x`, `dB += s · dyᵀ · u`.
    ///
    /// # Errors
    /// Shapes or dtypes outside the contract.
    fn linear_backward(&self, call: LinearBackward<'_, Self>) -> Result<()>;
}
