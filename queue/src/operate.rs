//! Running the engine: limits and schedules, pausing, looking, and what to be woken for.

use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::Serialize;
use serde_json::Value;
use tokio_postgres::types::Type;
use uuid::Uuid;

use crate::error::{Error, Result};
use crate::job::{Lease, Reader, duration};
use crate::queue::Queue;
use crate::sql;

/// Whom a limit is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope<'a> {
    /// The jobs of one owner, of kinds that are `fair`.
    Owner(Uuid),
    /// The jobs with one concurrency key.
    Key(&'a str),
    /// What owners that are not known yet will start with.
    NewOwners,
    /// What keys that are not known yet will start with.
    NewKeys,
}

/// What a rate is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RateScope<'a> {
    /// Starts of the jobs of one owner, of kinds that are `fair`.
    Owner(Uuid),
    /// Starts of the jobs with one concurrency key.
    Key(&'a str),
    /// Starts of the jobs of one queue.
    Queue(&'a str),
    /// Whatever is asked for by [`Queue::take_rate`], such as calls of a provider's interface.
    Api(&'a str),
}

/// So many in so much time: a bucket of tokens that starts full, so that in any stretch of time `w` at most `starts × (1 + w / per)`
/// are granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// How many, at once at most.
    pub starts: i32,
    /// In how much time.
    pub per: Duration,
}

/// For how long a budget is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Period {
    /// For good.
    Ever,
    /// For each day of UTC.
    Day,
    /// For each week of UTC, from Monday.
    Week,
    /// For each month of UTC.
    Month,
}

impl Period {
    fn name(self) -> Option<&'static str> {
        match self {
            Self::Ever => None,
            Self::Day => Some("day"),
            Self::Week => Some("week"),
            Self::Month => Some("month"),
        }
    }

    fn parse(name: Option<&str>) -> Result<Self> {
        [Self::Ever, Self::Day, Self::Week, Self::Month]
            .into_iter()
            .find(|period| period.name() == name)
            .ok_or_else(|| Error::Answer {
                job: None,
                message: format!("unknown period {name:?}"),
            })
    }
}

/// What all jobs of an owner may cost, and what they have cost.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct OwnerBudget {
    /// What they may cost in a period.
    pub budget: f64,
    /// The period.
    pub period: Period,
    /// When this period began; `None` for a budget for good.
    pub since: Option<DateTime<Utc>>,
    /// Spent since then, runs under way included.
    pub spent: f64,
}

/// A job that is enqueued again and again.
#[derive(Clone, Debug, PartialEq)]
pub struct Schedule {
    /// Its name; setting it again changes it.
    pub name: String,
    /// Kind of the jobs.
    pub kind: String,
    /// Their payload.
    pub payload: Value,
    /// A cron line (minute hour day month weekday); or else `every`.
    pub cron: Option<String>,
    /// A fixed distance, a second or more; or else `cron`.
    pub every: Option<Duration>,
    /// By which clocks the cron line is read, such as `Europe/Berlin`.
    pub time_zone: String,
    /// Queue of the jobs.
    pub queue: String,
    /// Their priority.
    pub priority: i16,
    /// Their owner.
    pub owner: Option<Uuid>,
    /// Attempts of each.
    pub max_attempts: i32,
}

impl Schedule {
    /// A schedule by a cron line in UTC.
    pub fn cron(name: impl Into<String>, kind: impl Into<String>, cron: impl Into<String>) -> Self {
        Self {
            cron: Some(cron.into()),
            ..Self::every(name, kind, Duration::ZERO)
        }
        .without_every()
    }

    /// A schedule with a fixed distance.
    pub fn every(name: impl Into<String>, kind: impl Into<String>, every: Duration) -> Self {
        Self {
            name: name.into(),
            kind: kind.into(),
            payload: Value::Object(serde_json::Map::new()),
            cron: None,
            every: Some(every),
            time_zone: "UTC".into(),
            queue: "default".into(),
            priority: 0,
            owner: None,
            max_attempts: 3,
        }
    }

    fn without_every(mut self) -> Self {
        self.every = None;
        self
    }
}

