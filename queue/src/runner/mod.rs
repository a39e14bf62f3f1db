//! The worker: turns handlers into a process that claims, runs, beats and drains.
//!
//! ```text
//!   claim loop ──── one task: claims to the free slots, again at once after a non-empty claim
//!     │ spawns
//!     ▼
//!   job tasks ───── one per running job: the handler, then its ending, repeated until it is known
//!
//!   endings ─────── completions that arrive while others are under way leave together
//!   heartbeat ───── a thread with a connection of its own: beats for all running jobs at once
//!   listener ────── optional: turns notifications into an early claim or an early beat
//!   sweeper ─────── rescues expired leases, makes partitions
//! ```
//!
//! Heartbeats share nothing with the rest but the table of running jobs: neither a busy runtime nor
//! a busy pool can make a healthy job look dead. When the database goes away, jobs run on; their
//! endings wait until it is back, and the engine's sweep grants every lease a full length first.

mod context;
mod endings;
mod heartbeat;
pub(crate) mod listener;
mod on_demand;
pub(crate) mod running;
pub(crate) mod sweeper;
pub(crate) mod task;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use rand::RngExt;
use serde_json::Value;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::error::{Error, Result};
use crate::job::{JobFailure, Machine};
use crate::queue::{ClaimRequest, Queue};
use crate::wake::{Look, WakeUp};

pub use context::{JobContext, StopReason, StopSignal};
pub use on_demand::{Granted, HeldJob, NamedRun, OnDemand};
use running::{Running, RunningJobs};

/// How long shutdown waits for the release of jobs whose handlers did not stop.
const RELEASE_PATIENCE: Duration = Duration::from_secs(5);

/// How a handler ends a run.
#[derive(Clone, Debug, PartialEq)]
pub enum Ending {
    /// Done; the value becomes the job's result.
    Complete(Value),
    /// Failed; the blame decides whether it is tried again.
    Fail(JobFailure),
    /// Failed, and when to try again is known (a provider said so).
    FailUntil(JobFailure, Duration),
    /// Not now: again after a while. Not an attempt.
    Snooze(Duration, String),
    /// Interrupted: give it back. Not an attempt.
    Release(String),
}

/// Runs the jobs of one kind.
///
/// A handler watches [`JobContext::stop`] and ends soon after it fires. After
/// [`StopReason::Shutdown`] it saves what it needs to resume and returns [`Ending::Release`]; after
/// [`StopReason::Cancel`] any ending will do; after [`StopReason::Lost`] it must not write anywhere.
/// Long computation belongs on a thread of its own (`tokio::task::spawn_blocking`).
#[async_trait::async_trait]
pub trait Handler: Send + Sync {
    /// Runs one job to its end. A panic is recorded as a failure with code `INTERNAL_PANIC`.
    async fn run(&self, context: JobContext) -> Ending;
}

/// The runner's habits. The defaults suit jobs of minutes to hours.
#[derive(Clone, Debug)]
pub struct RunnerConfig {
    /// Name of this process in leases and history: fresh for every start, since a name that is used
    /// again would hide an orphan.
    pub worker: String,
    /// Which queue to read.
    pub queue: String,
    /// How many jobs run at once.
    pub slots: usize,
    /// What this machine promises to jobs with requirements; without it, only jobs that need nothing are claimed.
    pub machine: Option<Machine>,
    /// How many more it may claim ahead of a free slot, for jobs so short that a claim for each would show; 0 by default, so that a
    /// job of hours never waits behind another while some other worker is idle. Claimed jobs are kept alive by the same heartbeats,
    /// and given back uncounted at shutdown.
    pub prefetch: usize,
    /// How long a lease lasts without a heartbeat.
    pub lease: Duration,
    /// Time between heartbeats; a lease should span four or more.
    pub heartbeat: Duration,
    /// Time between looks for work when nothing wakes the runner; spread by up to a quarter.
    pub poll: Duration,
    /// Time between sweeps for expired leases.
    pub sweep: Duration,
    /// Time between rounds of maintenance.
    pub maintain: Duration,
    /// Whether to listen for wake-ups; not possible through a transaction pooler, where only
    /// polling remains.
    pub listen: bool,
    /// How long running handlers may take to stop at shutdown before they are given up.
    pub drain: Duration,
    /// End when there is nothing left to claim and nothing running: for batch use and tests.
    pub until_idle: bool,
}

