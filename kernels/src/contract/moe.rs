//! Mixture of experts.

use super::{DENSE, Rules};
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::{
    Device, GroupedLinearBackward, GroupedLinearForward, RouteBackward, RoutedSwigluBackward, Routing, RowOrder,
};
use crate::stack::{Nf4Stack, Nf4StackScales, WeightStack};
use crate::tensor::Tensor;
use crate::weight::{NF4_BLOCK, NF4_NESTED_BLOCK, Nf4Scales, Weight};

/// `T`, `E` and `k` of a routing whose tensors fit each other.
#[derive(Clone, Copy)]
pub(crate) struct RoutingSizes {
    pub(crate) tokens: usize,
    pub(crate) experts: usize,
    pub(crate) top: usize,
}

impl RoutingSizes {
    /// `M`.
    pub(crate) fn slots(self) -> usize {
        self.tokens * self.top
    }

    fn rows(self, order: RowOrder) -> usize {
        match order {
            RowOrder::Token => self.tokens,
            RowOrder::Grouped => self.slots(),
        }
    }
}

/// `E`, `I`, `O` and `R` (0 without adapters), and the routing's sizes.
#[derive(Clone, Copy)]
pub(crate) struct GroupedSizes {
    pub(crate) routing: RoutingSizes,
    pub(crate) inputs: usize,
    pub(crate) outputs: usize,
    pub(crate) rank: usize,
}

pub(crate) fn route<D: Device>(logits: &Tensor<D>, routing: &Routing<D>) -> Result<RoutingSizes> {
    let rules = Rules("route");
    let sizes = routing_sizes(rules, routing)?;
    router_logits(rules, "logits", logits, sizes)?;
    Ok(sizes)
}

pub(crate) fn route_backward<D: Device>(call: &RouteBackward<'_, D>) -> Result<RoutingSizes> {
    let rules = Rules("route_backward");
    let sizes = routing_sizes(rules, call.routing)?;
    router_logits(rules, "logits", call.logits, sizes)?;
    router_logits(rules, "dlogits", call.dlogits, sizes)?;
    rules.dtype("dweights", call.dweights, &[DType::F32])?;
    rules.shape("dweights", call.dweights, "[T, k]", &[sizes.tokens, sizes.top])?;
    Ok(sizes)
}

pub(crate) fn grouped_linear_forward<D: Device>(call: &GroupedLinearForward<'_, D>) -> Result<GroupedSizes> {
    let rules = Rules("grouped_linear_forward");
    let routing = routing_sizes(rules, call.routing)?;
    let (outputs, inputs) = stack(rules, call.weight, routing.experts)?;
    rules.alike("x", call.x, call.x)?;
    rules.alike("y", call.y, call.x)?;
    rules.shape(
        "x",
        call.x,
        letters(call.x_order, "I"),
        &[routing.rows(call.x_order), inputs],
    )?;
    rules.shape("y", call.y, "[M, O]", &[routing.slots(), outputs])?;
    let mut rank = 0;
    if let Some(lora) = &call.lora {
        rank = adapters(rules, lora.a, lora.b, (routing.experts, outputs, inputs))?;
        rules.dtype("lora.hidden", lora.hidden, &[DType::F32])?;
        rules.shape("lora.hidden", lora.hidden, "[M, R]", &[routing.slots(), rank])?;
    }
    Ok(GroupedSizes {
        routing,
        inputs,
        outputs,
        rank,
    })
}

pub(crate) fn grouped_linear_backward<D: Device>(call: &GroupedLinearBackward<'_, D>) -> Result<GroupedSizes> {
    let rules = Rules("grouped_linear_backward");
    let routing = routing_sizes(rules, call.routing)?;
    let (outputs, inputs) = stack(rules, call.weight, routing.experts)?;
    rules.alike("dy", call.dy, call.dy)?;
    let rows = routing.rows(call.dy_order);
    rules.shape("dy", call.dy, letters(call.dy_order, "O"), &[rows, outputs])?;
    if let Some((dx, _)) = &call.dx {
        rules.alike("dx", dx, call.dy)?;
        rules.shape("dx", dx, "[M, I]", &[routing.slots(), inputs])?;
    }
    let mut rank = 0;
    if let Some(lora) = &call.lora {
        let experts = routing.experts;
        rank = adapters(rules, lora.a, lora.b, (experts, outputs, inputs))?;
        rules.alike("lora.x", lora.x, call.dy)?;
        let rows = routing.rows(lora.x_order);
        rules.shape("lora.x", lora.x, letters(lora.x_order, "I"), &[rows, inputs])?;
        rules.dtype("lora.hidden", lora.hidden, &[DType::F32])?;
        rules.shape("lora.hidden", lora.hidden, "[M, R]", &[routing.slots(), rank])?;
        rules.dtype("lora.gradient_a", lora.gradient_a, &[DType::F32])?;
        rules.shape(
            "lora.gradient_a",
            lora.gradient_a,
            "[E, R, I]",
            &[experts, rank, inputs],
        )?;
        rules.dtype("lora.gradient_b", lora.gradient_b, &[DType::F32])?;
        rules.shape(
            "lora.gradient_b",
            lora.gradient_b,
            "[E, O, R]",
            &[experts, outputs, rank],
        )?;
    }
    Ok(GroupedSizes {
        routing,
        inputs,
        outputs,
        rank,
    })
}