/// One of the runs that have gone on longest.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TopJob {
    /// Which job.
    pub job_id: Uuid,
    /// What sort of work.
    pub kind: String,
    /// From which queue.
    pub queue: String,
    /// Who runs it.
    pub worker: String,
    /// Which counted attempt.
    pub attempt: i32,
    /// Since its claim.
    pub running_seconds: f64,
    /// Since its last heartbeat.
    pub beat_seconds: f64,
    /// Until its lease expires.
    pub lease_seconds: f64,
    /// What its worker said last.
    pub progress: Option<Value>,
}

/// Something to be woken for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Alarm {
    /// A stable name, such as `queue_depth`.
    pub alarm: String,
    /// What is the matter.
    pub message: String,
    /// What to do.
    pub hint: String,
}

/// One line of an examination.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at.
    pub item: String,
    /// Whether it is in order; `None` where that cannot be known.
    pub ok: Option<bool>,
    /// What was seen.
    pub message: Option<String>,
    /// What to do if it is not in order.
    pub hint: String,
}

impl Queue {
    // --- a worker's words ---

    /// Writes a line of the run's log; see [`JobContext::log`](crate::JobContext::log).
    ///
    /// # Errors
    /// [`Error::LeaseLost`](crate::Error::LeaseLost) and its like; [`Error::Rejected`](crate::Error::Rejected) for another level.
    pub async fn log(&self, lease: &Lease, level: &str, kind: &str, message: &str, data: Option<&Value>) -> Result<()> {
        self.query(
            sql::LOG,
            &[
                (&lease.job_id, Type::UUID),
                (&lease.token, Type::INT8),
                (&level, Type::TEXT),
                (&kind, Type::TEXT),
                (&message, Type::TEXT),
                (&data, Type::JSONB),
            ],
        )
        .await
        .map(drop)
    }

    /// Says where the next run is to resume; see [`JobContext::checkpoint`](crate::JobContext::checkpoint).
    ///
    /// # Errors
    /// [`Error::LeaseLost`](crate::Error::LeaseLost) and its like.
    pub async fn checkpoint(&self, lease: &Lease, checkpoint: &Value) -> Result<()> {
        let parameters = [
            (&lease.job_id as _, Type::UUID),
            (&lease.token as _, Type::INT8),
            (checkpoint as _, Type::JSONB),
        ];
        self.query(sql::CHECKPOINT, &parameters).await.map(drop)
    }

    // --- an operator's acts: for the owner and the server's role, not for workers ---

    /// Stops claims from a queue; what runs goes on. Returns how many jobs that are: a drained queue has none.
    ///
    /// # Errors
    /// [`Error::PermissionDenied`](crate::Error::PermissionDenied) for a worker's role.
    pub async fn pause(&self, queue: &str, reason: Option<&str>) -> Result<i32> {
        self.value(sql::PAUSE, &[(&queue, Type::TEXT), (&reason, Type::TEXT)])
            .await
    }

    /// Lets claims from a queue go on. False if it was not paused.
    ///
    /// # Errors
    /// As [`Self::pause`].
    pub async fn resume(&self, queue: &str) -> Result<bool> {
        self.value(sql::RESUME, &[(&queue, Type::TEXT)]).await
    }

    /// Redrives up to `limit` failed jobs of a kind, of one error code if given, newest first. Returns how many.
    ///
    /// # Errors
    /// As [`Self::pause`].
    pub async fn redrive_many(&self, kind: &str, code: Option<&str>, limit: usize) -> Result<i32> {
        let limit = i32::try_from(limit).unwrap_or(i32::MAX);
        let parameters = [
            (&kind as _, Type::TEXT),
            (&code as _, Type::TEXT),
            (&limit as _, Type::INT4),
        ];
        let count = self.value(sql::REDRIVE_MANY, &parameters).await?;
        self.wake();
        Ok(count)
    }

    /// How many jobs may run at once (`None`: any number), and an owner's weight when turns are taken. Exact, also under races.
    ///
    /// # Errors
    /// As [`Self::pause`].
    pub async fn set_limit(&self, scope: Scope<'_>, at_most: Option<i32>, weight: f64) -> Result<()> {
        let (scope, name) = match scope {
            Scope::Owner(owner) => ("owner", owner.to_string()),
            Scope::Key(key) => ("key", key.to_owned()),
            Scope::NewOwners => ("owner", "*".to_owned()),
            Scope::NewKeys => ("key", "*".to_owned()),
        };
        let parameters = [
            (&scope as _, Type::TEXT),
            (&name as _, Type::TEXT),
            (&at_most as _, Type::INT4),
            (&weight as _, Type::FLOAT8),
        ];
        self.query(sql::SET_LIMIT, &parameters).await.map(drop)
    }

