//! Products: linear layers, routed experts, the head.

use super::scratch::{Kernels, floats};
use super::{Counting, Work, bytes_of, decoded_bytes, gpu};
use crate::contract::{self, GroupedSizes, LinearSizes};
use crate::dtype::DType;
use crate::error::Result;
use crate::gpu::loss_extents;
use crate::ops::{
    GroupedLinearBackward, GroupedLinearForward, LinearBackward, LinearCrossEntropy, LinearForward, LossOps, MatmulOps,
    MoeOps, Op, Precision, RouteBackward, RoutedSwigluBackward, Routing, Write,
};
use crate::stack::WeightStack;
use crate::tensor::Tensor;
use crate::weight::Weight;

/// Operations of a product of these extents.
fn product(rows: usize, inner: usize, columns: usize) -> u64 {
    2 * rows as u64 * inner as u64 * columns as u64
}

/// Operations of an adapter's two products for `rows` rows.
fn through_adapter(rows: usize, sizes: (usize, usize), rank: usize) -> u64 {
    product(rows, rank, sizes.0 + sizes.1)
}

impl Counting {
    /// Bytes into which a layer's weight is decoded for a product of so many rows, apart from what a scope shares.
    fn decoded(&self, weight: &Weight<Self>, precision: Precision, rows: usize) -> u64 {
        let bytes = decoded_bytes(weight);
        let one = self.habits.decoded(weight.extents().1, precision, bytes);
        if let (Weight::Nf4(nf4), Precision::Bf16, Some(least), 0) = (weight, precision, self.habits.shares_from, one) {
            self.shared(&nf4.codes, (rows, least.linear), bytes);
        }
        one
    }

    /// As [`Counting::decoded`], of routed experts.
    fn decoded_of_experts(&self, weight: &WeightStack<Self>, precision: Precision, rows: usize) -> u64 {
        let bytes = decoded_stack(weight);
        let (experts, _, inputs) = weight.extents();
        let one = self.habits.decoded(inputs, precision, bytes);
        if let (WeightStack::Nf4(nf4), Precision::Bf16, Some(least), 0) =
            (weight, precision, self.habits.shares_from, one)
        {
            self.shared(&nf4.codes, (rows / experts.max(1), least.experts), bytes);
        }
        one
    }
}

impl MatmulOps for Counting {
    fn linear_forward(&self, call: LinearForward<'_, Self>) -> Result<()> {
        let sizes = contract::linear_forward(&call)?;
        let LinearSizes {
            tokens,
            inputs,
            outputs,
            rank,
        } = sizes;
        let work = Work {
            op: Op::LinearForward,
            flops: product(tokens, inputs, outputs) + through_adapter(tokens, (inputs, outputs), rank),
            bytes: bytes_of(&[call.x, call.y]) + call.weight.size_bytes() as u64,
            decoded_bytes: decoded_bytes(call.weight),
        };
        let decoded = self.decoded(call.weight, call.precision, tokens);
        match self.habits.kernels {
            Kernels::Cpu => {
                let hidden = if rank > 0 { self.habits.own(tokens, rank) } else { 0 };
                self.did(work, &[self.habits.left(tokens, inputs), hidden]);
            }
            Kernels::Gpu => self.did(work, &gpu::linear_forward(sizes, call.precision, decoded)),
        }
        Ok(())
    }

