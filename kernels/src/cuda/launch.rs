//! The driver calls that Rust cannot check.
//!
//! What holds throughout: cudarc's wrappers keep context, streams, modules and memory alive as long as they live; all memory
//! belongs to the compute stream, on which everything but [`staging`](super::staging)'s copies is queued, and those are fenced
//! by events; and no call is made before [`has_driver_library`] said that there is a driver.

#![allow(unsafe_code)]

use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::CUdevice_attribute as Attribute;
use cudarc::driver::{
    CudaContext, CudaFunction, CudaGraph, CudaSlice, CudaStream, DevicePtr, DeviceRepr, LaunchConfig, PinnedHostSlice,
    PushKernelArg, sys,
};

use super::DeviceInfo;
use super::driver::Memory;
use crate::gpu::{Launch, Span, Swizzle, TensorMap, Value};

/// Whether the driver's library can be loaded; without it cudarc's functions panic.
pub(super) fn has_driver_library() -> bool {
    // SAFETY: loads and closes the library under the names that cudarc will use; its initialisers ask nothing of the process.
    unsafe { sys::is_culib_present() }
}

/// The newest CUDA version the driver knows, and every device, without making a context on one.
pub(super) fn describe_devices() -> Result<((u32, u32), Vec<DeviceInfo>), DriverError> {
    result::init()?;
    let mut version = 0;
    // SAFETY: the driver is initialised; the pointer is to a local.
    unsafe { sys::cuDriverGetVersion(&raw mut version) }.result()?;
    let version = version.unsigned_abs();
    let count = result::device::get_count()?;
    let devices = (0..count).map(describe_device).collect::<Result<_, _>>()?;
    Ok(((version / 1000, version % 1000 / 10), devices))
}

fn describe_device(ordinal: i32) -> Result<DeviceInfo, DriverError> {
    let device = result::device::get(ordinal)?;
    let attribute = |which: Attribute| {
        // SAFETY: the device is one that the driver just named.
        unsafe { result::device::get_attribute(device, which) }.map(i32::unsigned_abs)
    };
    let capability = (
        attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
        attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
    );
    // SAFETY: as above.
    let total_bytes = unsafe { result::device::total_mem(device) }? as u64;
    Ok(DeviceInfo {
        ordinal: ordinal as usize,
        name: result::device::get_name(device)?,
        capability,
        total_bytes,
        multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
    })
}

/// A context on a device whose memory cudarc does not track by events: two more driver calls for every argument of every
/// launch, for an order that the one compute stream has anyway.
pub(super) fn context(ordinal: usize) -> Result<Arc<CudaContext>, DriverError> {
    let context = CudaContext::new(ordinal)?;
    // SAFETY: memory is made, used and freed on the compute stream; the copy stream writes it only between two events by
    // which each stream waits for the other (`Staging::upload`).
    unsafe { context.disable_event_tracking() };
    Ok(context)
}

/// Device memory with unspecified contents.
pub(super) fn allocate(stream: &Arc<CudaStream>, bytes: usize) -> Result<CudaSlice<u8>, DriverError> {
    // SAFETY: every bit pattern is a u8, and reading what was never written is a mistake of ours that poisoning backends show,
    // not undefined behaviour of the host: only copies by the driver read it.
    unsafe { stream.alloc(bytes) }
}

/// Page-locked host memory, zeroed.
pub(super) fn pinned(context: &Arc<CudaContext>, bytes: usize) -> Result<PinnedHostSlice<u8>, DriverError> {
    // SAFETY: the memory is written below before anything reads it.
    let mut memory = unsafe { context.alloc_pinned::<u8>(bytes) }?;
    let address = memory.as_mut_ptr()?;
    // SAFETY: the allocation has that many bytes and is borrowed mutably.
    unsafe { address.write_bytes(0, bytes) };
    Ok(memory)
}

/// Queues the setting of every byte of a part of a block, which the caller has compared with the block's size.
pub(super) fn fill(stream: &CudaStream, part: Span<'_, Memory>, byte: u8) -> Result<(), DriverError> {
    assert!(
        part.first + part.bytes <= part.memory.bytes(),
        "the caller compares sizes"
    );
    stream.context().bind_to_thread()?;
    let address = part.memory.address(stream) + part.first as u64;
    // SAFETY: the block has that many bytes, checked above, and outlives the work: its freeing is queued on this stream too,
    // and a graph that captures this keeps the block. Whoever shares the block sees bytes written by the device, in the order of
    // the stream, never a Rust value.
    unsafe { result::memset_d8_async(address, byte, part.bytes, stream.cu_stream()) }
}

/// Queues a copy to byte `first` of a block, which the caller has compared with the block's size. The host's bytes may be reused
/// when this returns if they are ordinary memory; page-locked ones when the copy has happened.
pub(super) fn upload(
    stream: &CudaStream,
    block: &CudaSlice<u8>,
    first: usize,
    bytes: &[u8],
) -> Result<(), DriverError> {
    assert!(first + bytes.len() <= block.len(), "the caller compares sizes");
    stream.context().bind_to_thread()?;
    let address = block.device_ptr(stream).0 + first as u64;
    // SAFETY: the block has that many bytes from `first` on, checked above, and outlives the copy, as for `fill`. The driver
    // has read ordinary memory before it returns; `Staging` lets nobody write page-locked memory before its event.
    unsafe { result::memcpy_htod_async(address, bytes, stream.cu_stream()) }
}

