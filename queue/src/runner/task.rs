//! One job's task: the handler, then its ending.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use futures_util::FutureExt;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::context::{JobContext, StopReason};
use super::endings::Endings;
use super::running::{Running, RunningJobs};
use super::{Backoff, Ending, Handler};
use crate::error::Result;
use crate::job::{Blame, Claimed, JobFailure, JobState, Lease};

/// Longest panic message kept.
const PANIC_MESSAGE_CHARS: usize = 2000;

/// Whether the ending reached the engine.
pub(super) struct Delivered(pub(super) bool);

/// Runs a job and delivers its ending. The job stays in the table of running jobs, and so is kept
/// alive by heartbeats, until the engine has acknowledged the ending.
pub(super) async fn run(
    endings: Endings,
    slots: Arc<Semaphore>,
    handler: Arc<dyn Handler>,
    job: Claimed,
    entry: Running,
    running: Arc<RunningJobs>,
) -> Delivered {
    let lease = job.lease;
    let kind = job.kind.clone();
    let context = JobContext::new(job, endings.queue().clone(), entry.clone());
    let ending = match slot(&slots, &entry).await {
        None => Ending::Release("it had not begun".into()),
        Some(_slot) => match AssertUnwindSafe(async { handler.run(context).await })
            .catch_unwind()
            .await
        {
            Ok(ending) => ending,
            Err(panic) => Ending::Fail(panic_failure(panic.as_ref())),
        },
    };
    let delivered = deliver(&endings, &entry, ending).await;
    running.remove(lease.token);
    match delivered {
        Some(state) => tracing::debug!(job_id = %lease.job_id, kind, %state, "run ended"),
        None => tracing::warn!(job_id = %lease.job_id, kind, "run ended, but its lease was lost"),
    }
    Delivered(delivered.is_some())
}

/// A slot to run in; `None` if the job is to stop before it gets one.
async fn slot(slots: &Arc<Semaphore>, entry: &Running) -> Option<OwnedSemaphorePermit> {
    tokio::select! {
        biased;
        permit = slots.clone().acquire_owned() => permit.ok().filter(|_| entry.stop.requested().is_none()),
        _ = entry.stop.stopped() => None,
    }
}

/// Repeats the ending until the engine has an answer to it; `None` if the lease is lost.
async fn deliver(endings: &Endings, entry: &Running, mut ending: Ending) -> Option<JobState> {
    let mut trouble = Backoff::default();
    loop {
        // An ending that goes back to waiting leaves the latest progress for the next run, also where a beat has just taken
        // it along: that beat may arrive too late. When this one fails, the ending is repeated, and so is this.
        if let (Some(progress), false) = (entry.latest_progress(), matches!(ending, Ending::Complete(_)))
            && let Err(error) = endings.queue().heartbeat(&[(entry.lease, Some(progress))]).await
        {
            tracing::debug!(job_id = %entry.lease.job_id, %error, "the latest progress is not delivered yet");
        }
        match send(endings, &entry.lease, &ending).await {
            Ok(state) => return Some(state),
            Err(error) if error.is_lost() => {
                entry.stop.fire(StopReason::Lost);
                return None;
            }
            Err(error) if error.is_refusal() => {
                // Sent again it would fail again (too large a result, a raising projector); the job
                // must end nevertheless, and say why.
                tracing::error!(job_id = %entry.lease.job_id, %error, "the ending was refused");
                if matches!(&ending, Ending::Fail(failure) if failure.code == REFUSED) {
                    return None;
                }
                let message = format!("the ending of the run was refused: {error}");
                ending = Ending::Fail(JobFailure::new(Blame::System, REFUSED, message));
                continue;
            }
            Err(error) => tracing::info!(job_id = %entry.lease.job_id, %error, "the ending is not delivered yet"),
        }
        tokio::time::sleep(trouble.next()).await;
    }
}

const REFUSED: &str = "QUEUE_ENDING_REFUSED";

async fn send(endings: &Endings, lease: &Lease, ending: &Ending) -> Result<JobState> {
    let queue = endings.queue();
    match ending {
        Ending::Complete(result) => endings.complete(lease, result).await,
        Ending::Fail(failure) => queue.fail(lease, failure, None).await,
        Ending::FailUntil(failure, delay) => queue.fail(lease, failure, Some(*delay)).await,
        Ending::Snooze(delay, reason) => queue.snooze(lease, *delay, Some(reason)).await,
        Ending::Release(reason) => queue.release(lease, Some(reason)).await,
    }
}

pub(crate) fn panic_failure(panic: &(dyn std::any::Any + Send)) -> JobFailure {
    let told = panic
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "no message".into());
    let told: String = told.chars().take(PANIC_MESSAGE_CHARS).collect();
    JobFailure::new(Blame::System, "INTERNAL_PANIC", format!("the handler panicked: {told}"))
}
