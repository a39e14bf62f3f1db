//! The CPU backend's memory pool: blocks of exact sizes, kept for the next tensor of the same size.
//!
//! A training step allocates the same sizes in the same order every time, so after the first step nothing comes from the
//! system. Batches differ in length, though, and a free block of last batch's size is of no use to this one: before the pool
//! asks the system for a new block it gives back free ones until what it holds would not exceed the peak of live tensors.
//! So `reserved_bytes ≤ peak_bytes`, always, up to rounding to whole cache lines.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytemuck::{Pod, Zeroable};

use crate::error::{Error, Result};
use crate::ops::MemoryStats;

/// The unit of allocation: a cache line, which is also the widest vector register.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
pub(super) struct Line([u8; 64]);

const LINE_BYTES: usize = size_of::<Line>();

/// Storage of one tensor on the host, aligned to 64 bytes.
pub struct Buffer {
    lines: Vec<Line>,
    bytes: usize,
    pool: Arc<Pool>,
}

impl Buffer {
    pub(super) fn bytes(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.lines)[..self.bytes]
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut bytemuck::cast_slice_mut(&mut self.lines)[..self.bytes]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.pool.put_back(std::mem::take(&mut self.lines));
    }
}

/// Free blocks by size, and counters.
#[derive(Default)]
pub(super) struct Pool {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Free blocks by their number of lines. Every list is non-empty.
    free: BTreeMap<usize, Vec<Vec<Line>>>,
    in_use: usize,
    peak: usize,
    /// The peak since the pool was made, which `reset_peak` leaves alone: it bounds what is kept.
    lifetime_peak: usize,
    reserved: usize,
}

impl Pool {
    /// The counters stay correct whatever a panicking thread did in between, so a poisoned lock is still good.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A block of at least `bytes` bytes with unspecified contents.
    pub(super) fn take(self: &Arc<Self>, bytes: usize) -> Result<Buffer> {
        let count = bytes.div_ceil(LINE_BYTES);
        let size = count * LINE_BYTES;
        let mut state = self.state();
        let lines = match state.take_free(count) {
            Some(lines) => lines,
            None => {
                state.make_room(size);
                let lines = bytemuck::allocation::try_zeroed_vec(count).map_err(|()| Error::OutOfMemory {
                    backend: "cpu",
                    requested_bytes: bytes as u64,
                    in_use_bytes: state.in_use as u64,
                })?;
                state.reserved += size;
                lines
            }
        };
        state.in_use += size;
        state.peak = state.peak.max(state.in_use);
        state.lifetime_peak = state.lifetime_peak.max(state.in_use);
        Ok(Buffer {
            lines,
            bytes,
            pool: Arc::clone(self),
        })
    }

    fn put_back(&self, lines: Vec<Line>) {
        let mut state = self.state();
        state.in_use -= lines.len() * LINE_BYTES;
        if !lines.is_empty() {
            state.free.entry(lines.len()).or_default().push(lines);
        }
    }

    pub(super) fn stats(&self) -> MemoryStats {
        let state = self.state();
        MemoryStats {
            in_use_bytes: state.in_use as u64,
            peak_bytes: state.peak as u64,
            reserved_bytes: state.reserved as u64,
        }
    }

    pub(super) fn reset_peak(&self) {
        let mut state = self.state();
        state.peak = state.in_use;
    }
}

impl State {
    fn take_free(&mut self, count: usize) -> Option<Vec<Line>> {
        if count == 0 {
            return Some(Vec::new());
        }
        let blocks = self.free.get_mut(&count)?;
        let block = blocks.pop();
        if blocks.is_empty() {
            self.free.remove(&count);
        }
        block
    }

    /// Gives free blocks back to the system, largest first, until `size` more bytes stay within the peak.
    fn make_room(&mut self, size: usize) {
        let limit = self.lifetime_peak.max(self.in_use + size);
        while self.reserved + size > limit {
            let Some(mut largest) = self.free.last_entry() else {
                return;
            };
            if let Some(block) = largest.get_mut().pop() {
                self.reserved -= block.len() * LINE_BYTES;
            }
            if largest.get().is_empty() {
                largest.remove();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_freed_block_serves_the_next_request_of_its_size() {
        let pool = Arc::new(Pool::default());
        let first = pool.take(1000).unwrap();
        let address = first.bytes().as_ptr();
        drop(first);
        let second = pool.take(1000).unwrap();
        assert_eq!(second.bytes().as_ptr(), address);
        assert_eq!(pool.stats().reserved_bytes, 1024);
    }

    #[test]
    fn what_is_reserved_never_exceeds_the_peak() {
        let pool = Arc::new(Pool::default());
        for round in 1..50 {
            let blocks: Vec<_> = (1..20)
                .map(|i| pool.take((i * 7919 * round) % 100_000).unwrap())
                .collect();
            drop(blocks);
            let stats = pool.stats();
            assert!(stats.reserved_bytes <= stats.peak_bytes, "{stats:?}");
            assert_eq!(stats.in_use_bytes, 0);
        }
    }

    #[test]
    fn resetting_the_peak_starts_from_what_is_in_use() {
        let pool = Arc::new(Pool::default());
        let kept = pool.take(64).unwrap();
        drop(pool.take(640).unwrap());
        assert_eq!(pool.stats().peak_bytes, 704);
        pool.reset_peak();
        assert_eq!(pool.stats().peak_bytes, 64);
        drop(kept);
    }

    #[test]
    fn an_impossible_request_is_an_error_that_names_its_size() {
        let pool = Arc::new(Pool::default());
        let error = pool.take(1 << 60).err().unwrap();
        assert!(matches!(error, Error::OutOfMemory { requested_bytes, .. } if requested_bytes == 1 << 60));
    }
}
