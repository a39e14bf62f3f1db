//! The oracle's gradients against finite differences of its own forward passes.

use super::*;
use crate::tensor::Segments;
use crate::testing::Random;

/// Checks `gradient` against the derivative of `loss` at `at`, by the four-point rule
/// `(f(−2h) − 8 f(−h) + 8 f(h) − f(2h)) / 12h`, whose error is of order h⁴.
pub(super) fn check(what: &str, at: &[f64], gradient: &[f64], loss: impl Fn(&[f64]) -> f64) {
    let step = 1e-3;
    assert_eq!(at.len(), gradient.len(), "{what}");
    let largest = gradient.iter().fold(1.0f64, |a, b| a.max(b.abs()));
    for i in 0..at.len() {
        let moved = |steps: f64| {
            let mut at = at.to_vec();
            at[i] += steps * step;
            loss(&at)
        };
        let slope = (moved(-2.0) - 8.0 * moved(-1.0) + 8.0 * moved(1.0) - moved(2.0)) / (12.0 * step);
        let bound = 1e-8 * largest;
        assert!(
            (slope - gradient[i]).abs() < bound,
            "{what}[{i}]: analytic {}, by differences {slope}",
            gradient[i]
        );
    }
}

pub(super) fn values(seed: u64, count: usize) -> Vec<f64> {
    cast(&Random::new(seed).normal(count))
}

pub(super) fn weighted(outputs: &[f64], weights: &[f64]) -> f64 {
    outputs.iter().zip(weights).map(|(a, b)| a * b).sum()
}

#[test]
fn swiglu_gradients_are_the_derivatives() {
    let (gate, up, dy) = (values(1, 9), values(2, 9), values(3, 9));
    let (dgate, dup) = swiglu_backward(&gate, &up, &dy);
    check("dgate", &gate, &dgate, |gate| weighted(&swiglu_forward(gate, &up), &dy));
    check("dup", &up, &dup, |up| weighted(&swiglu_forward(&gate, up), &dy));
}

#[test]
fn norm_gradient_is_the_derivative() {
    let (x, w, dy) = (values(1, 15), values(2, 5), values(3, 15));
    let (_, rstd) = rms_norm_forward(&x, &w, 1e-6);
    let dx = rms_norm_backward(&x, &w, &rstd, &dy);
    check("dx", &x, &dx, |x| weighted(&rms_norm_forward(x, &w, 1e-6).0, &dy));
}

#[test]
fn linear_gradients_are_the_derivatives() {
    let (x, weight, dy) = (values(1, 3 * 5), values(2, 4 * 5), values(3, 3 * 4));
    let (a, b, bias) = (values(4, 2 * 5), values(5, 4 * 2), values(6, 4));
    let frozen = Layer {
        weight: &weight,
        bias: Some(&bias),
        adapter: None,
        inputs: 5,
        outputs: 4,
    };
    fn layer<'a>(frozen: Layer<'a, f64>, a: &'a [f64], b: &'a [f64]) -> Layer<'a, f64> {
        Layer {
            adapter: Some(Adapter {
                a,
                b,
                scale: 1.7,
                rank: 2,
            }),
            ..frozen
        }
    }
    let (_, u) = linear_forward(&x, &layer(frozen, &a, &b));
    let gradients = linear_backward(&x, &u, &dy, &layer(frozen, &a, &b));
    check("dx", &x, &gradients.dx, |x| {
        weighted(&linear_forward(x, &layer(frozen, &a, &b)).0, &dy)
    });
    check("dA", &a, &gradients.da, |a| {
        weighted(&linear_forward(&x, &layer(frozen, a, &b)).0, &dy)
    });
    check("dB", &b, &gradients.db, |b| {
        weighted(&linear_forward(&x, &layer(frozen, &a, b)).0, &dy)
    });
}

#[test]
fn rope_backward_is_the_transpose() {
    let (x, dy) = (values(1, 2 * 2 * 6), values(2, 2 * 2 * 6));
    let (cos, sin): (Vec<f64>, Vec<f64>) = values(3, 5 * 2).iter().map(|angle| (angle.cos(), angle.sin())).unzip();
    let rotated = |x: &[f64], sign| {
        let mut x = x.to_vec();
        rope(&mut x, (2, 6), &[4, 1], &cos, &sin, 2, sign);
        x
    };
    check("dx", &x, &rotated(&dy, -1.0), |x| weighted(&rotated(x, 1.0), &dy));
}

#[test]
fn attention_gradients_are_the_derivatives() {
    let heads = Heads {
        heads: 2,
        kv_heads: 1,
        dim: 3,
        scale: 0.6,
    };
    let segments = Segments::from_lengths([3, 0, 1]);
    let (q, k, v, dout) = (values(1, 4 * 6), values(2, 4 * 3), values(3, 4 * 3), values(4, 4 * 6));
    let forward = |q: &[f64], k: &[f64], v: &[f64]| attention_forward(q, k, v, &segments, &segments, &heads);
    let (out, lse) = forward(&q, &k, &v);
    let gradients = attention_backward(&q, &k, &v, &out, &lse, &dout, &segments, &heads);
    check("dq", &q, &gradients.dq, |q| weighted(&forward(q, &k, &v).0, &dout));
    check("dk", &k, &gradients.dk, |k| weighted(&forward(&q, k, &v).0, &dout));
    check("dv", &v, &gradients.dv, |v| weighted(&forward(&q, &k, v).0, &dout));
}

#[test]
fn cross_entropy_gradient_is_the_derivative() {
    let (x, head) = (values(1, 3 * 4), values(2, 7 * 4));
    let labels = [2, -100, 6];
    let (_, dx) = linear_cross_entropy(&x, &head, &labels, 4, 0.3);
    check("dx", &x, &dx, |x| {
        0.3 * linear_cross_entropy(x, &head, &labels, 4, 0.3).0.iter().sum::<f64>()
    });
}
