//! The carry of `delta_carry.cu`: bf16 and regular heads.

use super::{A, COLUMNS, Chunks, GATES, INTEGER, Passed, SINGLE, bytes, heads};
use crate::contract::DeltaSizes;
use crate::dtype::DType;
use crate::error::Result;
use crate::gpu::family::Family;
use crate::gpu::kernel::Parameter::{self, F32, I32, In, Out};
use crate::gpu::sources::DELTA_CARRY;
use crate::gpu::{Argument, Gpu, Kernel, Runtime};
use crate::ops::{DELTA_CHUNK, DeltaBackward, DeltaForward, Device};
use crate::tensor::Tensor;

pub(in crate::gpu) static FAMILY: Family = Family {
    source: &DELTA_CARRY,
    kernels: &[
        &FACTORS,
        &RESIDUALS,
        &KEYS64.pulls,
        &KEYS64.forward,
        &KEYS64.back,
        &KEYS64.outputs,
        &KEYS128.pulls,
        &KEYS128.forward,
        &KEYS128.back,
        &KEYS128.outputs,
    ],
    ops: &[],
};

/// Columns that the kernels of a chunk work on at once.
const STRIP: usize = 64;
/// Numbers of a chunk and head that the carry needs of its gates.
const FADES: usize = DELTA_CHUNK + 1;

const fn kernel(stem: &'static str, parameters: &'static [(&'static str, Parameter)]) -> Kernel {
    Kernel {
        source: &DELTA_CARRY,
        stem,
        types: &[&[DType::BF16]],
        threads: 128,
        parameters,
    }
}

static FACTORS: Kernel = kernel(
    "delta_factors",
    &[
        ("k", In(A)),
        ("v", In(A)),
        ("decay", In(SINGLE)),
        ("beta", In(SINGLE)),
        ("solved", In(SINGLE)),
        ("chunks", In(INTEGER)),
        ("w", Out(A)),
        ("values", Out(A)),
        ("fades", Out(SINGLE)),
        ("key_heads", I32),
        ("value_heads", I32),
        ("key_dim", I32),
        ("value_dim", I32),
    ],
);

static RESIDUALS: Kernel = kernel(
    "delta_residuals",
    &[
        ("beta", In(SINGLE)),
        ("solved", In(SINGLE)),
        ("chunks", In(INTEGER)),
        ("values", Out(A)),
        ("dv", Out(A)),
        ("key_heads", I32),
        ("value_heads", I32),
        ("key_dim", I32),
        ("value_dim", I32),
    ],
);

/// The kernels that keys of up to so many elements have.
pub(super) struct Form {
    keys: usize,
    pulls: Kernel,
    forward: Kernel,
    back: Kernel,
    outputs: Kernel,
}

macro_rules! form {
    ($name:ident, $keys:literal) => {
        static $name: Form = Form {
            keys: $keys,
            pulls: kernel(
                concat!("delta_pulls_keys", $keys),
                &[
                    ("q", In(A)),
                    ("k", In(A)),
                    ("decay", In(SINGLE)),
                    ("beta", In(SINGLE)),
                    ("dout", In(A)),
                    ("chunks", In(INTEGER)),
                    ("values", Out(A)),
                    ("dstates", Out(A)),
                    ("key_heads", I32),
                    ("value_heads", I32),
                    ("key_dim", I32),
                    ("value_dim", I32),
                    ("scale", F32),
                ],
            ),
            forward: kernel(
                concat!("delta_carry_forward_keys", $keys),
                &[
                    ("k", In(A)),
                    ("w", In(A)),
                    ("fades", In(SINGLE)),
                    ("documents", In(INTEGER)),
                    ("state", Out(SINGLE)),
                    ("values", Out(A)),
                    ("states", Out(A)),
                    ("key_heads", I32),
                    ("value_heads", I32),
                    ("key_dim", I32),
                    ("value_dim", I32),
                ],
            ),
            back: kernel(
                concat!("delta_carry_back_keys", $keys),
                &[
                    ("k", In(A)),
                    ("w", In(A)),
                    ("fades", In(SINGLE)),
                    ("documents", In(INTEGER)),
                    ("values", Out(A)),
                    ("dstates", Out(A)),
                    ("key_heads", I32),
                    ("value_heads", I32),
                    ("key_dim", I32),
                    ("value_dim", I32),
                ],
            ),
            outputs: kernel(
                concat!("delta_outputs_keys", $keys),
                &[
                    ("q", In(A)),
                    ("k", In(A)),
                    ("values", In(A)),
                    ("states", In(A)),
                    ("decay", In(SINGLE)),
                    ("beta", In(SINGLE)),
                    ("chunks", In(INTEGER)),
                    ("out", Out(A)),
                    ("key_heads", I32),
                    ("value_heads", I32),
                    ("key_dim", I32),
                    ("value_dim", I32),
                    ("scale", F32),
                ],
            ),
        };
    };
}
form!(KEYS64, 64);
form!(KEYS128, 128);

/// Bytes of a tile of bf16 in shared memory, its rows 16 bytes longer than they need be.
const fn tile(rows: usize, width: usize) -> usize {
    rows * (width + 8) * 2
}

impl Form {
    /// The form for these heads, if there is one. It depends on nothing else, so a document's bits do not either.
    pub(super) fn of(dtype: DType, sizes: DeltaSizes) -> Option<&'static Self> {
        let is_regular = [sizes.key_dim, sizes.value_dim]
            .iter()
            .all(|width| width.is_multiple_of(8));
        let fits = |form: &&'static Form| dtype == DType::BF16 && is_regular && sizes.key_dim <= form.keys;
        [&KEYS64, &KEYS128].into_iter().find(fits)
    }

    /// Shared memory of a block of the carry: the state's copy, a chunk's values, and W and K of two chunks.
    fn carry_bytes(&self) -> usize {
        tile(self.keys + DELTA_CHUNK, COLUMNS) + 4 * tile(DELTA_CHUNK, self.keys)
    }

    /// That of `delta_pulls`: queries, keys, a strip of gradients and the same faded.
    fn pulls_bytes(&self) -> usize {
        2 * tile(DELTA_CHUNK, self.keys) + 2 * tile(DELTA_CHUNK, STRIP) + bytes(GATES)
    }

    /// That of `delta_outputs`: queries, keys, a strip of values and of the state.
    fn outputs_bytes(&self) -> usize {
        2 * tile(DELTA_CHUNK, self.keys) + tile(DELTA_CHUNK + self.keys, STRIP) + bytes(GATES)
    }
}

/// What the carry reads of every chunk, and where it begins.
struct Factors<R: Runtime> {
    /// `W`, activation `[T, Hv, Dk]`.
    w: Tensor<Gpu<R>>,
    /// `U`, activation `[T, Hv, Dv]`; `u` behind the carry.
    values: Tensor<Gpu<R>>,
    /// f32 `[chunks, Hv, 65]`.
    fades: Tensor<Gpu<R>>,
}

/// What both passes have to find [`Factors`].
struct Chunked<'a, R: Runtime> {
    k: &'a Tensor<Gpu<R>>,
    v: &'a Tensor<Gpu<R>>,
    decay: &'a Tensor<Gpu<R>>,
    beta: &'a Tensor<Gpu<R>>,
    solved: &'a Tensor<Gpu<R>>,
}

