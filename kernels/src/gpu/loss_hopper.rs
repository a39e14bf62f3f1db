//! The products with the frozen head on Hopper's tensor cores: `cross_entropy_hopper.cu`.

use super::family::Family;
use super::kernel::Parameter::{F32, I32, I64, In, Map as MapOf, Out};
use super::loss::{Chunk, Place};
use super::matmul::Right;
use super::matmul::choice::fits_hopper;
use super::matmul::hopper::{OUTPUTS, THREADS, Width, frozen, token_map, weight_map};
use super::matmul::tensor::{weight_arguments, weight_type};
use super::sources::CROSS_ENTROPY_HOPPER;
use super::{Argument, Element, Gpu, Kernel, Machine, Runtime};
use crate::contract::LinearSizes;
use crate::dtype::DType;
use crate::error::Result;

pub(super) static FAMILY: Family = Family {
    source: &CROSS_ENTROPY_HOPPER,
    kernels: &[&LOGITS, &HEAD_DX],
    ops: &[],
};

const SINGLE: Element = Element::Is(DType::F32);

const HALF: Element = Element::Is(DType::BF16);
const BYTE: Element = Element::Is(DType::U8);
const INTEGER: Element = Element::Is(DType::I32);
const HEAD: &[DType] = &[DType::BF16, DType::U8];

static LOGITS: Kernel = Kernel {
    source: &CROSS_ENTROPY_HOPPER,
    stem: "hopper_logits",
    types: &[HEAD],
    threads: THREADS,
    parameters: &[
        ("left", MapOf),
        ("head", MapOf),
        ("absmax", In(SINGLE)),
        ("nested_codes", In(BYTE)),
        ("nested_map", In(SINGLE)),
        ("offset", F32),
        ("count", In(INTEGER)),
        ("labels", In(INTEGER)),
        ("powers", Out(HALF)),
        ("runs", Out(SINGLE)),
        ("label_logits", Out(SINGLE)),
        ("first", I64),
        ("chunk", I32),
        ("width", I32),
        ("vocabulary", I32),
        ("pitch", I64),
    ],
};

static HEAD_DX: Kernel = Kernel {
    source: &CROSS_ENTROPY_HOPPER,
    stem: "hopper_head_dx",
    types: &[HEAD],
    threads: THREADS,
    parameters: &[
        ("left", MapOf),
        ("head", MapOf),
        ("absmax", In(SINGLE)),
        ("nested_codes", In(BYTE)),
        ("nested_map", In(SINGLE)),
        ("offset", F32),
        ("count", In(INTEGER)),
        ("parts", Out(SINGLE)),
        ("first", I64),
        ("chunk", I32),
        ("width", I32),
        ("vocabulary", I32),
        ("part", I32),
    ],
};

/// Tokens of a tile. One width for every chunk, so that bits do not depend on how many rows are done at once.
const WIDTH: Width = Width::Wide;

/// Whether both products with a head are done by these kernels. It depends on the head alone and not on the rows.
pub(super) fn does<R: Runtime>(machine: Machine, head: &Right<'_, R>, vocabulary: usize, width: usize) -> bool {
    machine.is_hopper() && fits_hopper([1, vocabulary], [width, 0], weight_type(head), width)
}

impl<R: Runtime> Gpu<R> {
    /// A chunk's exponentials and their sums.
    pub(super) fn hopper_logits(&self, head: &Right<'_, R>, chunk: &mut Chunk<R>, place: &Place<'_, R>) -> Result<()> {
        let (rows, LinearSizes { inputs, outputs, .. }) = (chunk.extents.chunk, chunk.sizes);
        let [_, absmax, nested, map, offset] = weight_arguments(head);
        let arguments = [
            Argument::Map(token_map(&chunk.hidden, WIDTH.tokens())),
            Argument::Map(weight_map(frozen(head), true, 1, [outputs, inputs])),
            absmax,
            nested,
            map,
            offset,
            Argument::In(place.count),
            Argument::In(&chunk.labels),
            Argument::OptionalOut(chunk.gradient.as_mut().map(|gradient| &mut gradient.powers)),
            Argument::Out(&mut chunk.runs),
            Argument::Out(&mut chunk.label_logits),
            Argument::Size(place.first),
            Argument::Size(rows),
            Argument::Size(inputs),
            Argument::Size(outputs),
            Argument::Size(chunk.extents.pitch),
        ];
        let tiles = rows.div_ceil(WIDTH.tokens()) * outputs.div_ceil(OUTPUTS);
        self.head_launch(&LOGITS, head, tiles, &arguments)
    }

    /// The parts of a chunk's product with the head's columns.
    pub(super) fn hopper_head_dx(&self, head: &Right<'_, R>, chunk: &mut Chunk<R>, place: &Place<'_, R>) -> Result<()> {
        let Some(gradient) = &mut chunk.gradient else {
            return Ok(());
        };
        let (extents, LinearSizes { inputs, outputs, .. }) = (chunk.extents, chunk.sizes);
        let [_, absmax, nested, map, offset] = weight_arguments(head);
        let arguments = [
            Argument::Map(token_map(&gradient.powers, WIDTH.tokens())),
            Argument::Map(weight_map(frozen(head), false, 1, [inputs, outputs])),
            absmax,
            nested,
            map,
            offset,
            Argument::In(place.count),
            Argument::Out(&mut gradient.parts),
            Argument::Size(place.first),
            Argument::Size(extents.chunk),
            Argument::Size(inputs),
            Argument::Size(outputs),
            Argument::Size(extents.part),
        ];
        let tiles = extents.chunk.div_ceil(WIDTH.tokens()) * inputs.div_ceil(OUTPUTS) * extents.parts;
        self.head_launch(&HEAD_DX, head, tiles, &arguments)
    }

    fn head_launch(
        &self,
        kernel: &'static Kernel,
        head: &Right<'_, R>,
        tiles: usize,
        arguments: &[Argument<'_, R>],
    ) -> Result<()> {
        let weight = weight_type(head);
        let geometry = self.persistent(tiles).with_shared(WIDTH.shared_bytes(weight));
        self.launch(kernel, &[weight], geometry, arguments)
    }
}
