//! Products in f32: `matmul_f32.cu`.

use super::super::elementwise::ACTIVATION;
use super::super::kernel::Parameter::{F32, I32, I64, In, Out};
use super::super::sources::MATMUL_F32;
use super::super::{Argument, Element, Geometry, Gpu, Kernel, Runtime};
use super::tensor::{bias_arguments, weight_arguments, weight_type};
use super::{Held, Outer, Product, Reads, Right};
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::Write;

/// Rows and columns of a block's tile.
const TILE: usize = 64;
const SINGLE: Element = Element::Is(DType::F32);

static PRODUCT_EXACT: Kernel = Kernel {
    source: &MATMUL_F32,
    stem: "product_exact",
    types: &[&[DType::F32, DType::BF16, DType::F16, DType::U8], ACTIVATION],
    threads: 256,
    parameters: &[
        ("left", In(SINGLE)),
        ("left_stride", I64),
        ("left_deep", I64),
        ("weight", In(Element::Type(0))),
        ("absmax", In(SINGLE)),
        ("nested_codes", In(Element::Is(DType::U8))),
        ("nested_map", In(SINGLE)),
        ("offset", F32),
        ("weight_stride", I64),
        ("weight_deep", I64),
        ("left2", In(SINGLE)),
        ("right2", In(SINGLE)),
        ("right2_stride", I64),
        ("right2_deep", I64),
        ("bias_f32", In(SINGLE)),
        ("bias_bf16", In(Element::Is(DType::BF16))),
        ("out", Out(Element::Type(1))),
        ("scale", F32),
        ("copy", Out(SINGLE)),
        ("copy_scale", F32),
        ("rows", I64),
        ("columns", I64),
        ("depth", I32),
        ("depth2", I32),
        ("accumulate", I32),
    ],
};

pub(super) const KERNELS: &[&Kernel] = &[&PRODUCT_EXACT];

/// Distances in memory, in elements, between neighbours along an index and along the depth.
type Strides = [usize; 2];

/// A product with strides of its left and right factor, and a factor of its result.
struct Strided<'a, R: Runtime> {
    product: Product<'a, R>,
    left: Strides,
    right: Strides,
    right2: Strides,
    scale: f32,
}

impl<R: Runtime> Gpu<R> {
    pub(super) fn exact_product(&self, product: Product<'_, R>) -> Result<()> {
        let [_, columns, depth, depth2] = product.sizes;
        let strides = |deep: usize| match product.reads {
            Reads::Rows => [deep, 1],
            Reads::Columns => [1, columns],
        };
        self.strided(Strided {
            left: [depth, 1],
            right: strides(depth),
            right2: strides(depth2),
            scale: 1.0,
            product,
        })
    }

    pub(super) fn exact_outer(&self, outer: Outer<'_, R>) -> Result<()> {
        let [tokens, rows, columns] = outer.sizes;
        // Transposed, the two factors change places.
        let (left, right, [m, n]) = match outer.transposed {
            false => (outer.left, outer.right, [rows, columns]),
            true => (outer.right, outer.left, [columns, rows]),
        };
        self.strided(Strided {
            left: [1, m],
            right: [1, n],
            right2: [0, 0],
            scale: outer.scale,
            product: Product {
                left,
                right: &Right::Dense(Held::Borrowed(right)),
                reads: Reads::Columns,
                second: None,
                bias: None,
                out: Some((outer.gradient, Write::Accumulate)),
                copy: None,
                sizes: [m, n, tokens, 0],
            },
        })
    }

    fn strided(&self, strided: Strided<'_, R>) -> Result<()> {
        let product = strided.product;
        let [rows, columns, depth, depth2] = product.sizes;
        let accumulate = matches!(product.out, Some((_, Write::Accumulate)));
        let out_type = product.out.as_ref().map_or(DType::F32, |(out, _)| out.dtype());
        let types = [weight_type(product.right), out_type];
        let [weight, absmax, nested, map, offset] = weight_arguments(product.right);
        let [bias_f32, bias_bf16] = bias_arguments(product.bias);
        let (copy, copy_scale) = product.copy.unzip();

        let arguments = [
            Argument::In(product.left),
            Argument::Size(strided.left[0]),
            Argument::Size(strided.left[1]),
            weight,
            absmax,
            nested,
            map,
            offset,
            Argument::Size(strided.right[0]),
            Argument::Size(strided.right[1]),
            Argument::Optional(product.second.map(|(left, _)| left)),
            Argument::Optional(product.second.map(|(_, right)| right)),
            Argument::Size(strided.right2[0]),
            Argument::Size(strided.right2[1]),
            bias_f32,
            bias_bf16,
            Argument::OptionalOut(product.out.map(|(out, _)| out)),
            Argument::F32(strided.scale),
            Argument::OptionalOut(copy),
            Argument::F32(copy_scale.unwrap_or(0.0)),
            Argument::Size(rows),
            Argument::Size(columns),
            Argument::Size(depth),
            Argument::Size(product.second.map_or(0, |_| depth2)),
            Argument::Flag(accumulate),
        ];
        let geometry = Geometry::grid([rows.div_ceil(TILE), columns.div_ceil(TILE), 1]);
        self.launch(&PRODUCT_EXACT, &types, geometry, &arguments)
    }
}