impl<R: Runtime> Gpu<R> {
    fn delta_factors(&self, of: &Chunked<'_, R>, chunks: &Chunks<R>, sizes: DeltaSizes) -> Result<Factors<R>> {
        let mut factors = Factors {
            w: self.alloc(DType::BF16, [sizes.tokens, sizes.value_heads, sizes.key_dim])?,
            values: self.alloc(DType::BF16, of.v.shape())?,
            fades: self.alloc(DType::F32, [chunks.count(), sizes.value_heads, FADES])?,
        };
        let [key_heads, value_heads, key_dim, value_dim] = heads(sizes);
        let arguments = [
            Argument::In(of.k),
            Argument::In(of.v),
            Argument::In(of.decay),
            Argument::In(of.beta),
            Argument::In(of.solved),
            Argument::In(&chunks.chunks),
            Argument::Out(&mut factors.w),
            Argument::Out(&mut factors.values),
            Argument::Out(&mut factors.fades),
            key_heads,
            value_heads,
            key_dim,
            value_dim,
        ];
        let shared = 3 * tile(DELTA_CHUNK, STRIP) + bytes(GATES);
        let blocks = chunks.blocks(sizes.value_heads).with_shared(shared);
        self.launch(&FACTORS, &[DType::BF16], blocks, &arguments)?;
        Ok(factors)
    }

    /// The state before each chunk; `factors.values` become `u`, and `state` the last one.
    fn delta_states_carried(
        &self,
        form: &'static Form,
        k: &Tensor<Self>,
        factors: &mut Factors<R>,
        state: Option<&mut Tensor<Self>>,
        chunks: &Chunks<R>,
        sizes: DeltaSizes,
    ) -> Result<Tensor<Self>> {
        let mut states = self.alloc(DType::BF16, chunks.states(sizes))?;
        let [key_heads, value_heads, key_dim, value_dim] = heads(sizes);
        let arguments = [
            Argument::In(k),
            Argument::In(&factors.w),
            Argument::In(&factors.fades),
            Argument::In(&chunks.documents),
            Argument::OptionalOut(state),
            Argument::Out(&mut factors.values),
            Argument::Out(&mut states),
            key_heads,
            value_heads,
            key_dim,
            value_dim,
        ];
        let blocks = chunks.scan(sizes).with_shared(form.carry_bytes());
        self.launch(&form.forward, &[DType::BF16], blocks, &arguments)?;
        Ok(states)
    }

