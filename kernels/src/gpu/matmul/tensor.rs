//! Products of bf16 factors on tensor cores: `matmul.cu`.

use super::super::elementwise::{ACTIVATION, PACK};
use super::super::kernel::Parameter::{F32, I32, I64, In, Out};
use super::super::sources::MATMUL;
use super::super::{Argument, Element, Geometry, Gpu, Kernel, Runtime};
use super::choice::{self, Path};
use super::{Outer, Product, Reads, Right};
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::{Device, Write};
use crate::tensor::Tensor;
use crate::weight::{Nf4Scales, Nf4Weight};

/// A fused NF4 product wants rows that are a multiple of this long: a thread decodes so many elements at once.
pub(crate) const NF4_ROW: usize = 32;

/// A tile of `tile.cuh`, by the same numbers as in `matmul.cu`.
#[derive(Clone, Copy)]
pub(in crate::gpu) struct Tile {
    pub(in crate::gpu) rows: usize,
    pub(in crate::gpu) columns: usize,
    pub(in crate::gpu) warps: u32,
    pub(in crate::gpu) stages: usize,
}

pub(in crate::gpu) const LARGE: Tile = Tile {
    rows: 128,
    columns: 128,
    warps: 4,
    stages: 3,
};

pub(super) const SMALL: Tile = Tile {
    rows: 32,
    columns: 64,
    warps: 4,
    stages: 4,
};

/// Depth of a stage.
const DEPTH: usize = 64;

impl Tile {
    pub(in crate::gpu) const fn threads(self) -> u32 {
        self.warps * 32
    }

    /// `Tile::SHARED_BYTES`: the ring of stages, or the finished tile in f32 if that is larger.
    pub(in super::super) const fn shared_bytes(self) -> usize {
        let ring = self.stages * (self.rows + self.columns) * DEPTH * 2;
        let result = self.rows * (self.columns + 8) * 4;
        if ring > result { ring } else { result }
    }

    pub(in crate::gpu) fn geometry(self, rows: usize, columns: usize, parts: usize) -> Geometry {
        Geometry::grid([rows.div_ceil(self.rows), columns.div_ceil(self.columns), parts])
            .with_shared(self.shared_bytes())
    }
}

const HALF: Element = Element::Is(DType::BF16);
const SINGLE: Element = Element::Is(DType::F32);
const W: Element = Element::Type(0);

const fn product(stem: &'static str, tile: Tile) -> Kernel {
    Kernel {
        source: &MATMUL,
        stem,
        types: &[&[DType::BF16, DType::U8], ACTIVATION],
        threads: tile.threads(),
        parameters: &[
            ("left", In(HALF)),
            ("weight", In(W)),
            ("absmax", In(SINGLE)),
            ("nested_codes", In(Element::Is(DType::U8))),
            ("nested_map", In(SINGLE)),
            ("offset", F32),
            ("left2", In(HALF)),
            ("right2", In(HALF)),
            ("bias_f32", In(SINGLE)),
            ("bias_bf16", In(HALF)),
            ("out", Out(Element::Type(1))),
            ("copy", Out(HALF)),
            ("copy_scale", F32),
            ("rows", I64),
            ("columns", I32),
            ("depth", I32),
            ("depth2", I32),
            ("part", I32),
            ("accumulate", I32),
        ],
    }
}

static ROWS_LARGE: Kernel = product("product_rows_large", LARGE);
static ROWS_SMALL: Kernel = product("product_rows_small", SMALL);
static COLUMNS_LARGE: Kernel = product("product_columns_large", LARGE);
static COLUMNS_SMALL: Kernel = product("product_columns_small", SMALL);

static PRODUCT_OUTER: Kernel = Kernel {
    source: &MATMUL,
    stem: "product_outer",
    types: &[],
    threads: SMALL.threads(),
    parameters: &[
        ("left", In(HALF)),
        ("right", In(HALF)),
        ("parts", Out(SINGLE)),
        ("depth", I64),
        ("part", I32),
        ("rows", I32),
        ("columns", I32),
    ],
};

static ADD_PARTS: Kernel = Kernel {
    source: &MATMUL,
    stem: "add_parts",
    types: &[],
    threads: 256,
    parameters: &[
        ("parts", In(SINGLE)),
        ("gradient", Out(SINGLE)),
        ("count", I32),
        ("rows", I32),
        ("columns", I32),
        ("scale", F32),
        ("transposed", I32),
    ],
};

