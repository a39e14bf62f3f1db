//! The activation and the sum of grouped rows.

use super::super::elementwise::{ACTIVATION, PACK};
use super::super::faults::Fault;
use super::super::kernel::Parameter::{I32, In, Out};
use super::super::{Argument, Element, Geometry, Gpu, Kernel, Runtime};
use super::{THREADS, kernel};
use crate::contract;
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::{RoutedSwigluBackward, Routing, Write};
use crate::tensor::Tensor;

const A: Element = Element::Type(0);
const SINGLE: Element = Element::Is(DType::F32);
const INTEGER: Element = Element::Is(DType::I32);

pub(super) static SWIGLU_FORWARD: Kernel = kernel(
    "routed_swiglu_forward",
    &[ACTIVATION],
    THREADS,
    &[
        ("gate", In(A)),
        ("up", In(A)),
        ("weights", In(SINGLE)),
        ("slots_of", In(INTEGER)),
        ("y", Out(A)),
        ("rows", I32),
        ("width", I32),
        ("faults", Out(INTEGER)),
        ("fault", I32),
    ],
);

pub(super) static SWIGLU_BACKWARD: Kernel = kernel(
    "routed_swiglu_backward",
    &[ACTIVATION],
    THREADS,
    &[
        ("gate", In(A)),
        ("up", In(A)),
        ("weights", In(SINGLE)),
        ("slots_of", In(INTEGER)),
        ("dy", In(A)),
        ("dgate", Out(A)),
        ("dup", Out(A)),
        ("dweights", Out(SINGLE)),
        ("rows", I32),
        ("width", I32),
        ("faults", Out(INTEGER)),
        ("fault", I32),
    ],
);

pub(super) static COMBINE: Kernel = kernel(
    "combine",
    &[ACTIVATION],
    THREADS,
    &[
        ("grouped", In(A)),
        ("rows_of", In(INTEGER)),
        ("y", Out(A)),
        ("tokens", I32),
        ("top", I32),
        ("width", I32),
        ("accumulate", I32),
        ("faults", Out(INTEGER)),
        ("fault", I32),
    ],
);

/// A warp a row.
fn warps(rows: usize) -> Geometry {
    Geometry::cover(rows, THREADS as usize / 32)
}

impl<R: Runtime> Gpu<R> {
    /// [`MoeOps::routed_swiglu_forward`](crate::ops::MoeOps::routed_swiglu_forward).
    pub(super) fn activate_rows(
        &self,
        gate: &Tensor<Self>,
        up: &Tensor<Self>,
        routing: &Routing<Self>,
        y: &mut Tensor<Self>,
    ) -> Result<()> {
        let (width, sizes) = contract::routed_swiglu_forward(gate, up, routing, y)?;
        let arguments = [
            Argument::In(gate),
            Argument::In(up),
            Argument::In(&routing.weights),
            Argument::In(&routing.slots),
            Argument::Out(y),
            Argument::Size(sizes.slots()),
            Argument::Size(width),
            Argument::Faults,
            Argument::I32(Fault::Routing.code()),
        ];
        self.launch(&SWIGLU_FORWARD, &[gate.dtype()], warps(sizes.slots()), &arguments)
    }

    /// [`MoeOps::routed_swiglu_backward`](crate::ops::MoeOps::routed_swiglu_backward).
    pub(super) fn through_activation(&self, call: RoutedSwigluBackward<'_, Self>) -> Result<()> {
        let (width, sizes) = contract::routed_swiglu_backward(&call)?;
        let arguments = [
            Argument::In(call.gate),
            Argument::In(call.up),
            Argument::In(&call.routing.weights),
            Argument::In(&call.routing.slots),
            Argument::In(call.dy),
            Argument::Out(call.dgate),
            Argument::Out(call.dup),
            Argument::Out(call.dweights),
            Argument::Size(sizes.slots()),
            Argument::Size(width),
            Argument::Faults,
            Argument::I32(Fault::Routing.code()),
        ];
        let types = [call.gate.dtype()];
        self.launch(&SWIGLU_BACKWARD, &types, warps(sizes.slots()), &arguments)
    }

    /// [`MoeOps::combine`](crate::ops::MoeOps::combine).
    pub(super) fn combine_rows(
        &self,
        grouped: &Tensor<Self>,
        routing: &Routing<Self>,
        y: &mut Tensor<Self>,
        write: Write,
    ) -> Result<()> {
        let (width, sizes) = contract::combine(grouped, routing, y)?;
        let arguments = [
            Argument::In(grouped),
            Argument::In(&routing.rows),
            Argument::Out(y),
            Argument::Size(sizes.tokens),
            Argument::Size(sizes.top),
            Argument::Size(width),
            Argument::Flag(write == Write::Accumulate),
            Argument::Faults,
            Argument::I32(Fault::Routing.code()),
        ];
        let packs = Geometry::cover(sizes.tokens * width.div_ceil(PACK), THREADS as usize);
        self.launch(&COMBINE, &[grouped.dtype()], packs, &arguments)
    }
}
