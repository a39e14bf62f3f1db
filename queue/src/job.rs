//! What is said about jobs: new ones, claimed ones, ended ones.

use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio_postgres::Row;
use uuid::Uuid;

use crate::error::{Error, Result};

/// A job to be enqueued. Everything but kind and payload has a default.
///
/// ```
/// use brightrun_queue::NewJob;
/// let job = NewJob { priority: -10, ..NewJob::new("thumbnail", serde_json::json!({"image": 7})) };
/// assert_eq!(job.queue, "default");
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct NewJob {
    /// What sort of work; decides which handler gets it.
    pub kind: String,
    /// The work itself; the engine never looks inside.
    pub payload: Value,
    /// The job's id, if the caller has one. A known id returns the existing job.
    pub id: Option<Uuid>,
    /// Which queue; workers read one each.
    pub queue: String,
    /// Lower numbers run first; 0 by default.
    pub priority: i16,
    /// The user it belongs to.
    pub owner: Option<Uuid>,
    /// At most one job of a kind has this key, until that job is pruned: enqueueing again returns it.
    pub idempotency_key: Option<String>,
    /// How many counted attempts it may have; 3 by default.
    pub max_attempts: i32,
    /// Not before this time of the database's clock.
    pub run_at: Option<DateTime<Utc>>,
    /// Not before this much time has passed; `run_at` wins where both are given.
    pub delay: Option<Duration>,
    /// How long one run may take at most, however healthy its worker is.
    pub hard_deadline: Option<Duration>,
    /// Its name in an outside system.
    pub external_id: Option<String>,
    /// Notify listeners in the same transaction. Notifying transactions commit one at a time on the
    /// whole server, so this is for rare jobs; [`Queue::enqueue`](crate::Queue::enqueue) sends a
    /// shared hint afterwards anyway, and workers poll in any case.
    pub notify: bool,
    /// At most one *live* job of a kind has this key: enqueueing again returns it, until it has ended.
    pub live_key: Option<String>,
    /// Jobs with the same key share a limit on how many run at once: 1, unless [`Queue::set_limit`](crate::Queue::set_limit) says
    /// otherwise.
    pub concurrency_key: Option<String>,
    /// What it needs of a machine; workers that promise less never get it.
    pub requires: Option<Requirements>,
    /// Not before all of these have completed; cancelled if one of them fails or is cancelled.
    pub after: Vec<Uuid>,
    /// What all its runs together may cost; at that moment it is stopped and fails as `QUEUE_BUDGET_EXCEEDED`. Needs a price: the
    /// job's or the machine's.
    pub budget: Option<f64>,
    /// Price of an hour, where the machine tells none.
    pub price_per_hour: Option<f64>,
}

/// What a job needs of a machine. The default needs nothing.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Requirements {
    /// Memory of each GPU, in MB.
    pub vram_mb: u32,
    /// Classes that will do, such as `H100`; empty: any.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub gpu_classes: Vec<String>,
    /// So many GPUs.
    pub gpu_count: u32,
    /// An hour must not cost more.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_price: Option<f64>,
    /// With what it is content after waiting in vain, one after the other.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub fallback: Vec<Fallback>,
}

/// Classes that will do as well once a job has been ready for some time.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Fallback {
    /// For so long, counted from when the job became ready.
    #[serde(rename = "after_seconds", serialize_with = "seconds")]
    pub after: Duration,
    /// These classes, beside those before.
    pub gpu_classes: Vec<String>,
}

fn seconds<S: serde::Serializer>(time: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(time.as_secs_f64())
}

/// What a machine promises. The default promises nothing.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Machine {
    /// Memory of each GPU, in MB.
    pub vram_mb: u32,
    /// The class of its GPUs, such as `H100`; compared without regard to case.
    pub gpu_class: Option<String>,
    /// So many GPUs.
    pub gpu_count: u32,
    /// What an hour of it costs; jobs with a budget are stopped by it, and runs are metered with it.
    pub price_per_hour: Option<f64>,
}

