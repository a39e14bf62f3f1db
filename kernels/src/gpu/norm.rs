//! RMS normalisation: `norm.cu`.

use super::elementwise::ACTIVATION;
use super::family::Family;
use super::kernel::Parameter::{F32, I32, I64, In, Out};
use super::sources::NORM;
use super::{Argument, Element, Geometry, Gpu, Kernel, Runtime};
use crate::contract::{self, NormSizes};
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::{AddNormForward, NormBackward, NormForward, NormOps, NormWeight, Op, Write};

pub(super) static FAMILY: Family = Family {
    source: &NORM,
    kernels: &[
        &FORWARD_ROWWARP,
        &FORWARD_ROWBLOCK,
        &ADD_FORWARD_ROWWARP,
        &ADD_FORWARD_ROWBLOCK,
        &BACKWARD_ROWWARP,
        &BACKWARD_ROWBLOCK,
    ],
    ops: &[Op::RmsNormForward, Op::RmsNormBackward, Op::AddRmsNormForward],
};

const THREADS: u32 = 256;
/// Rows up to this long are done by a warp each; longer ones by a block.
const WARP_WIDTH: usize = 1024;
const VECTOR: &[DType] = &[DType::F32, DType::BF16];

/// The kernels' type parameters: activations and the weight.
const A: Element = Element::Type(0);
const W: Element = Element::Type(1);
const SINGLE: Element = Element::Is(DType::F32);

const fn forward(stem: &'static str) -> Kernel {
    Kernel {
        source: &NORM,
        stem,
        types: &[ACTIVATION, VECTOR],
        threads: THREADS,
        parameters: &[
            ("x", In(A)),
            ("weight", In(W)),
            ("y", Out(A)),
            ("rstd", Out(SINGLE)),
            ("rows", I64),
            ("width", I32),
            ("eps", F32),
            ("zero_centred", I32),
        ],
    }
}

const fn add_forward(stem: &'static str) -> Kernel {
    Kernel {
        source: &NORM,
        stem,
        types: &[ACTIVATION, VECTOR],
        threads: THREADS,
        parameters: &[
            ("x", Out(A)),
            ("added", In(A)),
            ("weight", In(W)),
            ("y", Out(A)),
            ("rstd", Out(SINGLE)),
            ("rows", I64),
            ("width", I32),
            ("eps", F32),
            ("zero_centred", I32),
        ],
    }
}

const fn backward(stem: &'static str) -> Kernel {
    Kernel {
        source: &NORM,
        stem,
        types: &[ACTIVATION, VECTOR],
        threads: THREADS,
        parameters: &[
            ("x", In(A)),
            ("weight", In(W)),
            ("rstd", In(SINGLE)),
            ("dy", In(A)),
            ("dx", Out(A)),
            ("rows", I64),
            ("width", I32),
            ("zero_centred", I32),
            ("accumulate", I32),
        ],
    }
}

static FORWARD_ROWWARP: Kernel = forward("rms_norm_forward_rowwarp");
static FORWARD_ROWBLOCK: Kernel = forward("rms_norm_forward_rowblock");
static ADD_FORWARD_ROWWARP: Kernel = add_forward("add_rms_norm_forward_rowwarp");
static ADD_FORWARD_ROWBLOCK: Kernel = add_forward("add_rms_norm_forward_rowblock");
static BACKWARD_ROWWARP: Kernel = backward("rms_norm_backward_rowwarp");
static BACKWARD_ROWBLOCK: Kernel = backward("rms_norm_backward_rowblock");

/// The kernel for rows of this width, and its grid.
fn layout(kernels: [&'static Kernel; 2], rows: usize, width: usize) -> (&'static Kernel, Geometry) {
    let [rowwarp, rowblock] = kernels;
    if width <= WARP_WIDTH {
        (rowwarp, Geometry::cover(rows, THREADS as usize / 32))
    } else {
        (rowblock, Geometry::cover(rows, 1))
    }
}

impl<R: Runtime> NormOps for Gpu<R> {
    fn rms_norm_forward(&self, call: NormForward<'_, Self>) -> Result<()> {
        let NormSizes { width } = contract::rms_norm_forward(&call)?;
        let rows = call.x.shape().rows();
        let (kernel, geometry) = layout([&FORWARD_ROWWARP, &FORWARD_ROWBLOCK], rows, width);
        let types = [call.x.dtype(), call.weight.dtype()];
        let arguments = [
            Argument::In(call.x),
            Argument::In(call.weight),
            Argument::Out(call.y),
            Argument::Out(call.rstd),
            Argument::Size(rows),
            Argument::Size(width),
            Argument::F32(call.eps),
            Argument::Flag(call.style == NormWeight::ZeroCentred),
        ];
        self.launch(kernel, &types, geometry, &arguments)
    }

    fn add_rms_norm_forward(&self, call: AddNormForward<'_, Self>) -> Result<()> {
        let NormSizes { width } = contract::add_rms_norm_forward(&call)?;
        let rows = call.x.shape().rows();
        let (kernel, geometry) = layout([&ADD_FORWARD_ROWWARP, &ADD_FORWARD_ROWBLOCK], rows, width);
        let types = [call.x.dtype(), call.weight.dtype()];
        let arguments = [
            Argument::Out(call.x),
            Argument::In(call.added),
            Argument::In(call.weight),
            Argument::Out(call.y),
            Argument::Out(call.rstd),
            Argument::Size(rows),
            Argument::Size(width),
            Argument::F32(call.eps),
            Argument::Flag(call.style == NormWeight::ZeroCentred),
        ];
        self.launch(kernel, &types, geometry, &arguments)
    }

    fn rms_norm_backward(&self, call: NormBackward<'_, Self>) -> Result<()> {
        let NormSizes { width } = contract::rms_norm_backward(&call)?;
        let rows = call.x.shape().rows();
        let (kernel, geometry) = layout([&BACKWARD_ROWWARP, &BACKWARD_ROWBLOCK], rows, width);
        let types = [call.x.dtype(), call.weight.dtype()];
        let (dx, write) = call.dx;
        let arguments = [
            Argument::In(call.x),
            Argument::In(call.weight),
            Argument::In(call.rstd),
            Argument::In(call.dy),
            Argument::Out(dx),
            Argument::Size(rows),
            Argument::Size(width),
            Argument::Flag(call.style == NormWeight::ZeroCentred),
            Argument::Flag(write == Write::Accumulate),
        ];
        self.launch(kernel, &types, geometry, &arguments)
    }
}
