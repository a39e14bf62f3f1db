//! Element-wise ops; formulas in [`ActivationOps`](crate::ops::ActivationOps).

use super::Real;

fn logistic<N: Real>(x: N) -> N {
    N::new(1.0) / (N::new(1.0) + (-x).exp())
}

/// `silu(gate) · up`.
pub fn swiglu_forward<N: Real>(gate: &[N], up: &[N]) -> Vec<N> {
    gate.iter()
        .zip(up)
        .map(|(gate, up)| *gate * logistic(*gate) * *up)
        .collect()
}

/// `(dgate, dup)`.
pub fn swiglu_backward<N: Real>(gate: &[N], up: &[N], dy: &[N]) -> (Vec<N>, Vec<N>) {
    let one = N::new(1.0);
    let each = gate.iter().zip(up).zip(dy).map(|((gate, up), dy)| {
        let sigma = logistic(*gate);
        (*dy * *up * sigma * (one + *gate * (one - sigma)), *dy * *gate * sigma)
    });
    each.unzip()
}
