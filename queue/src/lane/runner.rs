//! A worker for one lane.
//!
//! ```text
//!   fetcher ──▶ buffer ──▶ slots (handlers) ──▶ finisher
//!      claims a batch           one job each        one statement for all endings that
//!      before the buffer                            gathered while the last was under way
//!      runs dry
//! ```
//!
//! Claimed jobs wait in this process, under a lease that is renewed; a process that is killed costs them one lease and one attempt.

use std::collections::{HashMap, VecDeque};
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::{Batch, BatchJob, BatchPlace, Lane};
use crate::error::Result;
use crate::job::JobFailure;
use crate::runner::running::RunningJobs;
use crate::runner::task::panic_failure;
use crate::runner::{Backoff, RunnerConfig, listener, spread, sweeper};
use crate::wake::{Look, WakeUp};

/// Endings in one statement at most.
const TOGETHER: usize = 2000;

/// A bounded claim leaves room for transactions that took their place in the lane and have not committed yet: this many batches.
const MARGIN_BATCHES: i64 = 4;

/// Claims without a lower bound may cost this part of the time at most, for they may have to walk past what cannot be cleaned up.
const UNBOUNDED_SHARE: u32 = 50;

/// Runs the jobs of one lane.
#[async_trait::async_trait]
pub trait LaneHandler: Send + Sync + 'static {
    /// Runs one job. A failure is tried again later, unless the user is to blame or the attempts are used up. A panic is a failure
    /// with code `INTERNAL_PANIC`.
    ///
    /// # Errors
    /// Why the job failed.
    async fn run(&self, job: &BatchJob) -> Result<(), JobFailure>;
}

/// A lane worker's habits.
#[derive(Clone, Debug)]
pub struct LaneConfig {
    /// Name of this process in leases: fresh for every start.
    pub worker: String,
    /// Handlers at work at once.
    pub slots: usize,
    /// Jobs claimed at once. Twice as many may wait in this process.
    pub batch: usize,
    /// How long a batch's lease lasts without a beat.
    pub lease: Duration,
    /// Time between looks for work when nothing wakes the worker; spread by up to a quarter.
    pub poll: Duration,
    /// Time between sweeps for expired leases.
    pub sweep: Duration,
    /// Whether to listen for wake-ups; not possible through a transaction pooler.
    pub listen: bool,
    /// End when nothing is left to claim and nothing running.
    pub until_idle: bool,
}

impl Default for LaneConfig {
    fn default() -> Self {
        let habits = RunnerConfig::default();
        Self {
            worker: habits.worker,
            slots: 8,
            batch: 500,
            lease: Duration::from_secs(60),
            poll: habits.poll,
            sweep: habits.sweep,
            listen: true,
            until_idle: false,
        }
    }
}

/// What a lane worker did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LaneReport {
    /// Endings that were accepted.
    pub ended: u64,
    /// Endings that were refused: the batch had been taken away.
    pub refused: u64,
}

/// A worker process for one lane in the making.
pub struct LaneRunner<H> {
    lane: Lane,
    config: LaneConfig,
    handler: Arc<H>,
}

impl<H: LaneHandler> LaneRunner<H> {
    /// A worker of `lane` that runs `handler`.
    pub fn new(lane: Lane, config: LaneConfig, handler: H) -> Self {
        Self {
            lane,
            config,
            handler: Arc::new(handler),
        }
    }

