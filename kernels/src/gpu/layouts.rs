//! What kernels must know of packed documents, kept on the device: tiles, chunks, offsets.
//!
//! All layers of a pass ask for the same tables, so a table is made once for each batch. It has a place for each *shape* of a
//! batch, which is its number of tokens and of documents, and a length that no batch of that shape exceeds; entries beyond what the
//! documents need are zeros, which kernels pass over. So the launches of two batches of one shape differ in nothing but the
//! contents of these tables, and those are rewritten in place: that is what lets a recording run for another batch.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::operands::too_many_tokens;
use super::{Gpu, Runtime};
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::DELTA_CHUNK;
use crate::tensor::{Segments, Tensor};

/// Tables that nobody uses are given up beyond so many.
const MOST_TABLES: usize = 256;

/// What a table holds, all i32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Table {
    /// `[documents + 1]`: the offsets themselves.
    Offsets,
    /// `[n, 5]`: attention's tiles of so many rows of queries, those with most work first (`attention.cuh`).
    QueryTiles(usize),
    /// The same of keys.
    KeyTiles(usize),
    /// `[n, 2]`: first row and rows of each of the delta rule's chunks.
    Chunks,
    /// `[documents, 3]`: first row, end and first chunk of each document.
    ChunkedDocuments,
}

/// The numbers of an attention tile, as `attention.cuh` reads them.
const TILE_FIELDS: usize = 5;

impl Table {
    /// Rows that no documents of so many tokens (queries, keys) need more of, and the length of one.
    fn extents(self, tokens: [usize; 2], documents: usize) -> [usize; 2] {
        let most = |tokens: usize, rows: usize| tokens / rows + documents;
        match self {
            Self::Offsets => [documents + 1, 1],
            Self::QueryTiles(rows) => [most(tokens[0], rows), TILE_FIELDS],
            Self::KeyTiles(rows) => [most(tokens[1], rows), TILE_FIELDS],
            Self::Chunks => [most(tokens[0], DELTA_CHUNK), 2],
            Self::ChunkedDocuments => [documents, 3],
        }
    }

    /// The entries for these documents, whose rows fit an i32.
    fn contents(self, [queries, keys]: [&Segments; 2]) -> Vec<usize> {
        match self {
            Self::Offsets => queries.offsets().to_vec(),
            Self::QueryTiles(rows) => tiles([queries, keys], rows, false),
            Self::KeyTiles(rows) => tiles([queries, keys], rows, true),
            Self::Chunks => chunks(queries).flat_map(|[first, rows, _]| [first, rows]).collect(),
            Self::ChunkedDocuments => chunked_documents(queries),
        }
    }
}

/// Every tile of `rows` rows of one side of the documents. Those with most work come first; since no tile depends on another, their
/// order changes no bit of any result.
fn tiles([queries, keys]: [&Segments; 2], rows: usize, of_keys: bool) -> Vec<usize> {
    let mut tiles = Vec::new();
    for (queries, keys) in queries.ranges().zip(keys.ranges()) {
        let extra = keys.len() - queries.len();
        let length = if of_keys { keys.len() } else { queries.len() };
        for first in (0..length).step_by(rows) {
            let work = if of_keys { length - first } else { first + extra };
            tiles.push((work, [queries.start, queries.len(), keys.start, keys.len(), first]));
        }
    }
    tiles.sort_by_key(|(work, _)| std::cmp::Reverse(*work));
    tiles.into_iter().flat_map(|(_, tile)| tile).collect()
}

/// First row, rows and document of every chunk.
fn chunks(segments: &Segments) -> impl Iterator<Item = [usize; 3]> {
    segments.ranges().enumerate().flat_map(|(document, rows)| {
        let end = rows.end;
        let firsts = rows.step_by(DELTA_CHUNK);
        firsts.map(move |first| [first, DELTA_CHUNK.min(end - first), document])
    })
}

fn chunked_documents(segments: &Segments) -> Vec<usize> {
    let mut before = 0;
    let mut documents = Vec::new();
    for rows in segments.ranges() {
        documents.extend([rows.start, rows.end, before]);
        before += rows.len().div_ceil(DELTA_CHUNK);
    }
    documents
}

/// A table and the shape of the batches it is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    table: Table,
    /// Of queries and of keys.
    tokens: [usize; 2],
    documents: usize,
}

struct Entry<R: Runtime> {
    tensor: Arc<Tensor<Gpu<R>>>,
    /// The documents it is of now.
    of: [Segments; 2],
    /// Recordings that were given its address.
    recordings: usize,
    last_use: u64,
}

/// All tables of a device.
pub(super) struct Layouts<R: Runtime> {
    state: Mutex<State<R>>,
}

struct State<R: Runtime> {
    entries: HashMap<Key, Entry<R>>,
    uses: u64,
}

impl<R: Runtime> Layouts<R> {
    pub(super) fn new() -> Self {
        Self {
            state: Mutex::new(State {
                entries: HashMap::new(),
                uses: 0,
            }),
        }
    }

