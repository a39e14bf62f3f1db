//! Lanes: queues for jobs of milliseconds, at tens of thousands a second.
//!
//! A waiting job is one row, which a claim deletes; a claimed batch is one row, whatever its size, which its last ending deletes. So
//! a job costs one insert and one delete. What a lane keeps of the engine: leases, a fencing token on every write, retries with
//! backoff, dead letters, no declared death before one full lease. What it drops: history, results, status by id, priorities,
//! cancels, limits, projectors. Order is the order of becoming ready.

mod runner;

use std::time::Duration;

use serde::Serialize;
use serde_json::Value;
use tokio_postgres::types::Type;

use crate::error::{Error, Result};
use crate::job::{JobFailure, Reader, duration};
use crate::queue::Queue;
use crate::sql;
use crate::wake::Hint;

pub use runner::{LaneConfig, LaneHandler, LaneReport, LaneRunner};

/// A lane of a queue. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Lane {
    queue: Queue,
    name: String,
}

/// Jobs that were claimed together, under one token.
#[derive(Clone, Debug, PartialEq)]
pub struct Batch {
    /// The fencing token of all of them.
    pub token: i64,
    /// How long the lease lasts without a beat, from now.
    pub lease_left: Duration,
    /// The place in the lane of the last of them; see [`Lane::claim`].
    pub last_seq: i64,
    /// The jobs, in order; the first has place 1.
    pub jobs: Vec<BatchJob>,
}

/// One job of a batch.
#[derive(Clone, Debug, PartialEq)]
pub struct BatchJob {
    /// Which job, and under which token.
    pub place: BatchPlace,
    /// The id [`Lane::push`] gave.
    pub id: i64,
    /// Which attempt this is, from 1.
    pub attempt: i16,
    /// The work itself.
    pub payload: Value,
}

/// The right to end one job of a batch, once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BatchPlace {
    /// The batch's token.
    pub token: i64,
    /// Place in the batch, from 1.
    pub place: i32,
}

/// What is in a lane.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LaneStats {
    /// Which lane.
    pub lane: String,
    /// Jobs that wait for a worker.
    pub ready: i64,
    /// Jobs that wait for their time.
    pub scheduled: i64,
    /// Jobs of claimed batches that have not ended.
    pub running: i64,
    /// Of these, jobs whose lease has expired and that no sweep has taken yet.
    pub expired: i64,
    /// Jobs that failed for good; see [`Lane::redrive`].
    pub dead: i64,
}

impl Queue {
    /// The lane of this name; there is nothing to create.
    pub fn lane(&self, name: impl Into<String>) -> Lane {
        Lane {
            queue: self.clone(),
            name: name.into(),
        }
    }

    /// What is in each lane. Counts row by row: not for every second.
    ///
    /// # Errors
    /// Those of the connection.
    pub async fn lane_stats(&self) -> Result<Vec<LaneStats>> {
        let rows = self.query(sql::BRIEF_STATS, &[]).await?;
        rows.iter()
            .map(|row| {
                let read = Reader(row);
                Ok(LaneStats {
                    lane: read.get("lane")?,
                    ready: read.get("ready")?,
                    scheduled: read.get("scheduled")?,
                    running: read.get("running")?,
                    expired: read.get("expired")?,
                    dead: read.get("dead")?,
                })
            })
            .collect()
    }
}

impl Lane {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The queue it belongs to.
    pub fn queue(&self) -> &Queue {
        &self.queue
    }

    /// Adds a job; returns its id.
    ///
    /// # Errors
    /// [`Error::Rejected`] for a payload above 64 KiB.
    pub async fn push(&self, payload: &Value) -> Result<i64> {
        let ids = self.push_many(std::slice::from_ref(payload), None).await?;
        ids.first().copied().ok_or_else(|| Error::Answer {
            job: None,
            message: "no id came back".into(),
        })
    }

    /// Adds many in one statement; returns their ids in order. With `delay` they wait that long first.
    ///
    /// # Errors
    /// [`Error::Rejected`] for a payload above 64 KiB; then none was added.
    pub async fn push_many(&self, payloads: &[Value], delay: Option<Duration>) -> Result<Vec<i64>> {
        if payloads.is_empty() {
            return Ok(Vec::new());
        }
        let hint = self.queue.next_hint();
        let delay = delay.map(|delay| delay.as_secs_f64());
        let ids = self
            .queue
            .value(
                sql::BRIEF_PUSH,
                &[
                    (&self.name, Type::TEXT),
                    (&payloads, Type::JSONB_ARRAY),
                    (&delay, Type::FLOAT8),
                    (&(hint == Hint::Now), Type::BOOL),
                ],
            )
            .await?;
        self.queue.wake_after(hint);
        Ok(ids)
    }

