//! The backward pass of attention on Hopper's tensor cores: `attention_hopper_backward.cu`.

use super::attention_hopper::{ROWS, SPAN, THREADS, map};
use super::family::Family;
use super::kernel::Parameter::{F32, I32, In, Map as MapOf, Out};
use super::layouts::Table;
use super::sources::ATTENTION_HOPPER_BACKWARD;
use super::{Argument, Element, Gpu, Kernel, Runtime};
use crate::contract::AttentionSizes;
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::AttentionBackward;
use crate::tensor::Tensor;

pub(super) static FAMILY: Family = Family {
    source: &ATTENTION_HOPPER_BACKWARD,
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
    ops: &[], // those of `attention_kernels::FAMILY`
};

const SINGLE: Element = Element::Is(DType::F32);

const fn backward(stem: &'static str) -> Kernel {
    Kernel {
        source: &ATTENTION_HOPPER_BACKWARD,
        stem,
        types: &[&[DType::BF16]],
        threads: THREADS,
        parameters: &[
            ("staying", MapOf),
            ("other_staying", MapOf),
            ("passed", MapOf),
            ("other_passed", MapOf),
            ("row", MapOf),
            ("other_row", MapOf),
            ("lse", In(SINGLE)),
            ("delta", In(SINGLE)),
            ("tiles", In(Element::Is(DType::I32))),
            ("out", Out(Element::Type(0))),
            ("tile_count", I32),
            ("group", I32),
            ("kv_heads", I32),
            ("dim", I32),
            ("scale", F32),
        ],
    }
}

/// dq, dv and dk of one head size.
macro_rules! kernels {
    ($name:ident, $head:literal) => {
        static $name: [Kernel; 3] = [
            backward(concat!("hopper_attention_backward_queries_head", $head)),
            backward(concat!("hopper_attention_backward_values_head", $head)),
            backward(concat!("hopper_attention_backward_keys_head", $head)),
        ];
    };
}
kernels!(HEAD64, 64);
kernels!(HEAD80, 80);
kernels!(HEAD96, 96);
kernels!(HEAD128, 128);
kernels!(HEAD256, 256);

/// One kernel and its tiles.
struct Gradient {
    kernel: &'static Kernel,
    /// Tensors of which [`ROWS`] rows stay in shared memory.
    staying: usize,
    /// Rows of each of the two tensors that pass through, and how many such tiles there is room for.
    passing: usize,
    stages: usize,
    /// Whether those are queries, which come with two numbers each.
    passes_queries: bool,
}

impl Gradient {
    /// As `attention_hopper_backward.cu` lays its shared memory out: barriers, what stays, the ring, lse and δ.
    const fn shared_bytes(&self, head: usize) -> usize {
        let row_bytes = head.div_ceil(SPAN) * SPAN * 2;
        let statistics = if self.passes_queries { 2 * 4 } else { 0 };
        let rows = self.stages * self.passing;
        1024 + (self.staying * ROWS + 2 * rows) * row_bytes + rows * statistics
    }
}

/// The kernels of one head size.
pub(super) struct Gradients {
    /// The largest head size they can do.
    pub(super) head: usize,
    queries: Gradient,
    values: Gradient,
    keys: Gradient,
}

impl Gradients {
    /// Rows that pass for dq and dk, and for dv, and stages.
    const fn new(head: usize, kernels: &'static [Kernel; 3], passing: usize, of_values: usize, stages: usize) -> Self {
        let [queries, values, keys] = kernels;
        Self {
            head,
            queries: Gradient {
                kernel: queries,
                staying: 2,
                passing,
                stages,
                passes_queries: false,
            },
            values: Gradient {
                kernel: values,
                staying: 1,
                passing: of_values,
                stages,
                passes_queries: true,
            },
            keys: Gradient {
                kernel: keys,
                staying: 2,
                passing,
                stages,
                passes_queries: true,
            },
        }
    }
}

/// The table of `attention_hopper_backward.cu`, by rising head size.
pub(super) static GRADIENTS: [Gradients; 5] = [
    Gradients::new(64, &HEAD64, 96, 96, 4),
    Gradients::new(80, &HEAD80, 96, 96, 3),
    Gradients::new(96, &HEAD96, 96, 96, 3),
    Gradients::new(128, &HEAD128, 96, 96, 3),
    Gradients::new(256, &HEAD256, 48, 80, 2),
];

/// What stays and what passes, of a launch.
struct Launched<'a, R: Runtime> {
    gradient: &'static Gradient,
    staying: [&'a Tensor<Gpu<R>>; 2],
    passing: [&'a Tensor<Gpu<R>>; 2],
    out: &'a mut Tensor<Gpu<R>>,
}

impl<R: Runtime> Gpu<R> {
    /// All three gradients.
    pub(super) fn hopper_attention_backward(
        &self,
        call: AttentionBackward<'_, Self>,
        sizes: AttentionSizes,
        delta: &Tensor<Self>,
        instance: &'static Gradients,
    ) -> Result<()> {
        let AttentionSizes { heads, kv_heads, dim } = sizes;
        let group = heads / kv_heads;
        let tokens = call.segments.tokens();
        let (of_queries, of_keys) = ([call.q, call.dout], [call.k, call.v]);
        let launches = [
            Launched {
                gradient: &instance.queries,
                staying: of_queries,
                passing: of_keys,
                out: call.dq,
            },
            Launched {
                gradient: &instance.values,
                staying: of_keys,
                passing: of_queries,
                out: call.dv,
            },
            Launched {
                gradient: &instance.keys,
                staying: of_keys,
                passing: of_queries,
                out: call.dk,
            },
        ];
        for launched in launches {
            let gradient = launched.gradient;
            // A tile that stays has all heads of a group, or one key/value head.
            let (table, stays, passes) = match gradient.passes_queries {
                false => (Table::QueryTiles(ROWS / group), [heads, group], kv_heads),
                true => (Table::KeyTiles(ROWS), [kv_heads, 1], heads),
            };
            let tiles = self.layout(table, [call.segments; 2])?;
            let count = tiles.shape().rows();
            let staying = |tensor| Argument::Map(map(tensor, stays, [tokens, ROWS / stays[1]], dim));
            let passing = |tensor, rows| Argument::Map(map(tensor, [passes, 1], [tokens, rows], dim));
            let arguments = [
                staying(launched.staying[0]),
                staying(launched.staying[1]),
                passing(launched.passing[0], gradient.passing),
                passing(launched.passing[1], gradient.passing),
                passing(launched.passing[0], 1),
                passing(launched.passing[1], 1),
                Argument::In(call.lse),
                Argument::In(delta),
                Argument::In(&tiles),
                Argument::Out(launched.out),
                Argument::Size(count),
                Argument::Size(group),
                Argument::Size(kv_heads),
                Argument::Size(dim),
                Argument::F32(call.scale),
            ];
            let geometry = self.persistent(count * kv_heads);
            let geometry = geometry.with_shared(gradient.shared_bytes(instance.head));
            self.launch(gradient.kernel, &[DType::BF16], geometry, &arguments)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What Hopper lets a block have.
    const MOST_SHARED_BYTES: usize = 227 * 1024;

    #[test]
    fn every_gradient_fits_the_shared_memory_of_hopper() {
        for instance in &GRADIENTS {
            for gradient in [&instance.queries, &instance.values, &instance.keys] {
                let bytes = gradient.shared_bytes(instance.head);
                assert!(bytes <= MOST_SHARED_BYTES, "{}: {bytes}", gradient.kernel.stem);
            }
        }
    }
}
