//! Gates and the norms that go with them: `gate.cu`; and columns, which `rows.cu` moves.

use super::elementwise::{ACTIVATION, packs};
use super::family::Family;
use super::kernel::Parameter::{F32, I32, I64, In, Out};
use super::sources::GATE;
use super::{Argument, Element, Geometry, Gpu, Kernel, Runtime};
use crate::contract::{self, GateSizes};
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::{
    Columns, DeltaGatesBackward, DeltaGatesForward, GateOps, GatedNormBackward, GatedNormForward, Op,
    SigmoidGateBackward, Write,
};
use crate::tensor::Tensor;

pub(super) static FAMILY: Family = Family {
    source: &GATE,
    kernels: &[
        &SIGMOID_FORWARD,
        &SIGMOID_BACKWARD_EACH,
        &SIGMOID_BACKWARD_ROW,
        &NORM_FORWARD,
        &NORM_BACKWARD,
        &L2_FORWARD,
        &L2_BACKWARD,
        &DELTA_FORWARD,
        &DELTA_BACKWARD,
    ],
    ops: &[
        Op::SigmoidGateForward,
        Op::SigmoidGateBackward,
        Op::GatedNormForward,
        Op::GatedNormBackward,
        Op::L2NormForward,
        Op::L2NormBackward,
        Op::DeltaGatesForward,
        Op::DeltaGatesBackward,
    ],
};

const THREADS: u32 = 256;
const A: Element = Element::Type(0);
const W: Element = Element::Type(1);
const SINGLE: Element = Element::Is(DType::F32);
const VECTOR: &[DType] = &[DType::F32, DType::BF16];

/// A kernel of this family.
const fn kernel(
    stem: &'static str,
    types: &'static [&'static [DType]],
    parameters: &'static [(&'static str, super::kernel::Parameter)],
) -> Kernel {
    Kernel {
        source: &GATE,
        stem,
        types,
        threads: THREADS,
        parameters,
    }
}

static SIGMOID_FORWARD: Kernel = kernel(
    "sigmoid_gate_forward",
    &[ACTIVATION],
    &[
        ("x", In(A)),
        ("gate", In(A)),
        ("y", Out(A)),
        ("count", I64),
        ("width", I32),
        ("per_row", I32),
        ("accumulate", I32),
    ],
);

static SIGMOID_BACKWARD_EACH: Kernel = kernel(
    "sigmoid_gate_backward_each",
    &[ACTIVATION],
    &[
        ("x", In(A)),
        ("gate", In(A)),
        ("dy", In(A)),
        ("dx", Out(A)),
        ("dgate", Out(A)),
        ("count", I64),
    ],
);

static SIGMOID_BACKWARD_ROW: Kernel = kernel(
    "sigmoid_gate_backward_row",
    &[ACTIVATION],
    &[
        ("x", In(A)),
        ("gate", In(A)),
        ("dy", In(A)),
        ("dx", Out(A)),
        ("dgate", Out(A)),
        ("rows", I64),
        ("width", I32),
    ],
);

static NORM_FORWARD: Kernel = kernel(
    "gated_norm_forward",
    &[ACTIVATION, VECTOR],
    &[
        ("x", In(A)),
        ("gate", In(A)),
        ("weight", In(W)),
        ("y", Out(A)),
        ("rstd", Out(SINGLE)),
        ("rows", I64),
        ("width", I32),
        ("eps", F32),
    ],
);

static NORM_BACKWARD: Kernel = kernel(
    "gated_norm_backward",
    &[ACTIVATION, VECTOR],
    &[
        ("x", In(A)),
        ("gate", In(A)),
        ("weight", In(W)),
        ("rstd", In(SINGLE)),
        ("dy", In(A)),
        ("dx", Out(A)),
        ("dgate", Out(A)),
        ("rows", I64),
        ("width", I32),
    ],
);

static L2_FORWARD: Kernel = kernel(
    "l2_norm_forward",
    &[ACTIVATION],
    &[
        ("x", In(A)),
        ("y", Out(A)),
        ("rnorm", Out(SINGLE)),
        ("rows", I64),
        ("width", I32),
        ("eps", F32),
    ],
);

