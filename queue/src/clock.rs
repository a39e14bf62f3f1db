//! The database's clock, for whoever wants to know how far his own is off.

use chrono::{DateTime, Utc};

use crate::error::Result;
use crate::queue::Queue;
use crate::sql;

impl Queue {
    /// What time it is by the engine's clock, the only one that decides.
    ///
    /// # Errors
    /// Those of the connection.
    pub async fn now(&self) -> Result<DateTime<Utc>> {
        self.value(sql::CLOCK, &[]).await
    }
}
