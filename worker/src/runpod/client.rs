//! The public endpoint API as an orchestrator uses it: submit, look, cancel, health.
//!
//! RunPod's answer is never the record of a job (results vanish after half an hour, and COMPLETED may lie); it tells the orchestrator when
//! to look at its own rows.

use std::time::Duration;

use bytes::Bytes;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tokio::time::Instant;

use super::http::{Answer, Http, Silence};
use super::pace::{Backoff, at_least, jitter};
use super::redact::Redactor;
use super::routes::path_segment;
use super::status::JobStatus;
use crate::error::{Failure, Result};
use crate::secret::Secret;

/// RunPod's public address.
pub const PUBLIC_API: &str = "https://api.runpod.ai/v2";

/// The platform's bounds of both times of a policy.
const LONGEST_POLICY: Duration = Duration::from_secs(7 * 24 * 3600);
const SHORTEST_EXECUTION: Duration = Duration::from_secs(5);
const SHORTEST_TTL: Duration = Duration::from_secs(10);

/// Longest body of `/run`.
const LARGEST_REQUEST: usize = 10_000_000;

/// Limits of one job. The platform's defaults (10 minutes, 24 hours from submission) end a training run early.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Longest time on a worker.
    pub execution_timeout: Duration,
    /// Longest life from submission; a job that still runs then is deleted.
    pub ttl: Duration,
    /// Does not make the platform start more workers.
    pub low_priority: bool,
}

impl Policy {
    fn to_json(self) -> Value {
        let bounded =
            |time: Duration, least| u64::try_from(time.clamp(least, LONGEST_POLICY).as_millis()).unwrap_or(u64::MAX);
        json!({
            "executionTimeout": bounded(self.execution_timeout, SHORTEST_EXECUTION),
            "ttl": bounded(self.ttl, SHORTEST_TTL),
            "lowPriority": self.low_priority,
        })
    }
}

/// A job as the platform sees it. Fields that it leaves out are absent.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct RemoteJob {
    /// The platform's id.
    pub id: String,
    /// Its state.
    pub status: JobStatus,
    /// Output, or the last progress value of a job in progress.
    #[serde(default)]
    pub output: Option<Value>,
    /// Text of the error; a failed job may have output beside it.
    #[serde(default)]
    pub error: Option<Value>,
    /// Milliseconds of waiting before the last attempt.
    #[serde(default, rename = "delayTime")]
    pub delay_ms: Option<f64>,
    /// Milliseconds on a worker.
    #[serde(default, rename = "executionTime")]
    pub execution_ms: Option<f64>,
    /// How often the platform itself has handed the job out again.
    #[serde(default)]
    pub retries: Option<u32>,
    /// The last worker.
    #[serde(default, rename = "workerId")]
    pub worker_id: Option<String>,
}

/// `/health` of an endpoint.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Health {
    /// Jobs by state.
    #[serde(default)]
    pub jobs: JobCounts,
    /// Workers by state.
    #[serde(default)]
    pub workers: WorkerCounts,
}

/// Jobs by state.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
#[allow(missing_docs)]
pub struct JobCounts {
    pub completed: u64,
    pub failed: u64,
    pub in_progress: u64,
    pub in_queue: u64,
    pub retried: u64,
}

/// Workers by state.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
#[allow(missing_docs)]
pub struct WorkerCounts {
    pub idle: u64,
    pub initializing: u64,
    pub ready: u64,
    pub running: u64,
    pub throttled: u64,
    pub unhealthy: u64,
}

/// How hard the client tries.
#[derive(Clone, Debug)]
pub struct ClientOptions {
    /// Address up to and without the endpoint's id.
    pub base: String,
    /// Longest wait for one answer.
    pub timeout: Duration,
    /// First and longest wait between tries.
    pub retry: (Duration, Duration),
    /// No further try begins after this long.
    pub limit: Duration,
}

impl Default for ClientOptions {
    fn default() -> Self {
        Self {
            base: PUBLIC_API.to_owned(),
            timeout: Duration::from_secs(30),
            retry: (Duration::from_millis(500), Duration::from_secs(20)),
            limit: Duration::from_secs(60),
        }
    }
}

/// Whether a call may be repeated when it is not known to have arrived.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Repeat {
    /// Twice is the same as once.
    Harmless,
    /// A repetition could be a second job: only answers that say "not accepted" allow it.
    OnlyIfRefused,
}

/// A client of one endpoint. Cheap to clone; `Debug` shows no key.
#[derive(Clone)]
pub struct RunPodClient {
    http: Http,
    endpoint: String,
    options: ClientOptions,
    redactor: Redactor,
}

