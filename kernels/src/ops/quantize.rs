//! NF4 (Dettmers et al. 2023, arXiv 2305.14314), bit-equal to bitsandbytes 0.50.

use crate::error::Result;
use crate::ops::Device;
use crate::tensor::Tensor;
use crate::weight::{Nf4Weight, Weight};

/// Quantising and decoding.
pub trait QuantizeOps: Device {
    /// Quantises `source`, `[O, I]` in f32, bf16 or f16, to NF4 with blocks of 64 in row-major order; `nested` also quantises
    /// the scales. One quantisation per call: a matrix made of several parts is quantised part by part.
    ///
    /// # Errors
    /// Shapes or dtypes outside the contract; [`Error::Value`](crate::Error::Value) when an element is not finite.
    fn quantize_nf4(&self, source: &Tensor<Self>, nested: bool) -> Result<Nf4Weight<Self>>;

    /// Writes the decoded weight to `out`, `[O, I]` in f32 or bf16. NF4 values are those of [`Nf4Weight`]'s formula (bf16
    /// values, whichever dtype `out` has).
    ///
    /// # Errors
    /// Shapes or dtypes outside the contract.
    fn dequantize(&self, weight: &Weight<Self>, out: &mut Tensor<Self>) -> Result<()>;
}
