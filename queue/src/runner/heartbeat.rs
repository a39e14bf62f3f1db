//! Heartbeats: one statement for all running jobs, from a thread and a connection of their own.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::Backoff;
use super::context::StopReason;
use super::running::{Running, RunningJobs};
use crate::connection::{self, OwnConnection};
use crate::error::{Error, Result};
use crate::job::HeartbeatReply;
use crate::queue::{Queue, heartbeat_with};

/// How long one beat may take before its connection counts as broken. Well under a lease, and
/// longer than the half second a beat may wait for an app's row.
const PATIENCE: Duration = Duration::from_secs(10);

/// Starts the heartbeat thread; it ends soon after `end` is cancelled.
///
/// A thread with a runtime of its own, because a handler that computes on the shared runtime would
/// otherwise stop the clock that proves it is alive.
pub(super) fn start(
    queue: &Queue,
    interval: Duration,
    running: Arc<RunningJobs>,
    end: CancellationToken,
) -> Option<std::thread::JoinHandle<()>> {
    let queue = queue.clone();
    let started = std::thread::Builder::new()
        .name("queue-heartbeat".into())
        .spawn(
            move || match tokio::runtime::Builder::new_current_thread().enable_all().build() {
                Ok(runtime) => runtime.block_on(beat_until(queue, interval, running, end)),
                Err(error) => tracing::error!(%error, "no runtime for heartbeats; leases will expire"),
            },
        );
    started
        .inspect_err(|error| tracing::error!(%error, "no thread for heartbeats; leases will expire"))
        .ok()
}

async fn beat_until(queue: Queue, interval: Duration, running: Arc<RunningJobs>, end: CancellationToken) {
    let mut own: Option<OwnConnection> = None;
    let mut trouble = Backoff::default();
    let mut wait = interval;
    loop {
        tokio::select! {
            () = end.cancelled() => return,
            () = tokio::time::sleep(wait) => {}
            () = running.beat_now.notified() => {}
        }
        wait = interval;
        let jobs = running.all();
        if jobs.is_empty() {
            continue;
        }
        if let Err(error) = beat(&queue, &mut own, &running, &jobs).await {
            own = None;
            wait = trouble.next().min(interval);
            tracing::warn!(%error, jobs = jobs.len(), "a heartbeat failed; trying again");
        } else {
            trouble = Backoff::default();
        }
    }
}

async fn beat(queue: &Queue, own: &mut Option<OwnConnection>, running: &RunningJobs, jobs: &[Running]) -> Result<()> {
    let connection = match own {
        Some(connection) => connection,
        None => own.insert(connection::open(queue.config()).await?),
    };
    let beats: Vec<_> = jobs.iter().map(|job| (job.lease, job.take_progress())).collect();
    let sent = tokio::time::timeout(PATIENCE, heartbeat_with(&connection.client, queue.place(), &beats)).await;
    let replies = match sent {
        Ok(Ok(replies)) => replies,
        failed => {
            for (job, (_, progress)) in jobs.iter().zip(beats) {
                job.put_back_progress(progress);
            }
            return Err(match failed {
                Ok(Err(error)) => error,
                _ => Error::ConnectionLost {
                    place: queue.place().clone(),
                    message: "no answer to a heartbeat".into(),
                },
            });
        }
    };
    for (lease, reply) in replies {
        let Some(job) = running.get(lease.token) else {
            continue;
        };
        match reply {
            HeartbeatReply::Alive { .. } => {}
            HeartbeatReply::CancelRequested { reason } => job.stop.fire(StopReason::Cancel(reason)),
            HeartbeatReply::DeadlinePassed => job.stop.fire(StopReason::Deadline),
            HeartbeatReply::Lost => job.stop.fire(StopReason::Lost),
        }
    }
    Ok(())
}
