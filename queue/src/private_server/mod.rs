//! A private Postgres: a server of one's own for a demo or a test run, from binaries the machine
//! already has.
//!
//! It lives in one folder, listens on a Unix socket in that folder (and on a loopback port when
//! asked), runs as an unprivileged user even when the caller is root, and goes away with its
//! owner: [`PrivateServer::stop`], drop, or — when the owner is killed — a guardian process that
//! waits on a pipe only its owner holds open.
//!
//! Nothing here is for production data, though `durable` keeps the server's own promises.

mod binaries;
mod guardian;
mod process;
pub mod testing;

use std::fmt;
use std::path::{Path, PathBuf};

use crate::config::QueueConfig;
use guardian::Guardian;
use process::ServerProcess;

/// How a private server is to be made.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Folder for everything; made if absent, kept and reused if there. `None`: a fresh folder
    /// under the system's temporary one, removed at the end.
    pub folder: Option<PathBuf>,
    /// Folder of the server's programs. `None`: those named by the environment, or else the newest found.
    pub programs: Option<PathBuf>,
    /// Whether commits survive a power failure. Tests need not pay for that.
    pub durable: bool,
    /// Also listen on a random port of 127.0.0.1, with a random password.
    pub loopback: bool,
    /// More `name=value` settings for the server.
    pub settings: Vec<(String, String)>,
}

/// Why a private server could not be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServerError {
    /// No server binaries were found.
    #[error(
        "no PostgreSQL server binaries were found (looked in {looked_in}). Install them, for \
         example `apt-get install postgresql` or `brew install postgresql`, or name the folder that \
         holds `initdb` and `postgres` in {}",
        binaries::ENVIRONMENT
    )]
    NoBinaries {
        /// The places that were searched.
        looked_in: String,
    },
    /// Postgres refuses to run as root, and no other user is there to run it as.
    #[error(
        "PostgreSQL refuses to run as root and this machine has neither a user `postgres` nor a \
         user `nobody`; run as an ordinary user instead"
    )]
    NoUnprivilegedUser,
    /// The folder holds something else; the server's user must own its folder, so it is not touched.
    #[error("the folder {} holds other files; name an empty or a new one", folder.display())]
    FolderInUse {
        /// Which one.
        folder: PathBuf,
    },
    /// A program of the server failed.
    #[error("{program} failed: {output}")]
    Program {
        /// Which one.
        program: String,
        /// The end of what it said.
        output: String,
    },
    /// The file system refused something.
    #[error("{what} {}: {source}", path.display())]
    Io {
        /// What was being done.
        what: &'static str,
        /// With what.
        path: PathBuf,
        /// The operating system's words.
        source: std::io::Error,
    },
    /// The server is up but a statement failed.
    #[error("the private server refused: {0}")]
    Database(String),
}

pub(crate) type ServerResult<T> = Result<T, ServerError>;

fn io_error<'a>(what: &'static str, path: &'a Path) -> impl Fn(std::io::Error) -> ServerError + use<'a> {
    move |source| ServerError::Io {
        what,
        path: path.to_owned(),
        source,
    }
}

/// A running private server. Dropping it stops the server.
pub struct PrivateServer {
    folder: PathBuf,
    socket_folder: PathBuf,
    process: ServerProcess,
    // Dropped last: it removes a temporary folder when the server is gone.
    guardian: Guardian,
}

impl fmt::Debug for PrivateServer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("PrivateServer")
            .field("folder", &self.folder)
            .finish_non_exhaustive()
    }
}

