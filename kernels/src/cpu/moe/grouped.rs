//! Linear layers over grouped rows: each expert's matrix is decoded a few of its rows at a time, right where they are used,
//! so it passes through memory once, in its encoding, for all the tokens of the expert.

use std::ops::Range;

use super::super::Cpu;
use super::super::dense::rounded;
use super::super::dense::{add_nn, add_nt, add_tn};
use super::super::split::take;
use super::super::view::{floats, floats_mut};
use super::matrix::Matrix;
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

/// An activation whose rows are found through the routing.
struct Operand<'a> {
    values: &'a [f32],
    order: RowOrder,
    width: usize,
    precision: Precision,
}

impl Operand<'_> {
    /// The rows that `rows` read, as they enter a product.
    fn gather(&self, groups: &Groups<'_>, rows: Range<usize>) -> Vec<f32> {
        let mut gathered = Vec::with_capacity(rows.len() * self.width);
        for row in rows {
            let source = groups.source(row, self.order);
            gathered.extend_from_slice(&self.values[source * self.width..][..self.width]);
        }
        match self.precision {
            Precision::F32 => gathered,
            precision => rounded(&gathered, precision),
        }
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

/// Decodes the matrix tile by tile: `work(first row, tile)`.
fn for_tiles(
    matrix: &Matrix<'_>,
    (outputs, inputs): (usize, usize),
    precision: Precision,
    mut work: impl FnMut(usize, &[f32]),
) {
    let tile_rows = (TILE_ELEMENTS / inputs.max(1)).clamp(1, outputs.max(1));
    let mut tile = vec![0.0; tile_rows * inputs];
    for first in (0..outputs).step_by(tile_rows) {
        let tile = &mut tile[..tile_rows.min(outputs - first) * inputs];
        matrix.decode(first, tile, precision);
        work(first, tile);
    }
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
    let precision = call.precision;
    let x = Operand {
        values: floats(OP, "x", call.x)?,
        order: call.x_order,
        width: inputs,
        precision,
    };
    let matrices = matrices(cpu, call.weight, &groups)?;
    let y = floats_mut(OP, "y", call.y)?;
    let (adapters, hidden) = match call.lora {
        Some(lora) => {
            let a = rounded(floats(OP, "lora.a", lora.a)?, precision);
            let b = rounded(floats(OP, "lora.b", lora.b)?, precision);
            (Some((a, b, lora.scale)), floats_mut(OP, "lora.hidden", lora.hidden)?)
        }
        None => (None, &mut [][..]),
    };
    if outputs == 0 {
        return Ok(());
    }
    cpu.for_parts(parts(&groups, (y, hidden), (outputs, rank)), |part| {
        let Part {
            expert,
            rows,
            first: y,
            second: hidden,
        } = part;
        let x = x.gather(&groups, rows);
        y.fill(0.0);
        if let Some(matrix) = &matrices[expert] {
            for_tiles(matrix, (outputs, inputs), precision, |first, tile| {
                add_nt(&mut y[first..], outputs, &x, tile, inputs, 1.0);
            });
        }
        if let Some((a, b, scale)) = &adapters {
            let a = &a[expert * rank * inputs..][..rank * inputs];
            let b = &b[expert * outputs * rank..][..outputs * rank];
            hidden.fill(0.0);
            add_nt(hidden, rank.max(1), &x, a, inputs, 1.0);
            add_nt(y, outputs, &rounded(hidden, precision), b, rank, *scale);
        }
    });
    Ok(())
}

pub(super) fn backward(cpu: &Cpu, call: GroupedLinearBackward<'_, Cpu>) -> Result<()> {
    const OP: &str = "grouped_linear_backward";
    let sizes = contract::grouped_linear_backward(&call)?;
    let (inputs, outputs, rank) = (sizes.inputs, sizes.outputs, sizes.rank);
    let groups = Groups::new(OP, call.routing, sizes.routing)?;
    let precision = call.precision;
    let dy = Operand {
        values: floats(OP, "dy", call.dy)?,
        order: call.dy_order,
        width: outputs,
        precision,
    };
    let adapters = match &call.lora {
        Some(lora) => {
            let a = rounded(floats(OP, "lora.a", lora.a)?, precision);
            Some((a, rounded(floats(OP, "lora.b", lora.b)?, precision), lora.scale))
        }
        None => None,
    };
    // v = s · dy · B, which both the adapters' gradients and dx need.
    let mut v = vec![0.0; sizes.routing.slots() * rank];
    if let Some((_, b, scale)) = &adapters {
        cpu.for_parts(parts(&groups, (&mut v, &mut []), (rank, 0)), |part| {
            let b = &b[part.expert * outputs * rank..][..outputs * rank];
            add_nn(part.first, rank, &dy.gather(&groups, part.rows), outputs, b, *scale);
        });
    }
    let v = rounded(&v, precision);
    if let Some(lora) = call.lora {
        adapter_gradients(cpu, lora, &groups, sizes, &dy, &v)?;
    }
    let Some((dx, write)) = call.dx else {
        return Ok(());
    };
    let matrices = matrices(cpu, call.weight, &groups)?;
    let dx = floats_mut(OP, "dx", dx)?;
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
        let dy = dy.gather(&groups, rows.clone());
        if let Some(matrix) = &matrices[expert] {
            for_tiles(matrix, (outputs, inputs), precision, |first, tile| {
                add_nn(dx, inputs, &dy[first..], outputs, tile, 1.0);
            });
        }
        if let Some((a, _, _)) = &adapters {
            let a = &a[expert * rank * inputs..][..rank * inputs];
            add_nn(dx, inputs, &v[rows.start * rank..rows.end * rank], rank, a, 1.0);
        }
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
        precision: dy.precision,
    };
    let hidden = rounded(floats(OP, "lora.hidden", lora.hidden)?, dy.precision);
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
        let x = x.gather(groups, part.rows.clone());
        add_tn(part.first, inputs, &v[own.clone()], &x, 1.0);
        let dy = dy.gather(groups, part.rows);
        add_tn(part.second, rank, &dy, &hidden[own], lora.scale);
    });
    Ok(())
}

/// Views of the matrices of the experts that have rows.
fn matrices<'a>(cpu: &Cpu, weight: &'a WeightStack<Cpu>, groups: &Groups<'_>) -> Result<Vec<Option<Matrix<'a>>>> {
    let rows: Vec<_> = groups.experts().collect();
    let view = |expert: usize| match rows[expert].is_empty() {
        true => Ok(None),
        false => Matrix::of(weight, expert).map(Some),
    };
    cpu.map(rows.len(), view).into_iter().collect()
}
