//! AdamW; formula in [`OptimizerOps`](crate::ops::OptimizerOps).

use super::Real;
use crate::ops::{AdamW, MOMENT_BLOCK};

/// `Σ x²`.
pub fn squared_norm<N: Real>(values: &[N]) -> N {
    N::sum(values.iter().map(|x| *x * *x))
}

/// One step, in place.
pub fn adamw_step<N: Real>(w: &mut [N], gradient: &[N], m: &mut [N], v: &mut [N], settings: &AdamW) {
    let one = N::new(1.0);
    let number = |value: f32| N::new(f64::from(value));
    let (beta1, beta2) = (number(settings.beta1), number(settings.beta2));
    let power = |beta: f32| f64::from(beta).powf(settings.step as f64);
    let (correction1, correction2) = (N::new(1.0 - power(settings.beta1)), N::new(1.0 - power(settings.beta2)));
    let rate = number(settings.learning_rate);
    for (((w, g), m), v) in w.iter_mut().zip(gradient).zip(m).zip(v) {
        let g = number(settings.gradient_scale) * *g;
        *w = *w - rate * number(settings.weight_decay) * *w;
        *m = beta1 * *m + (one - beta1) * g;
        *v = beta2 * *v + (one - beta2) * g * g;
        *w = *w - rate / correction1 * *m / (v.sqrt() / correction2.sqrt() + number(settings.epsilon));
    }
}

/// The values of 8-bit codes; formula in [`OptimizerOps`](crate::ops::OptimizerOps).
pub fn decode_moment<N: Real>(map: &[f32; 256], codes: &[u8], absmax: &[f32]) -> Vec<N> {
    let scales = absmax
        .iter()
        .flat_map(|scale| std::iter::repeat_n(*scale, MOMENT_BLOCK));
    codes
        .iter()
        .zip(scales)
        .map(|(code, scale)| N::new(f64::from(map[usize::from(*code)]) * f64::from(scale)))
        .collect()
}
