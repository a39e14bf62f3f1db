//! Ops whose tensors all have one shape.

use super::Rules;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::ops::{AdamW, Device};
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
    if settings.step == 0 {
        return Err(Error::Value {
            op: "adamw_step",
            argument: "step",
            problem: "is counted from 1, but is 0".to_owned(),
        });
    }
    Ok(())
}