/// `F`, and the routing's sizes.
pub(crate) fn routed_swiglu_forward<D: Device>(
    gate: &Tensor<D>,
    up: &Tensor<D>,
    routing: &Routing<D>,
    y: &Tensor<D>,
) -> Result<(usize, RoutingSizes)> {
    let rules = Rules("routed_swiglu_forward");
    let sizes = routing_sizes(rules, routing)?;
    let width = grouped_activations(rules, &[("gate", gate), ("up", up), ("y", y)], sizes)?;
    Ok((width, sizes))
}

/// `F`, and the routing's sizes.
pub(crate) fn routed_swiglu_backward<D: Device>(call: &RoutedSwigluBackward<'_, D>) -> Result<(usize, RoutingSizes)> {
    let rules = Rules("routed_swiglu_backward");
    let sizes = routing_sizes(rules, call.routing)?;
    let all = [
        ("gate", call.gate),
        ("up", call.up),
        ("dy", call.dy),
        ("dgate", &*call.dgate),
        ("dup", &*call.dup),
    ];
    let width = grouped_activations(rules, &all, sizes)?;
    rules.dtype("dweights", call.dweights, &[DType::F32])?;
    rules.shape("dweights", call.dweights, "[T, k]", &[sizes.tokens, sizes.top])?;
    Ok((width, sizes))
}

/// `C`, and the routing's sizes.
pub(crate) fn combine<D: Device>(
    grouped: &Tensor<D>,
    routing: &Routing<D>,
    y: &Tensor<D>,
) -> Result<(usize, RoutingSizes)> {
    let rules = Rules("combine");
    let sizes = routing_sizes(rules, routing)?;
    let width = grouped_activations(rules, &[("grouped", grouped)], sizes)?;
    rules.alike("y", y, grouped)?;
    rules.shape("y", y, "[T, C]", &[sizes.tokens, width])?;
    Ok((width, sizes))
}

/// The weight fits the stack, and the stack has such an expert.
pub(crate) fn stack_expert<D: Device>(weight: &Weight<D>, expert: usize, target: &WeightStack<D>) -> Result<()> {
    let rules = Rules("stack_expert");
    let (experts, outputs, inputs) = target.extents();
    stack(rules, target, experts)?;
    if expert >= experts {
        return Err(rules.value("expert", format!("is {expert}, but the stack has {experts}")));
    }
    let shape = super::weight_shape("stack_expert", "weight", weight)?;
    let alike = match (weight, target) {
        (Weight::Dense(weight), WeightStack::Dense(stack)) => weight.dtype() == stack.dtype(),
        (Weight::Nf4(weight), WeightStack::Nf4(stack)) => matches!(
            (&weight.scales, &stack.scales),
            (Nf4Scales::Flat(_), Nf4StackScales::Flat(_)) | (Nf4Scales::Nested { .. }, Nf4StackScales::Nested { .. })
        ),
        _ => false,
    };
    if alike && shape == (outputs, inputs) {
        return Ok(());
    }
    let (given, wanted) = (weight.encoding(), target.encoding());
    Err(rules.value(
        "weight",
        format!("is {given} {shape:?}, but the stack is of {wanted} ({outputs}, {inputs})"),
    ))
}

fn letters(order: RowOrder, width: &str) -> &'static str {
    match (order, width) {
        (RowOrder::Token, "I") => "[T, I]",
        (RowOrder::Token, _) => "[T, O]",
        (RowOrder::Grouped, "I") => "[M, I]",
        (RowOrder::Grouped, _) => "[M, O]",
    }
}

pub(super) fn routing_sizes<D: Device>(rules: Rules, routing: &Routing<D>) -> Result<RoutingSizes> {
    let integers = [
        ("routing.experts", &routing.experts),
        ("routing.slots", &routing.slots),
        ("routing.rows", &routing.rows),
        ("routing.offsets", &routing.offsets),
    ];
    for (argument, tensor) in integers {
        rules.dtype(argument, tensor, &[DType::I32])?;
    }
    rules.dtype("routing.weights", &routing.weights, &[DType::F32])?;
    let [tokens, top] = rules.extents("routing.experts", &routing.experts, "[T, k]")?;
    rules.shape("routing.weights", &routing.weights, "[T, k]", &[tokens, top])?;
    rules.shape("routing.slots", &routing.slots, "[M]", &[tokens * top])?;
    rules.shape("routing.rows", &routing.rows, "[M]", &[tokens * top])?;
    let [bounds] = rules.extents("routing.offsets", &routing.offsets, "[E + 1]")?;
    let experts = bounds.saturating_sub(1);
    if top == 0 || top > experts {
        return Err(rules.value(
            "routing",
            format!("sends a token to k = {top} of E = {experts} experts"),
        ));
    }
    if i32::try_from(tokens * top).is_err() {
        return Err(rules.value(
            "routing",
            format!("has {} slots, more than an i32 counts", tokens * top),
        ));
    }
    Ok(RoutingSizes { tokens, experts, top })
}

