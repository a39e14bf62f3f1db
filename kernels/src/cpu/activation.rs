//! Element-wise ops.

use super::Cpu;
use super::view::{floats, floats_mut};
use crate::contract;
use crate::error::Result;
use crate::ops::ActivationOps;
use crate::tensor::Tensor;

impl ActivationOps for Cpu {
    fn add_assign(&self, y: &mut Tensor<Self>, x: &Tensor<Self>) -> Result<()> {
        contract::same_shape("add_assign", &[("y", &*y), ("x", x)])?;
        let x = floats("add_assign", "x", x)?;
        let y = floats_mut("add_assign", "y", y)?;
        self.for_rows(y, 1, |first, y| {
            for (y, x) in y.iter_mut().zip(&x[first..]) {
                *y += x;
            }
        });
        Ok(())
    }

    fn swiglu_forward(&self, gate: &Tensor<Self>, up: &Tensor<Self>, y: &mut Tensor<Self>) -> Result<()> {
        const OP: &str = "swiglu_forward";
        contract::same_shape(OP, &[("gate", gate), ("up", up), ("y", &*y)])?;
        let (gate, up) = (floats(OP, "gate", gate)?, floats(OP, "up", up)?);
        self.for_rows(floats_mut(OP, "y", y)?, 1, |first, y| {
            for ((y, gate), up) in y.iter_mut().zip(&gate[first..]).zip(&up[first..]) {
                *y = gate * logistic(*gate) * up;
            }
        });
        Ok(())
    }

    fn swiglu_backward(
        &self,
        gate: &Tensor<Self>,
        up: &Tensor<Self>,
        dy: &Tensor<Self>,
        dgate: &mut Tensor<Self>,
        dup: &mut Tensor<Self>,
    ) -> Result<()> {
        const OP: &str = "swiglu_backward";
        let all = [
            ("gate", gate),
            ("up", up),
            ("dy", dy),
            ("dgate", &*dgate),
            ("dup", &*dup),
        ];
        contract::same_shape(OP, &all)?;
        let (gate, up, dy) = (floats(OP, "gate", gate)?, floats(OP, "up", up)?, floats(OP, "dy", dy)?);
        let outputs = (floats_mut(OP, "dgate", dgate)?, floats_mut(OP, "dup", dup)?);
        self.for_rows2(outputs, (1, 1), |first, dgate, dup| {
            for (i, (dgate, dup)) in dgate.iter_mut().zip(dup).enumerate() {
                let (gate, up, dy) = (gate[first + i], up[first + i], dy[first + i]);
                let sigma = logistic(gate);
                *dup = dy * gate * sigma;
                *dgate = dy * up * sigma * (1.0 + gate * (1.0 - sigma));
            }
        });
        Ok(())
    }
}

pub(super) fn logistic(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}
