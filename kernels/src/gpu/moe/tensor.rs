//! Products of grouped rows on tensor cores: `grouped.cu`.

use super::super::elementwise::ACTIVATION;
use super::super::kernel::Parameter::{F32, I32, I64, In, Out};
use super::super::matmul::Tile;
use super::super::sources::GROUPED;
use super::super::{Argument, Element, Geometry, Gpu, Kernel, Runtime};
use super::fused;
use super::linear::{Experts, Grouped, GroupedOuter, Reads, extents, most_tiles, slots};
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::{Device, Routing, Write};
use crate::stack::{Nf4Stack, Nf4StackScales};
use crate::tensor::Tensor;

/// A fused NF4 product wants rows that are a multiple of this long: a thread decodes so many elements at once.
pub(super) const NF4_ROW: usize = 32;

/// For layers: an expert's last tile is seldom full, so it is lower than that of an ordinary layer.
pub(super) const WIDE: Tile = Tile {
    rows: 64,
    columns: 128,
    warps: 4,
    stages: 3,
};

/// For products as narrow as an adapter's rank.
pub(super) const NARROW: Tile = Tile {
    rows: 32,
    columns: 64,
    warps: 4,
    stages: 4,
};

const THREADS: u32 = 256;
const HALF: Element = Element::Is(DType::BF16);
const SINGLE: Element = Element::Is(DType::F32);
const INTEGER: Element = Element::Is(DType::I32);
const BYTE: Element = Element::Is(DType::U8);

const fn grouped(stem: &'static str, tile: Tile, types: &'static [&'static [DType]]) -> Kernel {
    Kernel {
        source: &GROUPED,
        stem,
        types,
        threads: tile.threads(),
        parameters: &[
            ("left", In(HALF)),
            ("left_slots", In(INTEGER)),
            ("weight", In(Element::Type(0))),
            ("absmax", In(SINGLE)),
            ("nested_codes", In(BYTE)),
            ("nested_map", In(SINGLE)),
            ("nested_offsets", In(SINGLE)),
            ("left2", In(HALF)),
            ("right2", In(HALF)),
            ("tiles", In(INTEGER)),
            ("offsets", In(INTEGER)),
            ("out", Out(Element::Type(1))),
            ("copy", Out(HALF)),
            ("copy_scale", F32),
            ("top", I32),
            ("columns", I32),
            ("depth", I32),
            ("depth2", I32),
            ("accumulate", I32),
        ],
    }
}

const LAYER: &[&[DType]] = &[&[DType::BF16, DType::U8], ACTIVATION];
const ADAPTER: &[&[DType]] = &[&[DType::BF16], &[DType::F32]];

static ROWS_WIDE: Kernel = grouped("grouped_rows_wide", WIDE, LAYER);
static COLUMNS_WIDE: Kernel = grouped("grouped_columns_wide", WIDE, LAYER);
static ROWS_NARROW: Kernel = grouped("grouped_rows_narrow", NARROW, ADAPTER);
static COLUMNS_NARROW: Kernel = grouped("grouped_columns_narrow", NARROW, ADAPTER);

static OUTER: Kernel = Kernel {
    source: &GROUPED,
    stem: "grouped_outer",
    types: &[],
    threads: NARROW.threads(),
    parameters: &[
        ("left", In(HALF)),
        ("right", In(HALF)),
        ("right_slots", In(INTEGER)),
        ("offsets", In(INTEGER)),
        ("gradient", Out(SINGLE)),
        ("stride", I64),
        ("first", I64),
        ("top", I32),
        ("rows", I32),
        ("columns", I32),
        ("scale", F32),
        ("transposed", I32),
    ],
};

static TILES: Kernel = Kernel {
    source: &GROUPED,
    stem: "grouped_tiles",
    types: &[],
    threads: THREADS,
    parameters: &[
        ("offsets", In(INTEGER)),
        ("tiles", Out(INTEGER)),
        ("experts", I32),
        ("height", I32),
        ("count", I32),
    ],
};

static DECODE: Kernel = Kernel {
    source: &GROUPED,
    stem: "decode_stack",
    types: &[],
    threads: THREADS,
    parameters: &[
        ("codes", In(BYTE)),
        ("absmax", In(SINGLE)),
        ("nested_codes", In(BYTE)),
        ("nested_map", In(SINGLE)),
        ("nested_offsets", In(SINGLE)),
        ("values", Out(HALF)),
        ("experts", I32),
        ("size", I64),
    ],
};

pub(super) const KERNELS: &[&Kernel] = &[
    &ROWS_WIDE,
    &COLUMNS_WIDE,
    &ROWS_NARROW,
    &COLUMNS_NARROW,
    &OUTER,
    &TILES,
    &DECODE,
    &fused::SWIGLU_WIDE,
    &fused::PAIR_WIDE,
    &fused::PAIR_NARROW,
];

/// The experts' pointers, as all products take them: elements or codes, scales, nested codes, their map, offsets.
pub(super) fn expert_arguments<'a, R: Runtime>(experts: &'a Experts<'_, R>) -> [Argument<'a, R>; 5] {
    match experts {
        Experts::Dense(tensor) => {
            let none = || Argument::Optional(None);
            [Argument::In(tensor), none(), none(), none(), none()]
        }
        Experts::Nf4(stack) => stack_arguments(stack),
    }
}