fn router_logits<D: Device>(
    rules: Rules,
    argument: &'static str,
    tensor: &Tensor<D>,
    sizes: RoutingSizes,
) -> Result<()> {
    rules.dtype(argument, tensor, &[DType::F32])?;
    rules.shape(argument, tensor, "[T, E]", &[sizes.tokens, sizes.experts])
}

/// The common width of activations with one row per slot.
pub(super) fn grouped_activations<D: Device>(
    rules: Rules,
    tensors: &[(&'static str, &Tensor<D>)],
    sizes: RoutingSizes,
) -> Result<usize> {
    let mut common = None;
    for (argument, tensor) in tensors {
        let (_, first) = tensors[0];
        rules.alike(argument, tensor, first)?;
        let [_, width] = rules.extents(argument, tensor, "[M, F]")?;
        let width = *common.get_or_insert(width);
        rules.shape(argument, tensor, "[M, F]", &[sizes.slots(), width])?;
    }
    Ok(common.unwrap_or(0))
}

/// `(O, I)` of a well-formed stack of `experts` matrices.
pub(super) fn stack<D: Device>(rules: Rules, weight: &WeightStack<D>, experts: usize) -> Result<(usize, usize)> {
    match weight {
        WeightStack::Dense(tensor) => {
            rules.dtype("weight", tensor, DENSE)?;
            let [_, outputs, inputs] = rules.extents("weight", tensor, "[E, O, I]")?;
            rules.shape("weight", tensor, "[E, O, I]", &[experts, outputs, inputs])?;
            Ok((outputs, inputs))
        }
        WeightStack::Nf4(stack) => {
            nf4_stack(rules, stack, experts)?;
            Ok((stack.outputs, stack.inputs))
        }
    }
}

fn nf4_stack<D: Device>(rules: Rules, stack: &Nf4Stack<D>, experts: usize) -> Result<()> {
    if stack.experts != experts {
        return Err(rules.value(
            "weight",
            format!("has {} experts, the routing {experts}", stack.experts),
        ));
    }
    let elements = stack.outputs * stack.inputs;
    let blocks = elements.div_ceil(NF4_BLOCK);
    rules.dtype("codes", &stack.codes, &[DType::U8])?;
    let bytes = elements.div_ceil(2);
    rules.shape("codes", &stack.codes, "[E, ceil(O·I / 2)]", &[experts, bytes])?;
    match &stack.scales {
        Nf4StackScales::Flat(absmax) => {
            rules.dtype("absmax", absmax, &[DType::F32])?;
            rules.shape("absmax", absmax, "[E, blocks]", &[experts, blocks])
        }
        Nf4StackScales::Nested {
            codes,
            nested_absmax,
            nested_code,
            offsets,
        } => {
            rules.dtype("absmax codes", codes, &[DType::U8])?;
            rules.shape("absmax codes", codes, "[E, blocks]", &[experts, blocks])?;
            rules.dtype("nested_absmax", nested_absmax, &[DType::F32])?;
            let groups = blocks.div_ceil(NF4_NESTED_BLOCK);
            rules.shape(
                "nested_absmax",
                nested_absmax,
                "[E, ceil(blocks / 256)]",
                &[experts, groups],
            )?;
            rules.dtype("nested_code", nested_code, &[DType::F32])?;
            rules.shape("nested_code", nested_code, "[256]", &[256])?;
            rules.dtype("offsets", offsets, &[DType::F32])?;
            rules.shape("offsets", offsets, "[E]", &[experts])
        }
    }
}

/// `R` of adapters that fit a stack of `(E, O, I)`.
pub(super) fn adapters<D: Device>(
    rules: Rules,
    a: &Tensor<D>,
    b: &Tensor<D>,
    (experts, outputs, inputs): (usize, usize, usize),
) -> Result<usize> {
    rules.dtype("lora.a", a, &[DType::F32])?;
    rules.dtype("lora.b", b, &[DType::F32])?;
    let [_, rank, _] = rules.extents("lora.a", a, "[E, R, I]")?;
    rules.shape("lora.a", a, "[E, R, I]", &[experts, rank, inputs])?;
    rules.shape("lora.b", b, "[E, O, R]", &[experts, outputs, rank])?;
    Ok(rank)
}
