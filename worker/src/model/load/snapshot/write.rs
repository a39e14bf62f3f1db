//! Writing a snapshot while the model is being loaded: each weight as soon as it is whole, at the place it will have.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use brightrun_kernels::Backend;

use super::format::{self, Head, PIECE_BYTES, SectionRecord, Table, WeightRecord};
use crate::error::{Failure, Result};
use crate::model::load::store::{Slot, Store};

/// Where a snapshot's bytes go: a file, or a test's disk that fills up.
pub trait Disk: Send + Sync {
    /// Writes all of `bytes` at `offset`.
    ///
    /// # Errors
    /// The system's own.
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;

    /// Waits until everything is on the disk.
    ///
    /// # Errors
    /// The system's own.
    fn sync(&self) -> io::Result<()>;
}

impl Disk for File {
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.write_all_at(bytes, offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_all()
    }
}

/// Who the snapshot belongs to, for its table.
#[derive(Clone, Debug)]
pub struct Owner {
    /// See [`format::identity`].
    pub identity: String,
    /// The checkpoint's folder.
    pub checkpoint: String,
    /// The encoding's name.
    pub encoding: String,
}

/// A snapshot that is being written. Dropped before [`SnapshotWriter::finish`] it leaves nothing behind.
pub struct SnapshotWriter {
    owner: Owner,
    disk: Box<dyn Disk>,
    temporary: PathBuf,
    target: PathBuf,
    slots: Vec<Slot>,
    offsets: Vec<Vec<u64>>,
    end: u64,
    state: Mutex<State>,
    is_finished: bool,
}

#[derive(Default)]
struct State {
    records: Vec<Option<WeightRecord>>,
    /// The first failure; after it nothing more is written.
    failed: Option<Failure>,
}

impl SnapshotWriter {
    /// Begins a snapshot of these weights in `folder`. The file is locked while this lives, so that others see a living writer.
    ///
    /// # Errors
    /// `SNAPSHOT_NOT_WRITTEN` when the file cannot be made.
    pub fn begin(owner: Owner, slots: &[Slot], temporary: PathBuf, target: PathBuf) -> Result<Self> {
        let (_, end) = format::layout(slots);
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(&temporary)
            .map_err(|error| not_written(&temporary, &error))?;
        // A volume without locks is no reason to do without a snapshot.
        let _ = file.try_lock();
        if let Err(error) = reserve(&file, end) {
            let _ = std::fs::remove_file(&temporary);
            return Err(not_written(&temporary, &error));
        }
        Ok(Self::on(owner, slots, Box::new(file), temporary, target))
    }