impl std::fmt::Debug for RunPodClient {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "RunPodClient({}/{})", self.options.base, self.endpoint)
    }
}

impl RunPodClient {
    /// A client of the endpoint with this id.
    ///
    /// # Errors
    /// `RUNPOD_KEY_INVALID`, `RUNPOD_CLIENT_UNAVAILABLE`.
    pub fn new(key: &Secret, endpoint: impl Into<String>, options: ClientOptions) -> Result<Self> {
        Ok(Self {
            http: Http::for_client(key)?,
            endpoint: endpoint.into(),
            redactor: Redactor::new([key.expose().to_owned()]),
            options,
        })
    }

    /// Submits a job and returns the platform's id.
    ///
    /// Submission has no idempotency key: where a broken connection leaves open whether the platform has the job, it is *not* repeated
    /// here. The error is `RUNPOD_SUBMIT_UNKNOWN` then, and a second submission is safe because a worker claims the job by the id in
    /// `input` and answers a second delivery without running it.
    ///
    /// # Errors
    /// `RUNPOD_SUBMIT_UNKNOWN` as said; `RUNPOD_INPUT_TOO_LARGE`, `RUNPOD_KEY_REFUSED`, `RUNPOD_ENDPOINT_UNKNOWN`, `RUNPOD_REQUEST_REFUSED`,
    /// `RUNPOD_UNAVAILABLE`.
    pub async fn run(&self, input: &Value, policy: Policy, webhook: Option<&str>) -> Result<String> {
        let is_empty = input.as_object().is_none_or(Map::is_empty);
        if is_empty {
            return Err(Failure::system(
                "RUNPOD_INPUT_EMPTY",
                "A job without input cannot be submitted: the platform drops an empty input",
            ));
        }
        let mut body = json!({"input": input, "policy": policy.to_json()});
        if let Some(webhook) = webhook {
            body["webhook"] = json!(webhook);
        }
        let body = body.to_string();
        if body.len() > LARGEST_REQUEST {
            return Err(Failure::system(
                "RUNPOD_INPUT_TOO_LARGE",
                format!("The job has {} bytes; the platform takes {LARGEST_REQUEST}", body.len()),
            )
            .hint("Submit the job's id and let the worker fetch the rest"));
        }
        let answer = self
            .call(Call::Post(Bytes::from(body)), "run", Repeat::OnlyIfRefused)
            .await?;
        let answer = answer.ok_or_else(|| self.unknown_endpoint())?;
        let id = answer.get("id").and_then(Value::as_str).filter(|id| !id.is_empty());
        id.map(str::to_owned).ok_or_else(|| {
            Failure::platform(
                "RUNPOD_SUBMIT_UNKNOWN",
                "The platform accepted the job without naming it",
            )
            .at(self.place("run"))
        })
    }

    /// Looks at a job; `None` when the platform does not know it, or not any more.
    ///
    /// # Errors
    /// `RUNPOD_KEY_REFUSED`, `RUNPOD_REQUEST_REFUSED`, `RUNPOD_UNAVAILABLE`, `RUNPOD_ANSWER_INVALID`.
    pub async fn status(&self, id: &str) -> Result<Option<RemoteJob>> {
        let call = format!("status/{}", path_segment(id));
        let answer = self.call(Call::Get, &call, Repeat::Harmless).await?;
        answer.map(|answer| self.read(answer, &call)).transpose()
    }

    /// Cancels a job; `None` when the platform does not know it.
    ///
    /// # Errors
    /// As [`RunPodClient::status`].
    pub async fn cancel(&self, id: &str) -> Result<Option<RemoteJob>> {
        let call = format!("cancel/{}", path_segment(id));
        let answer = self.call(Call::Post(Bytes::new()), &call, Repeat::Harmless).await?;
        answer.map(|answer| self.read(answer, &call)).transpose()
    }

    /// Jobs and workers of the endpoint.
    ///
    /// # Errors
    /// As [`RunPodClient::status`], and `RUNPOD_ENDPOINT_UNKNOWN`.
    pub async fn health(&self) -> Result<Health> {
        let answer = self.call(Call::Get, "health", Repeat::Harmless).await?;
        self.read(answer.ok_or_else(|| self.unknown_endpoint())?, "health")
    }

    fn read<T: serde::de::DeserializeOwned>(&self, answer: Value, call: &str) -> Result<T> {
        serde_json::from_value(answer).map_err(|error| {
            Failure::platform(
                "RUNPOD_ANSWER_INVALID",
                format!("The platform's answer is not understood: {error}"),
            )
            .at(self.place(call))
        })
    }

