//! The head and cross-entropy, a chunk of rows at a time: `cross_entropy.cu`.
//!
//! The number of supervised rows stays on the device. On tensor cores the products pass over rows that are not, also where
//! `cross_entropy_hopper.cu` does them (`loss_hopper.rs`); in the reference precision they are those of linear layers, which compute
//! them all.

use super::elementwise::ACTIVATION;
use super::family::Family;
use super::faults::Fault;
use super::kernel::Parameter::{F32, I32, I64, In, Out};
use super::loss_hopper::{self, HeadProduct};
use super::matmul::tensor::{LARGE, weight_arguments, weight_type};
use super::matmul::{Product, Reads, Right};
use super::sources::CROSS_ENTROPY;
use super::{Argument, Element, Geometry, Gpu, Kernel, Runtime};
use crate::contract::{self, LinearSizes};
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::{Device, LinearCrossEntropy, LossOps, Op, Precision, Write};
use crate::tensor::Tensor;

pub(super) static FAMILY: Family = Family {
    source: &CROSS_ENTROPY,
    kernels: &[&SUPERVISED_ROWS, &LOGITS, &SOFTMAX, &GRADIENT, &SCATTER, &GATHER],
    ops: &[Op::LinearCrossEntropy],
};

/// Bytes of logits and their gradients that exist at once: 294 rows of 151 936 entries, of which 256 are used.
const CHUNK_BYTES: usize = 256 << 20;
/// A chunk on tensor cores is a multiple of so many rows, and a part of the vocabulary of so many entries.
const CHUNK_ROWS: usize = LARGE.rows;
const PART_ENTRIES: usize = 64;
/// Blocks of the product with the head's columns, for each tile of rows: two waves of a large device at two tiles of rows.
const GRADIENT_BLOCKS: usize = 256;
/// The most parts of the vocabulary: their sums take `4 · parts · C` bytes a row.
const MOST_PARTS: usize = 16;

const THREADS: u32 = 256;
const SOFTMAX_THREADS: u32 = 512;
const SCAN_THREADS: u32 = 1024;
const A: Element = Element::Type(0);
const INTEGER: Element = Element::Is(DType::I32);
const SINGLE: Element = Element::Is(DType::F32);
const HALF: Element = Element::Is(DType::BF16);
const BYTE: Element = Element::Is(DType::U8);

static SUPERVISED_ROWS: Kernel = Kernel {
    source: &CROSS_ENTROPY,
    stem: "supervised_rows",
    types: &[],
    threads: SCAN_THREADS,
    parameters: &[
        ("labels", In(INTEGER)),
        ("rows", Out(INTEGER)),
        ("count", Out(INTEGER)),
        ("tokens", I64),
        ("vocabulary", I32),
        ("faults", Out(INTEGER)),
        ("fault", I32),
    ],
};

static LOGITS: Kernel = Kernel {
    source: &CROSS_ENTROPY,
    stem: "cross_entropy_logits",
    types: &[&[DType::BF16, DType::U8]],
    threads: LARGE.threads(),
    parameters: &[
        ("hidden", In(HALF)),
        ("head", In(A)),
        ("absmax", In(SINGLE)),
        ("nested_codes", In(BYTE)),
        ("nested_map", In(SINGLE)),
        ("offset", F32),
        ("count", In(INTEGER)),
        ("out", Out(SINGLE)),
        ("first", I64),
        ("chunk", I32),
        ("width", I32),
        ("vocabulary", I32),
        ("pitch", I64),
    ],
};

static SOFTMAX: Kernel = Kernel {
    source: &CROSS_ENTROPY,
    stem: "cross_entropy_softmax",
    types: &[ACTIVATION],
    threads: SOFTMAX_THREADS,
    parameters: &[
        ("logits", In(SINGLE)),
        ("labels", In(INTEGER)),
        ("rows", In(INTEGER)),
        ("count", In(INTEGER)),
        ("losses", Out(SINGLE)),
        ("gradient", Out(A)),
        ("first", I64),
        ("chunk", I32),
        ("vocabulary", I32),
        ("pitch", I64),
        ("scale", In(SINGLE)),
    ],
};

static GRADIENT: Kernel = Kernel {
    source: &CROSS_ENTROPY,
    stem: "cross_entropy_gradient",
    types: &[&[DType::BF16, DType::U8]],
    threads: LARGE.threads(),
    parameters: &[
        ("dz", In(HALF)),
        ("head", In(A)),
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
        ("pitch", I64),
        ("part", I32),
    ],
};

