//! Attention: `attention.cu` with plain multiply-adds, `attention_tensor.cu` on tensor cores.
//!
//! The host cuts documents into tiles and hands the device a list of them, so a block finds its rows with one read, documents
//! without rows cost nothing, and the longest tiles begin first.

use super::attention_kernels::{
    BACKWARD_KEYS_TILED, BACKWARD_QUERIES_TILED, DELTA, FORWARD_TILED, INSTANCES, Instance, SLAB, THREADS, TILE,
    TensorTile,
};
use super::{Argument, Geometry, Gpu, Kernel, Runtime};
use crate::contract::{self, AttentionSizes};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::ops::{AttentionBackward, AttentionForward, AttentionOps, Device, Precision};
use crate::tensor::{Segments, Tensor};

/// The numbers of a tile, as `attention.cuh` reads them.
const TILE_FIELDS: usize = 5;

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

/// What the tiles of a list are of.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Queries,
    Keys,
}

impl<R: Runtime> AttentionOps for Gpu<R> {
    fn attention_forward(&self, call: AttentionForward<'_, Self>) -> Result<()> {
        const OP: &str = "attention_forward";
        let AttentionSizes { heads, kv_heads, dim } = contract::attention_forward(&call)?;
        let dtype = call.q.dtype();
        let choice = Choice::new((dtype, call.precision, dim), &FORWARD_TILED, |instance| {
            &instance.forward
        });
        let documents = [call.query_segments, call.key_segments];
        let (tiles, count) = self.tiles(OP, documents, Side::Queries, choice.rows)?;
        let mut arguments = vec![
            Argument::In(call.q),
            Argument::In(call.k),
            Argument::In(call.v),
            Argument::In(&tiles),
            Argument::Out(call.out),
            Argument::Out(call.lse),
        ];
        arguments.extend(scalars([heads, kv_heads, dim], call.scale, &choice));
        self.launch(choice.kernel, &[dtype], choice.geometry(count, heads), &arguments)
    }

    fn attention_backward(&self, call: AttentionBackward<'_, Self>) -> Result<()> {
        const OP: &str = "attention_backward";
        let AttentionSizes { heads, kv_heads, dim } = contract::attention_backward(&call)?;
        let dtype = call.q.dtype();
        let delta = self.delta(call.out, call.dout, dim)?;
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
        let (tiles, count) = self.tiles(OP, documents, Side::Queries, choice.rows)?;
        let mut arguments = inputs(&tiles);
        arguments.push(Argument::Out(call.dq));
        arguments.extend(scalars([heads, kv_heads, dim], call.scale, &choice));
        self.launch(choice.kernel, &[dtype], choice.geometry(count, heads), &arguments)?;

        let choice = Choice::new(form, &BACKWARD_KEYS_TILED, |instance| &instance.keys);
        let (tiles, count) = self.tiles(OP, documents, Side::Keys, choice.rows)?;
        let mut arguments = inputs(&tiles);
        arguments.extend([Argument::Out(call.dk), Argument::Out(call.dv)]);
        arguments.extend(scalars([heads, kv_heads, dim], call.scale, &choice));
        self.launch(choice.kernel, &[dtype], choice.geometry(count, kv_heads), &arguments)
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

    /// Every tile of `rows` rows of one side of the documents, on the device, and how many there are. Those with most work come
    /// first; since no tile depends on another, their order changes no bit of any result.
    fn tiles(
        &self,
        op: &'static str,
        [queries, keys]: [&Segments; 2],
        side: Side,
        rows: usize,
    ) -> Result<(Tensor<Self>, usize)> {
        let mut tiles = Vec::new();
        for (queries, keys) in queries.ranges().zip(keys.ranges()) {
            let extra = keys.len() - queries.len();
            let length = if side == Side::Queries {
                queries.len()
            } else {
                keys.len()
            };
            for first in (0..length).step_by(rows) {
                let work = match side {
                    Side::Queries => first + extra,
                    Side::Keys => length - first,
                };
                tiles.push((work, [queries.start, queries.len(), keys.start, keys.len(), first]));
            }
        }
        tiles.sort_by_key(|(work, _)| std::cmp::Reverse(*work));
        let fields: Result<Vec<i32>, _> = tiles.iter().flat_map(|(_, tile)| tile.map(i32::try_from)).collect();
        let fields = fields.map_err(|_| Error::Value {
            op,
            argument: "segments",
            problem: format!("have {} tokens, more than 32-bit rows hold", keys.tokens()),
        })?;
        Ok((self.upload_i32([tiles.len(), TILE_FIELDS], &fields)?, tiles.len()))
    }
}
