//! Jobs that are named from outside: for a process that is sent for a job instead of looking for one.
//!
//! The same heartbeats, listener and sweeper as a [`Runner`](super::Runner) has, without its claim loop. A job is claimed by
//! its id and run by the handler that comes with the call; how it ended is read from its row, which alone knows.

use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use tokio::sync::{Mutex, Notify};
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};
use tracing::Instrument;
use uuid::Uuid;

use super::running::{Running, RunningJobs};
use super::{Handler, RunnerConfig, StopReason, heartbeat, listener, sweeper, task};
use crate::error::Result;
use crate::job::{Claimed, JobState, JobStatus};
use crate::queue::Queue;

/// Leases taken away when a job is found in the hands of a worker that is silent.
const RESCUE_LIMIT: usize = 100;

/// Runs jobs that are named. Dropping it ends its heartbeats.
pub struct OnDemand {
    queue: Queue,
    config: RunnerConfig,
    running: Arc<RunningJobs>,
    /// Whether the answer to a claim may have been lost. Claims go one at a time: giving back what is not known must not hit a
    /// lease that is just being granted.
    in_doubt: Mutex<bool>,
    _services: DropGuard,
}

/// What became of a claim.
pub enum Granted {
    /// The job is ours: run it.
    Mine(Box<HeldJob>),
    /// It has ended before.
    Ended(Box<JobStatus>),
    /// It cannot be had now: another worker runs it, or its time has not come.
    NotNow(Box<JobStatus>),
    /// There is no such job.
    Missing,
}

/// A claimed job that heartbeats keep alive. Dropped without being run, it is given back by the end of its lease.
pub struct HeldJob {
    job: Claimed,
    entry: Running,
    running: Arc<RunningJobs>,
    is_started: bool,
}

/// A job at work.
pub struct NamedRun {
    entry: Running,
    task: JoinHandle<task::Delivered>,
}

impl OnDemand {
    /// Starts heartbeats, the listener and the sweeper on the current runtime. Of the configuration, `slots`, `poll`, `queue`,
    /// `drain` and `until_idle` mean nothing here.
    ///
    /// # Errors
    /// Whatever [`Queue::check_schema`] says.
    pub async fn start(queue: Queue, config: RunnerConfig) -> Result<Self> {
        queue.check_schema().await?;
        let running = Arc::new(RunningJobs::default());
        let services = CancellationToken::new();
        // The thread ends by itself once the token is cancelled; joining it would block the runtime.
        drop(heartbeat::start(
            &queue,
            config.heartbeat,
            running.clone(),
            services.clone(),
        ));
        tokio::spawn(sweeper::run(queue.clone(), config.clone(), services.clone()));
        if config.listen {
            let nobody_waits = Arc::new(Notify::new());
            tokio::spawn(listener::run(
                queue.clone(),
                nobody_waits,
                running.clone(),
                services.clone(),
            ));
        }
        Ok(Self {
            queue,
            config,
            running,
            in_doubt: Mutex::new(false),
            _services: services.drop_guard(),
        })
    }

    /// The queue, for looking at what became of a job.
    pub fn queue(&self) -> &Queue {
        &self.queue
    }

    /// Claims one job of `kind`, or says why it cannot be had. Safe to repeat after an error: a lease whose grant was not heard
    /// of is given back first.
    ///
    /// # Errors
    /// Those of the connection.
    pub async fn claim(&self, kind: &str, job_id: Uuid) -> Result<Granted> {
        let mut in_doubt = self.in_doubt.lock().await;
        if *in_doubt {
            let known = self.running.tokens();
            self.queue.release_unknown(&self.config.worker, &known).await?;
        }
        // Also for a caller that gives up waiting in between.
        *in_doubt = true;
        let granted = self.try_claim(kind, job_id).await?;
        *in_doubt = false;
        Ok(granted)
    }

    async fn try_claim(&self, kind: &str, job_id: Uuid) -> Result<Granted> {
        let Some(status) = self.queue.status(job_id).await? else {
            return Ok(Granted::Missing);
        };
        if status.kind != kind {
            return Ok(Granted::Missing);
        }
        if status.state.is_terminal() {
            return Ok(Granted::Ended(Box::new(status)));
        }
        if status.state == JobState::Running {
            if status.lease_seconds.is_some_and(|left| left < 0.0) {
                // Nobody else may be sweeping. The sweep grants every lease a full length after an outage.
                let gap = (self.config.sweep * sweeper::GAP_INTERVALS).max(Duration::from_secs(2));
                self.queue.rescue(RESCUE_LIMIT, gap).await?;
            }
            return Ok(Granted::NotNow(Box::new(status)));
        }
        let claimed = self
            .queue
            .claim_job(&self.config.worker, job_id, self.config.lease)
            .await?;
        Ok(match claimed {
            Some(job) => {
                let entry = Running::new(job.lease);
                self.running.add(entry.clone());
                Granted::Mine(Box::new(HeldJob {
                    job,
                    entry,
                    running: self.running.clone(),
                    is_started: false,
                }))
            }
            None => Granted::NotNow(Box::new(status)),
        })
    }

    /// Starts the job on the current runtime.
    pub fn run(&self, mut held: HeldJob, handler: Arc<dyn Handler>) -> NamedRun {
        held.is_started = true;
        let entry = held.entry.clone();
        let run = task::run(
            self.queue.clone(),
            handler,
            held.job.clone(),
            held.entry.clone(),
            self.running.clone(),
        );
        NamedRun {
            entry,
            // The caller's span says on whose behalf every line of the log is.
            task: tokio::spawn(run.in_current_span()),
        }
    }
}

impl HeldJob {
    /// The job as it was claimed.
    pub fn job(&self) -> &Claimed {
        &self.job
    }
}

impl Drop for HeldJob {
    fn drop(&mut self) {
        if !self.is_started {
            self.running.remove(self.job.lease.token);
        }
    }
}

impl NamedRun {
    /// What the handler said last of how far it is.
    pub fn progress(&self) -> Option<Value> {
        self.entry.latest_progress()
    }

    /// Asks the handler to stop; the first reason stays.
    pub fn stop(&self, reason: StopReason) {
        self.entry.stop.fire(reason);
    }

    /// Waits for the run's end. False when its ending did not reach the engine: the lease was lost.
    pub async fn ended(&mut self) -> bool {
        matches!((&mut self.task).await, Ok(task::Delivered(true)))
    }
}
