//! The server's folders, its user, and its process.

use std::net::TcpListener;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, geteuid, kill_process};

use super::binaries::Binaries;
use super::{Options, ServerError, ServerResult, io_error};

/// Longest path a Unix socket address can hold on the systems we know (BSD's 104), less the name.
const SOCKET_FOLDER_LIMIT: usize = 104 - "/.s.PGSQL.5432.lock".len() - 1;

/// How long a server may take to start or to stop before that counts as failure. A loaded
/// two-core machine needs about two seconds; recovery after a crash a little more.
const PATIENCE: Duration = Duration::from_secs(60);

/// User and group a child runs as; `None` for our own.
pub(super) type Owner = Option<(u32, u32)>;

/// Postgres refuses root, so root runs it as `postgres`, or else as `nobody`.
pub(super) fn unprivileged_user() -> ServerResult<Owner> {
    if !geteuid().is_root() {
        return Ok(None);
    }
    let users = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    ["postgres", "nobody"]
        .iter()
        .find_map(|name| user_in(&users, name))
        .map(Some)
        .ok_or(ServerError::NoUnprivilegedUser)
}

/// Numeric user and group of `name` in the text of a passwd file.
fn user_in(users: &str, name: &str) -> Option<(u32, u32)> {
    users.lines().find_map(|line| {
        let mut fields = line.split(':');
        if fields.next()? != name {
            return None;
        }
        let mut numbers = fields.skip(1);
        Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
    })
}

fn command(program: &Path, owner: Owner) -> Command {
    let mut command = Command::new(program);
    // The caller's folder may be closed to the server's user.
    command.current_dir("/").env("LC_ALL", "C");
    if let Some((user, group)) = owner {
        command.uid(user).gid(group);
    }
    command
}

/// A fresh folder under the system's temporary one. Its name is unique for this process and time.
pub(super) fn temporary_folder() -> ServerResult<PathBuf> {
    let folder = std::env::temp_dir().join(format!("brightrun-pg-{}", uuid::Uuid::new_v4().simple()));
    std::fs::create_dir(&folder).map_err(io_error("creating", &folder))?;
    Ok(folder)
}

/// A folder the caller named: made if absent, and taken only if it is empty or holds a cluster of ours.
pub(super) fn own_folder(folder: &Path) -> ServerResult<PathBuf> {
    std::fs::create_dir_all(folder).map_err(io_error("creating", folder))?;
    let folder = folder.canonicalize().map_err(io_error("resolving", folder))?;
    let mut entries = std::fs::read_dir(&folder).map_err(io_error("reading", &folder))?;
    if entries.next().is_some() && !folder.join("data/PG_VERSION").is_file() {
        return Err(ServerError::FolderInUse { folder });
    }
    Ok(folder)
}

/// Hands a folder to the server's user and closes it to everybody else.
pub(super) fn give_to(folder: &Path, owner: Owner) -> ServerResult<()> {
    if let Some((user, group)) = owner {
        chown(folder, Some(user), Some(group)).map_err(io_error("changing the owner of", folder))?;
    }
    std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o700))
        .map_err(io_error("changing the mode of", folder))
}

/// Where the socket goes: the folder itself, or a short one where its path is too long for a socket.
pub(super) fn socket_folder(folder: &Path, owner: Owner) -> ServerResult<PathBuf> {
    if folder.as_os_str().len() <= SOCKET_FOLDER_LIMIT {
        return Ok(folder.to_owned());
    }
    let short = PathBuf::from(format!("/tmp/brightrun-pg-{}", uuid::Uuid::new_v4().simple()));
    std::fs::create_dir(&short).map_err(io_error("creating", &short))?;
    give_to(&short, owner)?;
    Ok(short)
}