static SUM_PARTS: Kernel = Kernel {
    source: &MATMUL,
    stem: "sum_parts",
    types: &[ACTIVATION],
    threads: 256,
    parameters: &[
        ("parts", In(SINGLE)),
        ("bias_f32", In(SINGLE)),
        ("bias_bf16", In(HALF)),
        ("out", Out(Element::Type(0))),
        ("copy", Out(HALF)),
        ("copy_scale", F32),
        ("rows", I64),
        ("columns", I32),
        ("count", I32),
        ("accumulate", I32),
    ],
};

pub(super) const KERNELS: &[&Kernel] = &[
    &ROWS_LARGE,
    &ROWS_SMALL,
    &COLUMNS_LARGE,
    &COLUMNS_SMALL,
    &PRODUCT_OUTER,
    &ADD_PARTS,
    &SUM_PARTS,
];

/// Tokens of a part of an outer product. It decides the order of the sum, so it is a constant.
pub(crate) const PART: usize = 512;

/// A weight's pointers, as all products take them: elements or codes, scales, nested codes, their map, offset.
pub(in crate::gpu) fn weight_arguments<'a, R: Runtime>(right: &'a Right<'_, R>) -> [Argument<'a, R>; 5] {
    match right {
        Right::Dense(tensor) => [
            Argument::In(tensor),
            Argument::Optional(None),
            Argument::Optional(None),
            Argument::Optional(None),
            Argument::F32(0.0),
        ],
        Right::Nf4(weight) => nf4_arguments(weight),
    }
}

fn nf4_arguments<R: Runtime>(weight: &Nf4Weight<Gpu<R>>) -> [Argument<'_, R>; 5] {
    let codes = Argument::In(&weight.codes);
    match &weight.scales {
        Nf4Scales::Flat(absmax) => [
            codes,
            Argument::In(absmax),
            Argument::Optional(None),
            Argument::Optional(None),
            Argument::F32(0.0),
        ],
        Nf4Scales::Nested {
            codes: nested,
            nested_absmax,
            nested_code,
            offset,
        } => [
            codes,
            Argument::In(nested_absmax),
            Argument::In(nested),
            Argument::In(nested_code),
            Argument::F32(*offset),
        ],
    }
}

/// A bias as the two pointers for its two dtypes.
pub(super) fn bias_arguments<R: Runtime>(bias: Option<&Tensor<Gpu<R>>>) -> [Argument<'_, R>; 2] {
    [DType::F32, DType::BF16].map(|dtype| Argument::Optional(bias.filter(|bias| bias.dtype() == dtype)))
}

/// What a right factor is called in an entry's name.
pub(in crate::gpu) fn weight_type<R: Runtime>(right: &Right<'_, R>) -> DType {
    match right {
        Right::Dense(tensor) => tensor.dtype(),
        Right::Nf4(_) => DType::U8,
    }
}

