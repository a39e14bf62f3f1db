//! A job of the database that RunPod only names: the claim decides whose it is, the row how it ended.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use brightrun_kernels::Backend;
use brightrun_queue::{
    Blame as QueueBlame, Ending, Granted, Handler as QueueHandler, HeldJob, JobContext as QueueContext, JobFailure,
    JobState, JobStatus, NamedRun, OnDemand, Queue, QueueConfig, StopReason as QueueStop,
};
use serde_json::Value;
use tokio::sync::OnceCell;
use uuid::Uuid;

use super::{Database, payload};
use crate::error::{Blame, Failure, Result};
use crate::job::run::TrainHandler;
use crate::job::services::Services;
use crate::runpod::{Claim, JobContext, StopReason};

/// Jobs of this kind are trained here.
const KIND: &str = "train";

/// How often a run's progress is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// Wait between tries to reach the database.
const AGAIN: Duration = Duration::from_secs(2);

/// Tries to reach a database that is away before the delivery fails; RunPod's client sees FAILED then, and the row still waits.
const MOST_TRIES: u32 = 150;

/// Runs jobs by their ids.
pub(super) struct References<B: Backend> {
    services: Arc<Services<B>>,
    database: Database,
    connected: OnceCell<OnDemand>,
    /// Claimed for a delivery that is about to run, by RunPod's id.
    held: Mutex<HashMap<String, Box<HeldJob>>>,
}

impl<B: Backend> References<B> {
    pub fn new(services: Arc<Services<B>>, database: Database) -> Self {
        Self {
            services,
            database,
            connected: OnceCell::new(),
            held: Mutex::default(),
        }
    }

    async fn on_demand(&self) -> Result<&OnDemand, brightrun_queue::Error> {
        self.connected
            .get_or_try_init(|| async {
                let queue = Queue::connect(&QueueConfig::new(self.database.url.expose())?).await?;
                OnDemand::start(queue, self.database.runner.clone()).await
            })
            .await
    }

    /// Whose job it is, from the row. A job of ours is kept for [`Self::run`], which follows.
    pub async fn claim(&self, delivery: &str, id: Uuid) -> Result<Claim> {
        let granted = patiently(|| async { self.on_demand().await?.claim(KIND, id).await }).await?;
        match granted {
            Granted::Mine(held) => {
                self.lock().insert(delivery.to_owned(), held);
                Ok(Claim::Run)
            }
            Granted::Ended(status) => ended(&status).map(Claim::Done),
            Granted::NotNow(status) => {
                tracing::info!(job_id = %id, state = status.state.name(), "the job cannot be had now");
                Ok(Claim::Elsewhere)
            }
            Granted::Missing => Err(Failure::user("JOB_NOT_FOUND", "There is no training job with this id")
                .at(format!("job {id}"))
                .hint("Send the id of a `training_jobs` row; a job older than the retention is forgotten")),
        }
    }

    /// Runs what was claimed for this delivery.
    pub async fn run(&self, delivery: &str, context: JobContext) -> Result<Value> {
        let held = self.lock().remove(delivery);
        let held = held.ok_or_else(|| Failure::system("INTERNAL_UNCLAIMED", "A job was started without its claim"))?;
        let id = held.job().lease.job_id;
        let on_demand = self.on_demand().await?;
        let was_stopped = Arc::new(AtomicBool::new(false));
        let handler = Stoppable {
            inner: TrainHandler::new(self.services.clone()),
            was_stopped: was_stopped.clone(),
        };
        let mut run = on_demand.run(held, Arc::new(handler));
        let is_known = follow(&mut run, &context, &was_stopped).await;
        if !is_known {
            return Err(Failure::platform(
                "RUNPOD_LEASE_LOST",
                "This worker was silent for too long and another one may have the job",
            )
            .at(format!("job {id}"))
            .hint("Look at the job's row: it says who has it"));
        }
        let status = patiently(|| async { on_demand.queue().status(id).await }).await?;
        let status = status.ok_or_else(|| Failure::user("JOB_NOT_FOUND", "The job's row is gone"))?;
        ended(&status)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, Box<HeldJob>>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Passes progress out and stops in until the run has ended; false when its ending did not reach the row.
async fn follow(run: &mut NamedRun, context: &JobContext, was_stopped: &AtomicBool) -> bool {
    let mut looks = tokio::time::interval(LOOK_EVERY);
    let (mut told, mut is_stopping) = (None, false);
    loop {
        let signal = context.stopped();
        tokio::select! {
            is_known = run.ended() => return is_known,
            reason = signal.wait(), if !is_stopping => {
                is_stopping = true;
                was_stopped.store(reason == StopReason::Cancelled, Ordering::Release);
                run.stop(QueueStop::Shutdown);
            }
            _ = looks.tick() => {
                let newest = run.progress();
                if let Some(progress) = newest.as_ref().filter(|_| newest != told) {
                    context.progress(payload::progress(progress));
                    told = newest;
                }
            }
        }
    }
}

/// Trains; a run that the platform stopped, with nobody having cancelled the row, is an attempt that failed: its time limit would
/// end every further one just so, and an interruption would not count.
struct Stoppable<B: Backend> {
    inner: TrainHandler<B>,
    was_stopped: Arc<AtomicBool>,
}

#[async_trait]
impl<B: Backend> QueueHandler for Stoppable<B> {
    async fn run(&self, context: QueueContext) -> Ending {
        match self.inner.run(context).await {
            Ending::Release(_) if self.was_stopped.load(Ordering::Acquire) => Ending::Fail(JobFailure::new(
                QueueBlame::Platform,
                "RUNPOD_STOPPED",
                "RunPod stopped the job: it was cancelled there, or its time limit has passed",
            )),
            ending => ending,
        }
    }
}

/// What the row says at the end, as the delivery's result.
fn ended(status: &JobStatus) -> Result<Value> {
    let place = format!("job {}", status.id);
    match status.state {
        JobState::Completed => Ok(payload::of_row(
            status.id,
            status.result.as_ref().unwrap_or(&Value::Null),
        )),
        JobState::Cancelled => Err(Failure::user("JOB_CANCELLED", "The job was cancelled").at(place)),
        JobState::Failed => Err(failure_of_row(status)),
        // It waits for another attempt, which comes by a delivery of its own.
        _ => Err(Failure {
            blame: Blame::Platform,
            ..failure_of_row(status)
        }),
    }
}

fn failure_of_row(status: &JobStatus) -> Failure {
    let error = status.error.as_ref();
    let part = |pointer: &str| error.and_then(|error| error.pointer(pointer)).and_then(Value::as_str);
    let blame = match part("/blame") {
        Some("user") => Blame::User,
        Some("platform") => Blame::Platform,
        _ => Blame::System,
    };
    let message = part("/message").unwrap_or("The attempt was interrupted; the job waits for another one");
    let place = part("/detail/place").filter(|place| !place.is_empty());
    Failure::new(blame, part("/code").unwrap_or("JOB_INTERRUPTED"), message)
        .at(place.map_or_else(|| format!("job {}", status.id), str::to_owned))
        .hint(part("/detail/hint").unwrap_or_default())
}

/// Repeats a call while the database is away.
async fn patiently<T, F>(mut call: impl FnMut() -> F) -> Result<T>
where
    F: Future<Output = Result<T, brightrun_queue::Error>>,
{
    let mut tries = 0;
    loop {
        match call().await {
            Err(error) if error.is_transient() && tries < MOST_TRIES => {
                tries += 1;
                tracing::warn!(%error, "the database cannot be reached; trying again");
                tokio::time::sleep(AGAIN).await;
            }
            result => return Ok(result?),
        }
    }
}
