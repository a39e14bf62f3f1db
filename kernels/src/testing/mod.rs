//! What the conformance suites of all backends share: seeded inputs, and the rule by which results are judged.
//!
//! Nothing here is used outside tests and benches.

mod judge;
mod random;
mod watched;

pub use self::judge::{Judge, Verdict};
pub use self::random::Random;
pub use self::watched::{Calls, Watched};
