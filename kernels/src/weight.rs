//! Frozen weights are data, not classes: one matrix, in one of several encodings.

use crate::dtype::DType;
use crate::ops::Device;
use crate::tensor::Tensor;

/// Elements that share one scale in NF4.
pub const NF4_BLOCK: usize = 64;

/// Scales that share one second-level scale when NF4's scales are themselves quantised.
pub const NF4_NESTED_BLOCK: usize = 256;

/// A frozen matrix `[O, I]` (rows are outputs), or a norm's or bias's vector.
#[derive(Debug)]
pub enum Weight<D: Device> {
    /// Plain elements: f32, bf16 or f16.
    Dense(Tensor<D>),
    /// 4-bit NormalFloat.
    Nf4(Nf4Weight<D>),
}

/// A matrix in 4-bit NormalFloat, bit-equal to bitsandbytes 0.50.
///
/// The matrix is flattened row-major and cut into blocks of [`NF4_BLOCK`] elements (the last may be
/// shorter). Element `e` of block `b` is `CODE[codes[e]] × absmax[b]`, computed in f32 and then
/// rounded to bf16, which is what bitsandbytes gives for a bf16 checkpoint.
#[derive(Debug)]
pub struct Nf4Weight<D: Device> {
    /// u8 `[ceil(O·I / 2)]`, two codes a byte, the first element in the high nibble.
    pub codes: Tensor<D>,
    /// One scale per block.
    pub scales: Nf4Scales<D>,
    /// `O`, number of outputs.
    pub outputs: usize,
    /// `I`, number of inputs.
    pub inputs: usize,
}

/// The scales of an NF4 matrix.
#[derive(Debug)]
pub enum Nf4Scales<D: Device> {
    /// f32 `[blocks]`.
    Flat(Tensor<D>),
    /// Double quantisation: `absmax[b] = nested_code[codes[b]] × nested_absmax[b / 256] + offset`.
    Nested {
        /// u8 `[blocks]`.
        codes: Tensor<D>,
        /// f32 `[ceil(blocks / 256)]`.
        nested_absmax: Tensor<D>,
        /// f32 `[256]`: bitsandbytes' signed dynamic map.
        nested_code: Tensor<D>,
        /// Mean of the flat scales, subtracted before quantising them.
        offset: f32,
    },
}

impl<D: Device> Weight<D> {
    /// `[O, I]`; a vector of length `n` is `[n, 1]`.
    pub fn extents(&self) -> (usize, usize) {
        match self {
            Self::Dense(tensor) => match tensor.shape().extents() {
                [outputs, inputs] => (*outputs, *inputs),
                _ => (tensor.shape().elements(), 1),
            },
            Self::Nf4(weight) => (weight.outputs, weight.inputs),
        }
    }

    /// Bytes the weight occupies, scales included.
    pub fn size_bytes(&self) -> usize {
        match self {
            Self::Dense(tensor) => tensor.size_bytes(),
            Self::Nf4(weight) => weight.codes.size_bytes() + weight.scales.size_bytes(),
        }
    }

    /// A short name of the encoding, for reports: `bf16`, `nf4`, …
    pub fn encoding(&self) -> &'static str {
        match self {
            Self::Dense(tensor) => match tensor.dtype() {
                DType::F32 => "f32",
                DType::BF16 => "bf16",
                DType::F16 => "f16",
                _ => "other",
            },
            Self::Nf4(Nf4Weight {
                scales: Nf4Scales::Flat(_),
                ..
            }) => "nf4",
            Self::Nf4(Nf4Weight {
                scales: Nf4Scales::Nested { .. },
                ..
            }) => "nf4-nested",
        }
    }
}

impl<D: Device> Nf4Scales<D> {
    /// Bytes the scales occupy.
    pub fn size_bytes(&self) -> usize {
        match self {
            Self::Flat(absmax) => absmax.size_bytes(),
            Self::Nested {
                codes,
                nested_absmax,
                nested_code,
                ..
            } => codes.size_bytes() + nested_absmax.size_bytes() + nested_code.size_bytes(),
        }
    }
}
