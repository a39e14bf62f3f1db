//! Attention: `attention.cu` with plain multiply-adds, `attention_tensor.cu` on tensor cores, and `attention_hopper` on Hopper's.
//!
//! Documents are cut into tiles, a list of which is on the device (`layouts`), so a block finds its rows with one read, documents
//! without rows cost nothing, and the longest tiles begin first.

use super::attention_hopper::instance_for;
use super::attention_kernels::{
    BACKWARD_KEYS_TILED, BACKWARD_QUERIES_TILED, DELTA, FORWARD_TILED, INSTANCES, Instance, SLAB, THREADS, TILE,
    TensorTile,
};
use super::layouts::Table;
use super::{Argument, Geometry, Gpu, Kernel, Runtime};
use crate::contract::{self, AttentionSizes};
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::{AttentionBackward, AttentionForward, AttentionOps, Device, Precision};
use crate::tensor::Tensor;

/// Of the tiled kernels and the one on tensor cores, the kernel of a call and how it is launched.
struct Choice {
    kernel: &'static Kernel,
    /// Rows of a tile.
    rows: usize,
    shared_bytes: usize,
    /// Blocks for each tile and head.
    parts: usize,
    /// For the tiled kernels: whether factors are rounded to bf16.
    round: Option<bool>,
}

impl Choice {
    fn new(
        (dtype, precision, dim): (DType, Precision, usize),
        tiled: &'static Kernel,
        tensor: impl FnOnce(&'static Instance) -> &'static TensorTile,
    ) -> Self {
        let on_tensor_cores = dtype == DType::BF16 && precision == Precision::Bf16;
        let instance = INSTANCES
            .iter()
            .find(|instance| on_tensor_cores && dim <= instance.head);
        let Some(instance) = instance else {
            return Self {
                kernel: tiled,
                rows: TILE,
                shared_bytes: 0,
                parts: dim.div_ceil(SLAB),
                round: Some(precision == Precision::Bf16),
            };
        };
        let tile = tensor(instance);
        Self {
            kernel: tile.kernel,
            rows: tile.resident,
            shared_bytes: tile.shared_bytes(instance.head),
            parts: tile.parts,
            round: None,
        }
    }

    fn geometry(&self, tiles: usize, heads: usize) -> Geometry {
        Geometry::grid([tiles * heads, self.parts, 1]).with_shared(self.shared_bytes)
    }
}

impl<R: Runtime> AttentionOps for Gpu<R> {
    fn attention_forward(&self, call: AttentionForward<'_, Self>) -> Result<()> {
        let sizes = contract::attention_forward(&call)?;
        let machine = self.runtime().machine();
        if let Some(instance) = instance_for(machine, call.q, call.precision, call.scale, sizes) {
            return self.hopper_attention(call, sizes, instance);
        }
        let AttentionSizes { heads, kv_heads, dim } = sizes;
        let dtype = call.q.dtype();
        let choice = Choice::new((dtype, call.precision, dim), &FORWARD_TILED, |instance| {
            &instance.forward
        });
        let documents = [call.query_segments, call.key_segments];
        let tiles = self.layout(Table::QueryTiles(choice.rows), documents)?;
        let mut arguments = vec![
            Argument::In(call.q),
            Argument::In(call.k),
            Argument::In(call.v),
            Argument::In(&tiles),
            Argument::Out(call.out),
            Argument::Out(call.lse),
        ];
        arguments.extend(scalars([heads, kv_heads, dim], call.scale, &choice));
        let geometry = choice.geometry(tiles.shape().rows(), heads);
        self.launch(choice.kernel, &[dtype], geometry, &arguments)
    }

    fn attention_backward(&self, call: AttentionBackward<'_, Self>) -> Result<()> {
        let sizes = contract::attention_backward(&call)?;
        let AttentionSizes { heads, kv_heads, dim } = sizes;
        let dtype = call.q.dtype();
        let delta = self.delta(call.out, call.dout, dim)?;
        let machine = self.runtime().machine();
        if let Some(instance) = instance_for(machine, call.q, call.precision, call.scale, sizes) {
            return self.hopper_attention_backward(call, sizes, &delta, instance.gradients);
        }
        let form = (dtype, call.precision, dim);
        let documents = [call.segments, call.segments];
        let inputs = |tiles| {
            vec![
                Argument::In(call.q),
                Argument::In(call.k),
                Argument::In(call.v),
                Argument::In(call.dout),
                Argument::In(call.lse),
                Argument::In(&delta),
                Argument::In(tiles),
            ]
        };

        let choice = Choice::new(form, &BACKWARD_QUERIES_TILED, |instance| &instance.queries);
        let tiles = self.layout(Table::QueryTiles(choice.rows), documents)?;
        let mut arguments = inputs(&tiles);
        arguments.push(Argument::Out(call.dq));
        arguments.extend(scalars([heads, kv_heads, dim], call.scale, &choice));
        let geometry = choice.geometry(tiles.shape().rows(), heads);
        self.launch(choice.kernel, &[dtype], geometry, &arguments)?;

        let choice = Choice::new(form, &BACKWARD_KEYS_TILED, |instance| &instance.keys);
        let tiles = self.layout(Table::KeyTiles(choice.rows), documents)?;
        let mut arguments = inputs(&tiles);
        arguments.extend([Argument::Out(call.dk), Argument::Out(call.dv)]);
        arguments.extend(scalars([heads, kv_heads, dim], call.scale, &choice));
        let geometry = choice.geometry(tiles.shape().rows(), kv_heads);
        self.launch(choice.kernel, &[dtype], geometry, &arguments)
    }
}

/// The last arguments of every kernel.
fn scalars<'a, R: Runtime>(sizes: [usize; 3], scale: f32, choice: &Choice) -> impl Iterator<Item = Argument<'a, R>> {
    let round = choice.round.map(Argument::Flag);
    sizes
        .into_iter()
        .map(Argument::Size)
        .chain([Argument::F32(scale)])
        .chain(round)
}

impl<R: Runtime> Gpu<R> {
    /// `delta[t, h] = dout[t, h] · out[t, h]`.
    fn delta(&self, out: &Tensor<Self>, dout: &Tensor<Self>, dim: usize) -> Result<Tensor<Self>> {
        let rows = out.shape().rows();
        let mut delta = self.alloc(DType::F32, [rows])?;
        let arguments = [
            Argument::In(out),
            Argument::In(dout),
            Argument::Out(&mut delta),
            Argument::Size(rows),
            Argument::Size(dim),
        ];
        let geometry = Geometry::cover(rows, THREADS as usize / 32);
        self.launch(&DELTA, &[out.dtype()], geometry, &arguments)?;
        Ok(delta)
    }
}
