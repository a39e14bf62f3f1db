//! Loops over rows of gates and their norms, compiled for every level; sums as in [`rows`](super::rows).

#![allow(unsafe_code)] // for what `vectorised!` expands to

use super::level::vectorised;
use super::math::logistic;

vectorised! {
    /// `y = keep · y + x · σ(gate)`.
    pub(in crate::cpu) fn gate(x: &[f32], gate: &[f32], y: &mut [f32], keep: f32) {
        for ((y, x), gate) in y.iter_mut().zip(x).zip(gate) {
            *y = F::fused(keep, *y, x * logistic::<F>(*gate));
        }
    }

    /// `dx = dy · σ(gate)` and `dgate = dy · x · σ'(gate)`.
    pub(in crate::cpu) fn gate_backward(x: &[f32], gate: &[f32], dy: &[f32], dx: &mut [f32], dgate: &mut [f32]) {
        for (((x, gate), dy), (dx, dgate)) in x.iter().zip(gate).zip(dy).zip(dx.iter_mut().zip(dgate)) {
            let sigma = logistic::<F>(*gate);
            *dx = dy * sigma;
            *dgate = dy * x * (sigma * (1.0 - sigma));
        }
    }

    /// `y = factor · x · w · silu(z)`.
    pub(in crate::cpu) fn gated_norm(x: &[f32], z: &[f32], weight: &[f32], factor: f32, y: &mut [f32]) {
        for (((y, x), z), w) in y.iter_mut().zip(x).zip(z).zip(weight) {
            *y = x * factor * w * (z * logistic::<F>(*z));
        }
    }

    /// `dz`, and in `dnormed` the gradient of `x · r`: `dy · silu(z) · w`.
    pub(in crate::cpu) fn gated_norm_backward(
        x: &[f32],
        z: &[f32],
        weight: &[f32],
        rstd: f32,
        dy: &[f32],
        dnormed: &mut [f32],
        dz: &mut [f32],
    ) {
        let inputs = x.iter().zip(z).zip(weight).zip(dy);
        for ((((x, z), w), dy), (dnormed, dz)) in inputs.zip(dnormed.iter_mut().zip(dz)) {
            let sigma = logistic::<F>(*z);
            *dz = dy * (x * rstd * w) * sigma * F::fused(*z, 1.0 - sigma, 1.0);
            *dnormed = dy * (z * sigma) * w;
        }
    }

    /// `y = factor · x`.
    pub(in crate::cpu) fn scaled(x: &[f32], factor: f32, y: &mut [f32]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y = factor * x;
        }
    }

    /// `y += factor · x`.
    pub(in crate::cpu) fn add_scaled(y: &mut [f32], x: &[f32], factor: f32) {
        for (y, x) in y.iter_mut().zip(x) {
            *y = F::fused(factor, *x, *y);
        }
    }

    /// `h ← r (h − pull · x)`.
    pub(in crate::cpu) fn through_norm(h: &mut [f32], x: &[f32], r: f32, pull: f32) {
        for (h, x) in h.iter_mut().zip(x) {
            *h = r * F::fused(-pull, *x, *h);
        }
    }

    /// `sum += a · b`.
    pub(in crate::cpu) fn add_product(sum: &mut [f32], a: &[f32], b: &[f32]) {
        for ((sum, a), b) in sum.iter_mut().zip(a).zip(b) {
            *sum = F::fused(*a, *b, *sum);
        }
    }

    /// `z ← silu(z)`.
    pub(in crate::cpu) fn silu(z: &mut [f32]) {
        for z in z.iter_mut() {
            *z *= logistic::<F>(*z);
        }
    }

    /// `z ← dy · silu'(z)`.
    pub(in crate::cpu) fn silu_backward(z: &mut [f32], dy: &[f32]) {
        for (z, dy) in z.iter_mut().zip(dy) {
            let sigma = logistic::<F>(*z);
            *z = dy * sigma * F::fused(*z, 1.0 - sigma, 1.0);
        }
    }
}
