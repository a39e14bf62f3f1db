//! Getting connections and sending statements over them.

use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Client, Row};

use crate::config::QueueConfig;
use crate::error::{Error, Place, Result};

/// A parameter and its type. The type is always told, so that the server need not be asked.
pub(crate) type Parameter<'a> = (&'a (dyn ToSql + Sync), Type);

/// A connection outside the pool, with the task that drives it. Dropping it closes both.
pub(crate) struct OwnConnection {
    pub(crate) client: Client,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for OwnConnection {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Opens a connection outside the pool, driven by the current runtime.
pub(crate) async fn open(config: &QueueConfig) -> Result<OwnConnection> {
    let connector = crate::tls::connector(config.ssl_mode, config.ssl_root.as_ref())?;
    let (client, connection) = config
        .driver
        .connect(connector)
        .await
        .map_err(|error| Error::from_driver(&error, &config.place()))?;
    let task = tokio::spawn(async move {
        // Whoever uses the client is told of the error by the call that failed.
        let _ = connection.await;
    });
    Ok(OwnConnection { client, task })
}

/// Sends one unnamed statement and returns its rows, in one round trip.
pub(crate) async fn query(
    client: &impl tokio_postgres::GenericClient,
    place: &Place,
    sql: &str,
    parameters: &[Parameter<'_>],
) -> Result<Vec<Row>> {
    client
        .query_typed(sql, parameters)
        .await
        .map_err(|error| Error::from_driver(&error, place))
}
