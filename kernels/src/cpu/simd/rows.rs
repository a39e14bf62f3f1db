//! Loops over rows, compiled for every level.
//!
//! Sums run over 16 lanes, each in rising order, and then over the lanes: one order for every level and vector width.

#![allow(unsafe_code)] // for what `vectorised!` expands to

use super::level::vectorised;
use super::math::{bf16_bits, exp, logistic, widen as widened};

const LANES: usize = 16;

/// `Σ f(i)` over 16 lanes for equally long slices.
macro_rules! lane_sum {
    ($F:ty, $first:expr, $second:expr, $sum:ident, $a:ident, $b:ident, $value:expr) => {{
        let (first, second): (&[f32], &[f32]) = ($first, $second);
        let mut lanes = [0.0f32; LANES];
        let (first_parts, second_parts) = (first.chunks_exact(LANES), second.chunks_exact(LANES));
        let tails = first_parts.remainder().iter().zip(second_parts.remainder());
        for (lane, (a, b)) in lanes.iter_mut().zip(tails) {
            let ($sum, $a, $b) = (*lane, *a, *b);
            *lane = $value;
        }
        for (first, second) in first_parts.zip(second_parts) {
            for (lane, (a, b)) in lanes.iter_mut().zip(first.iter().zip(second)) {
                let ($sum, $a, $b) = (*lane, *a, *b);
                *lane = $value;
            }
        }
        let mut half = LANES / 2;
        while half > 0 {
            for i in 0..half {
                lanes[i] += lanes[i + half];
            }
            half /= 2;
        }
        lanes[0]
    }};
}

