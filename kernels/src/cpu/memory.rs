//! The CPU backend's memory pool: blocks of exact sizes, kept for the next tensor of the same size.
//!
//! A training step allocates the same sizes in the same order every time, so after the first step nothing comes from the
//! system. Batches differ in length, though, and a free block of last batch's size is of no use to this one: before the pool
//! asks the system for a new block it gives back free ones until what it holds would not exceed the peak of live tensors.
//! So `reserved_bytes ≤ peak_bytes`, always, up to rounding to whole cache lines, or pages in large blocks.
//!
//! Large blocks are mapped: they begin at a page, so a file can be read into them past the page cache, and no thread has to touch
//! them all before the first write. A vector of lines is cleared by the one thread that asks for it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytemuck::{Pod, Zeroable};
use memmap2::MmapMut;

use crate::error::{Error, Result, WORKING_MEMORY};
use crate::ops::MemoryStats;

/// The unit of allocation: a cache line, which is also the widest vector register.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
pub(super) struct Line([u8; 64]);

const LINE_BYTES: usize = size_of::<Line>();

/// Blocks from this size on are mapped.
const MAPPED_FROM: usize = 1 << 20;

/// The unit of mapped blocks.
const PAGE_BYTES: usize = 4096;

/// Memory from the system.
enum Block {
    Lines(Vec<Line>),
    Pages(MmapMut),
}

impl Block {
    /// Bytes of the block that serves a request for `bytes`: blocks of equal size serve each other's requests.
    fn size(bytes: usize) -> usize {
        bytes.next_multiple_of(if bytes < MAPPED_FROM { LINE_BYTES } else { PAGE_BYTES })
    }

    /// A block of `size` bytes, as [`Block::size`] gives it; `None` when the system has no such memory.
    fn new(size: usize) -> Option<Self> {
        match size < MAPPED_FROM {
            true => bytemuck::allocation::try_zeroed_vec(size / LINE_BYTES)
                .ok()
                .map(Self::Lines),
            false => MmapMut::map_anon(size).ok().map(Self::Pages),
        }
    }

    fn bytes(&self) -> &[u8] {
        match self {
            Self::Lines(lines) => bytemuck::cast_slice(lines),
            Self::Pages(pages) => pages,
        }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        match self {
            Self::Lines(lines) => bytemuck::cast_slice_mut(lines),
            Self::Pages(pages) => pages,
        }
    }
}

/// Storage of one tensor on the host, aligned to 64 bytes, and to 4096 if it has [`MAPPED_FROM`] bytes or more.
pub struct Buffer {
    block: Block,
    bytes: usize,
    pool: Arc<Pool>,
}

impl Buffer {
    pub(super) fn bytes(&self) -> &[u8] {
        &self.block.bytes()[..self.bytes]
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.block.bytes_mut()[..self.bytes]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.pool
            .put_back(std::mem::replace(&mut self.block, Block::Lines(Vec::new())));
    }
}

/// Free blocks by size, and counters.
#[derive(Default)]
pub(super) struct Pool {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Free blocks by their size. Every list is non-empty.
    free: BTreeMap<usize, Vec<Block>>,
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
        let size = Block::size(bytes);
        let mut state = self.state();
        let block = match state.take_free(size) {
            Some(block) => block,
            None => {
                state.make_room(size);
                let block = Block::new(size).ok_or(Error::OutOfMemory {
                    backend: "cpu",
                    wanted: WORKING_MEMORY.to_owned(),
                    requested_bytes: bytes as u64,
                    in_use_bytes: state.in_use as u64,
                })?;
                state.reserved += size;
                block
            }
        };
        state.in_use += size;
        state.peak = state.peak.max(state.in_use);
        state.lifetime_peak = state.lifetime_peak.max(state.in_use);
        Ok(Buffer {
            block,
            bytes,
            pool: Arc::clone(self),
        })
    }

    fn put_back(&self, block: Block) {
        let size = block.bytes().len();
        let mut state = self.state();
        state.in_use -= size;
        if size > 0 {
            state.free.entry(size).or_default().push(block);
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
    fn take_free(&mut self, size: usize) -> Option<Block> {
        if size == 0 {
            return Some(Block::Lines(Vec::new()));
        }
        let blocks = self.free.get_mut(&size)?;
        let block = blocks.pop();
        if blocks.is_empty() {
            self.free.remove(&size);
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
                self.reserved -= block.bytes().len();
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
    fn large_blocks_begin_at_a_page_and_are_served_again() {
        let pool = Arc::new(Pool::default());
        let mut first = pool.take(MAPPED_FROM + 5).unwrap();
        assert_eq!(first.bytes().as_ptr().align_offset(PAGE_BYTES), 0);
        first.bytes_mut().fill(3);
        assert_eq!(
            (first.bytes().len(), first.bytes()[MAPPED_FROM + 4]),
            (MAPPED_FROM + 5, 3)
        );
        let address = first.bytes().as_ptr();
        drop(first);
        assert_eq!(pool.take(MAPPED_FROM + 1).unwrap().bytes().as_ptr(), address);
        assert_eq!(pool.stats().reserved_bytes, (MAPPED_FROM + PAGE_BYTES) as u64);
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