    /// Writes the output and, if given, the state.
    pub(super) fn carry_delta(
        &self,
        form: &'static Form,
        call: DeltaForward<'_, Self>,
        chunks: &Chunks<R>,
        sizes: DeltaSizes,
    ) -> Result<()> {
        let of = Chunked {
            k: call.k,
            v: call.v,
            decay: call.decay,
            beta: call.beta,
            solved: call.solved,
        };
        let mut factors = self.delta_factors(&of, chunks, sizes)?;
        let states = self.delta_states_carried(form, call.k, &mut factors, call.state, chunks, sizes)?;
        let [key_heads, value_heads, key_dim, value_dim] = heads(sizes);
        let arguments = [
            Argument::In(call.q),
            Argument::In(call.k),
            Argument::In(&factors.values),
            Argument::In(&states),
            Argument::In(call.decay),
            Argument::In(call.beta),
            Argument::In(&chunks.chunks),
            Argument::Out(call.out),
            key_heads,
            value_heads,
            key_dim,
            value_dim,
            Argument::F32(call.scale),
        ];
        let blocks = chunks.blocks(sizes.value_heads).with_shared(form.outputs_bytes());
        self.launch(&form.outputs, &[DType::BF16], blocks, &arguments)
    }

    /// Writes `dv`.
    pub(super) fn carry_delta_back(
        &self,
        form: &'static Form,
        call: &mut DeltaBackward<'_, Self>,
        chunks: &Chunks<R>,
        sizes: DeltaSizes,
    ) -> Result<Passed<R>> {
        let of = Chunked {
            k: call.k,
            v: call.v,
            decay: call.decay,
            beta: call.beta,
            solved: call.solved,
        };
        let mut factors = self.delta_factors(&of, chunks, sizes)?;
        let states = self.delta_states_carried(form, call.k, &mut factors, None, chunks, sizes)?;
        let (mut dvalues, mut dstates) = self.delta_pulls(form, call, chunks, sizes)?;
        let [key_heads, value_heads, key_dim, value_dim] = heads(sizes);
        let arguments = [
            Argument::In(call.k),
            Argument::In(&factors.w),
            Argument::In(&factors.fades),
            Argument::In(&chunks.documents),
            Argument::Out(&mut dvalues),
            Argument::Out(&mut dstates),
            key_heads,
            value_heads,
            key_dim,
            value_dim,
        ];
        let blocks = chunks.scan(sizes).with_shared(form.carry_bytes());
        self.launch(&form.back, &[DType::BF16], blocks, &arguments)?;
        let Factors { values, .. } = factors;
        self.delta_residuals(call, &mut dvalues, chunks, sizes)?;
        Ok(Passed {
            states,
            dstates,
            corrected: values,
            dresidual: dvalues,
        })
    }

    /// `D`, activation `[T, Hv, Dv]`, and `G`, `[chunks, Hv, Dk, Dv]`.
    fn delta_pulls(
        &self,
        form: &'static Form,
        call: &DeltaBackward<'_, Self>,
        chunks: &Chunks<R>,
        sizes: DeltaSizes,
    ) -> Result<(Tensor<Self>, Tensor<Self>)> {
        let mut dvalues = self.alloc(DType::BF16, call.v.shape())?;
        let mut dstates = self.alloc(DType::BF16, chunks.states(sizes))?;
        let [key_heads, value_heads, key_dim, value_dim] = heads(sizes);
        let arguments = [
            Argument::In(call.q),
            Argument::In(call.k),
            Argument::In(call.decay),
            Argument::In(call.beta),
            Argument::In(call.dout),
            Argument::In(&chunks.chunks),
            Argument::Out(&mut dvalues),
            Argument::Out(&mut dstates),
            key_heads,
            value_heads,
            key_dim,
            value_dim,
            Argument::F32(call.scale),
        ];
        let blocks = chunks.blocks(sizes.value_heads).with_shared(form.pulls_bytes());
        self.launch(&form.pulls, &[DType::BF16], blocks, &arguments)?;
        Ok((dvalues, dstates))
    }

    /// Writes `dv`; the gradient of `u` becomes that of `r`.
    fn delta_residuals(
        &self,
        call: &mut DeltaBackward<'_, Self>,
        dvalues: &mut Tensor<Self>,
        chunks: &Chunks<R>,
        sizes: DeltaSizes,
    ) -> Result<()> {
        let [key_heads, value_heads, key_dim, value_dim] = heads(sizes);
        let arguments = [
            Argument::In(call.beta),
            Argument::In(call.solved),
            Argument::In(&chunks.chunks),
            Argument::Out(dvalues),
            Argument::Out(call.dv),
            key_heads,
            value_heads,
            key_dim,
            value_dim,
        ];
        let shared = 2 * tile(DELTA_CHUNK, STRIP);
        let blocks = chunks.blocks(sizes.value_heads).with_shared(shared);
        self.launch(&RESIDUALS, &[DType::BF16], blocks, &arguments)
    }
}