impl Default for RunnerConfig {
    fn default() -> Self {
        Self {
            // Written with every lease and line of history, hence no longer than it must be to be never the same again.
            worker: format!("{}-{:016x}", std::process::id(), rand::rng().random::<u64>()),
            queue: "default".into(),
            slots: 1,
            machine: None,
            prefetch: 0,
            lease: Duration::from_secs(120),
            heartbeat: Duration::from_secs(10),
            poll: Duration::from_secs(1),
            sweep: Duration::from_secs(5),
            maintain: Duration::from_secs(600),
            listen: true,
            drain: Duration::from_secs(30),
            until_idle: false,
        }
    }
}

/// What a runner did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RunnerReport {
    /// Jobs it claimed.
    pub claimed: u64,
    /// Jobs whose ending it could not deliver: lost to another worker, or unfinished when the
    /// patience for draining ran out.
    pub given_up: u64,
}

/// A worker process in the making.
///
/// See the crate's README for a complete example.
pub struct Runner {
    queue: Queue,
    config: RunnerConfig,
    handlers: HashMap<String, Arc<dyn Handler>>,
}

impl Runner {
    /// A runner without handlers.
    pub fn new(queue: Queue, config: RunnerConfig) -> Self {
        Self {
            queue,
            config,
            handlers: HashMap::new(),
        }
    }

    /// Adds the handler of a kind; a second one for the same kind replaces the first.
    #[must_use]
    pub fn handler(mut self, kind: impl Into<String>, handler: impl Handler + 'static) -> Self {
        self.handlers.insert(kind.into(), Arc::new(handler));
        self
    }

    /// Works until `shutdown` is cancelled (or, with `until_idle`, until nothing is left), then
    /// drains: handlers are asked to stop, and what does not end in time is given back uncounted.
    ///
    /// # Errors
    /// At the start, whatever [`Queue::check_schema`] says. Later nothing: connections come back,
    /// and the runner waits for them.
    pub async fn run(self, shutdown: CancellationToken) -> Result<RunnerReport> {
        self.queue.check_schema().await?;
        let running = Arc::new(RunningJobs::default());
        let ready = Arc::new(WakeUp::default());
        let services = CancellationToken::new();
        let _services_end = services.clone().drop_guard();

        let beats = heartbeat::start(&self.queue, self.config.heartbeat, running.clone(), services.clone());
        tokio::spawn(sweeper::run(self.queue.clone(), self.config.clone(), services.clone()));
        if self.config.listen {
            tokio::spawn(listener::run(
                self.queue.clone(),
                ready.clone(),
                running.clone(),
                services.clone(),
            ));
        }

        let mut work = Work {
            runner: &self,
            running: &running,
            ready: &ready,
            endings: endings::Endings::start(self.queue.clone()),
            slots: Arc::new(Semaphore::new(self.config.slots.max(1))),
            tasks: JoinSet::new(),
            report: RunnerReport::default(),
        };
        work.claim_until(&shutdown).await;
        work.drain().await;
        let report = work.report;
        services.cancel();
        // The thread ends by itself; joining it here would block the runtime.
        drop(beats);
        Ok(report)
    }

    fn claim_request(&self, free: usize) -> ClaimRequest {
        ClaimRequest {
            worker: self.config.worker.clone(),
            queue: self.config.queue.clone(),
            kinds: self.handlers.keys().cloned().collect(),
            limit: free,
            lease: self.config.lease,
            machine: self.config.machine.clone(),
        }
    }
}

/// The claim loop's state.
struct Work<'a> {
    runner: &'a Runner,
    running: &'a Arc<RunningJobs>,
    ready: &'a Arc<WakeUp>,
    endings: endings::Endings,
    slots: Arc<Semaphore>,
    tasks: JoinSet<task::Delivered>,
    report: RunnerReport,
}