static SCATTER: Kernel = Kernel {
    source: &CROSS_ENTROPY,
    stem: "cross_entropy_scatter",
    types: &[ACTIVATION],
    threads: THREADS,
    parameters: &[
        ("parts", In(SINGLE)),
        ("rows", In(INTEGER)),
        ("count", In(INTEGER)),
        ("dx", Out(A)),
        ("first", I64),
        ("chunk", I32),
        ("width", I32),
        ("parts_count", I32),
    ],
};

static GATHER: Kernel = Kernel {
    source: &CROSS_ENTROPY,
    stem: "cross_entropy_gather",
    types: &[ACTIVATION, ACTIVATION],
    threads: THREADS,
    parameters: &[
        ("x", In(A)),
        ("rows", In(INTEGER)),
        ("count", In(INTEGER)),
        ("hidden", Out(Element::Type(1))),
        ("first", I64),
        ("chunk", I32),
        ("width", I32),
    ],
};

/// Supervised positions in rising order `[T]`, and how many `[1]`, on the device.
struct Supervised<R: Runtime> {
    rows: Tensor<Gpu<R>>,
    count: Tensor<Gpu<R>>,
}

/// Logits `[R, P]` of a chunk and, if wanted, their gradients.
struct Workspace<R: Runtime> {
    logits: Tensor<Gpu<R>>,
    gradient: Option<Tensor<Gpu<R>>>,
    /// `R`.
    chunk: usize,
    /// `P`.
    pitch: usize,
}

/// Entries of a part of the vocabulary; a function of `V` and `C` alone, because it decides the order of sums.
fn part_entries(vocabulary: usize, width: usize) -> usize {
    let parts = (GRADIENT_BLOCKS / width.div_ceil(LARGE.columns).max(1)).clamp(1, MOST_PARTS);
    vocabulary.div_ceil(parts).next_multiple_of(PART_ENTRIES)
}

/// How a loss is cut up.
#[derive(Clone, Copy)]
pub(crate) struct LossExtents {
    /// Rows of logits at once.
    pub(crate) chunk: usize,
    /// Entries of a row of logits.
    pub(crate) pitch: usize,
    /// Parts of the vocabulary whose products with the head's columns are added afterwards; 0 where there are none.
    pub(crate) parts: usize,
}

/// The extents of a loss with or without its gradient.
pub(crate) fn loss_extents(
    sizes: LinearSizes,
    precision: Precision,
    has_gradient: bool,
    chunk_bytes: usize,
) -> LossExtents {
    let (pitch, parts, dtype) = match precision {
        Precision::F32 => (sizes.outputs, 0, DType::F32),
        Precision::Bf16 => {
            let pitch = sizes.outputs.next_multiple_of(PART_ENTRIES);
            let part = part_entries(sizes.outputs, sizes.inputs);
            (pitch, pitch.div_ceil(part), DType::BF16)
        }
    };
    let gradient = has_gradient.then_some(dtype);
    LossExtents {
        chunk: rows_at_once((sizes.tokens, pitch), gradient, chunk_bytes),
        pitch,
        parts,
    }
}

/// As many of `rows` rows as the bytes of their logits, and of the gradients of these, allow.
fn rows_at_once((rows, pitch): (usize, usize), gradient: Option<DType>, chunk_bytes: usize) -> usize {
    let row_bytes = pitch * (DType::F32.size_bytes() + gradient.map_or(0, DType::size_bytes));
    let fitting = chunk_bytes / row_bytes.max(1) / CHUNK_ROWS * CHUNK_ROWS;
    fitting.clamp(CHUNK_ROWS, rows.next_multiple_of(CHUNK_ROWS)).min(rows)
}

impl<R: Runtime> LossOps for Gpu<R> {
    fn linear_cross_entropy(&self, call: LinearCrossEntropy<'_, Self>) -> Result<()> {
        self.cross_entropy(call, CHUNK_BYTES)
    }
}

