//! Products on Hopper's tensor cores: `matmul_hopper.cu`.

use super::super::kernel::Parameter::{F32, I32, I64, In, Map as MapOf, Out};
use super::super::map::{Map, Swizzle};
use super::super::sources::MATMUL_HOPPER;
use super::super::{Argument, Element, Geometry, Gpu, Kernel, Runtime};
use super::tensor::{bias_arguments, weight_arguments, weight_type};
use super::{Product, Reads, Right};
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::Write;
use crate::tensor::Tensor;

/// Tokens of a tile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::gpu) enum Width {
    Narrow,
    Middle,
    Wide,
}

/// Threads of a block: a group that copies, two that multiply.
pub(in crate::gpu) const THREADS: u32 = 384;
/// Outputs of a tile, and the depth of a stage.
pub(in crate::gpu) const OUTPUTS: usize = 128;
const DEPTH: usize = 64;

impl Width {
    pub(in crate::gpu) const fn tokens(self) -> usize {
        match self {
            Self::Narrow => 64,
            Self::Middle => 128,
            Self::Wide => 256,
        }
    }

    /// `HopperTile::STAGING` and what it takes: table and barriers, the ring, the staging area.
    pub(in crate::gpu) const fn shared_bytes(self, weight: DType) -> usize {
        let of_weight = match weight {
            DType::U8 => OUTPUTS * DEPTH / 2 + OUTPUTS * 4,
            _ => OUTPUTS * DEPTH * 2,
        };
        let stage = self.tokens() * DEPTH * 2 + of_weight;
        let rest = 2 * 32 * 68 * 4 + 1024;
        let room = (227 * 1024 - rest) / stage;
        let stages = if room < 8 { room } else { 8 };
        stages * stage + rest
    }
}

const HALF: Element = Element::Is(DType::BF16);
const SINGLE: Element = Element::Is(DType::F32);

const fn product(stem: &'static str) -> Kernel {
    Kernel {
        source: &MATMUL_HOPPER,
        stem,
        types: &[&[DType::BF16, DType::U8]],
        threads: THREADS,
        parameters: &[
            ("left", MapOf),
            ("weight", MapOf),
            ("absmax", In(SINGLE)),
            ("nested_codes", In(Element::Is(DType::U8))),
            ("nested_map", In(SINGLE)),
            ("offset", F32),
            ("left2", MapOf),
            ("right2", In(HALF)),
            ("bias_f32", In(SINGLE)),
            ("bias_bf16", In(HALF)),
            ("out", Out(HALF)),
            ("sums", Out(SINGLE)),
            ("rows", I64),
            ("columns", I32),
            ("depth", I32),
            ("depth2", I32),
            ("part", I32),
            ("accumulate", I32),
        ],
    }
}

static ROWS_NARROW: Kernel = product("hopper_rows_narrow");
static ROWS_MIDDLE: Kernel = product("hopper_rows_middle");
static ROWS_WIDE: Kernel = product("hopper_rows_wide");
static COLUMNS_NARROW: Kernel = product("hopper_columns_narrow");
static COLUMNS_MIDDLE: Kernel = product("hopper_columns_middle");
static COLUMNS_WIDE: Kernel = product("hopper_columns_wide");

pub(super) const KERNELS: &[&Kernel] = &[
    &ROWS_NARROW,
    &ROWS_MIDDLE,
    &ROWS_WIDE,
    &COLUMNS_NARROW,
    &COLUMNS_MIDDLE,
    &COLUMNS_WIDE,
];

/// Rows of tokens, in boxes of so many rows.
pub(in crate::gpu) fn token_map<'a, R: Runtime>(tensor: &'a Tensor<Gpu<R>>, box_rows: usize) -> Map<'a, R> {
    let shape = tensor.shape();
    Map {
        tensor,
        extents: [shape.row(), shape.rows(), 1],
        rectangle: [DEPTH, box_rows, 1],
        swizzle: Swizzle::Bytes128,
    }
}

