//! Fused ops of grouped rows on tensor cores (`grouped.cu`), and the sum that ends a layer of experts (`moe.cu`).
//!
//! In f32, where nothing is fused, the ops are put together from their parts.

use super::super::elementwise::{ACTIVATION, PACK};
use super::super::faults::Fault;
use super::super::kernel::Parameter::{F32, I32, In, Out};
use super::super::matmul::{Held, factors};
use super::super::sources::GROUPED;
use super::super::{Argument, Element, Geometry, Gpu, Kernel, Runtime};
use super::linear::{Experts, Grouped, GroupedOuter, Reads, extents};
use super::tensor::{NARROW, WIDE, expert_arguments, expert_type};
use super::{THREADS, kernel};
use crate::contract::{self, GroupedSizes};
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::{
    CombineResidual, Device, GroupedPairBackward, GroupedSwigluForward, Precision, RowOrder, Write, moe_parts,
};
use crate::tensor::Tensor;

const HALF: Element = Element::Is(DType::BF16);
const SINGLE: Element = Element::Is(DType::F32);
const INTEGER: Element = Element::Is(DType::I32);
const BYTE: Element = Element::Is(DType::U8);
const W: Element = Element::Type(0);
const A: Element = Element::Type(1);
const LAYER: &[&[DType]] = &[&[DType::BF16, DType::U8], ACTIVATION];

pub(super) static SWIGLU_WIDE: Kernel = Kernel {
    source: &GROUPED,
    stem: "grouped_swiglu_wide",
    types: LAYER,
    threads: WIDE.threads(),
    parameters: &[
        ("left", In(HALF)),
        ("slots", In(INTEGER)),
        ("weights", In(SINGLE)),
        ("gate", In(W)),
        ("gate_absmax", In(SINGLE)),
        ("gate_codes", In(BYTE)),
        ("gate_map", In(SINGLE)),
        ("gate_offsets", In(SINGLE)),
        ("up", In(W)),
        ("up_absmax", In(SINGLE)),
        ("up_codes", In(BYTE)),
        ("up_map", In(SINGLE)),
        ("up_offsets", In(SINGLE)),
        ("left2", In(HALF)),
        ("right2", In(HALF)),
        ("tiles", In(INTEGER)),
        ("offsets", In(INTEGER)),
        ("gate_out", Out(A)),
        ("up_out", Out(A)),
        ("y", Out(A)),
        ("top", I32),
        ("columns", I32),
        ("depth", I32),
        ("depth2", I32),
    ],
};

pub(super) static PAIR_WIDE: Kernel = Kernel {
    source: &GROUPED,
    stem: "grouped_pair_wide",
    types: LAYER,
    threads: WIDE.threads(),
    parameters: &[
        ("left_a", In(HALF)),
        ("left_b", In(HALF)),
        ("weight_a", In(W)),
        ("absmax_a", In(SINGLE)),
        ("codes_a", In(BYTE)),
        ("map_a", In(SINGLE)),
        ("offsets_a", In(SINGLE)),
        ("weight_b", In(W)),
        ("absmax_b", In(SINGLE)),
        ("codes_b", In(BYTE)),
        ("map_b", In(SINGLE)),
        ("offsets_b", In(SINGLE)),
        ("left2", In(HALF)),
        ("right2", In(HALF)),
        ("tiles", In(INTEGER)),
        ("offsets", In(INTEGER)),
        ("out", Out(A)),
        ("columns", I32),
        ("depth", I32),
        ("depth2", I32),
        ("accumulate", I32),
    ],
};

pub(super) static PAIR_NARROW: Kernel = Kernel {
    source: &GROUPED,
    stem: "grouped_pair_narrow",
    types: &[],
    threads: NARROW.threads(),
    parameters: &[
        ("left_a", In(HALF)),
        ("left_b", In(HALF)),
        ("right", In(HALF)),
        ("tiles", In(INTEGER)),
        ("offsets", In(INTEGER)),
        ("copy", Out(HALF)),
        ("copy_scale", F32),
        ("columns", I32),
        ("depth", I32),
    ],
};

