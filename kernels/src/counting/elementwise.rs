//! Norms, gates, activations, rows, the optimizer, quantising.

use super::{Counting, Work, bytes_of};
use crate::contract;
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::{
    ActivationOps, AdamW, BlockMoment, Columns, Device, EmbeddingOps, GateOps, GatedNormBackward, GatedNormForward,
    Noise, NormBackward, NormForward, NormOps, Op, OptimizerOps, QuantizeOps, RandomOps, SigmoidGateBackward, Write,
};
use crate::tensor::Tensor;
use crate::weight::{NF4_BLOCK, NF4_NESTED_BLOCK, Nf4Scales, Nf4Weight, Weight};

impl NormOps for Counting {
    fn rms_norm_forward(&self, call: NormForward<'_, Self>) -> Result<()> {
        contract::rms_norm_forward(&call)?;
        self.moved(Op::RmsNormForward, &[call.x, call.y]);
        Ok(())
    }

    fn rms_norm_backward(&self, call: NormBackward<'_, Self>) -> Result<()> {
        contract::rms_norm_backward(&call)?;
        self.moved(Op::RmsNormBackward, &[call.x, call.dy, call.dx.0]);
        Ok(())
    }
}

impl ActivationOps for Counting {
    fn add_assign(&self, y: &mut Tensor<Self>, x: &Tensor<Self>) -> Result<()> {
        contract::same_shape("add_assign", &[("y", y), ("x", x)])?;
        self.moved(Op::AddAssign, &[y, y, x]);
        Ok(())
    }

    fn swiglu_forward(&self, gate: &Tensor<Self>, up: &Tensor<Self>, y: &mut Tensor<Self>) -> Result<()> {
        contract::same_shape("swiglu_forward", &[("gate", gate), ("up", up), ("y", y)])?;
        self.moved(Op::SwigluForward, &[gate, up, y]);
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
        let tensors = [("gate", gate), ("up", up), ("dy", dy), ("dgate", dgate), ("dup", dup)];
        contract::same_shape("swiglu_backward", &tensors)?;
        self.moved(Op::SwigluBackward, &tensors.map(|(_, tensor)| tensor));
        Ok(())
    }
}

impl EmbeddingOps for Counting {
    fn gather_rows(&self, table: &Weight<Self>, ids: &Tensor<Self>, y: &mut Tensor<Self>) -> Result<()> {
        contract::gather_rows(table, ids, y)?;
        self.moved(Op::GatherRows, &[y, y]);
        Ok(())
    }

    fn copy_rows(&self, source: &Tensor<Self>, target: &mut Tensor<Self>, first: usize) -> Result<()> {
        contract::copy_rows(source, target, first)?;
        self.moved(Op::CopyRows, &[source, source]);
        Ok(())
    }
}

impl GateOps for Counting {
    fn sigmoid_gate_forward(
        &self,
        x: &Tensor<Self>,
        gate: &Tensor<Self>,
        y: &mut Tensor<Self>,
        _write: Write,
    ) -> Result<()> {
        contract::sigmoid_gate_forward(x, gate, y)?;
        self.moved(Op::SigmoidGateForward, &[x, gate, y]);
        Ok(())
    }

    fn sigmoid_gate_backward(&self, call: SigmoidGateBackward<'_, Self>) -> Result<()> {
        contract::sigmoid_gate_backward(&call)?;
        self.moved(
            Op::SigmoidGateBackward,
            &[call.x, call.gate, call.dy, call.dx, call.dgate],
        );
        Ok(())
    }

    fn gated_norm_forward(&self, call: GatedNormForward<'_, Self>) -> Result<()> {
        contract::gated_norm_forward(&call)?;
        self.moved(Op::GatedNormForward, &[call.x, call.gate, call.y]);
        Ok(())
    }

    fn gated_norm_backward(&self, call: GatedNormBackward<'_, Self>) -> Result<()> {
        contract::gated_norm_backward(&call)?;
        self.moved(
            Op::GatedNormBackward,
            &[call.x, call.gate, call.dy, call.dx, call.dgate],
        );
        Ok(())
    }

