//! The runtime: one context, one compute stream, modules loaded when first used.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use cudarc::driver::result::DriverError;
use cudarc::driver::sys::{CUevent_flags, CUfunction_attribute, CUresult};
use cudarc::driver::{CudaContext, CudaEvent, CudaFunction, CudaModule, CudaSlice, CudaStream, DevicePtr};
use cudarc::nvrtc::Ptx;

use super::cubins::Cubins;
use super::cublaslt::{Library, Unusable};
use super::launch;
use super::presence::{DeviceInfo, Presence, probe};
use super::staging::Staging;
use crate::error::{Error, Result, WORKING_MEMORY};
use crate::gpu::{Gpu, Launch, Machine, PlainProduct, Runtime, Source, Span, Value};

/// The environment variable that, when set to `1`, makes every launch wait for its end: an error then names the kernel that
/// made it.
pub const SYNCHRONOUS_VARIABLE: &str = "BRIGHTRUN_CUDA_SYNCHRONOUS";

/// An NVIDIA device. Everything runs on one stream, in the order of the calls.
pub struct Driver {
    info: DeviceInfo,
    context: Arc<CudaContext>,
    compute: Arc<CudaStream>,
    staging: Mutex<Staging>,
    cubins: Cubins,
    code: Mutex<Code>,
    /// cuBLASLt, once a product has asked for it.
    library: OnceLock<Result<Library, Unusable>>,
    /// Memory that the capture at hand was given, if there is one.
    captured: Mutex<Option<Vec<Arc<Memory>>>>,
    synchronous: bool,
}

/// Captured launches, and the memory they were given.
pub struct Graph {
    launches: launch::Captured,
    _memory: Vec<Arc<Memory>>,
}

/// What was loaded so far.
#[derive(Default)]
struct Code {
    modules: HashMap<&'static str, Arc<CudaModule>>,
    /// By source and entry.
    functions: HashMap<&'static str, HashMap<String, Function>>,
}

#[derive(Clone)]
struct Function {
    function: CudaFunction,
    /// Dynamic shared memory it was allowed.
    shared_bytes: u32,
}

/// A block of device memory.
pub struct Memory {
    slice: CudaSlice<u8>,
}

/// A point in the device's queue, for measuring.
pub struct Mark {
    event: CudaEvent,
}

/// A backend on a device, by its ordinal, with the kernels and the compiler of this machine.
///
/// # Errors
/// [`Error::Unsupported`] where there is no such device, with the reason; [`Error::Device`], [`Error::OutOfMemory`].
pub fn cuda(ordinal: usize) -> Result<super::Cuda> {
    let absent = |reason: String| Error::Unsupported {
        op: "training",
        backend: "cuda",
        reason,
    };
    let devices = match probe() {
        Presence::Present { devices, .. } => devices,
        Presence::Absent(reason) => return Err(absent(reason)),
    };
    let count = devices.len();
    let info = devices.into_iter().nth(ordinal);
    let info = info.ok_or_else(|| absent(format!("there is no device {ordinal}, only {count}")))?;
    Gpu::new(Driver::new(info, Cubins::of_machine())?)
}

impl Driver {
    fn new(info: DeviceInfo, cubins: Cubins) -> Result<Self> {
        let failed = |error| failure("opening the device", error);
        let context = launch::context(info.ordinal).map_err(failed)?;
        let compute = context.new_stream().map_err(failed)?;
        Ok(Self {
            info,
            staging: Mutex::new(Staging::new(&context).map_err(failed)?),
            context,
            compute,
            cubins,
            code: Mutex::default(),
            library: OnceLock::new(),
            captured: Mutex::new(None),
            synchronous: std::env::var(SYNCHRONOUS_VARIABLE).is_ok_and(|value| value == "1"),
        })
    }

    /// The device.
    pub fn info(&self) -> &DeviceInfo {
        &self.info
    }

