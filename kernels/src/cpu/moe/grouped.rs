//! Linear layers over grouped rows: each expert's matrix is decoded a few of its rows at a time, right where they are used,
//! so it passes through memory once, in its encoding, for all the tokens of the expert.

use std::ops::Range;

use super::super::Cpu;
use super::super::matrix::Matrix;
use super::super::scratch::with_local;
use super::super::simd::small::{add_nn, add_nn_window, add_nt, add_tn};
use super::super::simd::{Simd, rows as simd_rows};
use super::super::split::take;
use super::super::view::{floats, floats_mut};
use super::matrix::of_expert;
use super::routing::Groups;
use crate::contract::{self, GroupedSizes};
use crate::error::Result;
use crate::ops::{GroupedLinearBackward, GroupedLinearForward, GroupedLoraBackward, Precision, RowOrder, Write};
use crate::stack::WeightStack;

/// Rows of an expert that one task takes. A popular expert is worth several tasks; its matrix is then decoded once for each,
/// which 64 rows of work pay for.
const TASK_ROWS: usize = 64;

/// Elements of a decoded tile: 32 KiB, which stay in the first-level cache next to the rows they meet.
const TILE_ELEMENTS: usize = 8 * 1024;

/// Matrix rows that a tile of the backward product has at least: as many as it takes at a time.
const TILE_ROWS: usize = 8;

/// An activation whose rows are found through the routing.
struct Operand<'a> {
    values: &'a [f32],
    order: RowOrder,
    width: usize,
    rounded: bool,
    simd: Simd,
}

impl Operand<'_> {
    /// The rows that `rows` read, as they enter a product.
    fn gather(&self, groups: &Groups<'_>, rows: Range<usize>, out: &mut [f32]) {
        for (row, out) in rows.zip(out.chunks_exact_mut(self.width.max(1))) {
            let source = &self.values[groups.source(row, self.order) * self.width..][..self.width];
            if self.rounded {
                simd_rows::round(self.simd, source, 1.0, out);
            } else {
                out.copy_from_slice(source);
            }
        }
    }

    /// Gives `work` the gathered rows.
    fn with_rows(&self, groups: &Groups<'_>, rows: Range<usize>, work: impl FnOnce(&[f32])) {
        with_local(rows.len() * self.width, |gathered| {
            self.gather(groups, rows, gathered);
            work(gathered);
        });
    }
}

/// Values as they enter a product.
fn rounded(simd: Simd, values: &[f32], rounded: bool) -> Vec<f32> {
    let mut out = values.to_vec();
    if rounded {
        simd_rows::round(simd, values, 1.0, &mut out);
    }
    out
}

/// Some rows of one expert and their places in two outputs.
struct Part<'a> {
    expert: usize,
    rows: Range<usize>,
    first: &'a mut [f32],
    second: &'a mut [f32],
}

/// Cuts two outputs, with rows of `widths` elements, into the parts of all experts that have rows.
fn parts<'a>(
    groups: &Groups<'_>,
    (mut first, mut second): (&'a mut [f32], &'a mut [f32]),
    widths: (usize, usize),
) -> Vec<Part<'a>> {
    let mut parts = Vec::new();
    for (expert, rows) in groups.experts().enumerate() {
        for start in rows.clone().step_by(TASK_ROWS) {
            let rows = start..(start + TASK_ROWS).min(rows.end);
            parts.push(Part {
                expert,
                first: take(&mut first, rows.len() * widths.0),
                second: take(&mut second, rows.len() * widths.1),
                rows,
            });
        }
    }
    parts
}

/// `y += x · Wᵀ`, the matrix decoded a few whole rows at a time.
fn add_forward(simd: Simd, y: &mut [f32], x: &[f32], matrix: &Matrix<'_>) {
    let Matrix { rows, columns, .. } = *matrix;
    if rows * columns == 0 {
        return;
    }
    let tile_rows = (TILE_ELEMENTS / columns).next_multiple_of(4).min(rows);
    with_local::<f32, _>(tile_rows * columns, |tile| {
        for first in (0..rows).step_by(tile_rows) {
            let count = tile_rows.min(rows - first);
            for (row, tile) in tile.chunks_exact_mut(columns).take(count).enumerate() {
                matrix.read(simd, first + row, 0..columns, tile);
            }
            add_nt(simd, &mut y[first..], rows, x, &tile[..count * columns], columns, 1.0);
        }
    });
}

