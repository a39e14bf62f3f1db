//! Housekeeping by every runner: the engine lets one at a time do it, and all of it is idempotent.

use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{RunnerConfig, spread};
use crate::queue::Queue;

/// Leases taken away in one sweep.
const SWEEP_LIMIT: usize = 100;

/// Sweeps further apart than this many intervals (or two seconds) count as an outage, after which
/// leases get a full length before they are judged.
pub(super) const GAP_INTERVALS: u32 = 4;

/// Sweeps until `end`.
pub(crate) async fn run(queue: Queue, config: RunnerConfig, end: CancellationToken) {
    let gap = (config.sweep * GAP_INTERVALS).max(Duration::from_secs(2));
    let mut next_maintenance = Instant::now();
    loop {
        match queue.rescue(SWEEP_LIMIT, gap).await {
            Ok(rescued) => {
                for (job_id, state) in rescued {
                    tracing::warn!(%job_id, %state, "took an expired lease away");
                }
            }
            Err(error) => tracing::debug!(%error, "a sweep failed"),
        }
        if Instant::now() >= next_maintenance {
            match queue.maintain().await {
                Ok(report) => tracing::debug!(%report, "maintenance"),
                Err(error) => tracing::debug!(%error, "maintenance failed"),
            }
            next_maintenance = Instant::now() + spread(config.maintain);
        }
        tokio::select! {
            () = end.cancelled() => return,
            () = tokio::time::sleep(spread(config.sweep)) => {}
        }
    }
}
