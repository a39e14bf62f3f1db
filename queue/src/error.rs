//! What can go wrong, told so that the reader knows what to do.
//!
//! No message and no `Debug` output contains a password: errors name the place a connection goes
//! to, which is host, port, user and database, and never carry the connection string.

use std::fmt;

use tokio_postgres::error::SqlState;
use uuid::Uuid;

/// Where a connection goes, without the password.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Host name or socket folder.
    pub host: String,
    /// Port number.
    pub port: u16,
    /// Database name.
    pub database: String,
    /// Login role.
    pub user: String,
}

impl fmt::Display for Place {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}@{}:{}/{}", self.user, self.host, self.port, self.database)
    }
}

/// Everything the queue can fail with.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    // --- getting there ---
    /// The connection string or the TLS settings make no sense.
    #[error("the database URL cannot be used: {message}")]
    Config {
        /// What is wrong with it; never the URL itself.
        message: String,
    },
    /// No server answered.
    #[error("no database server answered at {place}: {message}")]
    Unreachable {
        /// Where it was looked for.
        place: Place,
        /// The operating system's words.
        message: String,
    },
    /// The server refused the user or the password.
    #[error("the database at {place} refused the login: {message}")]
    WrongPassword {
        /// Where.
        place: Place,
        /// The server's words.
        message: String,
    },
    /// The server has no such database.
    #[error("the server at {place} has no database `{}`", place.database)]
    DatabaseMissing {
        /// Where.
        place: Place,
    },
    /// The engine's tables and functions are not there.
    #[error("the database {place} has no brightrun engine in it: {message}")]
    SchemaMissing {
        /// Where.
        place: Place,
        /// The server's words.
        message: String,
    },
    /// The engine in the database is another version than this program knows.
    #[error("the database {place} has engine version {found}, this program needs version {expected}")]
    SchemaVersion {
        /// Where.
        place: Place,
        /// Version in the database.
        found: i32,
        /// Version this program was built for.
        expected: i32,
    },
    /// A statement of the schema file failed; nothing of the file was applied.
    #[error("schema.sql failed{}: {message}", line.map(|line| format!(" at line {line}")).unwrap_or_default())]
    Migration {
        /// 1-based line of the file, where the server told it.
        line: Option<usize>,
        /// The server's words.
        message: String,
    },

    // --- the engine said no ---
    /// The token is not the one on the lease any more: stop working on this job.
    #[error("the lease is lost: {message}")]
    LeaseLost {
        /// The engine's words, with job, token and state.
        message: String,
    },
    /// The job has ended already, by somebody else.
    #[error("the job has ended: {message}")]
    JobFinished {
        /// The engine's words, with job, token and state.
        message: String,
    },
    /// There is no such job.
    #[error("{message}")]
    JobMissing {
        /// The engine's words.
        message: String,
    },
    /// An argument breaks a rule of the engine (a constraint, a reserved name, a size).
    #[error("the engine refused the values: {message}")]
    Rejected {
        /// The server's words, with the constraint's name.
        message: String,
    },
    /// The role may not do this.
    #[error("the database refused: {message}")]
    PermissionDenied {
        /// The server's words.
        message: String,
    },

    // --- the way there broke ---
    /// The connection broke, or the server is going down or coming up. Whether the statement was
    /// executed is unknown; every call of this crate may be repeated.
    #[error("the connection to {place} broke: {message}")]
    ConnectionLost {
        /// Where.
        place: Place,
        /// What was seen.
        message: String,
    },
    /// Another transaction was in the way; the same call can succeed now.
    #[error("the statement collided with another transaction: {message}")]
    Collision {
        /// The server's words.
        message: String,
    },
    /// Any other complaint of the server, such as one raised by a projector.
    #[error("the database reported {code}: {message}")]
    Database {
        /// SQLSTATE.
        code: String,
        /// The server's words.
        message: String,
    },
    /// The server's answer has another form than this program expects.
    #[error("the database answered in an unexpected form for job {job:?}: {message}")]
    Answer {
        /// The job asked about, if one was.
        job: Option<Uuid>,
        /// What was unexpected.
        message: String,
    },
}

impl Error {
    /// Whether the same call may well succeed a little later.
    pub fn is_transient(&self) -> bool {
        matches!(
            self,
            Self::Unreachable { .. } | Self::ConnectionLost { .. } | Self::Collision { .. }
        )
    }

    /// Whether the worker has lost this job and must discard what it did not commit.
    pub fn is_lost(&self) -> bool {
        matches!(
            self,
            Self::LeaseLost { .. } | Self::JobFinished { .. } | Self::JobMissing { .. }
        )
    }

    /// Whether the engine or a projector refused the values themselves: the same call cannot succeed.
    pub fn is_refusal(&self) -> bool {
        matches!(
            self,
            Self::Rejected { .. } | Self::Database { .. } | Self::Answer { .. }
        )
    }

