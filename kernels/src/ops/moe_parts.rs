//! Fused ops of routed experts, put together from those that they stand for: what a backend without kernels of its own for them
//! does, and the meaning of those that have some.

use crate::contract;
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::{
    ActivationOps, Columns, CombineResidual, GateOps, GroupedLinearBackward, GroupedLinearForward, GroupedLoraBackward,
    GroupedLoraForward, GroupedPairBackward, GroupedSwigluForward, MoeOps, RowOrder, Write,
};
use crate::stack::WeightStack;
use crate::tensor::Tensor;

/// The gate's (0) or the up projection's (1) half of `[E, 2·F, R]`.
fn half_columns(width: usize, half: usize) -> Columns {
    Columns {
        groups: 1,
        source: half * width,
        target: 0,
        width,
    }
}

/// One half of `[E, 2·F, R]`, as `[E, F, R]`.
fn half_of<D: GateOps>(device: &D, whole: &Tensor<D>, stack: &WeightStack<D>, half: usize) -> Result<Tensor<D>> {
    let (experts, width, _) = stack.extents();
    let rank = whole.shape().row();
    let mut part = device.alloc(DType::F32, [experts, width, rank])?;
    device.copy_columns(whole, &mut part, half_columns(width * rank, half))?;
    Ok(part)
}

/// See [`MoeOps::grouped_swiglu_forward`].
pub(crate) fn swiglu_forward<D: MoeOps + GateOps>(device: &D, call: GroupedSwigluForward<'_, D>) -> Result<()> {
    let sizes = contract::grouped_swiglu_forward(&call)?;
    let shape = [sizes.routing.slots(), sizes.outputs];
    let mut lora = call.lora;
    let project =
        |weight: &WeightStack<D>, half: usize, lora: &mut Option<GroupedLoraForward<'_, D>>, y: &mut Tensor<D>| {
            let b = match lora {
                Some(lora) => Some(half_of(device, lora.b, weight, half)?),
                None => None,
            };
            // Both halves write the same `u`.
            let lora = lora.as_mut().zip(b.as_ref()).map(|(lora, b)| GroupedLoraForward {
                a: lora.a,
                b,
                scale: lora.scale,
                hidden: &mut *lora.hidden,
            });
            device.grouped_linear_forward(GroupedLinearForward {
                x: call.x,
                x_order: RowOrder::Token,
                routing: call.routing,
                weight,
                lora,
                precision: call.precision,
                y,
            })
        };
    let both = |gate: &mut Tensor<D>, up: &mut Tensor<D>| {
        project(call.gate, 0, &mut lora, gate)?;
        project(call.up, 1, &mut lora, up)?;
        match call.y {
            Some(y) => device.routed_swiglu_forward(gate, up, call.routing, y),
            None => Ok(()),
        }
    };
    match call.wide {
        Some((gate, up)) => both(gate, up),
        None => {
            let dtype = call.x.dtype();
            both(&mut device.alloc(dtype, shape)?, &mut device.alloc(dtype, shape)?)
        }
    }
}

/// See [`MoeOps::grouped_pair_backward`].
pub(crate) fn pair_backward<D: MoeOps + GateOps>(device: &D, call: GroupedPairBackward<'_, D>) -> Result<()> {
    contract::grouped_pair_backward(&call)?;
    let (mut lora, mut dx) = (call.lora, call.dx);
    let parts = [
        (call.gate, call.dgate, Write::Overwrite),
        (call.up, call.dup, Write::Accumulate),
    ];
    for (half, (weight, dy, write)) in parts.into_iter().enumerate() {
        let mut halves = match &lora {
            Some(lora) => Some((
                half_of(device, lora.b, weight, half)?,
                half_of(device, lora.gradient_b, weight, half)?,
            )),
            None => None,
        };
        let own = lora
            .as_mut()
            .zip(halves.as_mut())
            .map(|(lora, (b, gradient_b))| GroupedLoraBackward {
                x: lora.x,
                x_order: lora.x_order,
                a: lora.a,
                b,
                scale: lora.scale,
                hidden: lora.hidden,
                gradient_a: &mut *lora.gradient_a,
                gradient_b,
            });
        if own.is_none() && dx.is_none() {
            return Ok(());
        }
        device.grouped_linear_backward(GroupedLinearBackward {
            dy,
            dy_order: RowOrder::Grouped,
            routing: call.routing,
            weight,
            lora: own,
            precision: call.precision,
            dx: dx.as_deref_mut().map(|dx| (dx, write)),
        })?;
        if let (Some(lora), Some((_, gradient_b))) = (&mut lora, halves) {
            let width = gradient_b.shape().elements() / weight.extents().0.max(1);
            let Columns {
                groups,
                source,
                target,
                width,
            } = half_columns(width, half);
            let back = Columns {
                groups,
                source: target,
                target: source,
                width,
            };
            device.copy_columns(&gradient_b, lora.gradient_b, back)?;
        }
    }
    Ok(())
}

/// See [`MoeOps::combine_residual`].
pub(crate) fn combine_residual<D: MoeOps + GateOps + ActivationOps>(
    device: &D,
    call: CombineResidual<'_, D>,
) -> Result<()> {
    contract::combine_residual(&call)?;
    let mut y = device.alloc(call.x.dtype(), call.x.shape())?;
    device.combine(call.grouped, call.routing, &mut y, Write::Overwrite)?;
    if let Some((shared, gate)) = call.shared {
        device.sigmoid_gate_forward(shared, gate, &mut y, Write::Accumulate)?;
    }
    device.add_assign(call.x, &y)
}
