//! Many jobs in one statement, for rates at which a round trip and a commit for each would be the whole cost.

use serde_json::Value;
use tokio_postgres::types::Type;
use uuid::Uuid;

use crate::error::{Error, Result};
use crate::job::{JobState, Lease, NewJob, Reader};
use crate::queue::Queue;
use crate::sql;
use crate::wake::Hint;

impl Queue {
    /// Enqueues a copy of `template` for each payload, in one statement and one commit; the ids come back in order. Id, key and
    /// external name of the template must be empty, since they cannot be shared.
    ///
    /// # Errors
    /// [`Error::Rejected`] where a value breaks a rule of the engine; then nothing was enqueued.
    pub async fn enqueue_many(&self, template: &NewJob, payloads: &[Value]) -> Result<Vec<Uuid>> {
        if template.id.is_some() || template.idempotency_key.is_some() || template.external_id.is_some() {
            return Err(Error::Rejected {
                message: "many jobs cannot share an id, an idempotency key or an external name".into(),
            });
        }
        if payloads.is_empty() {
            return Ok(Vec::new());
        }
        let hint = if template.notify { Hint::Now } else { self.next_hint() };
        let ids = self
            .value(
                sql::ENQUEUE_MANY,
                &[
                    (&template.kind, Type::TEXT),
                    (&payloads, Type::JSONB_ARRAY),
                    (&template.queue, Type::TEXT),
                    (&i32::from(template.priority), Type::INT4),
                    (&template.owner, Type::UUID),
                    (&template.max_attempts, Type::INT4),
                    (&template.run_at, Type::TIMESTAMPTZ),
                    (&template.delay.map(|delay| delay.as_secs_f64()), Type::FLOAT8),
                    (
                        &template.hard_deadline.map(|deadline| deadline.as_secs_f64()),
                        Type::FLOAT8,
                    ),
                    (&(hint == Hint::Now), Type::BOOL),
                ],
            )
            .await?;
        self.wake_after(hint);
        Ok(ids)
    }

    /// Ends many runs well, in one statement and one commit. One answer for each, in order, as [`Self::complete`] would give it: a
    /// stale token is refused without harm to its neighbours.
    ///
    /// # Errors
    /// The outer ones are those of the connection: then none of them, or all, have ended; ask again.
    pub async fn complete_many(&self, endings: &[(Lease, Value)]) -> Result<Vec<Result<JobState>>> {
        if endings.is_empty() {
            return Ok(Vec::new());
        }
        let jobs: Vec<Uuid> = endings.iter().map(|(lease, _)| lease.job_id).collect();
        let tokens: Vec<i64> = endings.iter().map(|(lease, _)| lease.token).collect();
        let results: Vec<&Value> = endings.iter().map(|(_, result)| result).collect();
        let rows = self
            .query(
                sql::COMPLETE_MANY,
                &[
                    (&jobs, Type::UUID_ARRAY),
                    (&tokens, Type::INT8_ARRAY),
                    (&results, Type::JSONB_ARRAY),
                ],
            )
            .await?;
        rows.iter()
            .map(|row| {
                let read = Reader(row);
                let lease = Lease {
                    job_id: read.get("job_id")?,
                    token: read.get("token")?,
                };
                Ok(match read.get::<Option<String>>("state")? {
                    Some(state) => JobState::parse(&state),
                    None => Err(refusal(lease, read.get::<Option<String>>("refused")?.as_deref())),
                })
            })
            .collect()
    }
}

fn refusal(lease: Lease, code: Option<&str>) -> Error {
    let message = format!("token {} of job {} was refused", lease.token, lease.job_id);
    match code {
        Some("BR001") => Error::LeaseLost { message },
        Some("BR002") => Error::JobMissing { message },
        Some("BR003") => Error::JobFinished { message },
        Some("40001" | "40P01" | "55P03") => Error::Collision { message },
        code => Error::Database {
            code: code.unwrap_or("unknown").to_owned(),
            message,
        },
    }
}
