//! The scans of `gated_delta.cu`: heads of any size, f32 and bf16.

use super::{A, COLUMNS, Chunks, GATES, INTEGER, Passed, SINGLE, bytes, heads, kernel, stage};
use crate::contract::DeltaSizes;
use crate::dtype::DType;
use crate::error::Result;
use crate::gpu::kernel::Parameter::{F32, I32, In, Out};
use crate::gpu::{Argument, Geometry, Gpu, Kernel, Runtime};
use crate::ops::{DELTA_CHUNK, DeltaBackward, DeltaForward, Device};
use crate::tensor::Tensor;

pub(super) static PRODUCTS: Kernel = kernel(
    "delta_products",
    &[
        ("q", In(A)),
        ("k", In(A)),
        ("decay", In(SINGLE)),
        ("beta", In(SINGLE)),
        ("chunks", In(INTEGER)),
        ("products", Out(A)),
        ("key_heads", I32),
        ("value_heads", I32),
        ("key_dim", I32),
        ("value_dim", I32),
    ],
);

pub(super) static FORWARD: Kernel = kernel(
    "delta_forward",
    &[
        ("q", In(A)),
        ("k", In(A)),
        ("v", In(A)),
        ("decay", In(SINGLE)),
        ("beta", In(SINGLE)),
        ("solved", In(SINGLE)),
        ("products", In(A)),
        ("documents", In(INTEGER)),
        ("state", Out(SINGLE)),
        ("out", Out(A)),
        ("key_heads", I32),
        ("value_heads", I32),
        ("key_dim", I32),
        ("value_dim", I32),
        ("scale", F32),
    ],
);

pub(super) static STATES: Kernel = kernel(
    "delta_states",
    &[
        ("k", In(A)),
        ("v", In(A)),
        ("decay", In(SINGLE)),
        ("beta", In(SINGLE)),
        ("solved", In(SINGLE)),
        ("documents", In(INTEGER)),
        ("states", Out(A)),
        ("corrected", Out(A)),
        ("key_heads", I32),
        ("value_heads", I32),
        ("key_dim", I32),
        ("value_dim", I32),
    ],
);

pub(super) static REVERSE: Kernel = kernel(
    "delta_reverse",
    &[
        ("q", In(A)),
        ("k", In(A)),
        ("decay", In(SINGLE)),
        ("beta", In(SINGLE)),
        ("solved", In(SINGLE)),
        ("products", In(A)),
        ("dout", In(A)),
        ("documents", In(INTEGER)),
        ("dstates", Out(A)),
        ("dresidual", Out(A)),
        ("dv", Out(A)),
        ("key_heads", I32),
        ("value_heads", I32),
        ("key_dim", I32),
        ("value_dim", I32),
        ("scale", F32),
    ],
);

impl<R: Runtime> Chunks<R> {
    /// The launch of a scan: what a block keeps in shared memory.
    fn direct_scan(&self, dtype: DType, sizes: DeltaSizes) -> Geometry {
        let stage = if dtype == DType::BF16 {
            half_stage(COLUMNS)
        } else {
            stage(COLUMNS)
        };
        let floats = stage + GATES + (sizes.key_dim + DELTA_CHUNK) * (COLUMNS + 1);
        self.scan(sizes).with_shared(bytes(floats))
    }
}

/// Floats in shared memory that `Product` of so many columns works with when its factors are bf16.
const fn half_stage(columns: usize) -> usize {
    (64 + columns) * 40 / 2
}

impl<R: Runtime> Gpu<R> {
    /// `P`, activation `[T, Hv, 64]`.
    fn delta_products(
        &self,
        (q, k): (&Tensor<Self>, &Tensor<Self>),
        (decay, beta): (&Tensor<Self>, &Tensor<Self>),
        chunks: &Chunks<R>,
        sizes: DeltaSizes,
    ) -> Result<Tensor<Self>> {
        let mut products = self.alloc(q.dtype(), [sizes.tokens, sizes.value_heads, DELTA_CHUNK])?;
        let [key_heads, value_heads, key_dim, value_dim] = heads(sizes);
        let arguments = [
            Argument::In(q),
            Argument::In(k),
            Argument::In(decay),
            Argument::In(beta),
            Argument::In(&chunks.chunks),
            Argument::Out(&mut products),
            key_heads,
            value_heads,
            key_dim,
            value_dim,
        ];
        let blocks = chunks
            .blocks(sizes.value_heads)
            .with_shared(bytes(stage(DELTA_CHUNK) + GATES));
        self.launch(&PRODUCTS, &[q.dtype()], blocks, &arguments)?;
        Ok(products)
    }