/// What is done with a product that was made in parts: of [`Product`], what concerns its result.
struct Whole<'a, R: Runtime> {
    bias: Option<&'a Tensor<Gpu<R>>>,
    out: Option<(&'a mut Tensor<Gpu<R>>, Write)>,
    copy: Option<(&'a mut Tensor<Gpu<R>>, f32)>,
    /// `M` and `N`.
    sizes: [usize; 2],
}

impl<R: Runtime> Gpu<R> {
    pub(super) fn tensor_product(&self, mut product: Product<'_, R>) -> Result<()> {
        let [rows, columns, depth, _] = product.sizes;
        let path = choice::path(self.runtime().machine(), &product);
        let part = path.part([rows, columns, depth]);
        let count = depth.div_ceil(part);
        if count < 2 {
            return self.product_on(path, product, part);
        }
        let mut parts = self.alloc(DType::F32, [count, rows, columns])?;
        let whole = Whole {
            bias: product.bias.take(),
            out: product.out.take(),
            copy: product.copy.take(),
            sizes: [rows, columns],
        };
        if let Path::Hopper(width) = path {
            self.hopper_product(product, width, part, Some(&mut parts))?;
        } else {
            let out = Some((&mut parts, Write::Overwrite));
            self.product_on(path, Product { out, ..product }, part)?;
        }
        self.sum_parts(&parts, whole)
    }

    /// The product by one launch; with parts less deep than it is, `out` is `[S, M, N]`.
    fn product_on(&self, path: Path, product: Product<'_, R>, part: usize) -> Result<()> {
        let [rows, columns, depth, depth2] = product.sizes;
        let (kernel, tile) = match (product.reads, path) {
            (_, Path::Hopper(width)) => return self.hopper_product(product, width, part, None),
            (Reads::Rows, Path::Large) => (&ROWS_LARGE, LARGE),
            (Reads::Rows, Path::Small) => (&ROWS_SMALL, SMALL),
            (Reads::Columns, Path::Large) => (&COLUMNS_LARGE, LARGE),
            (Reads::Columns, Path::Small) => (&COLUMNS_SMALL, SMALL),
        };
        let accumulate = matches!(product.out, Some((_, Write::Accumulate)));
        let out_type = product.out.as_ref().map_or(DType::F32, |(out, _)| out.dtype());
        let types = [weight_type(product.right), out_type];
        let [weight, absmax, nested, map, offset] = weight_arguments(product.right);
        let [bias_f32, bias_bf16] = bias_arguments(product.bias);
        let (copy, copy_scale) = product.copy.unzip();
        let arguments = [
            Argument::In(product.left),
            weight,
            absmax,
            nested,
            map,
            offset,
            Argument::Optional(product.second.map(|(left, _)| left)),
            Argument::Optional(product.second.map(|(_, right)| right)),
            bias_f32,
            bias_bf16,
            Argument::OptionalOut(product.out.map(|(out, _)| out)),
            Argument::OptionalOut(copy),
            Argument::F32(copy_scale.unwrap_or(0.0)),
            Argument::Size(rows),
            Argument::Size(columns),
            Argument::Size(depth),
            Argument::Size(product.second.map_or(0, |_| depth2)),
            Argument::Size(part),
            Argument::Flag(accumulate),
        ];
        let parts = depth.div_ceil(part).max(1);
        self.launch(kernel, &types, tile.geometry(rows, columns, parts), &arguments)
    }

    /// Adds the parts of a product in their order, and does with the sum what would have been done with the product.
    fn sum_parts(&self, parts: &Tensor<Self>, whole: Whole<'_, R>) -> Result<()> {
        let [rows, columns] = whole.sizes;
        let [bias_f32, bias_bf16] = bias_arguments(whole.bias);
        let accumulate = matches!(whole.out, Some((_, Write::Accumulate)));
        let out_type = whole.out.as_ref().map_or(DType::F32, |(out, _)| out.dtype());
        let (copy, copy_scale) = whole.copy.unzip();
        let arguments = [
            Argument::In(parts),
            bias_f32,
            bias_bf16,
            Argument::OptionalOut(whole.out.map(|(out, _)| out)),
            Argument::OptionalOut(copy),
            Argument::F32(copy_scale.unwrap_or(0.0)),
            Argument::Size(rows),
            Argument::Size(columns),
            Argument::Size(parts.shape().elements() / (rows * columns).max(1)),
            Argument::Flag(accumulate),
        ];
        let geometry = Geometry::cover(rows * columns.div_ceil(PACK), SUM_PARTS.threads as usize);
        self.launch(&SUM_PARTS, &[out_type], geometry, &arguments)
    }

    pub(super) fn tensor_outer(&self, outer: Outer<'_, R>) -> Result<()> {
        let [tokens, rows, columns] = outer.sizes;
        let count = tokens.div_ceil(PART);
        let mut parts = self.alloc(DType::F32, [count, rows, columns])?;
        let arguments = [
            Argument::In(outer.left),
            Argument::In(outer.right),
            Argument::Out(&mut parts),
            Argument::Size(tokens),
            Argument::Size(PART),
            Argument::Size(rows),
            Argument::Size(columns),
        ];
        self.launch(&PRODUCT_OUTER, &[], SMALL.geometry(rows, columns, count), &arguments)?;
        let arguments = [
            Argument::In(&parts),
            Argument::Out(outer.gradient),
            Argument::Size(count),
            Argument::Size(rows),
            Argument::Size(columns),
            Argument::F32(outer.scale),
            Argument::Flag(outer.transposed),
        ];
        let geometry = Geometry::cover(rows * columns, ADD_PARTS.threads as usize);
        self.launch(&ADD_PARTS, &[], geometry, &arguments)
    }
}