    /// As [`SnapshotWriter::begin`], on a disk that is open already.
    pub fn on(owner: Owner, slots: &[Slot], disk: Box<dyn Disk>, temporary: PathBuf, target: PathBuf) -> Self {
        let (offsets, end) = format::layout(slots);
        Self {
            owner,
            disk,
            temporary,
            target,
            slots: slots.to_vec(),
            offsets,
            end,
            state: Mutex::new(State {
                records: slots.iter().map(|_| None).collect(),
                failed: None,
            }),
            is_finished: false,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes a weight that is whole. A failure is kept for [`SnapshotWriter::finish`]; the load goes on.
    pub fn write<B: Backend>(&self, device: &B, place: usize, store: &Store<B>) {
        if self.state().failed.is_some() {
            return;
        }
        let written = self.written(device, place, store);
        let mut state = self.state();
        match written {
            Ok(record) => {
                if let Some(slot) = state.records.get_mut(place) {
                    *slot = Some(record);
                }
            }
            Err(failure) => {
                state.failed.get_or_insert(failure);
            }
        }
    }

    fn written<B: Backend>(&self, device: &B, place: usize, store: &Store<B>) -> Result<WeightRecord> {
        let cell = store.cell(place);
        let (Some(value), Some(slot), Some(offsets)) = (&cell.value, self.slots.get(place), self.offsets.get(place))
        else {
            return Err(incomplete(&self.target, "a weight is not there"));
        };
        let mut sections = Vec::new();
        let mut buffer = vec![0; PIECE_BYTES.min(slot.form.size_bytes() as usize)];
        for (tensor, offset) in value.sections().into_iter().zip(offsets) {
            let size = tensor.size_bytes();
            let mut hashes = Vec::new();
            for first in (0..size).step_by(PIECE_BYTES) {
                let piece = &mut buffer[..PIECE_BYTES.min(size - first)];
                device.read_at(tensor, first, piece)?;
                hashes.push(format::piece_hash(piece));
                self.disk
                    .write_at(piece, offset + first as u64)
                    .map_err(|error| not_written(&self.target, &error))?;
            }
            sections.push(SectionRecord {
                offset: *offset,
                hashes,
            });
        }
        Ok(WeightRecord {
            slot: slot.clone(),
            offset_bits: value.offset().to_bits(),
            sections,
        })
    }

    /// Writes the table and the head, waits for the disk, and puts the file in its place.
    ///
    /// # Errors
    /// `SNAPSHOT_NOT_WRITTEN` when anything of it could not be written; nothing is left behind then.
    pub fn finish(mut self, weights_digest: &str) -> Result<PathBuf> {
        let state = std::mem::take(&mut *self.state());
        if let Some(failure) = state.failed {
            return Err(failure);
        }
        let records: Option<Vec<WeightRecord>> = state.records.into_iter().collect();
        let Some(weights) = records else {
            return Err(incomplete(&self.target, "not every weight was written"));
        };
        let table = Table {
            identity: self.owner.identity.clone(),
            checkpoint: self.owner.checkpoint.clone(),
            encoding: self.owner.encoding.clone(),
            program: env!("CARGO_PKG_VERSION").to_owned(),
            weights_digest: weights_digest.to_owned(),
            weights,
        };
        let table = serde_json::to_vec(&table).map_err(|error| incomplete(&self.target, &error.to_string()))?;
        let head = Head {
            table_offset: self.end,
            table_length: table.len() as u64,
            table_hash: format::table_hash(&table),
        };
        self.put_in_place(&table, &head)
            .map_err(|error| not_written(&self.target, &error))?;
        self.is_finished = true;
        Ok(self.target.clone())
    }

    fn put_in_place(&self, table: &[u8], head: &Head) -> io::Result<()> {
        self.disk.write_at(table, self.end)?;
        self.disk.write_at(&head.encoded(), 0)?;
        self.disk.sync()?;
        std::fs::rename(&self.temporary, &self.target)?;
        match self.target.parent() {
            Some(folder) => File::open(folder)?.sync_all(),
            None => Ok(()),
        }
    }
}

impl Drop for SnapshotWriter {
    fn drop(&mut self) {
        if !self.is_finished {
            let _ = std::fs::remove_file(&self.temporary);
        }
    }
}

/// Asks the file system for all the room at once, so that a full disk is known before an hour of work; where it has no such request
/// the writes themselves will tell.
fn reserve(file: &File, bytes: u64) -> io::Result<()> {
    use rustix::io::Errno;
    match rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), 0, bytes) {
        Err(Errno::NOSPC) => Err(Errno::NOSPC.into()),
        Err(Errno::DQUOT) => Err(Errno::DQUOT.into()),
        _ => Ok(()),
    }
}

/// Why there is no snapshot, from the system's error.
pub(super) fn not_written(path: &Path, error: &io::Error) -> Failure {
    let hint = match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "Free space on the volume, or remove snapshots with `brightrun snapshot rm`"
        }
        io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied => {
            "Make the volume writable, or name another folder in model.snapshot_folder"
        }
        _ => "Check the volume; every start quantises again until a snapshot can be written",
    };
    Failure::platform(
        "SNAPSHOT_NOT_WRITTEN",
        format!("The snapshot of the quantised weights cannot be written: {error}"),
    )
    .at(path.display().to_string())
    .hint(hint)
}

