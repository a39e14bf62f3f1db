//! What a device, or its emulation, must do for the backend.

use std::sync::Arc;

use crate::error::Result;
use crate::gpu::{PlainProduct, Source, TensorMap};

/// What kernels are chosen by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Machine {
    /// Compute capability: (major, minor).
    pub capability: (u32, u32),
    /// Streaming multiprocessors: the blocks of a grid that stays.
    pub multiprocessors: u32,
}

impl Machine {
    /// Whether it has Hopper's own instructions, which later generations do not have.
    pub fn is_hopper(self) -> bool {
        self.capability == (9, 0)
    }
}

/// Memory and launches of one device. Everything happens in the order of the calls; only [`Runtime::read`] and
/// [`Runtime::synchronise`] need to wait.
///
/// Between [`Runtime::begin_capture`] and [`Runtime::end_capture`] nothing runs: launches and fills are noted, and the graph that
/// comes of them does them all when it is replayed, as often as wanted. What a graph could not repeat (an allocation, a copy from
/// or to the host, waiting) is an error there.
pub trait Runtime: Send + Sync + 'static {
    /// A block of device memory. Dropping it frees it, after the launches that were queued before.
    type Memory: Send + Sync;

    /// Launches that were captured. It keeps the memory alive that they were given.
    type Graph: Send + Sync;

    /// Blocks are allocated, and tensors placed in them, in multiples of this many bytes.
    const GRANULE: usize;

    /// Whether new tensors are filled with NaN, so that reading what was never written shows.
    const POISONS: bool;

    /// The backend's name in messages: `cuda`, `emulated`.
    fn name(&self) -> &'static str;

    /// The device.
    fn machine(&self) -> Machine;

    /// Memory of at least `bytes` bytes, which is not 0, aligned to 16 bytes or more; its contents are unspecified.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory), with `in_use_bytes` left 0; [`Error::Device`](crate::Error::Device) in a
    /// capture.
    fn allocate(&self, bytes: usize) -> Result<Self::Memory>;

    /// Where a block begins, as kernels see it: what tables of addresses are written from.
    fn address(&self, memory: &Self::Memory) -> u64;

    /// Overwrites a block from byte `first` on.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device), also for more bytes than the block has and in a capture.
    fn write(&self, memory: &Self::Memory, first: usize, bytes: &[u8]) -> Result<()>;

    /// Reads a block from byte `first` on, after everything that was queued before.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device): of the copy, or of anything that was queued before; in a capture.
    fn read(&self, memory: &Self::Memory, first: usize, bytes: &mut [u8]) -> Result<()>;

    /// Sets every byte of a part of a block.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device).
    fn fill(&self, part: Span<'_, Self::Memory>, byte: u8) -> Result<()>;

    /// Queues a kernel. The caller has compared the values with the kernel's parameters and sized grid and memory by them.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device), naming kernel and launch shape; of this launch or of an earlier one.
    fn launch(&self, launch: &Launch<'_, Self::Memory>) -> Result<()>;

    /// What a user may want to know of how this runtime works; nothing before it is known.
    fn remark(&self) -> Option<String> {
        None
    }

    /// Queues a plain product by a library of the device's maker, as a launch; `false`, and nothing queued, where there is no library
    /// or it cannot do this form.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device), as [`Runtime::launch`].
    fn plain_product(&self, product: &PlainProduct<'_, Self::Memory>) -> Result<bool> {
        let _ = product;
        Ok(false)
    }

    /// Waits for everything that was queued.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device): of anything that was queued; in a capture.
    fn synchronise(&self) -> Result<()>;

    /// From here on launches and fills are noted instead of run.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device), also when a capture has begun already.
    fn begin_capture(&self) -> Result<()>;

    /// What was noted since [`Runtime::begin_capture`]; none of it has run. The capture is over, also when this fails.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device), also without a capture.
    fn end_capture(&self) -> Result<Self::Graph>;

    /// Queues everything a graph has, in its order.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device), as [`Runtime::launch`].
    fn replay(&self, graph: &Self::Graph) -> Result<()>;
}

/// A part of a block of memory.
#[derive(Debug)]
pub struct Span<'a, M> {
    /// The block.
    pub memory: &'a Arc<M>,
    /// Its first byte that belongs to the part.
    pub first: usize,
    /// Bytes of the part.
    pub bytes: usize,
}

impl<M> Clone for Span<'_, M> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<M> Copy for Span<'_, M> {}

/// One launch of one kernel.
pub struct Launch<'a, M> {
    /// The source that has the kernel.
    pub source: &'static Source,
    /// Its entry's name.
    pub entry: &'a str,
    /// Blocks of the grid in x, y and z; none is 0.
    pub grid: [u32; 3],
    /// Threads of a block, in x.
    pub threads: u32,
    /// Dynamic shared memory of a block.
    pub shared_bytes: u32,
    /// Arguments, in order.
    pub values: &'a [Value<'a, M>],
}

/// One argument of a kernel, as the device gets it.
pub enum Value<'a, M> {
    /// The address of memory, and how much of it the kernel may touch; `None` is a null pointer.
    Memory(Option<Span<'a, M>>),
    /// `i32`.
    I32(i32),
    /// `long long`.
    I64(i64),
    /// `float`.
    F32(f32),
    /// A tensor's map, by value.
    Map(TensorMap<'a, M>),
    /// The address of a table of addresses, and all memory that these name.
    Addresses {
        /// The table; `None` is a null pointer.
        table: Option<Span<'a, M>>,
        /// What a kernel reaches by it.
        named: Vec<Span<'a, M>>,
    },
}

impl<'a, M> Value<'a, M> {
    /// All memory that a kernel given this value may touch.
    pub fn spans(&self) -> impl Iterator<Item = Span<'a, M>> + '_ {
        let (one, named): (Option<Span<'a, M>>, &[Span<'a, M>]) = match self {
            Self::Memory(span) => (*span, &[]),
            Self::Map(map) => (Some(map.part), &[]),
            Self::Addresses { table, named } => (*table, named),
            Self::I32(_) | Self::I64(_) | Self::F32(_) => (None, &[]),
        };
        one.into_iter().chain(named.iter().copied())
    }
}
