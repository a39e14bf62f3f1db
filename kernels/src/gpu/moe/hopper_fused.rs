//! Fused ops of grouped rows on Hopper's tensor cores: two stacks in one launch of `grouped_hopper.cu`.

use super::super::kernel::Parameter::{I32, In, Map as MapOf, Out};
use super::super::matmul::hopper::{OUTPUTS, THREADS, Width, half_map, token_map, weight_map};
use super::super::sources::GROUPED_HOPPER;
use super::super::{Argument, Element, Gpu, Kernel, Runtime};
use super::fused::{Opened, Paired};
use super::hopper::frozen;
use super::linear::extents;
use super::tensor::{expert_arguments, expert_type};
use crate::dtype::DType;
use crate::error::Result;

const HALF: Element = Element::Is(DType::BF16);
const SINGLE: Element = Element::Is(DType::F32);
const INTEGER: Element = Element::Is(DType::I32);
const BYTE: Element = Element::Is(DType::U8);
const ENCODINGS: &[&[DType]] = &[&[DType::BF16, DType::U8]];

const fn swiglu(stem: &'static str) -> Kernel {
    Kernel {
        source: &GROUPED_HOPPER,
        stem,
        types: ENCODINGS,
        threads: THREADS,
        parameters: &[
            ("left", MapOf),
            ("slots", In(INTEGER)),
            ("weights", In(SINGLE)),
            ("gate", MapOf),
            ("gate_absmax", In(SINGLE)),
            ("gate_codes", In(BYTE)),
            ("gate_map", In(SINGLE)),
            ("gate_offsets", In(SINGLE)),
            ("up", MapOf),
            ("up_absmax", In(SINGLE)),
            ("up_codes", In(BYTE)),
            ("up_map", In(SINGLE)),
            ("up_offsets", In(SINGLE)),
            ("left2", MapOf),
            ("right2", In(HALF)),
            ("tiles", In(INTEGER)),
            ("offsets", In(INTEGER)),
            ("gate_out", Out(HALF)),
            ("up_out", Out(HALF)),
            ("y", Out(HALF)),
            ("groups", I32),
            ("top", I32),
            ("columns", I32),
            ("depth", I32),
            ("depth2", I32),
        ],
    }
}

const fn pair(stem: &'static str) -> Kernel {
    Kernel {
        source: &GROUPED_HOPPER,
        stem,
        types: ENCODINGS,
        threads: THREADS,
        parameters: &[
            ("left_a", MapOf),
            ("left_b", MapOf),
            ("weight_a", MapOf),
            ("absmax_a", In(SINGLE)),
            ("codes_a", In(BYTE)),
            ("map_a", In(SINGLE)),
            ("offsets_a", In(SINGLE)),
            ("weight_b", MapOf),
            ("absmax_b", In(SINGLE)),
            ("codes_b", In(BYTE)),
            ("map_b", In(SINGLE)),
            ("offsets_b", In(SINGLE)),
            ("left2", MapOf),
            ("right2", In(HALF)),
            ("tiles", In(INTEGER)),
            ("offsets", In(INTEGER)),
            ("out", Out(HALF)),
            ("groups", I32),
            ("columns", I32),
            ("depth", I32),
            ("depth2", I32),
        ],
    }
}

pub(super) static SWIGLU_NARROW: Kernel = swiglu("hopper_grouped_swiglu_narrow");
pub(super) static SWIGLU_MIDDLE: Kernel = swiglu("hopper_grouped_swiglu_middle");
pub(super) static PAIR_NARROW: Kernel = pair("hopper_grouped_pair_narrow");
pub(super) static PAIR_MIDDLE: Kernel = pair("hopper_grouped_pair_middle");
pub(super) static PAIR_WIDE: Kernel = pair("hopper_grouped_pair_wide");

/// Different outputs of a tile that two matrices share.
const OUTPUTS_OF_EACH: usize = OUTPUTS / 2;