/// Makes the cluster in `data` unless one is there; returns the superuser's password.
pub(super) fn initialise(binaries: &Binaries, data: &Path, owner: Owner) -> ServerResult<String> {
    let password_file = data.with_file_name("password");
    if data.join("PG_VERSION").is_file() {
        return std::fs::read_to_string(&password_file)
            .map(|text| text.trim().to_owned())
            .map_err(io_error("reading", &password_file));
    }
    let password = uuid::Uuid::new_v4().simple().to_string();
    std::fs::write(&password_file, &password).map_err(io_error("writing", &password_file))?;
    give_to_file(&password_file, owner)?;
    let output = command(&binaries.initdb, owner)
        .args(["--username=postgres", "--encoding=UTF8", "--locale=C"])
        .args(["--auth-local=trust", "--auth-host=scram-sha-256"])
        .arg("--no-sync")
        .arg("--pwfile")
        .arg(&password_file)
        .arg("--pgdata")
        .arg(data)
        .stdin(Stdio::null())
        .output()
        .map_err(io_error("running", &binaries.initdb))?;
    if !output.status.success() {
        let mut text = String::from_utf8_lossy(&output.stderr).into_owned();
        if owner.is_some() && text.contains("ermission denied") {
            text.push_str(
                "\nThe server runs as an unprivileged user, which must be able to enter every \
                 folder above its own; choose another folder, for instance under /tmp.",
            );
        }
        return Err(ServerError::Program {
            program: "initdb".into(),
            output: last_lines(&text),
        });
    }
    Ok(password)
}

fn give_to_file(file: &Path, owner: Owner) -> ServerResult<()> {
    std::fs::set_permissions(file, std::fs::Permissions::from_mode(0o600))
        .map_err(io_error("changing the mode of", file))?;
    match owner {
        Some((user, group)) => chown(file, Some(user), Some(group)).map_err(io_error("changing the owner of", file)),
        None => Ok(()),
    }
}

fn last_lines(text: &str) -> String {
    let lines: Vec<&str> = text.trim().lines().collect();
    lines[lines.len().saturating_sub(12)..].join("\n")
}

/// How to stop a server.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Stop {
    /// Roll back what runs, write a checkpoint, end.
    Fast,
    /// End at once, as a power failure would; the next start recovers.
    Immediate,
}

/// The server process and all that is needed to start it again.
pub(super) struct ServerProcess {
    binaries: Binaries,
    data: PathBuf,
    socket_folder: PathBuf,
    owner: Owner,
    password: String,
    port: Option<u16>,
    settings: Vec<(String, String)>,
    child: Option<Child>,
}