    /// Bytes of device memory that are free and that there are, as the device counts them, for all its users.
    ///
    /// # Errors
    /// [`Error::Device`].
    pub fn free_and_total_bytes(&self) -> Result<(u64, u64)> {
        let (free, total) = self
            .context
            .mem_get_info()
            .map_err(|error| failure("asking for free memory", error))?;
        Ok((free as u64, total as u64))
    }

    /// Marks this point in the queue.
    ///
    /// # Errors
    /// [`Error::Device`].
    pub fn mark(&self) -> Result<Mark> {
        let event = self.compute.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT));
        let event = event.map_err(|error| failure("marking a point in time", error))?;
        Ok(Mark { event })
    }

    /// The function of an entry, allowed that much dynamic shared memory.
    ///
    /// It is asked for from the first byte on. Nobody need ask for 48 KiB, but these have a kernel's own arrays in them, in units of
    /// the 1 KiB that its dynamic memory is aligned to: a tile of exactly 48 KiB beside a table of 64 bytes is more.
    fn function(&self, source: &'static Source, entry: &str, shared_bytes: u32) -> Result<CudaFunction> {
        let mut code = self.code();
        let loaded = code.functions.entry(source.name).or_default();
        if let Some(known) = loaded.get(entry)
            && known.shared_bytes >= shared_bytes
        {
            return Ok(known.function.clone());
        }
        let module = self.module(&mut code, source)?;
        let what = || format!("{entry} in {}.cu", source.name);
        let function = module
            .load_function(entry)
            .map_err(|error| failure(&format!("finding {}", what()), error))?;
        if shared_bytes > 0 {
            let wanted = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            function
                .set_attribute(wanted, shared_bytes.cast_signed())
                .map_err(|error| {
                    failure(
                        &format!("asking for {shared_bytes} bytes of shared memory for {}", what()),
                        error,
                    )
                })?;
        }
        let known = Function {
            function: function.clone(),
            shared_bytes,
        };
        code.functions
            .entry(source.name)
            .or_default()
            .insert(entry.to_owned(), known);
        Ok(function)
    }

    fn module(&self, code: &mut Code, source: &'static Source) -> Result<Arc<CudaModule>> {
        if let Some(module) = code.modules.get(source.name) {
            return Ok(Arc::clone(module));
        }
        let target = self.info.target();
        let module = self.cubins.load(source, target, |cubin| {
            let module = self.context.load_module(Ptx::from_binary(cubin.to_vec()));
            module.map_err(|error| failure(&format!("loading {}.cu for {target}", source.name), error))
        })?;
        code.modules.insert(source.name, Arc::clone(&module));
        Ok(module)
    }

    /// All locks guard tables that are whole after every statement, so a poisoned one is still good.
    fn code(&self) -> MutexGuard<'_, Code> {
        self.code.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn captured(&self) -> MutexGuard<'_, Option<Vec<Arc<Memory>>>> {
        self.captured.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something that a graph cannot repeat: the driver would end the capture with an error that names neither.
    fn uncaptured(&self, doing: &str) -> Result<()> {
        match &*self.captured() {
            None => Ok(()),
            Some(_) => Err(misuse(format!("{doing} in a capture"))),
        }
    }

    /// A capture keeps the memory it is given.
    fn keep<'a>(&self, memory: impl Iterator<Item = &'a Arc<Memory>>) -> bool {
        match &mut *self.captured() {
            None => false,
            Some(kept) => {
                for block in memory {
                    if !kept.iter().any(|known| Arc::ptr_eq(known, block)) {
                        kept.push(Arc::clone(block));
                    }
                }
                true
            }
        }
    }

    fn holds(memory: &Memory, bytes: usize) -> Result<()> {
        if bytes <= memory.slice.len() {
            return Ok(());
        }
        Err(Error::Device {
            op: "cuda",
            message: format!("{bytes} bytes of a block of {}", memory.slice.len()),
        })
    }
}

impl Memory {
    /// Its size.
    pub(super) fn bytes(&self) -> usize {
        self.slice.len()
    }

