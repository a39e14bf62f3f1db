//! Small operands that kernels want in one form.

use super::{Gpu, Runtime};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::ops::Device;
use crate::tensor::{Segments, Tensor};

/// A tensor as it is, or a copy of it in another form.
pub(super) enum Widened<'a, R: Runtime> {
    AsItIs(&'a Tensor<Gpu<R>>),
    Copied(Tensor<Gpu<R>>),
}

impl<R: Runtime> AsRef<Tensor<Gpu<R>>> for Widened<'_, R> {
    fn as_ref(&self) -> &Tensor<Gpu<R>> {
        match self {
            Self::AsItIs(tensor) => tensor,
            Self::Copied(tensor) => tensor,
        }
    }
}

impl<R: Runtime> Gpu<R> {
    /// The offsets of packed documents, i32 `[documents + 1]`.
    pub(super) fn upload_offsets(&self, segments: &Segments) -> Result<Tensor<Self>> {
        let narrow = |offset: &usize| i32::try_from(*offset);
        let offsets: Result<Vec<i32>, _> = segments.offsets().iter().map(narrow).collect();
        let offsets = offsets.map_err(|_| too_many_tokens(segments))?;
        self.upload_i32([offsets.len()], &offsets)
    }

    /// A frozen vector of f32 or bf16, in f32: widening is exact, and a second type parameter would double a kernel's entries.
    pub(super) fn single<'a>(&self, op: &'static str, vector: &'a Tensor<Self>) -> Result<Widened<'a, R>> {
        if vector.dtype() == DType::F32 {
            return Ok(Widened::AsItIs(vector));
        }
        let mut wide = self.alloc(DType::F32, vector.shape())?;
        self.convert(op, vector, &mut wide)?;
        Ok(Widened::Copied(wide))
    }
}

/// More rows than an i32 counts.
pub(super) fn too_many_tokens(segments: &Segments) -> Error {
    Error::Value {
        op: "segments",
        argument: "offsets",
        problem: format!("reach {} rows, more than an i32 counts", segments.tokens()),
    }
}
