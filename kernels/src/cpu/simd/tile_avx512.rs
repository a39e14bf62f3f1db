//! Tiles in 512-bit vectors: up to 6 rows by 64 columns for f32, the same for bf16 pairs.

#![cfg(target_arch = "x86_64")]
#![allow(unsafe_code)]

use std::arch::x86_64::{
    __m512, __m512bh, __m512i, __mmask16, _mm512_add_ps, _mm512_dpbf16_ps, _mm512_fmadd_ps, _mm512_loadu_ps,
    _mm512_loadu_si512, _mm512_mask_storeu_ps, _mm512_maskz_loadu_ps, _mm512_set1_epi32, _mm512_set1_ps,
    _mm512_setzero_ps,
};

use super::tile::{Job, LANES};

/// f32 products.
///
/// # Safety
/// As [`Kernel`](super::tile::Kernel).
pub(super) unsafe fn single(job: &Job) {
    // SAFETY: the contract, handed on. Twenty-four accumulators leave room for the panel's vectors.
    unsafe {
        match job.width / LANES {
            1 => tiles_single::<12, 1>(job),
            2 => tiles_single::<8, 2>(job),
            3 => tiles_single::<8, 3>(job),
            _ => tiles_single::<6, 4>(job),
        }
    }
}

/// bf16 products.
///
/// # Safety
/// As [`Kernel`](super::tile::Kernel).
pub(super) unsafe fn half(job: &Job) {
    // SAFETY: the contract, handed on.
    unsafe {
        match job.width / LANES {
            1 => tiles_half::<12, 1>(job),
            2 => tiles_half::<8, 2>(job),
            3 => tiles_half::<8, 3>(job),
            _ => tiles_half::<6, 4>(job),
        }
    }
}

#[target_feature(enable = "avx512f")]
unsafe fn tiles_single<const ROWS: usize, const VECTORS: usize>(job: &Job) {
    for first in (0..job.rows).step_by(ROWS) {
        let mut sums = [[_mm512_setzero_ps(); VECTORS]; ROWS];
        // SAFETY: rows are capped below `rows`, steps stay below `steps`, and `VECTORS · 16 = width`; so all reads lie inside
        // left and panel by the contract.
        unsafe {
            let left: [*const f32; ROWS] = rows(job, first);
            let mut panel = job.panel.cast::<f32>();
            for step in 0..job.steps {
                let columns: [__m512; VECTORS] = std::array::from_fn(|i| _mm512_loadu_ps(panel.add(i * LANES)));
                for row in 0..ROWS {
                    let value = _mm512_set1_ps(left[row].add(step).read());
                    for i in 0..VECTORS {
                        sums[row][i] = _mm512_fmadd_ps(value, columns[i], sums[row][i]);
                    }
                }
                panel = panel.add(VECTORS * LANES);
            }
            store(job, first, &sums);
        }
    }
}

#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn tiles_half<const ROWS: usize, const VECTORS: usize>(job: &Job) {
    for first in (0..job.rows).step_by(ROWS) {
        let mut sums = [[_mm512_setzero_ps(); VECTORS]; ROWS];
        // SAFETY: as in `tiles_single`; a step is a pair of bf16, four bytes, in both operands.
        unsafe {
            let left: [*const i32; ROWS] = rows(job, first);
            let mut panel = job.panel.cast::<i32>();
            for step in 0..job.steps {
                let columns: [__m512bh; VECTORS] = std::array::from_fn(|i| {
                    std::mem::transmute::<__m512i, __m512bh>(_mm512_loadu_si512(panel.add(i * LANES).cast()))
                });
                for row in 0..ROWS {
                    let pair = _mm512_set1_epi32(left[row].add(step).read_unaligned());
                    for i in 0..VECTORS {
                        sums[row][i] =
                            _mm512_dpbf16_ps(sums[row][i], std::mem::transmute::<__m512i, __m512bh>(pair), columns[i]);
                    }
                }
                panel = panel.add(VECTORS * LANES);
            }
            store(job, first, &sums);
        }
    }
}

/// Pointers to a tile's rows. Rows beyond the last one repeat it, and are not written.
///
/// # Safety
/// `first < job.rows`.
#[inline(always)]
unsafe fn rows<E, const ROWS: usize>(job: &Job, first: usize) -> [*const E; ROWS] {
    // SAFETY: the row index is capped below `rows`.
    std::array::from_fn(|row| unsafe { job.left.add((first + row).min(job.rows - 1) * job.left_stride).cast() })
}

/// Adds the starting values and writes the rows and columns that are wanted.
///
/// # Safety
/// As [`Kernel`](super::tile::Kernel).
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn store<const ROWS: usize, const VECTORS: usize>(job: &Job, first: usize, sums: &[[__m512; VECTORS]; ROWS]) {
    for (row, sums) in sums.iter().enumerate().take(job.rows - first) {
        let row = first + row;
        for (i, sum) in sums.iter().enumerate() {
            let column = i * LANES;
            let count = job.columns.saturating_sub(column).min(LANES);
            let mask = ((1u32 << count) - 1) as __mmask16;
            // SAFETY: `row < rows`, and the mask keeps columns below `columns`: inside out and start by the contract.
            unsafe {
                let start = if job.start.is_null() {
                    _mm512_setzero_ps()
                } else {
                    _mm512_maskz_loadu_ps(mask, job.start.add(row * job.start_stride + column))
                };
                let out = job.out.add(row * job.out_stride + column);
                _mm512_mask_storeu_ps(out, mask, _mm512_add_ps(start, *sum));
            }
        }
    }
}
