//! A backend that computes nothing and counts everything.
//!
//! Model code that runs on [`Counting`] allocates, frees and calls ops in its usual order, and every shape and dtype is checked
//! against the contract, but no tensor has contents. What remains is the account: the bytes in live tensors, their peak, and for
//! each op the arithmetic and the traffic it stands for. So a plan of memory and time is not a second description of the model
//! that may drift from the first: it is the model, run without numbers. A step of 80 billion parameters takes milliseconds.
//!
//! [`Habits`] say what the counted backend would do where the contract leaves it free: the dtype of activations, the rounding
//! of sizes, and the working memory of each op. [`Habits::cpu`] is the CPU backend to the byte, and [`Habits::gpu`] the GPU
//! backend to a few hundredths; tests of whole training steps guard both.
//!
//! What depends on data cannot be counted: every position is taken as supervised, and routing as even.

mod elementwise;
mod gpu;
mod matmul;
mod mixing;
mod scratch;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub use self::scratch::{Factors, Habits, Kernels};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::ops::{Device, MemoryStats, Op, Precision, Support};
use crate::tensor::{Shape, Tensor};
use crate::weight::Weight;

/// A handle to an account. Clones share it.
#[derive(Clone)]
pub struct Counting {
    habits: Habits,
    account: Arc<Mutex<Account>>,
}

/// What one call of an op stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Work {
    /// Which op.
    pub op: Op,
    /// Floating-point operations of its matrix products; a multiply-add is two.
    pub flops: u64,
    /// Bytes read and written when each operand passes once, weights in the encoding they have.
    pub bytes: u64,
    /// Bytes of the weights in 4-bit encodings once decoded to bf16: what a backend that decodes into memory first writes and
    /// reads again.
    pub decoded_bytes: u64,
}

#[derive(Default)]
struct Account {
    in_use: u64,
    peak: u64,
    work: Option<Vec<Work>>,
    /// Numbers given to buffers so far.
    buffers: u64,
    scope: Scope,
}

/// A scope that shares decoded weights; see [`Device::sharing`].
#[derive(Default)]
struct Scope {
    depth: usize,
    /// Decoded in it, by the number of the codes' buffer, and their bytes.
    decoded: HashMap<u64, u64>,
}

/// Storage without contents.
pub struct Buffer {
    /// No other buffer of the account has it.
    number: u64,
    bytes: u64,
    account: Arc<Mutex<Account>>,
}

impl Drop for Buffer {
    fn drop(&mut self) {
        locked(&self.account).in_use -= self.bytes;
    }
}

/// Counters stay correct whatever a panicking thread did in between.
fn locked(account: &Mutex<Account>) -> MutexGuard<'_, Account> {
    account.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Counting {
    /// An empty account of a backend with these habits.
    pub fn new(habits: Habits) -> Self {
        Self {
            habits,
            account: Arc::default(),
        }
    }

    /// Begins to record each op's work; what was recorded before is forgotten.
    pub fn record(&self) {
        locked(&self.account).work = Some(Vec::new());
    }

    /// Ends the recording and gives its work, call by call.
    pub fn recorded(&self) -> Vec<Work> {
        locked(&self.account).work.take().unwrap_or_default()
    }

    /// Notes an op's work and the working memory it has while it runs.
    fn did(&self, work: Work, scratch: &[u64]) {
        let mut account = locked(&self.account);
        let scratch: u64 = scratch.iter().map(|bytes| self.rounded(*bytes)).sum();
        account.peak = account.peak.max(account.in_use + scratch);
        if let Some(list) = &mut account.work {
            list.push(work);
        }
    }

    /// An op that only moves these tensors.
    fn moved(&self, op: Op, tensors: &[&Tensor<Self>]) {
        self.did(Work::moving(op, bytes_of(tensors)), &[]);
    }

    /// A weight of these codes is multiplied by, for so many rows: where the backend decodes it once for a scope, the scope has
    /// it from here on.
    fn shared(&self, codes: &Tensor<Self>, (rows, least): (usize, usize), decoded_bytes: u64) {
        let mut account = locked(&self.account);
        let number = codes.buffer().number;
        if rows < least || account.scope.depth == 0 || account.scope.decoded.contains_key(&number) {
            return;
        }
        let bytes = self.rounded(decoded_bytes);
        account.scope.decoded.insert(number, bytes);
        account.in_use += bytes;
        account.peak = account.peak.max(account.in_use);
    }

    fn rounded(&self, bytes: u64) -> u64 {
        bytes.next_multiple_of(self.habits.alignment_bytes)
    }
}

/// The end of a scope that shares decoded weights, also of one that fails.
struct Sharing<'a> {
    device: &'a Counting,
}