impl<R: Runtime> Gpu<R> {
    fn cross_entropy(&self, mut call: LinearCrossEntropy<'_, Self>, chunk_bytes: usize) -> Result<()> {
        let sizes = contract::linear_cross_entropy(&call)?;
        self.fill_zero(call.losses)?;
        if let Some((dx, _)) = &mut call.dx {
            self.fill_zero(dx)?;
        }
        if sizes.tokens == 0 {
            return Ok(());
        }
        let supervised = self.supervised(call.labels, sizes)?;
        match call.precision {
            Precision::F32 => self.exact_cross_entropy(call, &supervised, sizes, chunk_bytes),
            Precision::Bf16 => self.tensor_cross_entropy(call, &supervised, sizes, chunk_bytes),
        }
    }

    fn supervised(&self, labels: &Tensor<Self>, sizes: LinearSizes) -> Result<Supervised<R>> {
        let mut rows = self.alloc(DType::I32, [sizes.tokens])?;
        let mut count = self.alloc(DType::I32, [1])?;
        let arguments = [
            Argument::In(labels),
            Argument::Out(&mut rows),
            Argument::Out(&mut count),
            Argument::Size(sizes.tokens),
            Argument::Size(sizes.outputs),
            Argument::Faults,
            Argument::I32(Fault::Label.code()),
        ];
        self.launch(&SUPERVISED_ROWS, &[], Geometry::grid([1, 1, 1]), &arguments)?;
        Ok(Supervised { rows, count })
    }

    /// Room for as many of `rows` rows as the bytes allow.
    fn workspace(
        &self,
        (rows, pitch): (usize, usize),
        gradient: Option<DType>,
        chunk_bytes: usize,
    ) -> Result<Workspace<R>> {
        let chunk = rows_at_once((rows, pitch), gradient, chunk_bytes);
        Ok(Workspace {
            logits: self.alloc(DType::F32, [chunk, pitch])?,
            gradient: gradient.map(|dtype| self.alloc(dtype, [chunk, pitch])).transpose()?,
            chunk,
            pitch,
        })
    }

    /// Any encoding of the head, products on tensor cores, no wait for the device.
    fn tensor_cross_entropy(
        &self,
        mut call: LinearCrossEntropy<'_, Self>,
        supervised: &Supervised<R>,
        sizes: LinearSizes,
        chunk_bytes: usize,
    ) -> Result<()> {
        let extents = loss_extents(sizes, Precision::Bf16, call.dx.is_some(), chunk_bytes);
        let (pitch, parts_count) = (extents.pitch, extents.parts);
        let gradient = call.dx.is_some().then_some(DType::BF16);
        let mut workspace = self.workspace((sizes.tokens, pitch), gradient, chunk_bytes)?;
        let part = part_entries(sizes.outputs, sizes.inputs);
        let parts_rows = if call.dx.is_some() { workspace.chunk } else { 0 };
        let mut parts = self.alloc(DType::F32, [parts_count, parts_rows, sizes.inputs])?;
        let mut hidden = self.alloc(DType::BF16, [workspace.chunk, sizes.inputs])?;
        let head = self.right(call.head, Precision::Bf16)?;
        let factor = call.dx.as_ref().map(|(_, factor)| *factor);
        for first in (0..sizes.tokens).step_by(workspace.chunk) {
            self.gather(call.x, supervised, &mut hidden, [first, workspace.chunk, sizes.inputs])?;
            let product = HeadProduct {
                left: &hidden,
                head: &head,
                reads: Reads::Rows,
                count: &supervised.count,
                first,
                out: &mut workspace.logits,
                chunk: workspace.chunk,
                columns: sizes.outputs,
                depth: sizes.inputs,
                part: sizes.inputs,
                pitch: workspace.pitch,
            };
            self.head_product(product, workspace.pitch)?;
            self.softmax(
                (call.labels, factor),
                supervised,
                (first, sizes),
                &mut workspace,
                call.losses,
            )?;
            if let (Some((dx, _)), Some(dz)) = (&mut call.dx, &workspace.gradient) {
                let product = HeadProduct {
                    left: dz,
                    head: &head,
                    reads: Reads::Columns,
                    count: &supervised.count,
                    first,
                    out: &mut parts,
                    chunk: workspace.chunk,
                    columns: sizes.inputs,
                    depth: sizes.outputs,
                    part,
                    pitch: sizes.inputs,
                };
                self.head_product(product, workspace.pitch)?;
                self.scatter(
                    &parts,
                    supervised,
                    dx,
                    [first, workspace.chunk, sizes.inputs, parts_count],
                )?;
            }
        }
        Ok(())
    }

