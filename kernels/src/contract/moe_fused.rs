//! Fused ops of routed experts.

use super::Rules;
use super::moe::{GroupedSizes, RoutingSizes, adapters, combine, grouped_activations, routing_sizes, stack};
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::{CombineResidual, Device, GroupedPairBackward, GroupedSwigluForward, RowOrder};
use crate::stack::{Nf4StackScales, WeightStack};
use crate::tensor::Tensor;

/// Sizes of both projections: `outputs` is `F`.
pub(crate) fn grouped_swiglu_forward<D: Device>(call: &GroupedSwigluForward<'_, D>) -> Result<GroupedSizes> {
    let rules = Rules("grouped_swiglu_forward");
    let routing = routing_sizes(rules, call.routing)?;
    let (outputs, inputs) = alike(rules, call.gate, call.up, routing.experts)?;
    rules.alike("x", call.x, call.x)?;
    rules.shape("x", call.x, "[T, I]", &[routing.tokens, inputs])?;
    let wide = call.wide.as_ref();
    let written = [
        ("gate", wide.map(|(gate, _)| &**gate)),
        ("up", wide.map(|(_, up)| &**up)),
        ("y", call.y.as_deref()),
    ];
    for (argument, tensor) in written {
        let Some(tensor) = tensor else { continue };
        rules.alike(argument, tensor, call.x)?;
        rules.shape(argument, tensor, "[M, F]", &[routing.slots(), outputs])?;
    }
    let mut rank = 0;
    if let Some(lora) = &call.lora {
        rank = adapters(rules, lora.a, lora.b, (routing.experts, 2 * outputs, inputs))?;
        hidden(rules, lora.hidden, routing, rank)?;
    }
    Ok(GroupedSizes {
        routing,
        inputs,
        outputs,
        rank,
    })
}

/// Sizes of both projections: `outputs` is `F`.
pub(crate) fn grouped_pair_backward<D: Device>(call: &GroupedPairBackward<'_, D>) -> Result<GroupedSizes> {
    let rules = Rules("grouped_pair_backward");
    let routing = routing_sizes(rules, call.routing)?;
    let (outputs, inputs) = alike(rules, call.gate, call.up, routing.experts)?;
    grouped_activations(rules, &[("dgate", call.dgate), ("dup", call.dup)], routing)?;
    rules.shape("dgate", call.dgate, "[M, F]", &[routing.slots(), outputs])?;
    if let Some(dx) = &call.dx {
        rules.alike("dx", dx, call.dgate)?;
        rules.shape("dx", dx, "[M, I]", &[routing.slots(), inputs])?;
    }
    let mut rank = 0;
    if let Some(lora) = &call.lora {
        let experts = routing.experts;
        rank = adapters(rules, lora.a, lora.b, (experts, 2 * outputs, inputs))?;
        rules.alike("lora.x", lora.x, call.dgate)?;
        let rows = match lora.x_order {
            RowOrder::Token => routing.tokens,
            RowOrder::Grouped => routing.slots(),
        };
        rules.shape("lora.x", lora.x, "[T, I] or [M, I]", &[rows, inputs])?;
        hidden(rules, lora.hidden, routing, rank)?;
        for (argument, tensor, shape) in [
            ("lora.gradient_a", &*lora.gradient_a, [experts, rank, inputs]),
            ("lora.gradient_b", &*lora.gradient_b, [experts, 2 * outputs, rank]),
        ] {
            rules.dtype(argument, tensor, &[DType::F32])?;
            rules.shape(argument, tensor, "[E, R, I] or [E, 2·F, R]", &shape)?;
        }
    }
    Ok(GroupedSizes {
        routing,
        inputs,
        outputs,
        rank,
    })
}

/// `C`, and the routing's sizes.
pub(crate) fn combine_residual<D: Device>(call: &CombineResidual<'_, D>) -> Result<(usize, RoutingSizes)> {
    let rules = Rules("combine_residual");
    let (width, sizes) = combine(call.grouped, call.routing, call.x)?;
    if let Some((shared, gate)) = call.shared {
        rules.alike("shared", shared, call.x)?;
        rules.shape("shared", shared, "[T, C]", &[sizes.tokens, width])?;
        rules.alike("gate", gate, call.x)?;
        rules.shape("gate", gate, "[T, 1]", &[sizes.tokens, 1])?;
    }
    Ok((width, sizes))
}

fn hidden<D: Device>(rules: Rules, tensor: &Tensor<D>, routing: RoutingSizes, rank: usize) -> Result<()> {
    rules.dtype("lora.hidden", tensor, &[DType::F32])?;
    rules.shape("lora.hidden", tensor, "[M, R]", &[routing.slots(), rank])
}

/// `(O, I)` of two stacks of one shape and encoding.
fn alike<D: Device>(
    rules: Rules,
    first: &WeightStack<D>,
    second: &WeightStack<D>,
    experts: usize,
) -> Result<(usize, usize)> {
    let extents = stack(rules, first, experts)?;
    let same = match (first, second) {
        (WeightStack::Dense(first), WeightStack::Dense(second)) => first.dtype() == second.dtype(),
        (WeightStack::Nf4(first), WeightStack::Nf4(second)) => matches!(
            (&first.scales, &second.scales),
            (Nf4StackScales::Flat(_), Nf4StackScales::Flat(_))
                | (Nf4StackScales::Nested { .. }, Nf4StackScales::Nested { .. })
        ),
        _ => false,
    };
    if stack(rules, second, experts)? == extents && same {
        return Ok(extents);
    }
    Err(rules.value(
        "up",
        format!(
            "is {} {:?}, but gate is {} {:?}",
            second.encoding(),
            second.extents(),
            first.encoding(),
            first.extents()
        ),
    ))
}