pub(super) static COMBINE_RESIDUAL: Kernel = kernel(
    "combine_residual",
    &[ACTIVATION],
    THREADS,
    &[
        ("grouped", In(Element::Type(0))),
        ("rows_of", In(INTEGER)),
        ("shared", In(Element::Type(0))),
        ("gate", In(Element::Type(0))),
        ("x", Out(Element::Type(0))),
        ("tokens", I32),
        ("top", I32),
        ("width", I32),
        ("faults", Out(INTEGER)),
        ("fault", I32),
    ],
);

impl<R: Runtime> Gpu<R> {
    /// [`MoeOps::grouped_swiglu_forward`](crate::ops::MoeOps::grouped_swiglu_forward).
    pub(super) fn open_experts(&self, call: GroupedSwigluForward<'_, Self>) -> Result<()> {
        if call.precision == Precision::F32 {
            return moe_parts::swiglu_forward(self, call);
        }
        let sizes = contract::grouped_swiglu_forward(&call)?;
        let GroupedSizes {
            routing,
            inputs,
            outputs,
            rank,
        } = sizes;
        let (rows, dtype) = (routing.slots(), factors(call.precision));
        let x = self.held(call.x, dtype)?;
        let mut second = None;
        if let Some(lora) = call.lora.filter(|_| rank > 0) {
            let a = Experts::Dense(self.held(lora.a, dtype)?);
            let mut scaled = self.alloc(dtype, [rows, rank])?;
            self.tensor_grouped(Grouped {
                left: &x,
                order: RowOrder::Token,
                right: &a,
                reads: Reads::Rows,
                second: None,
                out: Some((lora.hidden, Write::Overwrite)),
                copy: Some((&mut scaled, lora.scale)),
                routing: call.routing,
                sizes: [rows, rank, inputs, 0],
            })?;
            second = Some((scaled, self.held(lora.b, dtype)?));
        }
        let [gate, up] = self.pair_of_rows([call.gate, call.up], call.precision, rows)?;
        let tiles = self.grouped_tiles(call.routing, rows, WIDE.rows)?;
        let types = [expert_type(&gate), call.x.dtype()];
        let [gate, gate_absmax, gate_codes, gate_map, gate_offsets] = expert_arguments(&gate);
        let [up, up_absmax, up_codes, up_map, up_offsets] = expert_arguments(&up);
        let (gate_out, up_out) = call.wide.unzip();
        let (_, top) = extents(call.routing);
        let arguments = [
            Argument::In(&x),
            Argument::In(&call.routing.slots),
            Argument::In(&call.routing.weights),
            gate,
            gate_absmax,
            gate_codes,
            gate_map,
            gate_offsets,
            up,
            up_absmax,
            up_codes,
            up_map,
            up_offsets,
            Argument::Optional(second.as_ref().map(|(scaled, _)| scaled)),
            Argument::Optional(second.as_ref().map(|(_, b)| &**b)),
            Argument::In(&tiles),
            Argument::In(&call.routing.offsets),
            Argument::OptionalOut(gate_out),
            Argument::OptionalOut(up_out),
            Argument::OptionalOut(call.y),
            Argument::Size(top),
            Argument::Size(outputs),
            Argument::Size(inputs),
            Argument::Size(second.as_ref().map_or(0, |_| rank)),
        ];
        let grid = [tiles.shape().rows(), outputs.div_ceil(WIDE.columns / 2), 1];
        let geometry = Geometry::grid(grid).with_shared(WIDE.shared_bytes());
        self.launch(&SWIGLU_WIDE, &types, geometry, &arguments)
    }

