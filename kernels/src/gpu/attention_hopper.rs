//! Attention on Hopper's tensor cores: what is done so, and the forward pass, `attention_hopper.cu`.

use std::sync::Arc;

use super::attention_hopper_backward::{GRADIENTS, Gradients};
use super::family::Family;
use super::kernel::Parameter::{F32, I32, In, Map as MapOf, Out};
use super::layouts::Table;
use super::map::{MAP_GRANULE, Map, Swizzle};
use super::sources::ATTENTION_HOPPER;
use super::{Argument, Element, Gpu, Kernel, Machine, Runtime};
use crate::contract::AttentionSizes;
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::{AttentionForward, Precision};
use crate::tensor::Tensor;

pub(super) static FAMILY: Family = Family {
    source: &ATTENTION_HOPPER,
    kernels: &[&HEAD64, &HEAD80, &HEAD96, &HEAD128, &HEAD256],
    ops: &[], // those of `attention_kernels::FAMILY`
};

const fn forward(stem: &'static str) -> Kernel {
    Kernel {
        source: &ATTENTION_HOPPER,
        stem,
        types: &[&[DType::BF16]],
        threads: THREADS,
        parameters: &[
            ("q", MapOf),
            ("k", MapOf),
            ("v", MapOf),
            ("v_row", MapOf),
            ("tiles", In(Element::Is(DType::I32))),
            ("out", Out(Element::Type(0))),
            ("lse", Out(Element::Is(DType::F32))),
            ("tile_count", I32),
            ("group", I32),
            ("kv_heads", I32),
            ("dim", I32),
            ("scale", F32),
        ],
    }
}

static HEAD64: Kernel = forward("hopper_attention_forward_head64");
static HEAD80: Kernel = forward("hopper_attention_forward_head80");
static HEAD96: Kernel = forward("hopper_attention_forward_head96");
static HEAD128: Kernel = forward("hopper_attention_forward_head128");
static HEAD256: Kernel = forward("hopper_attention_forward_head256");

/// Of a block: a warp group that copies and two that multiply.
pub(super) const THREADS: u32 = 384;
/// Rows of a tile, each of them one query head of one token.
pub(super) const ROWS: usize = 128;
/// Elements of a row of a box: what the swizzle spans.
pub(super) const SPAN: usize = 64;

/// One head size.
pub(super) struct Instance {
    /// The largest head size it can do.
    head: usize,
    kernel: &'static Kernel,
    /// Keys of a tile, and tiles of them and of values that there is room for.
    keys: usize,
    stages: usize,
    /// The way back.
    pub(super) gradients: &'static Gradients,
}

const fn instance(kernel: &'static Kernel, keys: usize, stages: usize, gradients: &'static Gradients) -> Instance {
    Instance {
        head: gradients.head,
        kernel,
        keys,
        stages,
        gradients,
    }
}

impl Instance {
    /// As `attention_hopper.cu` lays its shared memory out: barriers, queries, the ring.
    const fn shared_bytes(&self) -> usize {
        let row_bytes = self.head.div_ceil(SPAN) * SPAN * 2;
        1024 + (ROWS + 2 * self.stages * self.keys) * row_bytes
    }
}

/// The table of `attention_hopper.cu`, by rising head size.
static INSTANCES: [Instance; 5] = [
    instance(&HEAD64, 128, 4, &GRADIENTS[0]),
    instance(&HEAD80, 128, 3, &GRADIENTS[1]),
    instance(&HEAD96, 128, 3, &GRADIENTS[2]),
    instance(&HEAD128, 128, 3, &GRADIENTS[3]),
    instance(&HEAD256, 80, 2, &GRADIENTS[4]),
];

/// The instance that does a call, or none, where the portable kernels do.
///
/// It depends on heads and scale alone: not on how long documents are, since a document's bits may not depend on what it is packed
/// with, and a recorded step's launches not on where documents begin. By count that costs nothing: heads of a group share a tile, so
/// that 16 tokens fill one for a group of eight, and a tile of 128 rows and 80 keys takes 2 560 cycles of a multiprocessor at heads of
/// 256 where the portable kernel has half the rows and 32 keys in 1 500 to 2 700.
pub(super) fn instance_for<R: Runtime>(
    machine: Machine,
    q: &Tensor<Gpu<R>>,
    precision: Precision,
    scale: f32,
    sizes: AttentionSizes,
) -> Option<&'static Instance> {
    let is_half = q.dtype() == DType::BF16 && precision == Precision::Bf16;
    // A map of nothing is none.
    if machine.is_hopper() && is_half && q.shape().elements() > 0 {
        look_up(sizes, scale)
    } else {
        None
    }
}

