//! Backward through one head of one document: states and corrected values again, then the chunks in reverse.

use std::ops::Range;

use super::super::simd::rows::{dot, scale};
use super::super::simd::small::{add_nn, add_nt, add_tn};
use super::chunk::{Chunk, Head, chunks, gather, scale_rows};
use crate::ops::DELTA_CHUNK;

/// Gradients of one head of one document.
pub(super) struct HeadGradients {
    /// `[rows, Dk]`: this value head's share.
    pub(super) dq: Vec<f32>,
    /// `[rows, Dk]`: this value head's share.
    pub(super) dk: Vec<f32>,
    /// `[rows, Dv]`.
    pub(super) dv: Vec<f32>,
    /// `[rows]`.
    pub(super) ddecay: Vec<f32>,
    /// `[rows]`.
    pub(super) dbeta: Vec<f32>,
}

/// A chunk on the way back, with what was recomputed.
struct Step {
    chunk: Chunk,
    /// `S` before the chunk, `[Dk, Dv]`.
    state: Vec<f32>,
    /// `[n, Dv]`.
    residual: Vec<f32>,
    /// `u`, `[n, Dv]`.
    corrected: Vec<f32>,
    /// `scale · do`, `[n, Dv]`.
    dout: Vec<f32>,
}

/// Gradients of one chunk's rows; `cumulated` is that of `c`.
struct ChunkGradients {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    beta: Vec<f32>,
    cumulated: Vec<f32>,
}

impl Head<'_> {
    /// Gradients of the rows of `document` for value head `head`.
    pub(super) fn backward(&self, document: Range<usize>, head: usize, solved: &[f32], dout: &[f32]) -> HeadGradients {
        let (heads, key_dim, width) = (self.sizes.value_heads, self.sizes.key_dim, self.sizes.value_dim);
        let (rows, start) = (document.len(), document.start);
        let mut gradients = HeadGradients {
            dq: vec![0.0; rows * key_dim],
            dk: vec![0.0; rows * key_dim],
            dv: vec![0.0; rows * width],
            ddecay: vec![0.0; rows],
            dbeta: vec![0.0; rows],
        };
        let solved_of = |rows: Range<usize>| gather(solved, rows, (heads, head, DELTA_CHUNK));
        let states = self.states(document.clone(), head, solved_of);
        let mut dstate = vec![0.0; key_dim * width];
        for (rows, state) in chunks(document).zip(states).rev() {
            let chunk = self.chunk(rows.clone(), head);
            let solved = solved_of(rows.clone());
            let residual = chunk.residual(&state, width);
            let corrected = chunk.corrected(&residual, &solved, width);
            let mut dout = gather(dout, rows.clone(), (heads, head, width));
            scale(self.simd, &mut dout, self.scale);
            let step = Step {
                chunk,
                state,
                residual,
                corrected,
                dout,
            };
            let own = step.backward(&solved, &mut dstate, key_dim, width);
            let at = rows.start - start..rows.end - start;
            gradients.dq[at.start * key_dim..at.end * key_dim].copy_from_slice(&own.q);
            gradients.dk[at.start * key_dim..at.end * key_dim].copy_from_slice(&own.k);
            gradients.dv[at.start * width..at.end * width].copy_from_slice(&own.v);
            gradients.dbeta[at.clone()].copy_from_slice(&own.beta);
            sum_from_behind(&own.cumulated, &mut gradients.ddecay[at]);
        }
        gradients
    }

    /// The state before each chunk.
    fn states(&self, document: Range<usize>, head: usize, solved: impl Fn(Range<usize>) -> Vec<f32>) -> Vec<Vec<f32>> {
        let width = self.sizes.value_dim;
        let mut state = vec![0.0; self.sizes.key_dim * width];
        let mut states = Vec::new();
        for rows in chunks(document.clone()) {
            states.push(state.clone());
            if rows.end == document.end {
                break;
            }
            let chunk = self.chunk(rows.clone(), head);
            let residual = chunk.residual(&state, width);
            let corrected = chunk.corrected(&residual, &solved(rows), width);
            chunk.advance(&mut state, &corrected, width);
        }
        states
    }
}

