//! Gates and gated norms, which have no kernel yet, and columns, which `rows.cu` moves.

use super::{Gpu, Runtime};
use crate::error::Result;
use crate::ops::{Columns, GateOps, GatedNormBackward, GatedNormForward, SigmoidGateBackward, Write};
use crate::tensor::Tensor;

impl<R: Runtime> GateOps for Gpu<R> {
    fn sigmoid_gate_forward(&self, _: &Tensor<Self>, _: &Tensor<Self>, _: &mut Tensor<Self>, _: Write) -> Result<()> {
        self.absent("sigmoid_gate_forward")
    }

    fn sigmoid_gate_backward(&self, _: SigmoidGateBackward<'_, Self>) -> Result<()> {
        self.absent("sigmoid_gate_backward")
    }

    fn gated_norm_forward(&self, _: GatedNormForward<'_, Self>) -> Result<()> {
        self.absent("gated_norm_forward")
    }

    fn gated_norm_backward(&self, _: GatedNormBackward<'_, Self>) -> Result<()> {
        self.absent("gated_norm_backward")
    }

    fn l2_norm_forward(&self, _: &Tensor<Self>, _: f32, _: &mut Tensor<Self>, _: &mut Tensor<Self>) -> Result<()> {
        self.absent("l2_norm_forward")
    }

    fn l2_norm_backward(
        &self,
        _: &Tensor<Self>,
        _: &Tensor<Self>,
        _: &Tensor<Self>,
        _: &mut Tensor<Self>,
    ) -> Result<()> {
        self.absent("l2_norm_backward")
    }

    fn copy_columns(&self, source: &Tensor<Self>, target: &mut Tensor<Self>, columns: Columns) -> Result<()> {
        self.move_columns(source, target, columns)
    }
}