    fn linear_backward(&self, call: LinearBackward<'_, Self>) -> Result<()> {
        let sizes = contract::linear_backward(&call)?;
        let LinearSizes {
            tokens,
            inputs,
            outputs,
            rank,
        } = sizes;
        let mut work = Work::moving(Op::LinearBackward, bytes_of(&[call.dy]));
        let always = [self.habits.left(tokens, outputs), floats(tokens * rank)];
        if let Some(lora) = &call.lora {
            // v = dy·B, dA = vᵀ·x and dB = dyᵀ·u; v·A belongs to dx.
            work.flops += product(tokens, rank, 2 * outputs + inputs);
            work.bytes += bytes_of(&[lora.x, lora.gradient_a, lora.gradient_b]);
            let [turned, gradient] = [floats(tokens * rank), floats(rank * outputs)];
            let scratch = [turned, self.habits.left(rank, tokens), gradient, gradient];
            if self.habits.kernels == Kernels::Cpu {
                self.did(Work::moving(Op::LinearBackward, 0), &[&always[..], &scratch].concat());
            }
        }
        let (mut last, mut decoded) = (0, None);
        if let Some((dx, _)) = &call.dx {
            work.flops += product(tokens, inputs, outputs) + product(tokens, rank, inputs);
            work.bytes += bytes_of(&[dx]) + call.weight.size_bytes() as u64;
            work.decoded_bytes = decoded_bytes(call.weight);
            last = if rank > 0 { self.habits.left(tokens, rank) } else { 0 };
            decoded = Some(self.decoded(call.weight, call.precision, tokens));
        }
        match self.habits.kernels {
            Kernels::Cpu => self.did(work, &[always[0], always[1], last]),
            Kernels::Gpu => self.did(work, &gpu::linear_backward(sizes, call.precision, decoded)),
        }
        Ok(())
    }
}

impl LossOps for Counting {
    fn linear_cross_entropy(&self, call: LinearCrossEntropy<'_, Self>) -> Result<()> {
        let sizes = contract::linear_cross_entropy(&call)?;
        let LinearSizes {
            tokens,
            inputs,
            outputs,
            ..
        } = sizes;
        let products = if call.dx.is_some() { 2 } else { 1 };
        let rows = match self.habits.kernels {
            Kernels::Cpu => (self.habits.logits_bytes as usize / (4 * outputs.max(1))).clamp(1, tokens.max(1)),
            Kernels::Gpu => loss_extents(sizes, call.precision, call.dx.is_some()).chunk.max(1),
        };
        let work = Work {
            op: Op::LinearCrossEntropy,
            flops: products * product(tokens, inputs, outputs),
            // The head passes once in each product of a chunk of rows.
            bytes: products * (bytes_of(&[call.x]) + tokens.div_ceil(rows) as u64 * call.head.size_bytes() as u64),
            decoded_bytes: decoded_bytes(call.head),
        };
        let always = [floats(rows * outputs), floats(rows * inputs)];
        let decoded = self.habits.decoded(inputs, call.precision, work.decoded_bytes);
        let largest = self.habits.left(rows, inputs).max(floats(rows));
        match self.habits.kernels {
            Kernels::Cpu => self.did(work, &[always[0], always[1], largest]),
            Kernels::Gpu => self.did(work, &gpu::loss(sizes, call.precision, call.dx.is_some(), decoded)),
        }
        Ok(())
    }
}

/// Bytes of the matrices of the experts that have tokens, when each token takes any `k` of them: the share that is in use is
/// `1 − (1 − k / E)^T`.
fn used(weight_bytes: u64, sizes: &GroupedSizes) -> u64 {
    let routing = sizes.routing;
    let idle = (1.0 - routing.top as f64 / routing.experts.max(1) as f64).powf(routing.tokens as f64);
    (weight_bytes as f64 * (1.0 - idle)) as u64
}

fn decoded_stack(weight: &WeightStack<Counting>) -> u64 {
    let (experts, outputs, inputs) = weight.extents();
    match weight {
        WeightStack::Dense(_) => 0,
        WeightStack::Nf4(_) => (experts * outputs * inputs * DType::BF16.size_bytes()) as u64,
    }
}

impl MoeOps for Counting {
    fn route(&self, logits: &Tensor<Self>, _renormalise: bool, routing: &mut Routing<Self>) -> Result<()> {
        contract::route(logits, routing)?;
        let bytes = bytes_of(&[logits]) + routing.size_bytes() as u64;
        self.did(Work::moving(Op::Route, bytes), &[]);
        Ok(())
    }

