//! The products with the frozen head on Hopper's tensor cores: `cross_entropy_hopper.cu`.

use super::family::Family;
use super::kernel::Parameter::{F32, I32, I64, In, Map as MapOf, Out};
use super::matmul::choice::fits_hopper;
use super::matmul::hopper::{OUTPUTS, THREADS, Width, frozen, token_map, weight_map};
use super::matmul::tensor::{weight_arguments, weight_type};
use super::matmul::{Reads, Right};
use super::sources::CROSS_ENTROPY_HOPPER;
use super::{Argument, Element, Gpu, Kernel, Machine, Runtime};
use crate::dtype::DType;
use crate::error::Result;
use crate::tensor::Tensor;

pub(super) static FAMILY: Family = Family {
    source: &CROSS_ENTROPY_HOPPER,
    kernels: &[&LOGITS, &HEAD_DX],
    ops: &[],
};

const SINGLE: Element = Element::Is(DType::F32);

const fn product(stem: &'static str) -> Kernel {
    Kernel {
        source: &CROSS_ENTROPY_HOPPER,
        stem,
        types: &[&[DType::BF16, DType::U8]],
        threads: THREADS,
        parameters: &[
            ("left", MapOf),
            ("head", MapOf),
            ("absmax", In(SINGLE)),
            ("nested_codes", In(Element::Is(DType::U8))),
            ("nested_map", In(SINGLE)),
            ("offset", F32),
            ("count", In(Element::Is(DType::I32))),
            ("out", Out(SINGLE)),
            ("first", I64),
            ("chunk", I32),
            ("columns", I32),
            ("depth", I32),
            ("part", I32),
            ("pitch", I64),
        ],
    }
}

static LOGITS: Kernel = product("hopper_logits");
static HEAD_DX: Kernel = product("hopper_head_dx");

/// Tokens of a tile. One width for every chunk, so that bits do not depend on how many rows are done at once.
const WIDTH: Width = Width::Wide;

/// A product of a chunk of rows with the head.
pub(super) struct HeadProduct<'a, R: Runtime> {
    /// `[R, ·]` in bf16.
    pub(super) left: &'a Tensor<Gpu<R>>,
    /// `[V, C]`.
    pub(super) head: &'a Right<'a, R>,
    /// Rows of the head for logits, columns for dx.
    pub(super) reads: Reads,
    /// How many rows are supervised `[1]`, and the first of them that the chunk has.
    pub(super) count: &'a Tensor<Gpu<R>>,
    pub(super) first: usize,
    /// f32 `[R, P]` of logits or `[S, R, C]` of parts.
    pub(super) out: &'a mut Tensor<Gpu<R>>,
    /// `R`; columns and depth of the product; the depth of a part.
    pub(super) chunk: usize,
    pub(super) columns: usize,
    pub(super) depth: usize,
    pub(super) part: usize,
    /// From one row of `out` to the next.
    pub(super) pitch: usize,
}

/// Whether both products with a head are done by these kernels. It depends on the head alone and not on the rows.
pub(super) fn does<R: Runtime>(machine: Machine, head: &Right<'_, R>, vocabulary: usize, width: usize) -> bool {
    machine.is_hopper() && fits_hopper([1, vocabulary], [width, 0], weight_type(head), width)
}

impl<R: Runtime> Gpu<R> {
    pub(super) fn hopper_head(&self, product: HeadProduct<'_, R>) -> Result<()> {
        let HeadProduct {
            columns,
            depth,
            part,
            chunk,
            ..
        } = product;
        let is_straight = product.reads == Reads::Rows;
        let kernel = if is_straight { &LOGITS } else { &HEAD_DX };
        let weight = weight_type(product.head);
        let [_, absmax, nested, map, offset] = weight_arguments(product.head);
        let arguments = [
            Argument::Map(token_map(product.left, WIDTH.tokens())),
            Argument::Map(weight_map(frozen(product.head), is_straight, 1, [columns, depth])),
            absmax,
            nested,
            map,
            offset,
            Argument::In(product.count),
            Argument::Out(product.out),
            Argument::Size(product.first),
            Argument::Size(chunk),
            Argument::Size(columns),
            Argument::Size(depth),
            Argument::Size(part),
            Argument::Size(product.pitch),
        ];
        let tiles = chunk.div_ceil(WIDTH.tokens()) * columns.div_ceil(OUTPUTS) * depth.div_ceil(part);
        let geometry = self.persistent(tiles).with_shared(WIDTH.shared_bytes(weight));
        self.launch(kernel, &[weight], geometry, &arguments)
    }
}
