//! Cross-entropy; formulas in [`LossOps`](crate::ops::LossOps).

use super::Real;

/// `(losses, dx)` of hidden states `x [T, C]` under `head [V, C]`; `factor` is `g`.
pub fn linear_cross_entropy<N: Real>(x: &[N], head: &[N], labels: &[i32], width: usize, factor: N) -> (Vec<N>, Vec<N>) {
    let zero = N::new(0.0);
    let mut losses = vec![zero; labels.len()];
    let mut dx = vec![zero; x.len()];
    for (t, label) in labels.iter().enumerate() {
        let Ok(label) = usize::try_from(*label) else {
            continue;
        };
        let x = &x[t * width..][..width];
        let rows = || head.chunks_exact(width);
        let z: Vec<N> = rows()
            .map(|w| N::dot(x.iter().copied().zip(w.iter().copied())))
            .collect();
        let largest = z.iter().copied().fold(z[0], |a, b| if b > a { b } else { a });
        let log_sum = largest + N::sum(z.iter().map(|z| (*z - largest).exp())).ln();
        losses[t] = log_sum - z[label];
        let dz: Vec<N> = z
            .iter()
            .enumerate()
            .map(|(v, z)| factor * ((*z - log_sum).exp() - N::new(f64::from(u8::from(v == label)))))
            .collect();
        for (c, dx) in dx[t * width..][..width].iter_mut().enumerate() {
            *dx = N::dot(dz.iter().copied().zip(rows().map(|w| w[c])));
        }
    }
    (losses, dx)
}
