//! The frozen matrices of all experts of a layer, one after another.
//!
//! One stack has one allocation per tensor, whatever the number of experts: it is read from a file in one go, its place is
//! planned to the byte, and a kernel finds expert `e` by arithmetic instead of a table of pointers. Each expert's matrix is
//! quantised by itself, exactly as if it were a [`Weight`] of its own: its blocks never reach into the next expert's
//! elements, and with nested scales it has its own second level.

use crate::dtype::DType;
use crate::error::Result;
use crate::ops::Device;
use crate::tensor::Tensor;
use crate::weight::{NF4_BLOCK, NF4_NESTED_BLOCK, Nf4Scales, Weight};

/// `E` frozen matrices `[O, I]` of one shape and one encoding.
#[derive(Debug)]
pub enum WeightStack<D: Device> {
    /// `[E, O, I]` in f32, bf16 or f16.
    Dense(Tensor<D>),
    /// 4-bit NormalFloat.
    Nf4(Nf4Stack<D>),
}

/// `E` matrices in NF4. Decoding is that of [`Nf4Weight`](crate::Nf4Weight), matrix by matrix.
#[derive(Debug)]
pub struct Nf4Stack<D: Device> {
    /// u8 `[E, ceil(O·I / 2)]`.
    pub codes: Tensor<D>,
    /// The scales, `blocks = ceil(O·I / 64)` for each expert.
    pub scales: Nf4StackScales<D>,
    /// `E`.
    pub experts: usize,
    /// `O`, outputs of each matrix.
    pub outputs: usize,
    /// `I`, inputs of each matrix.
    pub inputs: usize,
}

/// The scales of an NF4 stack.
#[derive(Debug)]
pub enum Nf4StackScales<D: Device> {
    /// f32 `[E, blocks]`.
    Flat(Tensor<D>),
    /// Double quantisation; see [`Nf4Scales::Nested`].
    Nested {
        /// u8 `[E, blocks]`.
        codes: Tensor<D>,
        /// f32 `[E, ceil(blocks / 256)]`.
        nested_absmax: Tensor<D>,
        /// f32 `[256]`, the same for all experts.
        nested_code: Tensor<D>,
        /// f32 `[E]`.
        offsets: Tensor<D>,
    },
}

impl<D: Device> WeightStack<D> {
    /// Room for `experts` matrices of the shape and encoding of `first`. The contents are unspecified until
    /// [`MoeOps::stack_expert`](crate::ops::MoeOps::stack_expert) has put every expert in its place.
    ///
    /// # Errors
    /// As [`Device::alloc`].
    pub fn alloc_like(device: &D, experts: usize, first: &Weight<D>) -> Result<Self> {
        let (outputs, inputs) = first.extents();
        let weight = match first {
            Weight::Dense(tensor) => {
                return Ok(Self::Dense(device.alloc(tensor.dtype(), [experts, outputs, inputs])?));
            }
            Weight::Nf4(weight) => weight,
        };
        let blocks = (outputs * inputs).div_ceil(NF4_BLOCK);
        let scales = match weight.scales {
            Nf4Scales::Flat(_) => Nf4StackScales::Flat(device.alloc(DType::F32, [experts, blocks])?),
            Nf4Scales::Nested { .. } => Nf4StackScales::Nested {
                codes: device.alloc(DType::U8, [experts, blocks])?,
                nested_absmax: device.alloc(DType::F32, [experts, blocks.div_ceil(NF4_NESTED_BLOCK)])?,
                nested_code: device.alloc(DType::F32, [256])?,
                offsets: device.alloc(DType::F32, [experts])?,
            },
        };
        Ok(Self::Nf4(Nf4Stack {
            codes: device.alloc(DType::U8, [experts, (outputs * inputs).div_ceil(2)])?,
            scales,
            experts,
            outputs,
            inputs,
        }))
    }

    /// `(E, O, I)`.
    pub fn extents(&self) -> (usize, usize, usize) {
        match self {
            Self::Dense(tensor) => match tensor.shape().extents() {
                [experts, outputs, inputs] => (*experts, *outputs, *inputs),
                _ => (1, tensor.shape().rows(), tensor.shape().row()),
            },
            Self::Nf4(stack) => (stack.experts, stack.outputs, stack.inputs),
        }
    }

    /// Bytes the stack occupies, scales included.
    pub fn size_bytes(&self) -> usize {
        match self {
            Self::Dense(tensor) => tensor.size_bytes(),
            Self::Nf4(stack) => stack.codes.size_bytes() + stack.scales.size_bytes(),
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
            Self::Nf4(Nf4Stack {
                scales: Nf4StackScales::Flat(_),
                ..
            }) => "nf4",
            Self::Nf4(_) => "nf4-nested",
        }
    }
}

impl<D: Device> Nf4StackScales<D> {
    /// Bytes of the scales.
    pub fn size_bytes(&self) -> usize {
        match self {
            Self::Flat(absmax) => absmax.size_bytes(),
            Self::Nested {
                codes,
                nested_absmax,
                nested_code,
                offsets,
            } => codes.size_bytes() + nested_absmax.size_bytes() + nested_code.size_bytes() + offsets.size_bytes(),
        }
    }
}
