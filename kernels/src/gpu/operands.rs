//! Small operands that kernels want in one form.

use super::{Gpu, Runtime};
use crate::error::{Error, Result};
use crate::ops::Device;
use crate::tensor::{Segments, Tensor};

impl<R: Runtime> Gpu<R> {
    /// The offsets of packed documents, i32 `[documents + 1]`.
    pub(super) fn upload_offsets(&self, segments: &Segments) -> Result<Tensor<Self>> {
        let narrow = |offset: &usize| i32::try_from(*offset);
        let offsets: Result<Vec<i32>, _> = segments.offsets().iter().map(narrow).collect();
        let offsets = offsets.map_err(|_| too_many_tokens(segments))?;
        self.upload_i32([offsets.len()], &offsets)
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
