//! Mixture of experts: routing, and the ops on grouped rows.

mod grouped;
mod matrix;
mod routing;

use self::routing::Groups;
use super::Cpu;
use super::activation::logistic;
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
        self.for_rows(floats_mut(OP, "y", y)?, width, |first, y| {
            for (row, y) in y.chunks_exact_mut(width).enumerate() {
                let (at, weight) = ((first + row) * width, weights[groups.slot(first + row)]);
                for ((y, gate), up) in y.iter_mut().zip(&gate[at..]).zip(&up[at..]) {
                    *y = weight * (gate * logistic(*gate) * up);
                }
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
        let dgate = floats_mut(OP, "dgate", call.dgate)?;
        self.for_rows2(
            (dgate, floats_mut(OP, "dup", call.dup)?),
            (width, width),
            |first, dgate, dup| {
                for (i, (dgate, dup)) in dgate.iter_mut().zip(dup).enumerate() {
                    let at = first * width + i;
                    let (gate, up, dy) = (gate[at], up[at], weights[groups.slot(at / width)] * dy[at]);
                    let sigma = logistic(gate);
                    *dup = dy * gate * sigma;
                    *dgate = dy * up * sigma * (1.0 + gate * (1.0 - sigma));
                }
            },
        );
        let dweights = floats_mut(OP, "dweights", call.dweights)?;
        self.for_rows(dweights, 1, |first, dweights| {
            for (slot, dweight) in dweights.iter_mut().enumerate() {
                let at = groups.row(first + slot) * width;
                let terms = gate[at..at + width].iter().zip(&up[at..]).zip(&dy[at..]);
                let sum: f64 = terms
                    .map(|((gate, up), dy)| f64::from(gate * logistic(*gate) * up) * f64::from(*dy))
                    .sum();
                *dweight = sum as f32;
            }
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
        self.for_rows(floats_mut(OP, "y", y)?, width, |first, y| {
            for (row, y) in y.chunks_exact_mut(width).enumerate() {
                if write == Write::Overwrite {
                    y.fill(0.0);
                }
                let slot = (first + row) * sizes.top;
                for slot in slot..slot + sizes.top {
                    let source = &grouped[groups.row(slot) * width..][..width];
                    for (y, value) in y.iter_mut().zip(source) {
                        *y += value;
                    }
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
