//! Fused ops of grouped rows on tensor cores (`grouped.cu`, or `hopper_fused` where Hopper's kernels can), and the sum that ends a layer
//! of experts (`moe.cu`).
//!
//! In f32, where nothing is fused, the ops are put together from their parts.

use super::super::elementwise::{ACTIVATION, PACK};
use super::super::faults::Fault;
use super::super::kernel::Parameter::{F32, I32, In, Out};
use super::super::matmul::{Held, LowRank, factors};
use super::super::sources::GROUPED;
use super::super::{Argument, Element, Geometry, Gpu, Kernel, Runtime};
use super::hopper;
use super::linear::{Experts, Grouped, GroupedOuter, Reads, extents};
use super::tensor::{NARROW, WIDE, expert_arguments, expert_type};
use super::{THREADS, kernel};
use crate::contract::{self, GroupedSizes};
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::{
    CombineResidual, Device, GroupedPairBackward, GroupedSwigluForward, Precision, Routing, RowOrder, Write, moe_parts,
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

/// Room for gate and up.
type Wide<'a, R> = (&'a mut Tensor<Gpu<R>>, &'a mut Tensor<Gpu<R>>);

/// Both wide projections and their activation, once what the adapter's first product gives is there.
pub(super) struct Opened<'a, R: Runtime> {
    /// By token, in bf16.
    pub(super) x: &'a Tensor<Gpu<R>>,
    /// Gate and up, in one form.
    pub(super) experts: [&'a Experts<'a, R>; 2],
    /// `[M, R]` and `[E, 2·F, R]`.
    pub(super) second: Option<LowRank<'a, R>>,
    pub(super) routing: &'a Routing<Gpu<R>>,
    /// Gate and up, and the activation: what is wanted of them.
    pub(super) wide: Option<Wide<'a, R>>,
    pub(super) y: Option<&'a mut Tensor<Gpu<R>>>,
    /// `M`, `F`, `I`, and `R` of the second term, or 0.
    pub(super) sizes: [usize; 4],
}

/// `dx = dgate · gate_e + dup · up_e + v · A_e`, once `v` is there.
pub(super) struct Paired<'a, R: Runtime> {
    /// Of gate and up, `[M, F]` in bf16.
    pub(super) gradients: [&'a Tensor<Gpu<R>>; 2],
    /// Gate and up, in one form.
    pub(super) experts: [&'a Experts<'a, R>; 2],
    /// `[M, R]` and `[E, R, I]`.
    pub(super) second: Option<LowRank<'a, R>>,
    pub(super) routing: &'a Routing<Gpu<R>>,
    pub(super) dx: &'a mut Tensor<Gpu<R>>,
    /// `M`, `I`, `F`, and `R` of the second term, or 0.
    pub(super) sizes: [usize; 4],
}

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
        let dtype = call.x.dtype();
        let opened = Opened {
            x: &x,
            experts: [&gate, &up],
            second: second.as_ref().map(|(scaled, b)| (scaled, &**b)),
            routing: call.routing,
            wide: call.wide,
            y: call.y,
            sizes: [rows, outputs, inputs, second.as_ref().map_or(0, |_| rank)],
        };
        let kind = (&gate, Reads::Rows, RowOrder::Token);
        let width = hopper::width_within_limits(self.runtime().machine(), kind, call.routing, opened.sizes);
        match width.filter(|_| dtype == DType::BF16) {
            Some(width) => self.hopper_open(opened, width),
            None => self.portable_open(opened, dtype),
        }
    }

    fn portable_open(&self, opened: Opened<'_, R>, dtype: DType) -> Result<()> {
        let [rows, outputs, inputs, rank] = opened.sizes;
        let routing = opened.routing;
        let tiles = self.grouped_tiles(routing, rows, WIDE.rows)?;
        let [gate, up] = opened.experts;
        let types = [expert_type(gate), dtype];
        let [gate, gate_absmax, gate_codes, gate_map, gate_offsets] = expert_arguments(gate);
        let [up, up_absmax, up_codes, up_map, up_offsets] = expert_arguments(up);
        let (gate_out, up_out) = opened.wide.unzip();
        let (_, top) = extents(routing);
        let arguments = [
            Argument::In(opened.x),
            Argument::In(&routing.slots),
            Argument::In(&routing.weights),
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
            Argument::Optional(opened.second.map(|(scaled, _)| scaled)),
            Argument::Optional(opened.second.map(|(_, b)| b)),
            Argument::In(&tiles),
            Argument::In(&routing.offsets),
            Argument::OptionalOut(gate_out),
            Argument::OptionalOut(up_out),
            Argument::OptionalOut(opened.y),
            Argument::Size(top),
            Argument::Size(outputs),
            Argument::Size(inputs),
            Argument::Size(rank),
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
        let dtype = dx.dtype();
        let pair = Paired {
            gradients: [&dgate, &dup],
            experts: [&gate, &up],
            second: second.as_ref().map(|(v, a)| (v, &**a)),
            routing: call.routing,
            dx,
            sizes: [rows, inputs, outputs, second.as_ref().map_or(0, |_| rank)],
        };
        let kind = (&gate, Reads::Columns, RowOrder::Grouped);
        let width = hopper::width_within_limits(self.runtime().machine(), kind, call.routing, pair.sizes);
        match width.filter(|_| dtype == DType::BF16) {
            Some(width) => self.hopper_pair(pair, width),
            None => self.portable_pair(pair, dtype),
        }
    }

    fn portable_pair(&self, pair: Paired<'_, R>, dtype: DType) -> Result<()> {
        let [rows, inputs, outputs, rank] = pair.sizes;
        let tiles = self.grouped_tiles(pair.routing, rows, WIDE.rows)?;
        let [gate, up] = pair.experts;
        let types = [expert_type(gate), dtype];
        let [gate, gate_absmax, gate_codes, gate_map, gate_offsets] = expert_arguments(gate);
        let [up, up_absmax, up_codes, up_map, up_offsets] = expert_arguments(up);
        let [dgate, dup] = pair.gradients;
        let arguments = [
            Argument::In(dgate),
            Argument::In(dup),
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
            Argument::Optional(pair.second.map(|(v, _)| v)),
            Argument::Optional(pair.second.map(|(_, a)| a)),
            Argument::In(&tiles),
            Argument::In(&pair.routing.offsets),
            Argument::Out(pair.dx),
            Argument::Size(inputs),
            Argument::Size(outputs),
            Argument::Size(rank),
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
