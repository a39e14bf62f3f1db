//! Reading a snapshot back: every piece is compared with its hash before the model sees it.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use brightrun_kernels::{Backend, Shape, Tensor};

use super::format::{self, ALIGNMENT, Head, PIECE_BYTES, Table, WeightRecord};
use crate::error::{Failure, Result};
use crate::model::load::store::{Store, Value};
use crate::model::load::stream::{self, Input, Limits, Place, Stretch, Wanted};
use crate::model::load::{LoadProgress, LoadSource};

/// Longest table that is read: that of a model with a hundred thousand weights is shorter.
const LONGEST_TABLE: u64 = 256 << 20;

/// An open snapshot whose table has been checked.
#[derive(Debug)]
pub struct Snapshot {
    file: File,
    path: PathBuf,
    table: Table,
}

/// Pieces of so many bytes and more are read to their place.
const ALONE_FROM: usize = 1 << 20;

/// A piece of a section.
struct Piece<'a> {
    wanted: Wanted,
    weight: usize,
    section: usize,
    first: usize,
    hash: &'a str,
}

/// What is done with the bytes of the piece of this number; whether they lie in their place already.
type PieceWork<'a> = dyn Fn(usize, &[u8], bool) -> Result<()> + Sync + 'a;

impl Snapshot {
    /// Opens a snapshot and checks head, table, and that every section lies inside the file with the length its form asks for.
    ///
    /// # Errors
    /// `SNAPSHOT_DAMAGED`.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|error| damaged(path, &format!("it cannot be opened: {error}")))?;
        let unreadable = |error: std::io::Error| damaged(path, &format!("it cannot be read: {error}"));
        let length = file.metadata().map_err(unreadable)?.len();
        let mut head = vec![0; ALIGNMENT as usize];
        file.read_exact_at(&mut head, 0).map_err(unreadable)?;
        let head = Head::decoded(&head).ok_or_else(|| damaged(path, "its head is not one of this version"))?;
        let ends = head.table_offset.checked_add(head.table_length);
        if ends != Some(length) || head.table_length > LONGEST_TABLE {
            return Err(damaged(
                path,
                &format!("it has {length} bytes, other than its head says"),
            ));
        }
        let mut table = vec![0; head.table_length as usize];
        file.read_exact_at(&mut table, head.table_offset).map_err(unreadable)?;
        if format::table_hash(&table) != head.table_hash {
            return Err(damaged(path, "its table is not what was written"));
        }
        let table: Table = serde_json::from_slice(&table)
            .map_err(|error| damaged(path, &format!("its table is not valid: {error}")))?;
        let snapshot = Self {
            file,
            path: path.to_owned(),
            table,
        };
        snapshot.check_sections(head.table_offset)?;
        Ok(snapshot)
    }

    fn check_sections(&self, end: u64) -> Result<()> {
        for weight in &self.table.weights {
            let forms = weight.slot.form.sections();
            let fits = forms.len() == weight.sections.len()
                && forms.iter().zip(&weight.sections).all(|(form, section)| {
                    let size = form.size_bytes();
                    section.offset.is_multiple_of(ALIGNMENT)
                        && section.offset.checked_add(size as u64).is_some_and(|last| last <= end)
                        && section.hashes.len() == size.div_ceil(PIECE_BYTES)
                });
            if !fits {
                return Err(damaged(
                    &self.path,
                    &format!("the weight `{}` does not fit its place", weight.slot.key),
                ));
            }
        }
        Ok(())
    }

    /// Its table.
    pub fn table(&self) -> &Table {
        &self.table
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The part of the model's fingerprint that depends on the weights.
    pub fn weights_digest(&self) -> &str {
        &self.table.weights_digest
    }

    /// Bytes of all weights.
    pub fn bytes(&self) -> u64 {
        self.pieces().iter().map(|piece| piece.wanted.length as u64).sum()
    }

    /// Everything, in the order of the file.
    fn pieces(&self) -> Vec<Piece<'_>> {
        let mut pieces = Vec::new();
        for (weight, record) in self.table.weights.iter().enumerate() {
            let sections = record.slot.form.sections();
            for (section, (form, place)) in sections.iter().zip(&record.sections).enumerate() {
                let size = form.size_bytes();
                for (first, hash) in (0..size).step_by(PIECE_BYTES).zip(&place.hashes) {
                    pieces.push(Piece {
                        wanted: Wanted {
                            file: 0,
                            offset: place.offset + first as u64,
                            length: PIECE_BYTES.min(size - first),
                        },
                        weight,
                        section,
                        first,
                        hash,
                    });
                }
            }
        }
        pieces.sort_by_key(|piece| piece.wanted.offset);
        pieces
    }

    /// Reads every piece, to its place where `places` has one for each, compares it with its hash and gives it to `work`, which is
    /// told whether the bytes lie in their place already.
    fn stream(
        &self,
        pieces: &[Piece<'_>],
        places: &[Place<'_>],
        limits: Limits,
        progress: &mut dyn FnMut(LoadProgress),
        work: &PieceWork<'_>,
    ) -> Result<u64> {
        let file = self.file.try_clone();
        let inputs = [Input {
            file: file.map_err(|error| damaged(&self.path, &format!("it cannot be read: {error}")))?,
            path: self.path.clone(),
        }];
        let wanted: Vec<Wanted> = pieces.iter().map(|piece| piece.wanted).collect();
        let mut state = LoadProgress {
            tensors: 0,
            tensors_total: self.table.weights.len(),
            bytes: 0,
            bytes_total: wanted.iter().map(|wanted| wanted.length as u64).sum(),
            source: LoadSource::Snapshot,
        };
        let checked = |stretch: &Stretch, bytes: &[u8], in_place: bool| {
            for index in stretch.pieces.clone() {
                let piece = &pieces[index];
                let from = (piece.wanted.offset - stretch.place.offset) as usize;
                let bytes = &bytes[from..from + piece.wanted.length];
                if format::piece_hash(bytes) != piece.hash {
                    return Err(self.damaged_piece(piece));
                }
                work(index, bytes, in_place)?;
            }
            Ok(())
        };
        let alone_from = if places.is_empty() { usize::MAX } else { ALONE_FROM };
        let stretches = stream::merged_below(&wanted, alone_from);
        stream::stream_into(&inputs, &stretches, places, limits, &checked, &mut |stretch| {
            for piece in &pieces[stretch.pieces.clone()] {
                state.bytes += piece.wanted.length as u64;
                state.tensors += usize::from(piece.section == 0 && piece.first == 0);
            }
            progress(state);
        })?;
        Ok(state.bytes_total)
    }

    fn damaged_piece(&self, piece: &Piece<'_>) -> Failure {
        let key = self
            .table
            .weights
            .get(piece.weight)
            .map_or("?", |weight| &weight.slot.key);
        let Wanted { offset, length, .. } = piece.wanted;
        damaged(
            &self.path,
            &format!("{length} bytes at byte {offset}, of the weight `{key}`, are not what was written"),
        )
    }

    /// Reads and compares everything, for nothing but the answer.
    ///
    /// # Errors
    /// `SNAPSHOT_DAMAGED` naming the first damaged place.
    pub fn verify(&self, limits: Limits, progress: &mut dyn FnMut(LoadProgress)) -> Result<u64> {
        self.stream(&self.pieces(), &[], limits, progress, &|_, _, _| Ok(()))
    }

    /// Loads all weights into a backend's memory; with them the number of bytes read.
    ///
    /// # Errors
    /// `SNAPSHOT_DAMAGED`, `MODEL_FILE_DAMAGED`; the backend's own.
    pub fn load<B: Backend>(
        &self,
        device: &B,
        limits: Limits,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<(Store<B>, u64)> {
        let mut rooms = self.rooms(device)?;
        let pieces = self.pieces();
        let bytes = match places(device, &mut rooms, &pieces) {
            Some(places) => self.stream(&pieces, &places, limits, progress, &|index, bytes, in_place| {
                if !in_place && let Some(place) = stream::claimed(&places[index]) {
                    place.copy_from_slice(bytes);
                }
                Ok(())
            })?,
            None => {
                let rooms: Vec<Vec<Mutex<&mut Tensor<B>>>> = rooms
                    .iter_mut()
                    .map(|room| room.iter_mut().map(Mutex::new).collect())
                    .collect();
                self.stream(&pieces, &[], limits, progress, &|index, bytes, _| {
                    let piece = &pieces[index];
                    let room = rooms.get(piece.weight).and_then(|room| room.get(piece.section));
                    let tensor = room.ok_or_else(|| self.damaged_piece(piece))?;
                    let mut tensor = tensor.lock().unwrap_or_else(PoisonError::into_inner);
                    Ok(device.write_at(*tensor, piece.first, bytes)?)
                })?
            }
        };
        let mut store = Store::new(self.table.weights.iter().map(|weight| weight.slot.clone()).collect());
        for (place, (room, record)) in rooms.into_iter().zip(&self.table.weights).enumerate() {
            let value = Value::from_sections(&record.slot.form, room, f32::from_bits(record.offset_bits));
            store.put(
                place,
                value.ok_or_else(|| damaged(&self.path, "a weight is not complete"))?,
            );
        }
        Ok((store, bytes))
    }

    /// Memory for every section of every weight.
    fn rooms<B: Backend>(&self, device: &B) -> Result<Vec<Vec<Tensor<B>>>> {
        let room = |record: &WeightRecord| {
            let sections = record.slot.form.sections();
            sections
                .iter()
                .map(|section| Ok(device.alloc(section.dtype, Shape::new(&section.shape))?))
                .collect()
        };
        self.table.weights.iter().map(room).collect()
    }
}

/// Where each piece shall lie; `None` on a backend whose memory the host cannot write.
fn places<'a, B: Backend>(device: &B, rooms: &'a mut [Vec<Tensor<B>>], pieces: &[Piece<'_>]) -> Option<Vec<Place<'a>>> {
    let mut cuts: BTreeMap<(usize, usize, usize), &'a mut [u8]> = BTreeMap::new();
    for (weight, room) in rooms.iter_mut().enumerate() {
        for (section, tensor) in room.iter_mut().enumerate() {
            let bytes = device.host_bytes(tensor)?;
            for (number, cut) in bytes.chunks_mut(PIECE_BYTES).enumerate() {
                cuts.insert((weight, section, number * PIECE_BYTES), cut);
            }
        }
    }
    let mut cut_of = |piece: &Piece<'_>| {
        cuts.remove(&(piece.weight, piece.section, piece.first))
            .map(|cut| Mutex::new(Some(cut)))
    };
    pieces.iter().map(&mut cut_of).collect()
}

/// What is wrong with a snapshot.
pub(super) fn damaged(path: &Path, what: &str) -> Failure {
    Failure::platform("SNAPSHOT_DAMAGED", format!("The snapshot cannot be used: {what}"))
        .at(path.display().to_string())
        .hint("It is made again from the checkpoint; if this happens often, check the volume")
}