impl Step {
    /// The chunk's gradients. `dstate` is that of the state behind the chunk and becomes that of the state before it.
    fn backward(&self, solved: &[f32], dstate: &mut [f32], key_dim: usize, width: usize) -> ChunkGradients {
        let chunk = &self.chunk;
        let n = chunk.n;
        let mut own = ChunkGradients {
            q: vec![0.0; n * key_dim],
            k: vec![0.0; n * key_dim],
            v: Vec::new(),
            beta: vec![0.0; n],
            cumulated: vec![0.0; n],
        };
        let mut du = self.through_advance(&mut own, dstate, key_dim, width);
        self.through_output(&mut own, dstate, &mut du, key_dim, width);
        // u = A r, so dr = Aᵀ du and, because (I + L) u = r, dL = −dr uᵀ.
        let mut dr = vec![0.0; n * width];
        let mut transposed = vec![0.0; n * n];
        for (i, row) in solved.chunks_exact(DELTA_CHUNK).enumerate() {
            for (j, value) in row[..n].iter().enumerate() {
                transposed[j * n + i] = *value;
            }
        }
        add_nn(chunk.simd, &mut dr, width, &transposed, n, &du, 1.0);
        self.through_triangle(&mut own, &dr, width);
        self.through_residual(&mut own, dstate, dr, key_dim, width);
        own
    }

    /// `S' = e^{c_n} S + Σ_i (e^{c_n − c_i} k_i)ᵀ u_i`; answers its part of `du`.
    fn through_advance(&self, own: &mut ChunkGradients, dstate: &mut [f32], key_dim: usize, width: usize) -> Vec<f32> {
        let chunk = &self.chunk;
        let mut du = vec![0.0; chunk.n * width];
        add_nn(chunk.simd, &mut du, width, &chunk.k, key_dim, dstate, 1.0);
        scale_rows(chunk.simd, &mut du, width, &chunk.to_end);
        add_nt(chunk.simd, &mut own.k, key_dim, &self.corrected, dstate, width, 1.0);
        scale_rows(chunk.simd, &mut own.k, key_dim, &chunk.to_end);
        let whole = chunk.whole();
        let mut at_end = whole * dot(chunk.simd, &self.state, dstate);
        for i in 0..chunk.n {
            let pull = dot(chunk.simd, row(&chunk.k, i, key_dim), row(&own.k, i, key_dim));
            own.cumulated[i] -= pull;
            at_end += pull;
        }
        own.cumulated[chunk.n - 1] += at_end;
        scale(chunk.simd, dstate, whole);
        du
    }

    /// `o_i = scale · (e^{c_i} q_i S + Σ_j P_ij u_j)`.
    fn through_output(
        &self,
        own: &mut ChunkGradients,
        dstate: &mut [f32],
        du: &mut [f32],
        key_dim: usize,
        width: usize,
    ) {
        let chunk = &self.chunk;
        add_nt(chunk.simd, &mut own.q, key_dim, &self.dout, &self.state, width, 1.0);
        scale_rows(chunk.simd, &mut own.q, key_dim, &chunk.from_start);
        for i in 0..chunk.n {
            own.cumulated[i] += dot(chunk.simd, row(&chunk.q, i, key_dim), row(&own.q, i, key_dim));
        }
        let mut q = chunk.q.clone();
        scale_rows(chunk.simd, &mut q, key_dim, &chunk.from_start);
        add_tn(chunk.simd, dstate, width, &q, &self.dout, 1.0);

        let products = chunk.decayed_products(&chunk.q);
        add_tn(chunk.simd, du, width, &products, &self.dout, 1.0);
        let mut dproducts = vec![0.0; chunk.n * chunk.n];
        add_nt(
            chunk.simd,
            &mut dproducts,
            chunk.n,
            &self.dout,
            &self.corrected,
            width,
            1.0,
        );
        own.through_decay(&dproducts, &products, chunk.n);
        for (gradient, between) in dproducts.iter_mut().zip(&chunk.between) {
            *gradient *= between;
        }
        add_nn(chunk.simd, &mut own.q, key_dim, &dproducts, chunk.n, &chunk.k, 1.0);
        add_tn(chunk.simd, &mut own.k, key_dim, &dproducts, &chunk.q, 1.0);
    }

