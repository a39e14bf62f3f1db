//! Linear layers over grouped rows: each expert's matrix is decoded a few of its rows at a time, right where they are used,
//! so it passes through memory once, in its encoding, for all the tokens of the expert.

use std::ops::Range;

use super::super::matrix::{Factor, Matrix};
use super::super::products::{RowsAre, Term, transposed};
use super::super::scratch::with_local;
use super::super::simd::{Left, Simd, Start, gates, rows as simd_rows};
use super::super::split::take;
use super::super::view::{floats, floats_mut};
use super::super::{Cpu, Products};
use super::matrix::Experts;
use super::routing::Groups;
use crate::contract::{self, GroupedSizes};
use crate::error::Result;
use crate::ops::{GroupedLinearBackward, GroupedLinearForward, GroupedLoraBackward, RowOrder, Write};

/// Rows of an expert that one task takes. A popular expert is worth several tasks; its matrix is then decoded once for each,
/// which this many rows of work pay for.
const TASK_ROWS: usize = 96;

/// An activation whose rows are found through the routing.
#[derive(Clone, Copy)]
struct Operand<'a> {
    values: &'a [f32],
    order: RowOrder,
    width: usize,
}

impl<'a> Operand<'a> {
    fn row(&self, groups: &Groups<'_>, row: usize) -> &'a [f32] {
        &self.values[groups.source(row, self.order) * self.width..][..self.width]
    }
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

/// Gives `work` rows as the left matrix of a product; `row(i)` is the `i`-th of `count`.
fn with_left<'v, E: Factor>(
    simd: Simd,
    (count, width): (usize, usize),
    rounded: bool,
    row: impl Fn(usize) -> &'v [f32],
    work: impl FnOnce(Left<'_, E>),
) {
    let stride = width.next_multiple_of(E::DEPTH);
    with_local(count * stride, |values: &mut [E]| {
        for (i, out) in values.chunks_exact_mut(stride.max(1)).enumerate() {
            let (filled, padding) = out.split_at_mut(width);
            E::fill(simd, row(i), 1.0, rounded, filled);
            padding.fill(E::zeroed());
        }
        work(Left {
            values,
            stride,
            rows: count,
        });
    });
}

/// As [`with_left`] for the rows of a matrix.
fn with_rows<E: Factor>(simd: Simd, values: &[f32], width: usize, rounded: bool, work: impl FnOnce(Left<'_, E>)) {
    let count = values.len() / width.max(1);
    with_left(simd, (count, width), rounded, |i| &values[i * width..][..width], work);
}

/// As [`with_left`] for the columns of a matrix.
fn with_columns<E: Factor>(simd: Simd, values: &[f32], width: usize, rounded: bool, work: impl FnOnce(Left<'_, E>)) {
    let rows = values.len() / width.max(1);
    with_local(values.len(), |turned: &mut [f32]| {
        transposed(values, width, turned);
        with_rows(simd, turned, rows, rounded, work);
    });
}

pub(super) fn forward(cpu: &Cpu, call: GroupedLinearForward<'_, Cpu>) -> Result<()> {
    let sizes = contract::grouped_linear_forward(&call)?;
    match cpu.products(call.precision) {
        Products::Single { rounded } => forward_as::<f32>(cpu, call, sizes, rounded),
        Products::Half => forward_as::<u16>(cpu, call, sizes, true),
    }
}

fn forward_as<E: Factor>(
    cpu: &Cpu,
    call: GroupedLinearForward<'_, Cpu>,
    sizes: GroupedSizes,
    rounded: bool,
) -> Result<()> {
    const OP: &str = "grouped_linear_forward";
    let (inputs, outputs, rank) = (sizes.inputs, sizes.outputs, sizes.rank);
    let groups = Groups::new(OP, call.routing, sizes.routing)?;
    let simd = cpu.inner.simd;
    let x = Operand {
        values: floats(OP, "x", call.x)?,
        order: call.x_order,
        width: inputs,
    };
    let experts = Experts::of(call.weight, rounded)?;
    let y = floats_mut(OP, "y", call.y)?;
    let (adapters, hidden) = match call.lora {
        Some(lora) => {
            let (a, b) = (floats(OP, "lora.a", lora.a)?, floats(OP, "lora.b", lora.b)?);
            (Some((a, b, lora.scale)), floats_mut(OP, "lora.hidden", lora.hidden)?)
        }
        None => (None, &mut [][..]),
    };
    cpu.for_parts(parts(&groups, (y, hidden), (outputs, rank)), |part| {
        let Part { expert, rows, .. } = part;
        let count = (rows.len(), inputs);
        with_left::<E>(
            simd,
            count,
            rounded,
            |i| x.row(&groups, rows.start + i),
            |x| {
                let matrix = &experts.matrix(expert);
                let Some((a, b, scale)) = adapters else {
                    return cpu.product_here(&[by_columns(x, matrix)], part.first, outputs, Start::Zero);
                };
                let a = Matrix::of_values(&a[expert * rank * inputs..][..rank * inputs], inputs, rounded);
                let b = Matrix::of_values(&b[expert * outputs * rank..][..outputs * rank], rank, rounded);
                cpu.product_here(&[by_columns(x, &a)], part.second, rank, Start::Zero);
                let mut hidden = part.second.to_vec();
                simd_rows::scale(simd, &mut hidden, scale);
                with_left::<E>(
                    simd,
                    (rows.len(), rank),
                    rounded,
                    |i| &hidden[i * rank..][..rank],
                    |hidden| {
                        let terms = [by_columns(x, matrix), by_columns(hidden, &b)];
                        cpu.product_here(&terms, part.first, outputs, Start::Zero);
                    },
                );
            },
        );
    });
    Ok(())
}

pub(super) fn backward(cpu: &Cpu, call: GroupedLinearBackward<'_, Cpu>) -> Result<()> {
    let sizes = contract::grouped_linear_backward(&call)?;
    match cpu.products(call.precision) {
        Products::Single { rounded } => backward_as::<f32>(cpu, call, sizes, rounded),
        Products::Half => backward_as::<u16>(cpu, call, sizes, true),
    }
}

fn backward_as<E: Factor>(
    cpu: &Cpu,
    call: GroupedLinearBackward<'_, Cpu>,
    sizes: GroupedSizes,
    rounded: bool,
) -> Result<()> {
    const OP: &str = "grouped_linear_backward";
    let (inputs, outputs, rank) = (sizes.inputs, sizes.outputs, sizes.rank);
    let groups = Groups::new(OP, call.routing, sizes.routing)?;
    let simd = cpu.inner.simd;
    let dy = Operand {
        values: floats(OP, "dy", call.dy)?,
        order: call.dy_order,
        width: outputs,
    };
    // v = s · dy · B, which both the adapters' gradients and dx need.
    let mut v = cpu.scratch::<f32>(sizes.routing.slots() * rank)?;
    let mut a = None;
    if let Some(lora) = call.lora {
        let b = floats(OP, "lora.b", lora.b)?;
        cpu.for_parts(parts(&groups, (v.values_mut(), &mut []), (rank, 0)), |part| {
            let b = Matrix::of_values(&b[part.expert * outputs * rank..][..outputs * rank], rank, rounded);
            let count = (part.rows.len(), outputs);
            with_left::<E>(
                simd,
                count,
                rounded,
                |i| dy.row(&groups, part.rows.start + i),
                |dy| {
                    cpu.product_here(&[by_depth(dy, &b)], part.first, rank, Start::Zero);
                },
            );
            simd_rows::scale(simd, part.first, lora.scale);
        });
        a = Some(floats(OP, "lora.a", lora.a)?);
        adapter_gradients::<E>(cpu, lora, &groups, sizes, dy, v.values(), rounded)?;
    }
    let Some((dx, write)) = call.dx else {
        return Ok(());
    };
    let start = match write {
        Write::Overwrite => Start::Zero,
        Write::Accumulate => Start::Output,
    };
    let experts = Experts::of(call.weight, rounded)?;
    let (dx, v) = (floats_mut(OP, "dx", dx)?, v.values());
    cpu.for_parts(parts(&groups, (dx, &mut []), (inputs, 0)), |part| {
        let Part { expert, rows, .. } = part;
        let count = (rows.len(), outputs);
        with_left::<E>(
            simd,
            count,
            rounded,
            |i| dy.row(&groups, rows.start + i),
            |dy| {
                let matrix = &experts.matrix(expert);
                let Some(a) = a else {
                    return cpu.product_here(&[by_depth(dy, matrix)], part.first, inputs, start);
                };
                let a = Matrix::of_values(&a[expert * rank * inputs..][..rank * inputs], inputs, rounded);
                let v = |i: usize| &v[(rows.start + i) * rank..][..rank];
                with_left::<E>(simd, (rows.len(), rank), rounded, v, |v| {
                    cpu.product_here(&[by_depth(dy, matrix), by_depth(v, &a)], part.first, inputs, start);
                });
            },
        );
    });
    Ok(())
}

fn by_columns<'a, E>(left: Left<'a, E>, right: &'a Matrix<'a>) -> Term<'a, E> {
    Term {
        left,
        right,
        rows_are: RowsAre::Columns,
    }
}

fn by_depth<'a, E>(left: Left<'a, E>, right: &'a Matrix<'a>) -> Term<'a, E> {
    Term {
        left,
        right,
        rows_are: RowsAre::Depth,
    }
}

