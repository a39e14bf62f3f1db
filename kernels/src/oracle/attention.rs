//! Causal attention; formulas in [`AttentionOps`](crate::ops::AttentionOps).

use super::Real;
use crate::tensor::Segments;

/// `H`, `K`, `D` and the factor of the scores.
#[derive(Clone, Copy)]
pub struct Heads {
    /// Query heads.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Head dimension.
    pub dim: usize,
    /// Factor of the scores.
    pub scale: f32,
}

/// What [`attention_backward`] gives.
pub struct AttentionGradients<N> {
    /// `[T, H, D]`.
    pub dq: Vec<N>,
    /// `[T, K, D]`.
    pub dk: Vec<N>,
    /// `[T, K, D]`.
    pub dv: Vec<N>,
}

impl Heads {
    fn query(&self, row: usize, head: usize) -> std::ops::Range<usize> {
        let start = (row * self.heads + head) * self.dim;
        start..start + self.dim
    }

    fn key(&self, row: usize, head: usize) -> std::ops::Range<usize> {
        let start = (row * self.kv_heads + head * self.kv_heads / self.heads) * self.dim;
        start..start + self.dim
    }
}

/// Calls `body(query row, visible key rows)` for every query row of every document.
fn rows(queries: &Segments, keys: &Segments, mut body: impl FnMut(usize, std::ops::Range<usize>)) {
    for (query_rows, key_rows) in queries.ranges().zip(keys.ranges()) {
        let extra = key_rows.len() - query_rows.len();
        for (i, row) in query_rows.enumerate() {
            body(row, key_rows.start..key_rows.start + i + extra + 1);
        }
    }
}

fn product<N: Real>(a: &[N], b: &[N]) -> N {
    N::dot(a.iter().copied().zip(b.iter().copied()))
}

/// `out += factor · row`, the factors of the product rounded.
fn add_scaled<N: Real>(out: &mut [N], factor: N, row: &[N]) {
    for (out, value) in out.iter_mut().zip(row) {
        *out = *out + factor.factor() * value.factor();
    }
}

/// `(out, lse)`.
pub fn attention_forward<N: Real>(
    q: &[N],
    k: &[N],
    v: &[N],
    queries: &Segments,
    keys: &Segments,
    heads: &Heads,
) -> (Vec<N>, Vec<N>) {
    let mut out = vec![N::new(0.0); q.len()];
    let mut lse = vec![N::new(f64::NEG_INFINITY); queries.tokens() * heads.heads];
    let scale = N::new(f64::from(heads.scale));
    rows(queries, keys, |i, visible| {
        for head in 0..heads.heads {
            let q = &q[heads.query(i, head)];
            let s: Vec<N> = visible
                .clone()
                .map(|j| scale * product(q, &k[heads.key(j, head)]))
                .collect();
            let largest = s.iter().copied().fold(s[0], |a, b| if b > a { b } else { a });
            let p: Vec<N> = s.iter().map(|s| (*s - largest).exp()).collect();
            let sum = N::sum(p.iter().copied());
            lse[i * heads.heads + head] = largest + sum.ln();
            let out = &mut out[heads.query(i, head)];
            for (j, p) in visible.clone().zip(p) {
                add_scaled(out, p, &v[heads.key(j, head)]);
            }
            out.iter_mut().for_each(|out| *out = *out / sum);
        }
    });
    (out, lse)
}

/// Gradients; `out` and `lse` are the forward pass's.
#[allow(clippy::too_many_arguments)]
pub fn attention_backward<N: Real>(
    q: &[N],
    k: &[N],
    v: &[N],
    out: &[N],
    lse: &[N],
    dout: &[N],
    segments: &Segments,
    heads: &Heads,
) -> AttentionGradients<N> {
    let zeros = |like: &[N]| vec![N::new(0.0); like.len()];
    let (mut dq, mut dk, mut dv) = (zeros(q), zeros(k), zeros(v));
    let scale = N::new(f64::from(heads.scale));
    rows(segments, segments, |i, visible| {
        for head in 0..heads.heads {
            let at = heads.query(i, head);
            let (q, dout) = (&q[at.clone()], &dout[at.clone()]);
            let delta = N::sum(dout.iter().zip(&out[at.clone()]).map(|(a, b)| *a * *b));
            for j in visible.clone() {
                let key = heads.key(j, head);
                let p = (scale * product(q, &k[key.clone()]) - lse[i * heads.heads + head]).exp();
                let ds = p * (product(dout, &v[key.clone()]) - delta);
                add_scaled(&mut dv[key.clone()], p, dout);
                add_scaled(&mut dq[at.clone()], ds, &k[key.clone()]);
                add_scaled(&mut dk[key], ds, q);
            }
        }
    });
    for value in dq.iter_mut().chain(&mut dk) {
        *value = scale * *value;
    }
    AttentionGradients { dq, dk, dv }
}