    /// Works until `shutdown` is cancelled (or, with `until_idle`, until nothing is left). Then running handlers end, and what waits
    /// in this process is given back uncounted.
    ///
    /// # Errors
    /// At the start, whatever [`Queue::check_schema`](crate::Queue::check_schema) says. Later nothing: connections come back.
    pub async fn run(self, shutdown: CancellationToken) -> Result<LaneReport> {
        let queue = self.lane.queue().clone();
        queue.check_schema().await?;
        let services = CancellationToken::new();
        let _services_end = services.clone().drop_guard();
        let ready = Arc::new(WakeUp::default());
        if self.config.listen {
            tokio::spawn(listener::run(
                queue.clone(),
                ready.clone(),
                Arc::<RunningJobs>::default(),
                services.clone(),
            ));
        }
        let habits = RunnerConfig {
            sweep: self.config.sweep,
            ..RunnerConfig::default()
        };
        tokio::spawn(sweeper::run(queue, habits, services.clone()));

        let work = Arc::new(Work {
            shutdown: shutdown.clone(),
            ..Work::default()
        });
        tokio::spawn(beat_until(
            self.lane.clone(),
            self.config.lease / 4,
            work.clone(),
            services,
        ));
        let (ended, endings) = mpsc::unbounded_channel();
        let finisher = tokio::spawn(finish(self.lane.clone(), work.clone(), endings));
        let mut slots = JoinSet::new();
        for _ in 0..self.config.slots.max(1) {
            slots.spawn(slot(work.clone(), self.handler.clone(), ended.clone()));
        }
        drop(ended);
        fetch(&self.lane, &self.config, &work, &ready, &shutdown).await;
        work.close();
        while slots.join_next().await.is_some() {}
        let report = finisher.await.unwrap_or_default();
        for token in work.held() {
            // Best effort: a lease nobody renews any more ends by itself.
            if let Err(error) = self.lane.release(token).await {
                tracing::debug!(%error, token, "a batch was not given back");
            }
        }
        Ok(report)
    }
}

/// What fetcher, slots, finisher and beats share.
#[derive(Default)]
struct Work {
    state: Mutex<State>,
    /// There is something to run, or nothing will come any more.
    more: Notify,
    /// The buffer runs low, or the last job has ended.
    low: Notify,
    shutdown: CancellationToken,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<BatchJob>,
    /// Jobs of each held batch that have not ended.
    open: HashMap<i64, usize>,
    low_mark: usize,
    closed: bool,
}

impl Work {
    fn lock(&self) -> MutexGuard<'_, State> {
        // No code panics while it holds this lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, batch: Batch) {
        let count = batch.jobs.len();
        let mut state = self.lock();
        state.open.insert(batch.token, count);
        state.low_mark = count;
        state.waiting.extend(batch.jobs);
        drop(state);
        self.more.notify_waiters();
        self.more.notify_one();
    }

    /// The next job to run; `None` when the runner closes.
    async fn next(&self) -> Option<BatchJob> {
        loop {
            let told = self.more.notified();
            {
                let mut state = self.lock();
                if state.closed || self.shutdown.is_cancelled() {
                    return None;
                }
                if let Some(job) = state.waiting.pop_front() {
                    if state.waiting.len() < state.low_mark {
                        self.low.notify_one();
                    }
                    if !state.waiting.is_empty() {
                        self.more.notify_one();
                    }
                    return Some(job);
                }
            }
            told.await;
        }
    }

    fn waiting(&self) -> usize {
        self.lock().waiting.len()
    }

    fn is_idle(&self) -> bool {
        self.lock().open.is_empty()
    }

    fn held(&self) -> Vec<i64> {
        self.lock().open.keys().copied().collect()
    }

    fn note_ended(&self, token: i64) {
        let mut state = self.lock();
        if let Some(open) = state.open.get_mut(&token) {
            *open = open.saturating_sub(1);
            if *open == 0 {
                state.open.remove(&token);
            }
        }
        if state.open.is_empty() {
            self.low.notify_one();
        }
    }

    /// The batch was taken away: what of it still waits must not run.
    fn lose(&self, token: i64) {
        let mut state = self.lock();
        state.open.remove(&token);
        state.waiting.retain(|job| job.place.token != token);
        self.low.notify_one();
    }

    fn close(&self) {
        self.lock().closed = true;
        self.more.notify_waiters();
    }
}

async fn slot<H: LaneHandler>(
    work: Arc<Work>,
    handler: Arc<H>,
    ended: mpsc::UnboundedSender<(BatchPlace, Option<JobFailure>)>,
) {
    while let Some(job) = work.next().await {
        let failure = match AssertUnwindSafe(handler.run(&job)).catch_unwind().await {
            Ok(told) => told.err(),
            Err(panic) => Some(panic_failure(panic.as_ref())),
        };
        if ended.send((job.place, failure)).is_err() {
            return;
        }
    }
}