fn stack_arguments<R: Runtime>(stack: &Nf4Stack<Gpu<R>>) -> [Argument<'_, R>; 5] {
    let codes = Argument::In(&stack.codes);
    match &stack.scales {
        Nf4StackScales::Flat(absmax) => {
            let none = || Argument::Optional(None);
            [codes, Argument::In(absmax), none(), none(), none()]
        }
        Nf4StackScales::Nested {
            codes: nested,
            nested_absmax,
            nested_code,
            offsets,
        } => [
            codes,
            Argument::In(nested_absmax),
            Argument::In(nested),
            Argument::In(nested_code),
            Argument::In(offsets),
        ],
    }
}

/// What the experts' factors are called in an entry's name.
pub(super) fn expert_type<R: Runtime>(experts: &Experts<'_, R>) -> DType {
    match experts {
        Experts::Dense(tensor) => tensor.dtype(),
        Experts::Nf4(_) => DType::U8,
    }
}

impl<R: Runtime> Gpu<R> {
    /// Which expert and rows each block of a grouped product has, i32 `[blocks, 2]`.
    pub(super) fn grouped_tiles(&self, routing: &Routing<Self>, rows: usize, height: usize) -> Result<Tensor<Self>> {
        let (experts, _) = extents(routing);
        let count = most_tiles(rows, experts, height);
        let mut tiles = self.alloc(DType::I32, [count, 2])?;
        let arguments = [
            Argument::In(&routing.offsets),
            Argument::Out(&mut tiles),
            Argument::Size(experts),
            Argument::Size(height),
            Argument::Size(count),
        ];
        self.launch(&TILES, &[], Geometry::cover(count.min(1), 1), &arguments)?;
        Ok(tiles)
    }

    pub(super) fn tensor_grouped(&self, grouped: Grouped<'_, R>) -> Result<()> {
        if let Some(width) = super::hopper::width(self.runtime().machine(), &grouped) {
            return self.hopper_grouped(grouped, width);
        }
        let [rows, columns, depth, depth2] = grouped.sizes;
        // What has a copy in bf16 is an adapter's first product.
        let narrow = grouped.copy.is_some();
        let (kernel, tile) = match (grouped.reads, narrow) {
            (Reads::Rows, false) => (&ROWS_WIDE, WIDE),
            (Reads::Rows, true) => (&ROWS_NARROW, NARROW),
            (Reads::Columns, false) => (&COLUMNS_WIDE, WIDE),
            (Reads::Columns, true) => (&COLUMNS_NARROW, NARROW),
        };
        let tiles = self.grouped_tiles(grouped.routing, rows, tile.rows)?;
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
            Argument::Optional(grouped.second.map(|(left, _)| left)),
            Argument::Optional(grouped.second.map(|(_, right)| right)),
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
        let grid = [tiles.shape().rows(), columns.div_ceil(tile.columns), 1];
        let geometry = Geometry::grid(grid).with_shared(tile.shared_bytes());
        self.launch(kernel, &types, geometry, &arguments)
    }

    pub(super) fn tensor_grouped_outer(&self, outer: GroupedOuter<'_, R>) -> Result<()> {
        let [rows, columns] = outer.sizes;
        let (experts, top) = extents(outer.routing);
        let arguments = [
            Argument::In(outer.left),
            Argument::In(outer.right),
            Argument::Optional(slots(outer.order, outer.routing)),
            Argument::In(&outer.routing.offsets),
            Argument::Out(outer.gradient),
            Argument::Size(outer.place[0]),
            Argument::Size(outer.place[1]),
            Argument::Size(top),
            Argument::Size(rows),
            Argument::Size(columns),
            Argument::F32(outer.scale),
            Argument::Flag(outer.transposed),
        ];
        self.launch(&OUTER, &[], NARROW.geometry(rows, columns, experts), &arguments)
    }

    /// Every expert's matrix in bf16.
    pub(super) fn decode_stack(&self, stack: &Nf4Stack<Self>) -> Result<Tensor<Self>> {
        let size = stack.outputs * stack.inputs;
        let mut values = self.alloc(DType::BF16, [stack.experts, stack.outputs, stack.inputs])?;
        let [codes, absmax, nested, map, offsets] = stack_arguments(stack);
        let arguments = [
            codes,
            absmax,
            nested,
            map,
            offsets,
            Argument::Out(&mut values),
            Argument::Size(stack.experts),
            Argument::Size(size),
        ];
        let each = Geometry::cover(stack.experts * size, THREADS as usize);
        self.launch(&DECODE, &[], each, &arguments)?;
        Ok(values)
    }
}
