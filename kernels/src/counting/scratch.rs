//! What the counted backend does where the contract leaves it free.

use crate::dtype::DType;
use crate::gpu::{NF4_ROW, SHARED_ROWS, SharedRows};
use crate::ops::Precision;

/// In which form a backend brings the left factor of a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Factors {
    /// As it is.
    Exact,
    /// A copy in f32, rounded to bf16 values.
    Rounded,
    /// A copy in bf16, rows padded to even lengths.
    Half,
}

/// The habits of a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Habits {
    /// Whether bf16 precision keeps activations in bf16.
    pub has_bf16_activations: bool,
    /// Sizes are rounded up to a multiple of this.
    pub alignment_bytes: u64,
    /// The left factors of products.
    pub factors: Factors,
    /// From how many rows on a 4-bit weight is decoded once for all its products in a scope that shares; `None` for never.
    pub shares_from: Option<SharedRows>,
    /// Whose working memory attention, convolution and the delta rule have.
    pub kernels: Kernels,
    /// Bytes of logits that exist at once on the CPU; a GPU's follow from the shape.
    pub logits_bytes: u64,
}

/// Whose working memory an op has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernels {
    /// That of `brightrun_kernels::cpu`.
    Cpu,
    /// That of kernels that keep a row block in registers: attention's f32 sum of dq, the delta rule's states per chunk.
    Gpu,
}

impl Habits {
    /// The CPU backend; `factors` follow from its instructions and the precision, see
    /// [`Cpu::factors`](crate::cpu::Cpu::factors).
    pub fn cpu(factors: Factors) -> Self {
        Self {
            has_bf16_activations: false,
            alignment_bytes: 64,
            factors,
            shares_from: None,
            kernels: Kernels::Cpu,
            logits_bytes: crate::cpu::LOGITS_BYTES as u64,
        }
    }

    /// The GPU backend: bf16 activations, 4-bit matrices decoded where they are multiplied, or once for a layer's recomputation and
    /// backward pass where there are many rows, 512-byte allocations.
    pub fn gpu() -> Self {
        Self {
            has_bf16_activations: true,
            alignment_bytes: 512,
            factors: Factors::Exact,
            shares_from: Some(SHARED_ROWS),
            kernels: Kernels::Gpu,
            logits_bytes: 0,
        }
    }

    /// Bytes of the copy of a left factor.
    pub(super) fn left(&self, rows: usize, columns: usize) -> u64 {
        match self.factors {
            Factors::Exact => 0,
            Factors::Rounded | Factors::Half => self.own(rows, columns),
        }
    }

    /// Bytes of a left factor that is always a copy.
    pub(super) fn own(&self, rows: usize, columns: usize) -> u64 {
        let bytes = match self.factors {
            Factors::Exact | Factors::Rounded => rows * columns * DType::F32.size_bytes(),
            Factors::Half => rows * columns.next_multiple_of(2) * DType::BF16.size_bytes(),
        };
        bytes as u64
    }

    /// Bytes into which a 4-bit matrix with rows of `inputs` elements is decoded for one product: the fused kernels want whole
    /// runs of codes.
    pub(super) fn decoded(&self, inputs: usize, precision: Precision, decoded_bytes: u64) -> u64 {
        match (self.kernels, precision) {
            (Kernels::Gpu, Precision::Bf16) if !inputs.is_multiple_of(NF4_ROW) => decoded_bytes,
            _ => 0,
        }
    }
}

/// Bytes of f32 values.
pub(super) fn floats(count: usize) -> u64 {
    (count * DType::F32.size_bytes()) as u64
}