    /// Takes up to `limit` jobs as one batch. `after` is a lower bound on their places in the lane: 0, or somewhat less than the
    /// `last_seq` of an earlier claim, which keeps claims fast while an old snapshot stops the database from cleaning up. Jobs below
    /// it are found only with 0.
    ///
    /// # Errors
    /// Those of the connection. After [`Error::ConnectionLost`] a batch may be held that nobody heard of; its lease expires.
    pub async fn claim(&self, worker: &str, limit: usize, lease: Duration, after: i64) -> Result<Option<Batch>> {
        let limit = i32::try_from(limit).unwrap_or(i32::MAX);
        let rows = self
            .queue
            .query(
                sql::BRIEF_CLAIM,
                &[
                    (&worker, Type::TEXT),
                    (&self.name, Type::TEXT),
                    (&limit, Type::INT4),
                    (&lease.as_secs_f64(), Type::FLOAT8),
                    (&after, Type::INT8),
                ],
            )
            .await?;
        let Some(row) = rows.first() else { return Ok(None) };
        let read = Reader(row);
        let token = read.get("token")?;
        let ids: Vec<i64> = read.get("ids")?;
        let attempts: Vec<i16> = read.get("attempts")?;
        let payloads: Vec<Value> = read.get("payloads")?;
        let jobs = (1..).zip(ids).zip(attempts).zip(payloads);
        Ok(Some(Batch {
            token,
            lease_left: duration(read.get("lease_seconds")?),
            last_seq: read.get("last_seq")?,
            jobs: jobs
                .map(|(((place, id), attempt), payload)| BatchJob {
                    place: BatchPlace { token, place },
                    id,
                    attempt,
                    payload,
                })
                .collect(),
        }))
    }

    /// Ends jobs, of any number of batches: without a failure it is done, with one it is tried again later or, after its last attempt
    /// or by the user's fault, dead. Tells for each whether it was accepted; it is not when the batch was taken away, or when that
    /// job has ended already.
    ///
    /// # Errors
    /// Those of the connection.
    pub async fn finish(&self, endings: &[(BatchPlace, Option<JobFailure>)]) -> Result<Vec<bool>> {
        if endings.is_empty() {
            return Ok(Vec::new());
        }
        let tokens: Vec<i64> = endings.iter().map(|(place, _)| place.token).collect();
        let places: Vec<i32> = endings.iter().map(|(place, _)| place.place).collect();
        let failures: Option<Vec<Option<Value>>> = if endings.iter().any(|(_, failure)| failure.is_some()) {
            let told = endings
                .iter()
                .map(|(_, failure)| failure.as_ref().map(serde_json::to_value).transpose());
            Some(told.collect::<Result<_, _>>().map_err(|error| Error::Rejected {
                message: error.to_string(),
            })?)
        } else {
            None
        };
        self.queue
            .value(
                sql::BRIEF_FINISH,
                &[
                    (&tokens, Type::INT8_ARRAY),
                    (&places, Type::INT4_ARRAY),
                    (&failures, Type::JSONB_ARRAY),
                    (&None::<f64>, Type::FLOAT8),
                ],
            )
            .await
    }

    /// Extends the leases of batches; tells for each whether it is still held.
    ///
    /// # Errors
    /// Those of the connection.
    pub async fn beat(&self, tokens: &[i64]) -> Result<Vec<bool>> {
        self.queue.value(sql::BRIEF_BEAT, &[(&tokens, Type::INT8_ARRAY)]).await
    }

    /// Gives back what of a batch has not ended; not an attempt. Returns how many jobs that were.
    ///
    /// # Errors
    /// Those of the connection.
    pub async fn release(&self, token: i64) -> Result<i32> {
        self.queue.value(sql::BRIEF_RELEASE, &[(&token, Type::INT8)]).await
    }

    /// Gives up to `limit` dead jobs a fresh set of attempts; returns how many.
    ///
    /// # Errors
    /// Those of the connection.
    pub async fn redrive(&self, limit: usize) -> Result<i32> {
        let limit = i32::try_from(limit).unwrap_or(i32::MAX);
        let revived = self
            .queue
            .value(sql::BRIEF_REDRIVE, &[(&self.name, Type::TEXT), (&limit, Type::INT4)])
            .await?;
        self.queue.wake();
        Ok(revived)
    }
}
