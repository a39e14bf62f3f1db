//! The client: one method per function of the engine.

use std::sync::Arc;
use std::time::Duration;

use deadpool_postgres::{Manager, ManagerConfig, Pool, QueueMode, RecyclingMethod, Runtime};
use serde_json::Value;
use tokio_postgres::types::{FromSqlOwned, Type};
use tokio_postgres::{GenericClient, Row, Transaction};
use uuid::Uuid;

use crate::config::QueueConfig;
use crate::connection::{self, Parameter};
use crate::error::{Error, Place, Result};
use crate::job::{
    CancelReply, Claimed, HeartbeatReply, JobEvent, JobFailure, JobState, JobStatus, KindStats, Lease, Machine, NewJob,
    Reader,
};
use crate::sql;
use crate::wake::{Hint, WakeWindow};

/// The version of the engine's schema this program was written for.
pub const ENGINE_VERSION: i32 = 2;

/// What a worker asks for when it has free slots.
#[derive(Clone, Debug)]
pub struct ClaimRequest {
    /// Who claims: a name that is fresh for each process, never one that is used again.
    pub worker: String,
    /// From which queue.
    pub queue: String,
    /// Kinds it can run.
    pub kinds: Vec<String>,
    /// At most so many.
    pub limit: usize,
    /// How long a lease lasts without a heartbeat.
    pub lease: Duration,
    /// What the machine promises: without it, only jobs that need nothing of a machine are granted.
    pub machine: Option<Machine>,
}

/// A handle to the engine in one database. Cheap to clone; clones share the connections.
#[derive(Clone)]
pub struct Queue {
    pool: Pool,
    config: Arc<QueueConfig>,
    place: Arc<Place>,
    wake: Arc<WakeWindow>,
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Queue")
            .field("place", &self.place)
            .finish_non_exhaustive()
    }
}

impl Queue {
    /// Connects once, to find out now what is wrong with address, login or database. The schema
    /// need not be there yet; see [`Self::check_schema`].
    ///
    /// # Errors
    /// Any of the first group of [`Error`].
    pub async fn connect(config: &QueueConfig) -> Result<Self> {
        let connector = crate::tls::connector(config.ssl_mode, config.ssl_root.as_ref())?;
        let place = config.place();
        let manager = Manager::from_config(
            config.driver.clone(),
            connector,
            ManagerConfig {
                recycling_method: RecyclingMethod::Fast,
            },
        );
        let pool = Pool::builder(manager)
            .max_size(config.pool_size)
            .runtime(Runtime::Tokio1)
            .wait_timeout(Some(Duration::from_secs(30)))
            .create_timeout(Some(Duration::from_secs(15)))
            // The connection used last has its plans at hand.
            .queue_mode(QueueMode::Lifo)
            .build()
            .map_err(|error| Error::Config {
                message: error.to_string(),
            })?;
        drop(pool.get().await.map_err(|error| Error::from_pool(error, &place))?);
        Ok(Self {
            pool,
            config: Arc::new(config.clone()),
            place: Arc::new(place),
            wake: Arc::default(),
        })
    }

    /// Where this queue is.
    pub fn place(&self) -> &Place {
        &self.place
    }

    pub(crate) fn config(&self) -> &QueueConfig {
        &self.config
    }

    /// A pooled connection, for a transaction of the caller's own (see [`Self::enqueue_in`]).
    ///
    /// # Errors
    /// [`Error::ConnectionLost`] or another of the first group.
    pub async fn client(&self) -> Result<deadpool_postgres::Client> {
        self.pool
            .get()
            .await
            .map_err(|error| Error::from_pool(error, &self.place))
    }

