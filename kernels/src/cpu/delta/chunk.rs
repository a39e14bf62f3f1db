//! What forward and backward share: a head's inputs, and the small matrices of one chunk. Letters as in
//! [`DeltaOps`](crate::ops::DeltaOps)' formulas.

use std::ops::Range;

use super::super::simd::Simd;
use super::super::simd::rows::{exponentials, scale};
use super::super::simd::small::add_nt;
use crate::contract::DeltaSizes;
use crate::ops::DELTA_CHUNK;

/// The op's inputs.
pub(super) struct Head<'a> {
    /// `[T, Hk, Dk]`.
    pub(super) q: &'a [f32],
    /// `[T, Hk, Dk]`.
    pub(super) k: &'a [f32],
    /// `[T, Hv, Dv]`.
    pub(super) v: &'a [f32],
    /// `[T, Hv]`.
    pub(super) decay: &'a [f32],
    /// `[T, Hv]`.
    pub(super) beta: &'a [f32],
    pub(super) scale: f32,
    pub(super) sizes: DeltaSizes,
    pub(super) simd: Simd,
}

/// The rows of one chunk of one head, gathered.
pub(super) struct Chunk {
    /// Rows.
    pub(super) n: usize,
    /// `[n, Dk]`.
    pub(super) q: Vec<f32>,
    /// `[n, Dk]`.
    pub(super) k: Vec<f32>,
    /// `[n, Dv]`.
    pub(super) v: Vec<f32>,
    /// `β`.
    pub(super) beta: Vec<f32>,
    /// `e^{c_i}`: from the chunk's beginning through row `i`.
    pub(super) from_start: Vec<f32>,
    /// `e^{c_n − c_i}`: from behind row `i` to the chunk's end.
    pub(super) to_end: Vec<f32>,
    /// `e^{c_i − c_j}` for `j ≤ i`, else 0; `[n, n]`.
    pub(super) between: Vec<f32>,
    pub(super) simd: Simd,
}

/// The chunks of a document.
pub(super) fn chunks(document: Range<usize>) -> impl DoubleEndedIterator<Item = Range<usize>> + ExactSizeIterator {
    let count = document.len().div_ceil(DELTA_CHUNK);
    (0..count).map(move |i| {
        let start = document.start + i * DELTA_CHUNK;
        start..(start + DELTA_CHUNK).min(document.end)
    })
}

impl Head<'_> {
    /// The rows of a chunk for value head `head`.
    pub(super) fn chunk(&self, rows: Range<usize>, head: usize) -> Chunk {
        let sizes = self.sizes;
        let key_head = head * sizes.key_heads / sizes.value_heads;
        let keys = |values: &[f32]| gather(values, rows.clone(), (sizes.key_heads, key_head, sizes.key_dim));
        let of_head = |values: &[f32], width: usize| gather(values, rows.clone(), (sizes.value_heads, head, width));
        let cumulated = cumulated(&of_head(self.decay, 1));
        let end = cumulated.last().copied().unwrap_or(0.0);
        let n = rows.len();
        let mut between = vec![0.0; n * n];
        for (i, row) in between.chunks_exact_mut(n.max(1)).enumerate() {
            for (between, earlier) in row[..=i].iter_mut().zip(&cumulated) {
                *between = (cumulated[i] - earlier) as f32;
            }
            exponentials(self.simd, &mut row[..=i], 0.0);
        }
        Chunk {
            n,
            q: keys(self.q),
            k: keys(self.k),
            v: of_head(self.v, sizes.value_dim),
            beta: of_head(self.beta, 1),
            from_start: cumulated.iter().map(|c| (*c as f32).exp()).collect(),
            to_end: cumulated.iter().map(|c| ((end - c) as f32).exp()).collect(),
            between,
            simd: self.simd,
        }
    }
}

impl Chunk {
    /// `(a_i · k_j) e^{c_i − c_j}` for `j ≤ i`, else 0: `[n, n]` of rows `a` of `Dk`.
    pub(super) fn decayed_products(&self, a: &[f32]) -> Vec<f32> {
        let mut products = vec![0.0; self.n * self.n];
        add_nt(self.simd, &mut products, self.n, a, &self.k, a.len() / self.n, 1.0);
        for (product, between) in products.iter_mut().zip(&self.between) {
            *product *= between;
        }
        products
    }

    /// The decay of the whole chunk, `e^{c_n}`.
    pub(super) fn whole(&self) -> f32 {
        self.from_start.last().copied().unwrap_or(1.0)
    }
}

/// Head `head` of rows `rows` of a `[T, heads, width]` tensor.
pub(super) fn gather(values: &[f32], rows: Range<usize>, (heads, head, width): (usize, usize, usize)) -> Vec<f32> {
    let mut out = Vec::with_capacity(rows.len() * width);
    for row in rows {
        out.extend_from_slice(&values[(row * heads + head) * width..][..width]);
    }
    out
}

/// Row `i` of a matrix of `width` columns, times `factors[i]`.
pub(super) fn scale_rows(simd: Simd, values: &mut [f32], width: usize, factors: &[f32]) {
    if width == 0 {
        return;
    }
    for (row, factor) in values.chunks_exact_mut(width).zip(factors) {
        scale(simd, row, *factor);
    }
}

/// `c`, in f64: differences of neighbours stay exact however far the decay has gone.
fn cumulated(decay: &[f32]) -> Vec<f64> {
    let mut sum = 0.0;
    let add = |decay: &f32| {
        sum += f64::from(*decay);
        sum
    };
    decay.iter().map(add).collect()
}
