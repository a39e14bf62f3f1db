//! The working memory of the GPU backend's ops, as `gpu` asks for it: the bytes of what lives at the worst moment of an op.

use super::scratch::floats;
use crate::contract::{DeltaSizes, GroupedSizes, LinearSizes};
use crate::dtype::DType;
use crate::gpu::{LossExtents, OUTER_PART, carries_delta, loss_extents, parts_bytes};
use crate::ops::{DELTA_CHUNK, Precision};

/// Bytes of a factor in the precision's dtype.
fn factor(precision: Precision, elements: usize) -> u64 {
    let dtype = match precision {
        Precision::F32 => DType::F32,
        Precision::Bf16 => DType::BF16,
    };
    (elements * dtype.size_bytes()) as u64
}

/// Bytes of an f32 tensor brought to the precision's dtype, if that is another.
fn converted(precision: Precision, elements: usize) -> u64 {
    match precision {
        Precision::F32 => 0,
        Precision::Bf16 => factor(precision, elements),
    }
}

/// Bytes of the parts that a product of few tiles is made in, of `[M, N, K]`.
fn split(precision: Precision, sizes: [usize; 3]) -> u64 {
    match precision {
        Precision::F32 => 0,
        Precision::Bf16 => parts_bytes(sizes) as u64,
    }
}

/// `decoded`: what the layer's own weight takes for this product alone.
pub(super) fn linear_forward(sizes: LinearSizes, precision: Precision, decoded: u64) -> [u64; 2] {
    let LinearSizes {
        tokens,
        inputs,
        outputs,
        rank,
    } = sizes;
    let [a, b] = [rank * inputs, rank * outputs].map(|elements| converted(precision, elements));
    let hidden = a + split(precision, [tokens, rank, inputs]);
    let whole = b + decoded + split(precision, [tokens, outputs, inputs]);
    [factor(precision, tokens * rank), hidden.max(whole)]
}

/// With the adapter's gradients; the outer products are sums over parts of tokens. `decoded` as forward, where dx is wanted.
pub(super) fn linear_backward(sizes: LinearSizes, precision: Precision, decoded: Option<u64>) -> [u64; 2] {
    let LinearSizes {
        tokens,
        inputs,
        outputs,
        rank,
    } = sizes;
    let [a, b] = [rank * inputs, rank * outputs].map(|elements| converted(precision, elements));
    let parts = |width: usize| match precision {
        Precision::F32 => 0,
        Precision::Bf16 => floats(tokens.div_ceil(OUTER_PART) * rank * width),
    };
    let hidden = converted(precision, tokens * rank);
    let gradients = a + b + parts(inputs).max(hidden + parts(outputs));
    let v = b + split(precision, [tokens, rank, outputs]);
    let dx = decoded.map_or(0, |decoded| a + decoded + split(precision, [tokens, inputs, outputs]));
    [factor(precision, tokens * rank), gradients.max(v).max(dx)]
}

pub(super) fn grouped_forward(sizes: GroupedSizes, precision: Precision, decoded: u64) -> [u64; 2] {
    let (experts, rows) = (sizes.routing.experts, sizes.routing.slots());
    let [a, b] = [sizes.inputs, sizes.outputs].map(|width| converted(precision, experts * sizes.rank * width));
    [factor(precision, rows * sizes.rank), a.max(b + decoded)]
}

pub(super) fn grouped_backward(sizes: GroupedSizes, precision: Precision, decoded: u64) -> [u64; 2] {
    let (experts, rows) = (sizes.routing.experts, sizes.routing.slots());
    let [a, b] = [sizes.inputs, sizes.outputs].map(|width| converted(precision, experts * sizes.rank * width));
    let hidden = converted(precision, rows * sizes.rank);
    let gradients = a + b + hidden;
    [factor(precision, rows * sizes.rank), gradients.max(a + decoded)]
}

/// Rows with a label, and what a chunk of them takes. `head` is what the head takes in another form.
pub(super) fn loss(sizes: LinearSizes, precision: Precision, has_gradient: bool, head: u64) -> Vec<u64> {
    let extents = loss_extents(sizes, precision, has_gradient);
    let LossExtents { chunk, pitch, .. } = extents;
    let mut bytes: Vec<u64> = match precision {
        Precision::Bf16 => extents
            .tensor_bytes(sizes, has_gradient)
            .map(|bytes| bytes as u64)
            .into(),
        Precision::F32 => vec![
            floats(sizes.tokens),
            floats(1),
            floats(chunk * pitch),
            if has_gradient { floats(chunk * pitch) } else { 0 },
            floats(chunk * sizes.inputs),
            floats(chunk),
        ],
    };
    bytes.push(head);
    bytes
}

/// `δ`, one number for each row of each head.
pub(super) fn attention_backward(tokens: usize, heads: usize) -> u64 {
    floats(tokens * heads)
}

/// The numbers of a chunk and head by which a state fades.
const FADES: usize = DELTA_CHUNK + 1;

fn chunks(sizes: DeltaSizes, documents: usize) -> usize {
    sizes.tokens / DELTA_CHUNK + documents
}

/// Elements of a state for every chunk and head.
fn states(sizes: DeltaSizes, documents: usize) -> usize {
    chunks(sizes, documents) * sizes.value_heads * sizes.key_dim * sizes.value_dim
}

/// What the carry reads of every chunk, and where that begins; or the products within chunks.
fn factors(sizes: DeltaSizes, documents: usize, dtype: DType) -> u64 {
    let rows = sizes.tokens * sizes.value_heads;
    if carries_delta(dtype, sizes) {
        let elements = rows * (sizes.key_dim + sizes.value_dim);
        (elements * dtype.size_bytes()) as u64 + floats(chunks(sizes, documents) * sizes.value_heads * FADES)
    } else {
        (rows * DELTA_CHUNK * dtype.size_bytes()) as u64
    }
}

/// The carry leaves a state before every chunk.
pub(super) fn delta_forward(sizes: DeltaSizes, documents: usize, dtype: DType) -> u64 {
    let carried = if carries_delta(dtype, sizes) {
        states(sizes, documents)
    } else {
        0
    };
    (carried * dtype.size_bytes()) as u64 + factors(sizes, documents, dtype)
}

/// States before the chunks and their gradients, and two tensors like the values, of which the carry's factors have one.
pub(super) fn delta_backward(sizes: DeltaSizes, documents: usize, dtype: DType) -> u64 {
    let tensors = if carries_delta(dtype, sizes) { 1 } else { 2 };
    let values = tensors * sizes.tokens * sizes.value_heads * sizes.value_dim;
    let elements = 2 * states(sizes, documents) + values;
    (elements * dtype.size_bytes()) as u64 + factors(sizes, documents, dtype)
}
