//! Products of small matrices, or of few rows with many, as they lie: packing would cost more than it saves.
//!
//! All matrices are row-major. Each element of the output is one sum in one order, whatever the tile it falls in.

#![allow(unsafe_code)] // for what `vectorised!` expands to

use super::level::{Simd, SimdLevel, vectorised};
use super::math::Fused;

const LANES: usize = 16;

type Lanes = [f32; LANES];

/// `C [m, n] += factor · A [m, k] · B [n, k]ᵀ`; `C` may be a window of a wider matrix with rows `stride` apart.
pub(in crate::cpu) fn add_nt(simd: Simd, c: &mut [f32], stride: usize, a: &[f32], b: &[f32], k: usize, factor: f32) {
    if k == 0 || c.is_empty() {
        return;
    }
    // Accumulators of six rows by four fill the registers of AVX-512 and would spill those of AVX2.
    match simd.level() {
        SimdLevel::Avx512 | SimdLevel::Avx512Bf16 => wide_nt(simd, c, stride, a, b, k, factor),
        _ => narrow_nt(simd, c, stride, a, b, k, factor),
    }
}

/// `C [m, n] += factor · A [m, k] · B [k, n]`; rows of `A` are `stride` apart.
pub(in crate::cpu) fn add_nn(simd: Simd, c: &mut [f32], n: usize, a: &[f32], stride: usize, b: &[f32], factor: f32) {
    add_steps(simd, c, (n, n), a, (stride, 1), b, factor);
}

/// As [`add_nn`] where `C` is a window of `n` columns of a wider matrix: `widths` is that matrix's and `n`.
pub(in crate::cpu) fn add_nn_window(
    simd: Simd,
    c: &mut [f32],
    widths: (usize, usize),
    a: &[f32],
    stride: usize,
    b: &[f32],
    factor: f32,
) {
    add_steps(simd, c, widths, a, (stride, 1), b, factor);
}

/// `C [m, n] += factor · A [k, m]ᵀ · B [k, n]`.
pub(in crate::cpu) fn add_tn(simd: Simd, c: &mut [f32], n: usize, a: &[f32], b: &[f32], factor: f32) {
    let m = c.len() / n.max(1);
    add_steps(simd, c, (n, n), a, (1, m), b, factor);
}

vectorised! {
    fn wide_nt(c: &mut [f32], stride: usize, a: &[f32], b: &[f32], k: usize, factor: f32) {
        for (c, a) in c.chunks_mut(6 * stride).zip(a.chunks(6 * k)) {
            match a.len() / k {
                6 => band::<F, 6, 4>(c, stride, a, b, k, factor),
                5 => band::<F, 5, 4>(c, stride, a, b, k, factor),
                4 => band::<F, 4, 4>(c, stride, a, b, k, factor),
                3 => band::<F, 3, 4>(c, stride, a, b, k, factor),
                2 => band::<F, 2, 4>(c, stride, a, b, k, factor),
                _ => band::<F, 1, 4>(c, stride, a, b, k, factor),
            }
        }
    }

    fn narrow_nt(c: &mut [f32], stride: usize, a: &[f32], b: &[f32], k: usize, factor: f32) {
        for (c, a) in c.chunks_mut(2 * stride).zip(a.chunks(2 * k)) {
            match a.len() / k {
                2 => band::<F, 2, 2>(c, stride, a, b, k, factor),
                _ => band::<F, 1, 2>(c, stride, a, b, k, factor),
            }
        }
    }

    /// `C [m, n] += factor · Σ_s a(·, s) B[s, ·]`, where row `i` takes `a[i · strides.0 + s · strides.1]`; `widths` is the
    /// distance of the rows of `C`, and `n`.
    fn add_steps(c: &mut [f32], widths: (usize, usize), a: &[f32], strides: (usize, usize), b: &[f32], factor: f32) {
        let (stride, n) = widths;
        if n == 0 {
            return;
        }
        let mut done = 0;
        // Eight steps at a time: their factors stay in registers while a row of the output goes by once.
        for b in b.chunks(8 * n) {
            let steps = b.len() / n;
            for (i, c) in c.chunks_mut(stride).enumerate() {
                let c = &mut c[..n];
                let at = |s: usize| factor * a[i * strides.0 + (done + s) * strides.1];
                let mut s = 0;
                if steps == 8 {
                    add_rows::<F, 8>(c, &std::array::from_fn(at), b);
                    continue;
                }
                if steps - s >= 4 {
                    add_rows::<F, 4>(c, &std::array::from_fn(|j| at(s + j)), &b[s * n..]);
                    s += 4;
                }
                while s < steps {
                    add_rows::<F, 1>(c, &[at(s)], &b[s * n..]);
                    s += 1;
                }
            }
            done += steps;
        }
    }
}

