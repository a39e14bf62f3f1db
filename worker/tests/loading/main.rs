//! Models on their way from a hub to the disk and from the disk into memory: what is refused, what is kept, what is read.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

mod bad_input;
mod fetch;
mod formats;
mod snapshot;
mod support;
