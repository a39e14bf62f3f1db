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
//! | `addresses` | launches over many tensors at once |
//! | `memory` | the arena of a step, and the pool of everything else |
//! | `places` | where tensors lie in the arena |
//! | `layouts` | what kernels must know of packed documents, kept on the device |
//! | `shared` | 4-bit weights decoded once for several products |
//! | `tape` | recordings: launches captured once and run again |
//! | `faults` | data that breaks a contract, noticed on the device |
//! | the others | one op family each, as in [`ops`](crate::ops) |
//!
//! Ops are queued in order and run later; [`Device::read`] waits. Data on the device that breaks a contract (an id beyond its
//! table) is therefore reported by the next read, not by the op.

mod addresses;
mod attention;
mod attention_hopper;
mod attention_hopper_backward;
mod attention_kernels;
pub(crate) mod cache;
mod convolution;
mod delta;
mod delta_inputs;
mod elementwise;
mod family;
mod faults;
mod gate;
mod kernel;
mod layouts;
mod loss;
mod loss_extents;
mod loss_hopper;
mod loss_kernels;
mod map;
mod matmul;
mod memory;
mod moe;
mod norm;
#[cfg(test)]
mod offsets;
mod operands;
mod optimizer;
mod places;
mod quantize;
mod random;
mod rows;
mod runtime;
mod shared;
#[cfg(test)]
mod signature;
pub mod sources;
mod tape;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_errors;
#[cfg(test)]
mod tests_many;

use std::sync::{Arc, OnceLock};

use crate::contract;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::ops::{Device, MemoryStats, Op, Precision, Recorded, Support};
use crate::tensor::{Segments, Shape, Tensor};

use self::addresses::Tables;
pub(crate) use self::addresses::{Addresses, Row};
pub(crate) use self::delta::carries_delta;
pub(crate) use self::delta_inputs::fuses_delta_inputs;
pub(crate) use self::family::FAMILIES;
#[cfg(test)]
pub(crate) use self::family::Family;
use self::faults::Faults;
#[cfg(test)]
pub(crate) use self::kernel::Parameter;
pub(crate) use self::kernel::{Argument, Element, Geometry, Kernel};
use self::layouts::Layouts;
pub(crate) use self::loss_extents::{LossExtents, loss_extents};
pub(crate) use self::map::Map;
pub use self::map::{Swizzle, TensorMap};
pub(crate) use self::matmul::{NF4_ROW, OUTER_PART, parts_bytes};
pub use self::matmul::{PlainForm, PlainProduct};
pub use self::memory::Buffer;
use self::memory::Pool;
pub use self::runtime::{Launch, Machine, Runtime, Span, Value};
use self::shared::Shared;
pub use self::shared::{SHARED_ROWS, SharedRows};
pub use self::sources::Source;
use self::tape::Tape;

/// A handle to a GPU, real or emulated. Clones share its memory pool and its queue of launches.
pub struct Gpu<R: Runtime> {
    inner: Arc<Inner<R>>,
}

struct Inner<R: Runtime> {
    memory: Arc<Pool<R>>,
    faults: Faults<R>,
    layouts: Layouts<R>,
    shared: Shared<R>,
    tables: Tables<R>,
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
                layouts: Layouts::new(),
                shared: Shared::new(),
                tables: Tables::new(),
                moment_maps: OnceLock::new(),
            }),
        })
    }

    /// What the launches go to.
    pub fn runtime(&self) -> &R {
        self.inner.memory.runtime()
    }

    /// Bytes of the block that the tensors of a step come from; 0 before the first step is over.
    pub fn arena_bytes(&self) -> u64 {
        self.inner.memory.arena_bytes() as u64
    }

    fn tape(&self) -> &Tape<R> {
        self.inner.memory.tape()
    }

    /// A tensor that outlives the step in which it is made.
    fn alloc_lasting(&self, dtype: DType, shape: impl Into<Shape>) -> Result<Tensor<Self>> {
        let shape = shape.into();
        let buffer = self.inner.memory.take_lasting(shape.elements() * dtype.size_bytes());
        let buffer = buffer.map_err(|error| self.wanting(error, dtype, shape))?;
        Ok(Tensor::from_buffer(buffer, dtype, shape))
    }

    /// An error about memory, saying for which tensor and after which launch.
    fn wanting(&self, error: Error, dtype: DType, shape: Shape) -> Error {
        error.wanting(|| format!("{dtype} {shape} after {}", self.tape().last()))
    }

    /// Makes the arena as large as steps were seen to need. Recordings have addresses of the old one, so they end.
    fn replan(&self) -> Result<()> {
        if self.tape().has_recordings() {
            self.runtime().synchronise()?;
            self.tape().clear();
        }
        self.inner.memory.make_arena()
    }
}

/// The end of a step, also of one that fails.
struct Step<'a, R: Runtime> {
    gpu: &'a Gpu<R>,
    is_owner: bool,
}

impl<R: Runtime> Drop for Step<'_, R> {
    fn drop(&mut self) {
        if self.is_owner && self.gpu.inner.memory.leave_step() {
            // A failure is one of the device, and the next call of it says so.
            let _ = self.gpu.replan();
        }
    }
}

/// The end of a scope that shares decoded weights, also of one that fails.
struct Sharing<'a, R: Runtime> {
    gpu: &'a Gpu<R>,
    is_owner: bool,
}

impl<R: Runtime> Drop for Sharing<'_, R> {
    fn drop(&mut self) {
        if self.is_owner {
            self.gpu.inner.shared.leave();
        }
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
        let buffer = self.inner.memory.take(shape.elements() * dtype.size_bytes());
        let mut buffer = buffer.map_err(|error| self.wanting(error, dtype, shape))?;
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
        tensor.buffer().write(0, bytes)
    }

    fn read(&self, tensor: &Tensor<Self>) -> Result<Vec<u8>> {
        let mut bytes = vec![0; tensor.size_bytes()];
        tensor.buffer().read(0, &mut bytes)?;
        self.inner.faults.check(self.runtime())?;
        Ok(bytes)
    }

    fn write_at(&self, tensor: &mut Tensor<Self>, first: usize, bytes: &[u8]) -> Result<()> {
        contract::piece("write_at", tensor, first, bytes.len())?;
        tensor.buffer().write(first, bytes)
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

    fn remark(&self) -> Option<String> {
        self.runtime().remark()
    }

    fn memory(&self) -> MemoryStats {
        self.inner.memory.stats()
    }

    fn step<T, E>(&self, work: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
        let _step = Step {
            gpu: self,
            is_owner: self.inner.memory.enter_step(),
        };
        work()
    }

    fn sharing<T, E>(&self, work: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
        let _sharing = Sharing {
            gpu: self,
            is_owner: self.inner.shared.enter(),
        };
        work()
    }

    fn can_record(&self) -> bool {
        true
    }

    fn record<E: From<Error>>(&self, documents: &Segments, work: impl FnMut() -> Result<(), E>) -> Result<Recorded, E> {
        self.recorded(documents, work)
    }

    fn reset_peak(&self) {
        self.inner.memory.reset_peak();
    }
}