/// The lower bound of claims, and when to claim without it.
struct Mark {
    after: i64,
    margin: i64,
    next_unbounded: Instant,
}

impl Mark {
    fn new(batch: usize) -> Self {
        let margin = i64::try_from(batch).unwrap_or(i64::MAX / MARGIN_BATCHES) * MARGIN_BATCHES;
        Self {
            after: 0,
            margin,
            next_unbounded: Instant::now(),
        }
    }

    async fn claim(&mut self, lane: &Lane, config: &LaneConfig) -> Result<Option<Batch>> {
        let started = Instant::now();
        if self.after > 0 && started < self.next_unbounded {
            let batch = lane
                .claim(&config.worker, config.batch, config.lease, self.after)
                .await?;
            if let Some(batch) = batch {
                self.after = self.after.max(batch.last_seq - self.margin);
                return Ok(Some(batch));
            }
        }
        let started = Instant::now();
        let batch = lane.claim(&config.worker, config.batch, config.lease, 0).await?;
        self.next_unbounded = Instant::now() + (started.elapsed() * UNBOUNDED_SHARE).max(Duration::from_secs(1));
        self.after = batch.as_ref().map_or(0, |batch| batch.last_seq - self.margin);
        Ok(batch)
    }
}

async fn fetch(lane: &Lane, config: &LaneConfig, work: &Work, ready: &WakeUp, shutdown: &CancellationToken) {
    let mut mark = Mark::new(config.batch);
    let mut trouble = Backoff::default();
    let mut look = Look::Polled;
    while !shutdown.is_cancelled() {
        if work.waiting() >= config.batch {
            tokio::select! {
                () = work.low.notified() => {}
                () = shutdown.cancelled() => {}
            }
            continue;
        }
        // Armed before the claim, so that a job that becomes ready during it is not slept over.
        let woken = ready.woken();
        match mark.claim(lane, config).await {
            Ok(Some(batch)) => {
                ready.found(look, true);
                look = Look::Polled;
                trouble = Backoff::default();
                work.add(batch);
            }
            Ok(None) => {
                ready.found(look, false);
                trouble = Backoff::default();
                if config.until_idle && work.is_idle() {
                    return;
                }
                look = tokio::select! {
                    () = woken => Look::Woken,
                    () = tokio::time::sleep(spread(config.poll)) => Look::Polled,
                    () = work.low.notified(), if config.until_idle => Look::Polled,
                    () = shutdown.cancelled() => Look::Polled,
                };
            }
            Err(error) => {
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

async fn finish(
    lane: Lane,
    work: Arc<Work>,
    mut endings: mpsc::UnboundedReceiver<(BatchPlace, Option<JobFailure>)>,
) -> LaneReport {
    let mut report = LaneReport::default();
    let mut together = Vec::with_capacity(TOGETHER);
    while endings.recv_many(&mut together, TOGETHER).await > 0 {
        let mut trouble = Backoff::default();
        let accepted = loop {
            match lane.finish(&together).await {
                Ok(accepted) => break accepted,
                // Asked again, what was accepted unheard counts as refused; its job has ended all the same.
                Err(error) => tracing::info!(%error, count = together.len(), "endings are not delivered yet"),
            }
            tokio::time::sleep(trouble.next()).await;
        };
        for ((place, _), accepted) in together.drain(..).zip(accepted) {
            if accepted {
                report.ended += 1;
            } else {
                report.refused += 1;
            }
            work.note_ended(place.token);
        }
    }
    report
}

async fn beat_until(lane: Lane, interval: Duration, work: Arc<Work>, end: CancellationToken) {
    loop {
        tokio::select! {
            () = end.cancelled() => return,
            () = tokio::time::sleep(interval) => {}
        }
        let held = work.held();
        if held.is_empty() {
            continue;
        }
        match lane.beat(&held).await {
            Ok(alive) => {
                for (token, _) in held.into_iter().zip(alive).filter(|(_, alive)| !alive) {
                    work.lose(token);
                }
            }
            Err(error) => tracing::warn!(%error, "a beat failed; the next one follows"),
        }
    }
}
