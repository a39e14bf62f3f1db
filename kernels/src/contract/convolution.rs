//! Short causal convolution.

use super::{Rules, VECTOR};
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::{ConvolutionBackward, ConvolutionForward, Device};
use crate::tensor::{Segments, Tensor};

/// `C` and `K`.
#[derive(Clone, Copy)]
pub(crate) struct ConvolutionSizes {
    pub(crate) channels: usize,
    pub(crate) taps: usize,
}

pub(crate) fn convolution_forward<D: Device>(call: &ConvolutionForward<'_, D>) -> Result<ConvolutionSizes> {
    let rules = Rules("convolution_forward");
    let sizes = common(rules, call.x, call.weight, call.bias, call.segments)?;
    rules.alike("y", call.y, call.x)?;
    rules.shape("y", call.y, "the shape of x", call.x.shape().extents())?;
    if let Some(state) = &call.state {
        rules.dtype("state", state, &[DType::F32])?;
        let extents = [call.segments.len(), sizes.taps - 1, sizes.channels];
        rules.shape("state", state, "[documents, K − 1, C]", &extents)?;
    }
    Ok(sizes)
}

pub(crate) fn convolution_backward<D: Device>(call: &ConvolutionBackward<'_, D>) -> Result<ConvolutionSizes> {
    let rules = Rules("convolution_backward");
    for (argument, tensor) in [("dy", call.dy), ("dx", &*call.dx)] {
        rules.alike(argument, tensor, call.x)?;
        rules.shape(argument, tensor, "the shape of x", call.x.shape().extents())?;
    }
    common(rules, call.x, call.weight, call.bias, call.segments)
}

fn common<D: Device>(
    rules: Rules,
    x: &Tensor<D>,
    weight: &Tensor<D>,
    bias: Option<&Tensor<D>>,
    segments: &Segments,
) -> Result<ConvolutionSizes> {
    rules.alike("x", x, x)?;
    rules.dtype("weight", weight, VECTOR)?;
    let [channels, taps] = rules.extents("weight", weight, "[C, K]")?;
    if taps == 0 {
        return Err(rules.wrong_shape("weight", weight, "[C, K] with K at least 1".to_owned()));
    }
    rules.shape("x", x, "[T, C]", &[segments.tokens(), channels])?;
    if let Some(bias) = bias {
        rules.dtype("bias", bias, VECTOR)?;
        rules.shape("bias", bias, "[C]", &[channels])?;
    }
    Ok(ConvolutionSizes { channels, taps })
}
