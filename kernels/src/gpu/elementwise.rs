//! Copies, the residual sum and SwiGLU: `elementwise.cu`.

use super::family::Family;
use super::kernel::Parameter::{I64, In, Out};
use super::sources::ELEMENTWISE;
use super::{Argument, Element, Geometry, Gpu, Kernel, Runtime};
use crate::contract;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::ops::{ActivationOps, Op};
use crate::tensor::Tensor;

pub(super) static FAMILY: Family = Family {
    source: &ELEMENTWISE,
    kernels: &[&CONVERT, &ADD_ASSIGN, &SWIGLU_FORWARD, &SWIGLU_BACKWARD],
    ops: &[Op::AddAssign, Op::SwigluForward, Op::SwigluBackward],
};

/// What activations may be.
pub(super) const ACTIVATION: &[DType] = &[DType::F32, DType::BF16];
const THREADS: u32 = 256;
/// A thread does eight elements.
pub(super) const PACK: usize = 8;
/// The kernels' first type parameter.
const A: Element = Element::Type(0);

static CONVERT: Kernel = Kernel {
    source: &ELEMENTWISE,
    stem: "convert",
    types: &[&[DType::F32, DType::BF16, DType::F16], ACTIVATION],
    threads: THREADS,
    parameters: &[
        ("target", Out(Element::Type(1))),
        ("source", In(Element::Type(0))),
        ("count", I64),
    ],
};

static ADD_ASSIGN: Kernel = Kernel {
    source: &ELEMENTWISE,
    stem: "add_assign",
    types: &[ACTIVATION],
    threads: THREADS,
    parameters: &[("y", Out(A)), ("x", In(A)), ("count", I64)],
};

static SWIGLU_FORWARD: Kernel = Kernel {
    source: &ELEMENTWISE,
    stem: "swiglu_forward",
    types: &[ACTIVATION],
    threads: THREADS,
    parameters: &[("gate", In(A)), ("up", In(A)), ("y", Out(A)), ("count", I64)],
};

static SWIGLU_BACKWARD: Kernel = Kernel {
    source: &ELEMENTWISE,
    stem: "swiglu_backward",
    types: &[ACTIVATION],
    threads: THREADS,
    parameters: &[
        ("gate", In(A)),
        ("up", In(A)),
        ("dy", In(A)),
        ("dgate", Out(A)),
        ("dup", Out(A)),
        ("count", I64),
    ],
};

/// The grid of a kernel whose threads do a pack each.
pub(super) fn packs(elements: usize) -> Geometry {
    Geometry::cover(elements, THREADS as usize * PACK)
}

impl<R: Runtime> Gpu<R> {
    /// `target = source`, both of one shape, between f32, bf16 and (as a source) f16.
    pub(super) fn convert(&self, op: &'static str, source: &Tensor<Self>, target: &mut Tensor<Self>) -> Result<()> {
        let types = [source.dtype(), target.dtype()];
        for (argument, got, accepted) in [
            ("source", types[0], CONVERT.types[0]),
            ("target", types[1], CONVERT.types[1]),
        ] {
            if !accepted.contains(&got) {
                return Err(Error::DType {
                    op,
                    argument,
                    expected: "f32 or bf16",
                    got,
                });
            }
        }
        let count = source.shape().elements();
        let arguments = [Argument::Out(target), Argument::In(source), Argument::Size(count)];
        self.launch(&CONVERT, &types, packs(count), &arguments)
    }
}

impl<R: Runtime> ActivationOps for Gpu<R> {
    fn add_assign(&self, y: &mut Tensor<Self>, x: &Tensor<Self>) -> Result<()> {
        contract::same_shape("add_assign", &[("y", &*y), ("x", x)])?;
        let count = x.shape().elements();
        let arguments = [Argument::Out(y), Argument::In(x), Argument::Size(count)];
        self.launch(&ADD_ASSIGN, &[x.dtype()], packs(count), &arguments)
    }

    fn swiglu_forward(&self, gate: &Tensor<Self>, up: &Tensor<Self>, y: &mut Tensor<Self>) -> Result<()> {
        contract::same_shape("swiglu_forward", &[("gate", gate), ("up", up), ("y", &*y)])?;
        let count = gate.shape().elements();
        let arguments = [
            Argument::In(gate),
            Argument::In(up),
            Argument::Out(y),
            Argument::Size(count),
        ];
        self.launch(&SWIGLU_FORWARD, &[gate.dtype()], packs(count), &arguments)
    }

    fn swiglu_backward(
        &self,
        gate: &Tensor<Self>,
        up: &Tensor<Self>,
        dy: &Tensor<Self>,
        dgate: &mut Tensor<Self>,
        dup: &mut Tensor<Self>,
    ) -> Result<()> {
        let all = [
            ("gate", gate),
            ("up", up),
            ("dy", dy),
            ("dgate", &*dgate),
            ("dup", &*dup),
        ];
        contract::same_shape("swiglu_backward", &all)?;
        let count = gate.shape().elements();
        let arguments = [
            Argument::In(gate),
            Argument::In(up),
            Argument::In(dy),
            Argument::Out(dgate),
            Argument::Out(dup),
            Argument::Size(count),
        ];
        self.launch(&SWIGLU_BACKWARD, &[gate.dtype()], packs(count), &arguments)
    }
}