fn incomplete(path: &Path, what: &str) -> Failure {
    Failure::system(
        "SNAPSHOT_NOT_WRITTEN",
        format!("The snapshot of the quantised weights is not complete: {what}"),
    )
    .at(path.display().to_string())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use brightrun_kernels::DType;
    use brightrun_kernels::cpu::Cpu;
    use brightrun_kernels::ops::Device;

    use super::*;
    use crate::model::load::store::{Form, Value};

    /// A disk with room for a number of writes.
    struct Filling {
        left: Arc<AtomicUsize>,
        kind: io::ErrorKind,
    }

    impl Disk for Filling {
        fn write_at(&self, _: &[u8], _: u64) -> io::Result<()> {
            match self
                .left
                .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1))
            {
                Ok(_) => Ok(()),
                Err(_) => Err(self.kind.into()),
            }
        }

        fn sync(&self) -> io::Result<()> {
            self.write_at(&[], 0)
        }
    }

    fn slots(count: usize) -> Vec<Slot> {
        let slot = |place| Slot {
            key: format!("weight {place}"),
            form: Form::Dense {
                dtype: DType::F32,
                shape: vec![4],
            },
            parts: 1,
        };
        (0..count).map(slot).collect()
    }

    /// A write for each of three weights, the table, the head, and the wait for the disk.
    #[test]
    fn wherever_the_disk_fills_up_the_reason_is_told_and_no_file_is_left() {
        let device = Cpu::new(Some(1)).unwrap();
        for (room, kind, hint) in (0..6).flat_map(|room| {
            [
                (room, io::ErrorKind::StorageFull, "Free space"),
                (room, io::ErrorKind::ReadOnlyFilesystem, "writable"),
            ]
        }) {
            let folder = tempfile::tempdir().unwrap();
            let (temporary, target) = (folder.path().join("x.part"), folder.path().join("x.snapshot"));
            std::fs::write(&temporary, "").unwrap();
            let owner = Owner {
                identity: "id".to_owned(),
                checkpoint: "folder".to_owned(),
                encoding: "nf4".to_owned(),
            };
            let disk = Filling {
                left: Arc::new(AtomicUsize::new(room)),
                kind,
            };
            let mut store = Store::new(slots(3));
            for place in 0..3 {
                let tensor = device.upload_f32([4], &[1.0; 4]).unwrap();
                store.put(place, Value::Dense(tensor));
            }
            let writer = SnapshotWriter::on(owner, &slots(3), Box::new(disk), temporary, target);
            for place in 0..3 {
                writer.write(&device, place, &store);
            }
            let failure = writer.finish("digest").unwrap_err();
            assert_eq!(failure.code, "SNAPSHOT_NOT_WRITTEN");
            assert!(failure.hint.contains(hint), "{failure}");
            assert_eq!(
                std::fs::read_dir(folder.path()).unwrap().count(),
                0,
                "room for {room} writes"
            );
        }
    }

    #[test]
    fn a_snapshot_that_lacks_a_weight_is_never_put_in_its_place() {
        let device = Cpu::new(Some(1)).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let owner = Owner {
            identity: "id".to_owned(),
            checkpoint: "folder".to_owned(),
            encoding: "nf4".to_owned(),
        };
        let (temporary, target) = (folder.path().join("x.part"), folder.path().join("x.snapshot"));
        let writer = SnapshotWriter::begin(owner, &slots(2), temporary, target).unwrap();
        let mut store = Store::new(slots(2));
        store.put(0, Value::Dense(device.upload_f32([4], &[1.0; 4]).unwrap()));
        writer.write(&device, 0, &store);
        assert_eq!(writer.finish("digest").unwrap_err().code, "SNAPSHOT_NOT_WRITTEN");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
