//! Products of small f32 matrices inside a task. All are row-major and whole, but for the stride of a left matrix.

use super::scratch::with_local;
use super::simd::{Left, PANEL, Simd, Start, multiply, transpose_rows};

/// Rows that one transposition brings into a panel.
const GROUP: usize = 16;

/// `C [m, n] += A [m, k] · B [k, n]`; rows of `A` are `stride` apart.
pub(super) fn add_nn(simd: Simd, c: &mut [f32], n: usize, a: &[f32], stride: usize, b: &[f32]) {
    if c.is_empty() || b.is_empty() {
        return;
    }
    let k = b.len() / n;
    let left = Left {
        values: a,
        stride,
        rows: c.len() / n,
    };
    for column in (0..n).step_by(PANEL) {
        let columns = PANEL.min(n - column);
        let width = columns.next_multiple_of(GROUP);
        with_local::<f32, _>(k * width, |panel| {
            for (step, b) in panel.chunks_exact_mut(width).zip(b.chunks_exact(n)) {
                let (filled, padding) = step.split_at_mut(columns);
                filled.copy_from_slice(&b[column..column + columns]);
                padding.fill(0.0);
            }
            multiply(simd, left, panel, k, columns, &mut c[column..], n, Start::Output);
        });
    }
}

/// `C [m, n] += A [m, k] · B [n, k]ᵀ`.
pub(super) fn add_nt(simd: Simd, c: &mut [f32], n: usize, a: &[f32], b: &[f32], k: usize) {
    if c.is_empty() || k == 0 {
        return;
    }
    let left = Left {
        values: a,
        stride: k,
        rows: c.len() / n,
    };
    for column in (0..n).step_by(PANEL) {
        let columns = PANEL.min(n - column);
        let width = columns.next_multiple_of(GROUP);
        with_local::<f32, _>(k * width, |panel| {
            transposed(simd, &b[column * k..(column + columns) * k], k, panel, width);
            multiply(simd, left, panel, k, columns, &mut c[column..], n, Start::Output);
        });
    }
}

/// `C [m, n] += A [k, m]ᵀ · B [k, n]`.
pub(super) fn add_tn(simd: Simd, c: &mut [f32], n: usize, a: &[f32], b: &[f32]) {
    if c.is_empty() || b.is_empty() {
        return;
    }
    let (m, k) = (c.len() / n, b.len() / n);
    let stride = k.next_multiple_of(GROUP);
    with_local::<f32, _>(m * stride, |turned| {
        transposed(simd, a, m, turned, stride);
        add_nn(simd, c, n, turned, stride, b);
    });
}

/// Rows of `k` elements as columns: `out[s, i] = rows[i][s]`, with `out` rows of `width` padded with zeros to 16 columns.
fn transposed(simd: Simd, rows: &[f32], k: usize, out: &mut [f32], width: usize) {
    for (group, rows) in rows.chunks(GROUP * k).enumerate() {
        let mut own = [&[][..]; GROUP];
        let count = rows.len() / k;
        for (own, row) in own.iter_mut().zip(rows.chunks_exact(k)) {
            *own = row;
        }
        transpose_rows(simd, &own[..count], k, out, width, group * GROUP);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::SimdLevel;
    use crate::testing::{Judge, Random};

    /// Checks `ours` against `C + A · B` in f64.
    fn check(
        ours: &[f32],
        c: &[f32],
        a: impl Fn(usize, usize) -> f32,
        b: impl Fn(usize, usize) -> f32,
        [n, k]: [usize; 2],
    ) {
        let element = |i: usize| {
            (0..k)
                .map(|s| f64::from(a(i / n, s)) * f64::from(b(s, i % n)))
                .sum::<f64>()
        };
        let exact: Vec<f64> = c.iter().enumerate().map(|(i, c)| f64::from(*c) + element(i)).collect();
        let judge = Judge {
            case: format!("{n} columns, {k} deep"),
            length: 4 * (k + 1),
            cancelling: 0.0,
            roundings: 0,
        };
        let verdict = judge.compare("c", ours, &exact, &exact);
        assert!(verdict.is_ok(), "{verdict:?}");
    }

    #[test]
    fn small_products_are_right_at_every_remainder_and_level() {
        let sizes = [
            (1, 1, 1),
            (6, 4, 16),
            (7, 5, 17),
            (13, 33, 31),
            (5, 70, 12),
            (3, 16, 9),
            (2, 7, 0),
            (64, 128, 64),
        ];
        for (m, n, k) in sizes {
            let mut random = Random::new((m * n * k) as u64);
            let (c, a, b) = (random.normal(m * n), random.normal(m * k), random.normal(n * k));
            for simd in SimdLevel::ALL.into_iter().filter_map(Simd::new) {
                let mut own = c.clone();
                add_nt(simd, &mut own, n, &a, &b, k);
                check(&own, &c, |i, s| a[i * k + s], |s, j| b[j * k + s], [n, k]);
                let mut own = c.clone();
                add_nn(simd, &mut own, n, &a, k, &b);
                check(&own, &c, |i, s| a[i * k + s], |s, j| b[s * n + j], [n, k]);
                let mut own = c.clone();
                add_tn(simd, &mut own, n, &a, &b);
                check(&own, &c, |i, s| a[s * m + i], |s, j| b[s * n + j], [n, k]);
            }
        }
    }
}
