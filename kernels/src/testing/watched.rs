//! A runtime that counts what is asked of it.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::error::Result;
use crate::gpu::{Launch, Machine, PlainForm, PlainProduct, Runtime, Span};

/// Another runtime, watched.
pub struct Watched<R> {
    inner: R,
    counters: Counters,
}

#[derive(Default)]
struct Counters {
    allocations: AtomicU64,
    writes: AtomicU64,
    written_bytes: AtomicU64,
    reads: AtomicU64,
    launches: AtomicU64,
    captures: AtomicU64,
    replays: AtomicU64,
    entries: Mutex<BTreeMap<String, u64>>,
    plain: Mutex<Vec<PlainForm>>,
}

/// What was asked since the last look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Calls {
    /// Blocks of memory asked for.
    pub allocations: u64,
    /// Copies to the device.
    pub writes: u64,
    /// Their bytes.
    pub written_bytes: u64,
    /// Copies from the device, each of which waits.
    pub reads: u64,
    /// Launches, those of captures among them and those of replays not.
    pub launches: u64,
    /// Captures that became graphs.
    pub captures: u64,
    /// Graphs replayed.
    pub replays: u64,
}

impl<R> Watched<R> {
    /// Watches a runtime.
    pub fn new(inner: R) -> Self {
        Self {
            inner,
            counters: Counters::default(),
        }
    }

    /// What was asked since the last call of this.
    pub fn calls(&self) -> Calls {
        let Counters {
            allocations,
            writes,
            written_bytes,
            reads,
            launches,
            captures,
            replays,
            ..
        } = &self.counters;
        let taken = |counter: &AtomicU64| counter.swap(0, Ordering::Relaxed);
        Calls {
            allocations: taken(allocations),
            writes: taken(writes),
            written_bytes: taken(written_bytes),
            reads: taken(reads),
            launches: taken(launches),
            captures: taken(captures),
            replays: taken(replays),
        }
    }
}

impl<R> Watched<R> {
    /// How often each kernel was launched, by its entry's name, since the last call of this.
    pub fn entries(&self) -> BTreeMap<String, u64> {
        std::mem::take(&mut *self.counters.entries.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The products that a library was asked for since the last call of this. There is none.
    pub fn plain_products(&self) -> Vec<PlainForm> {
        std::mem::take(&mut *self.counters.plain.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

fn one_more(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

impl<R: Runtime> Runtime for Watched<R> {
    type Memory = R::Memory;
    type Graph = R::Graph;

    const GRANULE: usize = R::GRANULE;
    const POISONS: bool = R::POISONS;

    fn name(&self) -> &'static str {
        self.inner.name()
    }

    fn machine(&self) -> Machine {
        self.inner.machine()
    }

    fn allocate(&self, bytes: usize) -> Result<R::Memory> {
        one_more(&self.counters.allocations);
        self.inner.allocate(bytes)
    }

    fn address(&self, memory: &R::Memory) -> u64 {
        self.inner.address(memory)
    }

    fn write(&self, memory: &R::Memory, first: usize, bytes: &[u8]) -> Result<()> {
        one_more(&self.counters.writes);
        let count = bytes.len() as u64;
        self.counters.written_bytes.fetch_add(count, Ordering::Relaxed);
        self.inner.write(memory, first, bytes)
    }

    fn read(&self, memory: &R::Memory, first: usize, bytes: &mut [u8]) -> Result<()> {
        one_more(&self.counters.reads);
        self.inner.read(memory, first, bytes)
    }

    fn fill(&self, part: Span<'_, R::Memory>, byte: u8) -> Result<()> {
        self.inner.fill(part, byte)
    }

    fn launch(&self, launch: &Launch<'_, R::Memory>) -> Result<()> {
        one_more(&self.counters.launches);
        let mut entries = self.counters.entries.lock().unwrap_or_else(PoisonError::into_inner);
        *entries.entry(launch.entry.to_owned()).or_default() += 1;
        drop(entries);
        self.inner.launch(launch)
    }

    fn remark(&self) -> Option<String> {
        self.inner.remark()
    }

    fn plain_product(&self, product: &PlainProduct<'_, R::Memory>) -> Result<bool> {
        let mut plain = self.counters.plain.lock().unwrap_or_else(PoisonError::into_inner);
        plain.push(product.form);
        Ok(false)
    }

    fn synchronise(&self) -> Result<()> {
        self.inner.synchronise()
    }

    fn begin_capture(&self) -> Result<()> {
        self.inner.begin_capture()
    }

    fn end_capture(&self) -> Result<R::Graph> {
        let graph = self.inner.end_capture()?;
        one_more(&self.counters.captures);
        Ok(graph)
    }

    fn replay(&self, graph: &R::Graph) -> Result<()> {
        one_more(&self.counters.replays);
        self.inner.replay(graph)
    }
}
