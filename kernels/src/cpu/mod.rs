//! The CPU backend: the default one, fast enough to train small models for real.
//!
//! Activations are f32. With [`Precision::Bf16`] the factors of every matrix product are rounded to bf16 first; with
//! [`Precision::F32`] nothing is rounded below f32. Frozen weights are used in the encoding they have.
//!
//! Work is cut into tasks whose results do not depend on each other, and each sum is made by one task in one order, so the
//! bits of a result do not depend on the number of threads.

mod activation;
mod attention;
mod ceiling;
mod convolution;
mod delta;
mod embedding;
mod gate;
mod loss;
mod matmul;
mod matrix;
mod memory;
mod moe;
pub(crate) mod nf4;
mod norm;
mod optimizer;
mod products;
mod quantize;
mod random;
mod rope;
mod scratch;
mod simd;
mod small;
mod split;
mod tasks;
mod view;

use std::sync::Arc;

use crate::contract;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::ops::{Device, MemoryStats, Op, Precision, Support};
use crate::tensor::{Shape, Tensor};

pub use self::ceiling::{Ceiling, ceiling, processor_seconds, timed};
pub(crate) use self::loss::LOGITS_BYTES;
pub use self::memory::Buffer;
use self::memory::Pool;
use self::simd::Simd;
pub use self::simd::SimdLevel;

/// A handle to the CPU backend: a thread pool and a memory pool. Clones share both.
#[derive(Clone)]
pub struct Cpu {
    inner: Arc<Inner>,
}

struct Inner {
    memory: Arc<Pool>,
    threads: Option<rayon::ThreadPool>,
    simd: Simd,
    poison: bool,
}

impl Cpu {
    /// A CPU backend with its own threads and memory; `None` takes as many threads as the machine offers this process. It uses
    /// the best instructions of the machine, or those [`SimdLevel::VARIABLE`] allows.
    ///
    /// # Errors
    /// [`Error::Device`] when the threads cannot be started; [`Error::Value`] when the variable names no level.
    pub fn new(threads: Option<usize>) -> Result<Self> {
        Self::with_simd(threads, SimdLevel::from_environment()?)
    }

    /// As [`Cpu::new`] with the instructions of one level.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when the machine does not have the level; as [`Cpu::new`].
    pub fn with_simd(threads: Option<usize>, level: SimdLevel) -> Result<Self> {
        let available = || std::thread::available_parallelism().map_or(1, usize::from);
        let count = threads.unwrap_or_else(available).max(1);
        let simd = Simd::new(level).ok_or_else(|| Error::Unsupported {
            op: "choosing CPU instructions",
            backend: "cpu",
            reason: format!("this machine has no {level}"),
        })?;
        Ok(Self {
            inner: Arc::new(Inner {
                memory: Arc::new(Pool::default()),
                threads: tasks::start(count)?,
                simd,
                poison: cfg!(debug_assertions),
            }),
        })
    }

    /// The instructions in use.
    pub fn simd_level(&self) -> SimdLevel {
        self.inner.simd.level()
    }

    /// Number of threads that work on an op.
    pub fn threads(&self) -> usize {
        self.inner
            .threads
            .as_ref()
            .map_or(1, rayon::ThreadPool::current_num_threads)
    }
}

/// How the factors of a product are kept.
enum Products {
    /// As f32, rounded to bf16 values first or not.
    Single { rounded: bool },
    /// As bf16, for the dot-product instruction.
    Half,
}

impl Cpu {
    /// How products of a precision are made at this level. Where there is no bf16 instruction, rounded f32 factors give the
    /// same products.
    fn products(&self, precision: Precision) -> Products {
        match (precision, self.simd_level()) {
            (Precision::F32, _) => Products::Single { rounded: false },
            (Precision::Bf16, SimdLevel::Avx512Bf16) => Products::Half,
            (Precision::Bf16, _) => Products::Single { rounded: true },
        }
    }
}

impl Cpu {
    /// The same for the account of a [`Counting`](crate::counting::Counting) backend.
    pub fn factors(&self, precision: Precision) -> crate::counting::Factors {
        use crate::counting::Factors;
        match self.products(precision) {
            Products::Single { rounded: false } => Factors::Exact,
            Products::Single { rounded: true } => Factors::Rounded,
            Products::Half => Factors::Half,
        }
    }
}

impl Device for Cpu {
    type Buffer = Buffer;

    fn name(&self) -> &'static str {
        "cpu"
    }

    fn supports(&self, _op: Op) -> Support {
        Support::Full
    }

    fn activation_dtype(&self, _precision: Precision) -> DType {
        DType::F32
    }

    fn alloc(&self, dtype: DType, shape: impl Into<Shape>) -> Result<Tensor<Self>> {
        let shape = shape.into();
        let buffer = self.inner.memory.take(shape.elements() * dtype.size_bytes());
        let mut buffer = buffer.map_err(|error| error.wanting(|| format!("{dtype} {shape}")))?;
        if self.inner.poison {
            // All bits set is NaN in every float type.
            buffer.bytes_mut().fill(0xFF);
        }
        Ok(Tensor::from_buffer(buffer, dtype, shape))
    }

    fn fill_zero(&self, tensor: &mut Tensor<Self>) -> Result<()> {
        tensor.buffer_mut().bytes_mut().fill(0);
        Ok(())
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
        tensor.buffer_mut().bytes_mut().copy_from_slice(bytes);
        Ok(())
    }

    fn read(&self, tensor: &Tensor<Self>) -> Result<Vec<u8>> {
        Ok(tensor.buffer().bytes().to_vec())
    }

    fn write_at(&self, tensor: &mut Tensor<Self>, first: usize, bytes: &[u8]) -> Result<()> {
        let range = contract::piece("write_at", tensor, first, bytes.len())?;
        tensor.buffer_mut().bytes_mut()[range].copy_from_slice(bytes);
        Ok(())
    }

    fn read_at(&self, tensor: &Tensor<Self>, first: usize, out: &mut [u8]) -> Result<()> {
        let range = contract::piece("read_at", tensor, first, out.len())?;
        out.copy_from_slice(&tensor.buffer().bytes()[range]);
        Ok(())
    }

    fn host_bytes<'t>(&self, tensor: &'t mut Tensor<Self>) -> Option<&'t mut [u8]> {
        Some(tensor.buffer_mut().bytes_mut())
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
        self.convert(source, target)
    }

    fn memory(&self) -> MemoryStats {
        self.inner.memory.stats()
    }

    fn reset_peak(&self) {
        self.inner.memory.reset_peak();
    }
}