    /// A chunk's logits, or the parts of its dx. `pitch` is that of logits and their gradients.
    fn head_product(&self, product: HeadProduct<'_, R>, pitch: usize) -> Result<()> {
        let (reads, head) = (product.reads, product.head);
        let (width, vocabulary) = match reads {
            Reads::Rows => (product.depth, product.columns),
            Reads::Columns => (product.columns, product.depth),
        };
        if loss_hopper::does(self.runtime().machine(), head, vocabulary, width) {
            return self.hopper_head(product);
        }
        let [weight, absmax, nested, map, offset] = weight_arguments(head);
        let mut arguments = vec![
            Argument::In(product.left),
            weight,
            absmax,
            nested,
            map,
            offset,
            Argument::In(product.count),
            Argument::Out(product.out),
            Argument::Size(product.first),
            Argument::Size(product.chunk),
            Argument::Size(width),
            Argument::Size(vocabulary),
            Argument::Size(pitch),
        ];
        let (kernel, parts) = match reads {
            Reads::Rows => (&LOGITS, 1),
            Reads::Columns => {
                arguments.push(Argument::Size(product.part));
                (&GRADIENT, product.depth.div_ceil(product.part))
            }
        };
        let geometry = LARGE.geometry(product.chunk, product.columns, parts);
        self.launch(kernel, &[weight_type(head)], geometry, &arguments)
    }

    /// Losses of a chunk of logits, and their gradients.
    fn softmax(
        &self,
        (labels, factor): (&Tensor<Self>, Option<&Tensor<Self>>),
        supervised: &Supervised<R>,
        (first, sizes): (usize, LinearSizes),
        workspace: &mut Workspace<R>,
        losses: &mut Tensor<Self>,
    ) -> Result<()> {
        let dtype = workspace.gradient.as_ref().map_or(DType::F32, Tensor::dtype);
        let arguments = [
            Argument::In(&workspace.logits),
            Argument::In(labels),
            Argument::In(&supervised.rows),
            Argument::In(&supervised.count),
            Argument::Out(losses),
            Argument::OptionalOut(workspace.gradient.as_mut()),
            Argument::Size(first),
            Argument::Size(workspace.chunk),
            Argument::Size(sizes.outputs),
            Argument::Size(workspace.pitch),
            Argument::Optional(factor),
        ];
        self.launch(&SOFTMAX, &[dtype], Geometry::cover(workspace.chunk, 1), &arguments)
    }

    /// `sizes` are the chunk's first row, its rows, `C`, and the number of parts.
    fn scatter(
        &self,
        parts: &Tensor<Self>,
        supervised: &Supervised<R>,
        dx: &mut Tensor<Self>,
        [first, chunk, width, count]: [usize; 4],
    ) -> Result<()> {
        let dtype = dx.dtype();
        let arguments = [
            Argument::In(parts),
            Argument::In(&supervised.rows),
            Argument::In(&supervised.count),
            Argument::Out(dx),
            Argument::Size(first),
            Argument::Size(chunk),
            Argument::Size(width),
            Argument::Size(count),
        ];
        let geometry = Geometry::cover(chunk * width, THREADS as usize);
        self.launch(&SCATTER, &[dtype], geometry, &arguments)
    }

    /// The reference: products in f32. Rows beyond the supervised ones are computed from what happens to be there and used by nobody:
    /// asking the host how many there are would keep a step from being recorded.
    fn exact_cross_entropy(
        &self,
        mut call: LinearCrossEntropy<'_, Self>,
        supervised: &Supervised<R>,
        sizes: LinearSizes,
        chunk_bytes: usize,
    ) -> Result<()> {
        let (rows, width, vocabulary) = (sizes.tokens, sizes.inputs, sizes.outputs);
        let gradient = call.dx.is_some().then_some(DType::F32);
        let mut workspace = self.workspace((rows, vocabulary), gradient, chunk_bytes)?;
        let mut hidden = self.alloc(DType::F32, [workspace.chunk, width])?;
        let head = self.right(call.head, Precision::F32)?;
        let factor = call.dx.as_ref().map(|(_, factor)| *factor);
        for first in (0..rows).step_by(workspace.chunk) {
            let here = workspace.chunk.min(rows - first);
            self.gather(call.x, supervised, &mut hidden, [first, workspace.chunk, width])?;
            let product = plain(
                &hidden,
                (&head, Reads::Rows),
                &mut workspace.logits,
                [here, vocabulary, width, 0],
            );
            self.product(Precision::F32, product)?;
            self.softmax(
                (call.labels, factor),
                supervised,
                (first, sizes),
                &mut workspace,
                call.losses,
            )?;
            if let (Some((dx, _)), Some(dz)) = (&mut call.dx, &workspace.gradient) {
                let product = plain(dz, (&head, Reads::Columns), &mut hidden, [here, width, vocabulary, 0]);
                self.product(Precision::F32, product)?;
                self.scatter(&hidden, supervised, dx, [first, workspace.chunk, width, 1])?;
            }
        }
        Ok(())
    }