static L2_BACKWARD: Kernel = kernel(
    "l2_norm_backward",
    &[ACTIVATION],
    &[
        ("x", In(A)),
        ("rnorm", In(SINGLE)),
        ("dy", In(A)),
        ("dx", Out(A)),
        ("rows", I64),
        ("width", I32),
    ],
);

static DELTA_FORWARD: Kernel = kernel(
    "delta_gates_forward",
    &[ACTIVATION],
    &[
        ("a", In(A)),
        ("b", In(A)),
        ("a_log", In(SINGLE)),
        ("bias", In(SINGLE)),
        ("decay", Out(SINGLE)),
        ("beta", Out(SINGLE)),
        ("count", I64),
        ("heads", I32),
    ],
);

static DELTA_BACKWARD: Kernel = kernel(
    "delta_gates_backward",
    &[ACTIVATION],
    &[
        ("a", In(A)),
        ("a_log", In(SINGLE)),
        ("bias", In(SINGLE)),
        ("beta", In(SINGLE)),
        ("ddecay", In(SINGLE)),
        ("dbeta", In(SINGLE)),
        ("da", Out(A)),
        ("db", Out(A)),
        ("count", I64),
        ("heads", I32),
    ],
);

/// A warp a row.
fn warps(rows: usize) -> Geometry {
    Geometry::cover(rows, THREADS as usize / 32)
}

/// A thread an element.
fn each(count: usize) -> Geometry {
    Geometry::cover(count, THREADS as usize)
}

impl<R: Runtime> GateOps for Gpu<R> {
    fn sigmoid_gate_forward(
        &self,
        x: &Tensor<Self>,
        gate: &Tensor<Self>,
        y: &mut Tensor<Self>,
        write: Write,
    ) -> Result<()> {
        let GateSizes { width, scalar } = contract::sigmoid_gate_forward(x, gate, y)?;
        let count = x.shape().elements();
        let arguments = [
            Argument::In(x),
            Argument::In(gate),
            Argument::Out(y),
            Argument::Size(count),
            Argument::Size(width),
            Argument::Flag(scalar),
            Argument::Flag(write == Write::Accumulate),
        ];
        self.launch(&SIGMOID_FORWARD, &[x.dtype()], packs(count), &arguments)
    }

    fn sigmoid_gate_backward(&self, call: SigmoidGateBackward<'_, Self>) -> Result<()> {
        let GateSizes { width, scalar } = contract::sigmoid_gate_backward(&call)?;
        let (rows, count) = (call.x.shape().rows(), call.x.shape().elements());
        let types = [call.x.dtype()];
        let [x, gate, dy] = [call.x, call.gate, call.dy].map(Argument::In);
        let (dx, dgate) = (Argument::Out(call.dx), Argument::Out(call.dgate));
        if scalar {
            let (rows_argument, width) = (Argument::Size(rows), Argument::Size(width));
            let arguments = [x, gate, dy, dx, dgate, rows_argument, width];
            return self.launch(&SIGMOID_BACKWARD_ROW, &types, warps(rows), &arguments);
        }
        let arguments = [x, gate, dy, dx, dgate, Argument::Size(count)];
        self.launch(&SIGMOID_BACKWARD_EACH, &types, packs(count), &arguments)
    }

    fn gated_norm_forward(&self, call: GatedNormForward<'_, Self>) -> Result<()> {
        let width = contract::gated_norm_forward(&call)?;
        let rows = call.x.shape().rows();
        let types = [call.x.dtype(), call.weight.dtype()];
        let arguments = [
            Argument::In(call.x),
            Argument::In(call.gate),
            Argument::In(call.weight),
            Argument::Out(call.y),
            Argument::Out(call.rstd),
            Argument::Size(rows),
            Argument::Size(width),
            Argument::F32(call.eps),
        ];
        self.launch(&NORM_FORWARD, &types, warps(rows), &arguments)
    }