    fn l2_norm_forward(
        &self,
        x: &Tensor<Self>,
        _eps: f32,
        y: &mut Tensor<Self>,
        rnorm: &mut Tensor<Self>,
    ) -> Result<()> {
        contract::l2_norm_forward(x, y, rnorm)?;
        self.moved(Op::L2NormForward, &[x, y]);
        Ok(())
    }

    fn l2_norm_backward(
        &self,
        x: &Tensor<Self>,
        rnorm: &Tensor<Self>,
        dy: &Tensor<Self>,
        dx: &mut Tensor<Self>,
    ) -> Result<()> {
        contract::l2_norm_backward(x, rnorm, dy, dx)?;
        self.moved(Op::L2NormBackward, &[x, dy, dx]);
        Ok(())
    }

    fn copy_columns(&self, source: &Tensor<Self>, target: &mut Tensor<Self>, columns: Columns) -> Result<()> {
        contract::copy_columns(source, target, columns)?;
        let rows = source.shape().extents().first().copied().unwrap_or(1);
        let bytes = 2 * rows * columns.groups * columns.width * source.dtype().size_bytes();
        self.did(Work::moving(Op::CopyColumns, bytes as u64), &[]);
        Ok(())
    }
}

impl OptimizerOps for Counting {
    /// 0: there are no contents.
    fn squared_norm(&self, tensors: &[&Tensor<Self>]) -> Result<f64> {
        self.moved(Op::SquaredNorm, tensors);
        Ok(0.0)
    }

    fn adamw_step(
        &self,
        parameter: &mut Tensor<Self>,
        gradient: &Tensor<Self>,
        m: &mut Tensor<Self>,
        v: &mut Tensor<Self>,
        settings: &AdamW,
    ) -> Result<()> {
        contract::adamw_step(parameter, gradient, m, v, settings)?;
        let bytes = 2 * bytes_of(&[parameter, m, v]) + bytes_of(&[gradient]);
        self.did(Work::moving(Op::AdamwStep, bytes), &[]);
        Ok(())
    }

    fn adamw_8bit_step(
        &self,
        parameter: &mut Tensor<Self>,
        gradient: &Tensor<Self>,
        m: &mut BlockMoment<Self>,
        v: &mut BlockMoment<Self>,
        settings: &AdamW,
    ) -> Result<()> {
        contract::adamw_8bit_step(parameter, gradient, (m, v), settings)?;
        let moments = (m.size_bytes() + v.size_bytes()) as u64;
        let bytes = 2 * (bytes_of(&[parameter]) + moments) + bytes_of(&[gradient]);
        self.did(Work::moving(Op::Adamw8bitStep, bytes), &[]);
        Ok(())
    }
}

impl RandomOps for Counting {
    fn fill_random(&self, tensor: &mut Tensor<Self>, _key: u64, noise: Noise) -> Result<()> {
        contract::fill_random(tensor, noise)?;
        self.moved(Op::FillRandom, &[tensor]);
        Ok(())
    }
}

impl QuantizeOps for Counting {
    fn quantize_nf4(&self, source: &Tensor<Self>, nested: bool) -> Result<Nf4Weight<Self>> {
        let (outputs, inputs) = contract::quantize_nf4(source)?;
        let blocks = (outputs * inputs).div_ceil(NF4_BLOCK);
        let codes = self.alloc(DType::U8, [(outputs * inputs).div_ceil(2)])?;
        let flat = self.alloc(DType::F32, [blocks])?;
        let scales = match nested {
            false => Nf4Scales::Flat(flat),
            true => Nf4Scales::Nested {
                codes: self.alloc(DType::U8, [blocks])?,
                nested_absmax: self.alloc(DType::F32, [blocks.div_ceil(NF4_NESTED_BLOCK)])?,
                nested_code: self.alloc(DType::F32, [256])?,
                offset: 0.0,
            },
        };
        self.moved(Op::QuantizeNf4, &[source, &codes]);
        Ok(Nf4Weight {
            codes,
            scales,
            outputs,
            inputs,
        })
    }

    fn dequantize(&self, weight: &Weight<Self>, out: &mut Tensor<Self>) -> Result<()> {
        contract::dequantize(weight, out)?;
        let bytes = weight.size_bytes() as u64 + bytes_of(&[out]);
        self.did(Work::moving(Op::Dequantize, bytes), &[]);
        Ok(())
    }
}