impl PrivateServer {
    /// Makes the cluster if the folder has none, starts it and waits until it takes connections.
    /// Blocks for about a second.
    ///
    /// # Errors
    /// [`ServerError`], whose text says what to install or change.
    pub fn start(options: &Options) -> ServerResult<Self> {
        let binaries = match &options.programs {
            Some(folder) => binaries::find_in(folder)?,
            None => binaries::find()?,
        };
        let owner = process::unprivileged_user()?;
        let (folder, temporary) = match &options.folder {
            Some(folder) => (process::own_folder(folder)?, false),
            None => (process::temporary_folder()?, true),
        };
        process::give_to(&folder, owner)?;
        let socket_folder = process::socket_folder(&folder, owner)?;
        let data = folder.join("data");
        let mut remove = Vec::new();
        if temporary {
            remove.push(folder.as_path());
        }
        if socket_folder != folder {
            remove.push(&socket_folder);
        }
        let guardian = Guardian::start(&data, &remove)?;
        let password = process::initialise(&binaries, &data, owner)?;
        let mut process = ServerProcess::new(binaries, data, socket_folder.clone(), owner, password, options)?;
        process.start()?;
        Ok(Self {
            folder,
            socket_folder,
            process,
            guardian,
        })
    }

    /// The folder that holds the cluster.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The major version of the server, such as 15.
    pub fn major_version(&self) -> u32 {
        self.process.major_version()
    }

    /// A URL of `database` over the Unix socket, as the superuser `postgres`.
    pub fn url(&self, database: &str) -> String {
        let folder: String =
            url::form_urlencoded::byte_serialize(self.socket_folder.as_os_str().as_encoded_bytes()).collect();
        format!(
            "postgresql://postgres@{}:{}/{database}",
            folder.replace('+', "%20"),
            self.process.port()
        )
    }

    /// A URL of `database` over loopback TCP, with its password; `None` unless it was asked for.
    pub fn loopback_url(&self, database: &str) -> Option<String> {
        let (port, password) = self.process.loopback()?;
        Some(format!("postgresql://postgres:{password}@127.0.0.1:{port}/{database}"))
    }

    /// The URL of `database`, which is created if it is absent.
    ///
    /// # Errors
    /// [`ServerError::Database`] with the server's words.
    pub async fn create_database(&self, database: &str) -> ServerResult<String> {
        create_database(&self.url("postgres"), database).await?;
        Ok(self.url(database))
    }

    /// Stops the server as a power failure would and starts it again: connections break in the
    /// middle of whatever they did, and the server recovers from its log.
    ///
    /// # Errors
    /// [`ServerError`] if it does not come up again.
    pub fn restart_immediate(&mut self) -> ServerResult<()> {
        self.halt_immediate()?;
        self.resume()
    }

    /// The first half of [`Self::restart_immediate`]: afterwards nothing answers.
    ///
    /// # Errors
    /// [`ServerError::Io`] if the server cannot be signalled.
    pub fn halt_immediate(&mut self) -> ServerResult<()> {
        self.process.stop(process::Stop::Immediate)
    }

    /// The second half of [`Self::restart_immediate`].
    ///
    /// # Errors
    /// [`ServerError`] if it does not come up again.
    pub fn resume(&mut self) -> ServerResult<()> {
        self.process.start()
    }

    /// Stops the server, ending all connections, and removes its folder if that is temporary.
    ///
    /// # Errors
    /// [`ServerError::Io`] if the server cannot be signalled.
    pub fn stop(mut self) -> ServerResult<()> {
        self.process.stop(process::Stop::Fast)?;
        self.guardian.dismiss();
        Ok(())
    }
}

/// Creates `database` on the server that `admin_url` leads to, unless it is there.
async fn create_database(admin_url: &str, database: &str) -> ServerResult<()> {
    let told = |error: &dyn fmt::Display| ServerError::Database(error.to_string());
    let config = QueueConfig::new(admin_url).map_err(|error| told(&error))?;
    let connector = crate::tls::connector(config.ssl_mode, config.ssl_root.as_ref()).map_err(|error| told(&error))?;
    let place = config.place();
    let driver = |error: tokio_postgres::Error| told(&crate::Error::from_driver(&error, &place));
    let (client, connection) = config.driver.connect(connector).await.map_err(driver)?;
    let connection = tokio::spawn(connection);
    let quoted = database.replace('"', "\"\"");
    let created = client.batch_execute(&format!("create database \"{quoted}\"")).await;
    drop(client);
    // The connection task ends with its client; its own end is of no interest.
    let _ = connection.await;
    match created {
        Err(error) if error.code().is_some_and(|code| code.code() == "42P04") => Ok(()),
        created => created.map_err(driver),
    }
}
