//! The fused ops in front of the delta rule, put together from those that they stand for.

use crate::contract::{self, DeltaSizes};
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::{
    Columns, ConvolutionBackward, ConvolutionForward, ConvolutionOps, DeltaGatesBackward, DeltaGatesForward,
    DeltaInputsBackward, DeltaInputsForward, DeltaOps, GateOps,
};
use crate::tensor::{Segments, Tensor};

/// Where q, k, v and z lie in each key head's part of the fused projection, by their order there.
fn fused_columns(sizes: DeltaSizes) -> [Columns; 4] {
    let (key, group) = (sizes.key_dim, sizes.value_heads / sizes.key_heads * sizes.value_dim);
    [(0, key), (key, key), (2 * key, group), (2 * key + group, group)].map(|part| columns(sizes, part))
}

/// Where b and a lie in each key head's part of theirs.
fn gate_columns(sizes: DeltaSizes) -> [Columns; 2] {
    let ratio = sizes.value_heads / sizes.key_heads;
    [(0, ratio), (ratio, ratio)].map(|part| columns(sizes, part))
}

fn columns(sizes: DeltaSizes, (source, width): (usize, usize)) -> Columns {
    Columns {
        groups: sizes.key_heads,
        source,
        target: 0,
        width,
    }
}

/// The part of a projection's output that lies there, `[T, groups · width]`.
fn cut<D: GateOps>(device: &D, from: &Tensor<D>, columns: Columns) -> Result<Tensor<D>> {
    let mut part = device.alloc(from.dtype(), [from.shape().rows(), columns.groups * columns.width])?;
    device.copy_columns(from, &mut part, columns)?;
    Ok(part)
}

/// The way back of [`cut`].
fn put<D: GateOps>(device: &D, part: &Tensor<D>, whole: &mut Tensor<D>, columns: Columns) -> Result<()> {
    let back = Columns {
        source: columns.target,
        target: columns.source,
        ..columns
    };
    device.copy_columns(part, whole, back)
}

fn convolved<D: ConvolutionOps>(
    device: &D,
    x: &Tensor<D>,
    weight: &Tensor<D>,
    segments: &Segments,
) -> Result<Tensor<D>> {
    let mut y = device.alloc(x.dtype(), x.shape())?;
    device.convolution_forward(ConvolutionForward {
        x,
        weight,
        bias: None,
        segments,
        state: None,
        y: &mut y,
    })?;
    Ok(y)
}

/// See [`DeltaOps::delta_inputs_forward`].
pub(crate) fn inputs_forward<D: DeltaOps + GateOps + ConvolutionOps>(
    device: &D,
    call: DeltaInputsForward<'_, D>,
) -> Result<()> {
    let sizes = contract::delta_inputs_forward(&call)?;
    let keys = [sizes.tokens, sizes.key_heads, sizes.key_dim];
    let [q_columns, k_columns, v_columns, z_columns] = fused_columns(sizes);
    let [q_taps, k_taps, v_taps] = call.taps;
    for (columns, taps, out) in [(q_columns, q_taps, call.q), (k_columns, k_taps, call.k)] {
        let raw = convolved(device, &cut(device, call.fused, columns)?, taps, call.segments)?.reshaped(keys)?;
        let mut rnorm = device.alloc(DType::F32, [sizes.tokens * sizes.key_heads])?;
        device.l2_norm_forward(&raw, call.eps, out, &mut rnorm)?;
    }
    let values = convolved(device, &cut(device, call.fused, v_columns)?, v_taps, call.segments)?;
    device.copy(&values.reshaped(call.v.shape())?, call.v)?;
    device.copy(&cut(device, call.fused, z_columns)?.reshaped(call.z.shape())?, call.z)?;
    let [b_columns, a_columns] = gate_columns(sizes);
    device.delta_gates_forward(DeltaGatesForward {
        a: &cut(device, call.ba, a_columns)?,
        b: &cut(device, call.ba, b_columns)?,
        a_log: call.a_log,
        dt_bias: call.dt_bias,
        decay: call.decay,
        beta: call.beta,
    })
}

/// See [`DeltaOps::delta_inputs_backward`].
pub(crate) fn inputs_backward<D: DeltaOps + GateOps + ConvolutionOps>(
    device: &D,
    call: DeltaInputsBackward<'_, D>,
) -> Result<()> {
    let sizes = contract::delta_inputs_backward(&call)?;
    let heads = [sizes.tokens, sizes.key_heads, sizes.key_dim];
    let [q_columns, k_columns, v_columns, z_columns] = fused_columns(sizes);
    let [q_taps, k_taps, v_taps] = call.taps;
    let convolved_back = |x: &Tensor<D>, weight: &Tensor<D>, dy: &Tensor<D>| -> Result<Tensor<D>> {
        let mut dx = device.alloc(x.dtype(), x.shape())?;
        device.convolution_backward(ConvolutionBackward {
            x,
            weight,
            bias: None,
            segments: call.segments,
            dy,
            dx: &mut dx,
        })?;
        Ok(dx)
    };
    for (columns, taps, dy) in [(q_columns, q_taps, call.dq), (k_columns, k_taps, call.dk)] {
        let x = cut(device, call.fused, columns)?;
        let raw = convolved(device, &x, taps, call.segments)?.reshaped(heads)?;
        let mut unit = device.alloc(raw.dtype(), heads)?;
        let mut rnorm = device.alloc(DType::F32, [sizes.tokens * sizes.key_heads])?;
        device.l2_norm_forward(&raw, call.eps, &mut unit, &mut rnorm)?;
        device.l2_norm_backward(&raw, &rnorm, dy, &mut unit)?;
        let dx = convolved_back(&x, taps, &unit.reshaped(x.shape())?)?;
        put(device, &dx, call.dfused, columns)?;
    }
    let x = cut(device, call.fused, v_columns)?;
    let mut dy = device.alloc(x.dtype(), call.dv.shape())?;
    device.copy(call.dv, &mut dy)?;
    let dx = convolved_back(&x, v_taps, &dy.reshaped(x.shape())?)?;
    put(device, &dx, call.dfused, v_columns)?;
    put(device, call.dz, call.dfused, z_columns)?;
    let [b_columns, a_columns] = gate_columns(sizes);
    let a = cut(device, call.ba, a_columns)?;
    let (mut da, mut db) = (device.alloc(a.dtype(), a.shape())?, device.alloc(a.dtype(), a.shape())?);
    device.delta_gates_backward(DeltaGatesBackward {
        a: &a,
        a_log: call.a_log,
        dt_bias: call.dt_bias,
        beta: call.beta,
        ddecay: call.ddecay,
        dbeta: call.dbeta,
        da: &mut da,
        db: &mut db,
    })?;
    put(device, &db, call.dba, b_columns)?;
    put(device, &da, call.dba, a_columns)
}
