//! The GPU backend, written once: every op as launches of the kernels in `kernels/cu/`.
//!
//! [`Gpu`] is generic over a [`Runtime`], which is all that differs between a device and its emulation: memory, copies and
//! launches. So what the emulation proves of the host side (shapes, grids, arguments, order of launches) holds for the device.
//!
//! | file | what |
//! |---|---|
//! | `runtime` | what a runtime must do |
//! | `kernel` | typed descriptors of kernels, checked at every launch, and against the `.cu` sources by a test |
//! | `family` | the op families: source, kernels, ops |
//! | `map` | tensors as the copy engine sees them |
//! | `memory` | the pool of device memory |
//! | `faults` | data that breaks a contract, noticed on the device |
//! | the others | one op family each, as in [`ops`](crate::ops) |
//!
//! Ops are queued in order and run later; [`Device::read`] waits. Data on the device that breaks a contract (an id beyond its
//! table) is therefore reported by the next read, not by the op.

mod attention;
mod attention_kernels;
pub(crate) mod cache;
mod convolution;
mod delta;
mod elementwise;
mod family;
mod faults;
mod gate;
mod kernel;
mod loss;
mod map;
mod matmul;
mod memory;
mod moe;
mod norm;
#[cfg(test)]
mod offsets;
mod operands;
mod optimizer;
mod quantize;
mod rows;
mod runtime;
#[cfg(test)]
mod signature;
pub mod sources;

use std::sync::{Arc, OnceLock};

use crate::contract;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::ops::{Device, MemoryStats, Op, Precision, Support};
use crate::tensor::{Shape, Tensor};

pub(crate) use self::family::FAMILIES;
#[cfg(test)]
pub(crate) use self::family::Family;
use self::faults::Faults;
#[cfg(test)]
pub(crate) use self::kernel::Parameter;
pub(crate) use self::kernel::{Argument, Element, Geometry, Kernel};
pub(crate) use self::map::Map;
pub use self::map::{Swizzle, TensorMap};
pub use self::memory::Buffer;
use self::memory::Pool;
pub use self::runtime::{Launch, Machine, Runtime, Value};
pub use self::sources::Source;

/// A handle to a GPU, real or emulated. Clones share its memory pool and its queue of launches.
pub struct Gpu<R: Runtime> {
    inner: Arc<Inner<R>>,
}

struct Inner<R: Runtime> {
    memory: Arc<Pool<R>>,
    faults: Faults<R>,
    /// See `optimizer`.
    moment_maps: OnceLock<Tensor<Gpu<R>>>,
}

impl<R: Runtime> Clone for Gpu<R> {
    fn clone(&self) -> Self {
        Self {
            inner: Arc::clone(&self.inner),
        }
    }
}

impl<R: Runtime> Gpu<R> {
    /// A GPU backend on a runtime.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::Device`].
    pub fn new(runtime: R) -> Result<Self> {
        let runtime = Arc::new(runtime);
        Ok(Self {
            inner: Arc::new(Inner {
                faults: Faults::new(&*runtime)?,
                memory: Arc::new(Pool::new(runtime)),
                moment_maps: OnceLock::new(),
            }),
        })
    }

    /// What the launches go to.
    pub fn runtime(&self) -> &R {
        self.inner.memory.runtime()
    }
}

impl<R: Runtime> Device for Gpu<R> {
    type Buffer = Buffer<R>;

    fn name(&self) -> &'static str {
        self.runtime().name()
    }

    fn supports(&self, op: Op) -> Support {
        family::supports(op)
    }

    fn activation_dtype(&self, precision: Precision) -> DType {
        match precision {
            Precision::F32 => DType::F32,
            Precision::Bf16 => DType::BF16,
        }
    }

    fn alloc(&self, dtype: DType, shape: impl Into<Shape>) -> Result<Tensor<Self>> {
        let shape = shape.into();
        let mut buffer = self.inner.memory.take(shape.elements() * dtype.size_bytes())?;
        if R::POISONS {
            // All bits set is NaN in every float type.
            buffer.fill(0xFF)?;
        }
        Ok(Tensor::from_buffer(buffer, dtype, shape))
    }

    fn fill_zero(&self, tensor: &mut Tensor<Self>) -> Result<()> {
        tensor.buffer_mut().fill(0)
    }

    fn write(&self, tensor: &mut Tensor<Self>, bytes: &[u8]) -> Result<()> {
        let expected = tensor.size_bytes();
        if bytes.len() != expected {
            return Err(Error::Value {
                op: "write",
                argument: "bytes",
                problem: format!("are {}, but {tensor:?} has {expected}", bytes.len()),
            });
        }
        tensor.buffer_mut().write(0, bytes)
    }

    fn read(&self, tensor: &Tensor<Self>) -> Result<Vec<u8>> {
        let mut bytes = vec![0; tensor.size_bytes()];
        tensor.buffer().read(0, &mut bytes)?;
        self.inner.faults.check(self.runtime())?;
        Ok(bytes)
    }

    fn write_at(&self, tensor: &mut Tensor<Self>, first: usize, bytes: &[u8]) -> Result<()> {
        contract::piece("write_at", tensor, first, bytes.len())?;
        tensor.buffer_mut().write(first, bytes)
    }

    fn read_at(&self, tensor: &Tensor<Self>, first: usize, out: &mut [u8]) -> Result<()> {
        contract::piece("read_at", tensor, first, out.len())?;
        tensor.buffer().read(first, out)?;
        self.inner.faults.check(self.runtime())
    }

    fn copy(&self, source: &Tensor<Self>, target: &mut Tensor<Self>) -> Result<()> {
        if source.shape() != target.shape() {
            return Err(Error::Shape {
                op: "copy",
                argument: "source",
                expected: format!("the target's shape {}", target.shape()),
                got: source.shape(),
            });
        }
        self.convert("copy", source, target)
    }

    fn memory(&self) -> MemoryStats {
        self.inner.memory.stats()
    }

    fn reset_peak(&self) {
        self.inner.memory.reset_peak();
    }
}
