//! The door to the compiled engine and kernels: the only `unsafe` of the emulation.
//!
//! What holds throughout: the engine's functions have the types written here (`emu/cuda_emu.cpp` ends with them); the libraries
//! are never closed; memory lives as long as its [`Memory`]; and the launches of a device follow each other, because
//! [`Emulation`](super::Emulation) holds its lock for each.

#![allow(unsafe_code)]

use std::ffi::{CString, c_char, c_int, c_void};
use std::path::Path;
use std::ptr::NonNull;
use std::sync::Arc;

use libloading::os::unix::{Library as Handle, RTLD_GLOBAL, RTLD_NOW, Symbol};

use crate::error::{Error, Result};
use crate::gpu::{Launch, Span, TensorMap, Value};

/// `emu_entry_…`: calls a kernel with the arguments the array points to.
type Entry = unsafe extern "C" fn(*mut *mut c_void);
type LaunchFunction = unsafe extern "C" fn(Entry, *mut *mut c_void, *const Geometry, *mut c_char, usize) -> c_int;

/// `emu::Launch`.
#[repr(C)]
struct Geometry {
    kernel: *const c_char,
    grid: [u32; 3],
    block: [u32; 3],
    shared_bytes: usize,
    shared_limit: usize,
    workers: u32,
    ranges: *const Range,
    range_count: usize,
    period: usize,
    last: usize,
}

/// `emu::Range`: memory that a launch may touch.
#[repr(C)]
struct Range {
    begin: *const u8,
    bytes: usize,
}

/// The engine's functions.
pub(super) struct Engine {
    allocate: unsafe extern "C" fn(usize) -> *mut c_void,
    free: unsafe extern "C" fn(*mut c_void, usize),
    launch: LaunchFunction,
}

/// The compiled kernels of one source.
pub(super) struct Library {
    handle: Handle,
}

fn unusable(error: impl std::fmt::Display) -> Error {
    Error::Device {
        op: "emulation",
        message: format!("loading compiled kernels: {error}"),
    }
}

fn open(path: &Path) -> Result<Handle> {
    // SAFETY: the file was compiled from this crate's own sources, named by their digest; its initialisers are those of C++'s
    // standard library.
    unsafe { Handle::open(Some(path), RTLD_NOW | RTLD_GLOBAL) }.map_err(unusable)
}

fn symbol<T: Copy>(handle: &Handle, name: &str) -> Result<T> {
    // SAFETY: the caller names `T` as the type the sources give this symbol.
    let symbol: Symbol<T> = unsafe { handle.get(name.as_bytes()) }.map_err(unusable)?;
    Ok(*symbol)
}

impl Engine {
    pub(super) fn open(path: &Path) -> Result<Self> {
        let handle = open(path)?;
        let engine = Self {
            allocate: symbol(&handle, "emu_allocate")?,
            free: symbol(&handle, "emu_free")?,
            launch: symbol(&handle, "emu_launch")?,
        };
        std::mem::forget(handle); // its functions are called as long as the process lives
        Ok(engine)
    }

    /// Runs a grid, whose blocks may have so many bytes of shared memory, to its end: of each `period` blocks the last ones.
    pub(super) fn launch(
        &self,
        library: &Library,
        launch: &Launch<'_, Memory>,
        workers: u32,
        shared_limit: usize,
        (period, last): (usize, usize),
    ) -> Result<()> {
        let entry: Entry = symbol(&library.handle, &format!("emu_entry_{}", launch.entry))?;
        let failed = |message: &str| Error::Device {
            op: "emulation",
            message: format!(
                "{} in {}.cu, grid {:?} of {} threads: {message}",
                launch.entry, launch.source.name, launch.grid, launch.threads
            ),
        };
        for span in launch.values.iter().flat_map(Value::spans) {
            span.memory.holds(span.first.saturating_add(span.bytes))?;
        }
        let kernel = CString::new(launch.entry).map_err(|error| failed(&error.to_string()))?;
        // Each value lies in a place of its own, as large as a map, that `pointers` points to: as cuLaunchKernel has it.
        let mut places: Vec<Place> = launch.values.iter().map(place).collect();
        let mut pointers: Vec<*mut c_void> = places
            .iter_mut()
            .map(|place| std::ptr::from_mut(place).cast())
            .collect();
        let ranges: Vec<Range> = launch.values.iter().flat_map(Value::spans).map(range).collect();
        let geometry = Geometry {
            kernel: kernel.as_ptr(),
            grid: launch.grid,
            block: [launch.threads, 1, 1],
            shared_bytes: launch.shared_bytes as usize,
            shared_limit,
            workers,
            ranges: ranges.as_ptr(),
            range_count: ranges.len(),
            period,
            last,
        };
        let mut message = [0u8; 1024];
        // SAFETY: `entry` takes as many arguments of such types as there are `values` (`Gpu::launch` compared them with the
        // descriptor, a test compares that with the source). The memory they name, by themselves or by a table of addresses, lives in
        // `launch` and has the bytes they name, and what is written is borrowed mutably by the caller. All other pointers are to
        // locals that outlive the call, which keeps none.
        let code = unsafe {
            (self.launch)(
                entry,
                pointers.as_mut_ptr(),
                &raw const geometry,
                message.as_mut_ptr().cast(),
                message.len(),
            )
        };
        if code == 0 {
            return Ok(());
        }
        let length = message.iter().position(|byte| *byte == 0).unwrap_or(message.len());
        Err(failed(&String::from_utf8_lossy(&message[..length])))
    }
}

