//! The local API's queue and the workers that empty it.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use serde_json::{Map, Value, json};
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use super::direct::identity;
use super::record::{Record, Request};
use crate::error::Result;
use crate::runpod::handler::{Handler, JobContext, Outgoing, StopReason, StopSignal};
use crate::runpod::http::Http;
use crate::runpod::job::RunPodJob;
use crate::runpod::outcome::Outcome;
use crate::runpod::pace::Pace;
use crate::runpod::redact::Redactor;
use crate::runpod::running::{claim_and_run, final_value, panic_failure};
use crate::runpod::status::JobStatus;

/// Tries of a webhook, as the cloud makes them.
const WEBHOOK_TRIES: usize = 3;

/// Longest wait for a webhook's answer.
const WEBHOOK_TIMEOUT: Duration = Duration::from_secs(10);

/// Jobs by id, and what is needed to run them.
pub(crate) struct Store {
    state: Mutex<State>,
    changed: Notify,
    handler: Arc<dyn Handler>,
    http: Http,
    redactor: Redactor,
    slots: usize,
    webhook_pause: Duration,
}

#[derive(Default)]
struct State {
    records: BTreeMap<String, Record>,
    waiting: VecDeque<String>,
    running: usize,
    totals: Totals,
}

#[derive(Default)]
struct Totals {
    completed: u64,
    failed: u64,
    retried: u64,
}

/// What came of a `/retry`.
pub(crate) enum Retry {
    Queued,
    Unknown,
    NotFailed(JobStatus),
}

impl Store {
    pub fn new(handler: Arc<dyn Handler>, redactor: Redactor, slots: usize, webhook_pause: Duration) -> Result<Self> {
        Ok(Self {
            state: Mutex::default(),
            changed: Notify::new(),
            handler,
            http: Http::for_worker(None)?,
            redactor,
            slots,
            webhook_pause,
        })
    }

    /// Starts the workers; they end with `stop`.
    pub fn start(self: &Arc<Self>, stop: &CancellationToken) {
        for _ in 0..self.slots {
            let (store, stop) = (Arc::clone(self), stop.clone());
            tokio::spawn(async move {
                tokio::select! {
                    () = store.work() => {}
                    () = stop.cancelled() => {}
                }
            });
        }
    }

    /// Takes in a job and says its id.
    pub fn add(&self, request: Request, is_sync: bool) -> String {
        let record = Record::new(request, is_sync);
        let id = record.id.clone();
        let mut state = self.lock();
        state.waiting.push_back(id.clone());
        state.records.insert(id.clone(), record);
        drop(state);
        self.changed.notify_waiters();
        id
    }

    /// Looks at or changes a job; `None` when it is unknown or expired.
    pub fn with<T>(&self, id: &str, look: impl FnOnce(&mut Record) -> T) -> Option<T> {
        let mut state = self.lock();
        let now = Instant::now();
        for record in state.records.values_mut().filter(|record| record.is_expired(now)) {
            record.stop.give(StopReason::Cancelled);
        }
        state.records.retain(|_, record| !record.is_expired(now));
        state.records.get_mut(id).map(look)
    }

    /// Waits until the job is final, at most for `limit`, and says what is known.
    pub async fn settled(&self, id: &str, limit: Duration) -> Option<Map<String, Value>> {
        let settle = async {
            loop {
                let changed = self.changed.notified();
                tokio::pin!(changed);
                changed.as_mut().enable();
                if self.with(id, |record| record.status.is_final()).unwrap_or(true) {
                    return;
                }
                changed.await;
            }
        };
        // Not final in time is an answer too.
        let _in_time = tokio::time::timeout(limit, settle).await;
        self.with(id, |record| record.view())
    }

    /// Cancels a job; one that is over stays as it is.
    pub fn cancel(self: &Arc<Self>, id: &str) -> Option<JobStatus> {
        self.lock().waiting.retain(|waiting| waiting != id);
        let stop = self.with(id, |record| record.stop.clone())?;
        self.finish(id, JobStatus::Cancelled, |_| {});
        stop.give(StopReason::Cancelled);
        self.with(id, |record| record.status.clone())
    }

    /// Queues a failed job again.
    pub fn retry(&self, id: &str) -> Retry {
        let outcome = self.with(id, |record| match record.status {
            JobStatus::Failed | JobStatus::TimedOut => {
                record.queue_again();
                Retry::Queued
            }
            ref other => Retry::NotFailed(other.clone()),
        });
        if let Some(Retry::Queued) = outcome {
            let mut state = self.lock();
            state.waiting.push_back(id.to_owned());
            state.totals.retried += 1;
            drop(state);
            self.changed.notify_waiters();
        }
        outcome.unwrap_or(Retry::Unknown)
    }

    /// Removes all waiting jobs and says how many.
    pub fn purge(self: &Arc<Self>) -> usize {
        let waiting: Vec<String> = self.lock().waiting.drain(..).collect();
        waiting
            .iter()
            .filter(|id| self.finish(id, JobStatus::Cancelled, |_| {}))
            .count()
    }

