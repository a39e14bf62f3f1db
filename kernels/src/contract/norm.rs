//! Norms.

use super::{Rules, VECTOR};
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::{AddNormForward, Device, NormBackward, NormForward};
use crate::tensor::Tensor;

/// `C`.
#[derive(Clone, Copy)]
pub(crate) struct NormSizes {
    pub(crate) width: usize,
}

pub(crate) fn rms_norm_forward<D: Device>(call: &NormForward<'_, D>) -> Result<NormSizes> {
    let rules = Rules("rms_norm_forward");
    rules.alike("y", call.y, call.x)?;
    rules.shape("y", call.y, "the shape of x", call.x.shape().extents())?;
    common(rules, call.x, call.weight, call.rstd)
}

pub(crate) fn add_rms_norm_forward<D: Device>(call: &AddNormForward<'_, D>) -> Result<NormSizes> {
    let rules = Rules("add_rms_norm_forward");
    for (argument, tensor) in [("added", call.added), ("y", &*call.y)] {
        rules.alike(argument, tensor, call.x)?;
        rules.shape(argument, tensor, "the shape of x", call.x.shape().extents())?;
    }
    common(rules, call.x, call.weight, call.rstd)
}

pub(crate) fn rms_norm_backward<D: Device>(call: &NormBackward<'_, D>) -> Result<NormSizes> {
    let rules = Rules("rms_norm_backward");
    for (argument, tensor) in [("dy", call.dy), ("dx", &*call.dx.0)] {
        rules.alike(argument, tensor, call.x)?;
        rules.shape(argument, tensor, "the shape of x", call.x.shape().extents())?;
    }
    common(rules, call.x, call.weight, call.rstd)
}

fn common<D: Device>(rules: Rules, x: &Tensor<D>, weight: &Tensor<D>, rstd: &Tensor<D>) -> Result<NormSizes> {
    rules.alike("x", x, x)?;
    let (rows, width) = (x.shape().rows(), x.shape().row());
    rules.dtype("weight", weight, VECTOR)?;
    rules.shape("weight", weight, "[C]", &[width])?;
    rules.dtype("rstd", rstd, &[DType::F32])?;
    if rstd.shape().elements() != rows {
        return Err(rules.wrong_shape("rstd", rstd, format!("[N] with N = {rows}")));
    }
    Ok(NormSizes { width })
}