impl ServerProcess {
    pub(super) fn new(
        binaries: Binaries,
        data: PathBuf,
        socket_folder: PathBuf,
        owner: Owner,
        password: String,
        options: &Options,
    ) -> ServerResult<Self> {
        let mut settings: Vec<(String, String)> = [
            ("max_connections", "200"),
            ("shared_buffers", "64MB"),
            ("log_checkpoints", "off"),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .to_vec();
        if !options.durable {
            for name in ["fsync", "synchronous_commit", "full_page_writes"] {
                settings.push((name.into(), "off".into()));
            }
        }
        settings.extend(options.settings.iter().cloned());
        let port = options
            .loopback
            .then(free_port)
            .transpose()
            .map_err(io_error("finding a free port on", Path::new("127.0.0.1")))?;
        Ok(Self {
            binaries,
            data,
            socket_folder,
            owner,
            password,
            port,
            settings,
            child: None,
        })
    }

    pub(super) fn major_version(&self) -> u32 {
        self.binaries.major
    }

    /// The port, which is also part of the socket's name.
    pub(super) fn port(&self) -> u16 {
        self.port.unwrap_or(5432)
    }

    pub(super) fn loopback(&self) -> Option<(u16, &str)> {
        Some((self.port?, &self.password))
    }

    fn log_file(&self) -> PathBuf {
        self.data.with_file_name("server.log")
    }

    /// Starts the server and waits until it takes connections.
    pub(super) fn start(&mut self) -> ServerResult<()> {
        let log_path = self.log_file();
        let log = std::fs::File::create(&log_path).map_err(io_error("writing", &log_path))?;
        let errors = log.try_clone().map_err(io_error("writing", &log_path))?;
        let mut command = command(&self.binaries.postgres, self.owner);
        command.arg("-D").arg(&self.data).arg("-k").arg(&self.socket_folder);
        let addresses = if self.port.is_some() { "127.0.0.1" } else { "" };
        command
            .args(["-c", &format!("listen_addresses={addresses}")])
            .args(["-c", &format!("port={}", self.port())]);
        for (name, value) in &self.settings {
            command.arg("-c").arg(format!("{name}={value}"));
        }
        let child = command
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(errors)
            // A Ctrl-C at the terminal is for the owner, who stops the server in good order.
            .process_group(0)
            .spawn()
            .map_err(io_error("starting", &self.binaries.postgres))?;
        self.child = Some(child);
        self.wait_until_ready()
    }

    /// The postmaster writes its status into the eighth line of its pid file.
    fn wait_until_ready(&mut self) -> ServerResult<()> {
        let deadline = Instant::now() + PATIENCE;
        let pid_file = self.data.join("postmaster.pid");
        loop {
            let Some(child) = &mut self.child else {
                return Err(self.failed("it is not running"));
            };
            let pid = child.id().to_string();
            if let Ok(Some(_)) = child.try_wait() {
                self.child = None;
                return Err(self.failed("it ended at once"));
            }
            let text = std::fs::read_to_string(&pid_file).unwrap_or_default();
            let mut lines = text.lines();
            if lines.next() == Some(&pid) && lines.nth(6).is_some_and(|line| line.trim() == "ready") {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(self.failed("it was not ready in time"));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn failed(&self, what: &str) -> ServerError {
        let log = std::fs::read_to_string(self.log_file()).unwrap_or_default();
        ServerError::Program {
            program: "postgres".into(),
            output: format!("{what}\n{}", last_lines(&log)),
        }
    }

    /// Stops the server and waits until it is gone. Nothing to do if it is not running.
    pub(super) fn stop(&mut self, how: Stop) -> ServerResult<()> {
        let Some(mut child) = self.child.take() else {
            return Ok(());
        };
        let signal = match how {
            Stop::Fast => Signal::INT,
            Stop::Immediate => Signal::QUIT,
        };
        signal_child(&child, signal).map_err(io_error("stopping", &self.binaries.postgres))?;
        let deadline = Instant::now() + PATIENCE;
        while matches!(child.try_wait(), Ok(None)) {
            if Instant::now() > deadline {
                signal_child(&child, Signal::QUIT).map_err(io_error("stopping", &self.binaries.postgres))?;
                break;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        child.wait().map_err(io_error("waiting for", &self.binaries.postgres))?;
        Ok(())
    }
}

impl Drop for ServerProcess {
    fn drop(&mut self) {
        // There is nobody left to tell.
        let _ = self.stop(Stop::Fast);
    }
}

fn signal_child(child: &Child, signal: Signal) -> std::io::Result<()> {
    let pid = i32::try_from(child.id())
        .ok()
        .and_then(Pid::from_raw)
        .ok_or_else(|| std::io::Error::other("the process id is out of range"))?;
    match kill_process(pid, signal) {
        Err(rustix::io::Errno::SRCH) => Ok(()),
        sent => sent.map_err(Into::into),
    }
}

/// A port nobody listens on. Somebody may take it before the server does; then the start fails
/// and says so.
fn free_port() -> std::io::Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::*;

    #[test]
    fn a_user_is_found_by_whole_name_only() {
        let users = "postgresql:x:5:5::/:/bin/sh\npostgres:x:101:104:PostgreSQL,,,:/var/lib:/bin/bash\n";
        assert_eq!(user_in(users, "postgres"), Some((101, 104)));
        assert_eq!(user_in(users, "nobody"), None);
    }
}