impl Drop for Sharing<'_> {
    fn drop(&mut self) {
        let mut account = locked(&self.device.account);
        account.scope.depth -= 1;
        if account.scope.depth == 0 {
            let freed: u64 = account.scope.decoded.drain().map(|(_, bytes)| bytes).sum();
            account.in_use -= freed;
        }
    }
}

impl Work {
    fn moving(op: Op, bytes: u64) -> Self {
        Self {
            op,
            flops: 0,
            bytes,
            decoded_bytes: 0,
        }
    }
}

fn bytes_of(tensors: &[&Tensor<Counting>]) -> u64 {
    tensors.iter().map(|tensor| tensor.size_bytes() as u64).sum()
}

/// Bytes of a 4-bit weight once decoded to bf16; 0 for any other.
fn decoded_bytes(weight: &Weight<Counting>) -> u64 {
    let (outputs, inputs) = weight.extents();
    match weight {
        Weight::Dense(_) => 0,
        Weight::Nf4(_) => (outputs * inputs * DType::BF16.size_bytes()) as u64,
    }
}

impl Device for Counting {
    type Buffer = Buffer;

    fn name(&self) -> &'static str {
        "counting"
    }

    fn supports(&self, _op: Op) -> Support {
        Support::Full
    }

    fn activation_dtype(&self, precision: Precision) -> DType {
        match precision {
            Precision::Bf16 if self.habits.has_bf16_activations => DType::BF16,
            _ => DType::F32,
        }
    }

    fn alloc(&self, dtype: DType, shape: impl Into<Shape>) -> Result<Tensor<Self>> {
        let shape = shape.into();
        let bytes = self.rounded(shape.elements() as u64 * dtype.size_bytes() as u64);
        let mut account = locked(&self.account);
        account.in_use += bytes;
        account.peak = account.peak.max(account.in_use);
        account.buffers += 1;
        let number = account.buffers;
        drop(account);
        let buffer = Buffer {
            number,
            bytes,
            account: Arc::clone(&self.account),
        };
        Ok(Tensor::from_buffer(buffer, dtype, shape))
    }

    fn fill_zero(&self, _tensor: &mut Tensor<Self>) -> Result<()> {
        Ok(())
    }

    fn write(&self, _tensor: &mut Tensor<Self>, _bytes: &[u8]) -> Result<()> {
        Ok(())
    }

    /// Zeros: there are no contents.
    fn read(&self, tensor: &Tensor<Self>) -> Result<Vec<u8>> {
        Ok(vec![0; tensor.size_bytes()])
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
        self.moved(Op::AddAssign, &[source, target]);
        Ok(())
    }

    fn sharing<T, E>(&self, work: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
        locked(&self.account).scope.depth += 1;
        let _sharing = Sharing { device: self };
        work()
    }

    fn memory(&self) -> MemoryStats {
        let account = locked(&self.account);
        MemoryStats {
            in_use_bytes: account.in_use,
            peak_bytes: account.peak,
            reserved_bytes: account.peak,
        }
    }

    fn reset_peak(&self) {
        let mut account = locked(&self.account);
        account.peak = account.in_use;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::ops::{LinearForward, MatmulOps};

    #[test]
    fn tensors_count_while_they_live_and_the_peak_stays() {
        let device = Counting::new(Habits::cpu(Factors::Exact));
        let kept = device.alloc(DType::F32, [1 << 40, 2]).unwrap();
        drop(device.alloc(DType::U8, [65]).unwrap());
        assert_eq!(device.memory().in_use_bytes, 1 << 43);
        assert_eq!(
            device.memory().peak_bytes,
            (1 << 43) + 128,
            "sizes are rounded to cache lines"
        );
        drop(kept);
        device.reset_peak();
        assert_eq!(device.memory(), MemoryStats::default());
    }

    #[test]
    fn a_product_counts_its_arithmetic_and_refuses_shapes_as_any_backend() {
        let device = Counting::new(Habits::gpu());
        let x = device.alloc(DType::BF16, [10, 64]).unwrap();
        let weight = Weight::Dense(device.alloc(DType::BF16, [32, 64]).unwrap());
        let mut y = device.alloc(DType::BF16, [10, 32]).unwrap();
        let call = |y| LinearForward {
            x: &x,
            weight: &weight,
            bias: None,
            lora: None,
            precision: Precision::Bf16,
            y,
        };
        device.record();
        device.linear_forward(call(&mut y)).unwrap();
        let work = device.recorded();
        assert_eq!((work.len(), work[0].flops), (1, 2 * 10 * 64 * 32));
        assert_eq!(work[0].bytes, 2 * (10 * 64 + 32 * 64 + 10 * 32));
        let mut wrong = device.alloc(DType::BF16, [10, 31]).unwrap();
        assert!(device.linear_forward(call(&mut wrong)).is_err());
    }
}