impl NewJob {
    /// A job with defaults.
    pub fn new(kind: impl Into<String>, payload: Value) -> Self {
        Self {
            kind: kind.into(),
            payload,
            id: None,
            queue: "default".into(),
            priority: 0,
            owner: None,
            idempotency_key: None,
            max_attempts: 3,
            run_at: None,
            delay: None,
            hard_deadline: None,
            external_id: None,
            notify: false,
            live_key: None,
            concurrency_key: None,
            requires: None,
            after: Vec::new(),
            budget: None,
            price_per_hour: None,
        }
    }
}

/// The right to run one job, once: every write about it carries the token, and only the newest
/// token of a job is accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Lease {
    /// Which job.
    pub job_id: Uuid,
    /// The fencing token; later leases have greater ones.
    pub token: i64,
}

/// A job that is now this worker's.
#[derive(Clone, Debug, PartialEq)]
pub struct Claimed {
    /// The right to run it.
    pub lease: Lease,
    /// What sort of work.
    pub kind: String,
    /// Which queue it came from.
    pub queue: String,
    /// The work itself.
    pub payload: Value,
    /// The user it belongs to.
    pub owner: Option<Uuid>,
    /// Its name in an outside system.
    pub external_id: Option<String>,
    /// Which counted attempt this is, from 1.
    pub attempt: i32,
    /// How many there may be.
    pub max_attempts: i32,
    /// How often it was claimed, this time included; more than `attempt` after interruptions.
    pub claims: i32,
    /// The last progress of an earlier run: where to resume.
    pub progress: Option<Value>,
    /// The last checkpoint of an earlier run, said by [`Queue::checkpoint`](crate::Queue::checkpoint).
    pub checkpoint: Option<Value>,
    /// When it was enqueued, by the database's clock.
    pub created_at: DateTime<Utc>,
    /// How long the lease lasts without a heartbeat, from now.
    pub lease_left: Duration,
    /// How long this run may take, from now.
    pub deadline_left: Option<Duration>,
}

impl Claimed {
    pub(crate) fn from_row(row: &Row) -> Result<Self> {
        let read = Reader(row);
        Ok(Self {
            lease: Lease {
                job_id: read.get("job_id")?,
                token: read.get("token")?,
            },
            kind: read.get("kind")?,
            queue: read.get("queue")?,
            payload: read.get("payload")?,
            owner: read.get("owner")?,
            external_id: read.get("external_id")?,
            attempt: read.get("attempt")?,
            max_attempts: read.get("max_attempts")?,
            claims: read.get("claims")?,
            progress: read.get("progress")?,
            checkpoint: read.get("checkpoint")?,
            created_at: read.get("created_at")?,
            lease_left: duration(read.get("lease_seconds")?),
            deadline_left: read.get::<Option<f64>>("deadline_seconds")?.map(duration),
        })
    }
}

/// What the engine answers to one lease's heartbeat.
#[derive(Clone, Debug, PartialEq)]
pub enum HeartbeatReply {
    /// Go on; the lease lasts this long from now.
    Alive {
        /// Time until the lease would expire.
        lease_left: Duration,
    },
    /// A cancel was asked for: stop and report any ending, which becomes `cancelled`.
    CancelRequested {
        /// Why, if a reason was given.
        reason: Option<String>,
    },
    /// The hard deadline has passed; the lease will not be extended and the next sweep takes it.
    DeadlinePassed,
    /// The token is not the newest: stop, nothing written with it will be accepted.
    Lost,
}

impl HeartbeatReply {
    pub(crate) fn from_row(row: &Row) -> Result<(Lease, Self)> {
        let read = Reader(row);
        let lease = Lease {
            job_id: read.get("job_id")?,
            token: read.get("token")?,
        };
        let reply = match read.get::<String>("reply")?.as_str() {
            "alive" => Self::Alive {
                lease_left: duration(read.get("lease_seconds")?),
            },
            "cancel" => Self::CancelRequested {
                reason: read.get("reason")?,
            },
            "deadline" => Self::DeadlinePassed,
            "lost" => Self::Lost,
            other => {
                return Err(Error::Answer {
                    job: Some(lease.job_id),
                    message: format!("unknown heartbeat reply `{other}`"),
                });
            }
        };
        Ok((lease, reply))
    }
}