/// `dx += dy · W`, the matrix decoded in tiles of some rows by some columns.
fn add_backward(simd: Simd, dx: &mut [f32], dy: &[f32], matrix: &Matrix<'_>) {
    let Matrix { rows, columns, .. } = *matrix;
    if rows * columns == 0 {
        return;
    }
    let tile_columns = (TILE_ELEMENTS / TILE_ROWS).min(columns);
    let tile_rows = (TILE_ELEMENTS / tile_columns).min(rows);
    with_local::<f32, _>(tile_rows * tile_columns, |tile| {
        for first in (0..rows).step_by(tile_rows) {
            let count = tile_rows.min(rows - first);
            for column in (0..columns).step_by(tile_columns) {
                let width = tile_columns.min(columns - column);
                for (row, tile) in tile.chunks_exact_mut(width).take(count).enumerate() {
                    matrix.read(simd, first + row, column..column + width, tile);
                }
                let tile = &tile[..count * width];
                add_nn_window(simd, &mut dx[column..], (columns, width), &dy[first..], rows, tile, 1.0);
            }
        }
    });
}

pub(super) fn forward(cpu: &Cpu, call: GroupedLinearForward<'_, Cpu>) -> Result<()> {
    const OP: &str = "grouped_linear_forward";
    let GroupedSizes {
        routing,
        inputs,
        outputs,
        rank,
    } = contract::grouped_linear_forward(&call)?;
    let groups = Groups::new(OP, call.routing, routing)?;
    let (simd, bf16) = (cpu.inner.simd, call.precision == Precision::Bf16);
    let x = Operand {
        values: floats(OP, "x", call.x)?,
        order: call.x_order,
        width: inputs,
        rounded: bf16,
        simd,
    };
    let matrices = matrices(cpu, call.weight, &groups, bf16)?;
    let y = floats_mut(OP, "y", call.y)?;
    let (adapters, hidden) = match call.lora {
        Some(lora) => {
            let (a, b) = (floats(OP, "lora.a", lora.a)?, floats(OP, "lora.b", lora.b)?);
            (Some((a, b, lora.scale)), floats_mut(OP, "lora.hidden", lora.hidden)?)
        }
        None => (None, &mut [][..]),
    };
    cpu.for_parts(parts(&groups, (y, hidden), (outputs, rank)), |part| {
        let Part {
            expert,
            rows,
            first: y,
            second: hidden,
        } = part;
        y.fill(0.0);
        x.with_rows(&groups, rows, |x| {
            if let Some(matrix) = &matrices[expert] {
                add_forward(simd, y, x, matrix);
            }
            let Some((a, b, scale)) = adapters else {
                return;
            };
            let a = rounded(simd, &a[expert * rank * inputs..][..rank * inputs], bf16);
            let b = rounded(simd, &b[expert * outputs * rank..][..outputs * rank], bf16);
            hidden.fill(0.0);
            add_nt(simd, hidden, rank, x, &a, inputs, 1.0);
            let mut scaled = hidden.to_vec();
            simd_rows::scale(simd, &mut scaled, scale);
            add_nt(simd, y, outputs, &rounded(simd, &scaled, bf16), &b, rank, 1.0);
        });
    });
    Ok(())
}

