//! The gated delta rule: `gated_delta.cu`; its gates are in `gate.cu`.

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
    DELTA_CHUNK, DeltaBackward, DeltaForward, DeltaGatesBackward, DeltaGatesForward, DeltaOps, Device, Op,
};
use crate::tensor::{Segments, Tensor};

pub(super) static FAMILY: Family = Family {
    source: &GATED_DELTA,
    kernels: &[&PRODUCTS, &SOLVE, &FORWARD, &STATES, &REVERSE, &GRADIENTS],
    ops: &[Op::DeltaRuleForward, Op::DeltaRuleBackward],
};

const THREADS: u32 = 256;
/// Columns of the state of a block of the scans.
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

static PRODUCTS: Kernel = kernel(
    "delta_products",
    &[
        ("q", In(A)),
        ("k", In(A)),
        ("decay", In(SINGLE)),
        ("beta", In(SINGLE)),
        ("chunks", In(INTEGER)),
        ("products", Out(A)),
        ("key_heads", I32),
        ("value_heads", I32),
        ("key_dim", I32),
        ("value_dim", I32),
    ],
);

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

static FORWARD: Kernel = kernel(
    "delta_forward",
    &[
        ("q", In(A)),
        ("k", In(A)),
        ("v", In(A)),
        ("decay", In(SINGLE)),
        ("beta", In(SINGLE)),
        ("solved", In(SINGLE)),
        ("products", In(A)),
        ("documents", In(INTEGER)),
        ("state", Out(SINGLE)),
        ("out", Out(A)),
        ("key_heads", I32),
        ("value_heads", I32),
        ("key_dim", I32),
        ("value_dim", I32),
        ("scale", F32),
    ],
);

static STATES: Kernel = kernel(
    "delta_states",
    &[
        ("k", In(A)),
        ("v", In(A)),
        ("decay", In(SINGLE)),
        ("beta", In(SINGLE)),
        ("solved", In(SINGLE)),
        ("documents", In(INTEGER)),
        ("states", Out(A)),
        ("corrected", Out(A)),
        ("key_heads", I32),
        ("value_heads", I32),
        ("key_dim", I32),
        ("value_dim", I32),
    ],
);

static REVERSE: Kernel = kernel(
    "delta_reverse",
    &[
        ("q", In(A)),
        ("k", In(A)),
        ("decay", In(SINGLE)),
        ("beta", In(SINGLE)),
        ("solved", In(SINGLE)),
        ("products", In(A)),
        ("dout", In(A)),
        ("documents", In(INTEGER)),
        ("dstates", Out(A)),
        ("dresidual", Out(A)),
        ("dv", Out(A)),
        ("key_heads", I32),
        ("value_heads", I32),
        ("key_dim", I32),
        ("value_dim", I32),
        ("scale", F32),
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
    fn scans(&self, sizes: DeltaSizes) -> Geometry {
        let grid = [
            self.documents.shape().rows(),
            sizes.value_heads,
            sizes.value_dim.div_ceil(COLUMNS),
        ];
        let floats = stage(COLUMNS) + GATES + (sizes.key_dim + DELTA_CHUNK) * (COLUMNS + 1);
        Geometry::grid(grid).with_shared(floats * size_of::<f32>())
    }
}

/// Floats in shared memory that `Product` of so many columns works with.
const fn stage(columns: usize) -> usize {
    (64 + columns) * 33
}

fn bytes(floats: usize) -> usize {
    floats * size_of::<f32>()
}

/// `Hk`, `Hv`, `Dk`, `Dv`, as every kernel takes them.
fn heads<'a, R: Runtime>(sizes: DeltaSizes) -> [Argument<'a, R>; 4] {
    [sizes.key_heads, sizes.value_heads, sizes.key_dim, sizes.value_dim].map(Argument::Size)
}

impl<R: Runtime> Gpu<R> {
    /// `P`, activation `[T, Hv, 64]`.
    fn delta_products(
        &self,
        (q, k): (&Tensor<Self>, &Tensor<Self>),
        (decay, beta): (&Tensor<Self>, &Tensor<Self>),
        chunks: &Chunks<R>,
        sizes: DeltaSizes,
    ) -> Result<Tensor<Self>> {
        let mut products = self.alloc(q.dtype(), [sizes.tokens, sizes.value_heads, DELTA_CHUNK])?;
        let [key_heads, value_heads, key_dim, value_dim] = heads(sizes);
        let arguments = [
            Argument::In(q),
            Argument::In(k),
            Argument::In(decay),
            Argument::In(beta),
            Argument::In(&chunks.chunks),
            Argument::Out(&mut products),
            key_heads,
            value_heads,
            key_dim,
            value_dim,
        ];
        let blocks = chunks
            .blocks(sizes.value_heads)
            .with_shared(bytes(stage(DELTA_CHUNK) + GATES));
        self.launch(&PRODUCTS, &[q.dtype()], blocks, &arguments)?;
        Ok(products)
    }

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