/// Whose fault a failure is. It alone decides whether the job is tried again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Blame {
    /// The input is wrong: trying again cannot help.
    User,
    /// The worker or its machine failed: another attempt may succeed.
    System,
    /// Something the worker depends on failed: another attempt may succeed.
    Platform,
}

/// Why a run failed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JobFailure {
    /// Stable, machine-readable, `AREA_WHAT`.
    pub code: String,
    /// Whose fault.
    pub blame: Blame,
    /// For people.
    pub message: String,
    /// Anything more.
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub detail: Value,
}

impl JobFailure {
    /// A failure without detail.
    pub fn new(blame: Blame, code: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            code: code.into(),
            blame,
            message: message.into(),
            detail: Value::Null,
        }
    }
}

/// Where a job is. The last three are terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum JobState {
    /// Waits for a worker.
    Ready,
    /// Waits for its time.
    Scheduled,
    /// A worker has it.
    Running,
    /// Ended well.
    Completed,
    /// Ended badly: a user's mistake, or all attempts are used up. Can be redriven.
    Failed,
    /// Was cancelled.
    Cancelled,
}

impl JobState {
    /// Whether the job has ended.
    pub fn is_terminal(self) -> bool {
        matches!(self, Self::Completed | Self::Failed | Self::Cancelled)
    }

    /// The name the database uses.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ready => "ready",
            Self::Scheduled => "scheduled",
            Self::Running => "running",
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    pub(crate) fn parse(name: &str) -> Result<Self> {
        [
            Self::Ready,
            Self::Scheduled,
            Self::Running,
            Self::Completed,
            Self::Failed,
            Self::Cancelled,
        ]
        .into_iter()
        .find(|state| state.name() == name)
        .ok_or_else(|| Error::Answer {
            job: None,
            message: format!("unknown state `{name}`"),
        })
    }
}

impl std::fmt::Display for JobState {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.pad(self.name())
    }
}

/// What a cancel achieved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CancelReply {
    /// It was waiting and is cancelled now.
    Cancelled,
    /// It runs; its worker will hear of it, and it will end as cancelled.
    Requested,
    /// It had ended before, so.
    AlreadyEnded(JobState),
    /// There is no such job.
    Missing,
}

impl CancelReply {
    pub(crate) fn parse(told: Option<&str>) -> Result<Self> {
        Ok(match told {
            None => Self::Missing,
            Some("cancelled") => Self::Cancelled,
            Some("cancel_requested") => Self::Requested,
            Some(state) => Self::AlreadyEnded(JobState::parse(state)?),
        })
    }
}

/// All that is known about a job.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct JobStatus {
    /// Its id.
    pub id: Uuid,
    /// What sort of work.
    pub kind: String,
    /// Which queue.
    pub queue: String,
    /// Lower runs first.
    pub priority: i16,
    /// The work itself.
    pub payload: Value,
    /// The user it belongs to.
    pub owner: Option<Uuid>,
    /// The key it was enqueued with.
    pub idempotency_key: Option<String>,
    /// Its name in an outside system.
    pub external_id: Option<String>,
    /// Where it is.
    pub state: JobState,
    /// Counted attempts so far, the running one included.
    pub attempt: i32,
    /// How many there may be.
    pub max_attempts: i32,
    /// How often it was claimed since it was enqueued; 0 once it has ended.
    pub claims: i32,
    /// When it was enqueued.
    pub created_at: DateTime<Utc>,
    /// When it may run, or might for the first time.
    pub run_at: DateTime<Utc>,
    /// When it first ran.
    pub started_at: Option<DateTime<Utc>>,
    /// When it ended.
    pub finished_at: Option<DateTime<Utc>>,
    /// When a cancel was asked for.
    pub cancel_requested_at: Option<DateTime<Utc>>,
    /// Why.
    pub cancel_reason: Option<String>,
    /// What it produced, if completed.
    pub result: Option<Value>,
    /// Why it failed, or why its last attempt did.
    pub error: Option<Value>,
    /// What its worker said last, unless it has ended.
    pub progress: Option<Value>,
    /// Who runs it.
    pub worker: Option<String>,
    /// Seconds until its lease expires; negative when it has.
    pub lease_seconds: Option<f64>,
}