    /// How many may start in a stretch of time (`None`: any number). Exact, also under races; a changed rate begins with a full bucket.
    ///
    /// # Errors
    /// As [`Self::pause`].
    pub async fn set_rate(&self, scope: RateScope<'_>, rate: Option<Rate>) -> Result<()> {
        let (scope, name) = match scope {
            RateScope::Owner(owner) => ("owner", owner.to_string()),
            RateScope::Key(key) => ("key", key.to_owned()),
            RateScope::Queue(queue) => ("queue", queue.to_owned()),
            RateScope::Api(name) => ("api", name.to_owned()),
        };
        let starts = rate.map(|rate| rate.starts);
        let seconds = rate.map(|rate| rate.per.as_secs_f64());
        let parameters = [
            (&scope as _, Type::TEXT),
            (&name as _, Type::TEXT),
            (&starts as _, Type::INT4),
            (&seconds as _, Type::FLOAT8),
        ];
        self.query(sql::SET_RATE, &parameters).await.map(drop)
    }

    /// Asks to do something `count` times that has a rate ([`RateScope::Api`]): nothing means go on, it is counted; otherwise ask again
    /// after that long. A name without a rate is never held up.
    ///
    /// # Errors
    /// [`Error::Rejected`] for more at once than the rate ever allows; those of the connection.
    pub async fn take_rate(&self, name: &str, count: u32) -> Result<Duration> {
        let count = i32::try_from(count).unwrap_or(i32::MAX);
        let wait = self
            .value(sql::TAKE_RATE, &[(&name, Type::TEXT), (&count, Type::INT4)])
            .await?;
        Ok(duration(wait))
    }

    /// What all jobs of an owner together may cost (`None`: as much as they like). Where it is used up nothing of theirs is claimed, and
    /// the next sweep stops what runs: it fails as `QUEUE_OWNER_BUDGET_EXCEEDED`, and a redrive resumes it from its checkpoint.
    ///
    /// # Errors
    /// As [`Self::pause`].
    pub async fn set_budget(&self, owner: Uuid, budget: Option<f64>, period: Period) -> Result<()> {
        let period = period.name();
        let parameters = [
            (&owner as _, Type::UUID),
            (&budget as _, Type::FLOAT8),
            (&period as _, Type::TEXT),
        ];
        self.query(sql::SET_BUDGET, &parameters).await.map(drop)
    }

    /// What an owner may spend and has spent; `None` without a budget.
    ///
    /// # Errors
    /// Those of the connection.
    pub async fn budget(&self, owner: Uuid) -> Result<Option<OwnerBudget>> {
        let rows = self.query(sql::BUDGET, &[(&owner, Type::UUID)]).await?;
        let Some(row) = rows.first() else { return Ok(None) };
        let read = Reader(row);
        Ok(Some(OwnerBudget {
            budget: read.get("budget")?,
            period: Period::parse(read.get::<Option<String>>("period")?.as_deref())?,
            since: read.get("since")?,
            spent: read.get("spent")?,
        }))
    }

    /// Cancels up to `limit` jobs of a kind that wait or run, of one owner if given. Returns how many.
    ///
    /// # Errors
    /// As [`Self::pause`].
    pub async fn cancel_many(
        &self,
        kind: &str,
        owner: Option<Uuid>,
        reason: Option<&str>,
        limit: usize,
    ) -> Result<i32> {
        let limit = i32::try_from(limit).unwrap_or(i32::MAX);
        self.value(
            sql::CANCEL_MANY,
            &[
                (&kind, Type::TEXT),
                (&owner, Type::UUID),
                (&reason, Type::TEXT),
                (&limit, Type::INT4),
            ],
        )
        .await
    }

