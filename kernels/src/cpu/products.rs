//! Matrix products: cutting them into panels and tasks.
//!
//! A task owns a block of the output: some rows, and the columns of one panel. It packs a part of the right matrix at a time
//! into the panel, decoding it on the way, and multiplies its rows by it. So a frozen weight is widened, decoded or
//! transposed a few kilobytes at a time and never as a whole.
//!
//! The depth is cut at multiples of [`DEPTH_BLOCK`], a constant; how rows and panels are shared out among threads does not
//! enter any sum.

use std::ops::Range;

use super::Cpu;
use super::matrix::{Factor, Matrix};
use super::scratch::{Scratch, with_local};
use super::simd::{self, Block, Blocks, Left, PANEL, Start};
use crate::error::Result;

/// Elements of depth packed at once.
const DEPTH_BLOCK: usize = 512;

/// Rows a task should have at least, so that packing is paid for.
const TASK_ROWS: usize = 96;

/// What the rows of a right matrix are.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum RowsAre {
    /// Columns of the output: the product is `left · matrixᵀ`.
    Columns,
    /// Steps of the sum: the product is `left · matrix`.
    Depth,
}

/// One summand of a product.
pub(super) struct Term<'a, E> {
    pub(super) left: Left<'a, E>,
    pub(super) right: &'a Matrix<'a>,
    pub(super) rows_are: RowsAre,
}

impl<E> Term<'_, E> {
    fn depth(&self) -> usize {
        match self.rows_are {
            RowsAre::Columns => self.right.columns,
            RowsAre::Depth => self.right.rows,
        }
    }
}

/// A left matrix in the element type of a product: borrowed where it lies so already.
pub(super) enum LeftMatrix<'a, E> {
    Borrowed(Left<'a, E>),
    Own {
        values: Scratch<E>,
        stride: usize,
        rows: usize,
    },
}

impl<E: Factor> LeftMatrix<'_, E> {
    pub(super) fn view(&self) -> Left<'_, E> {
        match self {
            Self::Borrowed(left) => *left,
            Self::Own { values, stride, rows } => Left {
                values: values.values(),
                stride: *stride,
                rows: *rows,
            },
        }
    }
}