impl JobStatus {
    pub(crate) fn from_row(row: &Row) -> Result<Self> {
        let read = Reader(row);
        Ok(Self {
            id: read.get("id")?,
            kind: read.get("kind")?,
            queue: read.get("queue")?,
            priority: read.get("priority")?,
            payload: read.get("payload")?,
            owner: read.get("owner")?,
            idempotency_key: read.get("idempotency_key")?,
            external_id: read.get("external_id")?,
            state: JobState::parse(&read.get::<String>("state")?)?,
            attempt: read.get("attempt")?,
            max_attempts: read.get("max_attempts")?,
            claims: read.get("claims")?,
            created_at: read.get("created_at")?,
            run_at: read.get("run_at")?,
            started_at: read.get("started_at")?,
            finished_at: read.get("finished_at")?,
            cancel_requested_at: read.get("cancel_requested_at")?,
            cancel_reason: read.get("cancel_reason")?,
            result: read.get("result")?,
            error: read.get("error")?,
            progress: read.get("progress")?,
            worker: read.get("worker")?,
            lease_seconds: read.get("lease_seconds")?,
        })
    }
}

/// One line of a job's history.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct JobEvent {
    /// Order among all events.
    pub seq: i64,
    /// When, by the database's clock.
    pub at: DateTime<Utc>,
    /// What happened.
    pub event: String,
    /// In which attempt; 0 while waiting for the first.
    pub attempt: i16,
    /// Under which token.
    pub token: Option<i64>,
    /// By whom.
    pub worker: Option<String>,
    /// `debug`, `info`, `warn` or `error`.
    pub level: String,
    /// More about it.
    pub detail: Value,
}

impl JobEvent {
    pub(crate) fn from_row(row: &Row) -> Result<Self> {
        let read = Reader(row);
        Ok(Self {
            seq: read.get("seq")?,
            at: read.get("at")?,
            event: read.get("event")?,
            attempt: read.get("attempt")?,
            token: read.get("token")?,
            worker: read.get("worker")?,
            level: read.get("level")?,
            detail: read.get("detail")?,
        })
    }
}

/// What waits and runs of one kind in one queue.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct KindStats {
    /// Which queue.
    pub queue: String,
    /// Which kind.
    pub kind: String,
    /// Jobs that wait for a worker.
    pub ready: i64,
    /// Jobs that wait for their time.
    pub scheduled: i64,
    /// Jobs that run.
    pub running: i64,
    /// Running jobs whose lease has expired and that no sweep has taken yet.
    pub expired: i64,
    /// How long the longest waiting one could have run already, in seconds.
    pub oldest_ready_seconds: Option<f64>,
}

impl KindStats {
    pub(crate) fn from_row(row: &Row) -> Result<Self> {
        let read = Reader(row);
        Ok(Self {
            queue: read.get("queue")?,
            kind: read.get("kind")?,
            ready: read.get("ready")?,
            scheduled: read.get("scheduled")?,
            running: read.get("running")?,
            expired: read.get("expired")?,
            oldest_ready_seconds: read.get("oldest_ready_seconds")?,
        })
    }
}

/// Reads columns by name; a column of another type is an error, not a panic.
pub(crate) struct Reader<'a>(pub(crate) &'a Row);

impl<'a> Reader<'a> {
    pub(crate) fn get<T: tokio_postgres::types::FromSql<'a>>(&self, column: &str) -> Result<T> {
        self.0.try_get(column).map_err(|error| Error::Answer {
            job: None,
            message: format!("column {column}: {error}"),
        })
    }
}

/// Seconds as a duration; nothing left where there are none or fewer.
pub(crate) fn duration(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds.max(0.0)).unwrap_or(Duration::MAX)
}
