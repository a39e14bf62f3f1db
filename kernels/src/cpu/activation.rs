//! Element-wise ops.

use super::Cpu;
use super::simd::rows;
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
        let simd = self.inner.simd;
        self.for_rows(y, 1, |first, y| rows::add(simd, y, &x[first..]));
        Ok(())
    }

    fn swiglu_forward(&self, gate: &Tensor<Self>, up: &Tensor<Self>, y: &mut Tensor<Self>) -> Result<()> {
        const OP: &str = "swiglu_forward";
        contract::same_shape(OP, &[("gate", gate), ("up", up), ("y", &*y)])?;
        let (gate, up) = (floats(OP, "gate", gate)?, floats(OP, "up", up)?);
        let simd = self.inner.simd;
        self.for_rows(floats_mut(OP, "y", y)?, 1, |first, y| {
            rows::swiglu_forward(simd, &gate[first..], &up[first..], y);
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
        let simd = self.inner.simd;
        self.for_rows2(outputs, (1, 1), |first, dgate, dup| {
            rows::swiglu_backward(simd, &gate[first..], &up[first..], &dy[first..], dgate, dup);
        });
        Ok(())
    }
}
