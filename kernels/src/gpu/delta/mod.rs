//! The gated delta rule: `gated_delta.cu`, and `delta_carry.cu` for bf16; its gates are in `gate.cu`.

mod carried;
mod direct;

use std::sync::Arc;

use super::elementwise::ACTIVATION;
use super::family::Family;
use super::kernel::Parameter::{self, F32, I32, In, Out};
use super::layouts::Table;
use super::sources::GATED_DELTA;
use super::{Argument, Element, Geometry, Gpu, Kernel, Runtime};
use crate::contract::{self, DeltaSizes};
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::{
    DELTA_CHUNK, DeltaBackward, DeltaForward, DeltaGatesBackward, DeltaGatesForward, DeltaInputsBackward,
    DeltaInputsForward, DeltaOps, Op,
};
use crate::tensor::{Segments, Tensor};

pub(super) use carried::FAMILY as CARRY_FAMILY;

pub(super) static FAMILY: Family = Family {
    source: &GATED_DELTA,
    kernels: &[
        &SOLVE,
        &direct::PRODUCTS,
        &direct::FORWARD,
        &direct::STATES,
        &direct::REVERSE,
        &GRADIENTS,
    ],
    ops: &[Op::DeltaRuleForward, Op::DeltaRuleBackward],
};

const THREADS: u32 = 256;
/// Columns of the state of a block of a scan.
const COLUMNS: usize = 32;
/// Floats of the gates of a chunk in shared memory.
const GATES: usize = 5 * DELTA_CHUNK;
/// Floats of a chunk's square matrix in shared memory.
const SQUARE: usize = DELTA_CHUNK * (DELTA_CHUNK + 1);
const A: Element = Element::Type(0);
const SINGLE: Element = Element::Is(DType::F32);
const INTEGER: Element = Element::Is(DType::I32);

