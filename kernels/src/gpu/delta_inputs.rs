//! What lies between DeltaNet's input projections and its delta rule: `delta_inputs.cu`.

use super::elementwise::{ACTIVATION, PACK};
use super::family::Family;
use super::kernel::Parameter::{self, F32, I32, In, Out};
use super::layouts::Table;
use super::sources::DELTA_INPUTS;
use super::{Argument, Element, Geometry, Gpu, Kernel, Runtime};
use crate::contract::{self, DeltaSizes};
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::{DeltaInputsBackward, DeltaInputsForward, Device, Op, delta_parts};
use crate::tensor::Tensor;

pub(super) static FAMILY: Family = Family {
    source: &DELTA_INPUTS,
    kernels: &[&INPUTS, &INPUTS_BACK],
    ops: &[Op::DeltaInputsForward, Op::DeltaInputsBackward],
};

const THREADS: u32 = 128;
/// Rows that a thread walks down.
const STRIP: usize = 32;
const TAPS: usize = 4;
const A: Element = Element::Type(0);
const W: Element = Element::Type(1);
const SINGLE: Element = Element::Is(DType::F32);
const INTEGER: Element = Element::Is(DType::I32);

const fn kernel(stem: &'static str, parameters: &'static [(&'static str, Parameter)]) -> Kernel {
    Kernel {
        source: &DELTA_INPUTS,
        stem,
        types: &[ACTIVATION, &[DType::F32, DType::BF16]],
        threads: THREADS,
        parameters,
    }
}

static INPUTS: Kernel = kernel(
    "delta_inputs",
    &[
        ("fused", In(A)),
        ("ba", In(A)),
        ("query_taps", In(W)),
        ("key_taps", In(W)),
        ("value_taps", In(W)),
        ("a_log", In(SINGLE)),
        ("bias", In(SINGLE)),
        ("offsets", In(INTEGER)),
        ("q", Out(A)),
        ("k", Out(A)),
        ("v", Out(A)),
        ("z", Out(A)),
        ("decay", Out(SINGLE)),
        ("beta", Out(SINGLE)),
        ("key_heads", I32),
        ("value_heads", I32),
        ("key_dim", I32),
        ("value_dim", I32),
        ("tokens", I32),
        ("documents", I32),
        ("gate_blocks", I32),
        ("eps", F32),
    ],
);

static INPUTS_BACK: Kernel = kernel(
    "delta_inputs_back",
    &[
        ("fused", In(A)),
        ("ba", In(A)),
        ("query_taps", In(W)),
        ("key_taps", In(W)),
        ("value_taps", In(W)),
        ("a_log", In(SINGLE)),
        ("bias", In(SINGLE)),
        ("offsets", In(INTEGER)),
        ("beta", In(SINGLE)),
        ("dq", In(A)),
        ("dk", In(A)),
        ("dv", In(A)),
        ("dz", In(A)),
        ("ddecay", In(SINGLE)),
        ("dbeta", In(SINGLE)),
        ("dfused", Out(A)),
        ("dba", Out(A)),
        ("key_heads", I32),
        ("value_heads", I32),
        ("key_dim", I32),
        ("value_dim", I32),
        ("tokens", I32),
        ("documents", I32),
        ("gate_blocks", I32),
        ("eps", F32),
    ],
);

/// Whether heads are whole packs, and those of keys so many lanes as sum by halves, and there is one kind of four taps.
pub(crate) fn fuses_delta_inputs<D: Device>(sizes: DeltaSizes, taps: [&Tensor<D>; 3]) -> bool {
    let lanes = sizes.key_dim / PACK;
    let [first, ..] = taps;
    taps.iter().all(|taps| taps.dtype() == first.dtype())
        && first.shape().row() == TAPS
        && sizes.key_dim.is_multiple_of(PACK)
        && sizes.value_dim.is_multiple_of(PACK)
        && lanes.is_power_of_two()
        && lanes <= 32
}

/// A thread for each pack of the fused projection and strip of rows, after the blocks of the gates, whose number comes with it.
fn blocks(sizes: DeltaSizes) -> (Geometry, usize) {
    let channels = 2 * (sizes.key_heads * sizes.key_dim + sizes.value_heads * sizes.value_dim);
    let gates = sizes.value_heads.div_ceil(THREADS as usize);
    let all = gates + (channels / PACK).div_ceil(THREADS as usize);
    (Geometry::grid([all, sizes.tokens.div_ceil(STRIP), 1]), gates)
}

impl<R: Runtime> Gpu<R> {
    /// [`DeltaOps::delta_inputs_forward`](crate::ops::DeltaOps::delta_inputs_forward); heads that are not regular go through the
    /// separate kernels.
    pub(super) fn prepare_delta(&self, call: DeltaInputsForward<'_, Self>) -> Result<()> {
        let sizes = contract::delta_inputs_forward(&call)?;
        if !fuses_delta_inputs(sizes, call.taps) {
            return delta_parts::inputs_forward(self, call);
        }
        let offsets = self.layout(Table::Offsets, [call.segments; 2])?;
        let a_log = self.held(call.a_log, DType::F32)?;
        let bias = self.held(call.dt_bias, DType::F32)?;
        let (geometry, gate_blocks) = blocks(sizes);
        let [query_taps, key_taps, value_taps] = call.taps;
        let types = [call.fused.dtype(), query_taps.dtype()];
        let arguments = [
            Argument::In(call.fused),
            Argument::In(call.ba),
            Argument::In(query_taps),
            Argument::In(key_taps),
            Argument::In(value_taps),
            Argument::In(&a_log),
            Argument::In(&bias),
            Argument::In(&offsets),
            Argument::Out(call.q),
            Argument::Out(call.k),
            Argument::Out(call.v),
            Argument::Out(call.z),
            Argument::Out(call.decay),
            Argument::Out(call.beta),
            Argument::Size(sizes.key_heads),
            Argument::Size(sizes.value_heads),
            Argument::Size(sizes.key_dim),
            Argument::Size(sizes.value_dim),
            Argument::Size(sizes.tokens),
            Argument::Size(call.segments.len()),
            Argument::Size(gate_blocks),
            Argument::F32(call.eps),
        ];
        self.launch(&INPUTS, &types, geometry, &arguments)
    }

    /// [`DeltaOps::delta_inputs_backward`](crate::ops::DeltaOps::delta_inputs_backward), likewise.
    pub(super) fn prepare_delta_back(&self, call: DeltaInputsBackward<'_, Self>) -> Result<()> {
        let sizes = contract::delta_inputs_backward(&call)?;
        if !fuses_delta_inputs(sizes, call.taps) {
            return delta_parts::inputs_backward(self, call);
        }
        let offsets = self.layout(Table::Offsets, [call.segments; 2])?;
        let a_log = self.held(call.a_log, DType::F32)?;
        let bias = self.held(call.dt_bias, DType::F32)?;
        let (geometry, gate_blocks) = blocks(sizes);
        let [query_taps, key_taps, value_taps] = call.taps;
        let types = [call.fused.dtype(), query_taps.dtype()];
        let arguments = [
            Argument::In(call.fused),
            Argument::In(call.ba),
            Argument::In(query_taps),
            Argument::In(key_taps),
            Argument::In(value_taps),
            Argument::In(&a_log),
            Argument::In(&bias),
            Argument::In(&offsets),
            Argument::In(call.beta),
            Argument::In(call.dq),
            Argument::In(call.dk),
            Argument::In(call.dv),
            Argument::In(call.dz),
            Argument::In(call.ddecay),
            Argument::In(call.dbeta),
            Argument::Out(call.dfused),
            Argument::Out(call.dba),
            Argument::Size(sizes.key_heads),
            Argument::Size(sizes.value_heads),
            Argument::Size(sizes.key_dim),
            Argument::Size(sizes.value_dim),
            Argument::Size(sizes.tokens),
            Argument::Size(call.segments.len()),
            Argument::Size(gate_blocks),
            Argument::F32(call.eps),
        ];
        self.launch(&INPUTS_BACK, &types, geometry, &arguments)
    }
}
