//! Small operands that kernels want in one form.

use crate::error::Error;
use crate::tensor::Segments;

/// More rows than an i32 counts.
pub(super) fn too_many_tokens(segments: &Segments) -> Error {
    Error::Value {
        op: "segments",
        argument: "offsets",
        problem: format!("reach {} rows, more than an i32 counts", segments.tokens()),
    }
}
