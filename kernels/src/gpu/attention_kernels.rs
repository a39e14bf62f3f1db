//! The kernels of attention: descriptors, and the tiles of each head size on tensor cores.

use super::elementwise::ACTIVATION;
use super::family::Family;
use super::kernel::Parameter::{self, F32, I32, I64, In, Out};
use super::sources::{ATTENTION, ATTENTION_TENSOR};
use super::{Element, Kernel};
use crate::dtype::DType;
use crate::ops::Op;

pub(super) static FAMILY: Family = Family {
    source: &ATTENTION,
    kernels: &[&FORWARD_TILED, &DELTA, &BACKWARD_QUERIES_TILED, &BACKWARD_KEYS_TILED],
    ops: &[Op::AttentionForward, Op::AttentionBackward],
};

pub(super) static TENSOR_FAMILY: Family = Family {
    source: &ATTENTION_TENSOR,
    kernels: &[
        &HEAD64[0],
        &HEAD64[1],
        &HEAD64[2],
        &HEAD80[0],
        &HEAD80[1],
        &HEAD80[2],
        &HEAD96[0],
        &HEAD96[1],
        &HEAD96[2],
        &HEAD128[0],
        &HEAD128[1],
        &HEAD128[2],
        &HEAD256[0],
        &HEAD256[1],
        &HEAD256[2],
    ],
    ops: &[], // those of `FAMILY`, which needs both
};

const A: Element = Element::Type(0);
const SINGLE: Element = Element::Is(DType::F32);
const INTEGER: Element = Element::Is(DType::I32);
pub(super) const THREADS: u32 = 256;

type Parameters = &'static [(&'static str, Parameter)];

macro_rules! parameters {
    ($([$name:literal, $kind:expr])* ; $($last:expr),*) => {
        &[$(($name, $kind),)* ("heads", I32), ("kv_heads", I32), ("dim", I32), ("scale", F32) $(, $last)*]
    };
}
macro_rules! forward_parameters {
    ($($last:expr),*) => {
        parameters!(
            ["q", In(A)] ["k", In(A)] ["v", In(A)] ["tiles", In(INTEGER)] ["out", Out(A)] ["lse", Out(SINGLE)];
            $($last),*
        )
    };
}
macro_rules! queries_parameters {
    ($($last:expr),*) => {
        parameters!(
            ["q", In(A)] ["k", In(A)] ["v", In(A)] ["dout", In(A)] ["lse", In(SINGLE)] ["delta", In(SINGLE)]
            ["tiles", In(INTEGER)] ["dq", Out(A)];
            $($last),*
        )
    };
}
macro_rules! keys_parameters {
    ($($last:expr),*) => {
        parameters!(
            ["q", In(A)] ["k", In(A)] ["v", In(A)] ["dout", In(A)] ["lse", In(SINGLE)] ["delta", In(SINGLE)]
            ["tiles", In(INTEGER)] ["dk", Out(A)] ["dv", Out(A)];
            $($last),*
        )
    };
}

const fn tiled(stem: &'static str, parameters: Parameters) -> Kernel {
    Kernel {
        source: &ATTENTION,
        stem,
        types: &[ACTIVATION],
        threads: THREADS,
        parameters,
    }
}

pub(super) static FORWARD_TILED: Kernel = tiled("attention_forward_tiled", forward_parameters!(("round", I32)));
pub(super) static BACKWARD_QUERIES_TILED: Kernel =
    tiled("attention_backward_queries_tiled", queries_parameters!(("round", I32)));
pub(super) static BACKWARD_KEYS_TILED: Kernel =
    tiled("attention_backward_keys_tiled", keys_parameters!(("round", I32)));

pub(super) static DELTA: Kernel = tiled(
    "attention_delta",
    &[
        ("out", In(A)),
        ("dout", In(A)),
        ("delta", Out(SINGLE)),
        ("rows", I64),
        ("dim", I32),
    ],
);

/// Rows of a tile in `attention.cu`, and the elements of a row of results that a block makes.
pub(super) const TILE: usize = 32;
pub(super) const SLAB: usize = 256;