impl<R: Runtime> Gpu<R> {
    /// Both wide projections and their activation.
    pub(super) fn hopper_open(&self, opened: Opened<'_, R>, width: Width) -> Result<()> {
        let [rows, columns, depth, depth2] = opened.sizes;
        let kernel = match width {
            Width::Narrow => &SWIGLU_NARROW,
            _ => &SWIGLU_MIDDLE,
        };
        let tiles = self.grouped_tiles(opened.routing, rows, width.tokens())?;
        let (experts, top) = extents(opened.routing);
        let [gate, up] = opened.experts;
        let weight = expert_type(gate);
        let map = |of| Argument::Map(half_map(frozen(of), experts, [columns, depth]));
        let [_, gate_absmax, gate_codes, gate_map, gate_offsets] = expert_arguments(gate);
        let [_, up_absmax, up_codes, up_map, up_offsets] = expert_arguments(up);
        let (gate_out, up_out) = opened.wide.unzip();
        let groups = tiles.shape().rows();
        let arguments = [
            // Tokens lie apart: a box each.
            Argument::Map(token_map(opened.x, 1)),
            Argument::In(&opened.routing.slots),
            Argument::In(&opened.routing.weights),
            map(gate),
            gate_absmax,
            gate_codes,
            gate_map,
            gate_offsets,
            map(up),
            up_absmax,
            up_codes,
            up_map,
            up_offsets,
            // Without a second term its map is not looked at.
            Argument::Map(token_map(
                opened.second.map_or(opened.x, |(left, _)| left),
                width.tokens(),
            )),
            Argument::Optional(opened.second.map(|(_, right)| right)),
            Argument::In(&tiles),
            Argument::In(&opened.routing.offsets),
            Argument::OptionalOut(gate_out),
            Argument::OptionalOut(up_out),
            Argument::OptionalOut(opened.y),
            Argument::Size(groups),
            Argument::Size(top),
            Argument::Size(columns),
            Argument::Size(depth),
            Argument::Size(depth2),
        ];
        let geometry = self.persistent(groups * columns.div_ceil(OUTPUTS_OF_EACH));
        self.launch(
            kernel,
            &[weight],
            geometry.with_shared(width.shared_bytes(weight)),
            &arguments,
        )
    }

    /// What flows back through both wide projections.
    pub(super) fn hopper_pair(&self, pair: Paired<'_, R>, width: Width) -> Result<()> {
        let [rows, columns, depth, depth2] = pair.sizes;
        let kernel = match width {
            Width::Narrow => &PAIR_NARROW,
            Width::Middle => &PAIR_MIDDLE,
            Width::Wide => &PAIR_WIDE,
        };
        let tiles = self.grouped_tiles(pair.routing, rows, width.tokens())?;
        let (experts, _) = extents(pair.routing);
        let [gate, up] = pair.experts;
        let weight = expert_type(gate);
        let tokens = |tensor| Argument::Map(token_map(tensor, width.tokens()));
        let map = |of| Argument::Map(weight_map(frozen(of), false, experts, [columns, depth]));
        let [_, absmax_a, codes_a, map_a, offsets_a] = expert_arguments(gate);
        let [_, absmax_b, codes_b, map_b, offsets_b] = expert_arguments(up);
        let [dgate, dup] = pair.gradients;
        let groups = tiles.shape().rows();
        let arguments = [
            tokens(dgate),
            tokens(dup),
            map(gate),
            absmax_a,
            codes_a,
            map_a,
            offsets_a,
            map(up),
            absmax_b,
            codes_b,
            map_b,
            offsets_b,
            tokens(pair.second.map_or(dgate, |(left, _)| left)),
            Argument::Optional(pair.second.map(|(_, right)| right)),
            Argument::In(&tiles),
            Argument::In(&pair.routing.offsets),
            Argument::Out(pair.dx),
            Argument::Size(groups),
            Argument::Size(columns),
            Argument::Size(depth),
            Argument::Size(depth2),
        ];
        let geometry = self.persistent(groups * columns.div_ceil(OUTPUTS));
        self.launch(
            kernel,
            &[weight],
            geometry.with_shared(width.shared_bytes(weight)),
            &arguments,
        )
    }
}
