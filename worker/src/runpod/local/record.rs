//! One job of the local API and what the cloud would say about it.

use std::time::Duration;

use serde_json::{Map, Value, json};
use tokio::time::Instant;
use uuid::Uuid;

use crate::runpod::handler::StopSignal;
use crate::runpod::status::JobStatus;

/// The cloud's limits of a policy and what holds without one.
const EXECUTION_TIMEOUT: (u64, u64, u64) = (5_000, 600_000, 7 * 24 * 3_600_000);
const TTL: (u64, u64, u64) = (10_000, 24 * 3_600_000, 7 * 24 * 3_600_000);

/// How long the cloud keeps a finished `/run` and a finished `/runsync`.
const KEPT_RUN: Duration = Duration::from_secs(30 * 60);
const KEPT_SYNC: Duration = Duration::from_secs(60);

/// What a client asked for.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub input: Value,
    pub webhook: Option<String>,
    pub s3_config: Option<Value>,
    pub execution_timeout: Duration,
    pub ttl: Duration,
}

impl Request {
    /// Reads a request body.
    ///
    /// # Errors
    /// Says in words what is wrong.
    pub fn read(body: &[u8]) -> Result<Self, String> {
        let body: Value = serde_json::from_slice(body).map_err(|error| format!("the body is not JSON: {error}"))?;
        let Value::Object(mut fields) = body else {
            return Err("the body is not a JSON object".to_owned());
        };
        let input = fields.remove("input").ok_or("the body has no `input`")?;
        let policy = fields.remove("policy").unwrap_or_default();
        let limit = |name: &str, (least, default, most): (u64, u64, u64)| match &policy[name] {
            Value::Null => Ok(Duration::from_millis(default)),
            value => match value.as_u64().filter(|ms| (least..=most).contains(ms)) {
                Some(ms) => Ok(Duration::from_millis(ms)),
                None => Err(format!(
                    "`policy.{name}` must be between {least} and {most} milliseconds"
                )),
            },
        };
        Ok(Self {
            execution_timeout: limit("executionTimeout", EXECUTION_TIMEOUT)?,
            ttl: limit("ttl", TTL)?,
            webhook: fields.get("webhook").and_then(Value::as_str).map(str::to_owned),
            s3_config: fields.remove("s3Config"),
            input,
        })
    }
}

/// A job and its history.
#[derive(Debug)]
pub(crate) struct Record {
    pub id: String,
    pub request: Request,
    pub status: JobStatus,
    pub output: Option<Value>,
    pub error: Option<Value>,
    /// Chunks that no `/stream` call has fetched.
    pub unread: Vec<Value>,
    pub stop: StopSignal,
    pub retries: u32,
    submitted: Instant,
    queued: Instant,
    started: Option<Instant>,
    finished: Option<Instant>,
    kept: Duration,
}

impl Record {
    pub fn new(request: Request, is_sync: bool) -> Self {
        let id = Uuid::new_v4();
        let now = Instant::now();
        Self {
            id: if is_sync {
                format!("sync-{id}-u1")
            } else {
                format!("{id}-u1")
            },
            request,
            status: JobStatus::InQueue,
            output: None,
            error: None,
            unread: Vec::new(),
            stop: StopSignal::default(),
            retries: 0,
            submitted: now,
            queued: now,
            started: None,
            finished: None,
            kept: if is_sync { KEPT_SYNC } else { KEPT_RUN },
        }
    }

    /// A worker has it.
    pub fn start(&mut self) {
        self.status = JobStatus::InProgress;
        self.started = Some(Instant::now());
    }

    /// It is over. A final state stays: the first one wins.
    pub fn finish(&mut self, status: JobStatus) -> bool {
        if self.status.is_final() {
            return false;
        }
        self.status = status;
        self.finished = Some(Instant::now());
        true
    }

    /// It waits again, with everything of the last attempt removed.
    pub fn queue_again(&mut self) {
        self.status = JobStatus::InQueue;
        self.queued = Instant::now();
        (self.started, self.finished, self.output, self.error) = (None, None, None, None);
        self.unread.clear();
        self.stop = StopSignal::default();
        self.retries += 1;
    }

    /// Whether the cloud would not know it any more.
    pub fn is_expired(&self, now: Instant) -> bool {
        let kept_too_long = self
            .finished
            .is_some_and(|finished| now.duration_since(finished) > self.kept);
        kept_too_long || (self.finished.is_none() && now.duration_since(self.submitted) > self.request.ttl)
    }

    /// Keeps the result for a shorter time.
    pub fn keep_for(&mut self, kept: Duration) {
        self.kept = self.kept.min(kept);
    }

    /// The cloud's job object.
    pub fn view(&self) -> Map<String, Value> {
        let mut view = Map::new();
        let mut put = |name: &str, value: Value| view.insert(name.to_owned(), value);
        put("id", json!(self.id));
        put("status", json!(self.status));
        if let Some(started) = self.started {
            put("delayTime", json!(millis(started.duration_since(self.queued))));
            put("workerId", json!("local"));
        }
        if let (Some(started), Some(finished)) = (self.started, self.finished) {
            put("executionTime", json!(millis(finished.duration_since(started))));
        }
        if self.retries > 0 {
            put("retries", json!(self.retries));
        }
        for (name, value) in [("output", &self.output), ("error", &self.error)] {
            if let Some(value) = value {
                put(name, value.clone());
            }
        }
        view
    }

    /// What the cloud posts to the webhook: the job object and what was asked for.
    pub fn webhook_body(&self) -> Value {
        let mut view = self.view();
        view.insert("input".to_owned(), self.request.input.clone());
        view.insert("webhook".to_owned(), json!(self.request.webhook));
        Value::Object(view)
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
