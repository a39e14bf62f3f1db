//! Products of grouped rows in f32: `grouped_f32.cu`.

use super::super::elementwise::ACTIVATION;
use super::super::kernel::Parameter::{F32, I32, I64, In, Out};
use super::super::sources::GROUPED_F32;
use super::super::{Argument, Element, Geometry, Gpu, Kernel, Runtime};
use super::linear::{Grouped, GroupedOuter, Reads, extents, slots};
use super::tensor::{expert_arguments, expert_type};
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::Write;

/// Rows and columns of a block's tile.
const TILE: usize = 64;
const SINGLE: Element = Element::Is(DType::F32);
const INTEGER: Element = Element::Is(DType::I32);

static GROUPED: Kernel = Kernel {
    source: &GROUPED_F32,
    stem: "grouped_exact",
    types: &[&[DType::F32, DType::BF16, DType::F16, DType::U8], ACTIVATION],
    threads: 256,
    parameters: &[
        ("left", In(SINGLE)),
        ("left_slots", In(INTEGER)),
        ("weight", In(Element::Type(0))),
        ("absmax", In(SINGLE)),
        ("nested_codes", In(Element::Is(DType::U8))),
        ("nested_map", In(SINGLE)),
        ("nested_offsets", In(SINGLE)),
        ("weight_stride", I64),
        ("weight_deep", I64),
        ("left2", In(SINGLE)),
        ("right2", In(SINGLE)),
        ("right2_stride", I64),
        ("right2_deep", I64),
        ("tiles", In(INTEGER)),
        ("offsets", In(INTEGER)),
        ("out", Out(Element::Type(1))),
        ("copy", Out(SINGLE)),
        ("copy_scale", F32),
        ("top", I32),
        ("columns", I32),
        ("depth", I32),
        ("depth2", I32),
        ("accumulate", I32),
    ],
};

static OUTER: Kernel = Kernel {
    source: &GROUPED_F32,
    stem: "grouped_exact_outer",
    types: &[],
    threads: 256,
    parameters: &[
        ("left", In(SINGLE)),
        ("right", In(SINGLE)),
        ("right_slots", In(INTEGER)),
        ("offsets", In(INTEGER)),
        ("gradient", Out(SINGLE)),
        ("top", I32),
        ("rows", I32),
        ("columns", I32),
        ("scale", F32),
        ("transposed", I32),
    ],
};

pub(super) const KERNELS: &[&Kernel] = &[&GROUPED, &OUTER];

impl<R: Runtime> Gpu<R> {
    pub(super) fn exact_grouped(&self, grouped: Grouped<'_, R>) -> Result<()> {
        let [rows, columns, depth, depth2] = grouped.sizes;
        let strides = |deep: usize| match grouped.reads {
            Reads::Rows => [deep, 1],
            Reads::Columns => [1, columns],
        };
        let ([stride, deep], [stride2, deep2]) = (strides(depth), strides(depth2));
        let tiles = self.grouped_tiles(grouped.routing, rows, TILE)?;
        let accumulate = matches!(grouped.out, Some((_, Write::Accumulate)));
        let out_type = grouped.out.as_ref().map_or(DType::F32, |(out, _)| out.dtype());
        let types = [expert_type(grouped.right), out_type];
        let [weight, absmax, nested, map, offsets] = expert_arguments(grouped.right);
        let (copy, copy_scale) = grouped.copy.unzip();
        let (_, top) = extents(grouped.routing);
        let arguments = [
            Argument::In(grouped.left),
            Argument::Optional(slots(grouped.order, grouped.routing)),
            weight,
            absmax,
            nested,
            map,
            offsets,
            Argument::Size(stride),
            Argument::Size(deep),
            Argument::Optional(grouped.second.map(|(left, _)| left)),
            Argument::Optional(grouped.second.map(|(_, right)| right)),
            Argument::Size(stride2),
            Argument::Size(deep2),
            Argument::In(&tiles),
            Argument::In(&grouped.routing.offsets),
            Argument::OptionalOut(grouped.out.map(|(out, _)| out)),
            Argument::OptionalOut(copy),
            Argument::F32(copy_scale.unwrap_or(0.0)),
            Argument::Size(top),
            Argument::Size(columns),
            Argument::Size(depth),
            Argument::Size(grouped.second.map_or(0, |_| depth2)),
            Argument::Flag(accumulate),
        ];
        let geometry = Geometry::grid([tiles.shape().rows(), columns.div_ceil(TILE), 1]);
        self.launch(&GROUPED, &types, geometry, &arguments)
    }

    pub(super) fn exact_grouped_outer(&self, outer: GroupedOuter<'_, R>) -> Result<()> {
        let [rows, columns] = outer.sizes;
        let (experts, top) = extents(outer.routing);
        let arguments = [
            Argument::In(outer.left),
            Argument::In(outer.right),
            Argument::Optional(slots(outer.order, outer.routing)),
            Argument::In(&outer.routing.offsets),
            Argument::Out(outer.gradient),
            Argument::Size(top),
            Argument::Size(rows),
            Argument::Size(columns),
            Argument::F32(outer.scale),
            Argument::Flag(outer.transposed),
        ];
        let geometry = Geometry::grid([rows.div_ceil(TILE), columns.div_ceil(TILE), experts]);
        self.launch(&OUTER, &[], geometry, &arguments)
    }
}
