//! Gates, their norms, and columns.

use super::{Rules, VECTOR};
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::{Columns, Device, GatedNormBackward, GatedNormForward, SigmoidGateBackward};
use crate::tensor::{Shape, Tensor};

/// `C`, and whether one gate serves a whole row.
#[derive(Clone, Copy)]
pub(crate) struct GateSizes {
    pub(crate) width: usize,
    pub(crate) scalar: bool,
}

pub(crate) fn sigmoid_gate_forward<D: Device>(x: &Tensor<D>, gate: &Tensor<D>, y: &Tensor<D>) -> Result<GateSizes> {
    let rules = Rules("sigmoid_gate_forward");
    like(rules, &[("x", x), ("y", y)])?;
    gate_sizes(rules, "gate", gate, x)
}

pub(crate) fn sigmoid_gate_backward<D: Device>(call: &SigmoidGateBackward<'_, D>) -> Result<GateSizes> {
    let rules = Rules("sigmoid_gate_backward");
    like(rules, &[("x", call.x), ("dy", call.dy), ("dx", &*call.dx)])?;
    like(rules, &[("gate", call.gate), ("dgate", &*call.dgate)])?;
    gate_sizes(rules, "gate", call.gate, call.x)
}

/// `C`.
pub(crate) fn gated_norm_forward<D: Device>(call: &GatedNormForward<'_, D>) -> Result<usize> {
    let rules = Rules("gated_norm_forward");
    like(rules, &[("x", call.x), ("gate", call.gate), ("y", &*call.y)])?;
    norm_weight(rules, call.weight, call.x)?;
    reciprocals(rules, "rstd", call.rstd, call.x)
}

/// `C`.
pub(crate) fn gated_norm_backward<D: Device>(call: &GatedNormBackward<'_, D>) -> Result<usize> {
    let rules = Rules("gated_norm_backward");
    let all = [
        ("x", call.x),
        ("gate", call.gate),
        ("dy", call.dy),
        ("dx", &*call.dx),
        ("dgate", &*call.dgate),
    ];
    like(rules, &all)?;
    norm_weight(rules, call.weight, call.x)?;
    reciprocals(rules, "rstd", call.rstd, call.x)
}

/// `C`.
pub(crate) fn l2_norm_forward<D: Device>(x: &Tensor<D>, y: &Tensor<D>, rnorm: &Tensor<D>) -> Result<usize> {
    let rules = Rules("l2_norm_forward");
    like(rules, &[("x", x), ("y", y)])?;
    reciprocals(rules, "rnorm", rnorm, x)
}

/// `C`.
pub(crate) fn l2_norm_backward<D: Device>(
    x: &Tensor<D>,
    rnorm: &Tensor<D>,
    dy: &Tensor<D>,
    dx: &Tensor<D>,
) -> Result<usize> {
    let rules = Rules("l2_norm_backward");
    like(rules, &[("x", x), ("dy", dy), ("dx", dx)])?;
    reciprocals(rules, "rnorm", rnorm, x)
}

/// Lengths of a row of the source and of the target.
pub(crate) fn copy_columns<D: Device>(
    source: &Tensor<D>,
    target: &Tensor<D>,
    columns: Columns,
) -> Result<(usize, usize)> {
    let rules = Rules("copy_columns");
    rules.alike("source", source, source)?;
    rules.alike("target", target, source)?;
    let [(rows, length), (target_rows, target_length)] = [source, target].map(|tensor| rows(tensor.shape()));
    if rows != target_rows {
        let expected = format!("{target_rows} rows, as the target");
        return Err(rules.wrong_shape("source", source, expected));
    }
    let fits = |length: usize, first: usize| {
        columns.groups > 0
            && length.is_multiple_of(columns.groups)
            && first
                .checked_add(columns.width)
                .is_some_and(|end| end <= length / columns.groups)
    };
    if fits(length, columns.source) && fits(target_length, columns.target) {
        return Ok((length, target_length));
    }
    Err(rules.value(
        "columns",
        format!("{columns:?} do not fit rows of {length} and {target_length}"),
    ))
}

/// The first extent, and the product of the others.
fn rows(shape: Shape) -> (usize, usize) {
    match shape.extents().split_first() {
        Some((rows, rest)) => (*rows, rest.iter().product()),
        None => (1, 1),
    }
}

/// All are activations of the first one's shape and dtype.
fn like<D: Device>(rules: Rules, tensors: &[(&'static str, &Tensor<D>)]) -> Result<()> {
    for (argument, tensor) in tensors {
        let (_, first) = tensors[0];
        rules.alike(argument, tensor, first)?;
        rules.shape(argument, tensor, "the shape of the others", first.shape().extents())?;
    }
    Ok(())
}

fn gate_sizes<D: Device>(rules: Rules, argument: &'static str, gate: &Tensor<D>, x: &Tensor<D>) -> Result<GateSizes> {
    rules.alike(argument, gate, x)?;
    let width = x.shape().row();
    let scalar = gate.shape() != x.shape();
    if scalar && (gate.shape().rows(), gate.shape().row()) != (x.shape().rows(), 1) {
        let expected = format!("[N, C] as x or [N, 1] with N = {}", x.shape().rows());
        return Err(rules.wrong_shape(argument, gate, expected));
    }
    Ok(GateSizes { width, scalar })
}

fn norm_weight<D: Device>(rules: Rules, weight: &Tensor<D>, x: &Tensor<D>) -> Result<()> {
    rules.dtype("weight", weight, VECTOR)?;
    rules.shape("weight", weight, "[C]", &[x.shape().row()])
}

/// The length of a row of `x`, for each of which there is one reciprocal.
fn reciprocals<D: Device>(rules: Rules, argument: &'static str, tensor: &Tensor<D>, x: &Tensor<D>) -> Result<usize> {
    rules.dtype(argument, tensor, &[DType::F32])?;
    if tensor.shape().elements() != x.shape().rows() {
        let expected = format!("[N] with N = {}", x.shape().rows());
        return Err(rules.wrong_shape(argument, tensor, expected));
    }
    Ok(x.shape().row())
}
