//! The causal convolution: `convolution.cu`.

use super::elementwise::{ACTIVATION, PACK};
use super::family::Family;
use super::kernel::Parameter::{I32, In, Out};
use super::layouts::Table;
use super::sources::CONVOLUTION;
use super::{Argument, Element, Geometry, Gpu, Kernel, Runtime};
use crate::contract::{self, ConvolutionSizes};
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::{ConvolutionBackward, ConvolutionForward, ConvolutionOps, Op};

pub(super) static FAMILY: Family = Family {
    source: &CONVOLUTION,
    kernels: &[
        &FORWARD_TAPS4,
        &FORWARD_ANY,
        &BACKWARD_TAPS4,
        &BACKWARD_ANY,
        &ADVANCE_STATE,
    ],
    ops: &[Op::ConvolutionForward, Op::ConvolutionBackward],
};

const THREADS: u32 = 128;
/// Rows that a thread walks down.
const STRIP: usize = 32;
const A: Element = Element::Type(0);
const W: Element = Element::Type(1);
const SINGLE: Element = Element::Is(DType::F32);
const INTEGER: Element = Element::Is(DType::I32);

const fn forward(stem: &'static str) -> Kernel {
    Kernel {
        source: &CONVOLUTION,
        stem,
        types: &[ACTIVATION, &[DType::F32, DType::BF16]],
        threads: THREADS,
        parameters: &[
            ("x", In(A)),
            ("weight", In(W)),
            ("bias", In(SINGLE)),
            ("offsets", In(INTEGER)),
            ("state", In(SINGLE)),
            ("y", Out(A)),
            ("tokens", I32),
            ("channels", I32),
            ("taps", I32),
            ("documents", I32),
        ],
    }
}

const fn backward(stem: &'static str) -> Kernel {
    Kernel {
        source: &CONVOLUTION,
        stem,
        types: &[ACTIVATION, &[DType::F32, DType::BF16]],
        threads: THREADS,
        parameters: &[
            ("x", In(A)),
            ("weight", In(W)),
            ("bias", In(SINGLE)),
            ("offsets", In(INTEGER)),
            ("dy", In(A)),
            ("dx", Out(A)),
            ("tokens", I32),
            ("channels", I32),
            ("taps", I32),
            ("documents", I32),
        ],
    }
}

static FORWARD_TAPS4: Kernel = forward("convolution_forward_taps4");
static FORWARD_ANY: Kernel = forward("convolution_forward_any");
static BACKWARD_TAPS4: Kernel = backward("convolution_backward_taps4");
static BACKWARD_ANY: Kernel = backward("convolution_backward_any");

static ADVANCE_STATE: Kernel = Kernel {
    source: &CONVOLUTION,
    stem: "convolution_state",
    types: &[ACTIVATION],
    threads: THREADS,
    parameters: &[
        ("x", In(A)),
        ("offsets", In(INTEGER)),
        ("state", Out(SINGLE)),
        ("documents", I32),
        ("channels", I32),
        ("taps", I32),
    ],
};

/// A thread for each strip of each pack of channels.
fn strips(tokens: usize, channels: usize) -> Geometry {
    Geometry::cover(tokens.div_ceil(STRIP) * channels.div_ceil(PACK), THREADS as usize)
}

impl<R: Runtime> ConvolutionOps for Gpu<R> {
    fn convolution_forward(&self, call: ConvolutionForward<'_, Self>) -> Result<()> {
        let ConvolutionSizes { channels, taps } = contract::convolution_forward(&call)?;
        let (tokens, documents) = (call.segments.tokens(), call.segments.len());
        let offsets = self.layout(Table::Offsets, [call.segments; 2])?;
        let bias = call.bias.map(|bias| self.held(bias, DType::F32)).transpose()?;
        let state = call.state;
        let kernel = if taps == 4 { &FORWARD_TAPS4 } else { &FORWARD_ANY };
        let arguments = [
            Argument::In(call.x),
            Argument::In(call.weight),
            Argument::Optional(bias.as_deref()),
            Argument::In(&offsets),
            Argument::Optional(state.as_deref()),
            Argument::Out(call.y),
            Argument::Size(tokens),
            Argument::Size(channels),
            Argument::Size(taps),
            Argument::Size(documents),
        ];
        let types = [call.x.dtype(), call.weight.dtype()];
        self.launch(kernel, &types, strips(tokens, channels), &arguments)?;
        let Some(state) = state else {
            return Ok(());
        };
        let arguments = [
            Argument::In(call.x),
            Argument::In(&offsets),
            Argument::Out(state),
            Argument::Size(documents),
            Argument::Size(channels),
            Argument::Size(taps),
        ];
        let each = Geometry::cover(documents * channels, THREADS as usize);
        self.launch(&ADVANCE_STATE, &[call.x.dtype()], each, &arguments)
    }

    fn convolution_backward(&self, call: ConvolutionBackward<'_, Self>) -> Result<()> {
        let ConvolutionSizes { channels, taps } = contract::convolution_backward(&call)?;
        let tokens = call.segments.tokens();
        let offsets = self.layout(Table::Offsets, [call.segments; 2])?;
        let bias = call.bias.map(|bias| self.held(bias, DType::F32)).transpose()?;
        let kernel = if taps == 4 { &BACKWARD_TAPS4 } else { &BACKWARD_ANY };
        let arguments = [
            Argument::In(call.x),
            Argument::In(call.weight),
            Argument::Optional(bias.as_deref()),
            Argument::In(&offsets),
            Argument::In(call.dy),
            Argument::Out(call.dx),
            Argument::Size(tokens),
            Argument::Size(channels),
            Argument::Size(taps),
            Argument::Size(call.segments.len()),
        ];
        let types = [call.x.dtype(), call.weight.dtype()];
        self.launch(kernel, &types, strips(tokens, channels), &arguments)
    }
}
