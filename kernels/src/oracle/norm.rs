//! RMS normalisation; formulas in [`NormOps`](crate::ops::NormOps). `weight` is what the normalised value is multiplied by
//! (already `1 + w` for a zero-centred norm).

use super::Real;

/// `(y, rstd)` of rows as long as `weight`.
pub fn rms_norm_forward<N: Real>(x: &[N], weight: &[N], eps: N) -> (Vec<N>, Vec<N>) {
    let width = weight.len();
    let (mut y, mut rstd) = (Vec::new(), Vec::new());
    for row in x.chunks_exact(width) {
        let mean = N::sum(row.iter().map(|x| *x * *x)) / N::new(width as f64);
        let factor = N::new(1.0) / (mean + eps).sqrt();
        y.extend(row.iter().zip(weight).map(|(x, w)| *x * factor * *w));
        rstd.push(factor);
    }
    (y, rstd)
}

/// `dx`.
pub fn rms_norm_backward<N: Real>(x: &[N], weight: &[N], rstd: &[N], dy: &[N]) -> Vec<N> {
    let width = weight.len();
    let mut dx = Vec::new();
    for ((x, dy), rstd) in x.chunks_exact(width).zip(dy.chunks_exact(width)).zip(rstd) {
        let g: Vec<N> = dy.iter().zip(weight).map(|(dy, w)| *dy * *w).collect();
        let mean = N::sum(g.iter().zip(x).map(|(g, x)| *g * *x)) / N::new(width as f64);
        dx.extend(g.iter().zip(x).map(|(g, x)| *rstd * (*g - *x * *rstd * *rstd * mean)));
    }
    dx
}
