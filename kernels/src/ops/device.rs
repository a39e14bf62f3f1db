//! Memory and capabilities: what every op family stands on.

use crate::contract;
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::{Precision, Recorded};
use crate::tensor::{Segments, Shape, Tensor};

/// One op of the interface, for capability questions and reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[allow(missing_docs)] // Each variant names the method of the same name.
pub enum Op {
    LinearForward,
    LinearBackward,
    RmsNormForward,
    RmsNormBackward,
    AddRmsNormForward,
    Rope,
    AttentionForward,
    AttentionBackward,
    AddAssign,
    SwigluForward,
    SwigluBackward,
    GatherRows,
    CopyRows,
    LinearCrossEntropy,
    SquaredNorm,
    AdamwStep,
    Adamw8bitStep,
    QuantizeNf4,
    Dequantize,
    Route,
    RouteBackward,
    GroupedLinearForward,
    GroupedLinearBackward,
    RoutedSwigluForward,
    RoutedSwigluBackward,
    Combine,
    GroupedSwigluForward,
    GroupedPairBackward,
    CombineResidual,
    StackExpert,
    DeltaRuleForward,
    DeltaRuleBackward,
    DeltaGatesForward,
    DeltaGatesBackward,
    DeltaInputsForward,
    DeltaInputsBackward,
    ConvolutionForward,
    ConvolutionBackward,
    SigmoidGateForward,
    SigmoidGateBackward,
    GatedNormForward,
    GatedNormBackward,
    L2NormForward,
    L2NormBackward,
    CopyColumns,
    FillRandom,
}

/// Whether a backend can do an op. Absence is a value: reported, never passed over in silence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Support {
    /// It can, in every form of the contract.
    Full,
    /// It cannot, and why.
    Absent(String),
}

/// What a backend's memory pool holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryStats {
    /// Bytes in live tensors.
    pub in_use_bytes: u64,
    /// The most bytes that were ever in live tensors at once (since the last reset).
    pub peak_bytes: u64,
    /// Bytes held from the system, free blocks of the pool included.
    pub reserved_bytes: u64,
}