impl Cpu {
    /// Brings a row-major f32 matrix into a product's element type.
    pub(super) fn left<'a, E: Factor>(
        &self,
        values: &'a [f32],
        [rows, columns]: [usize; 2],
        rounded: bool,
    ) -> Result<LeftMatrix<'a, E>> {
        if !rounded
            && E::DEPTH == 1
            && let Ok(elements) = bytemuck::try_cast_slice(values)
        {
            return Ok(LeftMatrix::Borrowed(Left {
                values: elements,
                stride: columns,
                rows,
            }));
        }
        self.scaled_left(values, [rows, columns], 1.0, rounded)
    }

    /// As [`Cpu::left`], each value times `factor`.
    pub(super) fn scaled_left<'a, E: Factor>(
        &self,
        values: &[f32],
        [rows, columns]: [usize; 2],
        factor: f32,
        rounded: bool,
    ) -> Result<LeftMatrix<'a, E>> {
        let simd = self.inner.simd;
        let stride = columns.next_multiple_of(E::DEPTH);
        let mut own = self.scratch::<E>(rows * stride)?;
        self.for_rows(own.values_mut(), stride.max(1), |first, own| {
            for (row, own) in own.chunks_exact_mut(stride).enumerate() {
                let (filled, padding) = own.split_at_mut(columns);
                E::fill(
                    simd,
                    &values[(first + row) * columns..][..columns],
                    factor,
                    rounded,
                    filled,
                );
                padding.fill(E::zeroed());
            }
        });
        Ok(LeftMatrix::Own {
            values: own,
            stride,
            rows,
        })
    }

    /// `out = start + Σ terms`; `out` has `columns` columns and as many rows as every term's left matrix.
    pub(super) fn product<E: Factor>(&self, terms: &[Term<'_, E>], out: &mut [f32], columns: usize, start: Start<'_>) {
        let rows = out.len() / columns.max(1);
        if out.is_empty() {
            return;
        }
        assert!(
            terms.iter().all(|term| term.left.rows == rows),
            "every term has the output's rows"
        );
        let panels = columns.div_ceil(PANEL);
        let wanted = (4 * self.threads()).div_ceil(panels);
        let band = rows.div_ceil(wanted).max(TASK_ROWS).min(rows);
        let blocks = Blocks::new(out, columns, band);
        self.for_each(blocks.len(), |index| {
            self.block_of_product(terms, blocks.take(index), start)
        });
    }

    /// As [`Cpu::product`] on this thread alone: for products inside a task.
    pub(super) fn product_here<E: Factor>(
        &self,
        terms: &[Term<'_, E>],
        out: &mut [f32],
        columns: usize,
        start: Start<'_>,
    ) {
        if out.is_empty() {
            return;
        }
        let rows = out.len() / columns;
        let blocks = Blocks::new(out, columns, rows);
        for index in 0..blocks.len() {
            self.block_of_product(terms, blocks.take(index), start);
        }
    }

    /// One task of [`Cpu::product`].
    fn block_of_product<E: Factor>(&self, terms: &[Term<'_, E>], mut block: Block<'_>, start: Start<'_>) {
        let simd = self.inner.simd;
        let mut start = match start {
            Start::Columns(values) => Start::Columns(&values[block.columns.clone()]),
            other => other,
        };
        with_local::<E, _>(DEPTH_BLOCK * PANEL, |panel| {
            for term in terms {
                let depth = term.depth();
                // Without depth one empty step remains: it writes the start.
                for first in (0..depth.max(1)).step_by(DEPTH_BLOCK) {
                    let range = first..depth.min(first + DEPTH_BLOCK);
                    let steps = range.len().div_ceil(E::DEPTH);
                    self.pack(term.right, term.rows_are, range, block.columns.clone(), panel);
                    let Left { values, stride, .. } = term.left;
                    let values = values.get(block.rows.start * stride + first..).unwrap_or_default();
                    let left = Left {
                        values,
                        stride,
                        rows: block.rows.len(),
                    };
                    block.multiply(simd, left, panel, steps, start);
                    start = Start::Output;
                }
            }
        });
    }

    /// Packs a part of a matrix into a panel.
    pub(super) fn pack<E: Factor>(
        &self,
        matrix: &Matrix<'_>,
        rows_are: RowsAre,
        depth: Range<usize>,
        columns: Range<usize>,
        panel: &mut [E],
    ) {
        match rows_are {
            RowsAre::Columns => self.pack_columns(matrix, depth, columns, panel),
            RowsAre::Depth => self.pack_steps(matrix, depth, columns, panel),
        }
    }

    /// Matrix rows become columns of the panel.
    fn pack_columns<E: Factor>(
        &self,
        matrix: &Matrix<'_>,
        depth: Range<usize>,
        columns: Range<usize>,
        panel: &mut [E],
    ) {
        const GROUP: usize = 16;
        let simd = self.inner.simd;
        let width = columns.len().next_multiple_of(GROUP);
        let steps = depth.len().div_ceil(E::DEPTH);
        let padded = steps * E::DEPTH;
        with_local::<E, _>(GROUP * padded, |strip| {
            for at in (0..width).step_by(GROUP) {
                let rows = columns.start + at..columns.end.min(columns.start + at + GROUP);
                let whole = padded == depth.len();
                let borrowed = |row| {
                    if whole {
                        matrix.borrow::<E>(row, depth.clone())
                    } else {
                        None
                    }
                };
                if borrowed(rows.start).is_none() {
                    for (row, strip) in rows.clone().zip(strip.chunks_exact_mut(padded.max(1))) {
                        strip[depth.len()..].fill(E::zeroed());
                        matrix.read(simd, row, depth.clone(), &mut strip[..depth.len()]);
                    }
                }
                let mut sources: [&[E]; GROUP] = [&[]; GROUP];
                for (i, row) in rows.clone().enumerate() {
                    sources[i] = borrowed(row).unwrap_or(&strip[i * padded..][..padded]);
                }
                simd::transpose_rows(simd, &sources[..rows.len()], steps, panel, width, at);
            }
        });
    }

    /// Matrix rows become steps of the panel.
    fn pack_steps<E: Factor>(&self, matrix: &Matrix<'_>, depth: Range<usize>, columns: Range<usize>, panel: &mut [E]) {
        const GROUP: usize = 16;
        let simd = self.inner.simd;
        let width = columns.len().next_multiple_of(GROUP);
        let count = columns.len();
        let pairs = depth.len() / 2;
        let mut done = 0;
        if E::DEPTH == 2 && count == PANEL {
            let whole = &mut panel[..pairs * 2 * PANEL];
            if matrix.read_pairs(simd, depth.start, columns.start, whole) {
                done = pairs;
            }
        }
        let mut strips = [[E::zeroed(); PANEL]; 2];
        let steps = panel.chunks_exact_mut(E::DEPTH * width);
        for (row, step) in depth.clone().step_by(E::DEPTH).zip(steps).skip(done) {
            if E::DEPTH == 1 {
                matrix.read(simd, row, columns.clone(), &mut step[..count]);
                step[count..].fill(E::zeroed());
                continue;
            }
            let [first, second] = &mut strips;
            let first = matrix.borrow_or_read(simd, row, columns.clone(), &mut first[..count]);
            let second = if row + 1 < depth.end {
                matrix.borrow_or_read(simd, row + 1, columns.clone(), &mut second[..count])
            } else {
                second[..count].fill(E::zeroed());
                &second[..count]
            };
            simd::interleave_pair(simd, first, second, step);
        }
    }
}

/// The transpose of a `[rows, columns]` matrix.
pub(super) fn transposed(values: &[f32], columns: usize, out: &mut [f32]) {
    let rows = values.len() / columns.max(1);
    for (row, values) in values.chunks_exact(columns.max(1)).enumerate() {
        for (column, value) in values.iter().enumerate() {
            out[column * rows + row] = *value;
        }
    }
}
