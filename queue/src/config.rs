//! Where the database is and how to talk to it.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use tokio_postgres::config::Host;

use crate::error::{Error, Place, Result};
use crate::tls::SslMode;

/// Parameters that other programs put into a Postgres URL and the driver does not know.
const FOREIGN_PARAMETERS: [&str; 6] = [
    "pgbouncer",
    "connection_limit",
    "pool_timeout",
    "schema",
    "supa",
    "sslaccept",
];

/// How to reach the database. `Debug` shows no password.
#[derive(Clone)]
pub struct QueueConfig {
    pub(crate) driver: tokio_postgres::Config,
    pub(crate) ssl_mode: SslMode,
    pub(crate) ssl_root: Option<PathBuf>,
    /// Connections kept at most; 4 by default, for hosted databases have few. A runner uses up to
    /// two more of its own, for heartbeats and for listening.
    pub pool_size: usize,
}

impl QueueConfig {
    /// Reads a URL (`postgresql://user:password@host:port/database?sslmode=…`) or a libpq keyword
    /// string (`host=… user=…`). `sslmode` and `sslrootcert` mean what they mean to libpq.
    ///
    /// # Errors
    /// [`Error::Config`]; its message never contains the string.
    pub fn new(url: &str) -> Result<Self> {
        let url = url.trim();
        if url.is_empty() {
            return Err(Error::Config {
                message: "it is empty".into(),
            });
        }
        let (url, ssl_mode, ssl_root) = take_ssl_parameters(url)?;
        let mut driver: tokio_postgres::Config = url.parse().map_err(|error: tokio_postgres::Error| {
            // The driver's top line names the parameter at fault and never a value.
            let cause = std::error::Error::source(&error).map(ToString::to_string);
            Error::Config {
                message: cause.unwrap_or_else(|| "it is not a Postgres URL".into()),
            }
        })?;
        if driver.get_hosts().is_empty() && driver.get_hostaddrs().is_empty() {
            driver.host("localhost");
        }
        driver.ssl_mode(ssl_mode.for_driver());
        if driver.get_connect_timeout().is_none() {
            driver.connect_timeout(Duration::from_secs(10));
        }
        if driver.get_application_name().is_none() {
            driver.application_name("brightrun");
        }
        // A peer that vanished without a word is noticed within about half a minute.
        driver
            .keepalives_idle(Duration::from_secs(15))
            .keepalives_interval(Duration::from_secs(5))
            .keepalives_retries(3)
            .tcp_user_timeout(Duration::from_secs(30));
        Ok(Self {
            driver,
            ssl_mode,
            ssl_root,
            pool_size: 4,
        })
    }

    /// Keeps at most `connections` (at least one).
    #[must_use]
    pub fn pool_size(mut self, connections: usize) -> Self {
        self.pool_size = connections.max(1);
        self
    }

    /// The name `pg_stat_activity` shows for these connections.
    #[must_use]
    pub fn application_name(mut self, name: &str) -> Self {
        self.driver.application_name(name);
        self
    }

    /// Host, port, user and database; not the password.
    pub fn place(&self) -> Place {
        let host = match self.driver.get_hosts().first() {
            Some(Host::Tcp(name)) => name.clone(),
            Some(Host::Unix(folder)) => folder.display().to_string(),
            None => self
                .driver
                .get_hostaddrs()
                .first()
                .map(ToString::to_string)
                .unwrap_or_default(),
        };
        let user = self.driver.get_user().unwrap_or("").to_owned();
        Place {
            host,
            port: self.driver.get_ports().first().copied().unwrap_or(5432),
            database: self.driver.get_dbname().unwrap_or(&user).to_owned(),
            user,
        }
    }
}

impl fmt::Debug for QueueConfig {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("QueueConfig")
            .field("place", &self.place())
            .field("ssl_mode", &self.ssl_mode)
            .field("pool_size", &self.pool_size)
            .finish_non_exhaustive()
    }
}

/// The connection string without the parameters that are handled here, and their values.
fn take_ssl_parameters(text: &str) -> Result<(String, SslMode, Option<PathBuf>)> {
    let mut mode = SslMode::Prefer;
    let mut root = None;
    let mut take = |key: &str, value: &str| -> Result<bool> {
        match key {
            "sslmode" => mode = SslMode::parse(value)?,
            "sslrootcert" if value == "system" => root = None,
            "sslrootcert" => root = Some(PathBuf::from(value)),
            key => return Ok(FOREIGN_PARAMETERS.contains(&key)),
        }
        Ok(true)
    };
    if !text.starts_with("postgres://") && !text.starts_with("postgresql://") {
        let mut kept = Vec::new();
        for word in text.split_whitespace() {
            let taken = match word.split_once('=') {
                Some((key, value)) => take(key, value.trim_matches('\''))?,
                None => false,
            };
            if !taken {
                kept.push(word);
            }
        }
        return Ok((kept.join(" "), mode, root));
    }
    let Some((base, query)) = text.split_once('?') else {
        return Ok((text.to_owned(), mode, root));
    };
    let mut kept = Vec::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let decoded = url::form_urlencoded::parse(pair.as_bytes()).next();
        let taken = match &decoded {
            Some((key, value)) => take(key, value)?,
            None => true,
        };
        if !taken {
            kept.push(pair);
        }
    }
    let url = if kept.is_empty() {
        base.to_owned()
    } else {
        format!("{base}?{}", kept.join("&"))
    };
    Ok((url, mode, root))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::*;

    const CANARY: &str = "not-a-real-password-canary";

    #[test]
    fn neither_debug_nor_any_message_shows_the_password() {
        let config = QueueConfig::new(&format!(
            "postgresql://who:{CANARY}@db.example:6543/app?sslmode=require"
        ))
        .unwrap();
        assert!(!format!("{config:?}").contains(CANARY));
        assert_eq!(config.place().to_string(), "who@db.example:6543/app");
        for broken in [
            format!("postgresql://who:{CANARY}@db.example:notaport/app"),
            format!("postgresql://who:{CANARY}@db.example/app?sslmode=sometimes"),
            format!("postgresql://who:{CANARY}@db.example/app?nonsense=1"),
            format!("password={CANARY} port=x"),
        ] {
            let error = QueueConfig::new(&broken).unwrap_err();
            assert!(!format!("{error} {error:?}").contains(CANARY), "{error}");
        }
    }

    #[test]
    fn sslmode_and_sslrootcert_are_read_as_libpq_does() {
        let config = QueueConfig::new("postgres://u@h/d?sslmode=verify-full&sslrootcert=%2Fca.pem").unwrap();
        assert_eq!(config.ssl_mode, SslMode::VerifyFull);
        assert_eq!(config.ssl_root, Some(PathBuf::from("/ca.pem")));
        let config = QueueConfig::new("host=h user=u sslmode=disable").unwrap();
        assert_eq!(config.ssl_mode, SslMode::Disable);
        assert_eq!(QueueConfig::new("postgres://u@h/d").unwrap().ssl_mode, SslMode::Prefer);
    }

    #[test]
    fn parameters_of_other_programs_do_not_hurt() {
        QueueConfig::new("postgres://u@h/d?pgbouncer=true&connection_limit=1").unwrap();
    }
}