/// A value as it lies in memory, little-endian and padded; as large as a `TensorMap` of the kernels.
#[repr(C, align(64))]
struct Place([u64; 16]);

fn place(value: &Value<'_, Memory>) -> Place {
    let word = match value {
        Value::Memory(span) | Value::Addresses { table: span, .. } => {
            span.as_ref().map_or(0, |span| address(span) as u64)
        }
        Value::I32(value) => u64::from(value.cast_unsigned()),
        Value::I64(value) => value.cast_unsigned(),
        Value::F32(value) => u64::from(value.to_bits()),
        Value::Map(map) => return Place(words(map)),
    };
    let mut place = [0; 16];
    place[0] = word;
    Place(place)
}

/// What marks a map: `MAP_MARK` of `hopper_emu.h`.
const MAP_MARK: u64 = 0x0062_726d_6170;

/// A tensor's map as `hopper_emu.h` reads it.
fn words(map: &TensorMap<'_, Memory>) -> [u64; 16] {
    let [row, rows, planes] = map.extents;
    let [box_row, box_rows, box_planes] = map.rectangle.map(u64::from);
    let (element, swizzle) = (u64::from(map.element_bytes), u64::from(map.swizzle.bytes()));
    let base = address(&map.part) as u64;
    let [next_row, next_plane] = map.strides;
    let mut words = [0; 16];
    let described = [
        base, row, rows, planes, next_row, next_plane, box_row, box_rows, box_planes, element, swizzle, MAP_MARK,
    ];
    words[..described.len()].copy_from_slice(&described);
    words
}

fn range(span: Span<'_, Memory>) -> Range {
    Range {
        begin: address(&span),
        bytes: span.bytes,
    }
}

/// Where a part of a block begins; beyond the block only if the part does not lie in it, which the launch then refuses.
fn address(span: &Span<'_, Memory>) -> *const u8 {
    span.memory.address.as_ptr().wrapping_add(span.first)
}

impl Library {
    pub(super) fn open(path: &Path) -> Result<Self> {
        Ok(Self { handle: open(path)? })
    }
}

/// A block of emulated device memory, which ends at a protected page.
pub struct Memory {
    address: NonNull<u8>,
    bytes: usize,
    engine: Arc<Engine>,
}

// SAFETY: the memory is plain bytes that nothing else owns. Shared access from several threads is ordered by the lock of the
// device, which every method's caller and every launch holds.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    pub(super) fn allocate(engine: &Arc<Engine>, bytes: usize) -> Option<Self> {
        // SAFETY: `allocate` takes any size and answers null or memory of that size.
        let address = unsafe { (engine.allocate)(bytes) };
        Some(Self {
            address: NonNull::new(address.cast())?,
            bytes,
            engine: Arc::clone(engine),
        })
    }

    /// Where it begins, as a kernel sees it.
    pub(super) fn address(&self) -> u64 {
        self.address.as_ptr().expose_provenance() as u64
    }

    pub(super) fn write(&self, first: usize, bytes: &[u8]) -> Result<()> {
        self.holds(first.saturating_add(bytes.len()))?;
        // SAFETY: the block has that many bytes from `first` on, `bytes` is a host slice apart from it, and the lock of the device
        // is held.
        unsafe {
            let target = self.address.byte_add(first);
            target.copy_from_nonoverlapping(NonNull::from(bytes).cast(), bytes.len());
        }
        Ok(())
    }

    pub(super) fn read(&self, first: usize, bytes: &mut [u8]) -> Result<()> {
        self.holds(first.saturating_add(bytes.len()))?;
        let count = bytes.len();
        // SAFETY: as for `write`, the other way. Device memory is initialised: the system hands out zeroed pages.
        unsafe {
            let source = self.address.byte_add(first);
            source.copy_to_nonoverlapping(NonNull::from(bytes).cast(), count);
        }
        Ok(())
    }

    pub(super) fn fill(&self, first: usize, bytes: usize, byte: u8) -> Result<()> {
        self.holds(first.saturating_add(bytes))?;
        // SAFETY: the block has that many bytes from `first` on, and the lock of the device is held.
        unsafe {
            let target = self.address.byte_add(first);
            target.write_bytes(byte, bytes);
        }
        Ok(())
    }

    fn holds(&self, bytes: usize) -> Result<()> {
        if bytes <= self.bytes {
            return Ok(());
        }
        Err(Error::Device {
            op: "emulation",
            message: format!("{bytes} bytes of a block of {}", self.bytes),
        })
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: `address` came from `allocate` with this size and is freed once; no launch is running that was given it,
        // since launches end before they return.
        unsafe { (self.engine.free)(self.address.as_ptr().cast(), self.bytes) };
    }
}
