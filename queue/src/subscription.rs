//! Topics of the outbox that somebody reads: nothing is written for nobody.

use std::time::Duration;

use tokio_postgres::types::Type;

use crate::error::Result;
use crate::queue::Queue;
use crate::sql;

impl Queue {
    /// Asks that messages of a topic be written during `time` from now. A reader repeats it well before that is over; without a
    /// reader the topic falls silent instead of filling the outbox.
    ///
    /// # Errors
    /// Those of the connection.
    pub async fn outbox_subscribe(&self, topic: &str, time: Duration) -> Result<()> {
        let time = time.as_secs_f64();
        self.query(sql::OUTBOX_SUBSCRIBE, &[(&topic, Type::TEXT), (&time, Type::FLOAT8)])
            .await
            .map(drop)
    }
}