pub(super) fn backward(cpu: &Cpu, call: GroupedLinearBackward<'_, Cpu>) -> Result<()> {
    const OP: &str = "grouped_linear_backward";
    let sizes = contract::grouped_linear_backward(&call)?;
    let (inputs, outputs, rank) = (sizes.inputs, sizes.outputs, sizes.rank);
    let groups = Groups::new(OP, call.routing, sizes.routing)?;
    let (simd, bf16) = (cpu.inner.simd, call.precision == Precision::Bf16);
    let dy = Operand {
        values: floats(OP, "dy", call.dy)?,
        order: call.dy_order,
        width: outputs,
        rounded: bf16,
        simd,
    };
    // v = s · dy · B, which both the adapters' gradients and dx need.
    let mut v = cpu.scratch::<f32>(sizes.routing.slots() * rank)?;
    let mut a = None;
    if let Some(lora) = call.lora {
        let b = floats(OP, "lora.b", lora.b)?;
        cpu.for_parts(parts(&groups, (v.values_mut(), &mut []), (rank, 0)), |part| {
            let b = rounded(simd, &b[part.expert * outputs * rank..][..outputs * rank], bf16);
            let v = part.first;
            v.fill(0.0);
            dy.with_rows(&groups, part.rows, |dy| {
                add_nn(simd, v, rank, dy, outputs, &b, lora.scale)
            });
            if bf16 {
                let exact = v.to_vec();
                simd_rows::round(simd, &exact, 1.0, v);
            }
        });
        a = Some(floats(OP, "lora.a", lora.a)?);
        adapter_gradients(cpu, lora, &groups, sizes, &dy, v.values())?;
    }
    let Some((dx, write)) = call.dx else {
        return Ok(());
    };
    let matrices = matrices(cpu, call.weight, &groups, bf16)?;
    let (dx, v) = (floats_mut(OP, "dx", dx)?, v.values());
    cpu.for_parts(parts(&groups, (dx, &mut []), (inputs, 0)), |part| {
        let Part {
            expert,
            rows,
            first: dx,
            ..
        } = part;
        if write == Write::Overwrite {
            dx.fill(0.0);
        }
        let v = &v[rows.start * rank..rows.end * rank];
        dy.with_rows(&groups, rows, |dy| {
            if let Some(matrix) = &matrices[expert] {
                add_backward(simd, dx, dy, matrix);
            }
            if let Some(a) = a {
                let a = rounded(simd, &a[expert * rank * inputs..][..rank * inputs], bf16);
                add_nn(simd, dx, inputs, v, rank, &a, 1.0);
            }
        });
    });
    Ok(())
}

/// Adds `dA` and `dB`, one expert a task.
fn adapter_gradients(
    cpu: &Cpu,
    lora: GroupedLoraBackward<'_, Cpu>,
    groups: &Groups<'_>,
    sizes: GroupedSizes,
    dy: &Operand<'_>,
    v: &[f32],
) -> Result<()> {
    const OP: &str = "grouped_linear_backward";
    let (inputs, outputs, rank) = (sizes.inputs, sizes.outputs, sizes.rank);
    let x = Operand {
        values: floats(OP, "lora.x", lora.x)?,
        order: lora.x_order,
        width: inputs,
        ..*dy
    };
    let (simd, hidden) = (dy.simd, floats(OP, "lora.hidden", lora.hidden)?);
    let mut da = floats_mut(OP, "lora.gradient_a", lora.gradient_a)?;
    let mut db = floats_mut(OP, "lora.gradient_b", lora.gradient_b)?;
    let mut parts = Vec::new();
    for (expert, rows) in groups.experts().enumerate() {
        let (first, second) = (take(&mut da, rank * inputs), take(&mut db, outputs * rank));
        if !rows.is_empty() {
            parts.push(Part {
                expert,
                rows,
                first,
                second,
            });
        }
    }
    cpu.for_parts(parts, |part| {
        let own = part.rows.start * rank..part.rows.end * rank;
        x.with_rows(groups, part.rows.clone(), |x| {
            add_tn(simd, part.first, inputs, &v[own.clone()], x, 1.0)
        });
        let hidden = rounded(simd, &hidden[own], dy.rounded);
        dy.with_rows(groups, part.rows, |dy| {
            add_tn(simd, part.second, rank, dy, &hidden, lora.scale)
        });
    });
    Ok(())
}

/// Views of the matrices of the experts that have rows.
fn matrices<'a>(
    cpu: &Cpu,
    weight: &'a WeightStack<Cpu>,
    groups: &Groups<'_>,
    rounded: bool,
) -> Result<Vec<Option<Matrix<'a>>>> {
    let rows: Vec<_> = groups.experts().collect();
    let view = |expert: usize| match rows[expert].is_empty() {
        true => Ok(None),
        false => of_expert(weight, expert, rounded).map(Some),
    };
    cpu.map(rows.len(), view).into_iter().collect()
}