    fn route_backward(&self, call: RouteBackward<'_, Self>) -> Result<()> {
        contract::route_backward(&call)?;
        self.moved(Op::RouteBackward, &[call.logits, call.dweights, call.dlogits]);
        Ok(())
    }

    fn grouped_linear_forward(&self, call: GroupedLinearForward<'_, Self>) -> Result<()> {
        let sizes = contract::grouped_linear_forward(&call)?;
        let rows = sizes.routing.slots();
        let ends = (sizes.inputs, sizes.outputs);
        let work = Work {
            op: Op::GroupedLinearForward,
            flops: product(rows, sizes.inputs, sizes.outputs) + through_adapter(rows, ends, sizes.rank),
            bytes: bytes_of(&[call.x, call.y]) + used(call.weight.size_bytes() as u64, &sizes),
            decoded_bytes: used(decoded_stack(call.weight), &sizes),
        };
        let decoded = self.decoded_of_experts(call.weight, call.precision, rows);
        match self.habits.kernels {
            Kernels::Cpu => self.did(work, &[]),
            Kernels::Gpu => self.did(work, &gpu::grouped_forward(sizes, call.precision, decoded)),
        }
        Ok(())
    }

    fn grouped_linear_backward(&self, call: GroupedLinearBackward<'_, Self>) -> Result<()> {
        let sizes = contract::grouped_linear_backward(&call)?;
        let (rows, rank) = (sizes.routing.slots(), sizes.rank);
        let mut work = Work::moving(Op::GroupedLinearBackward, bytes_of(&[call.dy]));
        let mut decoded = 0;
        if let Some(lora) = &call.lora {
            work.flops += product(rows, rank, 2 * sizes.outputs + sizes.inputs);
            work.bytes += bytes_of(&[lora.x, lora.gradient_a, lora.gradient_b]);
        }
        if let Some((dx, _)) = &call.dx {
            work.flops += product(rows, sizes.inputs, sizes.outputs) + product(rows, rank, sizes.inputs);
            work.bytes += bytes_of(&[dx]) + used(call.weight.size_bytes() as u64, &sizes);
            work.decoded_bytes = used(decoded_stack(call.weight), &sizes);
            decoded = self.decoded_of_experts(call.weight, call.precision, rows);
        }
        match self.habits.kernels {
            Kernels::Cpu => self.did(work, &[floats(rows * rank)]),
            Kernels::Gpu => self.did(work, &gpu::grouped_backward(sizes, call.precision, decoded)),
        }
        Ok(())
    }

    fn routed_swiglu_forward(
        &self,
        gate: &Tensor<Self>,
        up: &Tensor<Self>,
        routing: &Routing<Self>,
        y: &mut Tensor<Self>,
    ) -> Result<()> {
        contract::routed_swiglu_forward(gate, up, routing, y)?;
        self.moved(Op::RoutedSwigluForward, &[gate, up, y]);
        Ok(())
    }

    fn routed_swiglu_backward(&self, call: RoutedSwigluBackward<'_, Self>) -> Result<()> {
        contract::routed_swiglu_backward(&call)?;
        self.moved(
            Op::RoutedSwigluBackward,
            &[call.gate, call.up, call.dy, call.dgate, call.dup],
        );
        Ok(())
    }

    fn combine(
        &self,
        grouped: &Tensor<Self>,
        routing: &Routing<Self>,
        y: &mut Tensor<Self>,
        _write: Write,
    ) -> Result<()> {
        contract::combine(grouped, routing, y)?;
        self.moved(Op::Combine, &[grouped, y]);
        Ok(())
    }

    fn stack_expert(&self, weight: &Weight<Self>, expert: usize, stack: &mut WeightStack<Self>) -> Result<()> {
        contract::stack_expert(weight, expert, stack)
    }
}