/// Within the limits of the kernels: rows begin where the copy engine can begin, a group fits a tile, and the largest product of a row
/// has the largest weight.
fn look_up(AttentionSizes { heads, kv_heads, dim }: AttentionSizes, scale: f32) -> Option<&'static Instance> {
    let fits = dim > 0 && dim.is_multiple_of(MAP_GRANULE / 2) && heads / kv_heads <= ROWS && scale > 0.0;
    INSTANCES.iter().find(|instance| fits && dim <= instance.head)
}

/// Boxes of so many heads of so many tokens of a tensor `[T, H, D]`, of which `tokens` are in use. Elements beyond a row are zeros.
pub(super) fn map<R: Runtime>(
    tensor: &Tensor<Gpu<R>>,
    heads: [usize; 2],
    tokens: [usize; 2],
    dim: usize,
) -> Map<'_, R> {
    Map {
        tensor,
        extents: [dim, heads[0], tokens[0]],
        rectangle: [SPAN, heads[1], tokens[1]],
        swizzle: Swizzle::Bytes128,
    }
}

impl<R: Runtime> Gpu<R> {
    pub(super) fn hopper_attention(
        &self,
        call: AttentionForward<'_, Self>,
        sizes: AttentionSizes,
        instance: &'static Instance,
    ) -> Result<()> {
        let AttentionSizes { heads, kv_heads, dim } = sizes;
        let group = heads / kv_heads;
        let (queries, keys) = (call.query_segments.tokens(), call.key_segments.tokens());
        let table = Table::QueryTiles(ROWS / group);
        let tiles: Arc<Tensor<Self>> = self.layout(table, [call.query_segments, call.key_segments])?;
        let count = tiles.shape().rows();
        let of_keys = |tensor, rows| Argument::Map(map(tensor, [kv_heads, 1], [keys, rows], dim));
        let arguments = [
            Argument::Map(map(call.q, [heads, group], [queries, ROWS / group], dim)),
            of_keys(call.k, instance.keys),
            of_keys(call.v, instance.keys),
            of_keys(call.v, 1),
            Argument::In(&tiles),
            Argument::Out(call.out),
            Argument::Out(call.lse),
            Argument::Size(count),
            Argument::Size(group),
            Argument::Size(kv_heads),
            Argument::Size(dim),
            Argument::F32(call.scale),
        ];
        let geometry = self.persistent(count * kv_heads).with_shared(instance.shared_bytes());
        self.launch(instance.kernel, &[DType::BF16], geometry, &arguments)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What Hopper lets a block have.
    const MOST_SHARED_BYTES: usize = 227 * 1024;

    #[test]
    fn every_instance_fits_the_shared_memory_of_hopper() {
        for instance in &INSTANCES {
            assert!(instance.shared_bytes() <= MOST_SHARED_BYTES, "{}", instance.kernel.stem);
        }
    }

    #[test]
    fn heads_and_scale_decide_what_hopper_does() {
        let head = |heads, kv_heads, dim, scale| {
            let sizes = AttentionSizes { heads, kv_heads, dim };
            look_up(sizes, scale).map(|instance| instance.head)
        };
        assert_eq!(head(16, 2, 256, 0.0625), Some(256));
        assert_eq!(head(4, 4, 64, 0.125), Some(64));
        assert_eq!(head(4, 4, 72, 0.125), Some(80));
        assert_eq!(head(128, 1, 128, 0.1), Some(128));
        assert_eq!(head(4, 4, 20, 0.2), None, "rows do not begin at 16 bytes");
        assert_eq!(head(4, 4, 264, 0.1), None, "no instance is so large");
        assert_eq!(head(129, 1, 128, 0.1), None, "a group is larger than a tile");
        assert_eq!(head(4, 4, 64, -0.125), None, "the largest product has the least weight");
        assert_eq!(head(4, 4, 64, 0.0), None);
        assert_eq!(head(4, 4, 64, f32::NAN), None);
    }
}