    /// [`MoeOps::grouped_pair_backward`](crate::ops::MoeOps::grouped_pair_backward).
    pub(super) fn back_through_pair(&self, call: GroupedPairBackward<'_, Self>) -> Result<()> {
        if call.precision == Precision::F32 {
            return moe_parts::pair_backward(self, call);
        }
        let GroupedSizes {
            routing,
            inputs,
            outputs,
            rank,
        } = contract::grouped_pair_backward(&call)?;
        let (rows, dtype) = (routing.slots(), factors(call.precision));
        let (dgate, dup) = (self.held(call.dgate, dtype)?, self.held(call.dup, dtype)?);
        let mut second: Option<(Tensor<Self>, Held<'_, R>)> = None;
        if let Some(lora) = call.lora.filter(|_| rank > 0) {
            let b = self.held(lora.b, dtype)?;
            let tiles = self.grouped_tiles(call.routing, rows, NARROW.rows)?;
            let mut v = self.alloc(dtype, [rows, rank])?;
            let arguments = [
                Argument::In(&dgate),
                Argument::In(&dup),
                Argument::In(&b),
                Argument::In(&tiles),
                Argument::In(&call.routing.offsets),
                Argument::Out(&mut v),
                Argument::F32(lora.scale),
                Argument::Size(rank),
                Argument::Size(outputs),
            ];
            let grid = [tiles.shape().rows(), rank.div_ceil(NARROW.columns), 1];
            let geometry = Geometry::grid(grid).with_shared(NARROW.shared_bytes());
            self.launch(&PAIR_NARROW, &[], geometry, &arguments)?;
            let x = self.held(lora.x, dtype)?;
            self.tensor_grouped_outer(GroupedOuter {
                left: &v,
                right: &x,
                order: lora.x_order,
                gradient: lora.gradient_a,
                place: [rank * inputs, 0],
                scale: 1.0,
                transposed: false,
                routing: call.routing,
                sizes: [rank, inputs],
            })?;
            let hidden = self.held(lora.hidden, dtype)?;
            for (half, right) in [&dgate, &dup].into_iter().enumerate() {
                self.tensor_grouped_outer(GroupedOuter {
                    left: &hidden,
                    right,
                    order: RowOrder::Grouped,
                    gradient: &mut *lora.gradient_b,
                    place: [2 * outputs * rank, half * outputs * rank],
                    scale: lora.scale,
                    transposed: true,
                    routing: call.routing,
                    sizes: [rank, outputs],
                })?;
            }
            second = Some((v, self.held(lora.a, dtype)?));
        }
        let Some(dx) = call.dx else {
            return Ok(());
        };
        let [gate, up] = self.pair_of_rows([call.gate, call.up], call.precision, rows)?;
        let tiles = self.grouped_tiles(call.routing, rows, WIDE.rows)?;
        let types = [expert_type(&gate), dx.dtype()];
        let [gate, gate_absmax, gate_codes, gate_map, gate_offsets] = expert_arguments(&gate);
        let [up, up_absmax, up_codes, up_map, up_offsets] = expert_arguments(&up);
        let arguments = [
            Argument::In(&dgate),
            Argument::In(&dup),
            gate,
            gate_absmax,
            gate_codes,
            gate_map,
            gate_offsets,
            up,
            up_absmax,
            up_codes,
            up_map,
            up_offsets,
            Argument::Optional(second.as_ref().map(|(v, _)| v)),
            Argument::Optional(second.as_ref().map(|(_, a)| &**a)),
            Argument::In(&tiles),
            Argument::In(&call.routing.offsets),
            Argument::Out(dx),
            Argument::Size(inputs),
            Argument::Size(outputs),
            Argument::Size(second.as_ref().map_or(0, |_| rank)),
            Argument::Flag(false),
        ];
        let grid = [tiles.shape().rows(), inputs.div_ceil(WIDE.columns), 1];
        let geometry = Geometry::grid(grid).with_shared(WIDE.shared_bytes());
        self.launch(&PAIR_WIDE, &types, geometry, &arguments)
    }

    /// [`MoeOps::combine_residual`](crate::ops::MoeOps::combine_residual).
    pub(super) fn combine_into(&self, call: CombineResidual<'_, Self>) -> Result<()> {
        let (width, sizes) = contract::combine_residual(&call)?;
        let arguments = [
            Argument::In(call.grouped),
            Argument::In(&call.routing.rows),
            Argument::Optional(call.shared.map(|(shared, _)| shared)),
            Argument::Optional(call.shared.map(|(_, gate)| gate)),
            Argument::Out(call.x),
            Argument::Size(sizes.tokens),
            Argument::Size(sizes.top),
            Argument::Size(width),
            Argument::Faults,
            Argument::I32(Fault::Routing.code()),
        ];
        let each = Geometry::cover(sizes.tokens * width.div_ceil(PACK), THREADS as usize);
        self.launch(&COMBINE_RESIDUAL, &[call.grouped.dtype()], each, &arguments)
    }
}
