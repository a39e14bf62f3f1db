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

    /// `Σ a²`, in f64.
    pub(in crate::cpu) fn sum_of_squares(values: &[f32]) -> f64 {
        let mut lanes = [0.0f64; LANES];
        let parts = values.chunks_exact(LANES);
        let tail = parts.remainder();
        for part in parts {
            for (lane, value) in lanes.iter_mut().zip(part) {
                *lane += f64::from(*value) * f64::from(*value);
            }
        }
        for (lane, value) in lanes.iter_mut().zip(tail) {
            *lane += f64::from(*value) * f64::from(*value);
        }
        lanes.iter().sum()
    }

    /// bf16 bits of `factor · values`.
    pub(in crate::cpu) fn narrow(values: &[f32], factor: f32, out: &mut [u16]) {
        for (out, value) in out.iter_mut().zip(values) {
            *out = bf16_bits(factor * value);
        }
    }

    /// `factor · values`, rounded to bf16 values.
    pub(in crate::cpu) fn round(values: &[f32], factor: f32, out: &mut [f32]) {
        for (out, value) in out.iter_mut().zip(values) {
            *out = widened(bf16_bits(factor * value));
        }
    }

    /// Rounds to bf16 values.
    pub(in crate::cpu) fn round_in_place(values: &mut [f32]) {
        for value in values.iter_mut() {
            *value = widened(bf16_bits(*value));
        }
    }

    /// `row` holds f32 values, two halves each, the lower first. Writes the bf16 bits of `factor · value` from its beginning on:
    /// a part is read before anything is written over it.
    pub(in crate::cpu) fn narrow_in_place(row: &mut [u16], factor: f32) {
        const PART: usize = 64;
        let count = row.len() / 2;
        let mut values = [0.0f32; PART];
        for first in (0..count).step_by(PART) {
            let length = PART.min(count - first);
            let (halves, _) = row[2 * first..2 * (first + length)].as_chunks::<2>();
            for (value, [low, high]) in values.iter_mut().zip(halves) {
                *value = factor * f32::from_bits(u32::from(*low) | u32::from(*high) << 16);
            }
            for (out, value) in row[first..first + length].iter_mut().zip(&values) {
                *out = bf16_bits(*value);
            }
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

    /// One block of a running softmax. Each row of 64 scores is multiplied by `scale` and replaced by `exp(score − maximum)`,
    /// where the row's maximum first rises to that of the scores; `sums` are brought to the new maxima and grow by the row.
    /// `corrections` are the factors by which anything summed under the old maxima must be multiplied.
    pub(in crate::cpu) fn softmax_block(
        scores: &mut [f32],
        scale: f32,
        maxima: &mut [f32; 64],
        sums: &mut [f32; 64],
        corrections: &mut [f32; 64],
    ) {
        let (rows, _) = scores.as_chunks_mut::<64>();
        let states = maxima.iter_mut().zip(sums).zip(corrections);
        for (row, ((maximum, sum), correction)) in rows.iter_mut().zip(states) {
            let mut lanes = [f32::NEG_INFINITY; LANES];
            for part in row.chunks_exact_mut(LANES) {
                for (lane, score) in lanes.iter_mut().zip(part) {
                    *score *= scale;
                    *lane = if *score > *lane { *score } else { *lane };
                }
            }
            let mut half = LANES / 2;
            while half > 0 {
                for i in 0..half {
                    lanes[i] = if lanes[i + half] > lanes[i] { lanes[i + half] } else { lanes[i] };
                }
                half /= 2;
            }
            let risen = if lanes[0] > *maximum { lanes[0] } else { *maximum };
            let mut totals = [0.0f32; LANES];
            for part in row.chunks_exact_mut(LANES) {
                for (total, score) in totals.iter_mut().zip(part) {
                    *score = exp::<F>(*score - risen);
                    *total += *score;
                }
            }
            let mut half = LANES / 2;
            while half > 0 {
                for i in 0..half {
                    totals[i] += totals[i + half];
                }
                half /= 2;
            }
            *correction = exp::<F>(*maximum - risen);
            *sum = F::fused(*sum, *correction, totals[0]);
            *maximum = risen;
        }
    }

    /// Multiplies each row of `width` elements by its factor.
    pub(in crate::cpu) fn scale_rows(values: &mut [f32], width: usize, factors: &[f32]) {
        for (row, factor) in values.chunks_exact_mut(width.max(1)).zip(factors) {
            for value in row {
                *value *= factor;
            }
        }
    }

    /// Replaces each value by `exp(value − shift)`; answers their sum.
    pub(in crate::cpu) fn exponentials(values: &mut [f32], shift: f32) -> f32 {
        let mut lanes = [0.0f32; LANES];
        for part in values.chunks_mut(LANES) {
            for (lane, value) in lanes.iter_mut().zip(part) {
                *value = exp::<F>(*value - shift);
                *lane += *value;
            }
        }
        lanes.iter().sum()
    }

    /// `p ← exp(scale · p − lse)`, then `ds ← p · (ds − delta)`: rows of 64 scores of attention's backward pass.
    pub(in crate::cpu) fn score_gradients(p: &mut [f32], ds: &mut [f32], scale: f32, lse: &[f32], delta: &[f32]) {
        let ((p, _), (ds, _)) = (p.as_chunks_mut::<64>(), ds.as_chunks_mut::<64>());
        for ((p, ds), (lse, delta)) in p.iter_mut().zip(ds).zip(lse.iter().zip(delta)) {
            for (p, ds) in p.iter_mut().zip(ds) {
                *p = exp::<F>(F::fused(*p, scale, -lse));
                *ds = *p * (*ds - delta);
            }
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
