//! Rotary embedding; formula in [`RopeOps`](crate::ops::RopeOps).

use super::Real;

/// Rotates `x`, `[T, heads, dim]`, by the angles of `positions`; `sign` is 1 forward, −1 backward. `cos` and `sin` have
/// `pairs` values a position.
pub fn rope<N: Real>(
    x: &mut [N],
    (heads, dim): (usize, usize),
    positions: &[i32],
    cos: &[N],
    sin: &[N],
    pairs: usize,
    sign: f64,
) {
    for (t, position) in positions.iter().enumerate() {
        for head in 0..heads {
            let at = (t * heads + head) * dim;
            for p in 0..pairs {
                let angle = *position as usize * pairs + p;
                let (c, s) = (cos[angle], N::new(sign) * sin[angle]);
                let (low, high) = (x[at + p], x[at + p + pairs]);
                x[at + p] = low * c - high * s;
                x[at + p + pairs] = high * c + low * s;
            }
        }
    }
}
