//! The folder of a checkpoint's snapshots: which one is valid, which are old, which were never finished.

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::Serialize;
use uuid::Uuid;

use super::SnapshotSettings;
use super::format;
use super::read::{Snapshot, damaged};
use super::write::{Owner, SnapshotWriter, not_written};
use crate::error::{Failure, Result};
use crate::model::load::Encoding;
use crate::model::load::store::Slot;

/// The folder of snapshots inside a checkpoint's.
pub const FOLDER: &str = ".brightrun";

/// What the name of a snapshot ends in.
const ENDING: &str = ".snapshot";

/// What the name of an unfinished one ends in.
const UNFINISHED: &str = ".part";

/// Snapshots of one checkpoint in one encoding.
#[derive(Clone, Debug)]
pub struct Snapshots {
    folder: PathBuf,
    owner: Owner,
    /// Of the name: the checkpoint's and the encoding's. What begins so and is not the valid one is old.
    beginning: String,
    settings: SnapshotSettings,
}

/// A snapshot, as `brightrun snapshot ls` shows it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Listed {
    /// Its file name.
    pub name: String,
    /// The whole path.
    pub path: PathBuf,
    /// Bytes of the file.
    pub bytes: u64,
    /// Whole seconds since it was written or last used.
    pub unused_seconds: u64,
    /// The encoding, where the file can be read.
    pub encoding: Option<String>,
    /// The checkpoint it was made from, where the file can be read.
    pub checkpoint: Option<String>,
    /// `valid`, `stale`, `damaged`, `unfinished`, or `unknown` where its checkpoint is not at hand.
    pub state: &'static str,
}

/// Where a checkpoint's snapshots lie.
pub fn folder_of(directory: &Path, settings: &SnapshotSettings) -> PathBuf {
    settings.folder.clone().unwrap_or_else(|| directory.join(FOLDER))
}

impl Snapshots {
    /// The snapshots of a checkpoint; `None` when it is too small for one, or not complete (which its loader reports).
    pub fn of(directory: &Path, encoding: Encoding, settings: &SnapshotSettings) -> Option<Self> {
        let (identity, bytes) = format::identity(directory, encoding).ok()?;
        if bytes < settings.smallest_checkpoint {
            return None;
        }
        let directory = directory.canonicalize().unwrap_or_else(|_| directory.to_owned());
        let name = directory
            .file_name()
            .map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        Some(Self {
            folder: folder_of(&directory, settings),
            beginning: format!("{name}.{}.", encoding.name()),
            owner: Owner {
                identity,
                checkpoint: directory.display().to_string(),
                encoding: encoding.name().to_owned(),
            },
            settings: settings.clone(),
        })
    }

    /// Where the valid one lies, or would.
    pub fn target(&self) -> PathBuf {
        let short: String = self.owner.identity.chars().take(16).collect();
        self.folder.join(format!("{}{short}{ENDING}", self.beginning))
    }

    /// The valid snapshot, if there is one. A damaged one is reported and removed.
    pub fn find(&self) -> Option<Snapshot> {
        let path = self.target();
        if !path.is_file() {
            return None;
        }
        let opened =
            Snapshot::open(&path).and_then(|snapshot| match snapshot.table().identity == self.owner.identity {
                true => Ok(snapshot),
                false => Err(damaged(&path, "it was made from another checkpoint")),
            });
        match opened {
            Ok(snapshot) => {
                // The time of the last use decides which snapshots go first; a read-only volume keeps its order.
                let now = SystemTime::now();
                let _ = File::options()
                    .append(true)
                    .open(&path)
                    .and_then(|file| file.set_modified(now));
                Some(snapshot)
            }
            Err(failure) => {
                tracing::warn!(%failure, "a damaged snapshot is removed");
                self.discard(&path);
                None
            }
        }
    }