/// Adds `dA` and `dB`, one expert a task.
fn adapter_gradients<E: Factor>(
    cpu: &Cpu,
    lora: GroupedLoraBackward<'_, Cpu>,
    groups: &Groups<'_>,
    sizes: GroupedSizes,
    dy: Operand<'_>,
    v: &[f32],
    rounded: bool,
) -> Result<()> {
    const OP: &str = "grouped_linear_backward";
    let (inputs, outputs, rank) = (sizes.inputs, sizes.outputs, sizes.rank);
    let x = Operand {
        values: floats(OP, "lora.x", lora.x)?,
        order: lora.x_order,
        width: inputs,
    };
    let (simd, hidden) = (cpu.inner.simd, floats(OP, "lora.hidden", lora.hidden)?);
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
    let gathered = |operand: Operand<'_>, rows: Range<usize>| -> Vec<f32> {
        rows.flat_map(|row| operand.row(groups, row)).copied().collect()
    };
    cpu.for_parts(parts, |part| {
        let own = part.rows.start * rank..part.rows.end * rank;
        let x = gathered(x, part.rows.clone());
        let x = Matrix::of_values(&x, inputs, rounded);
        with_columns::<E>(simd, &v[own.clone()], rank, rounded, |v| {
            cpu.product_here(&[by_depth(v, &x)], part.first, inputs, Start::Output);
        });
        let u = Matrix::of_values(&hidden[own], rank, rounded);
        let dy = gathered(dy, part.rows);
        with_columns::<E>(simd, &dy, outputs, rounded, |dy| {
            with_local(outputs * rank, |product| {
                cpu.product_here(&[by_depth(dy, &u)], product, rank, Start::Zero);
                gates::add_scaled(simd, part.second, product, lora.scale);
            });
        });
    });
    Ok(())
}
