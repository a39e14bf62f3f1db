//! The driver calls that Rust cannot check.
//!
//! What holds throughout: cudarc's wrappers keep context, streams, modules and memory alive as long as they live; all memory
//! belongs to the compute stream, on which everything but [`staging`](super::staging)'s copies is queued, and those are fenced
//! by events; and no call is made before [`has_driver_library`] said that there is a driver.

#![allow(unsafe_code)]

use std::sync::Arc;

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::CUdevice_attribute as Attribute;
use cudarc::driver::{
    CudaContext, CudaFunction, CudaSlice, CudaStream, DevicePtr, DeviceRepr, LaunchConfig, PinnedHostSlice,
    PushKernelArg, sys,
};

use super::DeviceInfo;
use super::driver::Memory;
use crate::gpu::{Launch, Swizzle, TensorMap, Value};

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

/// Queues the setting of the first `bytes` bytes, which the caller has compared with the block's size.
pub(super) fn fill(stream: &CudaStream, memory: &CudaSlice<u8>, byte: u8, bytes: usize) -> Result<(), DriverError> {
    assert!(bytes <= memory.len(), "the caller compares sizes");
    stream.context().bind_to_thread()?;
    let (address, _no_event) = memory.device_ptr(stream);
    // SAFETY: the block has that many bytes, checked above, and outlives the work: its freeing is queued on this stream too.
    // Whoever shares the block sees bytes written by the device, in the order of the stream, never a Rust value.
    unsafe { result::memset_d8_async(address, byte, bytes, stream.cu_stream()) }
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
    // the arguments before it returns. Blocks of memory outlive the work, since freeing them is queued on this stream; what
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
        Value::Memory(None) => 0,
        Value::Memory(Some((memory, _))) => memory.address(stream),
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
    let address = map.memory.address(stream) as *mut std::ffi::c_void;
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
