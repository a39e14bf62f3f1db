//! Snapshots: the quantised weights of a checkpoint, written once beside it, so that the next start reads a quarter as much and
//! quantises nothing.
//!
//! # The file
//!
//! A head of 4 KiB, then every tensor of the loaded model at a multiple of 4 KiB, layer by layer as the model uses them, then a
//! table (JSON) of what lies where. The head names the table's place and hash, the table an XXH3-128 of every 8 MiB piece. The hash is
//! for damage, not for malice: who can write to the volume can write the checkpoint itself.
//!
//! # Promises
//!
//! - A snapshot belongs to one checkpoint (names, lengths and times of all its files, the text of its configuration and index), one
//!   encoding and one version of this format; any difference makes it another file.
//! - Nothing half-written is read: a writer works on a file of its own name and renames it when all of it is on the disk. Two writers
//!   at once both finish; the later rename wins, and both files hold the same.
//! - A damaged snapshot is reported, removed and made again. A volume that is full or read-only costs a warning, never the run.
//! - A dead writer's file is removed by the next writer: its lock is free and nothing has been written to it for a while.

pub mod folder;
pub mod format;
pub mod read;
pub mod write;

use std::path::PathBuf;
use std::time::Duration;

pub use self::folder::{Listed, Snapshots, listed};
pub use self::read::Snapshot;
pub use self::write::SnapshotWriter;

/// Whether and where snapshots are kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotSettings {
    /// Their folder; `.brightrun` in the checkpoint's own where `None`.
    pub folder: Option<PathBuf>,
    /// Checkpoints below this many bytes load in a moment and get none.
    pub smallest_checkpoint: u64,
    /// Most bytes of all snapshots in the folder; the longest unused go first. `None` sets no bound.
    pub largest_folder: Option<u64>,
    /// An unfinished file that nobody has locked is a dead writer's after so long without a write. On volumes whose locks do not
    /// reach other machines this alone tells the living from the dead.
    pub abandoned_after: Duration,
}

impl Default for SnapshotSettings {
    fn default() -> Self {
        Self {
            folder: None,
            smallest_checkpoint: 1 << 30,
            largest_folder: None,
            abandoned_after: Duration::from_secs(15 * 60),
        }
    }
}
