//! Errors of the op interface. Each names the op, what it expected and what it got.

use crate::dtype::DType;
use crate::tensor::Shape;

/// What can go wrong in an op or in a backend's memory.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A tensor has another shape than the op's contract asks for.
    #[error("{op}: `{argument}` must be {expected}, but is {got}")]
    Shape {
        /// The op.
        op: &'static str,
        /// The argument's name in the contract.
        argument: &'static str,
        /// What the contract asks for, in the project's shape letters with their values.
        expected: String,
        /// What was given.
        got: Shape,
    },
    /// A tensor has another dtype than the op accepts.
    #[error("{op}: `{argument}` must be {expected}, but is {got}")]
    DType {
        /// The op.
        op: &'static str,
        /// The argument's name in the contract.
        argument: &'static str,
        /// The accepted dtypes.
        expected: &'static str,
        /// What was given.
        got: DType,
    },
    /// A value is outside the op's domain (a token id beyond the vocabulary, offsets that do not rise).
    #[error("{op}: `{argument}` {problem}")]
    Value {
        /// The op.
        op: &'static str,
        /// The argument's name in the contract.
        argument: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// The backend cannot do this op, or not in this form.
    #[error("{op} is not supported by the {backend} backend: {reason}")]
    Unsupported {
        /// The op.
        op: &'static str,
        /// The backend's name.
        backend: &'static str,
        /// Why.
        reason: String,
    },
    /// Memory could not be had.
    #[error(
        "the {backend} backend is out of memory: asked for {requested_bytes} bytes for {wanted} with {in_use_bytes} in use"
    )]
    OutOfMemory {
        /// The backend's name.
        backend: &'static str,
        /// What the memory was for: dtype and shape of a tensor, and the launch before, on a device.
        wanted: String,
        /// Size of the failed request.
        requested_bytes: u64,
        /// Bytes in use when it failed.
        in_use_bytes: u64,
    },
    /// The device or its driver reported an error.
    #[error("{op}: {message}")]
    Device {
        /// The op, or what the backend was doing.
        op: &'static str,
        /// The driver's words, with the launch shape where there is one.
        message: String,
    },
}

impl Error {
    /// The same, saying what the memory was for, if it is about memory.
    pub(crate) fn wanting(self, what: impl FnOnce() -> String) -> Self {
        match self {
            Self::OutOfMemory {
                backend,
                requested_bytes,
                in_use_bytes,
                ..
            } => Self::OutOfMemory {
                backend,
                wanted: what(),
                requested_bytes,
                in_use_bytes,
            },
            other => other,
        }
    }
}

/// What memory is for that is no tensor of a caller's.
pub(crate) const WORKING_MEMORY: &str = "working memory";

/// The result of every op.
pub type Result<T, E = Error> = std::result::Result<T, E>;