const fn kernel(stem: &'static str, parameters: &'static [(&'static str, Parameter)]) -> Kernel {
    Kernel {
        source: &GATED_DELTA,
        stem,
        types: &[ACTIVATION],
        threads: THREADS,
        parameters,
    }
}

static SOLVE: Kernel = kernel(
    "delta_solve",
    &[
        ("k", In(A)),
        ("decay", In(SINGLE)),
        ("beta", In(SINGLE)),
        ("chunks", In(INTEGER)),
        ("solved", Out(SINGLE)),
        ("key_heads", I32),
        ("value_heads", I32),
        ("key_dim", I32),
        ("value_dim", I32),
    ],
);

static GRADIENTS: Kernel = kernel(
    "delta_gradients",
    &[
        ("q", In(A)),
        ("k", In(A)),
        ("v", In(A)),
        ("decay", In(SINGLE)),
        ("beta", In(SINGLE)),
        ("states", In(A)),
        ("dstates", In(A)),
        ("corrected", In(A)),
        ("dresidual", In(A)),
        ("dout", In(A)),
        ("chunks", In(INTEGER)),
        ("dq", Out(A)),
        ("dk", Out(A)),
        ("ddecay", Out(SINGLE)),
        ("dbeta", Out(SINGLE)),
        ("key_heads", I32),
        ("value_heads", I32),
        ("key_dim", I32),
        ("value_dim", I32),
        ("scale", F32),
    ],
);

/// The documents cut into chunks, on the device (`layouts`). The last chunks may be empty.
struct Chunks<R: Runtime> {
    /// i32 `[chunks, 2]`: first row and rows of each chunk.
    chunks: Arc<Tensor<Gpu<R>>>,
    /// i32 `[documents, 3]`: first row, end and first chunk of each document.
    documents: Arc<Tensor<Gpu<R>>>,
}

impl<R: Runtime> Chunks<R> {
    fn new(gpu: &Gpu<R>, segments: &Segments) -> Result<Self> {
        Ok(Self {
            chunks: gpu.layout(Table::Chunks, [segments; 2])?,
            documents: gpu.layout(Table::ChunkedDocuments, [segments; 2])?,
        })
    }

    fn count(&self) -> usize {
        self.chunks.shape().rows()
    }

    /// A block for every chunk and each of `heads` heads.
    fn blocks(&self, heads: usize) -> Geometry {
        Geometry::grid([self.count(), heads, 1])
    }

    /// A block for every document, value head and column block of the state.
    fn scan(&self, sizes: DeltaSizes) -> Geometry {
        let columns = sizes.value_dim.div_ceil(COLUMNS);
        Geometry::grid([self.documents.shape().rows(), sizes.value_heads, columns])
    }

    /// A state for every chunk and value head.
    fn states(&self, sizes: DeltaSizes) -> [usize; 4] {
        [self.count(), sizes.value_heads, sizes.key_dim, sizes.value_dim]
    }
}

/// What [`DeltaOps::delta_rule_backward`] finds from chunk to chunk, for the gradients of each chunk.
struct Passed<R: Runtime> {
    /// The states before the chunks, activation `[chunks, Hv, Dk, Dv]`.
    states: Tensor<Gpu<R>>,
    /// Gradients of the states behind the chunks, likewise.
    dstates: Tensor<Gpu<R>>,
    /// `u`, activation `[T, Hv, Dv]`.
    corrected: Tensor<Gpu<R>>,
    /// The gradient of `r`, likewise.
    dresidual: Tensor<Gpu<R>>,
}

/// Floats in shared memory that `Product` of so many columns works with.
const fn stage(columns: usize) -> usize {
    (64 + columns) * 33
}

fn bytes(floats: usize) -> usize {
    floats * size_of::<f32>()
}

/// Whether heads of these sizes have the scans of `delta_carry.cu`.
pub(crate) fn carries_delta(dtype: DType, sizes: DeltaSizes) -> bool {
    carried::Form::of(dtype, sizes).is_some()
}

/// `Hk`, `Hv`, `Dk`, `Dv`, as every kernel takes them.
fn heads<'a, R: Runtime>(sizes: DeltaSizes) -> [Argument<'a, R>; 4] {
    [sizes.key_heads, sizes.value_heads, sizes.key_dim, sizes.value_dim].map(Argument::Size)
}

impl<R: Runtime> Gpu<R> {
    /// Writes `A`.
    fn delta_solve(&self, call: &mut DeltaForward<'_, Self>, chunks: &Chunks<R>, sizes: DeltaSizes) -> Result<()> {
        let [key_heads, value_heads, key_dim, value_dim] = heads(sizes);
        let arguments = [
            Argument::In(call.k),
            Argument::In(call.decay),
            Argument::In(call.beta),
            Argument::In(&chunks.chunks),
            Argument::Out(call.solved),
            key_heads,
            value_heads,
            key_dim,
            value_dim,
        ];
        let shared = bytes(stage(DELTA_CHUNK) + 2 * SQUARE + GATES);
        let blocks = chunks.blocks(sizes.value_heads).with_shared(shared);
        self.launch(&SOLVE, &[call.k.dtype()], blocks, &arguments)
    }

    /// Writes all gradients but `dv`, which is known.
    fn delta_gradients(
        &self,
        call: DeltaBackward<'_, Self>,
        passed: &Passed<R>,
        chunks: &Chunks<R>,
        sizes: DeltaSizes,
    ) -> Result<()> {
        let group = sizes.value_heads / sizes.key_heads;
        let floats = stage(DELTA_CHUNK) + 2 * SQUARE + 2 * DELTA_CHUNK + GATES + 2 * group * DELTA_CHUNK;
        let blocks = chunks.blocks(sizes.key_heads).with_shared(bytes(floats));
        let [key_heads, value_heads, key_dim, value_dim] = heads(sizes);
        let arguments = [
            Argument::In(call.q),
            Argument::In(call.k),
            Argument::In(call.v),
            Argument::In(call.decay),
            Argument::In(call.beta),
            Argument::In(&passed.states),
            Argument::In(&passed.dstates),
            Argument::In(&passed.corrected),
            Argument::In(&passed.dresidual),
            Argument::In(call.dout),
            Argument::In(&chunks.chunks),
            Argument::Out(call.dq),
            Argument::Out(call.dk),
            Argument::Out(call.ddecay),
            Argument::Out(call.dbeta),
            key_heads,
            value_heads,
            key_dim,
            value_dim,
            Argument::F32(call.scale),
        ];
        self.launch(&GRADIENTS, &[call.q.dtype()], blocks, &arguments)
    }
}

impl<R: Runtime> DeltaOps for Gpu<R> {
    fn delta_rule_forward(&self, mut call: DeltaForward<'_, Self>) -> Result<()> {
        let sizes = contract::delta_rule_forward(&call)?;
        let chunks = Chunks::new(self, call.segments)?;
        self.delta_solve(&mut call, &chunks, sizes)?;
        match carried::Form::of(call.q.dtype(), sizes) {
            Some(form) => self.carry_delta(form, call, &chunks, sizes),
            None => self.scan_delta(call, &chunks, sizes),
        }
    }

    fn delta_rule_backward(&self, mut call: DeltaBackward<'_, Self>) -> Result<()> {
        let sizes = contract::delta_rule_backward(&call)?;
        let chunks = Chunks::new(self, call.segments)?;
        let passed = match carried::Form::of(call.q.dtype(), sizes) {
            Some(form) => self.carry_delta_back(form, &mut call, &chunks, sizes)?,
            None => self.scan_delta_back(&mut call, &chunks, sizes)?,
        };
        self.delta_gradients(call, &passed, &chunks, sizes)
    }

    fn delta_inputs_forward(&self, call: DeltaInputsForward<'_, Self>) -> Result<()> {
        self.prepare_delta(call)
    }

    fn delta_inputs_backward(&self, call: DeltaInputsBackward<'_, Self>) -> Result<()> {
        self.prepare_delta_back(call)
    }

    fn delta_gates_forward(&self, call: DeltaGatesForward<'_, Self>) -> Result<()> {
        self.open_delta_gates(call)
    }

    fn delta_gates_backward(&self, call: DeltaGatesBackward<'_, Self>) -> Result<()> {
        self.close_delta_gates(call)
    }
}
