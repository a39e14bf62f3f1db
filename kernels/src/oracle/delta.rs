//! The gated delta rule token by token; formulas in [`DeltaOps`](crate::ops::DeltaOps).

use super::Real;
use super::gate::logistic;
use crate::tensor::Segments;

/// `Hk`, `Hv`, `Dk`, `Dv` and the factor of the output.
#[derive(Clone, Copy, Debug)]
pub struct DeltaHeads {
    /// `Hk`.
    pub key_heads: usize,
    /// `Hv`.
    pub value_heads: usize,
    /// `Dk`.
    pub key_dim: usize,
    /// `Dv`.
    pub value_dim: usize,
    /// Factor of the output.
    pub scale: f64,
}

/// Inputs of the recurrence.
#[derive(Clone, Copy)]
pub struct DeltaInputs<'a, N> {
    /// `[T, Hk, Dk]`.
    pub q: &'a [N],
    /// `[T, Hk, Dk]`.
    pub k: &'a [N],
    /// `[T, Hv, Dv]`.
    pub v: &'a [N],
    /// `g`, `[T, Hv]`.
    pub decay: &'a [N],
    /// `β`, `[T, Hv]`.
    pub beta: &'a [N],
}

/// What [`delta_rule_backward`] gives, shaped as the inputs.
pub struct DeltaGradients<N> {
    /// `[T, Hk, Dk]`.
    pub dq: Vec<N>,
    /// `[T, Hk, Dk]`.
    pub dk: Vec<N>,
    /// `[T, Hv, Dv]`.
    pub dv: Vec<N>,
    /// `[T, Hv]`.
    pub ddecay: Vec<N>,
    /// `[T, Hv]`.
    pub dbeta: Vec<N>,
}

/// One step of one head: what it read, and what the backward pass needs.
struct Step<N> {
    /// `e^{g} S`, before the correction.
    decayed: Vec<N>,
    /// `v − k S`.
    missing: Vec<N>,
    /// `S` after the step.
    state: Vec<N>,
}

impl<N: Real> DeltaInputs<'_, N> {
    fn row<'v>(&self, values: &'v [N], t: usize, head: usize, [heads, width]: [usize; 2]) -> &'v [N] {
        &values[(t * heads + head) * width..][..width]
    }

    fn keys<'v>(&self, values: &'v [N], t: usize, head: usize, heads: &DeltaHeads) -> &'v [N] {
        let key_head = head * heads.key_heads / heads.value_heads;
        self.row(values, t, key_head, [heads.key_heads, heads.key_dim])
    }

    fn step(&self, state: &[N], t: usize, head: usize, heads: &DeltaHeads) -> Step<N> {
        let (at, width) = (t * heads.value_heads + head, heads.value_dim);
        let k = self.keys(self.k, t, head, heads);
        let v = self.row(self.v, t, head, [heads.value_heads, width]);
        let decayed: Vec<N> = state.iter().map(|s| self.decay[at].exp() * *s).collect();
        let missing: Vec<N> = v
            .iter()
            .zip(times(k, &decayed, width))
            .map(|(v, known)| *v - known)
            .collect();
        let mut state = decayed.clone();
        add_outer(&mut state, k, &missing, self.beta[at]);
        Step {
            decayed,
            missing,
            state,
        }
    }
}

/// `row · matrix`, with rows of `width`.
fn times<N: Real>(row: &[N], matrix: &[N], width: usize) -> Vec<N> {
    let column = |j: usize| N::dot(row.iter().enumerate().map(|(i, x)| (*x, matrix[i * width + j])));
    (0..width).map(column).collect()
}

/// `matrix · row`.
fn times_transposed<N: Real>(matrix: &[N], row: &[N]) -> Vec<N> {
    let rows = matrix.chunks_exact(row.len().max(1));
    rows.map(|matrix| N::dot(matrix.iter().copied().zip(row.iter().copied())))
        .collect()
}

/// `matrix += factor · columnᵀ · row`.
fn add_outer<N: Real>(matrix: &mut [N], column: &[N], row: &[N], factor: N) {
    for (matrix, c) in matrix.chunks_exact_mut(row.len().max(1)).zip(column) {
        for (matrix, r) in matrix.iter_mut().zip(row) {
            *matrix = *matrix + (*c * factor).factor() * r.factor();
        }
    }
}

/// `o`, `[T, Hv, Dv]`. `state`, `[documents, Hv, Dk, Dv]`, is that before each document and becomes that behind it.
pub fn delta_rule_forward<N: Real>(
    inputs: &DeltaInputs<'_, N>,
    heads: &DeltaHeads,
    segments: &Segments,
    state: &mut [N],
) -> Vec<N> {
    let width = heads.value_dim;
    let mut out = vec![N::new(0.0); inputs.v.len()];
    for (document, rows) in segments.ranges().enumerate() {
        for head in 0..heads.value_heads {
            let size = heads.key_dim * width;
            let state = &mut state[(document * heads.value_heads + head) * size..][..size];
            for t in rows.clone() {
                state.copy_from_slice(&inputs.step(state, t, head, heads).state);
                let read = times(inputs.keys(inputs.q, t, head, heads), state, width);
                for (out, read) in out[(t * heads.value_heads + head) * width..].iter_mut().zip(read) {
                    *out = N::new(heads.scale) * read;
                }
            }
        }
    }
    out
}