    pub(crate) async fn query(&self, sql: &str, parameters: &[Parameter<'_>]) -> Result<Vec<Row>> {
        let client = self.client().await?;
        connection::query(&**client, &self.place, sql, parameters).await
    }

    pub(crate) async fn value<T: FromSqlOwned>(&self, sql: &str, parameters: &[Parameter<'_>]) -> Result<T> {
        only_value(&self.query(sql, parameters).await?)
    }

    // --- the schema ---

    /// Applies a schema file in one transaction, after any other session that does the same. A
    /// file that was applied before changes nothing.
    ///
    /// # Errors
    /// [`Error::Migration`] with the line, and nothing changed.
    pub async fn migrate(&self, schema_sql: &str) -> Result<()> {
        let own = connection::open(&self.config).await?;
        let script = format!("{}{schema_sql}\n;commit;", sql::MIGRATE_BEGIN);
        own.client
            .batch_execute(&script)
            .await
            .map_err(|error| Error::from_migration(&error, &self.place, schema_sql, sql::MIGRATE_BEGIN.chars().count()))
    }

    /// Whether the engine is there in the version this program needs.
    ///
    /// # Errors
    /// [`Error::SchemaMissing`] or [`Error::SchemaVersion`].
    pub async fn check_schema(&self) -> Result<()> {
        let found: Option<i32> = self.value(sql::ENGINE_VERSION, &[]).await?;
        match found.unwrap_or(0) {
            ENGINE_VERSION => Ok(()),
            found => Err(Error::SchemaVersion {
                place: (*self.place).clone(),
                found,
                expected: ENGINE_VERSION,
            }),
        }
    }

    // --- an app's side ---

    /// Enqueues a job and returns its id, which is an existing job's if the id or the key is known.
    ///
    /// # Errors
    /// [`Error::Rejected`] where a value breaks a rule of the engine.
    pub async fn enqueue(&self, job: &NewJob) -> Result<Uuid> {
        let hint = if job.notify { Hint::Now } else { self.wake.next() };
        let client = self.client().await?;
        let id = enqueue_with(&**client, &self.place, job, hint == Hint::Now).await?;
        drop(client);
        self.wake_after(hint);
        Ok(id)
    }

    /// The same within a transaction of the caller: the job exists if and only if that commits.
    /// Workers find it at their next poll, or at once if the caller sets [`NewJob::notify`] or
    /// calls [`Self::wake`] after the commit.
    ///
    /// # Errors
    /// As [`Self::enqueue`].
    pub async fn enqueue_in(&self, transaction: &Transaction<'_>, job: &NewJob) -> Result<Uuid> {
        enqueue_with(transaction, &self.place, job, job.notify).await
    }

    /// Hints to listening workers that something is ready. Hints within a few milliseconds share
    /// one notification; a hint that gets lost costs a poll interval, nothing more.
    pub fn wake(&self) {
        self.wake_after(match self.wake.next() {
            Hint::Now => Hint::Later,
            other => other,
        });
    }

    /// Whether the next statement that makes something ready should carry the hint itself.
    pub(crate) fn next_hint(&self) -> Hint {
        self.wake.next()
    }

    /// Sends the hint that was put off, at the end of its window.
    pub(crate) fn wake_after(&self, hint: Hint) {
        if hint != Hint::Later {
            return;
        }
        let queue = self.clone();
        tokio::spawn(async move {
            queue.wake.closed().await;
            if let Err(error) = queue.query(sql::WAKE, &[]).await {
                tracing::debug!(%error, "a wake-up was not sent; workers will poll");
            }
        });
    }

    /// Cancels a job: at once if it waits, through its worker if it runs.
    ///
    /// # Errors
    /// Only those of the connection.
    pub async fn cancel(&self, job_id: Uuid, reason: Option<&str>) -> Result<CancelReply> {
        let told: Option<String> = self
            .value(sql::CANCEL, &[(&job_id, Type::UUID), (&reason, Type::TEXT)])
            .await?;
        CancelReply::parse(told.as_deref())
    }

    /// Gives a failed job a fresh set of attempts. False if it is not a failed job.
    ///
    /// # Errors
    /// Only those of the connection and of a projector.
    pub async fn redrive(&self, job_id: Uuid, reason: Option<&str>) -> Result<bool> {
        let told: Option<String> = self
            .value(sql::REDRIVE, &[(&job_id, Type::UUID), (&reason, Type::TEXT)])
            .await?;
        self.wake();
        Ok(told.is_some())
    }

    /// Notes the job's name in an outside system. False if it has ended or does not exist.
    ///
    /// # Errors
    /// Only those of the connection.
    pub async fn set_external_id(&self, job_id: Uuid, external_id: &str) -> Result<bool> {
        self.value(
            sql::SET_EXTERNAL_ID,
            &[(&job_id, Type::UUID), (&external_id, Type::TEXT)],
        )
        .await
    }

    // --- a worker's side ---

    /// Takes up to `limit` jobs: within a kind by priority, then in the order they became ready.
    ///
    /// # Errors
    /// Those of the connection. After [`Error::ConnectionLost`] the engine may have granted leases
    /// nobody heard of: see [`Self::release_unknown`].
    pub async fn claim(&self, request: &ClaimRequest) -> Result<Vec<Claimed>> {
        let limit = i32::try_from(request.limit).unwrap_or(i32::MAX);
        let lease = request.lease.as_secs_f64();
        let machine = request.machine.as_ref().map(as_json).transpose()?;
        let rows = self
            .query(
                sql::CLAIM,
                &[
                    (&request.worker, Type::TEXT),
                    (&request.kinds, Type::TEXT_ARRAY),
                    (&limit, Type::INT4),
                    (&lease, Type::FLOAT8),
                    (&request.queue, Type::TEXT),
                    (&machine, Type::JSONB),
                ],
            )
            .await?;
        rows.iter().map(Claimed::from_row).collect()
    }

    /// Takes one job by its id. `None` if it is not waiting or another worker is just taking it;
    /// [`Self::status`] tells which.
    ///
    /// # Errors
    /// Those of the connection.
    pub async fn claim_job(&self, worker: &str, job_id: Uuid, lease: Duration) -> Result<Option<Claimed>> {
        let lease = lease.as_secs_f64();
        let rows = self
            .query(
                sql::CLAIM_JOB,
                &[(&worker, Type::TEXT), (&job_id, Type::UUID), (&lease, Type::FLOAT8)],
            )
            .await?;
        rows.first().map(Claimed::from_row).transpose()
    }

    /// Extends leases and stores their progress, all in one statement; one reply per lease.
    ///
    /// # Errors
    /// Those of the connection.
    pub async fn heartbeat(&self, beats: &[(Lease, Option<Value>)]) -> Result<Vec<(Lease, HeartbeatReply)>> {
        let client = self.client().await?;
        heartbeat_with(&**client, &self.place, beats).await
    }

    /// Says something about a run: kept in the history and handed to the kind's projector.
    ///
    /// # Errors
    /// [`Error::LeaseLost`], [`Error::JobFinished`]; [`Error::Rejected`] for an event name that
    /// belongs to the engine.
    pub async fn report(&self, lease: &Lease, event: &str, detail: &Value) -> Result<()> {
        self.query(
            sql::REPORT,
            &[
                (&lease.job_id, Type::UUID),
                (&lease.token, Type::INT8),
                (&event, Type::TEXT),
                (detail, Type::JSONB),
            ],
        )
        .await
        .map(drop)
    }

    /// Ends a run well. Returns [`JobState::Completed`], or [`JobState::Cancelled`] if a cancel was
    /// asked for before. Repeating it returns the same.
    ///
    /// # Errors
    /// [`Error::LeaseLost`], [`Error::JobFinished`], or a projector's complaint.
    pub async fn complete(&self, lease: &Lease, result: &Value) -> Result<JobState> {
        self.end(sql::COMPLETE, lease, &[(result, Type::JSONB)]).await
    }

    /// Ends a run badly: [`JobState::Scheduled`] if it will be tried again, [`JobState::Failed`] if
    /// not. `retry_after` replaces the kind's backoff.
    ///
    /// # Errors
    /// As [`Self::complete`].
    pub async fn fail(&self, lease: &Lease, failure: &JobFailure, retry_after: Option<Duration>) -> Result<JobState> {
        let error = serde_json::to_value(failure).map_err(|error| Error::Rejected {
            message: error.to_string(),
        })?;
        let retry_after = retry_after.map(|delay| delay.as_secs_f64());
        self.end(sql::FAIL, lease, &[(&error, Type::JSONB), (&retry_after, Type::FLOAT8)])
            .await
    }

    /// Puts a run off. Not an attempt.
    ///
    /// # Errors
    /// As [`Self::complete`].
    pub async fn snooze(&self, lease: &Lease, delay: Duration, reason: Option<&str>) -> Result<JobState> {
        let delay = delay.as_secs_f64();
        self.end(sql::SNOOZE, lease, &[(&delay, Type::FLOAT8), (&reason, Type::TEXT)])
            .await
    }

    /// Gives a job back because its worker was interrupted. Not an attempt.
    ///
    /// # Errors
    /// As [`Self::complete`].
    pub async fn release(&self, lease: &Lease, reason: Option<&str>) -> Result<JobState> {
        self.end(sql::RELEASE, lease, &[(&reason, Type::TEXT)]).await
    }

    async fn end(&self, sql: &str, lease: &Lease, rest: &[Parameter<'_>]) -> Result<JobState> {
        let mut parameters: Vec<Parameter<'_>> = vec![(&lease.job_id, Type::UUID), (&lease.token, Type::INT8)];
        parameters.extend(rest.iter().cloned());
        JobState::parse(&self.value::<String>(sql, &parameters).await?)
    }

    /// Releases leases of `worker` whose tokens it does not know: those of a claim whose answer
    /// was lost. Returns how many.
    ///
    /// # Errors
    /// Those of the connection.
    pub async fn release_unknown(&self, worker: &str, known: &[i64]) -> Result<i32> {
        self.value(
            sql::RELEASE_UNKNOWN,
            &[(&worker, Type::TEXT), (&known, Type::INT8_ARRAY)],
        )
        .await
    }

    // --- housekeeping ---

    /// Takes expired leases away and returns what became of their jobs. After nobody called this for
    /// longer than `gap`, leases first get one full length to be renewed.
    ///
    /// # Errors
    /// Those of the connection.
    pub async fn rescue(&self, limit: usize, gap: Duration) -> Result<Vec<(Uuid, JobState)>> {
        let limit = i32::try_from(limit).unwrap_or(i32::MAX);
        let gap = gap.as_secs_f64();
        let rows = self
            .query(sql::RESCUE, &[(&limit, Type::INT4), (&gap, Type::FLOAT8)])
            .await?;
        rows.iter()
            .map(|row| {
                let read = Reader(row);
                Ok((read.get("job_id")?, JobState::parse(&read.get::<String>("state")?)?))
            })
            .collect()
    }

    /// Prepares history partitions, drops old history and forgets old jobs. Safe from many places;
    /// the report says whether somebody else was at it.
    ///
    /// # Errors
    /// Those of the connection, and [`Error::Collision`] where long transactions are in the way.
    pub async fn maintain(&self) -> Result<Value> {
        self.value(sql::MAINTAIN, &[]).await
    }

    // --- looking ---

    /// All that is known about a job.
    ///
    /// # Errors
    /// Those of the connection.
    pub async fn status(&self, job_id: Uuid) -> Result<Option<JobStatus>> {
        let rows = self.query(sql::STATUS, &[(&job_id, Type::UUID)]).await?;
        rows.first().map(JobStatus::from_row).transpose()
    }

    /// The newest jobs, of one kind or state if given.
    ///
    /// # Errors
    /// Those of the connection.
    pub async fn jobs(&self, kind: Option<&str>, state: Option<JobState>, limit: usize) -> Result<Vec<JobStatus>> {
        let state = state.map(JobState::name);
        let limit = i32::try_from(limit).unwrap_or(i32::MAX);
        let rows = self
            .query(
                sql::JOBS,
                &[(&kind, Type::TEXT), (&state, Type::TEXT), (&limit, Type::INT4)],
            )
            .await?;
        rows.iter().map(JobStatus::from_row).collect()
    }

    /// A job's history in order, after event number `after` (0 for all).
    ///
    /// # Errors
    /// Those of the connection.
    pub async fn events(&self, job_id: Uuid, after: i64) -> Result<Vec<JobEvent>> {
        let rows = self
            .query(
                sql::JOB_EVENTS,
                &[(&job_id, Type::UUID), (&after, Type::INT8), (&1000_i32, Type::INT4)],
            )
            .await?;
        rows.iter().map(JobEvent::from_row).collect()
    }

    /// What waits and what runs.
    ///
    /// # Errors
    /// Those of the connection.
    pub async fn stats(&self) -> Result<Vec<KindStats>> {
        self.query(sql::STATS, &[])
            .await?
            .iter()
            .map(KindStats::from_row)
            .collect()
    }

    /// Jobs that are not in exactly one place, with in how many they are: none, unless somebody
    /// wrote to the tables by hand.
    ///
    /// # Errors
    /// Those of the connection.
    pub async fn violations(&self) -> Result<Vec<(Uuid, i32)>> {
        let rows = self.query(sql::VIOLATIONS, &[]).await?;
        rows.iter()
            .map(|row| Ok((Reader(row).get("job_id")?, Reader(row).get("batons")?)))
            .collect()
    }
}

/// Plain data as JSON.
fn as_json(value: &impl serde::Serialize) -> Result<Value> {
    serde_json::to_value(value).map_err(|error| Error::Rejected {
        message: error.to_string(),
    })
}

/// The one value of a one-row, one-column answer.
fn only_value<T: FromSqlOwned>(rows: &[Row]) -> Result<T> {
    let row = rows.first().ok_or_else(|| Error::Answer {
        job: None,
        message: "no row came back".into(),
    })?;
    row.try_get(0).map_err(|error| Error::Answer {
        job: None,
        message: error.to_string(),
    })
}

async fn enqueue_with(client: &impl GenericClient, place: &Place, job: &NewJob, notify: bool) -> Result<Uuid> {
    let priority = i32::from(job.priority);
    let delay = job.delay.map(|delay| delay.as_secs_f64());
    let hard_deadline = job.hard_deadline.map(|deadline| deadline.as_secs_f64());
    let requires = job.requires.as_ref().map(as_json).transpose()?;
    let after = (!job.after.is_empty()).then_some(&job.after);
    let rows = connection::query(
        client,
        place,
        sql::ENQUEUE,
        &[
            (&job.kind, Type::TEXT),
            (&job.payload, Type::JSONB),
            (&job.id, Type::UUID),
            (&job.queue, Type::TEXT),
            (&priority, Type::INT4),
            (&job.owner, Type::UUID),
            (&job.idempotency_key, Type::TEXT),
            (&job.max_attempts, Type::INT4),
            (&job.run_at, Type::TIMESTAMPTZ),
            (&delay, Type::FLOAT8),
            (&hard_deadline, Type::FLOAT8),
            (&job.external_id, Type::TEXT),
            (&notify, Type::BOOL),
            (&job.live_key, Type::TEXT),
            (&job.concurrency_key, Type::TEXT),
            (&requires, Type::JSONB),
            (&after, Type::UUID_ARRAY),
            (&job.budget, Type::FLOAT8),
            (&job.price_per_hour, Type::FLOAT8),
        ],
    )
    .await?;
    only_value(&rows)
}

/// A heartbeat over a given connection: the runner's goes over one of its own.
pub(crate) async fn heartbeat_with(
    client: &impl GenericClient,
    place: &Place,
    beats: &[(Lease, Option<Value>)],
) -> Result<Vec<(Lease, HeartbeatReply)>> {
    if beats.is_empty() {
        return Ok(Vec::new());
    }
    let jobs: Vec<Uuid> = beats.iter().map(|(lease, _)| lease.job_id).collect();
    let tokens: Vec<i64> = beats.iter().map(|(lease, _)| lease.token).collect();
    let progress: Vec<Option<&Value>> = beats.iter().map(|(_, progress)| progress.as_ref()).collect();
    let rows = connection::query(
        client,
        place,
        sql::HEARTBEAT,
        &[
            (&jobs, Type::UUID_ARRAY),
            (&tokens, Type::INT8_ARRAY),
            (&progress, Type::JSONB_ARRAY),
        ],
    )
    .await?;
    rows.iter().map(HeartbeatReply::from_row).collect()
}