    /// Writes the output and, if given, the state.
    pub(super) fn scan_delta(&self, call: DeltaForward<'_, Self>, chunks: &Chunks<R>, sizes: DeltaSizes) -> Result<()> {
        let products = self.delta_products((call.q, call.k), (call.decay, call.beta), chunks, sizes)?;
        let [key_heads, value_heads, key_dim, value_dim] = heads(sizes);
        let arguments = [
            Argument::In(call.q),
            Argument::In(call.k),
            Argument::In(call.v),
            Argument::In(call.decay),
            Argument::In(call.beta),
            Argument::In(call.solved),
            Argument::In(&products),
            Argument::In(&chunks.documents),
            Argument::OptionalOut(call.state),
            Argument::Out(call.out),
            key_heads,
            value_heads,
            key_dim,
            value_dim,
            Argument::F32(call.scale),
        ];
        let dtype = call.q.dtype();
        self.launch(&FORWARD, &[dtype], chunks.direct_scan(dtype, sizes), &arguments)
    }

    /// Writes `dv`.
    pub(super) fn scan_delta_back(
        &self,
        call: &mut DeltaBackward<'_, Self>,
        chunks: &Chunks<R>,
        sizes: DeltaSizes,
    ) -> Result<Passed<R>> {
        let (states, corrected) = self.delta_states(call, chunks, sizes)?;
        let (dstates, dresidual) = self.delta_reverse(call, chunks, sizes)?;
        Ok(Passed {
            states,
            dstates,
            corrected,
            dresidual,
        })
    }

    /// The states before the chunks, `[chunks, Hv, Dk, Dv]`, and `u`, `[T, Hv, Dv]`, again.
    fn delta_states(
        &self,
        call: &DeltaBackward<'_, Self>,
        chunks: &Chunks<R>,
        sizes: DeltaSizes,
    ) -> Result<(Tensor<Self>, Tensor<Self>)> {
        let dtype = call.q.dtype();
        let mut states = self.alloc(dtype, chunks.states(sizes))?;
        let mut corrected = self.alloc(dtype, call.v.shape())?;
        let [key_heads, value_heads, key_dim, value_dim] = heads(sizes);
        let arguments = [
            Argument::In(call.k),
            Argument::In(call.v),
            Argument::In(call.decay),
            Argument::In(call.beta),
            Argument::In(call.solved),
            Argument::In(&chunks.documents),
            Argument::Out(&mut states),
            Argument::Out(&mut corrected),
            key_heads,
            value_heads,
            key_dim,
            value_dim,
        ];
        self.launch(&STATES, &[dtype], chunks.direct_scan(dtype, sizes), &arguments)?;
        Ok((states, corrected))
    }

    /// Writes `dv`; the gradients of the states behind the chunks, and of `r`.
    fn delta_reverse(
        &self,
        call: &mut DeltaBackward<'_, Self>,
        chunks: &Chunks<R>,
        sizes: DeltaSizes,
    ) -> Result<(Tensor<Self>, Tensor<Self>)> {
        let dtype = call.q.dtype();
        let products = self.delta_products((call.q, call.k), (call.decay, call.beta), chunks, sizes)?;
        let mut dstates = self.alloc(dtype, chunks.states(sizes))?;
        let mut dresidual = self.alloc(dtype, call.v.shape())?;
        let [key_heads, value_heads, key_dim, value_dim] = heads(sizes);
        let arguments = [
            Argument::In(call.q),
            Argument::In(call.k),
            Argument::In(call.decay),
            Argument::In(call.beta),
            Argument::In(call.solved),
            Argument::In(&products),
            Argument::In(call.dout),
            Argument::In(&chunks.documents),
            Argument::Out(&mut dstates),
            Argument::Out(&mut dresidual),
            Argument::Out(call.dv),
            key_heads,
            value_heads,
            key_dim,
            value_dim,
            Argument::F32(call.scale),
        ];
        self.launch(&REVERSE, &[dtype], chunks.direct_scan(dtype, sizes), &arguments)?;
        Ok((dstates, dresidual))
    }
}
