//! Device memory: one block for the tensors of a step, and a pool of blocks for everything else.
//!
//! | who asks | where it lies |
//! |---|---|
//! | inside [`Device::step`](crate::ops::Device::step) | in the arena, at offsets that the sequence of requests decides (`places`) |
//! | inside a step, before there is an arena or when it is full | a block of the pool; the step's plan still counts it |
//! | anybody else | a block of the pool |
//!
//! The first step is planned while it runs from the pool; when it is over the pool's free blocks are given back and one block of
//! the size it needed is taken. From then on a step that needs no more asks nothing of the device, and the same step has the same
//! addresses each time. A step that needs more gets the rest from the pool, and afterwards the arena is made larger.
//!
//! The pool keeps blocks of exact sizes for the next tensor of the same size. Before it asks for a new one it gives back free ones
//! until what it holds would not exceed the peak of live tensors, so `reserved_bytes ≤ peak_bytes` up to rounding; and when the
//! device refuses, it gives back all and asks again.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::ThreadId;

use super::places::Places;
use super::tape::Tape;
use super::{Runtime, Span};
use crate::error::{Error, Result};
use crate::ops::MemoryStats;

/// Storage of one tensor on the device.
pub struct Buffer<R: Runtime> {
    /// `None` for no bytes.
    place: Option<Place<R::Memory>>,
    bytes: usize,
    pool: Arc<Pool<R>>,
}

/// Where a buffer lies.
struct Place<M> {
    memory: Arc<M>,
    /// Its first byte there.
    first: usize,
    /// Its offset in the step's plan, if a step made it.
    planned: Option<usize>,
}

impl<R: Runtime> Buffer<R> {
    /// Its memory; `None` for no bytes.
    pub(super) fn span(&self) -> Option<Span<'_, R::Memory>> {
        self.place.as_ref().map(|place| Span {
            memory: &place.memory,
            first: place.first,
            bytes: self.bytes,
        })
    }

    pub(super) fn fill(&mut self, byte: u8) -> Result<()> {
        match self.span() {
            Some(span) => self.pool.runtime.fill(span, byte),
            None => Ok(()),
        }
    }

    /// Writes bytes that the caller knows to lie in the buffer. Shared: what the device reads and writes is ordered by its queue.
    pub(super) fn write(&self, first: usize, bytes: &[u8]) -> Result<()> {
        match &self.place {
            Some(place) => {
                let what = || format!("{} bytes are written from the host", bytes.len());
                self.pool.tape.forbid("write", what)?;
                self.pool.runtime.write(&place.memory, place.first + first, bytes)
            }
            None => Ok(()),
        }
    }

    pub(super) fn read(&self, first: usize, bytes: &mut [u8]) -> Result<()> {
        match &self.place {
            Some(place) => {
                let what = || format!("{} bytes are read by the host", bytes.len());
                self.pool.tape.forbid("read", what)?;
                self.pool.runtime.read(&place.memory, place.first + first, bytes)
            }
            None => Ok(()),
        }
    }
}

impl<R: Runtime> Drop for Buffer<R> {
    fn drop(&mut self) {
        if let Some(place) = self.place.take() {
            self.pool.put_back(place, rounded::<R>(self.bytes));
        }
    }
}

fn rounded<R: Runtime>(bytes: usize) -> usize {
    bytes.next_multiple_of(R::GRANULE)
}

/// Free blocks by size, the arena, and counters.
pub(super) struct Pool<R: Runtime> {
    runtime: Arc<R>,
    tape: Tape<R>,
    state: Mutex<State<R::Memory>>,
}

struct State<M> {
    /// Every list is non-empty.
    free: BTreeMap<usize, Vec<Arc<M>>>,
    /// Bytes of live buffers.
    in_use: usize,
    peak: usize,
    /// The peak since the pool was made, which `reset_peak` leaves alone: it bounds what is kept.
    lifetime_peak: usize,
    /// Bytes of the pool's blocks, those in use and the free ones; the arena apart.
    reserved: usize,
    /// Of `in_use`, the bytes that lie in the arena.
    in_arena: usize,
    arena: Option<Arena<M>>,
    plan: Places,
    /// The thread in whose step tensors are planned, and how deep it is in steps.
    step: Option<(ThreadId, usize)>,
    /// A size that the device refused the arena: it is not asked again for as much.
    refused: usize,
}

