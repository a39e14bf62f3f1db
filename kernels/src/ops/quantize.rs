//! NF4 (Dettmers et al. 2023, arXiv 2305.14314), bit-equal to bitsandbytes 0.50.

use crate::contract;
use crate::error::Result;
use crate::fp8;
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

    /// Quantises an FP8 matrix to the very codes and scales that [`QuantizeOps::quantize_nf4`] gives for its values in f32:
    /// `codes` is f8e4m3 `[O, I]`, `scales` f32 or bf16 `[ceil(O / block[0]), ceil(I / block[1])]`, and an element's value is that of its
    /// code ([`fp8::value`]) times the scale of its block. A backend decodes on the way, so that nothing wider than FP8 is stored.
    ///
    /// # Errors
    /// As [`QuantizeOps::quantize_nf4`].
    fn quantize_nf4_fp8(
        &self,
        codes: &Tensor<Self>,
        scales: &Tensor<Self>,
        block: [usize; 2],
        nested: bool,
    ) -> Result<Nf4Weight<Self>> {
        let (outputs, inputs) = contract::quantize_nf4_fp8(codes, scales, block)?;
        let values = fp8::dequantised(&self.read(codes)?, inputs, &self.read_f32(scales)?, block);
        self.quantize_nf4(&self.upload_f32([outputs, inputs], &values)?, nested)
    }

    /// Writes the decoded weight to `out`, `[O, I]` in f32 or bf16. NF4 values are those of [`Nf4Weight`]'s formula (bf16
    /// values, whichever dtype `out` has).
    ///
    /// # Errors
    /// Shapes or dtypes outside the contract.
    fn dequantize(&self, weight: &Weight<Self>, out: &mut Tensor<Self>) -> Result<()>;
}
