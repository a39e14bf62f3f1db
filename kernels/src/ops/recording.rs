//! Work that is queued once and done again.

use crate::error::Result;
use crate::tensor::Segments;

/// What became of [`Device::record`](crate::ops::Device::record). The work was done in either case.
pub enum Recorded {
    /// It can be done again.
    Yes(Box<dyn Recording>),
    /// It cannot, and why.
    Not(String),
}

/// The launches of some work, to be done again without the host that made them.
pub trait Recording: Send {
    /// Does the work once more: on the same tensors, with what they hold now, for documents of the same number of tokens and of
    /// documents. `false`, and nothing done, when it no longer holds: the caller does the work itself, and may record it anew.
    ///
    /// # Errors
    /// As the ops of the work.
    fn replay(&self, documents: &Segments) -> Result<bool>;
}