const fn tensor(stem: &'static str, parameters: Parameters) -> Kernel {
    Kernel {
        source: &ATTENTION_TENSOR,
        stem,
        types: &[&[DType::BF16]],
        threads: 128,
        parameters,
    }
}

/// Forward, dq, and dk with dv of one head size.
macro_rules! instance {
    ($name:ident, $head:literal) => {
        static $name: [Kernel; 3] = [
            tensor(concat!("attention_forward_head", $head), forward_parameters!()),
            tensor(
                concat!("attention_backward_queries_head", $head),
                queries_parameters!(),
            ),
            tensor(concat!("attention_backward_keys_head", $head), keys_parameters!()),
        ];
    };
}
instance!(HEAD64, 64);
instance!(HEAD80, 80);
instance!(HEAD96, 96);
instance!(HEAD128, 128);
instance!(HEAD256, 256);

/// One kernel on tensor cores, and its tiles.
pub(super) struct TensorTile {
    pub(super) kernel: &'static Kernel,
    /// Tensors of which rows stay in shared memory.
    operands: usize,
    /// Those rows: of queries, or of keys for dk and dv.
    pub(super) resident: usize,
    /// Rows of each of the two tensors that pass through.
    passing: usize,
    /// How many such tiles there is room for.
    stages: usize,
    /// Blocks that share the work of a tile and head.
    pub(super) parts: usize,
}

impl TensorTile {
    const fn new(kernel: &'static Kernel, operands: usize, [resident, passing, stages]: [usize; 3]) -> Self {
        Self {
            kernel,
            operands,
            resident,
            passing,
            stages,
            parts: 1,
        }
    }

    /// As `attention_tensor.cu` lays its shared memory out: rows of an odd number of 16-byte chunks.
    pub(super) fn shared_bytes(&self, head: usize) -> usize {
        let row_bytes = ((head / 8) | 1) * 16;
        (self.operands * self.resident + 2 * self.stages * self.passing) * row_bytes
    }
}

/// Larger heads make dk and dv in blocks of their own.
const MOST_IN_ONE_BLOCK: usize = 128;

/// Every kernel of one head size.
pub(super) struct Instance {
    /// The largest head size it can do.
    pub(super) head: usize,
    pub(super) forward: TensorTile,
    /// dq.
    pub(super) queries: TensorTile,
    /// dk and dv.
    pub(super) keys: TensorTile,
}

impl Instance {
    /// Rows that stay, rows that pass and stages of `forward` and dq, and the stages of dk and dv.
    const fn new(
        head: usize,
        kernels: &'static [Kernel; 3],
        forward: [usize; 3],
        dq: [usize; 3],
        keys_stages: usize,
    ) -> Self {
        let mut keys = TensorTile::new(&kernels[2], 2, [64, 32, keys_stages]);
        if head > MOST_IN_ONE_BLOCK {
            keys.parts = 2;
        }
        Self {
            head,
            forward: TensorTile::new(&kernels[0], 1, forward),
            queries: TensorTile::new(&kernels[1], 2, dq),
            keys,
        }
    }
}

/// The table of `attention_tensor.cu`, by rising head size.
pub(super) static INSTANCES: [Instance; 5] = [
    Instance::new(64, &HEAD64, [128, 64, 2], [64, 64, 2], 2),
    Instance::new(80, &HEAD80, [128, 64, 2], [64, 32, 2], 2),
    Instance::new(96, &HEAD96, [128, 32, 2], [64, 32, 2], 2),
    Instance::new(128, &HEAD128, [128, 32, 2], [64, 32, 2], 2),
    Instance::new(256, &HEAD256, [64, 32, 2], [64, 32, 1], 1),
];

#[cfg(test)]
mod tests {
    use super::*;

    /// What sm_86 and sm_89 let a block have.
    const LEAST_SHARED_BYTES: usize = 99 * 1024;

    #[test]
    fn every_tile_fits_the_shared_memory_of_every_target() {
        for Instance {
            head,
            forward,
            queries,
            keys,
        } in &INSTANCES
        {
            for tile in [forward, queries, keys] {
                assert!(tile.shared_bytes(*head) <= LEAST_SHARED_BYTES, "{}", tile.kernel.stem);
            }
        }
    }
}
