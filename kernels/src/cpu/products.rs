//! Plain matrix products on row-major f32 matrices.

use half::bf16;

use super::Cpu;
use crate::ops::Precision;

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

impl Cpu {
    /// `C += factor · A · Bᵀ` with `A [M, K]`, `B [N, K]`, `C [M, N]`.
    pub(super) fn add_product_nt(&self, c: &mut [f32], a: &[f32], b: &[f32], k: usize, n: usize, factor: f32) {
        self.for_rows(c, n.max(1), |first, c| {
            for (row, c) in c.chunks_exact_mut(n).enumerate() {
                let a = &a[(first + row) * k..][..k];
                for (column, c) in c.iter_mut().enumerate() {
                    *c += factor * dot(a, &b[column * k..][..k]);
                }
            }
        });
    }

    /// `C += factor · A · B` with `A [M, K]`, `B [K, N]`, `C [M, N]`.
    pub(super) fn add_product_nn(&self, c: &mut [f32], a: &[f32], b: &[f32], k: usize, n: usize, factor: f32) {
        self.for_rows(c, n.max(1), |first, c| {
            for (row, c) in c.chunks_exact_mut(n).enumerate() {
                for (index, a) in a[(first + row) * k..][..k].iter().enumerate() {
                    for (c, b) in c.iter_mut().zip(&b[index * n..][..n]) {
                        *c += factor * a * b;
                    }
                }
            }
        });
    }
}

/// The transpose of a `[rows, columns]` matrix.
pub(super) fn transposed(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    let mut out = vec![0.0; values.len()];
    for row in 0..rows {
        for column in 0..columns {
            out[column * rows + row] = values[row * columns + column];
        }
    }
    out
}
