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
    DELTA_CHUNK, DeltaBackward, DeltaForward, DeltaGatesBackward, DeltaGatesForward, DeltaInputsForward, DeltaOps,
    Device, Op,
};
use crate::tensor::{Segments, Tensor};

pub(super) static FAMILY: Family = Family {
    source: &GATED_DELTA,
    kernels: &[
        &PRODUCTS,
        &SOLVE,
        &FORWARD_DIRECT,
        &FORWARD_STAGED,
        &STATES_DIRECT,
        &STATES_STAGED,
        &REVERSE_DIRECT,
        &REVERSE_STAGED,
        &GRADIENTS,
    ],
    ops: &[Op::DeltaRuleForward, Op::DeltaRuleBackward],
};

const THREADS: u32 = 256;
/// Columns of the state of a block of the scans.
const COLUMNS: usize = 32;
/// Floats of the gates of a chunk in shared memory.
const GATES: usize = 5 * DELTA_CHUNK;
/// Floats of a chunk's square matrix in shared memory.
const SQUARE: usize = DELTA_CHUNK * (DELTA_CHUNK + 1);
/// The most shared memory that a scan takes for what it reads: what a block has on every target.
const STAGED_MOST_BYTES: usize = 99 * 1024;
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

/// Of a kernel that copies what it reads to shared memory first: bf16 only.
const fn staged(stem: &'static str, parameters: &'static [(&'static str, Parameter)]) -> Kernel {
    Kernel {
        types: &[&[DType::BF16]],
        ..kernel(stem, parameters)
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

const FORWARD: &[(&str, Parameter)] = &[
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
];
static FORWARD_DIRECT: Kernel = kernel("delta_forward_direct", FORWARD);
static FORWARD_STAGED: Kernel = staged("delta_forward_staged", FORWARD);

const STATES: &[(&str, Parameter)] = &[
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
];
static STATES_DIRECT: Kernel = kernel("delta_states_direct", STATES);
static STATES_STAGED: Kernel = staged("delta_states_staged", STATES);

const REVERSE: &[(&str, Parameter)] = &[
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
];
static REVERSE_DIRECT: Kernel = kernel("delta_reverse_direct", REVERSE);
static REVERSE_STAGED: Kernel = staged("delta_reverse_staged", REVERSE);

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

    /// A block for every document, value head and column block of the state; of both forms of a scan the one that suits. `rows`
    /// has the widths of what the scan reads of a chunk, besides the solved triangle.
    fn scan(
        &self,
        [direct, staged]: [&'static Kernel; 2],
        dtype: DType,
        sizes: DeltaSizes,
        rows: &[usize],
    ) -> (&'static Kernel, Geometry) {
        let grid = [
            self.documents.shape().rows(),
            sizes.value_heads,
            sizes.value_dim.div_ceil(COLUMNS),
        ];
        let stage = if dtype == DType::BF16 {
            half_stage(COLUMNS)
        } else {
            stage(COLUMNS)
        };
        let own = bytes(stage + GATES + (sizes.key_dim + DELTA_CHUNK) * (COLUMNS + 1));
        let triangle = bytes(DELTA_CHUNK * pitch(DELTA_CHUNK, size_of::<f32>()));
        let halves = rows
            .iter()
            .map(|width| DELTA_CHUNK * pitch(*width, 2) * 2)
            .sum::<usize>();
        let (is_regular, whole) = (
            [sizes.key_dim, sizes.value_dim].iter().all(|width| width % 8 == 0),
            own + triangle + halves,
        );
        let (kernel, shared) = match dtype == DType::BF16 && is_regular && whole <= STAGED_MOST_BYTES {
            true => (staged, whole),
            false => (direct, own),
        };
        (kernel, Geometry::grid(grid).with_shared(shared))
    }
}

/// Floats in shared memory that `Product` of so many columns works with.
const fn stage(columns: usize) -> usize {
    (64 + columns) * 33
}

/// The same of a product of bf16 factors.
const fn half_stage(columns: usize) -> usize {
    (64 + columns) * 40 / 2
}

/// Elements from one row of a chunk to the next in shared memory: 16 bytes more than the row, so that rows lie in other banks.
const fn pitch(width: usize, element_bytes: usize) -> usize {
    let pack = 16 / element_bytes;
    (width + pack).next_multiple_of(pack)
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
        let rows = [sizes.key_dim, COLUMNS];
        let (kernel, geometry) = chunks.scan([&STATES_DIRECT, &STATES_STAGED], dtype, sizes, &rows);
        self.launch(kernel, &[dtype], geometry, &arguments)?;
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
        let rows = [sizes.key_dim, COLUMNS, sizes.key_dim, DELTA_CHUNK];
        let (kernel, geometry) = chunks.scan([&REVERSE_DIRECT, &REVERSE_STAGED], dtype, sizes, &rows);
        self.launch(kernel, &[dtype], geometry, &arguments)?;
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
        let (dtype, rows) = (call.q.dtype(), [sizes.key_dim, COLUMNS, sizes.key_dim, DELTA_CHUNK]);
        let (kernel, geometry) = chunks.scan([&FORWARD_DIRECT, &FORWARD_STAGED], dtype, sizes, &rows);
        self.launch(kernel, &[dtype], geometry, &arguments)
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

    fn delta_inputs_forward(&self, call: DeltaInputsForward<'_, Self>) -> Result<()> {
        self.prepare_delta(call)
    }

    fn delta_gates_forward(&self, call: DeltaGatesForward<'_, Self>) -> Result<()> {
        self.open_delta_gates(call)
    }

    fn delta_gates_backward(&self, call: DeltaGatesBackward<'_, Self>) -> Result<()> {
        self.close_delta_gates(call)
    }
}