    /// The cloud's health object.
    pub fn health(&self) -> Value {
        let state = self.lock();
        let idle = self.slots.saturating_sub(state.running);
        json!({
            "jobs": {
                "completed": state.totals.completed, "failed": state.totals.failed, "inProgress": state.running,
                "inQueue": state.waiting.len(), "retried": state.totals.retried,
            },
            "workers": {"idle": idle, "initializing": 0, "ready": idle, "running": state.running, "throttled": 0, "unhealthy": 0},
        })
    }

    /// One worker: runs what waits, one job after the other.
    async fn work(self: Arc<Self>) {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            let Some((job, stop, limit)) = self.next() else {
                changed.await;
                continue;
            };
            let span = tracing::info_span!("job", request_id = job.id);
            self.run(job, stop, limit).instrument(span).await;
            self.lock().running -= 1;
        }
    }

    fn next(&self) -> Option<(RunPodJob, StopSignal, Duration)> {
        let mut state = self.lock();
        let id = state.waiting.pop_front()?;
        let now = Instant::now();
        let record = state.records.get_mut(&id).filter(|record| !record.is_expired(now))?;
        record.start();
        let mut job = json!({"id": id, "input": record.request.input});
        if let Some(config) = &record.request.s3_config {
            job["s3Config"] = config.clone();
        }
        let (stop, limit) = (record.stop.clone(), record.request.execution_timeout);
        let job = RunPodJob::read(job).ok()?;
        state.running += 1;
        Some((job, stop, limit))
    }

    async fn run(self: &Arc<Self>, job: RunPodJob, stop: StopSignal, limit: Duration) {
        let id = job.id.clone();
        tracing::info!("Started.");
        let redactor = self.redactor.with(job.secrets());
        let (context, outgoing) = JobContext::new(stop.clone());
        let handler = Arc::clone(&self.handler);
        let form = handler.output();
        let work = tokio::spawn(claim_and_run(handler, job, context, Pace::default()).in_current_span());
        let mut chunks = Vec::new();
        let result = tokio::select! {
            result = self.listen(&id, outgoing, work, &mut chunks) => result,
            () = tokio::time::sleep(limit) => {
                stop.give(StopReason::Cancelled);
                self.finish(&id, JobStatus::TimedOut, |record| record.error = Some(json!("job exceeded its execution timeout")));
                return;
            }
        };
        let outcome = Outcome::of(
            result.map(|value| final_value(value, form, chunks)),
            &identity(),
            &redactor,
        );
        let status = if outcome.is_failure {
            JobStatus::Failed
        } else {
            JobStatus::Completed
        };
        self.finish(&id, status, |record| {
            record.output = outcome.body.get("output").cloned();
            record.error = outcome.body.get("error").cloned();
        });
        tracing::info!("Finished.");
    }

    /// Writes down what a running job says until it has ended.
    async fn listen(
        &self,
        id: &str,
        outgoing: Outgoing,
        mut work: tokio::task::JoinHandle<Result<Value>>,
        chunks: &mut Vec<Value>,
    ) -> Result<Value> {
        let Outgoing {
            latest,
            chunks: mut arriving,
        } = outgoing;
        let keep_chunk = |chunk: Value, chunks: &mut Vec<Value>| {
            self.with(id, |record| record.unread.push(chunk.clone()));
            chunks.push(chunk);
        };
        let ended = loop {
            tokio::select! {
                ended = &mut work => break ended,
                Some(chunk) = arriving.recv() => keep_chunk(chunk, chunks),
                value = latest.next() => {
                    self.with(id, |record| if !record.status.is_final() { record.output = Some(value) });
                }
            }
        };
        while let Ok(chunk) = arriving.try_recv() {
            keep_chunk(chunk, chunks);
        }
        ended.unwrap_or_else(|error| Err(panic_failure(error)))
    }

    /// Brings a job to a final state, unless it has one, and calls its webhook.
    fn finish(self: &Arc<Self>, id: &str, status: JobStatus, more: impl FnOnce(&mut Record)) -> bool {
        let finished = self.with(id, |record| {
            let is_first = record.finish(status.clone());
            if is_first {
                record.output = None;
                more(record);
            }
            is_first.then(|| record.request.webhook.clone().map(|url| (url, record.webhook_body())))
        });
        let Some(Some(webhook)) = finished else { return false };
        let mut state = self.lock();
        match status {
            JobStatus::Completed => state.totals.completed += 1,
            JobStatus::Failed | JobStatus::TimedOut => state.totals.failed += 1,
            _ => {}
        }
        drop(state);
        self.changed.notify_waiters();
        if let Some((url, body)) = webhook {
            let store = Arc::clone(self);
            tokio::spawn(async move { store.call_webhook(&url, &body).await });
        }
        true
    }

    async fn call_webhook(&self, url: &str, body: &Value) {
        let body = Bytes::from(body.to_string());
        for attempt in 0..WEBHOOK_TRIES {
            if attempt > 0 {
                tokio::time::sleep(self.webhook_pause).await;
            }
            match self.http.post_json(url, body.clone(), WEBHOOK_TIMEOUT).await {
                Ok(answer) if answer.status == 200 => return,
                Ok(answer) => tracing::warn!(status = answer.status, "the webhook did not accept its call"),
                Err(silence) => tracing::warn!(%silence, "the webhook cannot be reached"),
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
