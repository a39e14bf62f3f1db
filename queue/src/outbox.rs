//! The outbox: messages to the world outside, written in the transaction that makes them true.
//!
//! Delivery is at least once: a consumer that dies keeps a message only until its hold ends. The
//! acknowledgement is exactly once: only the last taker's token counts.

use std::time::Duration;

use chrono::{DateTime, Utc};
use serde_json::Value;
use tokio_postgres::types::Type;

use crate::error::Result;
use crate::job::Reader;
use crate::queue::Queue;
use crate::sql;

/// A message taken from the outbox.
#[derive(Clone, Debug, PartialEq)]
pub struct OutboxMessage {
    /// Its number; with it a receiver can recognise a repetition.
    pub id: i64,
    /// This taking's token.
    pub token: i64,
    /// What it is about.
    pub topic: String,
    /// Anything the writer wanted beside the payload, such as a job id.
    pub key: Option<String>,
    /// The message.
    pub payload: Value,
    /// How often it was taken, this time included.
    pub attempts: i32,
    /// When it was written.
    pub created_at: DateTime<Utc>,
}

impl Queue {
    /// Writes a message. Projectors call the SQL function instead, inside their transaction.
    ///
    /// # Errors
    /// Those of the connection.
    pub async fn outbox_put(
        &self,
        topic: &str,
        payload: &Value,
        key: Option<&str>,
        delay: Option<Duration>,
    ) -> Result<i64> {
        let delay = delay.map(|delay| delay.as_secs_f64());
        self.value(
            sql::OUTBOX_PUT,
            &[
                (&topic, Type::TEXT),
                (payload, Type::JSONB),
                (&key, Type::TEXT),
                (&delay, Type::FLOAT8),
            ],
        )
        .await
    }

    /// Takes due messages of some topics, hidden from other takers for `hold`.
    ///
    /// # Errors
    /// Those of the connection.
    pub async fn outbox_take(&self, topics: &[&str], limit: usize, hold: Duration) -> Result<Vec<OutboxMessage>> {
        let limit = i32::try_from(limit).unwrap_or(i32::MAX);
        let hold = hold.as_secs_f64();
        let rows = self
            .query(
                sql::OUTBOX_TAKE,
                &[(&topics, Type::TEXT_ARRAY), (&limit, Type::INT4), (&hold, Type::FLOAT8)],
            )
            .await?;
        rows.iter()
            .map(|row| {
                let read = Reader(row);
                Ok(OutboxMessage {
                    id: read.get("id")?,
                    token: read.get("token")?,
                    topic: read.get("topic")?,
                    key: read.get("key")?,
                    payload: read.get("payload")?,
                    attempts: read.get("attempts")?,
                    created_at: read.get("created_at")?,
                })
            })
            .collect()
    }

    /// Delivered: removes the message. False if somebody else has taken it since.
    ///
    /// # Errors
    /// Those of the connection.
    pub async fn outbox_ack(&self, message: &OutboxMessage) -> Result<bool> {
        self.value(
            sql::OUTBOX_ACK,
            &[(&message.id, Type::INT8), (&message.token, Type::INT8)],
        )
        .await
    }

    /// Not delivered: again after `delay`, or kept as dead once taken `max_attempts` times. False
    /// if somebody else has taken it since.
    ///
    /// # Errors
    /// Those of the connection.
    pub async fn outbox_nack(
        &self,
        message: &OutboxMessage,
        error: &str,
        delay: Duration,
        max_attempts: i32,
    ) -> Result<bool> {
        let delay = delay.as_secs_f64();
        self.value(
            sql::OUTBOX_NACK,
            &[
                (&message.id, Type::INT8),
                (&message.token, Type::INT8),
                (&error, Type::TEXT),
                (&delay, Type::FLOAT8),
                (&max_attempts, Type::INT4),
            ],
        )
        .await
    }
}
