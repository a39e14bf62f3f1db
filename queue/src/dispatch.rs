//! Dispatches: waiting jobs that are pushed to an outside system, which starts workers for them.
//!
//! A dispatch grants nothing: the worker that comes of it claims the job. Every act on one carries the token of its last taking,
//! so that several orchestrators may work at once and one that dies is replaced.

use std::time::Duration;

use serde_json::Value;
use tokio_postgres::types::Type;
use uuid::Uuid;

use crate::error::{Error, Result};
use crate::job::{JobFailure, JobState, Reader};
use crate::queue::Queue;
use crate::sql;

/// A waiting job that nobody has dispatched.
#[derive(Clone, Debug, PartialEq)]
pub struct WaitingJob {
    /// Its id.
    pub job_id: Uuid,
    /// The user it belongs to.
    pub owner: Option<Uuid>,
    /// The work itself.
    pub payload: Value,
    /// Attempts so far.
    pub attempt: i32,
}

/// How a waiting job is to be dispatched.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DispatchRequest<'a> {
    /// Where it will be sent.
    pub endpoint: &'a str,
    /// Most dispatches of that endpoint.
    pub most: usize,
    /// Dollars to set aside for it.
    pub reserved: f64,
    /// Most dollars of its owner this month, those set aside included.
    pub owner_most: Option<f64>,
    /// How long the caller may take to send it.
    pub hold: Duration,
}

/// The right to act on one dispatch, until somebody takes it anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DispatchTicket {
    /// The job.
    pub job_id: Uuid,
    /// This taking's token.
    pub token: i64,
}

/// A dispatch that is to be looked at.
#[derive(Clone, Debug, PartialEq)]
pub struct Dispatched {
    /// The right to act on it.
    pub ticket: DispatchTicket,
    /// Where the job was sent.
    pub endpoint: String,
    /// Its name there; `None` when it is not known to have arrived.
    pub external_id: Option<String>,
    /// Seconds since it was sent.
    pub sent_seconds: Option<f64>,
    /// The job's state in the engine.
    pub state: JobState,
    /// Who runs it.
    pub worker: Option<String>,
    /// Whether a worker has claimed it since it was dispatched.
    pub was_claimed: bool,
    /// Whether a cancel was asked for.
    pub cancel_requested: bool,
    /// The work itself.
    pub payload: Value,
}

/// Dollars of one user.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spend {
    /// Spent since the month began, in UTC.
    pub spent: f64,
    /// Set aside for jobs that are dispatched.
    pub reserved: f64,
}

/// What became of a dispatch whose run outside has failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DispatchEnd {
    /// The job got this state.
    Ended(JobState),
    /// A worker had come after all: the engine has its ending, or will.
    Claimed,
    /// Not the caller's to decide any more, or not just now.
    NotNow,
}

impl Queue {
    /// Waiting jobs of a kind that nobody has dispatched, in the order a claim would take them.
    ///
    /// # Errors
    /// Those of the connection.
    pub async fn dispatch_waiting(&self, queue: &str, kind: &str, limit: usize) -> Result<Vec<WaitingJob>> {
        let limit = i32::try_from(limit).unwrap_or(i32::MAX);
        let rows = self
            .query(
                sql::DISPATCH_WAITING,
                &[(&queue, Type::TEXT), (&kind, Type::TEXT), (&limit, Type::INT4)],
            )
            .await?;
        rows.iter()
            .map(|row| {
                let read = Reader(row);
                Ok(WaitingJob {
                    job_id: read.get("job_id")?,
                    owner: read.get("owner")?,
                    payload: read.get("payload")?,
                    attempt: read.get("attempt")?,
                })
            })
            .collect()
    }

    /// Takes a waiting job for an endpoint that has fewer than `request.most` dispatches. `None`: the endpoint is full, too much is
    /// set aside for other jobs of its owner, or the job is not there to be had. Unless [`Self::dispatch_sent`] follows within the
    /// hold, the dispatch is given to whoever looks next.
    ///
    /// # Errors
    /// Those of the connection.
    pub async fn dispatch_begin(&self, job_id: Uuid, request: &DispatchRequest<'_>) -> Result<Option<DispatchTicket>> {
        let most = i32::try_from(request.most).unwrap_or(i32::MAX);
        let hold = request.hold.as_secs_f64();
        let token: Option<i64> = self
            .value(
                sql::DISPATCH_BEGIN,
                &[
                    (&job_id, Type::UUID),
                    (&request.endpoint, Type::TEXT),
                    (&most, Type::INT4),
                    (&request.reserved, Type::FLOAT8),
                    (&request.owner_most, Type::FLOAT8),
                    (&hold, Type::FLOAT8),
                ],
            )
            .await?;
        Ok(token.map(|token| DispatchTicket { job_id, token }))
    }