    /// Its address, for a launch on the stream it belongs to.
    pub(super) fn address(&self, stream: &CudaStream) -> u64 {
        self.slice.device_ptr(stream).0
    }
}

impl Drop for Memory {
    /// Freeing needs the context, and tensors are dropped on any thread.
    fn drop(&mut self) {
        let _ = self.slice.context().bind_to_thread();
    }
}

impl Mark {
    /// Milliseconds from this mark to a later one; waits for both.
    ///
    /// # Errors
    /// [`Error::Device`]: of anything that was queued before.
    pub fn milliseconds_until(&self, later: &Self) -> Result<f32> {
        let elapsed = self
            .event
            .synchronize()
            .and_then(|()| self.event.elapsed_ms(&later.event));
        elapsed.map_err(|error| failure("measuring", error))
    }
}

impl Runtime for Driver {
    type Memory = Memory;
    type Graph = Graph;

    /// What the driver rounds to anyway; keeps tensors aligned to whole cache lines.
    const GRANULE: usize = 512;
    const POISONS: bool = false;

    fn name(&self) -> &'static str {
        "cuda"
    }

    fn machine(&self) -> Machine {
        Machine {
            capability: self.info.capability,
            multiprocessors: self.info.multiprocessors,
        }
    }

    /// Memory that was freed counts as taken until the host has seen the device pass the freeing, so a refusal is one only after a
    /// wait (CUDA driver API, `cuMemPoolTrimTo`): the old arena's room is the new one's.
    fn allocate(&self, bytes: usize) -> Result<Memory> {
        self.uncaptured(&format!("allocating {bytes} bytes"))?;
        let refused = |error: &DriverError| error.0 == CUresult::CUDA_ERROR_OUT_OF_MEMORY;
        let slice = launch::allocate(&self.compute, bytes).or_else(|error| match refused(&error) {
            true => {
                self.compute.synchronize()?;
                launch::allocate(&self.compute, bytes)
            }
            false => Err(error),
        });
        let slice = slice.map_err(|error| match refused(&error) {
            true => Error::OutOfMemory {
                backend: "cuda",
                wanted: WORKING_MEMORY.to_owned(),
                requested_bytes: bytes as u64,
                in_use_bytes: 0,
            },
            false => failure(&format!("allocating {bytes} bytes"), error),
        })?;
        Ok(Memory { slice })
    }

    fn address(&self, memory: &Memory) -> u64 {
        memory.address(&self.compute)
    }

    fn write(&self, memory: &Memory, first: usize, bytes: &[u8]) -> Result<()> {
        self.uncaptured(&format!("writing {} bytes", bytes.len()))?;
        Self::holds(memory, first.saturating_add(bytes.len()))?;
        let mut staging = self.staging.lock().unwrap_or_else(PoisonError::into_inner);
        let uploaded = staging.upload(&self.compute, &memory.slice, first, bytes);
        uploaded.map_err(|error| failure(&format!("writing {} bytes", bytes.len()), error))
    }

    fn read(&self, memory: &Memory, first: usize, bytes: &mut [u8]) -> Result<()> {
        self.uncaptured(&format!("reading {} bytes", bytes.len()))?;
        Self::holds(memory, first.saturating_add(bytes.len()))?;
        let view = memory.slice.slice(first..first + bytes.len());
        let copied = self
            .compute
            .memcpy_dtoh(&view, bytes)
            .and_then(|()| self.compute.synchronize());
        copied.map_err(|error| failure(&format!("reading {} bytes", bytes.len()), error))
    }

    fn fill(&self, part: Span<'_, Memory>, byte: u8) -> Result<()> {
        Self::holds(part.memory, part.first.saturating_add(part.bytes))?;
        self.keep(std::iter::once(part.memory));
        let filled = launch::fill(&self.compute, part, byte);
        filled.map_err(|error| failure(&format!("setting {} bytes", part.bytes), error))
    }

    fn launch(&self, launch: &Launch<'_, Memory>) -> Result<()> {
        let failed = |error| {
            let shape = format!(
                "{} in {}.cu, grid {:?} of {} threads with {} bytes of shared memory",
                launch.entry, launch.source.name, launch.grid, launch.threads, launch.shared_bytes
            );
            failure(&shape, error)
        };
        let spans = || launch.values.iter().flat_map(Value::spans);
        spans().try_for_each(|span| Self::holds(span.memory, span.first.saturating_add(span.bytes)))?;
        let is_captured = self.keep(spans().map(|span| span.memory));
        let bound = self.context.bind_to_thread();
        bound.map_err(failed)?;
        let function = self.function(launch.source, launch.entry, launch.shared_bytes)?;
        launch::launch(&self.compute, &function, launch).map_err(failed)?;
        if self.synchronous && !is_captured {
            self.compute.synchronize().map_err(failed)?;
        }
        Ok(())
    }

    fn remark(&self) -> Option<String> {
        match self.library.get()? {
            Ok(_) => None,
            Err(reason) => Some(format!(
                "cuBLASLt is not used: {reason}; its products are done by own kernels"
            )),
        }
    }

    fn plain_product(&self, product: &PlainProduct<'_, Memory>) -> Result<bool> {
        // The library opens itself for the device whose context this thread has, not for ours.
        let bound = self.context.bind_to_thread();
        bound.map_err(|error| failure("choosing the device", error))?;
        if self.library.get().is_none() {
            // Its workspace is memory, which a capture cannot have; the first micro-batch is not captured.
            self.uncaptured("opening cuBLASLt")?;
        }
        let Ok(library) = self.library.get_or_init(|| Library::open(&self.compute)) else {
            return Ok(false);
        };
        let form = product.form;
        let sizes = [
            (product.left, form.rows * form.depth),
            (product.right, form.columns * form.depth),
            (product.out, form.rows * form.columns),
        ];
        for (span, elements) in sizes {
            Self::holds(span.memory, span.first.saturating_add(2 * elements))?;
        }
        let is_captured = self.keep(sizes.iter().map(|(span, _)| span.memory));
        let failed = |error: &dyn std::fmt::Display| Error::Device {
            op: "cuda",
            message: format!("{form:?} by cuBLASLt: {error}"),
        };
        let done = library
            .product(&self.compute, product)
            .map_err(|error| failed(&error))?;
        if self.synchronous && !is_captured {
            self.compute.synchronize().map_err(|error| failed(&error))?;
        }
        Ok(done)
    }

    fn synchronise(&self) -> Result<()> {
        self.uncaptured("waiting")?;
        self.compute.synchronize().map_err(|error| failure("waiting", error))
    }

    fn begin_capture(&self) -> Result<()> {
        self.uncaptured("beginning a capture")?;
        launch::begin_capture(&self.compute).map_err(|error| failure("beginning a capture", error))?;
        *self.captured() = Some(Vec::new());
        Ok(())
    }

    fn end_capture(&self) -> Result<Graph> {
        let memory = self.captured().take();
        let memory = memory.ok_or_else(|| misuse("ending a capture that never began".to_owned()))?;
        let launches = launch::end_capture(&self.compute);
        Ok(Graph {
            launches: launches.map_err(|error| failure("making a graph of what was captured", error))?,
            _memory: memory,
        })
    }

    fn replay(&self, graph: &Graph) -> Result<()> {
        self.uncaptured("replaying a graph")?;
        let failed = |error| failure("replaying a captured micro-batch", error);
        graph.launches.launch().map_err(failed)?;
        if self.synchronous {
            self.compute.synchronize().map_err(failed)?;
        }
        Ok(())
    }
}

fn misuse(message: String) -> Error {
    Error::Device { op: "cuda", message }
}

/// The driver's words, and what was being done. Errors of kernels arrive with later calls, so this names the call that
/// noticed; [`SYNCHRONOUS_VARIABLE`] makes both the same.
fn failure(doing: &str, error: DriverError) -> Error {
    Error::Device {
        op: "cuda",
        message: format!("{doing}: {error}"),
    }
}