/// Makes of everything queued on the stream from here on a graph instead of running it.
///
/// Relaxed, because a kernel may be met for the first time in a capture: the stricter modes make the driver refuse what loading it
/// might do, and end the capture. They guard against work on other streams that a capture would miss, of which there is none:
/// `Driver` refuses copies and allocations, and `Tape` launches of another thread.
pub(super) fn begin_capture(stream: &CudaStream) -> Result<(), DriverError> {
    stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED)
}

/// What was captured, ready to be launched.
pub(super) fn end_capture(stream: &Arc<CudaStream>) -> Result<Captured, DriverError> {
    let graph = stream.end_capture(sys::CUgraphInstantiate_flags(0))?;
    if let Some(graph) = &graph {
        graph.upload()?;
    }
    Ok(Captured {
        graph: Mutex::new(graph),
        context: Arc::clone(stream.context()),
    })
}

/// A graph of launches; `None` when nothing was captured. The lock is what makes it shareable.
pub(super) struct Captured {
    graph: Mutex<Option<CudaGraph>>,
    context: Arc<CudaContext>,
}

// SAFETY: the driver's graphs belong to a context, not to a thread: cudarc binds the context before every call but the destroying
// ones, `Drop` before these, and its type lacks `Send` only for the raw handles in it. Calls for one graph must not overlap, which the
// lock sees to.
unsafe impl Send for Captured {}
// SAFETY: as above.
unsafe impl Sync for Captured {}

impl Captured {
    pub(super) fn launch(&self) -> Result<(), DriverError> {
        let graph = self.graph.lock().unwrap_or_else(PoisonError::into_inner);
        graph.as_ref().map_or(Ok(()), CudaGraph::launch)
    }
}

impl Drop for Captured {
    /// Recordings are dropped on any thread.
    fn drop(&mut self) {
        let _ = self.context.bind_to_thread();
    }
}

/// Queues a kernel.
pub(super) fn launch(
    stream: &CudaStream,
    function: &CudaFunction,
    launch: &Launch<'_, Memory>,
) -> Result<(), DriverError> {
    // Each value lies in a place of its own, as large as a map; the driver copies as much of it as the parameter has.
    let places = launch.values.iter().map(|value| place(value, stream));
    let places: Vec<Place> = places.collect::<Result<_, _>>()?;
    let mut arguments = stream.launch_builder(function);
    for place in &places {
        arguments.arg(place);
    }
    let config = LaunchConfig {
        grid_dim: launch.grid.into(),
        block_dim: (launch.threads, 1, 1),
        shared_mem_bytes: launch.shared_bytes,
    };
    // SAFETY: the entry takes as many arguments of such types as there are values: `Gpu::launch` compared them with the
    // kernel's descriptor, and a test compares that with the source, which the module was compiled from. The driver copies
    // the arguments before it returns. Blocks of memory outlive the work, since freeing them is queued on this stream and a
    // graph keeps those of its launches (`Driver::launch`), and have the bytes that the values name, by themselves or by a table of
    // addresses (`gpu/addresses.rs`), which it compares; what
    // is written is borrowed mutably by the caller or is the note of faults, which only copies by the driver read. That a
    // kernel stays within its tensors is what the conformance suite proves on the emulation, where going beyond is an error.
    unsafe { arguments.launch(config) }.map(|_no_events| ())
}

/// A value as it lies in memory, little-endian and padded.
#[repr(transparent)]
struct Place(sys::CUtensorMap);

// SAFETY: plain bytes, of which the driver reads as many as the parameter has: at most a map, which this is as large as.
unsafe impl DeviceRepr for Place {}

fn place(value: &Value<'_, Memory>, stream: &CudaStream) -> Result<Place, DriverError> {
    let word = match value {
        Value::Memory(span) | Value::Addresses { table: span, .. } => {
            span.map_or(0, |span| span.memory.address(stream) + span.first as u64)
        }
        Value::I32(value) => u64::from(value.cast_unsigned()),
        Value::I64(value) => value.cast_unsigned(),
        Value::F32(value) => u64::from(value.to_bits()),
        Value::Map(map) => return encode(map, stream).map(Place),
    };
    let mut words = sys::CUtensorMap { opaque: [0; 16] };
    words.opaque[0] = word;
    Ok(Place(words))
}

/// A tensor's map as the copy engine reads it.
fn encode(map: &TensorMap<'_, Memory>, stream: &CudaStream) -> Result<sys::CUtensorMap, DriverError> {
    let mut encoded = sys::CUtensorMap { opaque: [0; 16] };
    let elements = match map.element_bytes {
        1 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT8,
        _ => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
    };
    let swizzle = match map.swizzle {
        Swizzle::None => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_NONE,
        Swizzle::Bytes64 => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_64B,
        Swizzle::Bytes128 => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
    };
    let address = (map.part.memory.address(stream) + map.part.first as u64) as *mut std::ffi::c_void;
    // SAFETY: the driver is loaded, for there is a stream. It reads three extents, boxes and steps and two strides from arrays of so
    // many, and writes one map. It does not touch the tensor; that boxes stay within it is the copy engine's own rule, and that the
    // extents do was checked against the tensor's bytes by `Map::checked`.
    unsafe {
        sys::cuTensorMapEncodeTiled(
            &raw mut encoded,
            elements,
            3,
            address,
            map.extents.as_ptr(),
            map.strides.as_ptr(),
            map.rectangle.as_ptr(),
            [1; 3].as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzle,
            // The next boxes of a row are wanted next: their lines are fetched with this one's.
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    }
    .result()?;
    Ok(encoded)
}