    /// Removes a snapshot that turned out to be damaged.
    pub fn discard(&self, path: &Path) {
        if let Err(error) = std::fs::remove_file(path)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(%error, path = %path.display(), "a damaged snapshot could not be removed");
        }
    }

    /// Begins a new snapshot, after dead writers' files and, under a bound, the longest unused snapshots have been removed.
    ///
    /// # Errors
    /// `SNAPSHOT_NOT_WRITTEN`: no folder, no room, a volume that is read-only.
    pub fn begin(&self, slots: &[Slot], weight_bytes: u64) -> Result<SnapshotWriter> {
        std::fs::create_dir_all(&self.folder).map_err(|error| not_written(&self.folder, &error))?;
        self.remove_abandoned();
        self.remove_old();
        let (_, wanted) = format::layout(slots);
        self.make_room(wanted.max(weight_bytes))?;
        let target = self.target();
        let mut temporary = target.clone().into_os_string();
        temporary.push(format!(".{}{UNFINISHED}", Uuid::new_v4().simple()));
        SnapshotWriter::begin(self.owner.clone(), slots, temporary.into(), target)
    }

    /// Removes what dead writers left.
    fn remove_abandoned(&self) {
        for path in files(&self.folder, UNFINISHED) {
            if is_abandoned(&path, self.settings.abandoned_after) {
                tracing::info!(path = %path.display(), "an unfinished snapshot of a dead writer is removed");
                let _ = std::fs::remove_file(path);
            }
        }
    }

    /// Removes snapshots of the same checkpoint and encoding as it was before.
    fn remove_old(&self) {
        let target = self.target();
        for path in files(&self.folder, ENDING) {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if path != target && name.starts_with(&self.beginning) {
                tracing::info!(path = %path.display(), "the checkpoint has changed: its old snapshot is removed");
                let _ = std::fs::remove_file(path);
            }
        }
    }

    /// Removes the longest unused snapshots until `wanted` more bytes stay below the bound, and refuses what the volume has no room for.
    fn make_room(&self, wanted: u64) -> Result<()> {
        if let Some(bound) = self.settings.largest_folder {
            let mut others: Vec<(SystemTime, u64, PathBuf)> = files(&self.folder, ENDING)
                .into_iter()
                .filter_map(|path| {
                    let facts = std::fs::metadata(&path).ok()?;
                    Some((facts.modified().ok()?, facts.len(), path))
                })
                .collect();
            others.sort();
            let mut held: u64 = others.iter().map(|(_, bytes, _)| bytes).sum();
            for (_, bytes, path) in others {
                if held + wanted <= bound {
                    break;
                }
                tracing::info!(path = %path.display(), "the longest unused snapshot is removed to make room");
                if std::fs::remove_file(&path).is_ok() {
                    held -= bytes;
                }
            }
            if held + wanted > bound {
                return Err(no_room(
                    &self.folder,
                    wanted,
                    bound,
                    "the bound model.snapshot_limit_bytes",
                ));
            }
        }
        match free_bytes(&self.folder) {
            Some(free) if free < wanted => Err(no_room(&self.folder, wanted, free, "what is free on the volume")),
            _ => Ok(()),
        }
    }
}

fn no_room(folder: &Path, wanted: u64, there: u64, what: &str) -> Failure {
    Failure::platform(
        "SNAPSHOT_NOT_WRITTEN",
        format!("The snapshot of the quantised weights needs {wanted} bytes, but {what} is {there}"),
    )
    .at(folder.display().to_string())
    .hint("Free space on the volume, or remove snapshots with `brightrun snapshot rm`")
}

/// Bytes that this process may still write to the file system of a folder.
pub fn free_bytes(folder: &Path) -> Option<u64> {
    let facts = rustix::fs::statvfs(folder).ok()?;
    Some(facts.f_bavail.saturating_mul(facts.f_frsize))
}

/// Whether nobody writes to an unfinished file any more: its lock is free, and its last write is long ago.
fn is_abandoned(path: &Path, after: Duration) -> bool {
    let Ok(file) = File::open(path) else { return false };
    if matches!(file.try_lock(), Err(TryLockError::WouldBlock)) {
        return false;
    }
    let silence = file
        .metadata()
        .and_then(|facts| facts.modified())
        .ok()
        .and_then(|time| SystemTime::now().duration_since(time).ok());
    silence.is_some_and(|silence| silence >= after)
}

fn files(folder: &Path, ending: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut paths: Vec<PathBuf> = entries
        .map(|entry| entry.path())
        .filter(|path| {
            path.file_name()
                .is_some_and(|name| name.to_string_lossy().ends_with(ending))
        })
        .collect();
    paths.sort();
    paths
}

/// Every snapshot in a folder, finished or not, with its state.
pub fn listed(folder: &Path) -> Vec<Listed> {
    let mut list = Vec::new();
    for path in [files(folder, ENDING), files(folder, UNFINISHED)].concat() {
        let Ok(facts) = std::fs::metadata(&path) else { continue };
        let unused = facts.modified().ok().and_then(|time| time.elapsed().ok());
        let is_finished = path.extension().is_some_and(|ending| ending == &ENDING[1..]);
        let opened = is_finished.then(|| Snapshot::open(&path));
        let table = match &opened {
            Some(Ok(snapshot)) => Some(snapshot.table()),
            _ => None,
        };
        list.push(Listed {
            name: path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            bytes: facts.len(),
            unused_seconds: unused.map_or(0, |time| time.as_secs()),
            encoding: table.map(|table| table.encoding.clone()),
            checkpoint: table.map(|table| table.checkpoint.clone()),
            state: match &opened {
                None => "unfinished",
                Some(Err(_)) => "damaged",
                Some(Ok(snapshot)) => state_of(snapshot),
            },
            path,
        });
    }
    list
}

/// Whether a whole snapshot still belongs to its checkpoint.
fn state_of(snapshot: &Snapshot) -> &'static str {
    let table = snapshot.table();
    let encoding = [Encoding::Nf4, Encoding::Nf4Experts]
        .into_iter()
        .find(|encoding| encoding.name() == table.encoding);
    match encoding.map(|encoding| format::identity(Path::new(&table.checkpoint), encoding)) {
        Some(Ok((identity, _))) if identity == table.identity => "valid",
        Some(Ok(_)) => "stale",
        _ => "unknown",
    }
}