/// Planes of a frozen matrix, in boxes of a stage. `sizes` are `N` and `K`.
pub(in crate::gpu) fn weight_map<R: Runtime>(
    tensor: &Tensor<Gpu<R>>,
    is_straight: bool,
    planes: usize,
    sizes: [usize; 2],
) -> Map<'_, R> {
    let [columns, depth] = sizes;
    let (row, rows) = if is_straight {
        (depth, columns)
    } else {
        (columns, depth)
    };
    // Codes come two a byte; for dx a box of elements is half as wide as the tile, since the swizzle spans 64 of them.
    let (row, rectangle, swizzle) = match (tensor.dtype(), is_straight) {
        (DType::U8, true) => (row / 2, [DEPTH / 2, OUTPUTS, 1], Swizzle::None),
        (DType::U8, false) => (row / 2, [OUTPUTS / 2, DEPTH, 1], Swizzle::Bytes64),
        (_, true) => (row, [DEPTH, OUTPUTS, 1], Swizzle::Bytes128),
        (_, false) => (row, [OUTPUTS / 2, DEPTH, 1], Swizzle::Bytes128),
    };
    Map {
        tensor,
        extents: [row, rows, planes],
        rectangle,
        swizzle,
    }
}

/// Elements or codes.
pub(in crate::gpu) fn frozen<'a, R: Runtime>(right: &'a Right<'_, R>) -> &'a Tensor<Gpu<R>> {
    match right {
        Right::Dense(tensor) => tensor,
        Right::Nf4(weight) => &weight.codes,
    }
}

/// The same in boxes of half as many rows: one of two matrices beside each other.
pub(in crate::gpu) fn half_map<R: Runtime>(tensor: &Tensor<Gpu<R>>, planes: usize, sizes: [usize; 2]) -> Map<'_, R> {
    let whole = weight_map(tensor, true, planes, sizes);
    Map {
        rectangle: [whole.rectangle[0], OUTPUTS / 2, 1],
        ..whole
    }
}

impl<R: Runtime> Gpu<R> {
    /// The product, or its parts `[S, M, N]`, each `part` deep, if there is room for them.
    pub(super) fn hopper_product(
        &self,
        product: Product<'_, R>,
        width: Width,
        part: usize,
        sums: Option<&mut Tensor<Self>>,
    ) -> Result<()> {
        let [rows, columns, depth, depth2] = product.sizes;
        let kernel = match (product.reads, width) {
            (Reads::Rows, Width::Narrow) => &ROWS_NARROW,
            (Reads::Rows, Width::Middle) => &ROWS_MIDDLE,
            (Reads::Rows, Width::Wide) => &ROWS_WIDE,
            (Reads::Columns, Width::Narrow) => &COLUMNS_NARROW,
            (Reads::Columns, Width::Middle) => &COLUMNS_MIDDLE,
            (Reads::Columns, Width::Wide) => &COLUMNS_WIDE,
        };
        let weight = weight_type(product.right);
        let accumulate = matches!(product.out, Some((_, Write::Accumulate)));
        let [_, absmax, nested, map, offset] = weight_arguments(product.right);
        let [bias_f32, bias_bf16] = bias_arguments(product.bias);
        let tokens = |tensor| Argument::Map(token_map(tensor, width.tokens()));
        let is_straight = product.reads == Reads::Rows;
        let arguments = [
            tokens(product.left),
            Argument::Map(weight_map(frozen(product.right), is_straight, 1, [columns, depth])),
            absmax,
            nested,
            map,
            offset,
            // Without a second term its map is not looked at.
            tokens(product.second.map_or(product.left, |(left, _)| left)),
            Argument::Optional(product.second.map(|(_, right)| right)),
            bias_f32,
            bias_bf16,
            Argument::OptionalOut(product.out.map(|(out, _)| out)),
            Argument::OptionalOut(sums),
            Argument::Size(rows),
            Argument::Size(columns),
            Argument::Size(depth),
            Argument::Size(product.second.map_or(0, |_| depth2)),
            Argument::Size(part),
            Argument::Flag(accumulate),
        ];
        let tiles = rows.div_ceil(width.tokens()) * columns.div_ceil(OUTPUTS) * depth.div_ceil(part);
        let geometry = self.persistent(tiles).with_shared(width.shared_bytes(weight));
        self.launch(kernel, &[weight], geometry, &arguments)
    }

    /// A grid whose blocks stay, a multiprocessor each, and share so many tiles.
    pub(in crate::gpu) fn persistent(&self, tiles: usize) -> Geometry {
        Geometry::cover(tiles.min(self.runtime().machine().multiprocessors as usize), 1)
    }
}