    fn gated_norm_backward(&self, call: GatedNormBackward<'_, Self>) -> Result<()> {
        let width = contract::gated_norm_backward(&call)?;
        let rows = call.x.shape().rows();
        let types = [call.x.dtype(), call.weight.dtype()];
        let arguments = [
            Argument::In(call.x),
            Argument::In(call.gate),
            Argument::In(call.weight),
            Argument::In(call.rstd),
            Argument::In(call.dy),
            Argument::Out(call.dx),
            Argument::Out(call.dgate),
            Argument::Size(rows),
            Argument::Size(width),
        ];
        self.launch(&NORM_BACKWARD, &types, warps(rows), &arguments)
    }

    fn l2_norm_forward(
        &self,
        x: &Tensor<Self>,
        eps: f32,
        y: &mut Tensor<Self>,
        rnorm: &mut Tensor<Self>,
    ) -> Result<()> {
        let width = contract::l2_norm_forward(x, y, rnorm)?;
        let rows = x.shape().rows();
        let arguments = [
            Argument::In(x),
            Argument::Out(y),
            Argument::Out(rnorm),
            Argument::Size(rows),
            Argument::Size(width),
            Argument::F32(eps),
        ];
        self.launch(&L2_FORWARD, &[x.dtype()], warps(rows), &arguments)
    }

    fn l2_norm_backward(
        &self,
        x: &Tensor<Self>,
        rnorm: &Tensor<Self>,
        dy: &Tensor<Self>,
        dx: &mut Tensor<Self>,
    ) -> Result<()> {
        let width = contract::l2_norm_backward(x, rnorm, dy, dx)?;
        let rows = x.shape().rows();
        let arguments = [
            Argument::In(x),
            Argument::In(rnorm),
            Argument::In(dy),
            Argument::Out(dx),
            Argument::Size(rows),
            Argument::Size(width),
        ];
        self.launch(&L2_BACKWARD, &[x.dtype()], warps(rows), &arguments)
    }

    fn copy_columns(&self, source: &Tensor<Self>, target: &mut Tensor<Self>, columns: Columns) -> Result<()> {
        self.move_columns(source, target, columns)
    }
}

impl<R: Runtime> Gpu<R> {
    /// [`DeltaOps::delta_gates_forward`](crate::ops::DeltaOps::delta_gates_forward).
    pub(super) fn open_delta_gates(&self, call: DeltaGatesForward<'_, Self>) -> Result<()> {
        let heads = contract::delta_gates_forward(&call)?;
        let count = call.a.shape().elements();
        let a_log = self.held(call.a_log, DType::F32)?;
        let bias = self.held(call.dt_bias, DType::F32)?;
        let arguments = [
            Argument::In(call.a),
            Argument::In(call.b),
            Argument::In(&a_log),
            Argument::In(&bias),
            Argument::Out(call.decay),
            Argument::Out(call.beta),
            Argument::Size(count),
            Argument::Size(heads),
        ];
        self.launch(&DELTA_FORWARD, &[call.a.dtype()], each(count), &arguments)
    }

    /// [`DeltaOps::delta_gates_backward`](crate::ops::DeltaOps::delta_gates_backward).
    pub(super) fn close_delta_gates(&self, call: DeltaGatesBackward<'_, Self>) -> Result<()> {
        let heads = contract::delta_gates_backward(&call)?;
        let count = call.a.shape().elements();
        let a_log = self.held(call.a_log, DType::F32)?;
        let bias = self.held(call.dt_bias, DType::F32)?;
        let arguments = [
            Argument::In(call.a),
            Argument::In(&a_log),
            Argument::In(&bias),
            Argument::In(call.beta),
            Argument::In(call.ddecay),
            Argument::In(call.dbeta),
            Argument::Out(call.da),
            Argument::Out(call.db),
            Argument::Size(count),
            Argument::Size(heads),
        ];
        self.launch(&DELTA_BACKWARD, &[call.a.dtype()], each(count), &arguments)
    }
}