/// Gradients of documents that start at zero, by going back through every step.
pub fn delta_rule_backward<N: Real>(
    inputs: &DeltaInputs<'_, N>,
    dout: &[N],
    heads: &DeltaHeads,
    segments: &Segments,
) -> DeltaGradients<N> {
    let zeros = |values: &[N]| vec![N::new(0.0); values.len()];
    let mut gradients = DeltaGradients {
        dq: zeros(inputs.q),
        dk: zeros(inputs.k),
        dv: zeros(inputs.v),
        ddecay: zeros(inputs.decay),
        dbeta: zeros(inputs.beta),
    };
    for rows in segments.ranges() {
        for head in 0..heads.value_heads {
            let mut state = vec![N::new(0.0); heads.key_dim * heads.value_dim];
            let mut steps = Vec::new();
            for t in rows.clone() {
                let step = inputs.step(&state, t, head, heads);
                state.clone_from(&step.state);
                steps.push(step);
            }
            let mut dstate = vec![N::new(0.0); state.len()];
            for (t, step) in rows.clone().zip(steps).rev() {
                dstate = gradients.through(inputs, dout, heads, (t, head), &step, dstate);
            }
        }
    }
    gradients
}

impl<N: Real> DeltaGradients<N> {
    /// Through one step; `dstate` is the gradient of the state after it, the answer that of the state before it.
    fn through(
        &mut self,
        inputs: &DeltaInputs<'_, N>,
        dout: &[N],
        heads: &DeltaHeads,
        (t, head): (usize, usize),
        step: &Step<N>,
        mut dstate: Vec<N>,
    ) -> Vec<N> {
        let (at, width, scale) = (t * heads.value_heads + head, heads.value_dim, N::new(heads.scale));
        let (q, k) = (
            inputs.keys(inputs.q, t, head, heads),
            inputs.keys(inputs.k, t, head, heads),
        );
        let dout = inputs.row(dout, t, head, [heads.value_heads, width]);
        let beta = inputs.beta[at];
        // o = scale · q S
        add_outer(&mut dstate, q, dout, scale);
        let dq: Vec<N> = times_transposed(&step.state, dout)
            .into_iter()
            .map(|x| scale * x)
            .collect();
        // S = decayed + kᵀ (β · missing)
        let dwritten = times(k, &dstate, width);
        let mut dk: Vec<N> = times_transposed(&dstate, &step.missing)
            .into_iter()
            .map(|x| beta * x)
            .collect();
        self.dbeta[at] = N::dot(dwritten.iter().copied().zip(step.missing.iter().copied()));
        // missing = v − k · decayed
        let dmissing: Vec<N> = dwritten.iter().map(|x| beta * *x).collect();
        for (dk, value) in dk.iter_mut().zip(times_transposed(&step.decayed, &dmissing)) {
            *dk = *dk - value;
        }
        add_outer(&mut dstate, k, &dmissing, N::new(-1.0));
        // decayed = e^g · S before
        self.ddecay[at] = N::dot(dstate.iter().copied().zip(step.decayed.iter().copied()));
        self.dv[at * width..(at + 1) * width].copy_from_slice(&dmissing);
        let key = (t * heads.key_heads + head * heads.key_heads / heads.value_heads) * heads.key_dim;
        for i in 0..heads.key_dim {
            self.dq[key + i] = self.dq[key + i] + dq[i];
            self.dk[key + i] = self.dk[key + i] + dk[i];
        }
        dstate.into_iter().map(|x| inputs.decay[at].exp() * x).collect()
    }
}

/// `(g, β)` from `a` and `b`, `[T, N]`; `a_log` and `dt_bias` are `[N]`.
pub fn delta_gates_forward<N: Real>(a: &[N], b: &[N], a_log: &[N], dt_bias: &[N]) -> (Vec<N>, Vec<N>) {
    let width = a_log.len();
    let softplus = |x: N| match x.get() > 0.0 {
        true => x + (N::new(1.0) + (-x).exp()).ln(),
        false => (N::new(1.0) + x.exp()).ln(),
    };
    let decay = |(i, a): (usize, &N)| -a_log[i % width].exp() * softplus(*a + dt_bias[i % width]);
    (
        a.iter().enumerate().map(decay).collect(),
        b.iter().map(|b| logistic(*b)).collect(),
    )
}

/// `(da, db)`.
pub fn delta_gates_backward<N: Real>(
    a: &[N],
    beta: &[N],
    (a_log, dt_bias): (&[N], &[N]),
    (ddecay, dbeta): (&[N], &[N]),
) -> (Vec<N>, Vec<N>) {
    let width = a_log.len();
    let da = (0..a.len()).map(|i| {
        let slope = -a_log[i % width].exp() * logistic(a[i] + dt_bias[i % width]);
        ddecay[i] * slope
    });
    let db = beta
        .iter()
        .zip(dbeta)
        .map(|(beta, dbeta)| *dbeta * *beta * (N::new(1.0) - *beta));
    (da.collect(), db.collect())
}
