//! The pool of device memory: blocks of exact sizes, kept for the next tensor of the same size.
//!
//! A training step allocates the same sizes in the same order every time, so after the first step nothing is asked of the
//! device. Before the pool asks for a new block it gives back free ones until what it holds would not exceed the peak of live
//! tensors, so `reserved_bytes ≤ peak_bytes` up to rounding; and when the device refuses, it gives back all and asks again.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::Runtime;
use crate::error::{Error, Result};
use crate::ops::MemoryStats;

/// Storage of one tensor on the device.
pub struct Buffer<R: Runtime> {
    /// `None` for no bytes.
    memory: Option<R::Memory>,
    bytes: usize,
    pool: Arc<Pool<R>>,
}

impl<R: Runtime> Buffer<R> {
    /// The block and how much of it the tensor uses; `None` for no bytes.
    pub(super) fn block(&self) -> Option<(&R::Memory, usize)> {
        self.memory.as_ref().map(|memory| (memory, self.bytes))
    }

    pub(super) fn fill(&mut self, byte: u8) -> Result<()> {
        match &mut self.memory {
            Some(memory) => self.pool.runtime.fill(memory, byte, self.bytes),
            None => Ok(()),
        }
    }

    pub(super) fn write(&mut self, first: usize, bytes: &[u8]) -> Result<()> {
        match &mut self.memory {
            Some(memory) => self.pool.runtime.write(memory, first, bytes),
            None => Ok(()),
        }
    }

    pub(super) fn read(&self, first: usize, bytes: &mut [u8]) -> Result<()> {
        match &self.memory {
            Some(memory) => self.pool.runtime.read(memory, first, bytes),
            None => Ok(()),
        }
    }
}

impl<R: Runtime> Drop for Buffer<R> {
    fn drop(&mut self) {
        if let Some(memory) = self.memory.take() {
            self.pool.put_back(memory, rounded::<R>(self.bytes));
        }
    }
}

fn rounded<R: Runtime>(bytes: usize) -> usize {
    bytes.next_multiple_of(R::GRANULE)
}

/// Free blocks by size, and counters.
pub(super) struct Pool<R: Runtime> {
    runtime: Arc<R>,
    state: Mutex<State<R::Memory>>,
}

struct State<M> {
    /// Every list is non-empty.
    free: BTreeMap<usize, Vec<M>>,
    in_use: usize,
    peak: usize,
    /// The peak since the pool was made, which `reset_peak` leaves alone: it bounds what is kept.
    lifetime_peak: usize,
    reserved: usize,
}

impl<R: Runtime> Pool<R> {
    pub(super) fn new(runtime: Arc<R>) -> Self {
        Self {
            runtime,
            state: Mutex::new(State {
                free: BTreeMap::new(),
                in_use: 0,
                peak: 0,
                lifetime_peak: 0,
                reserved: 0,
            }),
        }
    }

    pub(super) fn runtime(&self) -> &R {
        &self.runtime
    }

    /// The counters stay correct whatever a panicking thread did in between, so a poisoned lock is still good.
    fn state(&self) -> MutexGuard<'_, State<R::Memory>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A buffer of `bytes` bytes with unspecified contents.
    pub(super) fn take(self: &Arc<Self>, bytes: usize) -> Result<Buffer<R>> {
        let size = rounded::<R>(bytes);
        let mut state = self.state();
        let memory = match state.take_free(size) {
            _ if size == 0 => None,
            Some(memory) => Some(memory),
            None => Some(self.allocate(&mut state, size)?),
        };
        state.in_use += size;
        state.peak = state.peak.max(state.in_use);
        state.lifetime_peak = state.lifetime_peak.max(state.in_use);
        Ok(Buffer {
            memory,
            bytes,
            pool: Arc::clone(self),
        })
    }

    fn allocate(&self, state: &mut State<R::Memory>, size: usize) -> Result<R::Memory> {
        state.make_room(size);
        let first = self.runtime.allocate(size);
        let memory = match first {
            Err(Error::OutOfMemory { .. }) if state.reserved > state.in_use => {
                state.free.clear();
                state.reserved = state.in_use;
                self.runtime.allocate(size)
            }
            other => other,
        };
        let memory = memory.map_err(|error| match error {
            Error::OutOfMemory { backend, .. } => Error::OutOfMemory {
                backend,
                requested_bytes: size as u64,
                in_use_bytes: state.in_use as u64,
            },
            other => other,
        })?;
        state.reserved += size;
        Ok(memory)
    }

    fn put_back(&self, memory: R::Memory, size: usize) {
        let mut state = self.state();
        state.in_use -= size;
        state.free.entry(size).or_default().push(memory);
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

impl<M> State<M> {
    fn take_free(&mut self, size: usize) -> Option<M> {
        let blocks = self.free.get_mut(&size)?;
        let block = blocks.pop();
        if blocks.is_empty() {
            self.free.remove(&size);
        }
        block
    }

    /// Gives free blocks back to the device, largest first, until `size` more bytes stay within the peak.
    fn make_room(&mut self, size: usize) {
        let limit = self.lifetime_peak.max(self.in_use + size);
        while self.reserved + size > limit {
            let Some(mut largest) = self.free.last_entry() else {
                return;
            };
            let bytes = *largest.key();
            if largest.get_mut().pop().is_some() {
                self.reserved -= bytes;
            }
            if largest.get().is_empty() {
                largest.remove();
            }
        }
    }
}
