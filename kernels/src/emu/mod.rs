//! The kernels on a CPU: a [`Runtime`] that compiles the very `.cu` sources with a C++ compiler and runs each thread of a block
//! as a fiber (`kernels/emu/`).
//!
//! It proves kernels and host code where there is no GPU, and is far too slow to train anything but toys. A machine without a
//! C++ compiler has no emulation; [`emulated`] says so as a value.

mod compiler;
#[cfg(test)]
pub(crate) mod defects;
mod ffi;
#[cfg(test)]
pub(crate) mod hopper_defects;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use self::compiler::Compiler;
use self::ffi::Engine;
pub use self::ffi::Memory;
use crate::error::{Error, Result};
use crate::gpu::{Gpu, Launch, Machine, Runtime};

/// A GPU backend whose device is emulated.
pub type Emulated = Gpu<Emulation>;

/// The emulated device: one queue, which is never ahead of its caller.
pub struct Emulation {
    engine: Arc<Engine>,
    compiler: Compiler,
    threads: u32,
    machine: Machine,
    /// The compiled sources by name. Held for a whole launch: launches of one device follow each other.
    libraries: Mutex<HashMap<&'static str, ffi::Library>>,
}

/// The compute capability that [`emulated`] claims: the first with what the portable kernels need.
const PORTABLE: (u32, u32) = (8, 0);
/// Few, so that the blocks of a grid that stays have several tiles even of small products.
const MULTIPROCESSORS: u32 = 3;

/// A backend on emulation, whose blocks are spread over `threads` threads, or as many as the machine offers.
///
/// # Errors
/// [`Error::Unsupported`] where there is no C++ compiler; [`Error::Device`] when it fails.
pub fn emulated(threads: Option<usize>) -> Result<Emulated> {
    emulated_as(threads, PORTABLE)
}

/// The same of a device that claims to be of this compute capability: of (9, 0), Hopper's own kernels are run.
///
/// # Errors
/// As [`emulated`].
pub fn emulated_as(threads: Option<usize>, capability: (u32, u32)) -> Result<Emulated> {
    let available = || std::thread::available_parallelism().map_or(1, usize::from);
    let threads = threads.unwrap_or_else(available).clamp(1, 256) as u32;
    let compiler = Compiler::find()?;
    let engine = Engine::open(&compiler.engine()?)?;
    Gpu::new(Emulation {
        engine: Arc::new(engine),
        compiler,
        threads,
        machine: Machine {
            capability,
            multiprocessors: MULTIPROCESSORS,
        },
        libraries: Mutex::new(HashMap::new()),
    })
}

impl Emulation {
    fn queue(&self) -> MutexGuard<'_, HashMap<&'static str, ffi::Library>> {
        self.libraries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Runtime for Emulation {
    type Memory = Memory;

    const GRANULE: usize = 16;
    const POISONS: bool = true;

    fn name(&self) -> &'static str {
        "emulated"
    }

    fn machine(&self) -> Machine {
        self.machine
    }

    fn allocate(&self, bytes: usize) -> Result<Memory> {
        Memory::allocate(&self.engine, bytes).ok_or(Error::OutOfMemory {
            backend: "emulated",
            requested_bytes: bytes as u64,
            in_use_bytes: 0,
        })
    }

    fn write(&self, memory: &mut Memory, first: usize, bytes: &[u8]) -> Result<()> {
        let _queue = self.queue();
        memory.write(first, bytes)
    }

    fn read(&self, memory: &Memory, first: usize, bytes: &mut [u8]) -> Result<()> {
        let _queue = self.queue();
        memory.read(first, bytes)
    }

    fn fill(&self, memory: &mut Memory, byte: u8, bytes: usize) -> Result<()> {
        let _queue = self.queue();
        memory.fill(byte, bytes)
    }

    fn clear(&self, memory: &Memory, bytes: usize) -> Result<()> {
        let _queue = self.queue();
        memory.fill(0, bytes)
    }

    fn launch(&self, launch: &Launch<'_, Memory>) -> Result<()> {
        let mut libraries = self.queue();
        let name = launch.source.name;
        if !libraries.contains_key(name) {
            let path = self.compiler.source(launch.source)?;
            libraries.insert(name, ffi::Library::open(&path)?);
        }
        match libraries.get(name) {
            Some(library) => self.engine.launch(library, launch, self.threads),
            None => Ok(()),
        }
    }

    fn synchronise(&self) -> Result<()> {
        Ok(())
    }
}