impl Work<'_> {
    async fn claim_until(&mut self, shutdown: &CancellationToken) {
        let slots = self.runner.config.slots.max(1) + self.runner.config.prefetch;
        let mut trouble = Backoff::default();
        let mut claim_in_doubt = false;
        let mut look = Look::Polled;
        while !shutdown.is_cancelled() {
            while let Some(ended) = self.tasks.try_join_next() {
                self.count(ended);
            }
            let free = slots.saturating_sub(self.tasks.len());
            if free <= self.runner.config.prefetch / 2 {
                tokio::select! {
                    ended = self.tasks.join_next() => { if let Some(ended) = ended { self.count(ended); } }
                    () = shutdown.cancelled() => {}
                }
                continue;
            }
            // Armed before the claim, so that a job that becomes ready during it is not slept over.
            let woken = self.ready.woken();
            match self.claim(free, claim_in_doubt).await {
                Ok(0) => {
                    (trouble, claim_in_doubt) = (Backoff::default(), false);
                    self.ready.found(look, false);
                    if self.runner.config.until_idle && self.tasks.is_empty() {
                        return;
                    }
                    let poll = spread(self.runner.config.poll);
                    tokio::select! {
                        () = woken => look = Look::Woken,
                        () = tokio::time::sleep(poll) => look = Look::Polled,
                        Some(ended) = self.tasks.join_next() => self.count(ended),
                        () = shutdown.cancelled() => {}
                    }
                }
                Ok(_) => {
                    (trouble, claim_in_doubt) = (Backoff::default(), false);
                    self.ready.found(look, true);
                    look = Look::Polled;
                }
                Err(error) => {
                    // Whether the engine granted something is unknown; what it did is given back first.
                    claim_in_doubt = true;
                    let wait = trouble.next();
                    tracing::warn!(%error, hint = error.hint(), wait_ms = wait.as_millis(), "claiming failed; trying again");
                    tokio::select! {
                        () = tokio::time::sleep(wait) => {}
                        () = shutdown.cancelled() => {}
                    }
                }
            }
        }
    }

    /// Claims and starts jobs; returns how many.
    async fn claim(&mut self, free: usize, in_doubt: bool) -> Result<usize> {
        let queue = &self.runner.queue;
        if in_doubt {
            let known = self.running.tokens();
            let released = queue.release_unknown(&self.runner.config.worker, &known).await?;
            if released > 0 {
                tracing::info!(released, "gave back jobs of a claim whose answer was lost");
            }
        }
        let claimed = queue.claim(&self.runner.claim_request(free)).await?;
        let count = claimed.len();
        for job in claimed {
            let Some(handler) = self.runner.handlers.get(&job.kind).cloned() else {
                return Err(Error::Answer {
                    job: Some(job.lease.job_id),
                    message: format!("kind `{}` was not asked for", job.kind),
                });
            };
            self.report.claimed += 1;
            let entry = Running::new(job.lease);
            self.running.add(entry.clone());
            self.tasks.spawn(task::run(
                self.endings.clone(),
                self.slots.clone(),
                handler,
                job,
                entry,
                self.running.clone(),
            ));
        }
        Ok(count)
    }

    fn count(&mut self, ended: Result<task::Delivered, tokio::task::JoinError>) {
        if !matches!(ended, Ok(task::Delivered(true))) {
            self.report.given_up += 1;
        }
    }

    /// Asks every handler to stop, waits, and gives back what is left.
    async fn drain(&mut self) {
        for job in self.running.all() {
            job.stop.fire(StopReason::Shutdown);
        }
        let deadline = tokio::time::sleep(self.runner.config.drain);
        tokio::pin!(deadline);
        loop {
            tokio::select! {
                ended = self.tasks.join_next() => match ended {
                    Some(ended) => self.count(ended),
                    None => return,
                },
                () = &mut deadline => break,
            }
        }
        let left = self.running.all();
        self.report.given_up += left.len() as u64;
        self.tasks.abort_all();
        // Best effort and bounded: a lease nobody renews any more ends by itself.
        let releases = left.iter().map(|job| async {
            let release = self.runner.queue.release(&job.lease, Some("its worker was shut down"));
            let released = tokio::time::timeout(RELEASE_PATIENCE, release).await;
            let given_back = matches!(released, Ok(Ok(_)));
            tracing::warn!(job_id = %job.lease.job_id, given_back, "a handler did not stop in time");
            self.running.remove(job.lease.token);
        });
        join_all(releases).await;
    }
}

/// Growing waits with spread, for a database that is away.
#[derive(Default)]
pub(crate) struct Backoff {
    failures: u32,
}

impl Backoff {
    pub(crate) fn next(&mut self) -> Duration {
        let full = Duration::from_millis(100) * 2u32.pow(self.failures.min(5));
        self.failures += 1;
        full.mul_f64(rand::rng().random_range(0.5..=1.0))
    }
}

/// `time` and up to a quarter more, so that workers do not poll in step.
pub(crate) fn spread(time: Duration) -> Duration {
    time.mul_f64(rand::rng().random_range(1.0..=1.25))
}
