//! Gates, gated and l2 norms; formulas in [`GateOps`](crate::ops::GateOps).

use super::{Real, rms_norm_backward, rms_norm_forward};

/// `σ(x)`.
pub fn logistic<N: Real>(x: N) -> N {
    N::new(1.0) / (N::new(1.0) + (-x).exp())
}

/// `silu(x)` and its slope.
fn silu<N: Real>(x: N) -> (N, N) {
    let sigma = logistic(x);
    (x * sigma, sigma * (N::new(1.0) + x * (N::new(1.0) - sigma)))
}

/// `y = x · σ(g)`, the gates being as many as the elements or as the rows.
pub fn sigmoid_gate_forward<N: Real>(x: &[N], gate: &[N]) -> Vec<N> {
    let each = x.len() / gate.len().max(1);
    x.iter()
        .enumerate()
        .map(|(i, x)| *x * logistic(gate[i / each]))
        .collect()
}

/// `(dx, dg)`.
pub fn sigmoid_gate_backward<N: Real>(x: &[N], gate: &[N], dy: &[N]) -> (Vec<N>, Vec<N>) {
    let each = x.len() / gate.len().max(1);
    let dx = sigmoid_gate_forward(dy, gate);
    let dgate = gate.iter().enumerate().map(|(row, gate)| {
        let sigma = logistic(*gate);
        let slope = sigma * (N::new(1.0) - sigma);
        N::sum((row * each..(row + 1) * each).map(|i| dy[i] * x[i] * slope))
    });
    (dx, dgate.collect())
}

/// `(y, rstd)`: `y = norm(x) · w · silu(z)`.
pub fn gated_norm_forward<N: Real>(x: &[N], gate: &[N], weight: &[N], eps: N) -> (Vec<N>, Vec<N>) {
    let (normed, rstd) = rms_norm_forward(x, weight, eps);
    let y = normed.iter().zip(gate).map(|(normed, z)| *normed * silu(*z).0);
    (y.collect(), rstd)
}

/// `(dx, dz)`.
pub fn gated_norm_backward<N: Real>(x: &[N], gate: &[N], weight: &[N], rstd: &[N], dy: &[N]) -> (Vec<N>, Vec<N>) {
    let width = weight.len();
    let normed = |i: usize| x[i] * rstd[i / width] * weight[i % width];
    let dgate = (0..x.len()).map(|i| dy[i] * normed(i) * silu(gate[i]).1);
    let dnormed: Vec<N> = dy.iter().zip(gate).map(|(dy, z)| *dy * silu(*z).0).collect();
    (rms_norm_backward(x, weight, rstd, &dnormed), dgate.collect())
}

/// `(y, r)` of rows of `width`.
pub fn l2_norm_forward<N: Real>(x: &[N], width: usize, eps: N) -> (Vec<N>, Vec<N>) {
    let reciprocal = |row: &[N]| N::new(1.0) / (N::sum(row.iter().map(|x| *x * *x)) + eps).sqrt();
    let rnorm: Vec<N> = x.chunks_exact(width).map(reciprocal).collect();
    (
        x.iter().enumerate().map(|(i, x)| *x * rnorm[i / width]).collect(),
        rnorm,
    )
}

/// `dx`.
pub fn l2_norm_backward<N: Real>(x: &[N], width: usize, rnorm: &[N], dy: &[N]) -> Vec<N> {
    let mut dx = Vec::new();
    for ((x, dy), r) in x.chunks_exact(width).zip(dy.chunks_exact(width)).zip(rnorm) {
        let pull = *r * *r * N::sum(dy.iter().zip(x).map(|(dy, x)| *dy * *x));
        dx.extend(x.iter().zip(dy).map(|(x, dy)| *r * (*dy - *x * pull)));
    }
    dx
}