struct Arena<M> {
    memory: Arc<M>,
    bytes: usize,
}

impl<R: Runtime> Pool<R> {
    pub(super) fn new(runtime: Arc<R>) -> Self {
        Self {
            runtime,
            tape: Tape::new(),
            state: Mutex::new(State {
                free: BTreeMap::new(),
                in_use: 0,
                peak: 0,
                lifetime_peak: 0,
                reserved: 0,
                in_arena: 0,
                arena: None,
                plan: Places::default(),
                step: None,
                refused: usize::MAX,
            }),
        }
    }

    pub(super) fn runtime(&self) -> &R {
        &self.runtime
    }

    /// What is being recorded, and what was.
    pub(super) fn tape(&self) -> &Tape<R> {
        &self.tape
    }

    /// The counters stay correct whatever a panicking thread did in between, so a poisoned lock is still good.
    fn state(&self) -> MutexGuard<'_, State<R::Memory>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A buffer of `bytes` bytes with unspecified contents: in the arena, if this thread is in a step.
    pub(super) fn take(self: &Arc<Self>, bytes: usize) -> Result<Buffer<R>> {
        self.placed(bytes, true)
    }

    /// A buffer that outlives the step in which it is asked for.
    pub(super) fn take_lasting(self: &Arc<Self>, bytes: usize) -> Result<Buffer<R>> {
        self.placed(bytes, false)
    }

    fn placed(self: &Arc<Self>, bytes: usize, may_plan: bool) -> Result<Buffer<R>> {
        let size = rounded::<R>(bytes);
        let place = match size {
            0 => None,
            _ => Some(self.place(&mut self.state(), size, may_plan)?),
        };
        Ok(Buffer {
            place,
            bytes,
            pool: Arc::clone(self),
        })
    }

    fn place(&self, state: &mut State<R::Memory>, size: usize, may_plan: bool) -> Result<Place<R::Memory>> {
        let reach = state.plan.reach();
        let planned = (may_plan && state.is_in_step()).then(|| state.plan.take(size));
        let place = match (planned, &state.arena) {
            (Some(first), Some(arena)) if first + size <= arena.bytes => Place {
                memory: Arc::clone(&arena.memory),
                first,
                planned,
            },
            _ => match self.block(state, size) {
                Ok(memory) => Place {
                    memory,
                    first: 0,
                    planned,
                },
                Err(error) => {
                    if let Some(first) = planned {
                        state.plan.withdraw(first, size, reach);
                    }
                    return Err(error);
                }
            },
        };
        if state.is_of_arena(&place) {
            state.in_arena += size;
        }
        state.in_use += size;
        state.peak = state.peak.max(state.in_use);
        state.lifetime_peak = state.lifetime_peak.max(state.in_use);
        Ok(place)
    }

    /// A block of the pool.
    fn block(&self, state: &mut State<R::Memory>, size: usize) -> Result<Arc<R::Memory>> {
        // A block of the pool has another address the next time, also a free one.
        let what = || format!("{size} bytes do not fit the step's memory");
        self.tape.forbid("alloc", what)?;
        if let Some(block) = state.take_free(size) {
            return Ok(block);
        }
        state.make_room(size);
        let first = self.runtime.allocate(size);
        let memory = match first {
            Err(Error::OutOfMemory { .. }) if state.free_bytes() > 0 => {
                state.give_back_free();
                self.runtime.allocate(size)
            }
            other => other,
        };
        let memory = memory.map_err(|error| match error {
            Error::OutOfMemory { backend, wanted, .. } => Error::OutOfMemory {
                backend,
                wanted,
                requested_bytes: size as u64,
                in_use_bytes: state.in_use as u64,
            },
            other => other,
        })?;
        state.reserved += size;
        Ok(Arc::new(memory))
    }

    fn put_back(&self, place: Place<R::Memory>, size: usize) {
        let mut state = self.state();
        state.in_use -= size;
        if let Some(first) = place.planned {
            state.plan.put_back(first, size);
        }
        if state.is_of_arena(&place) {
            state.in_arena -= size;
            return;
        }
        state.free.entry(size).or_default().push(place.memory);
    }

