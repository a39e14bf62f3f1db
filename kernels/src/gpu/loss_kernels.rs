//! What the kernels of `cross_entropy.cu` are given.

use super::elementwise::ACTIVATION;
use super::family::Family;
use super::kernel::Parameter::{F32, I32, I64, In, Out};
use super::matmul::tensor::LARGE;
use super::sources::CROSS_ENTROPY;
use super::{Element, Kernel};
use crate::dtype::DType;
use crate::ops::Op;

pub(super) static FAMILY: Family = Family {
    source: &CROSS_ENTROPY,
    kernels: &[
        &SUPERVISED_ROWS,
        &GATHER,
        &LOGITS,
        &SUMS,
        &GRADIENT,
        &COLLECT,
        &SOFTMAX,
        &SCATTER,
    ],
    ops: &[Op::LinearCrossEntropy],
};

pub(super) const THREADS: u32 = 256;
const SOFTMAX_THREADS: u32 = 512;
const SCAN_THREADS: u32 = 1024;
/// What the head may be for tensor cores.
const HEAD: &[DType] = &[DType::BF16, DType::U8];
const A: Element = Element::Type(0);
const INTEGER: Element = Element::Is(DType::I32);
const SINGLE: Element = Element::Is(DType::F32);
const HALF: Element = Element::Is(DType::BF16);
const BYTE: Element = Element::Is(DType::U8);

pub(super) static SUPERVISED_ROWS: Kernel = Kernel {
    source: &CROSS_ENTROPY,
    stem: "supervised_rows",
    types: &[],
    threads: SCAN_THREADS,
    parameters: &[
        ("labels", In(INTEGER)),
        ("rows", Out(INTEGER)),
        ("count", Out(INTEGER)),
        ("tokens", I64),
        ("vocabulary", I32),
        ("faults", Out(INTEGER)),
        ("fault", I32),
    ],
};

pub(super) static GATHER: Kernel = Kernel {
    source: &CROSS_ENTROPY,
    stem: "cross_entropy_gather",
    types: &[ACTIVATION, ACTIVATION],
    threads: THREADS,
    parameters: &[
        ("x", In(A)),
        ("labels", In(INTEGER)),
        ("rows", In(INTEGER)),
        ("count", In(INTEGER)),
        ("hidden", Out(Element::Type(1))),
        ("of_rows", Out(INTEGER)),
        ("first", I64),
        ("chunk", I32),
        ("width", I32),
    ],
};

pub(super) static LOGITS: Kernel = Kernel {
    source: &CROSS_ENTROPY,
    stem: "cross_entropy_logits",
    types: &[HEAD],
    threads: LARGE.threads(),
    parameters: &[
        ("hidden", In(HALF)),
        ("head", In(A)),
        ("absmax", In(SINGLE)),
        ("nested_codes", In(BYTE)),
        ("nested_map", In(SINGLE)),
        ("offset", F32),
        ("count", In(INTEGER)),
        ("labels", In(INTEGER)),
        ("powers", Out(HALF)),
        ("runs", Out(SINGLE)),
        ("label_logits", Out(SINGLE)),
        ("first", I64),
        ("chunk", I32),
        ("width", I32),
        ("vocabulary", I32),
        ("pitch", I64),
    ],
};

pub(super) static SUMS: Kernel = Kernel {
    source: &CROSS_ENTROPY,
    stem: "cross_entropy_sums",
    types: &[],
    threads: THREADS,
    parameters: &[
        ("runs", In(SINGLE)),
        ("rows", In(INTEGER)),
        ("count", In(INTEGER)),
        ("label_logits", In(SINGLE)),
        ("powers", Out(HALF)),
        ("losses", Out(SINGLE)),
        ("factors", Out(SINGLE)),
        ("first", I64),
        ("chunk", I32),
        ("pitch", I64),
        ("scale", In(SINGLE)),
    ],
};

pub(super) static GRADIENT: Kernel = Kernel {
    source: &CROSS_ENTROPY,
    stem: "cross_entropy_gradient",
    types: &[HEAD],
    threads: LARGE.threads(),
    parameters: &[
        ("powers", In(HALF)),
        ("head", In(A)),
        ("absmax", In(SINGLE)),
        ("nested_codes", In(BYTE)),
        ("nested_map", In(SINGLE)),
        ("offset", F32),
        ("count", In(INTEGER)),
        ("parts", Out(SINGLE)),
        ("first", I64),
        ("chunk", I32),
        ("width", I32),
        ("vocabulary", I32),
        ("pitch", I64),
        ("part", I32),
    ],
};

pub(super) static COLLECT: Kernel = Kernel {
    source: &CROSS_ENTROPY,
    stem: "cross_entropy_collect",
    types: &[ACTIVATION, HEAD],
    threads: THREADS,
    parameters: &[
        ("parts", In(SINGLE)),
        ("factors", In(SINGLE)),
        ("labels", In(INTEGER)),
        ("head", In(Element::Type(1))),
        ("absmax", In(SINGLE)),
        ("nested_codes", In(BYTE)),
        ("nested_map", In(SINGLE)),
        ("offset", F32),
        ("rows", In(INTEGER)),
        ("count", In(INTEGER)),
        ("dx", Out(A)),
        ("first", I64),
        ("chunk", I32),
        ("width", I32),
        ("parts_count", I32),
    ],
};

/// Of the reference precision, as is [`SCATTER`].
pub(super) static SOFTMAX: Kernel = Kernel {
    source: &CROSS_ENTROPY,
    stem: "cross_entropy_softmax",
    types: &[],
    threads: SOFTMAX_THREADS,
    parameters: &[
        ("logits", In(SINGLE)),
        ("labels", In(INTEGER)),
        ("rows", In(INTEGER)),
        ("count", In(INTEGER)),
        ("losses", Out(SINGLE)),
        ("gradient", Out(SINGLE)),
        ("first", I64),
        ("chunk", I32),
        ("vocabulary", I32),
        ("pitch", I64),
        ("scale", In(SINGLE)),
    ],
};

pub(super) static SCATTER: Kernel = Kernel {
    source: &CROSS_ENTROPY,
    stem: "cross_entropy_scatter",
    types: &[ACTIVATION],
    threads: THREADS,
    parameters: &[
        ("parts", In(SINGLE)),
        ("rows", In(INTEGER)),
        ("count", In(INTEGER)),
        ("dx", Out(A)),
        ("first", I64),
        ("chunk", I32),
        ("width", I32),
        ("parts_count", I32),
    ],
};
