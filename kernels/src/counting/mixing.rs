//! What lets positions see each other: attention, the delta rule, convolution, rotations.

use super::scratch::{Kernels, floats};
use super::{Counting, Work, bytes_of, gpu};
use crate::contract::{self, AttentionSizes, DeltaSizes};
use crate::error::Result;
use crate::gpu::fuses_delta_inputs;
use crate::ops::{
    AttentionBackward, AttentionForward, AttentionOps, ConvolutionBackward, ConvolutionForward, ConvolutionOps,
    DELTA_CHUNK, DeltaBackward, DeltaForward, DeltaGatesBackward, DeltaGatesForward, DeltaInputsBackward,
    DeltaInputsForward, DeltaOps, Op, RopeDirection, RopeOps, RopeTable, delta_parts,
};
use crate::tensor::{Segments, Tensor};

/// Pairs of a query and a key that it sees, over all documents.
fn pairs(segments: &Segments) -> u64 {
    segments
        .ranges()
        .map(|range| range.len() as u64 * (range.len() as u64 + 1) / 2)
        .sum()
}

impl AttentionOps for Counting {
    fn attention_forward(&self, call: AttentionForward<'_, Self>) -> Result<()> {
        let AttentionSizes { heads, dim, .. } = contract::attention_forward(&call)?;
        let tokens = call.query_segments.tokens();
        let work = Work {
            op: Op::AttentionForward,
            // Scores and the sum of values.
            flops: 4 * pairs(call.key_segments) * (heads * dim) as u64,
            bytes: bytes_of(&[call.q, call.k, call.v, call.out, call.lse]),
            decoded_bytes: 0,
        };
        match self.habits.kernels {
            Kernels::Cpu => self.did(work, &[floats(tokens * heads * dim), floats(tokens * heads)]),
            Kernels::Gpu => self.did(work, &[]),
        }
        Ok(())
    }

    fn attention_backward(&self, call: AttentionBackward<'_, Self>) -> Result<()> {
        let AttentionSizes { heads, dim, .. } = contract::attention_backward(&call)?;
        let values = call.segments.tokens() * heads * dim;
        let work = Work {
            op: Op::AttentionBackward,
            // Scores again, dp, dq, dk and dv.
            flops: 10 * pairs(call.segments) * (heads * dim) as u64,
            bytes: bytes_of(&[call.q, call.k, call.v, call.out, call.dout, call.dq, call.dk, call.dv]),
            decoded_bytes: 0,
        };
        match self.habits.kernels {
            Kernels::Cpu => self.did(work, &[floats(3 * values)]),
            Kernels::Gpu => self.did(work, &[gpu::attention_backward(call.segments.tokens(), heads)]),
        }
        Ok(())
    }
}

/// Operations of the chunked form, forward, per token and value head: three products with the state, and within a chunk the
/// scores, the solve and two sums, half of each below the diagonal.
fn delta_flops(sizes: &DeltaSizes) -> u64 {
    let state = 6 * sizes.key_dim * sizes.value_dim;
    let within = DELTA_CHUNK * (2 * sizes.key_dim + 2 * sizes.value_dim + DELTA_CHUNK / 3);
    (sizes.tokens * sizes.value_heads * (state + within)) as u64
}

impl DeltaOps for Counting {
    fn delta_rule_forward(&self, call: DeltaForward<'_, Self>) -> Result<()> {
        let sizes = contract::delta_rule_forward(&call)?;
        let work = Work {
            op: Op::DeltaRuleForward,
            flops: delta_flops(&sizes),
            bytes: bytes_of(&[call.q, call.k, call.v, call.out, call.solved]),
            decoded_bytes: 0,
        };
        match self.habits.kernels {
            Kernels::Cpu => self.did(work, &[]),
            Kernels::Gpu => self.did(work, &[gpu::delta_forward(sizes, call.segments.len(), call.q.dtype())]),
        }
        Ok(())
    }

    fn delta_rule_backward(&self, call: DeltaBackward<'_, Self>) -> Result<()> {
        let sizes = contract::delta_rule_backward(&call)?;
        let scratch = match self.habits.kernels {
            Kernels::Cpu => 0,
            Kernels::Gpu => gpu::delta_backward(sizes, call.segments.len(), call.q.dtype()),
        };
        let work = Work {
            op: Op::DeltaRuleBackward,
            // The states again, and two products for each of the forward pass's.
            flops: 5 * delta_flops(&sizes) / 2,
            bytes: bytes_of(&[
                call.q,
                call.k,
                call.v,
                call.solved,
                call.dout,
                call.dq,
                call.dk,
                call.dv,
            ]) + 2 * scratch,
            decoded_bytes: 0,
        };
        self.did(work, &[scratch]);
        Ok(())
    }

    fn delta_inputs_forward(&self, call: DeltaInputsForward<'_, Self>) -> Result<()> {
        let sizes = contract::delta_inputs_forward(&call)?;
        if self.habits.kernels == Kernels::Cpu || !fuses_delta_inputs(sizes, call.taps) {
            return delta_parts::inputs_forward(self, call);
        }
        let tensors = [
            call.fused, call.ba, call.q, call.k, call.v, call.z, call.decay, call.beta,
        ];
        self.moved(Op::DeltaInputsForward, &tensors);
        Ok(())
    }

    fn delta_inputs_backward(&self, call: DeltaInputsBackward<'_, Self>) -> Result<()> {
        let sizes = contract::delta_inputs_backward(&call)?;
        if self.habits.kernels == Kernels::Cpu || !fuses_delta_inputs(sizes, call.taps) {
            return delta_parts::inputs_backward(self, call);
        }
        let tensors = [
            call.fused,
            call.ba,
            call.dq,
            call.dk,
            call.dv,
            call.dz,
            call.dfused,
            call.dba,
        ];
        self.moved(Op::DeltaInputsBackward, &tensors);
        Ok(())
    }

    fn delta_gates_forward(&self, call: DeltaGatesForward<'_, Self>) -> Result<()> {
        contract::delta_gates_forward(&call)?;
        self.moved(Op::DeltaGatesForward, &[call.a, call.b, call.decay, call.beta]);
        Ok(())
    }

    fn delta_gates_backward(&self, call: DeltaGatesBackward<'_, Self>) -> Result<()> {
        contract::delta_gates_backward(&call)?;
        self.moved(
            Op::DeltaGatesBackward,
            &[call.a, call.beta, call.ddecay, call.dbeta, call.da, call.db],
        );
        Ok(())
    }
}

impl ConvolutionOps for Counting {
    fn convolution_forward(&self, call: ConvolutionForward<'_, Self>) -> Result<()> {
        contract::convolution_forward(&call)?;
        self.moved(Op::ConvolutionForward, &[call.x, call.y]);
        Ok(())
    }

    fn convolution_backward(&self, call: ConvolutionBackward<'_, Self>) -> Result<()> {
        contract::convolution_backward(&call)?;
        let work = Work::moving(Op::ConvolutionBackward, bytes_of(&[call.x, call.dy, call.dx]));
        match self.habits.kernels {
            Kernels::Cpu => self.did(work, &[floats(call.x.shape().elements())]),
            Kernels::Gpu => self.did(work, &[]),
        }
        Ok(())
    }
}

impl RopeOps for Counting {
    fn rope(
        &self,
        x: &mut Tensor<Self>,
        positions: &Tensor<Self>,
        table: &RopeTable<Self>,
        _direction: RopeDirection,
    ) -> Result<()> {
        contract::rope(x, positions, table)?;
        self.moved(Op::Rope, &[x, x]);
        Ok(())
    }
}