vectorised! {
    /// `y += x`.
    pub(in crate::cpu) fn add(y: &mut [f32], x: &[f32]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y += x;
        }
    }

    /// `y *= factor`.
    pub(in crate::cpu) fn scale(y: &mut [f32], factor: f32) {
        for y in y.iter_mut() {
            *y *= factor;
        }
    }

    /// `Σ a · b`.
    pub(in crate::cpu) fn dot(a: &[f32], b: &[f32]) -> f32 {
        lane_sum!(F, a, b, sum, a, b, F::fused(a, b, sum))
    }

    /// bf16 bits of `factor · values`.
    pub(in crate::cpu) fn narrow(values: &[f32], factor: f32, out: &mut [u16]) {
        for (out, value) in out.iter_mut().zip(values) {
            *out = bf16_bits(factor * value);
        }
    }

    /// bf16 bits of `factor · values`, written over the first half of `values`.
    pub(in crate::cpu) fn round(values: &[f32], factor: f32, out: &mut [f32]) {
        for (out, value) in out.iter_mut().zip(values) {
            *out = widened(bf16_bits(factor * value));
        }
    }

    /// f32 values of bf16 bits.
    pub(in crate::cpu) fn widen(bits: &[u16], out: &mut [f32]) {
        for (out, bits) in out.iter_mut().zip(bits) {
            *out = widened(*bits);
        }
    }

    /// `y = silu(gate) · up`.
    pub(in crate::cpu) fn swiglu_forward(gate: &[f32], up: &[f32], y: &mut [f32]) {
        for ((y, gate), up) in y.iter_mut().zip(gate).zip(up) {
            *y = gate * logistic::<F>(*gate) * up;
        }
    }

    /// Gradients of [`swiglu_forward`].
    pub(in crate::cpu) fn swiglu_backward(gate: &[f32], up: &[f32], dy: &[f32], dgate: &mut [f32], dup: &mut [f32]) {
        let inputs = gate.iter().zip(up).zip(dy);
        for (((gate, up), dy), (dgate, dup)) in inputs.zip(dgate.iter_mut().zip(dup)) {
            let sigma = logistic::<F>(*gate);
            *dup = dy * gate * sigma;
            *dgate = dy * up * sigma * F::fused(*gate, 1.0 - sigma, 1.0);
        }
    }

    /// One row of RMS normalisation; answers `rstd`.
    pub(in crate::cpu) fn rms_norm_forward(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) -> f32 {
        let squares = lane_sum!(F, x, x, sum, a, b, F::fused(a, b, sum));
        let rstd = 1.0 / (squares / x.len() as f32 + eps).sqrt();
        for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
            *y = x * rstd * w;
        }
        rstd
    }

    /// Gradient of one row; added to `dx` if asked.
    pub(in crate::cpu) fn rms_norm_backward(x: &[f32], weight: &[f32], rstd: f32, dy: &[f32], dx: &mut [f32], accumulate: bool) {
        let keep = if accumulate { 1.0 } else { 0.0 };
        if !accumulate {
            dx.fill(0.0);
        }
        let mut lanes = [0.0f32; LANES];
        let blocks = x.chunks(LANES).zip(dy.chunks(LANES)).zip(weight.chunks(LANES));
        for ((x, dy), w) in blocks {
            for (lane, ((x, dy), w)) in lanes.iter_mut().zip(x.iter().zip(dy).zip(w)) {
                *lane = F::fused(dy * w, *x, *lane);
            }
        }
        let mean = lanes.iter().sum::<f32>() / x.len() as f32;
        let pull = rstd * rstd * mean;
        for (((dx, x), dy), w) in dx.iter_mut().zip(x).zip(dy).zip(weight) {
            *dx = F::fused(keep, *dx, rstd * (dy * w - x * pull));
        }
    }

    /// Rotates the pairs of one head by the angles of one position.
    pub(in crate::cpu) fn rotate(low: &mut [f32], high: &mut [f32], cos: &[f32], sin: &[f32], sign: f32) {
        for (((low, high), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
            let sin = sign * sin;
            (*low, *high) = (*low * cos - *high * sin, *high * cos + *low * sin);
        }
    }

    /// The largest value; NaN is passed over. `−∞` of nothing.
    pub(in crate::cpu) fn largest(values: &[f32]) -> f32 {
        let mut lanes = [f32::NEG_INFINITY; LANES];
        let parts = values.chunks_exact(LANES);
        let tail = parts.remainder();
        for part in parts {
            for (lane, value) in lanes.iter_mut().zip(part) {
                *lane = if *value > *lane { *value } else { *lane };
            }
        }
        let all = lanes.iter().chain(tail);
        all.fold(f32::NEG_INFINITY, |largest, value| if *value > largest { *value } else { largest })
    }

    /// Replaces each value by `exp(factor · value − shift)`; answers their sum.
    pub(in crate::cpu) fn exponentials(values: &mut [f32], factor: f32, shift: f32) -> f32 {
        for value in values.iter_mut() {
            *value = exp::<F>(F::fused(*value, factor, -shift));
        }
        lane_sum!(F, values, values, sum, a, _b, sum + a)
    }

    /// `Σ exp(value − shift)`.
    pub(in crate::cpu) fn sum_of_exponentials(values: &[f32], shift: f32) -> f32 {
        lane_sum!(F, values, values, sum, a, _b, sum + exp::<F>(a - shift))
    }

    /// Replaces each value by `factor · exp(value − shift)`.
    pub(in crate::cpu) fn scaled_exponentials(values: &mut [f32], factor: f32, shift: f32) {
        for value in values.iter_mut() {
            *value = factor * exp::<F>(*value - shift);
        }
    }

    /// `p ← exp(scale · p − lse)`, then `ds ← p · (ds − delta)`: one row of attention's backward pass.
    pub(in crate::cpu) fn score_gradients(p: &mut [f32], ds: &mut [f32], scale: f32, lse: f32, delta: f32) {
        for (p, ds) in p.iter_mut().zip(ds) {
            *p = exp::<F>(F::fused(*p, scale, -lse));
            *ds = *p * (*ds - delta);
        }
    }

    /// One AdamW step; see [`AdamWStep`].
    pub(in crate::cpu) fn adamw(w: &mut [f32], gradient: &[f32], m: &mut [f32], v: &mut [f32], step: &AdamWStep) {
        for (((w, g), m), v) in w.iter_mut().zip(gradient).zip(m).zip(v) {
            let g = step.gradient_scale * g;
            let kept = *w * step.keep;
            *m = F::fused(step.one_minus_beta1, g - *m, *m);
            *v = F::fused(step.one_minus_beta2 * g, g, step.beta2 * *v);
            *w = kept - step.rate * *m / (v.sqrt() / step.root2 + step.epsilon);
        }
    }
}

/// The numbers of one AdamW step, corrections included.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct AdamWStep {
    /// Factor of the gradient.
    pub(in crate::cpu) gradient_scale: f32,
    /// `1 − lr · decay`.
    pub(in crate::cpu) keep: f32,
    /// `1 − β₁`.
    pub(in crate::cpu) one_minus_beta1: f32,
    /// `β₂`.
    pub(in crate::cpu) beta2: f32,
    /// `1 − β₂`.
    pub(in crate::cpu) one_minus_beta2: f32,
    /// `lr / (1 − β₁ᵗ)`.
    pub(in crate::cpu) rate: f32,
    /// `sqrt(1 − β₂ᵗ)`.
    pub(in crate::cpu) root2: f32,
    /// `ε`.
    pub(in crate::cpu) epsilon: f32,
}
