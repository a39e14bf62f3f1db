//! The kernels on a CPU: a [`Runtime`] that compiles the very `.cu` sources with a C++ compiler and runs each thread of a block
//! as a fiber (`kernels/emu/`).
//!
//! It proves kernels and host code where there is no GPU, and is far too slow to train anything but toys. A machine without a
//! C++ compiler has no emulation; [`emulated`] says so as a value.

mod compiler;
#[cfg(test)]
pub(crate) mod defects;
mod ffi;
mod graph;
#[cfg(test)]
pub(crate) mod hopper_defects;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use self::compiler::Compiler;
use self::ffi::Engine;
pub use self::ffi::Memory;
pub use self::graph::Graph;
use self::graph::{Node, Part};
use crate::error::{Error, Result, WORKING_MEMORY};
use crate::gpu::{Gpu, Launch, Machine, Runtime, Span};

/// A GPU backend whose device is emulated.
pub type Emulated = Gpu<Emulation>;

/// The emulated device: one queue, which is never ahead of its caller.
pub struct Emulation {
    engine: Arc<Engine>,
    compiler: Compiler,
    threads: u32,
    machine: Machine,
    /// Of each so many blocks of a grid, how many at the end are run, and of how many; `None` for all.
    last_blocks: Option<(usize, usize)>,
    /// Held for a whole launch: launches of one device follow each other.
    queue: Mutex<Queue>,
}

#[derive(Default)]
struct Queue {
    /// The compiled sources by name.
    libraries: HashMap<&'static str, ffi::Library>,
    /// What is noted instead of run.
    capture: Option<Graph>,
}

/// The compute capability that [`emulated`] claims: the first with what the portable kernels need.
const PORTABLE: (u32, u32) = (8, 0);
/// Shared memory that a block may have: on compute capability 9.0, and what the least of the others has (8.6, 8.9, 12.0), since all
/// of them run the portable kernels (CUDA programming guide, "Technical Specifications per Compute Capability").
const SHARED_ON_HOPPER: usize = 227 << 10;
const SHARED_ELSEWHERE: usize = 99 << 10;
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
    Gpu::new(Emulation::of(threads, capability)?)
}

impl Emulation {
    /// An emulated device, as [`emulated`] has it.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where there is no C++ compiler; [`Error::Device`] when it fails.
    pub fn new(threads: Option<usize>) -> Result<Self> {
        Self::of(threads, PORTABLE)
    }

    /// The same of a device that claims to be of this compute capability, as [`emulated_as`] has it.
    ///
    /// # Errors
    /// As [`Emulation::new`].
    pub fn of(threads: Option<usize>, capability: (u32, u32)) -> Result<Self> {
        let available = || std::thread::available_parallelism().map_or(1, usize::from);
        let threads = threads.unwrap_or_else(available).clamp(1, 256) as u32;
        let compiler = Compiler::find()?;
        let engine = Engine::open(&compiler.engine()?)?;
        Ok(Self {
            engine: Arc::new(engine),
            compiler,
            threads,
            machine: Machine {
                capability,
                multiprocessors: MULTIPROCESSORS,
            },
            last_blocks: None,
            queue: Mutex::default(),
        })
    }

    /// The same, as a device of so many multiprocessors that blocks which stay have a tile each; of each `period` blocks of a
    /// grid, or of all if it has not so many, only the last are run. So a kernel meets the end of a tensor that nobody could go
    /// through.
    #[cfg(test)]
    pub(crate) fn of_last_blocks(self, last: usize, period: usize) -> Self {
        Self {
            machine: Machine {
                multiprocessors: u32::MAX,
                ..self.machine
            },
            last_blocks: Some((last, period)),
            ..self
        }
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The queue, for something that a graph cannot repeat.
    fn uncaptured(&self, doing: &str) -> Result<MutexGuard<'_, Queue>> {
        let queue = self.queue();
        match queue.capture {
            None => Ok(queue),
            Some(_) => Err(misuse(format!("{doing} in a capture"))),
        }
    }

