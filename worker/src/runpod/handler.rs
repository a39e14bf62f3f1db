//! The seam between the protocol and the work: what a handler is, and what it may do while it runs.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use async_trait::async_trait;
use serde_json::{Value, json};
use tokio::sync::{Notify, mpsc};
use tokio_util::sync::CancellationToken;

use super::job::RunPodJob;
use crate::error::{Failure, Result};

/// Most bytes of one chunk of a stream; the platform cuts at 1 MB.
pub const LARGEST_CHUNK: usize = 900_000;

/// Most bytes of a progress value; it may travel once a second.
pub const LARGEST_PROGRESS: usize = 64_000;

/// Chunks that wait for the network before a streaming handler is made to wait.
const CHUNKS_AHEAD: usize = 16;

/// The work. Nothing here knows about training.
#[async_trait]
pub trait Handler: Send + Sync + 'static {
    /// Does one job. The value becomes the job's output; it should hold references, never files.
    ///
    /// It runs on the runtime that was given to the worker, never on the one that talks to the platform, so it may block. When
    /// [`JobContext::stopped`] fires it should come back soon: with an error if the job is unfinished (nothing is posted then), with
    /// its value if it happens to be done.
    async fn run(&self, job: RunPodJob, context: JobContext) -> Result<Value>;

    /// Asked before a job runs: is it this worker's? Deliveries are at least once, so a job may be done or under way elsewhere.
    /// A handler with a database answers from the job's lease.
    async fn claim(&self, _job: &RunPodJob) -> Result<Claim> {
        Ok(Claim::Run)
    }

    /// How results are shaped.
    fn output(&self) -> OutputForm {
        OutputForm::Value
    }

    /// How many jobs may run at once; asked before every take, with the number so far.
    fn concurrency(&self, current: usize) -> usize {
        current
    }
}

/// Whose job it is.
#[derive(Clone, Debug, PartialEq)]
pub enum Claim {
    /// Ours: run it.
    Run,
    /// It was done before, with this output: post it again.
    Done(Value),
    /// Another worker has it: wait, and ask again.
    Elsewhere,
}

/// How a handler's output is shaped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OutputForm {
    /// One value.
    #[default]
    Value,
    /// Chunks by [`JobContext::stream`]. A final value of null stands for the list of all chunks where `aggregate` is set, else for
    /// an empty list; any other value is posted as it is.
    Stream {
        /// Whether the final output repeats the chunks, for clients that only look at the status.
        aggregate: bool,
    },
}

/// Why a job should come to an end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// The client cancelled it, or its time is over. Nothing will be posted.
    Cancelled,
    /// The worker has to leave. Save what allows another worker to continue, give back the lease, and return an error.
    Draining,
}

/// Tells a job to stop; also readable from blocking code.
#[derive(Clone, Debug, Default)]
pub struct StopSignal {
    token: CancellationToken,
    reason: Arc<OnceLock<StopReason>>,
}

impl StopSignal {
    /// Waits for the signal.
    pub async fn wait(&self) -> StopReason {
        self.token.cancelled().await;
        self.reason().unwrap_or(StopReason::Cancelled)
    }

    /// The reason, once the signal was given. A training loop asks this after every step.
    pub fn reason(&self) -> Option<StopReason> {
        self.reason.get().copied()
    }

    /// Whether the signal was given.
    pub fn is_given(&self) -> bool {
        self.token.is_cancelled()
    }

    /// The signal as a plain token, for code that does not care about the reason.
    pub fn token(&self) -> CancellationToken {
        self.token.clone()
    }

    /// Gives the signal; the first reason stays.
    pub fn give(&self, reason: StopReason) {
        // A second reason changes nothing: the job is ending already.
        let _first_reason_stays = self.reason.set(reason);
        self.token.cancel();
    }
}

/// What a running job may do besides computing. Cheap to clone; usable from any thread.
#[derive(Clone, Debug)]
pub struct JobContext {
    stop: StopSignal,
    latest: Arc<Latest>,
    chunks: mpsc::Sender<Value>,
}

/// The newest progress value that has not been sent.
#[derive(Debug, Default)]
pub(crate) struct Latest {
    value: Mutex<Option<Value>>,
    arrived: Notify,
}

impl JobContext {
    /// A context and the other end of it.
    pub(crate) fn new(stop: StopSignal) -> (Self, Outgoing) {
        let latest = Arc::new(Latest::default());
        let (sender, receiver) = mpsc::channel(CHUNKS_AHEAD);
        let context = Self {
            stop,
            latest: Arc::clone(&latest),
            chunks: sender,
        };
        (
            context,
            Outgoing {
                latest,
                chunks: receiver,
            },
        )
    }

    /// A context without a platform, for running a handler directly. Progress and chunks go nowhere.
    pub fn detached() -> Self {
        Self::new(StopSignal::default()).0
    }

    /// Reports progress. Never waits: only the newest value counts, about one a second is sent, and none after the result.
    pub fn progress(&self, value: Value) {
        let size = value.to_string().len();
        let value = if size > LARGEST_PROGRESS {
            tracing::debug!(size, "a progress value is too large and is replaced by a note");
            json!({"note": format!("the progress value has {size} bytes; the limit is {LARGEST_PROGRESS}")})
        } else {
            value
        };
        *self.latest.value.lock().unwrap_or_else(PoisonError::into_inner) = Some(value);
        self.latest.arrived.notify_one();
    }

    /// Sends one chunk of a streaming handler's output, in order; waits while the network is behind.
    ///
    /// # Errors
    /// `RUNPOD_CHUNK_TOO_LARGE`: split it. After the job was stopped, chunks go nowhere without an error.
    pub async fn stream(&self, chunk: Value) -> Result<()> {
        let size = chunk.to_string().len();
        if size > LARGEST_CHUNK {
            return Err(Failure::system(
                "RUNPOD_CHUNK_TOO_LARGE",
                format!("A chunk of the stream has {size} bytes; the limit is {LARGEST_CHUNK}"),
            )
            .hint("Send smaller chunks, or upload the data and send its address"));
        }
        // The receiver is gone only when the job was stopped: its output is not wanted any more.
        let _not_wanted = self.chunks.send(chunk).await;
        Ok(())
    }

    /// Fires when the job should end.
    pub fn stopped(&self) -> &StopSignal {
        &self.stop
    }
}

/// What a job wants to tell the outside while it runs.
pub(crate) struct Outgoing {
    /// Progress.
    pub latest: Arc<Latest>,
    /// Closed when every context of the job is gone.
    pub chunks: mpsc::Receiver<Value>,
}

impl Latest {
    /// Waits for a progress value that has not been taken.
    pub async fn next(&self) -> Value {
        loop {
            if let Some(value) = self.take() {
                return value;
            }
            self.arrived.notified().await;
        }
    }

    fn take(&self) -> Option<Value> {
        self.value.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}
