//! Mixture of experts: routing, and the ops on grouped rows.

mod grouped;
mod matrix;
mod routing;

use self::routing::Groups;
use super::Cpu;
use super::scratch::with_local;
use super::simd::{gates, rows};
use super::view::{floats, floats_mut};
use crate::contract;
use crate::error::Result;
use crate::ops::{
    GroupedLinearBackward, GroupedLinearForward, MoeOps, RouteBackward, RoutedSwigluBackward, Routing, Write,
};
use crate::stack::WeightStack;
use crate::tensor::Tensor;
use crate::weight::Weight;

impl MoeOps for Cpu {
    fn route(&self, logits: &Tensor<Self>, renormalise: bool, routing: &mut Routing<Self>) -> Result<()> {
        const OP: &str = "route";
        let sizes = contract::route(logits, routing)?;
        let logits = floats(OP, "logits", logits)?;
        routing::choose(self, OP, logits, sizes, renormalise, routing)?;
        routing::group(OP, sizes, routing)
    }

    fn route_backward(&self, call: RouteBackward<'_, Self>) -> Result<()> {
        const OP: &str = "route_backward";
        let sizes = contract::route_backward(&call)?;
        routing::backward(self, OP, sizes, call)
    }

    fn grouped_linear_forward(&self, call: GroupedLinearForward<'_, Self>) -> Result<()> {
        grouped::forward(self, call)
    }

    fn grouped_linear_backward(&self, call: GroupedLinearBackward<'_, Self>) -> Result<()> {
        grouped::backward(self, call)
    }

    fn routed_swiglu_forward(
        &self,
        gate: &Tensor<Self>,
        up: &Tensor<Self>,
        routing: &Routing<Self>,
        y: &mut Tensor<Self>,
    ) -> Result<()> {
        const OP: &str = "routed_swiglu_forward";
        let (width, sizes) = contract::routed_swiglu_forward(gate, up, routing, y)?;
        let groups = Groups::new(OP, routing, sizes)?;
        let weights = floats(OP, "routing.weights", &routing.weights)?;
        let (gate, up) = (floats(OP, "gate", gate)?, floats(OP, "up", up)?);
        let simd = self.inner.simd;
        self.for_rows(floats_mut(OP, "y", y)?, width, |first, y| {
            for (row, y) in y.chunks_exact_mut(width).enumerate() {
                let at = (first + row) * width;
                rows::swiglu_forward(simd, &gate[at..], &up[at..], y);
                rows::scale(simd, y, weights[groups.slot(first + row)]);
            }
        });
        Ok(())
    }

    fn routed_swiglu_backward(&self, call: RoutedSwigluBackward<'_, Self>) -> Result<()> {
        const OP: &str = "routed_swiglu_backward";
        let (width, sizes) = contract::routed_swiglu_backward(&call)?;
        let groups = Groups::new(OP, call.routing, sizes)?;
        let weights = floats(OP, "routing.weights", &call.routing.weights)?;
        let (gate, up) = (floats(OP, "gate", call.gate)?, floats(OP, "up", call.up)?);
        let dy = floats(OP, "dy", call.dy)?;
        let simd = self.inner.simd;
        let outputs = (floats_mut(OP, "dgate", call.dgate)?, floats_mut(OP, "dup", call.dup)?);
        self.for_rows2(outputs, (width, width), |first, dgate, dup| {
            let outputs = dgate.chunks_exact_mut(width).zip(dup.chunks_exact_mut(width));
            with_local::<f32, _>(width, |weighted| {
                for (row, (dgate, dup)) in outputs.enumerate() {
                    let at = (first + row) * width;
                    gates::scaled(simd, &dy[at..], weights[groups.slot(first + row)], weighted);
                    rows::swiglu_backward(simd, &gate[at..], &up[at..], weighted, dgate, dup);
                }
            });
        });
        let dweights = floats_mut(OP, "dweights", call.dweights)?;
        self.for_rows(dweights, 1, |first, dweights| {
            with_local::<f32, _>(width, |activation| {
                for (slot, dweight) in dweights.iter_mut().enumerate() {
                    let at = groups.row(first + slot) * width;
                    rows::swiglu_forward(simd, &gate[at..], &up[at..], activation);
                    *dweight = rows::dot(simd, &dy[at..at + width], activation);
                }
            });
        });
        Ok(())
    }

    fn combine(
        &self,
        grouped: &Tensor<Self>,
        routing: &Routing<Self>,
        y: &mut Tensor<Self>,
        write: Write,
    ) -> Result<()> {
        const OP: &str = "combine";
        let (width, sizes) = contract::combine(grouped, routing, y)?;
        let groups = Groups::new(OP, routing, sizes)?;
        let grouped = floats(OP, "grouped", grouped)?;
        let simd = self.inner.simd;
        self.for_rows(floats_mut(OP, "y", y)?, width, |first, y| {
            for (row, y) in y.chunks_exact_mut(width).enumerate() {
                if write == Write::Overwrite {
                    y.fill(0.0);
                }
                let slot = (first + row) * sizes.top;
                for slot in slot..slot + sizes.top {
                    rows::add(simd, y, &grouped[groups.row(slot) * width..][..width]);
                }
            }
        });
        Ok(())
    }

    fn stack_expert(&self, weight: &Weight<Self>, expert: usize, stack: &mut WeightStack<Self>) -> Result<()> {
        contract::stack_expert(weight, expert, stack)?;
        matrix::place(weight, expert, stack)
    }
}
