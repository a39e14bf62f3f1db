//! What a device, or its emulation, must do for the backend.

use crate::error::Result;
use crate::gpu::{Source, TensorMap};

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
pub trait Runtime: Send + Sync + 'static {
    /// A block of device memory. Dropping it frees it, after the launches that were queued before.
    type Memory: Send + Sync;

    /// Blocks are allocated in multiples of this many bytes.
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
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory), with `in_use_bytes` left 0.
    fn allocate(&self, bytes: usize) -> Result<Self::Memory>;

    /// Overwrites a block from byte `first` on.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device), also for more bytes than the block has.
    fn write(&self, memory: &mut Self::Memory, first: usize, bytes: &[u8]) -> Result<()>;

    /// Reads a block from byte `first` on, after everything that was queued before.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device): of the copy, or of anything that was queued before.
    fn read(&self, memory: &Self::Memory, first: usize, bytes: &mut [u8]) -> Result<()>;

    /// Sets the first `bytes` bytes of a block.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device).
    fn fill(&self, memory: &mut Self::Memory, byte: u8, bytes: usize) -> Result<()>;

    /// Sets the first `bytes` bytes of a block that launches share, to zero.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device).
    fn clear(&self, memory: &Self::Memory, bytes: usize) -> Result<()>;

    /// Queues a kernel. The caller has compared the values with the kernel's parameters and sized grid and memory by them.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device), naming kernel and launch shape; of this launch or of an earlier one.
    fn launch(&self, launch: &Launch<'_, Self::Memory>) -> Result<()>;

    /// Waits for everything that was queued.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device): of anything that was queued.
    fn synchronise(&self) -> Result<()>;
}

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
    /// The address of a block of memory and the bytes of it that are in use; `None` is a null pointer.
    Memory(Option<(&'a M, usize)>),
    /// `i32`.
    I32(i32),
    /// `long long`.
    I64(i64),
    /// `float`.
    F32(f32),
    /// A tensor's map, by value.
    Map(TensorMap<'a, M>),
}