    /// `L_ij = β_i (k_i · k_j) e^{c_i − c_j}` for `j < i`, with `dL = −dr uᵀ`.
    fn through_triangle(&self, own: &mut ChunkGradients, dr: &[f32], width: usize) {
        let chunk = &self.chunk;
        let (n, key_dim) = (chunk.n, chunk.k.len() / chunk.n);
        let mut dlower = vec![0.0; n * n];
        add_nt(chunk.simd, &mut dlower, n, dr, &self.corrected, width, -1.0);
        let products = chunk.decayed_products(&chunk.k);
        for i in 0..n {
            let (gradients, products) = (&mut dlower[i * n..][..n], &products[i * n..][..n]);
            gradients[i..].fill(0.0);
            own.beta[i] += dot(chunk.simd, &gradients[..i], &products[..i]);
            scale(chunk.simd, &mut gradients[..i], chunk.beta[i]);
        }
        own.through_decay(&dlower, &products, n);
        for (gradient, between) in dlower.iter_mut().zip(&chunk.between) {
            *gradient *= between;
        }
        add_nn(chunk.simd, &mut own.k, key_dim, &dlower, n, &chunk.k, 1.0);
        add_tn(chunk.simd, &mut own.k, key_dim, &dlower, &chunk.k, 1.0);
    }

    /// `r_i = β_i (v_i − e^{c_i} k_i S)`.
    fn through_residual(
        &self,
        own: &mut ChunkGradients,
        dstate: &mut [f32],
        mut dr: Vec<f32>,
        key_dim: usize,
        width: usize,
    ) {
        let chunk = &self.chunk;
        for i in 0..chunk.n {
            let (dr, residual, v) = (
                row(&dr, i, width),
                row(&self.residual, i, width),
                row(&chunk.v, i, width),
            );
            let by_residual = dot(chunk.simd, dr, residual);
            own.beta[i] += by_residual;
            // e^{c_i} k_i S is v − residual.
            own.cumulated[i] -= chunk.beta[i] * (dot(chunk.simd, dr, v) - by_residual);
        }
        scale_rows(chunk.simd, &mut dr, width, &chunk.beta);
        own.v.clone_from(&dr);
        // From here on −dr is the gradient of e^{c_i} k_i S.
        scale_rows(chunk.simd, &mut dr, width, &chunk.from_start);
        add_nt(chunk.simd, &mut own.k, key_dim, &dr, &self.state, width, -1.0);
        add_tn(chunk.simd, dstate, width, &chunk.k, &dr, -1.0);
    }
}

impl ChunkGradients {
    /// `dc` through `x_ij e^{c_i − c_j}`: `value` is that product, `gradient` its gradient.
    fn through_decay(&mut self, gradient: &[f32], value: &[f32], n: usize) {
        for i in 0..n {
            for j in 0..i {
                let pull = gradient[i * n + j] * value[i * n + j];
                self.cumulated[i] += pull;
                self.cumulated[j] -= pull;
            }
        }
    }
}

fn row(values: &[f32], index: usize, width: usize) -> &[f32] {
    &values[index * width..][..width]
}

/// `dg_i = Σ_{j ≥ i} dc_j`.
fn sum_from_behind(cumulated: &[f32], decay: &mut [f32]) {
    let mut sum = 0.0f64;
    for (decay, cumulated) in decay.iter_mut().zip(cumulated).rev() {
        sum += f64::from(*cumulated);
        *decay = sum as f32;
    }
}