/// `c += Σ_s factors[s] · rows[s]`, the rows lying one after another, as long as `c`.
#[inline(always)]
fn add_rows<F: Fused, const STEPS: usize>(c: &mut [f32], factors: &[f32; STEPS], rows: &[f32]) {
    let n = c.len();
    let rows: [&[f32]; STEPS] = std::array::from_fn(|s| &rows[s * n..][..n]);
    let parts = rows.map(|row| row.as_chunks::<LANES>());
    let (blocks, tail) = c.as_chunks_mut::<LANES>();
    let whole: [&[Lanes]; STEPS] = parts.map(|(whole, _)| &whole[..blocks.len()]);
    for (i, c) in blocks.iter_mut().enumerate() {
        let mut sums = *c;
        for s in 0..STEPS {
            let row = &whole[s][i];
            for lane in 0..LANES {
                sums[lane] = F::fused(factors[s], row[lane], sums[lane]);
            }
        }
        *c = sums;
    }
    for (i, c) in tail.iter_mut().enumerate() {
        for s in 0..STEPS {
            *c = F::fused(factors[s], parts[s].1[i], *c);
        }
    }
}

/// `ROWS` rows of `A` with all of `B`, `COLUMNS` rows of it at a time.
#[inline(always)]
fn band<F: Fused, const ROWS: usize, const COLUMNS: usize>(
    c: &mut [f32],
    stride: usize,
    a: &[f32],
    b: &[f32],
    k: usize,
    factor: f32,
) {
    let rows: [&[f32]; ROWS] = std::array::from_fn(|row| &a[row * k..][..k]);
    let whole = b.chunks_exact(COLUMNS * k);
    let rest = whole.remainder();
    let mut column = 0;
    for b in whole {
        let dots = dots::<F, ROWS, COLUMNS>(&rows, b, k);
        for (row, dots) in dots.iter().enumerate() {
            for (i, dot) in dots.iter().enumerate() {
                c[row * stride + column + i] += factor * dot;
            }
        }
        column += COLUMNS;
    }
    for b in rest.chunks_exact(k) {
        for (row, [dot]) in dots::<F, ROWS, 1>(&rows, b, k).iter().enumerate() {
            c[row * stride + column] += factor * dot;
        }
        column += 1;
    }
}

