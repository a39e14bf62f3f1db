//! Rows of one head, as left matrices and as panels.

use std::ops::Range;

use super::super::matrix::Factor;
use super::super::simd::{self, Left, PANEL, Simd, Start, multiply};
use super::BLOCK;

/// One head's rows of a document: `count` rows of `dim` elements, padded with zeros to `stride`.
#[derive(Clone, Copy)]
pub(super) struct HeadRows<'a, E> {
    values: &'a [E],
    pub(super) count: usize,
    dim: usize,
    stride: usize,
}

/// Where a head's rows lie in a `[T, heads, dim]` tensor.
#[derive(Clone)]
pub(super) struct HeadPlace {
    pub(super) tokens: Range<usize>,
    pub(super) heads: usize,
    pub(super) head: usize,
    pub(super) dim: usize,
}

impl HeadPlace {
    /// Elements of row `t` of the tensor.
    pub(super) fn row(&self, t: usize) -> Range<usize> {
        let start = (t * self.heads + self.head) * self.dim;
        start..start + self.dim
    }
}

/// Elements a head's rows take when padded.
pub(super) fn padded_elements<E: Factor>(count: usize, dim: usize) -> usize {
    count * dim.next_multiple_of(E::DEPTH)
}

impl<'a, E: Factor> HeadRows<'a, E> {
    /// Gathers and converts a head's rows into `buffer`.
    pub(super) fn gather(simd: Simd, values: &[f32], place: &HeadPlace, rounded: bool, buffer: &'a mut [E]) -> Self {
        let stride = place.dim.next_multiple_of(E::DEPTH);
        for (t, row) in place.tokens.clone().zip(buffer.chunks_exact_mut(stride)) {
            let (filled, padding) = row.split_at_mut(place.dim);
            E::fill(simd, &values[place.row(t)], 1.0, rounded, filled);
            padding.fill(E::zeroed());
        }
        Self {
            values: buffer,
            count: place.tokens.len(),
            dim: place.dim,
            stride,
        }
    }

    /// Rows of block `index`.
    pub(super) fn block(&self, index: usize) -> Range<usize> {
        index * BLOCK..self.count.min((index + 1) * BLOCK)
    }

    /// Number of blocks.
    pub(super) fn blocks(&self) -> usize {
        self.count.div_ceil(BLOCK)
    }

    /// Steps of a sum over `dim`.
    pub(super) fn steps(&self) -> usize {
        self.stride / E::DEPTH
    }

    /// A block as a left matrix.
    pub(super) fn left(&self, index: usize) -> Left<'a, E> {
        let rows = self.block(index);
        Left {
            values: &self.values[rows.start * self.stride..],
            stride: self.stride,
            rows: rows.len(),
        }
    }

    /// Packs every block so that its rows are the columns of a panel: for products summed over `dim`.
    pub(super) fn pack_columns_into<'p>(&self, simd: Simd, panels: &'p mut [E]) -> Panels<'p, E> {
        const GROUP: usize = 16;
        let size = BLOCK * self.stride;
        for (index, panel) in panels.chunks_exact_mut(size).enumerate().take(self.blocks()) {
            let rows = self.block(index);
            let width = rows.len().next_multiple_of(GROUP);
            for at in (0..width).step_by(GROUP) {
                let group = rows.start + at..rows.end.min(rows.start + at + GROUP);
                let mut sources: [&[E]; GROUP] = [&[]; GROUP];
                for (source, row) in sources.iter_mut().zip(group.clone()) {
                    *source = &self.values[row * self.stride..][..self.stride];
                }
                simd::transpose_rows(simd, &sources[..group.len()], self.steps(), panel, width, at);
            }
        }
        Panels { values: panels, size }
    }

    /// Packs every block so that its rows are the steps of panels: for products summed over rows. A block has a panel for
    /// every [`PANEL`] elements of `dim`.
    pub(super) fn pack_steps_into<'p>(&self, simd: Simd, panels: &'p mut [E]) -> Panels<'p, E> {
        let size = BLOCK * self.dim.next_multiple_of(16);
        let mut strip = [E::zeroed(); 2 * PANEL];
        for (index, panel) in panels.chunks_exact_mut(size).enumerate().take(self.blocks()) {
            let rows = self.block(index);
            for (part, panel) in parts(self.dim).zip(panel.chunks_mut(BLOCK * PANEL)) {
                let width = part.len().next_multiple_of(16);
                let strip = &mut strip[..E::DEPTH * width];
                for (row, step) in rows.clone().step_by(E::DEPTH).zip(panel.chunks_exact_mut(strip.len())) {
                    for (i, strip) in strip.chunks_exact_mut(width).enumerate() {
                        strip.fill(E::zeroed());
                        if row + i < rows.end {
                            let source = &self.values[(row + i) * self.stride..];
                            strip[..part.len()].copy_from_slice(&source[part.clone()]);
                        }
                    }
                    simd::interleave_rows(simd, strip, width, step);
                }
            }
        }
        Panels { values: panels, size }
    }
}

/// Parts of `dim` that fit a panel.
fn parts(dim: usize) -> impl Iterator<Item = Range<usize>> {
    (0..dim).step_by(PANEL).map(move |start| start..dim.min(start + PANEL))
}

/// A head's packed blocks.
#[derive(Clone, Copy)]
pub(super) struct Panels<'a, E> {
    values: &'a [E],
    size: usize,
}

/// Elements of the panels of `count` rows packed as columns.
pub(super) fn column_elements<E: Factor>(count: usize, dim: usize) -> usize {
    count.div_ceil(BLOCK) * BLOCK * dim.next_multiple_of(E::DEPTH)
}

/// Elements of the panels of `count` rows packed as steps.
pub(super) fn step_elements(count: usize, dim: usize) -> usize {
    count.div_ceil(BLOCK) * BLOCK * dim.next_multiple_of(16)
}

impl<'a, E: Factor> Panels<'a, E> {
    /// The panel, or the panels side by side, of one block.
    pub(super) fn block(&self, index: usize) -> &'a [E] {
        &self.values[index * self.size..][..self.size]
    }
}

/// `out (+)= left · block` for a block packed as steps, over its first `depth` rows.
pub(super) fn multiply_steps<E: Factor>(
    simd: Simd,
    left: Left<'_, E>,
    block: &[E],
    depth: usize,
    dim: usize,
    out: &mut [f32],
    start: Start<'_>,
) {
    for (part, panel) in parts(dim).zip(block.chunks(BLOCK * PANEL)) {
        multiply(
            simd,
            left,
            panel,
            depth.div_ceil(E::DEPTH),
            part.len(),
            &mut out[part.start..],
            dim,
            start,
        );
    }
}