    fn gather(
        &self,
        x: &Tensor<Self>,
        supervised: &Supervised<R>,
        hidden: &mut Tensor<Self>,
        [first, chunk, width]: [usize; 3],
    ) -> Result<()> {
        let types = [x.dtype(), hidden.dtype()];
        let arguments = [
            Argument::In(x),
            Argument::In(&supervised.rows),
            Argument::In(&supervised.count),
            Argument::Out(hidden),
            Argument::Size(first),
            Argument::Size(chunk),
            Argument::Size(width),
        ];
        let geometry = Geometry::cover(chunk * width, THREADS as usize);
        self.launch(&GATHER, &types, geometry, &arguments)
    }
}

/// `out = left · right` and nothing else.
fn plain<'a, R: Runtime>(
    left: &'a Tensor<Gpu<R>>,
    (right, reads): (&'a Right<'a, R>, Reads),
    out: &'a mut Tensor<Gpu<R>>,
    sizes: [usize; 4],
) -> Product<'a, R> {
    Product {
        left,
        right,
        reads,
        second: None,
        bias: None,
        out: Some((out, Write::Overwrite)),
        copy: None,
        sizes,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::emu::{Emulated, emulated, emulated_as};
    use crate::testing::Random;
    use crate::weight::Weight;

    const TOKENS: usize = 400;
    const WIDTH: usize = 8;
    const VOCABULARY: usize = 72;

    fn bits(device: &Emulated, precision: Precision, chunk_bytes: usize) -> [Vec<u8>; 2] {
        let mut random = Random::new(3);
        let x = device
            .upload_f32([TOKENS, WIDTH], &random.normal(TOKENS * WIDTH))
            .unwrap();
        let head = device
            .upload_f32([VOCABULARY, WIDTH], &random.normal(VOCABULARY * WIDTH))
            .unwrap();
        let labels: Vec<i32> = (0..TOKENS)
            .map(|t| if t % 7 == 3 { -100 } else { (t % VOCABULARY) as i32 })
            .collect();
        let labels = device.upload_i32([TOKENS], &labels).unwrap();
        let mut losses = device.alloc(DType::F32, [TOKENS]).unwrap();
        let mut dx = device.alloc(DType::F32, [TOKENS, WIDTH]).unwrap();
        let half = device.upload_f32([1], &[0.5]).unwrap();
        let call = LinearCrossEntropy {
            x: &x,
            head: &Weight::Dense(head),
            labels: &labels,
            precision,
            losses: &mut losses,
            dx: Some((&mut dx, &half)),
        };
        device.cross_entropy(call, chunk_bytes).unwrap();
        [device.read(&losses).unwrap(), device.read(&dx).unwrap()]
    }

    #[test]
    fn chunks_of_rows_change_no_bit() {
        for device in [emulated(Some(2)), emulated_as(Some(2), (9, 0))] {
            let Ok(device) = device else {
                println!("emulated: absent (not tested)");
                return;
            };
            for precision in [Precision::F32, Precision::Bf16] {
                let [losses, dx] = bits(&device, precision, 0);
                assert_eq!([losses, dx], bits(&device, precision, CHUNK_BYTES), "{precision:?}");
            }
        }
    }

    #[test]
    fn parts_of_the_vocabulary_cover_it() {
        for (vocabulary, width) in [(1, 1), (151_936, 2_048), (151_936, 5_120), (70, 8), (32_000, 100_000)] {
            let part = part_entries(vocabulary, width);
            let parts = vocabulary.next_multiple_of(PART_ENTRIES).div_ceil(part);
            assert!(
                part.is_multiple_of(PART_ENTRIES) && (1..=MOST_PARTS).contains(&parts),
                "{vocabulary} × {width}"
            );
        }
    }
}
