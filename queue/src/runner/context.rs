//! What a handler sees of its job.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use serde_json::Value;
use tokio_util::sync::CancellationToken;

use super::Backoff;
use super::running::Running;
use crate::error::{Error, Result};
use crate::job::{Claimed, Lease};
use crate::queue::Queue;

/// Why a handler should stop.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// Somebody asked for a cancel. Whatever the handler returns, the job ends as cancelled.
    Cancel(Option<String>),
    /// The lease is lost; another worker may have the job. Write nowhere, and discard.
    Lost,
    /// The hard deadline has passed. What is returned at once is still accepted.
    Deadline,
    /// The process shuts down: save what is needed to resume and return
    /// [`Ending::Release`](super::Ending::Release).
    Shutdown,
}

/// Tells a handler to stop, and why. The first reason stays, but for [`StopReason::Lost`], which
/// [`Self::is_lost`] always tells.
#[derive(Clone, Default)]
pub struct StopSignal {
    inner: Arc<Inner>,
}

#[derive(Default)]
struct Inner {
    token: CancellationToken,
    reason: OnceLock<StopReason>,
    lost: std::sync::atomic::AtomicBool,
}

impl StopSignal {
    pub(super) fn fire(&self, reason: StopReason) {
        if reason == StopReason::Lost {
            self.inner.lost.store(true, std::sync::atomic::Ordering::Release);
        }
        // A second reason changes nothing: the handler is stopping already.
        let _ = self.inner.reason.set(reason);
        self.inner.token.cancel();
    }

    /// Whether to stop, and why; for loops of computation that look now and then.
    pub fn requested(&self) -> Option<StopReason> {
        self.inner.reason.get().cloned()
    }

    /// Whether the lease is known to be lost.
    pub fn is_lost(&self) -> bool {
        self.inner.lost.load(std::sync::atomic::Ordering::Acquire)
    }

    /// A token that is cancelled when the handler should stop, for handing on.
    pub fn token(&self) -> CancellationToken {
        self.inner.token.clone()
    }

    /// Waits until the handler should stop.
    pub async fn stopped(&self) -> StopReason {
        self.inner.token.cancelled().await;
        // The reason is set before the token is cancelled.
        self.requested().unwrap_or(StopReason::Lost)
    }
}

/// A handler's view of the job it runs. Cheap to clone, and may be used from any thread.
#[derive(Clone)]
pub struct JobContext {
    job: Arc<Claimed>,
    queue: Queue,
    running: Running,
}

impl JobContext {
    pub(super) fn new(job: Claimed, queue: Queue, running: Running) -> Self {
        Self {
            job: Arc::new(job),
            queue,
            running,
        }
    }

    /// The job as it was claimed: payload, attempt, earlier progress and so on.
    pub fn job(&self) -> &Claimed {
        &self.job
    }

    /// The work itself.
    pub fn payload(&self) -> &Value {
        &self.job.payload
    }

    /// The lease, for whoever writes elsewhere under its token.
    pub fn lease(&self) -> Lease {
        self.job.lease
    }

    /// The queue, for enqueueing more work.
    pub fn queue(&self) -> &Queue {
        &self.queue
    }

    /// Tells how far the run is. It travels with the next heartbeat, and only the latest does, so
    /// call this as often as you like. It survives the run: the next attempt finds it in
    /// [`Claimed::progress`].
    pub fn progress(&self, progress: Value) {
        self.running.set_progress(progress);
    }

    /// Says something that must not get lost: written to the history and handed to the projector
    /// before this returns. Waits for a database that is away; after a broken connection the event
    /// may be written twice.
    ///
    /// # Errors
    /// [`Error::LeaseLost`] and its like, which also fire the stop signal; [`Error::Rejected`]; a
    /// projector's complaint. When the handler is told to stop during an outage, the outage.
    pub async fn report(&self, event: &str, detail: &Value) -> Result<()> {
        let mut trouble = Backoff::default();
        loop {
            match self.queue.report(&self.job.lease, event, detail).await {
                Err(error) if error.is_transient() && self.stop().requested().is_none() => {
                    self.pause(trouble.next()).await;
                }
                Err(error) => return Err(self.noted(error)),
                Ok(()) => return Ok(()),
            }
        }
    }

    /// Writes a line of the run's log, which the job's owner can read: a level (`debug`, `info`, `warn`, `error`), a short type such
    /// as `loss`, a sentence, and data.
    ///
    /// # Errors
    /// As [`Self::report`]; a broken connection is not waited for.
    pub async fn log(&self, level: &str, kind: &str, message: &str, data: Option<&Value>) -> Result<()> {
        let told = self.queue.log(&self.job.lease, level, kind, message, data).await;
        told.map_err(|error| self.noted(error))
    }

    /// Says where the next run is to resume, once what that names is safely stored. Unlike progress it does not travel with a beat:
    /// when this returns, it is kept. The next run finds it in [`Claimed::checkpoint`].
    ///
    /// # Errors
    /// As [`Self::report`]; a broken connection is not waited for.
    pub async fn checkpoint(&self, checkpoint: &Value) -> Result<()> {
        let told = self.queue.checkpoint(&self.job.lease, checkpoint).await;
        told.map_err(|error| self.noted(error))
    }

    async fn pause(&self, time: Duration) {
        tokio::select! {
            () = tokio::time::sleep(time) => {}
            _ = self.stop().stopped() => {}
        }
    }

    fn noted(&self, error: Error) -> Error {
        if error.is_lost() {
            self.running.stop.fire(StopReason::Lost);
        }
        error
    }

    /// Fires when the handler should stop.
    pub fn stop(&self) -> &StopSignal {
        &self.running.stop
    }
}