    /// This thread begins a step; one in a step of its own only goes deeper. `false` if another thread is in one: then this
    /// thread's tensors come from the pool.
    pub(super) fn enter_step(&self) -> bool {
        let mut state = self.state();
        let thread = std::thread::current().id();
        match &mut state.step {
            Some((owner, depth)) if *owner == thread => *depth += 1,
            Some(_) => return false,
            free => *free = Some((thread, 1)),
        }
        true
    }

    /// The step is over: whether it needed a larger arena than there is and, when nothing of it is left, may have it.
    pub(super) fn leave_step(&self) -> bool {
        let mut state = self.state();
        match &mut state.step {
            Some((_, depth)) if *depth > 1 => {
                *depth -= 1;
                false
            }
            _ => {
                state.step = None;
                state.wants_arena()
            }
        }
    }

    /// Takes an arena as large as the plan reaches, in exchange for the old one and all free blocks. Nobody else may hold the old
    /// one. A device that has no such block keeps giving steps the pool's.
    pub(super) fn make_arena(&self) -> Result<()> {
        let mut state = self.state();
        if !state.wants_arena() {
            return Ok(());
        }
        let bytes = state.plan.reach();
        state.arena = None;
        state.give_back_free();
        match self.runtime.allocate(bytes) {
            Ok(memory) => {
                state.arena = Some(Arena {
                    memory: Arc::new(memory),
                    bytes,
                });
                Ok(())
            }
            Err(Error::OutOfMemory { .. }) => {
                state.refused = bytes;
                Ok(())
            }
            Err(other) => Err(other),
        }
    }

    /// Why a step's addresses would not be the same again; `None` if they would.
    pub(super) fn unsteady(&self) -> Option<&'static str> {
        let state = self.state();
        match &state.arena {
            None => Some("there is no arena yet"),
            Some(_) if !state.is_in_step() => Some("it is not part of a step"),
            Some(_) if !state.plan.is_empty() => Some("tensors of a step are still alive"),
            Some(_) => None,
        }
    }

    /// The arena's bytes, 0 without one.
    pub(super) fn arena_bytes(&self) -> usize {
        self.state().arena.as_ref().map_or(0, |arena| arena.bytes)
    }

    pub(super) fn stats(&self) -> MemoryStats {
        let state = self.state();
        let arena = state.arena.as_ref().map_or(0, |arena| arena.bytes);
        MemoryStats {
            in_use_bytes: state.in_use as u64,
            peak_bytes: state.peak as u64,
            reserved_bytes: (state.reserved + arena) as u64,
        }
    }

    pub(super) fn reset_peak(&self) {
        let mut state = self.state();
        state.peak = state.in_use;
    }
}

impl<M> State<M> {
    fn is_in_step(&self) -> bool {
        let thread = std::thread::current().id();
        self.step.is_some_and(|(owner, _)| owner == thread)
    }

    fn is_of_arena(&self, place: &Place<M>) -> bool {
        let arena = self.arena.as_ref();
        arena.is_some_and(|arena| Arc::ptr_eq(&arena.memory, &place.memory))
    }

    fn wants_arena(&self) -> bool {
        let has = self.arena.as_ref().map_or(0, |arena| arena.bytes);
        self.step.is_none() && self.plan.is_empty() && (has + 1..self.refused).contains(&self.plan.reach())
    }

    /// Bytes of free blocks.
    fn free_bytes(&self) -> usize {
        self.reserved - (self.in_use - self.in_arena)
    }

    fn give_back_free(&mut self) {
        self.reserved -= self.free_bytes();
        self.free.clear();
    }

    fn take_free(&mut self, size: usize) -> Option<Arc<M>> {
        let blocks = self.free.get_mut(&size)?;
        let block = blocks.pop();
        if blocks.is_empty() {
            self.free.remove(&size);
        }
        block
    }

    /// Gives free blocks back to the device, largest first, until `size` more bytes stay within the peak.
    fn make_room(&mut self, size: usize) {
        let arena = self.arena.as_ref().map_or(0, |arena| arena.bytes);
        let limit = self.lifetime_peak.max(self.in_use + size).saturating_sub(arena);
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