/// A place where tensors live. Cloning gives another handle to the same place.
pub trait Device: Clone + Send + Sync + Sized + 'static {
    /// Storage of one tensor. Dropping it gives the memory back to the pool.
    type Buffer: Send + Sync;

    /// A short name for messages: `cpu`, `cuda:0`, `emulated`.
    fn name(&self) -> &'static str;

    /// Whether this backend can do `op`.
    fn supports(&self, op: Op) -> Support;

    /// The dtype this backend wants activations in, given the matmul precision.
    fn activation_dtype(&self, precision: Precision) -> DType;

    /// A tensor whose contents are unspecified. Debug builds fill it with NaN, so that reading what was never
    /// written cannot go unnoticed.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory).
    fn alloc(&self, dtype: DType, shape: impl Into<Shape>) -> Result<Tensor<Self>>;

    /// A tensor of zeros.
    ///
    /// # Errors
    /// As [`Device::alloc`].
    fn zeros(&self, dtype: DType, shape: impl Into<Shape>) -> Result<Tensor<Self>> {
        let mut tensor = self.alloc(dtype, shape)?;
        self.fill_zero(&mut tensor)?;
        Ok(tensor)
    }

    /// Sets every element to zero.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device).
    fn fill_zero(&self, tensor: &mut Tensor<Self>) -> Result<()>;

    /// A tensor with the given little-endian contents.
    ///
    /// # Errors
    /// [`Error::Value`](crate::Error::Value) when the length is not the shape's; as [`Device::alloc`].
    fn upload(&self, dtype: DType, shape: impl Into<Shape>, bytes: &[u8]) -> Result<Tensor<Self>> {
        let mut tensor = self.alloc(dtype, shape)?;
        self.write(&mut tensor, bytes)?;
        Ok(tensor)
    }

    /// Overwrites a tensor with little-endian contents.
    ///
    /// # Errors
    /// [`Error::Value`](crate::Error::Value) when the length is not the tensor's.
    fn write(&self, tensor: &mut Tensor<Self>, bytes: &[u8]) -> Result<()>;

    /// A tensor's little-endian contents. Waits for every op that writes it.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device).
    fn read(&self, tensor: &Tensor<Self>) -> Result<Vec<u8>>;

    /// Overwrites the bytes of a tensor from byte `first` on. A large tensor is so filled piece by piece, without ever being whole
    /// in host memory a second time. Backends override this; here the whole tensor makes the round trip.
    ///
    /// # Errors
    /// [`Error::Value`](crate::Error::Value) when the piece reaches beyond the tensor's end; as [`Device::write`].
    fn write_at(&self, tensor: &mut Tensor<Self>, first: usize, bytes: &[u8]) -> Result<()> {
        let range = contract::piece("write_at", tensor, first, bytes.len())?;
        let mut whole = self.read(tensor)?;
        whole[range].copy_from_slice(bytes);
        self.write(tensor, &whole)
    }

    /// Reads the bytes of a tensor from byte `first` on. Backends override this, as [`Device::write_at`].
    ///
    /// # Errors
    /// [`Error::Value`](crate::Error::Value) when the piece reaches beyond the tensor's end; as [`Device::read`].
    fn read_at(&self, tensor: &Tensor<Self>, first: usize, out: &mut [u8]) -> Result<()> {
        let range = contract::piece("read_at", tensor, first, out.len())?;
        out.copy_from_slice(&self.read(tensor)?[range]);
        Ok(())
    }

    /// The bytes of a tensor where the host can write them; `None` where it cannot. Reading a file to its place takes this, to save a
    /// copy; everyone else uses [`Device::write_at`].
    fn host_bytes<'t>(&self, tensor: &'t mut Tensor<Self>) -> Option<&'t mut [u8]> {
        let _ = tensor;
        None
    }

    /// Copies `source` into `target`, which has the same shape; converts between f32 and bf16 (round to nearest even).
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape), [`Error::DType`](crate::Error::DType).
    fn copy(&self, source: &Tensor<Self>, target: &mut Tensor<Self>) -> Result<()>;

    /// What a user may want to know of how this backend works here, once that has shown: a library that is missing, say.
    fn remark(&self) -> Option<String> {
        None
    }

    /// What the memory pool holds.
    fn memory(&self) -> MemoryStats;

    /// Sets the peak to what is in use now.
    fn reset_peak(&self);

    /// Does one step of something that is done again and again, or a part of it. Tensors that are made inside are expected to be
    /// gone when it is over (others keep their memory, at the price of a plan); a backend may then lay them out in one block, so
    /// that no step after the first asks for memory. Steps may be nested; those of two threads are not laid out together.
    ///
    /// # Errors
    /// Those of `work`.
    fn step<T, E>(&self, work: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
        work()
    }

    /// Does work that uses the same frozen weights more than once. A backend may then keep a form of them that is cheaper to
    /// multiply by, until the work is done; no bit of any result depends on it.
    ///
    /// # Errors
    /// Those of `work`.
    fn sharing<T, E>(&self, work: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
        work()
    }

    /// Whether [`Device::record`] may give recordings. Callers then take care that batches have few different shapes.
    fn can_record(&self) -> bool {
        false
    }

    /// Does `work`, which is part of a [`Device::step`], and where the backend can, remembers its launches to be done again for
    /// other documents of the same number of tokens and of documents (see [`Segments`]); other documents than those may not take
    /// part. What `work` launches may depend on nothing else that changes: no argument may be another number the next time, and
    /// tensors from outside must live as long as the recording and be filled before.
    ///
    /// Work that reads a tensor on the host or needs memory beyond the step's cannot be recorded: it is done all the same, and
    /// the answer says what stood in the way. `work` may be called twice, the first time without effect.
    ///
    /// # Errors
    /// Those of `work`.
    fn record<E: From<crate::Error>>(
        &self,
        documents: &Segments,
        mut work: impl FnMut() -> Result<(), E>,
    ) -> Result<Recorded, E> {
        let _ = documents;
        work()?;
        Ok(Recorded::Not(format!("the {} backend runs op by op", self.name())))
    }

    /// f32 contents of an f32 or bf16 tensor.
    ///
    /// # Errors
    /// [`Error::DType`](crate::Error::DType) for other dtypes; as [`Device::read`].
    fn read_f32(&self, tensor: &Tensor<Self>) -> Result<Vec<f32>> {
        let bytes = self.read(tensor)?;
        match tensor.dtype() {
            DType::F32 => Ok(bytemuck::allocation::pod_collect_to_vec(&bytes)),
            DType::BF16 => {
                let halves: Vec<u16> = bytemuck::allocation::pod_collect_to_vec(&bytes);
                Ok(halves
                    .into_iter()
                    .map(|bits| f32::from_bits(u32::from(bits) << 16))
                    .collect())
            }
            got => Err(crate::Error::DType {
                op: "read_f32",
                argument: "tensor",
                expected: "f32 or bf16",
                got,
            }),
        }
    }

    /// An f32 tensor from host values.
    ///
    /// # Errors
    /// As [`Device::upload`].
    fn upload_f32(&self, shape: impl Into<Shape>, values: &[f32]) -> Result<Tensor<Self>> {
        self.upload(DType::F32, shape, bytemuck::cast_slice(values))
    }

    /// An i32 tensor from host values.
    ///
    /// # Errors
    /// As [`Device::upload`].
    fn upload_i32(&self, shape: impl Into<Shape>, values: &[i32]) -> Result<Tensor<Self>> {
        self.upload(DType::I32, shape, bytemuck::cast_slice(values))
    }
}
