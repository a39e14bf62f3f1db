//! Mixture of experts: routing and grouped rows (`moe.cu`), layers of experts (`grouped.cu`, `grouped_hopper.cu`, `grouped_f32.cu`).
//!
//! | file | what |
//! |---|---|
//! | `routing` | choosing experts, grouping rows by them |
//! | `rows` | the activation and the sum of grouped rows |
//! | `linear` | the passes of a grouped layer, written once for both precisions |
//! | `tensor`, `exact` | the products of the two precisions |
//! | `fused` | both wide projections with their activation, the way back through them, the sum behind the last one |
//! | `hopper`, `hopper_fused` | products and fused ops on sm_90a, and when |
//! | `stack` | one expert's matrix to its place |

mod exact;
mod fused;
mod hopper;
mod hopper_fused;
mod linear;
mod routing;
mod rows;
mod stack;
mod tensor;

use super::family::Family;
use super::{Gpu, Kernel, Runtime, sources};
use crate::error::Result;
use crate::ops::{
    CombineResidual, GroupedLinearBackward, GroupedLinearForward, GroupedPairBackward, GroupedSwigluForward, MoeOps,
    Op, RouteBackward, RoutedSwigluBackward, Routing, Write,
};
use crate::stack::WeightStack;
use crate::tensor::Tensor;
use crate::weight::Weight;

pub(super) static FAMILY: Family = Family {
    source: &sources::MOE,
    kernels: &[
        &routing::ROUTE,
        &routing::ROUTE_BACKWARD,
        &routing::GROUP_COUNT,
        &routing::GROUP_OFFSETS,
        &routing::GROUP_PLACE,
        &rows::SWIGLU_FORWARD,
        &rows::SWIGLU_BACKWARD,
        &rows::COMBINE,
        &fused::COMBINE_RESIDUAL,
        &stack::STACK_PART,
        &stack::STACK_VALUE,
    ],
    ops: &[
        Op::Route,
        Op::RouteBackward,
        Op::RoutedSwigluForward,
        Op::RoutedSwigluBackward,
        Op::Combine,
        Op::CombineResidual,
        Op::StackExpert,
    ],
};

pub(super) static TENSOR_FAMILY: Family = Family {
    source: &sources::GROUPED,
    kernels: tensor::KERNELS,
    ops: &[
        Op::GroupedLinearForward,
        Op::GroupedLinearBackward,
        Op::GroupedSwigluForward,
        Op::GroupedPairBackward,
    ],
};

pub(super) static HOPPER_FAMILY: Family = Family {
    source: &sources::GROUPED_HOPPER,
    kernels: hopper::KERNELS,
    ops: &[],
};

pub(super) static EXACT_FAMILY: Family = Family {
    source: &sources::GROUPED_F32,
    kernels: exact::KERNELS,
    ops: &[],
};

/// Threads of a block of the kernels of `moe.cu` that have a warp a row.
const THREADS: u32 = 256;

/// A kernel of `moe.cu`.
const fn kernel(
    stem: &'static str,
    types: &'static [&'static [crate::dtype::DType]],
    threads: u32,
    parameters: &'static [(&'static str, super::kernel::Parameter)],
) -> Kernel {
    Kernel {
        source: &sources::MOE,
        stem,
        types,
        threads,
        parameters,
    }
}

impl<R: Runtime> MoeOps for Gpu<R> {
    fn route(&self, logits: &Tensor<Self>, renormalise: bool, routing: &mut Routing<Self>) -> Result<()> {
        self.choose_experts(logits, renormalise, routing)
    }

    fn route_backward(&self, call: RouteBackward<'_, Self>) -> Result<()> {
        self.through_choice(call)
    }

    fn grouped_linear_forward(&self, call: GroupedLinearForward<'_, Self>) -> Result<()> {
        self.forward_through_experts(call)
    }

    fn grouped_linear_backward(&self, call: GroupedLinearBackward<'_, Self>) -> Result<()> {
        self.backward_through_experts(call)
    }

    fn routed_swiglu_forward(
        &self,
        gate: &Tensor<Self>,
        up: &Tensor<Self>,
        routing: &Routing<Self>,
        y: &mut Tensor<Self>,
    ) -> Result<()> {
        self.activate_rows(gate, up, routing, y)
    }

    fn routed_swiglu_backward(&self, call: RoutedSwigluBackward<'_, Self>) -> Result<()> {
        self.through_activation(call)
    }

    fn combine(
        &self,
        grouped: &Tensor<Self>,
        routing: &Routing<Self>,
        y: &mut Tensor<Self>,
        write: Write,
    ) -> Result<()> {
        self.combine_rows(grouped, routing, y, write)
    }

    fn grouped_swiglu_forward(&self, call: GroupedSwigluForward<'_, Self>) -> Result<()> {
        self.open_experts(call)
    }

    fn grouped_pair_backward(&self, call: GroupedPairBackward<'_, Self>) -> Result<()> {
        self.back_through_pair(call)
    }

    fn combine_residual(&self, call: CombineResidual<'_, Self>) -> Result<()> {
        self.combine_into(call)
    }

    fn stack_expert(&self, weight: &Weight<Self>, expert: usize, stack: &mut WeightStack<Self>) -> Result<()> {
        self.place_expert(weight, expert, stack)
    }
}
