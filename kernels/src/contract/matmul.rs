//! Linear layers.

use super::{Rules, VECTOR, weight_shape};
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::{Device, LinearBackward, LinearForward};
use crate::tensor::Tensor;

/// `T`, `I`, `O` and `R` (0 without an adapter).
#[derive(Clone, Copy)]
pub(crate) struct LinearSizes {
    pub(crate) tokens: usize,
    pub(crate) inputs: usize,
    pub(crate) outputs: usize,
    pub(crate) rank: usize,
}

pub(crate) fn linear_forward<D: Device>(call: &LinearForward<'_, D>) -> Result<LinearSizes> {
    let rules = Rules("linear_forward");
    rules.alike("x", call.x, call.x)?;
    rules.alike("y", call.y, call.x)?;
    let (outputs, inputs) = weight_shape("linear_forward", "weight", call.weight)?;
    let [tokens, width] = rules.extents("x", call.x, "[T, I]")?;
    if width != inputs {
        return Err(rules.wrong_shape("x", call.x, format!("[T, I] with I = {inputs}")));
    }
    rules.shape("y", call.y, "[T, O]", &[tokens, outputs])?;
    if let Some(bias) = call.bias {
        rules.dtype("bias", bias, VECTOR)?;
        rules.shape("bias", bias, "[O]", &[outputs])?;
    }
    let mut rank = 0;
    if let Some(lora) = &call.lora {
        rank = adapter(rules, lora.a, lora.b, inputs, outputs)?;
        rules.dtype("lora.hidden", lora.hidden, &[DType::F32])?;
        rules.shape("lora.hidden", lora.hidden, "[T, R]", &[tokens, rank])?;
    }
    Ok(LinearSizes {
        tokens,
        inputs,
        outputs,
        rank,
    })
}

pub(crate) fn linear_backward<D: Device>(call: &LinearBackward<'_, D>) -> Result<LinearSizes> {
    let rules = Rules("linear_backward");
    rules.alike("dy", call.dy, call.dy)?;
    let (outputs, inputs) = weight_shape("linear_backward", "weight", call.weight)?;
    let [tokens, width] = rules.extents("dy", call.dy, "[T, O]")?;
    if width != outputs {
        return Err(rules.wrong_shape("dy", call.dy, format!("[T, O] with O = {outputs}")));
    }
    if let Some((dx, _)) = &call.dx {
        rules.alike("dx", dx, call.dy)?;
        rules.shape("dx", dx, "[T, I]", &[tokens, inputs])?;
    }
    let mut rank = 0;
    if let Some(lora) = &call.lora {
        rank = adapter(rules, lora.a, lora.b, inputs, outputs)?;
        rules.alike("lora.x", lora.x, call.dy)?;
        rules.shape("lora.x", lora.x, "[T, I]", &[tokens, inputs])?;
        rules.dtype("lora.hidden", lora.hidden, &[DType::F32])?;
        rules.shape("lora.hidden", lora.hidden, "[T, R]", &[tokens, rank])?;
        rules.dtype("lora.gradient_a", lora.gradient_a, &[DType::F32])?;
        rules.shape("lora.gradient_a", lora.gradient_a, "[R, I]", &[rank, inputs])?;
        rules.dtype("lora.gradient_b", lora.gradient_b, &[DType::F32])?;
        rules.shape("lora.gradient_b", lora.gradient_b, "[O, R]", &[outputs, rank])?;
    }
    Ok(LinearSizes {
        tokens,
        inputs,
        outputs,
        rank,
    })
}

/// `R` of an adapter that fits the layer.
fn adapter<D: Device>(rules: Rules, a: &Tensor<D>, b: &Tensor<D>, inputs: usize, outputs: usize) -> Result<usize> {
    rules.dtype("lora.a", a, &[DType::F32])?;
    rules.dtype("lora.b", b, &[DType::F32])?;
    let [rank, width] = rules.extents("lora.a", a, "[R, I]")?;
    if width != inputs {
        return Err(rules.wrong_shape("lora.a", a, format!("[R, I] with I = {inputs}")));
    }
    rules.shape("lora.b", b, "[O, R]", &[outputs, rank])?;
    Ok(rank)
}
