//! Mixture of experts, which has no kernel yet.

use super::{Gpu, Runtime};
use crate::error::Result;
use crate::ops::{
    GroupedLinearBackward, GroupedLinearForward, MoeOps, RouteBackward, RoutedSwigluBackward, Routing, Write,
};
use crate::stack::WeightStack;
use crate::tensor::Tensor;
use crate::weight::Weight;

impl<R: Runtime> MoeOps for Gpu<R> {
    fn route(&self, _: &Tensor<Self>, _: bool, _: &mut Routing<Self>) -> Result<()> {
        self.absent("route")
    }

    fn route_backward(&self, _: RouteBackward<'_, Self>) -> Result<()> {
        self.absent("route_backward")
    }

    fn grouped_linear_forward(&self, _: GroupedLinearForward<'_, Self>) -> Result<()> {
        self.absent("grouped_linear_forward")
    }

    fn grouped_linear_backward(&self, _: GroupedLinearBackward<'_, Self>) -> Result<()> {
        self.absent("grouped_linear_backward")
    }

    fn routed_swiglu_forward(
        &self,
        _: &Tensor<Self>,
        _: &Tensor<Self>,
        _: &Routing<Self>,
        _: &mut Tensor<Self>,
    ) -> Result<()> {
        self.absent("routed_swiglu_forward")
    }

    fn routed_swiglu_backward(&self, _: RoutedSwigluBackward<'_, Self>) -> Result<()> {
        self.absent("routed_swiglu_backward")
    }

    fn combine(&self, _: &Tensor<Self>, _: &Routing<Self>, _: &mut Tensor<Self>, _: Write) -> Result<()> {
        self.absent("combine")
    }

    fn stack_expert(&self, _: &Weight<Self>, _: usize, _: &mut WeightStack<Self>) -> Result<()> {
        self.absent("stack_expert")
    }
}
