//! One server per test process, one database per test.

use std::sync::{Mutex, PoisonError};

use super::{Options, PrivateServer, ServerResult, create_database};

/// Names an external server to test against: the URL of a database whose login may create more.
/// The common `DATABASE_URL` is deliberately not read: it often names a server with real data.
pub const ENVIRONMENT: &str = "BRIGHTRUN_TEST_DATABASE_URL";

/// Lives as long as the process; its guardian cleans up afterwards, since statics are not dropped.
static SHARED: Mutex<Option<PrivateServer>> = Mutex::new(None);

/// The URL of a fresh database, with nothing in it, on the shared server. The name starts with
/// `prefix`, for the reader of a log.
///
/// # Errors
/// [`ServerError`](super::ServerError), whose text says what to install.
pub async fn fresh_database(prefix: &str) -> ServerResult<String> {
    let database = format!("{prefix}_{}", uuid::Uuid::new_v4().simple());
    let admin = admin_url()?;
    create_database(&admin, &database).await?;
    Ok(replace_database(&admin, &database))
}

/// The URL of an administrator's database on the server tests use.
fn admin_url() -> ServerResult<String> {
    if let Ok(url) = std::env::var(ENVIRONMENT) {
        return Ok(url);
    }
    let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(server) = &*shared {
        return Ok(server.url("postgres"));
    }
    let server = PrivateServer::start(&Options::default())?;
    let url = server.url("postgres");
    *shared = Some(server);
    Ok(url)
}

/// The same URL with another database at its end.
fn replace_database(url: &str, database: &str) -> String {
    let (base, query) = match url.split_once('?') {
        Some((base, query)) => (base, format!("?{query}")),
        None => (url, String::new()),
    };
    let authority = base.find("://").map_or(0, |at| at + 3);
    let end = base[authority..].find('/').map_or(base.len(), |at| authority + at);
    format!("{}/{database}{query}", &base[..end])
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::*;

    #[test]
    fn only_the_database_of_a_url_is_replaced() {
        for (url, expected) in [
            (
                "postgresql://u:p@h:1/a?sslmode=disable",
                "postgresql://u:p@h:1/b?sslmode=disable",
            ),
            (
                "postgresql://postgres@%2Ftmp%2Fx:5432/postgres",
                "postgresql://postgres@%2Ftmp%2Fx:5432/b",
            ),
            ("postgresql://u@h", "postgresql://u@h/b"),
        ] {
            assert_eq!(replace_database(url, "b"), expected);
        }
    }
}
