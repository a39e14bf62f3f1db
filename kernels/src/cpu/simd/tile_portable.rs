//! Tiles in plain Rust.

#![allow(unsafe_code)]

use super::math::widen;
use super::tile::{Job, LANES};

/// f32 products.
///
/// # Safety
/// As [`Kernel`](super::tile::Kernel).
pub(super) unsafe fn single(job: &Job) {
    for row in 0..job.rows {
        for group in (0..job.width).step_by(LANES) {
            let mut sums = [0.0f32; LANES];
            for step in 0..job.steps {
                // SAFETY: `step < steps`, and `group + 16 ≤ width`: inside left and panel by the contract.
                let (left, columns) = unsafe {
                    let left = job.left.add(row * job.left_stride).cast::<f32>().add(step);
                    let columns = job
                        .panel
                        .cast::<[f32; LANES]>()
                        .byte_add((step * job.width + group) * 4);
                    (left.read(), columns.read_unaligned())
                };
                for (sum, column) in sums.iter_mut().zip(columns) {
                    *sum += left * column;
                }
            }
            // SAFETY: the same contract, handed on.
            unsafe { store(job, row, group, &sums) };
        }
    }
}

/// bf16 products, widened.
///
/// # Safety
/// As [`Kernel`](super::tile::Kernel).
pub(super) unsafe fn half(job: &Job) {
    for row in 0..job.rows {
        for group in (0..job.width).step_by(LANES) {
            let mut sums = [0.0f32; LANES];
            for step in 0..job.steps {
                // SAFETY: `step < steps`, and `group + 16 ≤ width`: inside left and panel by the contract.
                let (left, columns) = unsafe {
                    let left = job.left.add(row * job.left_stride).cast::<[u16; 2]>().add(step);
                    let columns = job
                        .panel
                        .cast::<[[u16; 2]; LANES]>()
                        .byte_add((step * job.width + group) * 4);
                    (left.read_unaligned(), columns.read_unaligned())
                };
                for (sum, pair) in sums.iter_mut().zip(columns) {
                    *sum += widen(left[0]) * widen(pair[0]) + widen(left[1]) * widen(pair[1]);
                }
            }
            // SAFETY: the same contract, handed on.
            unsafe { store(job, row, group, &sums) };
        }
    }
}

/// Adds the starting values and writes the columns that are wanted.
///
/// # Safety
/// As [`Kernel`](super::tile::Kernel); `row < rows` and `group < width`.
unsafe fn store(job: &Job, row: usize, group: usize, sums: &[f32; LANES]) {
    for (column, sum) in (group..job.columns).zip(sums) {
        // SAFETY: `row < rows` and `column < columns`: inside out and start by the contract.
        unsafe {
            let start = if job.start.is_null() {
                0.0
            } else {
                job.start.add(row * job.start_stride + column).read()
            };
            job.out.add(row * job.out_stride + column).write(start + sum);
        }
    }
}
