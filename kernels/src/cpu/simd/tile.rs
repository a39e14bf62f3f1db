//! Rows of one matrix times a packed panel of another: the inner part of every product.
//!
//! ```text
//! out[r, c] = start[r, c] + Σ_k left[r, k] · panel[k, c]        up to PANEL columns at a time
//! ```
//!
//! The left matrix lies row by row. The panel lies step by step: for f32 a step is one `k` with its columns side by side; for
//! bf16 a step is two, `k` and `k + 1` of one column next to each other, as the dot-product instruction wants them. A panel's
//! columns are padded with zeros to a multiple of 16, an odd number of bf16 rows to an even one.
//!
//! Every element is summed over `k` in rising order by one accumulator, whatever the tile it falls in.

#![allow(unsafe_code)]

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use bytemuck::Pod;

use super::level::{Simd, SimdLevel};

/// Columns of a full panel.
pub(in crate::cpu) const PANEL: usize = 64;

/// Columns that one vector of the widest level holds; panels are padded to a multiple of it.
pub(super) const LANES: usize = 16;

/// Element types of products.
pub(in crate::cpu) trait Element: Pod + Send + Sync {
    /// How many `k` one step of a panel holds.
    const DEPTH: usize;

    /// The kernel of a level for this type.
    fn kernel(simd: Simd) -> Kernel;
}

impl Element for f32 {
    const DEPTH: usize = 1;

    fn kernel(simd: Simd) -> Kernel {
        match simd.level() {
            SimdLevel::Portable => super::tile_portable::single,
            #[cfg(target_arch = "x86_64")]
            SimdLevel::Avx2 => super::tile_avx2::single,
            #[cfg(target_arch = "x86_64")]
            SimdLevel::Avx512 | SimdLevel::Avx512Bf16 => super::tile_avx512::single,
            #[cfg(not(target_arch = "x86_64"))]
            _ => super::tile_portable::single,
        }
    }
}

/// bf16 bits.
impl Element for u16 {
    const DEPTH: usize = 2;

    fn kernel(simd: Simd) -> Kernel {
        match simd.level() {
            #[cfg(target_arch = "x86_64")]
            SimdLevel::Avx512Bf16 => super::tile_avx512::half,
            _ => super::tile_portable::half,
        }
    }
}

/// What a sum starts from.
#[derive(Clone, Copy)]
pub(in crate::cpu) enum Start<'a> {
    /// Zero.
    Zero,
    /// A value for each column.
    Columns(&'a [f32]),
    /// What the output holds.
    Output,
}

/// The left matrix: `rows` rows, `stride` elements apart.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct Left<'a, E> {
    /// Elements.
    pub(in crate::cpu) values: &'a [E],
    /// Distance of two rows.
    pub(in crate::cpu) stride: usize,
    /// Number of rows.
    pub(in crate::cpu) rows: usize,
}

/// A kernel's arguments. The caller vouches for the pointers (see [`Kernel`]).
pub(in crate::cpu) struct Job {
    /// First left element; rows are `left_stride` bytes apart.
    pub(super) left: *const u8,
    pub(super) left_stride: usize,
    pub(super) rows: usize,
    /// First panel element.
    pub(super) panel: *const u8,
    pub(super) steps: usize,
    /// Padded columns of the panel: a multiple of [`LANES`], at most [`PANEL`].
    pub(super) width: usize,
    /// Columns to write.
    pub(super) columns: usize,
    /// First output element; rows are `out_stride` elements apart.
    pub(super) out: *mut f32,
    pub(super) out_stride: usize,
    /// First starting value, or null for zero; rows are `start_stride` elements apart.
    pub(super) start: *const f32,
    pub(super) start_stride: usize,
}

/// Computes a [`Job`].
///
/// # Safety
/// The processor has the kernel's level. `left` can be read for `rows` rows of `steps` steps, `panel` for `steps · width`
/// step elements; `out` can be written, and `start` read unless null, for `rows` rows of `columns` elements; nothing else
/// accesses that part of `out` meanwhile.
pub(in crate::cpu) type Kernel = unsafe fn(&Job);

/// An output matrix cut into blocks for the tasks of a product: bands of rows by panels of columns. Each block is handed out
/// once, so that two tasks never hold the same place.
pub(in crate::cpu) struct Blocks<'a> {
    pointer: *mut f32,
    rows: usize,
    columns: usize,
    band: usize,
    taken: Vec<AtomicBool>,
    matrix: PhantomData<&'a mut [f32]>,
}

// SAFETY: the pointer is only used through `Block`s, which `take` hands out once each, and which do not overlap.
unsafe impl Send for Blocks<'_> {}
// SAFETY: as above.
unsafe impl Sync for Blocks<'_> {}

