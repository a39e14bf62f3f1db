//! Who a running job speaks to: a queue's row, or whoever sent the whole job.

use brightrun_queue::{JobContext, StopReason};
use serde_json::Value;

/// Hears how far a job is, and may ask it to stop.
pub trait Link: Send + Sync {
    /// Takes a [`Progress`](super::projection::Progress); only the newest counts.
    fn progress(&self, progress: Value);

    /// Whether to stop, and why.
    fn stop(&self) -> Option<StopReason>;
}

impl Link for JobContext {
    fn progress(&self, progress: Value) {
        Self::progress(self, progress);
    }

    fn stop(&self) -> Option<StopReason> {
        Self::stop(self).requested()
    }
}
