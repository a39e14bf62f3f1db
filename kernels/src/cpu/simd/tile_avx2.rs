//! Tiles of 6 rows by 16 columns in 256-bit vectors.

#![cfg(target_arch = "x86_64")]
#![allow(unsafe_code)]

use std::arch::x86_64::{_mm256_broadcast_ss, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_setzero_ps, _mm256_storeu_ps};

use super::tile::{Job, LANES};

const ROWS: usize = 6;

/// f32 products.
///
/// # Safety
/// As [`Kernel`](super::tile::Kernel).
pub(super) unsafe fn single(job: &Job) {
    // SAFETY: the contract includes that the processor has AVX2 and FMA.
    unsafe { tiles(job) };
}

#[target_feature(enable = "avx2,fma")]
unsafe fn tiles(job: &Job) {
    for first in (0..job.rows).step_by(ROWS) {
        for group in (0..job.width).step_by(LANES) {
            // SAFETY: `first < rows` and `group + 16 ≤ width`.
            unsafe { tile(job, first, group) };
        }
    }
}

/// One tile. Rows beyond the last one repeat it, and are not written.
#[target_feature(enable = "avx2,fma")]
#[inline]
unsafe fn tile(job: &Job, first: usize, group: usize) {
    let mut sums = [[_mm256_setzero_ps(); 2]; ROWS];
    let rows = (job.rows - first).min(ROWS);
    // SAFETY: row indices are capped below `rows`, steps stay below `steps`, and `group + 16 ≤ width`; so all reads lie
    // inside left and panel by the contract.
    unsafe {
        let left: [*const f32; ROWS] =
            std::array::from_fn(|row| job.left.add((first + row.min(rows - 1)) * job.left_stride).cast());
        let mut panel = job.panel.cast::<f32>().add(group);
        for step in 0..job.steps {
            let columns = [_mm256_loadu_ps(panel), _mm256_loadu_ps(panel.add(8))];
            for row in 0..ROWS {
                let value = _mm256_broadcast_ss(&*left[row].add(step));
                sums[row][0] = _mm256_fmadd_ps(value, columns[0], sums[row][0]);
                sums[row][1] = _mm256_fmadd_ps(value, columns[1], sums[row][1]);
            }
            panel = panel.add(job.width);
        }
    }
    for (row, sums) in sums.iter().enumerate().take(rows) {
        let mut values = [0.0f32; LANES];
        // SAFETY: `values` holds both vectors; `first + row < rows` and columns stay below `columns`, inside out and start
        // by the contract.
        unsafe {
            _mm256_storeu_ps(values.as_mut_ptr(), sums[0]);
            _mm256_storeu_ps(values.as_mut_ptr().add(8), sums[1]);
            let row = first + row;
            for (column, sum) in (group..job.columns).zip(values) {
                let start = if job.start.is_null() {
                    0.0
                } else {
                    job.start.add(row * job.start_stride + column).read()
                };
                job.out.add(row * job.out_stride + column).write(start + sum);
            }
        }
    }
}
