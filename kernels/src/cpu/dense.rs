//! Small matrix products of one thread: the inside of a task. All matrices are row-major f32; `C` may be a window of a wider
//! matrix, whose row length is its stride. Each element of `C` is one sum in one order, whatever the other extents are.

use half::bf16;

use crate::ops::Precision;

/// `C [m, n] += factor · A [m, k] · B [n, k]ᵀ`; rows of `C` are `stride` apart.
pub(super) fn add_nt(c: &mut [f32], stride: usize, a: &[f32], b: &[f32], k: usize, factor: f32) {
    if k == 0 || c.is_empty() {
        return;
    }
    for (c, a) in c.chunks_mut(stride).zip(a.chunks_exact(k)) {
        for (c, b) in c.iter_mut().zip(b.chunks_exact(k)) {
            *c += factor * dot(a, b);
        }
    }
}

/// `C [m, n] += factor · A [m, k] · B [k, n]`; rows of `A` are `stride` apart.
pub(super) fn add_nn(c: &mut [f32], n: usize, a: &[f32], stride: usize, b: &[f32], factor: f32) {
    if n == 0 {
        return;
    }
    let k = b.len() / n;
    for (c, a) in c.chunks_exact_mut(n).zip(a.chunks(stride.max(1))) {
        for (a, b) in a[..k].iter().zip(b.chunks_exact(n)) {
            let a = factor * a;
            for (c, b) in c.iter_mut().zip(b) {
                *c += a * b;
            }
        }
    }
}

/// `C [m, n] += factor · A [k, m]ᵀ · B [k, n]`.
pub(super) fn add_tn(c: &mut [f32], n: usize, a: &[f32], b: &[f32], factor: f32) {
    if n == 0 || c.is_empty() {
        return;
    }
    let m = c.len() / n;
    for (a, b) in a.chunks_exact(m).zip(b.chunks_exact(n)) {
        for (c, a) in c.chunks_exact_mut(n).zip(a) {
            let a = factor * a;
            for (c, b) in c.iter_mut().zip(b) {
                *c += a * b;
            }
        }
    }
}

/// A factor as it enters a product.
pub(super) fn rounded(values: &[f32], precision: Precision) -> Vec<f32> {
    match precision {
        Precision::F32 => values.to_vec(),
        Precision::Bf16 => values.iter().map(|value| bf16::from_f32(*value).to_f32()).collect(),
    }
}

/// `Σ a_i b_i` over 16 lanes, then over the lanes: one order, whatever the machine.
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; 16];
    let (a_parts, b_parts) = (a.chunks_exact(16), b.chunks_exact(16));
    let tail: f32 = a_parts
        .remainder()
        .iter()
        .zip(b_parts.remainder())
        .map(|(a, b)| a * b)
        .sum();
    for (a, b) in a_parts.zip(b_parts) {
        for (lane, (a, b)) in lanes.iter_mut().zip(a.iter().zip(b)) {
            *lane += a * b;
        }
    }
    lanes.iter().sum::<f32>() + tail
}