/// Dot products of some rows with some others: over 16 lanes in rising order, then over the lanes.
#[inline(always)]
fn dots<F: Fused, const ROWS: usize, const COLUMNS: usize>(
    a: &[&[f32]; ROWS],
    b: &[f32],
    k: usize,
) -> [[f32; COLUMNS]; ROWS] {
    let b: [&[f32]; COLUMNS] = std::array::from_fn(|column| &b[column * k..][..k]);
    let (a_parts, b_parts) = (
        a.map(|row| row.as_chunks::<LANES>()),
        b.map(|row| row.as_chunks::<LANES>()),
    );
    let blocks = k / LANES;
    let a_whole: [&[Lanes]; ROWS] = a_parts.map(|(whole, _)| &whole[..blocks]);
    let b_whole: [&[Lanes]; COLUMNS] = b_parts.map(|(whole, _)| &whole[..blocks]);
    let mut sums = [[[0.0f32; LANES]; COLUMNS]; ROWS];
    for i in 0..blocks {
        for row in 0..ROWS {
            for column in 0..COLUMNS {
                let (a, b) = (&a_whole[row][i], &b_whole[column][i]);
                for lane in 0..LANES {
                    sums[row][column][lane] = F::fused(a[lane], b[lane], sums[row][column][lane]);
                }
            }
        }
    }
    let mut out = [[0.0; COLUMNS]; ROWS];
    for row in 0..ROWS {
        for column in 0..COLUMNS {
            let lanes = &mut sums[row][column];
            for (lane, (a, b)) in lanes.iter_mut().zip(a_parts[row].1.iter().zip(b_parts[column].1)) {
                *lane = F::fused(*a, *b, *lane);
            }
            out[row][column] = sum(lanes);
        }
    }
    out
}

/// The sum of all lanes, by halves.
#[inline(always)]
fn sum(lanes: &mut Lanes) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
        half /= 2;
    }
    lanes[0]
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::testing::Random;

    fn levels() -> impl Iterator<Item = Simd> {
        SimdLevel::ALL.into_iter().filter_map(Simd::new)
    }

    /// `C + factor · A · B` in f64.
    fn expected(
        c: &[f32],
        a: impl Fn(usize, usize) -> f32,
        b: impl Fn(usize, usize) -> f32,
        [n, k]: [usize; 2],
    ) -> Vec<f64> {
        let element = |i: usize| {
            (0..k)
                .map(|s| f64::from(a(i / n, s)) * f64::from(b(s, i % n)))
                .sum::<f64>()
        };
        c.iter()
            .enumerate()
            .map(|(i, c)| f64::from(*c) - 0.5 * element(i))
            .collect()
    }

    #[test]
    fn small_products_are_right_at_every_remainder_and_level() {
        for (m, n, k) in [
            (1, 1, 1),
            (6, 4, 16),
            (7, 5, 17),
            (13, 33, 31),
            (5, 70, 12),
            (3, 16, 9),
            (2, 7, 0),
        ] {
            let mut random = Random::new((m * n * k) as u64);
            let (c, a, b) = (random.normal(m * n), random.normal(m * k), random.normal(n * k));
            let check = |ours: Vec<f32>, expected: Vec<f64>| {
                let bound = (k + 2) as f64 * f64::from(f32::EPSILON) * 8.0;
                let close = ours
                    .iter()
                    .zip(&expected)
                    .all(|(a, b)| (f64::from(*a) - b).abs() <= bound);
                assert!(close, "{m}×{n}×{k}");
            };
            for simd in levels() {
                let mut own = c.clone();
                add_nt(simd, &mut own, n, &a, &b, k, -0.5);
                check(own, expected(&c, |i, s| a[i * k + s], |s, j| b[j * k + s], [n, k]));
                let mut own = c.clone();
                add_nn(simd, &mut own, n, &a, k, &b, -0.5);
                check(own, expected(&c, |i, s| a[i * k + s], |s, j| b[s * n + j], [n, k]));
                let mut own = c.clone();
                add_tn(simd, &mut own, n, &a, &b, -0.5);
                check(own, expected(&c, |i, s| a[s * m + i], |s, j| b[s * n + j], [n, k]));
            }
        }
    }

    #[test]
    fn a_row_has_the_same_bits_in_every_band() {
        let (n, k) = (9, 37);
        let mut random = Random::new(1);
        let (a, b) = (random.normal(13 * k), random.normal(n * k));
        for simd in levels() {
            let mut together = vec![0.0; 13 * n];
            add_nt(simd, &mut together, n, &a, &b, k, 1.0);
            for (row, together) in together.chunks(n).enumerate() {
                let mut alone = vec![0.0; n];
                add_nt(simd, &mut alone, n, &a[row * k..][..k], &b, k, 1.0);
                assert_eq!(alone, together);
            }
        }
    }
}
