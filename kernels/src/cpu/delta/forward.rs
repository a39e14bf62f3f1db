//! Forward through one head of one document.

use std::ops::Range;

use super::super::simd::rows::scale;
use super::super::simd::small::{add_nn, add_tn};
use super::chunk::{Chunk, Head, chunks, scale_rows};
use crate::ops::DELTA_CHUNK;

/// What one head of one document gives.
pub(super) struct HeadOutput {
    /// `[rows, Dv]`.
    pub(super) out: Vec<f32>,
    /// `A`, `[rows, 64]`.
    pub(super) solved: Vec<f32>,
    /// `[Dk, Dv]`, behind the last row.
    pub(super) state: Vec<f32>,
}

impl Head<'_> {
    /// The rows of `document` for value head `head`, from state `state`.
    pub(super) fn forward(&self, document: Range<usize>, head: usize, mut state: Vec<f32>) -> HeadOutput {
        let width = self.sizes.value_dim;
        let mut out = Vec::with_capacity(document.len() * width);
        let mut solved = vec![0.0; document.len() * DELTA_CHUNK];
        let start = document.start;
        for rows in chunks(document) {
            let chunk = self.chunk(rows.clone(), head);
            let solved = &mut solved[(rows.start - start) * DELTA_CHUNK..][..chunk.n * DELTA_CHUNK];
            solve(&chunk, solved);
            let residual = chunk.residual(&state, width);
            let corrected = chunk.corrected(&residual, solved, width);
            let mut rows_out = vec![0.0; chunk.n * width];
            add_nn(
                self.simd,
                &mut rows_out,
                width,
                &chunk.q,
                self.sizes.key_dim,
                &state,
                1.0,
            );
            scale_rows(self.simd, &mut rows_out, width, &chunk.from_start);
            add_nn(
                self.simd,
                &mut rows_out,
                width,
                &chunk.decayed_products(&chunk.q),
                chunk.n,
                &corrected,
                1.0,
            );
            scale(self.simd, &mut rows_out, self.scale);
            out.extend(rows_out);
            chunk.advance(&mut state, &corrected, width);
        }
        HeadOutput { out, solved, state }
    }
}

impl Chunk {
    /// `v_i − e^{c_i} k_i S`, `[n, Dv]`: what the decayed state does not yet know of the values.
    pub(super) fn residual(&self, state: &[f32], width: usize) -> Vec<f32> {
        let mut known = vec![0.0; self.n * width];
        add_nn(self.simd, &mut known, width, &self.k, self.k.len() / self.n, state, 1.0);
        scale_rows(self.simd, &mut known, width, &self.from_start);
        for (known, v) in known.iter_mut().zip(&self.v) {
            *known = v - *known;
        }
        known
    }

    /// `u = A r`, `[n, Dv]`, with `r_i = β_i ·` residual.
    pub(super) fn corrected(&self, residual: &[f32], solved: &[f32], width: usize) -> Vec<f32> {
        let mut r = residual.to_vec();
        scale_rows(self.simd, &mut r, width, &self.beta);
        let mut corrected = vec![0.0; self.n * width];
        add_nn(self.simd, &mut corrected, width, solved, DELTA_CHUNK, &r, 1.0);
        corrected
    }

    /// `S ← e^{c_n} S + Σ_i (e^{c_n − c_i} k_i)ᵀ u_i`.
    pub(super) fn advance(&self, state: &mut [f32], corrected: &[f32], width: usize) {
        let whole = self.whole();
        scale(self.simd, state, whole);
        let mut k = self.k.clone();
        scale_rows(self.simd, &mut k, self.k.len() / self.n, &self.to_end);
        add_tn(self.simd, state, width, &k, corrected, 1.0);
    }
}

/// `A = (I + L)⁻¹` by forward substitution, row by row: `A_i = e_i − Σ_{j < i} L_ij A_j`.
fn solve(chunk: &Chunk, solved: &mut [f32]) {
    let products = chunk.decayed_products(&chunk.k);
    for i in 0..chunk.n {
        let (above, row) = solved.split_at_mut(i * DELTA_CHUNK);
        let row = &mut row[..DELTA_CHUNK];
        row.fill(0.0);
        row[i] = 1.0;
        let mut lower = products[i * chunk.n..][..i].to_vec();
        scale(chunk.simd, &mut lower, chunk.beta[i]);
        add_nn(chunk.simd, row, DELTA_CHUNK, &lower, i, above, -1.0);
    }
}