    /// Calls until there is an answer that decides; `None` is a 404.
    async fn call(&self, call: Call, path: &str, repeat: Repeat) -> Result<Option<Value>> {
        let url = format!(
            "{}/{}/{path}",
            self.options.base.trim_end_matches('/'),
            path_segment(&self.endpoint)
        );
        let started = Instant::now();
        let mut backoff = Backoff::default();
        loop {
            let answer = match &call {
                Call::Get => self.http.get(&url, self.options.timeout).await,
                Call::Post(body) => self.http.post_json(&url, body.clone(), self.options.timeout).await,
            };
            let (why, named) = match self.judge(answer, path, repeat)? {
                Verdict::Answer(answer) => return Ok(answer),
                Verdict::Again(why, named) => (why, named),
            };
            let wait = named.map_or_else(|| jitter(backoff.next(self.options.retry)), at_least);
            if started.elapsed() + wait > self.options.limit {
                return Err(self.unavailable(why, path));
            }
            tokio::time::sleep(wait).await;
        }
    }

    fn judge(&self, answer: std::result::Result<Answer, Silence>, path: &str, repeat: Repeat) -> Result<Verdict> {
        let answer = match answer {
            Ok(answer) => answer,
            Err(silence) if repeat == Repeat::Harmless => return Ok(Verdict::Again(silence.to_string(), None)),
            Err(silence) => return Err(self.submit_unknown(&silence.to_string(), path)),
        };
        match answer.status {
            200..=299 => match serde_json::from_slice(&answer.body) {
                Ok(value) => Ok(Verdict::Answer(Some(value))),
                Err(_) if repeat == Repeat::OnlyIfRefused => Err(self.submit_unknown("the answer is not JSON", path)),
                Err(error) => Err(Failure::platform(
                    "RUNPOD_ANSWER_INVALID",
                    format!("The platform's answer is not JSON: {error}"),
                )
                .at(self.place(path))),
            },
            404 => Ok(Verdict::Answer(None)),
            401 | 403 => Err(Failure::user(
                "RUNPOD_KEY_REFUSED",
                format!("RunPod refused the API key with status {}", answer.status),
            )
            .at(self.place(path))
            .hint("Set RUNPOD_API_KEY to a key that may use this endpoint")),
            429 => Ok(Verdict::Again(
                "status 429: too many requests".to_owned(),
                answer.retry_after,
            )),
            // 502 and 504 may come after the job was accepted; 500 and 503 come instead of it.
            502 | 504 if repeat == Repeat::OnlyIfRefused => {
                Err(self.submit_unknown(&format!("status {}", answer.status), path))
            }
            408 | 425 | 500..=599 => Ok(Verdict::Again(format!("status {}", answer.status), answer.retry_after)),
            status => {
                let said = String::from_utf8_lossy(&answer.body)
                    .chars()
                    .take(300)
                    .collect::<String>();
                Err(Failure::system(
                    "RUNPOD_REQUEST_REFUSED",
                    format!(
                        "RunPod refused the request with status {status}: {}",
                        self.redactor.clean(&said)
                    ),
                )
                .at(self.place(path)))
            }
        }
    }

    fn submit_unknown(&self, why: &str, path: &str) -> Failure {
        Failure::platform(
            "RUNPOD_SUBMIT_UNKNOWN",
            format!("It is not known whether RunPod has the job: {why}"),
        )
        .at(self.place(path))
        .hint("Submit it again; a second delivery of the same job is not run twice")
    }

    fn unavailable(&self, why: String, path: &str) -> Failure {
        Failure::platform(
            "RUNPOD_UNAVAILABLE",
            format!("RunPod did not answer as it should for {:?}: {why}", self.options.limit),
        )
        .at(self.place(path))
        .hint("The attempt is repeated by itself; look at RunPod's status page if it lasts")
    }

    fn unknown_endpoint(&self) -> Failure {
        Failure::user("RUNPOD_ENDPOINT_UNKNOWN", "RunPod does not know this endpoint")
            .at(self.place(""))
            .hint("Set the endpoint's id from RunPod's console, and a key of the same account")
    }

    fn place(&self, path: &str) -> String {
        format!("RunPod endpoint `{}`, call `{path}`", self.endpoint)
    }
}

enum Call {
    Get,
    Post(Bytes),
}

enum Verdict {
    Answer(Option<Value>),
    Again(String, Option<Duration>),
}
