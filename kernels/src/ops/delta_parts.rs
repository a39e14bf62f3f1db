//! The fused op in front of the delta rule, put together from those that it stands for.

use crate::contract;
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::{
    Columns, ConvolutionForward, ConvolutionOps, DeltaGatesForward, DeltaInputsForward, DeltaOps, GateOps,
};
use crate::tensor::Tensor;

/// See [`DeltaOps::delta_inputs_forward`].
pub(crate) fn inputs_forward<D: DeltaOps + GateOps + ConvolutionOps>(
    device: &D,
    call: DeltaInputsForward<'_, D>,
) -> Result<()> {
    let sizes = contract::delta_inputs_forward(&call)?;
    let (tokens, dtype, heads) = (sizes.tokens, call.q.dtype(), sizes.key_heads);
    let (key, group) = (sizes.key_dim, sizes.value_heads / heads * sizes.value_dim);
    let cut = |fused: &Tensor<D>, source: usize, width: usize| -> Result<Tensor<D>> {
        let mut part = device.alloc(dtype, [tokens, heads * width])?;
        let columns = Columns {
            groups: heads,
            source,
            target: 0,
            width,
        };
        device.copy_columns(fused, &mut part, columns)?;
        Ok(part)
    };
    let convolved = |part: usize, source: usize, width: usize| -> Result<Tensor<D>> {
        let x = cut(call.fused, source, width)?;
        let mut y = device.alloc(dtype, x.shape())?;
        device.convolution_forward(ConvolutionForward {
            x: &x,
            weight: call.taps[part],
            bias: None,
            segments: call.segments,
            state: None,
            y: &mut y,
        })?;
        Ok(y)
    };
    for (part, out) in [call.q, call.k].into_iter().enumerate() {
        let raw = convolved(part, part * key, key)?.reshaped([tokens, heads, key])?;
        let mut rnorm = device.alloc(DType::F32, [tokens * heads])?;
        device.l2_norm_forward(&raw, call.eps, out, &mut rnorm)?;
    }
    let values = convolved(2, 2 * key, group)?;
    device.copy(&values.reshaped(call.v.shape())?, call.v)?;
    device.copy(
        &cut(call.fused, 2 * key + group, group)?.reshaped(call.z.shape())?,
        call.z,
    )?;
    let ratio = sizes.value_heads / heads;
    device.delta_gates_forward(DeltaGatesForward {
        a: &cut(call.ba, ratio, ratio)?,
        b: &cut(call.ba, 0, ratio)?,
        a_log: call.a_log,
        dt_bias: call.dt_bias,
        decay: call.decay,
        beta: call.beta,
    })
}