    fn run(&self, queue: &mut Queue, launch: &Launch<'_, Memory>) -> Result<()> {
        let name = launch.source.name;
        if !queue.libraries.contains_key(name) {
            let path = self.compiler.source(launch.source)?;
            queue.libraries.insert(name, ffi::Library::open(&path)?);
        }
        match queue.libraries.get(name) {
            Some(library) => {
                let blocks: usize = launch.grid.iter().map(|extent| *extent as usize).product();
                let (last, period) = self.last_blocks.unwrap_or((1, 1));
                let period = period.min(blocks).max(1);
                let shared = match self.machine.is_hopper() {
                    true => SHARED_ON_HOPPER,
                    false => SHARED_ELSEWHERE,
                };
                self.engine
                    .launch(library, launch, self.threads, shared, (period, last.min(period)))
            }
            None => Ok(()),
        }
    }

    fn node(&self, queue: &mut Queue, node: &Node) -> Result<()> {
        match node {
            Node::Fill { part, byte } => set(part.span(), *byte),
            Node::Launch {
                source,
                entry,
                grid,
                threads,
                shared_bytes,
                values,
            } => {
                let values: Vec<_> = values.iter().map(graph::Kept::value).collect();
                let launch = Launch {
                    source,
                    entry,
                    grid: *grid,
                    threads: *threads,
                    shared_bytes: *shared_bytes,
                    values: &values,
                };
                self.run(queue, &launch)
            }
        }
    }
}

fn set(part: Span<'_, Memory>, byte: u8) -> Result<()> {
    part.memory.fill(part.first, part.bytes, byte)
}

fn misuse(message: String) -> Error {
    Error::Device {
        op: "emulation",
        message,
    }
}

impl Runtime for Emulation {
    type Memory = Memory;
    type Graph = Graph;

    const GRANULE: usize = 16;
    const POISONS: bool = true;

    fn name(&self) -> &'static str {
        "emulated"
    }

    fn machine(&self) -> Machine {
        self.machine
    }

    fn allocate(&self, bytes: usize) -> Result<Memory> {
        let _queue = self.uncaptured(&format!("allocating {bytes} bytes"))?;
        Memory::allocate(&self.engine, bytes).ok_or(Error::OutOfMemory {
            backend: "emulated",
            wanted: WORKING_MEMORY.to_owned(),
            requested_bytes: bytes as u64,
            in_use_bytes: 0,
        })
    }

    fn address(&self, memory: &Memory) -> u64 {
        memory.address()
    }

    fn write(&self, memory: &Memory, first: usize, bytes: &[u8]) -> Result<()> {
        let _queue = self.uncaptured(&format!("writing {} bytes", bytes.len()))?;
        memory.write(first, bytes)
    }

    fn read(&self, memory: &Memory, first: usize, bytes: &mut [u8]) -> Result<()> {
        let _queue = self.uncaptured(&format!("reading {} bytes", bytes.len()))?;
        memory.read(first, bytes)
    }

    fn fill(&self, part: Span<'_, Memory>, byte: u8) -> Result<()> {
        match &mut self.queue().capture {
            None => set(part, byte),
            Some(graph) => {
                let part = Part::of(part);
                graph.nodes.push(Node::Fill { part, byte });
                Ok(())
            }
        }
    }

    fn launch(&self, launch: &Launch<'_, Memory>) -> Result<()> {
        let mut queue = self.queue();
        match &mut queue.capture {
            None => self.run(&mut queue, launch),
            Some(graph) => {
                graph.nodes.push(Node::launch(launch));
                Ok(())
            }
        }
    }

    fn synchronise(&self) -> Result<()> {
        self.uncaptured("waiting").map(|_| ())
    }

    fn begin_capture(&self) -> Result<()> {
        self.uncaptured("beginning a capture")?.capture = Some(Graph::default());
        Ok(())
    }

    fn end_capture(&self) -> Result<Graph> {
        let capture = self.queue().capture.take();
        capture.ok_or_else(|| misuse("ending a capture that never began".to_owned()))
    }

    fn replay(&self, graph: &Graph) -> Result<()> {
        let mut queue = self.uncaptured("replaying a graph")?;
        graph.nodes.iter().try_for_each(|node| self.node(&mut queue, node))
    }
}