    /// The table is whole after every statement, so a poisoned lock is still good.
    fn state(&self) -> MutexGuard<'_, State<R>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<R: Runtime> Gpu<R> {
    /// A table for these documents, and how many rows it has, used or not.
    pub(super) fn layout(&self, table: Table, of: [&Segments; 2]) -> Result<Arc<Tensor<Self>>> {
        for segments in of {
            if i32::try_from(segments.tokens()).is_err() {
                return Err(too_many_tokens(segments));
            }
        }
        let key = Key {
            table,
            tokens: of.map(Segments::tokens),
            documents: of[0].len(),
        };
        let mut state = self.inner.layouts.state();
        state.uses += 1;
        let now = state.uses;
        if let Some(entry) = state.entries.get_mut(&key) {
            entry.last_use = now;
            let is_same = entry.of.iter().zip(of).all(|(has, wanted)| has == wanted);
            // Whoever else has it now is about to launch with what it holds.
            if !is_same && Arc::strong_count(&entry.tensor) > 1 {
                return Ok(Arc::new(self.table(key, of)?));
            }
            if !is_same {
                self.rewrite(key, entry, of)?;
            }
            self.tape().uses(key);
            return Ok(Arc::clone(&entry.tensor));
        }
        let tensor = Arc::new(self.table(key, of)?);
        state.forget_the_oldest();
        let entry = Entry {
            tensor: Arc::clone(&tensor),
            of: of.map(Clone::clone),
            recordings: 0,
            last_use: now,
        };
        state.entries.insert(key, entry);
        Ok(tensor)
    }

    /// Brings every table of the shape of these documents up to date.
    pub(super) fn refresh(&self, segments: &Segments) -> Result<()> {
        let mut state = self.inner.layouts.state();
        for (key, entry) in &mut state.entries {
            let is_of_shape = key.tokens == [segments.tokens(); 2] && key.documents == segments.len();
            if is_of_shape && entry.of.iter().any(|has| has != segments) {
                self.rewrite(*key, entry, [segments; 2])?;
            }
        }
        Ok(())
    }

    /// Recordings hold on to these tables (`more`), or let go of them.
    pub(super) fn pin(&self, keys: &[Key], more: bool) {
        let mut state = self.inner.layouts.state();
        for key in keys {
            if let Some(entry) = state.entries.get_mut(key) {
                entry.recordings = match more {
                    true => entry.recordings + 1,
                    false => entry.recordings.saturating_sub(1),
                };
            }
        }
    }

    fn table(&self, key: Key, of: [&Segments; 2]) -> Result<Tensor<Self>> {
        let [rows, fields] = key.table.extents(key.tokens, key.documents);
        let tensor = self.alloc_lasting(DType::I32, [rows, fields])?;
        tensor.buffer().write(0, bytemuck::cast_slice(&entries(key, of)))?;
        Ok(tensor)
    }

    fn rewrite(&self, key: Key, entry: &mut Entry<R>, of: [&Segments; 2]) -> Result<()> {
        let bytes = entries(key, of);
        entry.tensor.buffer().write(0, bytemuck::cast_slice(&bytes))?;
        entry.of = of.map(Clone::clone);
        Ok(())
    }
}

/// A table's contents, with zeros where its shape has more room than these documents need.
fn entries(key: Key, of: [&Segments; 2]) -> Vec<i32> {
    let [rows, fields] = key.table.extents(key.tokens, key.documents);
    let contents = key.table.contents(of);
    debug_assert!(
        contents.len() <= rows * fields,
        "{key:?} has {} numbers",
        contents.len()
    );
    // No number exceeds that of the tokens, which fits.
    let mut entries: Vec<i32> = contents.into_iter().map(|number| number as i32).collect();
    entries.resize(rows * fields, 0);
    entries
}

impl<R: Runtime> State<R> {
    fn forget_the_oldest(&mut self) {
        if self.entries.len() < MOST_TABLES {
            return;
        }
        let free = self
            .entries
            .iter()
            .filter(|(_, entry)| entry.recordings == 0 && Arc::strong_count(&entry.tensor) == 1);
        if let Some(oldest) = free.min_by_key(|(_, entry)| entry.last_use).map(|(key, _)| *key) {
            self.entries.remove(&oldest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_documents_of_a_shape_need_more_entries_than_its_tables_have() {
        for lengths in [vec![1; 40], vec![40], vec![0, 33, 0, 7], vec![31, 9], vec![0; 4]] {
            let segments = Segments::from_lengths(lengths);
            for table in [
                Table::Offsets,
                Table::QueryTiles(32),
                Table::KeyTiles(16),
                Table::Chunks,
                Table::ChunkedDocuments,
            ] {
                let [rows, fields] = table.extents([segments.tokens(); 2], segments.len());
                let contents = table.contents([&segments; 2]);
                assert!(contents.len() <= rows * fields, "{table:?} of {segments:?}");
                assert_eq!(contents.len() % fields, 0);
            }
        }
    }

    #[test]
    fn chunks_are_counted_through_all_documents() {
        let segments = Segments::from_lengths([70, 0, 64, 1]);
        let of = [&segments; 2];
        assert_eq!(Table::Chunks.contents(of), [0, 64, 64, 6, 70, 64, 134, 1]);
        let documents = [0, 70, 0, 70, 70, 2, 70, 134, 2, 134, 135, 3];
        assert_eq!(Table::ChunkedDocuments.contents(of), documents);
    }
}