    /// Makes or changes a recurring job; returns when it is next. Every sweep enqueues what is due, each time exactly once; times that
    /// were missed while nobody swept are made up by one job.
    ///
    /// # Errors
    /// [`Error::Rejected`](crate::Error::Rejected) for a cron line that means nothing; and as [`Self::pause`].
    pub async fn set_schedule(&self, schedule: &Schedule) -> Result<DateTime<Utc>> {
        let every = schedule.every.map(|every| every.as_secs_f64());
        let priority = i32::from(schedule.priority);
        self.value(
            sql::SET_SCHEDULE,
            &[
                (&schedule.name, Type::TEXT),
                (&schedule.kind, Type::TEXT),
                (&schedule.payload, Type::JSONB),
                (&schedule.cron, Type::TEXT),
                (&every, Type::FLOAT8),
                (&schedule.time_zone, Type::TEXT),
                (&schedule.queue, Type::TEXT),
                (&priority, Type::INT4),
                (&schedule.owner, Type::UUID),
                (&schedule.max_attempts, Type::INT4),
            ],
        )
        .await
    }

    /// Ends a recurring job; jobs it has enqueued stay. False if there is none of that name.
    ///
    /// # Errors
    /// As [`Self::pause`].
    pub async fn drop_schedule(&self, name: &str) -> Result<bool> {
        self.value(sql::DROP_SCHEDULE, &[(&name, Type::TEXT)]).await
    }

    /// Forgets up to `limit` jobs that ended longer ago than `retention`, and their keys. Returns how many.
    ///
    /// # Errors
    /// As [`Self::pause`].
    pub async fn prune(&self, retention: Duration, limit: usize) -> Result<i32> {
        let limit = i32::try_from(limit).unwrap_or(i32::MAX);
        let seconds = retention.as_secs_f64();
        self.value(sql::PRUNE, &[(&seconds, Type::FLOAT8), (&limit, Type::INT4)])
            .await
    }

    // --- looking ---

    /// The runs that have gone on longest.
    ///
    /// # Errors
    /// Those of the connection.
    pub async fn top(&self, limit: usize) -> Result<Vec<TopJob>> {
        let limit = i32::try_from(limit).unwrap_or(i32::MAX);
        let rows = self.query(sql::TOP, &[(&limit, Type::INT4)]).await?;
        rows.iter()
            .map(|row| {
                let read = Reader(row);
                Ok(TopJob {
                    job_id: read.get("job_id")?,
                    kind: read.get("kind")?,
                    queue: read.get("queue")?,
                    worker: read.get("worker")?,
                    attempt: read.get("attempt")?,
                    running_seconds: read.get("running_seconds")?,
                    beat_seconds: read.get("beat_seconds")?,
                    lease_seconds: read.get("lease_seconds")?,
                    progress: read.get("progress")?,
                })
            })
            .collect()
    }

    /// Why a job is not running, in sentences; the first is the reason if there is one.
    ///
    /// # Errors
    /// Those of the connection.
    pub async fn explain(&self, job_id: Uuid) -> Result<Vec<String>> {
        let rows = self.query(sql::EXPLAIN, &[(&job_id, Type::UUID)]).await?;
        rows.iter().map(|row| Reader(row).get("explain")).collect()
    }

    /// The engine in the words of Prometheus. For a scrape every 15 seconds or slower.
    ///
    /// # Errors
    /// Those of the connection.
    pub async fn metrics(&self) -> Result<String> {
        self.value(sql::METRICS, &[]).await
    }

    /// What somebody should be woken for; nothing when all is well.
    ///
    /// # Errors
    /// Those of the connection.
    pub async fn alarms(&self) -> Result<Vec<Alarm>> {
        let rows = self.query(sql::ALARMS, &[]).await?;
        rows.iter()
            .map(|row| {
                let read = Reader(row);
                Ok(Alarm {
                    alarm: read.get("alarm")?,
                    message: read.get("message")?,
                    hint: read.get("hint")?,
                })
            })
            .collect()
    }

    /// Whether the engine is in good order, line by line.
    ///
    /// # Errors
    /// Those of the connection.
    pub async fn doctor(&self) -> Result<Vec<Finding>> {
        let rows = self.query(sql::DOCTOR, &[]).await?;
        rows.iter()
            .map(|row| {
                let read = Reader(row);
                Ok(Finding {
                    item: read.get("item")?,
                    ok: read.get("ok")?,
                    message: read.get("message")?,
                    hint: read.get("hint")?,
                })
            })
            .collect()
    }
}