/// The right to write one block of an output.
pub(in crate::cpu) struct Block<'a> {
    pointer: *mut f32,
    stride: usize,
    /// Rows of the matrix.
    pub(in crate::cpu) rows: Range<usize>,
    /// Columns of the matrix.
    pub(in crate::cpu) columns: Range<usize>,
    matrix: PhantomData<&'a mut [f32]>,
}

impl<'a> Blocks<'a> {
    /// Cuts a row-major matrix into bands of `band` rows.
    pub(in crate::cpu) fn new(values: &'a mut [f32], columns: usize, band: usize) -> Self {
        let rows = values.len() / columns.max(1);
        let count = rows.div_ceil(band) * columns.div_ceil(PANEL);
        let taken = std::iter::repeat_with(AtomicBool::default).take(count).collect();
        Self {
            pointer: values.as_mut_ptr(),
            rows,
            columns,
            band,
            taken,
            matrix: PhantomData,
        }
    }

    /// Number of blocks.
    pub(in crate::cpu) fn len(&self) -> usize {
        self.taken.len()
    }

    /// A block, which must not have been taken before.
    pub(in crate::cpu) fn take(&self, index: usize) -> Block<'_> {
        assert!(
            !self.taken[index].swap(true, Ordering::Relaxed),
            "block {index} is taken"
        );
        let panels = self.columns.div_ceil(PANEL);
        let (row, column) = (index / panels * self.band, index % panels * PANEL);
        Block {
            // SAFETY: the block's first element lies inside the matrix, since row and column do.
            pointer: unsafe { self.pointer.add(row * self.columns + column) },
            stride: self.columns,
            rows: row..self.rows.min(row + self.band),
            columns: column..self.columns.min(column + PANEL),
            matrix: PhantomData,
        }
    }
}

impl Block<'_> {
    /// `block = start + left · panel`.
    pub(in crate::cpu) fn multiply<E: Element>(
        &mut self,
        simd: Simd,
        left: Left<'_, E>,
        panel: &[E],
        steps: usize,
        start: Start<'_>,
    ) {
        assert_eq!(left.rows, self.rows.len());
        // SAFETY: the block is inside its matrix, which `Blocks` borrows mutably, and `take` gave it to nobody else.
        unsafe {
            run(
                simd,
                left,
                panel,
                steps,
                self.columns.len(),
                self.pointer,
                self.stride,
                start,
            )
        };
    }
}

/// `out[rows of left, columns] = start + left · panel`; `out` has rows of `out_stride` elements.
#[allow(clippy::too_many_arguments)]
pub(in crate::cpu) fn multiply<E: Element>(
    simd: Simd,
    left: Left<'_, E>,
    panel: &[E],
    steps: usize,
    columns: usize,
    out: &mut [f32],
    out_stride: usize,
    start: Start<'_>,
) {
    assert!(left.rows == 0 || out.len() >= (left.rows - 1) * out_stride + columns);
    assert!(columns <= out_stride);
    // SAFETY: `out` is borrowed mutably and, as just asserted, holds every row's columns.
    unsafe { run(simd, left, panel, steps, columns, out.as_mut_ptr(), out_stride, start) };
}

/// Checks the inputs and runs the level's kernel.
///
/// # Safety
/// `out` can be written for every row of `left`, `columns` elements each, and nothing else accesses them meanwhile.
#[allow(clippy::too_many_arguments)]
unsafe fn run<E: Element>(
    simd: Simd,
    left: Left<'_, E>,
    panel: &[E],
    steps: usize,
    columns: usize,
    out: *mut f32,
    out_stride: usize,
    start: Start<'_>,
) {
    if left.rows == 0 || columns == 0 {
        return;
    }
    let width = columns.next_multiple_of(LANES);
    let depth = steps * E::DEPTH;
    assert!(columns <= PANEL && depth <= left.stride);
    assert!(left.values.len() >= (left.rows - 1) * left.stride + depth);
    assert!(panel.len() >= depth * width);
    let (start, start_stride) = match start {
        Start::Zero => (std::ptr::null(), 0),
        Start::Columns(values) => {
            assert!(values.len() >= columns);
            (values.as_ptr(), 0)
        }
        Start::Output => (out.cast_const(), out_stride),
    };
    let job = Job {
        left: left.values.as_ptr().cast(),
        left_stride: left.stride * size_of::<E>(),
        rows: left.rows,
        panel: panel.as_ptr().cast(),
        steps,
        width,
        columns,
        out,
        out_stride,
        start,
        start_stride,
    };
    // SAFETY: the assertions above bound every read; the caller vouches for `out`; the kernel is one of a level that the
    // `Simd` proves to exist.
    unsafe { E::kernel(simd)(&job) };
}