    /// The states before the chunks, `[chunks, Hv, Dk, Dv]`, and `u`, `[T, Hv, Dv]`, again.
    fn delta_states(
        &self,
        call: &DeltaBackward<'_, Self>,
        chunks: &Chunks<R>,
        sizes: DeltaSizes,
    ) -> Result<(Tensor<Self>, Tensor<Self>)> {
        let dtype = call.q.dtype();
        let mut states = self.alloc(dtype, state_shape(chunks, sizes))?;
        let mut corrected = self.alloc(dtype, call.v.shape())?;
        let [key_heads, value_heads, key_dim, value_dim] = heads(sizes);
        let arguments = [
            Argument::In(call.k),
            Argument::In(call.v),
            Argument::In(call.decay),
            Argument::In(call.beta),
            Argument::In(call.solved),
            Argument::In(&chunks.documents),
            Argument::Out(&mut states),
            Argument::Out(&mut corrected),
            key_heads,
            value_heads,
            key_dim,
            value_dim,
        ];
        self.launch(&STATES, &[dtype], chunks.scans(sizes), &arguments)?;
        Ok((states, corrected))
    }

    /// Writes `dv`; the gradients of the states behind the chunks, and of `r`.
    fn delta_reverse(
        &self,
        call: &mut DeltaBackward<'_, Self>,
        chunks: &Chunks<R>,
        sizes: DeltaSizes,
    ) -> Result<(Tensor<Self>, Tensor<Self>)> {
        let dtype = call.q.dtype();
        let products = self.delta_products((call.q, call.k), (call.decay, call.beta), chunks, sizes)?;
        let mut dstates = self.alloc(dtype, state_shape(chunks, sizes))?;
        let mut dresidual = self.alloc(dtype, call.v.shape())?;
        let [key_heads, value_heads, key_dim, value_dim] = heads(sizes);
        let arguments = [
            Argument::In(call.q),
            Argument::In(call.k),
            Argument::In(call.decay),
            Argument::In(call.beta),
            Argument::In(call.solved),
            Argument::In(&products),
            Argument::In(call.dout),
            Argument::In(&chunks.documents),
            Argument::Out(&mut dstates),
            Argument::Out(&mut dresidual),
            Argument::Out(call.dv),
            key_heads,
            value_heads,
            key_dim,
            value_dim,
            Argument::F32(call.scale),
        ];
        self.launch(&REVERSE, &[dtype], chunks.scans(sizes), &arguments)?;
        Ok((dstates, dresidual))
    }
}

fn state_shape<R: Runtime>(chunks: &Chunks<R>, sizes: DeltaSizes) -> [usize; 4] {
    [chunks.count(), sizes.value_heads, sizes.key_dim, sizes.value_dim]
}

impl<R: Runtime> DeltaOps for Gpu<R> {
    fn delta_rule_forward(&self, mut call: DeltaForward<'_, Self>) -> Result<()> {
        let sizes = contract::delta_rule_forward(&call)?;
        let chunks = Chunks::new(self, call.segments)?;
        let products = self.delta_products((call.q, call.k), (call.decay, call.beta), &chunks, sizes)?;
        self.delta_solve(&mut call, &chunks, sizes)?;
        let [key_heads, value_heads, key_dim, value_dim] = heads(sizes);
        let arguments = [
            Argument::In(call.q),
            Argument::In(call.k),
            Argument::In(call.v),
            Argument::In(call.decay),
            Argument::In(call.beta),
            Argument::In(call.solved),
            Argument::In(&products),
            Argument::In(&chunks.documents),
            Argument::OptionalOut(call.state),
            Argument::Out(call.out),
            key_heads,
            value_heads,
            key_dim,
            value_dim,
            Argument::F32(call.scale),
        ];
        self.launch(&FORWARD, &[call.q.dtype()], chunks.scans(sizes), &arguments)
    }

    fn delta_rule_backward(&self, mut call: DeltaBackward<'_, Self>) -> Result<()> {
        let sizes = contract::delta_rule_backward(&call)?;
        let chunks = Chunks::new(self, call.segments)?;
        let (states, corrected) = self.delta_states(&call, &chunks, sizes)?;
        let (dstates, dresidual) = self.delta_reverse(&mut call, &chunks, sizes)?;
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
            Argument::In(&states),
            Argument::In(&dstates),
            Argument::In(&corrected),
            Argument::In(&dresidual),
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

    fn delta_gates_forward(&self, call: DeltaGatesForward<'_, Self>) -> Result<()> {
        self.open_delta_gates(call)
    }

    fn delta_gates_backward(&self, call: DeltaGatesBackward<'_, Self>) -> Result<()> {
        self.close_delta_gates(call)
    }
}
