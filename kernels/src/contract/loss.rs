//! Cross-entropy.

use super::matmul::LinearSizes;
use super::{Rules, weight_shape};
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::{Device, LinearCrossEntropy};

pub(crate) fn linear_cross_entropy<D: Device>(call: &LinearCrossEntropy<'_, D>) -> Result<LinearSizes> {
    let rules = Rules("linear_cross_entropy");
    rules.alike("x", call.x, call.x)?;
    let (outputs, inputs) = weight_shape("linear_cross_entropy", "head", call.head)?;
    let [tokens, width] = rules.extents("x", call.x, "[T, C]")?;
    if width != inputs {
        return Err(rules.wrong_shape("x", call.x, format!("[T, C] with C = {inputs}")));
    }
    rules.dtype("labels", call.labels, &[DType::I32])?;
    rules.shape("labels", call.labels, "[T]", &[tokens])?;
    rules.dtype("losses", call.losses, &[DType::F32])?;
    rules.shape("losses", call.losses, "[T]", &[tokens])?;
    if let Some((dx, factor)) = &call.dx {
        rules.dtype("factor", factor, &[DType::F32])?;
        rules.shape("factor", factor, "[1]", &[1])?;
        rules.alike("dx", dx, call.x)?;
        rules.shape("dx", dx, "[T, C]", &[tokens, inputs])?;
    }
    Ok(LinearSizes {
        tokens,
        inputs,
        outputs,
        rank: 0,
    })
}
