//! Ops whose tensors all have one shape.

use super::Rules;
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::{AdamW, BlockMoment, Device, MOMENT_BLOCK};
use crate::tensor::Tensor;

/// All activations of one shape and dtype; the first is the model for the rest.
pub(crate) fn same_shape<D: Device>(op: &'static str, tensors: &[(&'static str, &Tensor<D>)]) -> Result<()> {
    let rules = Rules(op);
    let Some((_, first)) = tensors.first() else {
        return Ok(());
    };
    for (argument, tensor) in tensors {
        rules.shape(argument, tensor, "the shape of the others", first.shape().extents())?;
        rules.alike(argument, tensor, first)?;
    }
    Ok(())
}

/// [`OptimizerOps::adamw_step`](crate::ops::OptimizerOps::adamw_step).
pub(crate) fn adamw_step<D: Device>(
    parameter: &Tensor<D>,
    gradient: &Tensor<D>,
    m: &Tensor<D>,
    v: &Tensor<D>,
    settings: &AdamW,
) -> Result<()> {
    let rules = Rules("adamw_step");
    for (argument, tensor) in [("parameter", parameter), ("gradient", gradient), ("m", m), ("v", v)] {
        rules.shape(argument, tensor, "the parameter's shape", parameter.shape().extents())?;
        rules.dtype(argument, tensor, &[DType::F32])?;
    }
    counted_from_one(rules, settings)
}

/// [`OptimizerOps::adamw_8bit_step`](crate::ops::OptimizerOps::adamw_8bit_step).
pub(crate) fn adamw_8bit_step<D: Device>(
    parameter: &Tensor<D>,
    gradient: &Tensor<D>,
    (m, v): (&BlockMoment<D>, &BlockMoment<D>),
    settings: &AdamW,
) -> Result<()> {
    let rules = Rules("adamw_8bit_step");
    let shape = parameter.shape();
    for (argument, tensor) in [("parameter", parameter), ("gradient", gradient)] {
        rules.shape(argument, tensor, "the parameter's shape", shape.extents())?;
        rules.dtype(argument, tensor, &[DType::F32])?;
    }
    let blocks = shape.elements().div_ceil(MOMENT_BLOCK);
    for (codes, absmax, moment) in [("m.codes", "m.absmax", m), ("v.codes", "v.absmax", v)] {
        rules.shape(codes, &moment.codes, "the parameter's shape", shape.extents())?;
        rules.dtype(codes, &moment.codes, &[DType::U8])?;
        rules.shape(absmax, &moment.absmax, "[blocks]", &[blocks])?;
        rules.dtype(absmax, &moment.absmax, &[DType::F32])?;
    }
    counted_from_one(rules, settings)
}

/// One tensor of [`OptimizerOps::squared_norm`](crate::ops::OptimizerOps::squared_norm).
pub(crate) fn squared_norm<D: Device>(tensor: &Tensor<D>) -> Result<()> {
    Rules("squared_norm").dtype("tensors", tensor, &[DType::F32])
}

/// One tensor of [`OptimizerOps::zero_many`](crate::ops::OptimizerOps::zero_many).
pub(crate) fn zero_many<D: Device>(tensor: &Tensor<D>) -> Result<()> {
    Rules("zero_many").dtype("tensors", tensor, &[DType::F32])
}

fn counted_from_one(rules: Rules, settings: &AdamW) -> Result<()> {
    match settings.step {
        0 => Err(rules.value("step", "is counted from 1, but is 0".to_owned())),
        _ => Ok(()),
    }
}