    /// A stable code, `AREA_WHAT`.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Config { .. } => "QUEUE_URL_INVALID",
            Self::Unreachable { .. } => "QUEUE_UNREACHABLE",
            Self::WrongPassword { .. } => "QUEUE_LOGIN_REFUSED",
            Self::DatabaseMissing { .. } => "QUEUE_DATABASE_MISSING",
            Self::SchemaMissing { .. } => "QUEUE_SCHEMA_MISSING",
            Self::SchemaVersion { .. } => "QUEUE_SCHEMA_VERSION",
            Self::Migration { .. } => "QUEUE_MIGRATION_FAILED",
            Self::LeaseLost { .. } => "QUEUE_LEASE_LOST",
            Self::JobFinished { .. } => "QUEUE_JOB_FINISHED",
            Self::JobMissing { .. } => "QUEUE_JOB_MISSING",
            Self::Rejected { .. } => "QUEUE_VALUE_REJECTED",
            Self::PermissionDenied { .. } => "QUEUE_PERMISSION_DENIED",
            Self::ConnectionLost { .. } => "QUEUE_CONNECTION_LOST",
            Self::Collision { .. } => "QUEUE_COLLISION",
            Self::Database { .. } => "QUEUE_DATABASE_ERROR",
            Self::Answer { .. } => "QUEUE_ANSWER_UNEXPECTED",
        }
    }

    /// What to do about it, as a sentence; empty where nothing helps.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Config { .. } => {
                "Give postgresql://USER:PASSWORD@HOST:PORT/DATABASE, with special characters in the \
                 password percent-encoded."
            }
            Self::Unreachable { .. } => {
                "Check host and port, that the server runs, and that no firewall is in between."
            }
            Self::WrongPassword { .. } => "Check user and password in the database URL.",
            Self::DatabaseMissing { .. } => "Create the database, or correct its name at the end of the database URL.",
            Self::SchemaMissing { .. } => "Run `brightrun migrate` on this database.",
            Self::SchemaVersion { found, expected, .. } if found < expected => {
                "Run `brightrun migrate` on this database."
            }
            Self::SchemaVersion { .. } => "Use the program that belongs to this database.",
            Self::Migration { .. } => "Nothing was changed. Correct the cause and run `brightrun migrate` again.",
            Self::LeaseLost { .. } | Self::JobFinished { .. } => {
                "Another worker may have the job: discard what was not committed."
            }
            Self::PermissionDenied { .. } => {
                "Let the login be a member of the role brightrun_worker, or run `brightrun migrate` \
                 as the owner of the schema."
            }
            Self::ConnectionLost { .. } | Self::Collision { .. } => "Try again.",
            Self::JobMissing { .. } | Self::Rejected { .. } | Self::Database { .. } | Self::Answer { .. } => "",
        }
    }

    /// Sorts a driver's error into the variants above.
    pub(crate) fn from_driver(error: &tokio_postgres::Error, place: &Place) -> Self {
        let place = place.clone();
        let Some(told) = error.as_db_error() else {
            return Self::from_broken_talk(error, place);
        };
        let message = match told.hint() {
            Some(hint) => format!("{} ({hint})", told.message()),
            None => told.message().to_owned(),
        };
        let code = told.code();
        match code.code() {
            "BR001" => Self::LeaseLost { message },
            "BR002" => Self::JobMissing { message },
            "BR003" => Self::JobFinished { message },
            "28P01" | "28000" => Self::WrongPassword { place, message },
            "3D000" => Self::DatabaseMissing { place },
            "3F000" => Self::SchemaMissing { place, message },
            "42P01" | "42883" if message.contains("brightrun.") => Self::SchemaMissing { place, message },
            "42501" => Self::PermissionDenied { message },
            "40001" | "40P01" | "55P03" => Self::Collision { message },
            "57P01" | "57P02" | "57P03" | "53300" => Self::ConnectionLost { place, message },
            code if code.starts_with("08") => Self::ConnectionLost { place, message },
            code if code.starts_with("23") || code.starts_with("22") => Self::Rejected { message },
            code => Self::Database {
                code: code.to_owned(),
                message,
            },
        }
    }

    /// An error that is not the server's word: it was not reached, or the talk broke off. The driver
    /// tells these apart only by their texts.
    fn from_broken_talk(error: &tokio_postgres::Error, place: Place) -> Self {
        let message = chain(error);
        if message.contains("connecting to server") || message.contains("timeout") {
            Self::Unreachable { place, message }
        } else if message.contains("TLS") {
            Self::Config { message }
        } else if error.is_closed() || caused_by_io(error) {
            Self::ConnectionLost { place, message }
        } else if message.contains("password") || message.contains("authentication") {
            Self::WrongPassword { place, message }
        } else {
            Self::Answer { job: None, message }
        }
    }

    /// A failed schema statement, with its line in `file`.
    pub(crate) fn from_migration(error: &tokio_postgres::Error, place: &Place, file: &str, offset: usize) -> Self {
        let Some(told) = error.as_db_error() else {
            return Self::from_driver(error, place);
        };
        if told.code() == &SqlState::INSUFFICIENT_PRIVILEGE {
            return Self::PermissionDenied {
                message: told.message().to_owned(),
            };
        }
        let line = match told.position() {
            Some(tokio_postgres::error::ErrorPosition::Original(position)) => {
                let position = (*position as usize).saturating_sub(offset);
                Some(1 + file.chars().take(position).filter(|letter| *letter == '\n').count())
            }
            _ => None,
        };
        let mut message = told.message().to_owned();
        for more in [told.detail(), told.where_(), told.hint()].into_iter().flatten() {
            message.push_str("; ");
            message.push_str(more);
        }
        Self::Migration { line, message }
    }

    pub(crate) fn from_pool(error: deadpool_postgres::PoolError, place: &Place) -> Self {
        match error {
            deadpool_postgres::PoolError::Backend(error) => Self::from_driver(&error, place),
            deadpool_postgres::PoolError::Timeout(_) => Self::ConnectionLost {
                place: place.clone(),
                message: "no connection became free in time".into(),
            },
            other => Self::ConnectionLost {
                place: place.clone(),
                message: other.to_string(),
            },
        }
    }
}

/// An error with all its causes on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

fn caused_by_io(error: &dyn std::error::Error) -> bool {
    let mut cause = error.source();
    while let Some(error) = cause {
        if error.is::<std::io::Error>() {
            return true;
        }
        cause = error.source();
    }
    false
}

/// What most functions of this crate return.
pub type Result<T, E = Error> = std::result::Result<T, E>;