    /// The endpoint has the job under this name; it is looked at after `look`. False if the ticket is not the newest.
    ///
    /// # Errors
    /// Those of the connection.
    pub async fn dispatch_sent(&self, ticket: DispatchTicket, external_id: &str, look: Duration) -> Result<bool> {
        let look = look.as_secs_f64();
        self.value(
            sql::DISPATCH_SENT,
            &[
                (&ticket.job_id, Type::UUID),
                (&ticket.token, Type::INT8),
                (&external_id, Type::TEXT),
                (&look, Type::FLOAT8),
            ],
        )
        .await
    }

    /// Takes dispatches that are to be looked at, hidden from other orchestrators for `hold`.
    ///
    /// # Errors
    /// Those of the connection.
    pub async fn dispatch_take(&self, limit: usize, hold: Duration) -> Result<Vec<Dispatched>> {
        let limit = i32::try_from(limit).unwrap_or(i32::MAX);
        let hold = hold.as_secs_f64();
        let rows = self
            .query(sql::DISPATCH_TAKE, &[(&limit, Type::INT4), (&hold, Type::FLOAT8)])
            .await?;
        rows.iter()
            .map(|row| {
                let read = Reader(row);
                Ok(Dispatched {
                    ticket: DispatchTicket {
                        job_id: read.get("job_id")?,
                        token: read.get("token")?,
                    },
                    endpoint: read.get("endpoint")?,
                    external_id: read.get("external_id")?,
                    sent_seconds: read.get("sent_seconds")?,
                    state: JobState::parse(&read.get::<String>("state")?)?,
                    worker: read.get("worker")?,
                    was_claimed: read.get("was_claimed")?,
                    cancel_requested: read.get("cancel_requested")?,
                    payload: read.get("payload")?,
                })
            })
            .collect()
    }

    /// Looks at a dispatch again after `after`. False if the ticket is not the newest.
    ///
    /// # Errors
    /// Those of the connection.
    pub async fn dispatch_again(&self, ticket: DispatchTicket, after: Duration) -> Result<bool> {
        let after = after.as_secs_f64();
        self.value(
            sql::DISPATCH_AGAIN,
            &[
                (&ticket.job_id, Type::UUID),
                (&ticket.token, Type::INT8),
                (&after, Type::FLOAT8),
            ],
        )
        .await
    }

    /// The run outside is over, or never began: a job that still waits may be dispatched again. False if the ticket is not the
    /// newest.
    ///
    /// # Errors
    /// Those of the connection.
    pub async fn dispatch_over(&self, ticket: DispatchTicket) -> Result<bool> {
        self.value(
            sql::DISPATCH_OVER,
            &[(&ticket.job_id, Type::UUID), (&ticket.token, Type::INT8)],
        )
        .await
    }

    /// The run outside ended badly. Where no worker had claimed the job, that is an attempt that failed.
    ///
    /// # Errors
    /// Those of the connection and of a projector.
    pub async fn dispatch_failed(&self, ticket: DispatchTicket, failure: &JobFailure) -> Result<DispatchEnd> {
        let error = encoded(failure)?;
        let told: Option<String> = self
            .value(
                sql::DISPATCH_FAILED,
                &[
                    (&ticket.job_id, Type::UUID),
                    (&ticket.token, Type::INT8),
                    (&error, Type::JSONB),
                ],
            )
            .await?;
        match told.as_deref() {
            None => Ok(DispatchEnd::NotNow),
            Some("claimed") => Ok(DispatchEnd::Claimed),
            Some(state) => JobState::parse(state).map(DispatchEnd::Ended),
        }
    }

    /// Fails a waiting job that must not be sent. `None` where it does not wait any more.
    ///
    /// # Errors
    /// Those of the connection and of a projector.
    pub async fn dispatch_refuse(&self, job_id: Uuid, failure: &JobFailure) -> Result<Option<JobState>> {
        let error = encoded(failure)?;
        let told: Option<String> = self
            .value(sql::DISPATCH_REFUSE, &[(&job_id, Type::UUID), (&error, Type::JSONB)])
            .await?;
        told.as_deref().map(JobState::parse).transpose()
    }

    /// What a user's jobs have cost this month, and what is set aside for those that are dispatched.
    ///
    /// # Errors
    /// Those of the connection.
    pub async fn dispatch_spend(&self, owner: Uuid) -> Result<Spend> {
        let rows = self.query(sql::DISPATCH_SPEND, &[(&owner, Type::UUID)]).await?;
        let row = rows.first().ok_or_else(|| Error::Answer {
            job: None,
            message: "no row".into(),
        })?;
        let read = Reader(row);
        Ok(Spend {
            spent: read.get("spent")?,
            reserved: read.get("reserved")?,
        })
    }
}

fn encoded(failure: &JobFailure) -> Result<Value> {
    serde_json::to_value(failure).map_err(|error| Error::Rejected {
        message: error.to_string(),
    })
}
