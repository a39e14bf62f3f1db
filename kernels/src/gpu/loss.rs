//! The head and cross-entropy, a chunk of rows at a time: `cross_entropy.cu`.
//!
//! The number of supervised rows stays on the device. On tensor cores the products pass over rows that are not, also where
//! `cross_entropy_hopper.cu` does them (`loss_hopper.rs`); in the reference precision they are those of linear layers, which compute
//! them all. `loss_extents.rs` says how many rows are done at once.

use super::faults::Fault;
use super::loss_extents::{LossExtents, loss_extents};
use super::loss_hopper;
use super::loss_kernels::{COLLECT, GATHER, GRADIENT, LOGITS, SCATTER, SOFTMAX, SUMS, SUPERVISED_ROWS, THREADS};
use super::matmul::tensor::{LARGE, weight_arguments, weight_type};
use super::matmul::{Product, Reads, Right};
use super::{Argument, Geometry, Gpu, Runtime};
use crate::contract::{self, LinearSizes};
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::{Device, LinearCrossEntropy, LossOps, Precision, Write};
use crate::tensor::Tensor;

/// Supervised positions in rising order `[T]`, and how many `[1]`, on the device.
struct Supervised<R: Runtime> {
    rows: Tensor<Gpu<R>>,
    count: Tensor<Gpu<R>>,
}

/// What the first product of a chunk of `R` rows leaves; see `cross_entropy.cu`.
pub(super) struct Chunk<R: Runtime> {
    /// bf16 `[R, C]`.
    pub(super) hidden: Tensor<Gpu<R>>,
    /// i32 `[R]`.
    pub(super) labels: Tensor<Gpu<R>>,
    /// f32 `[R]`.
    pub(super) label_logits: Tensor<Gpu<R>>,
    /// f32 `[R, P / 64, 2]`.
    pub(super) runs: Tensor<Gpu<R>>,
    /// What there is for the gradient only.
    pub(super) gradient: Option<ChunkGradient<R>>,
    /// `R`, `P` and the parts.
    pub(super) extents: LossExtents,
    pub(super) sizes: LinearSizes,
}

/// Beside a chunk, for its gradient.
pub(super) struct ChunkGradient<R: Runtime> {
    /// bf16 `[R, P]`.
    pub(super) powers: Tensor<Gpu<R>>,
    /// f32 `[R, 2]`.
    factors: Tensor<Gpu<R>>,
    /// f32 `[S, R, C]`.
    pub(super) parts: Tensor<Gpu<R>>,
}

/// Where a chunk begins among the supervised rows, and their number `[1]`.
pub(super) struct Place<'a, R: Runtime> {
    pub(super) first: usize,
    pub(super) count: &'a Tensor<Gpu<R>>,
}

impl<R: Runtime> LossOps for Gpu<R> {
    fn linear_cross_entropy(&self, call: LinearCrossEntropy<'_, Self>) -> Result<()> {
        self.cross_entropy(call, None)
    }
}

impl<R: Runtime> Gpu<R> {
    /// `chunk` rows at once, or as many as `loss_extents` says.
    fn cross_entropy(&self, mut call: LinearCrossEntropy<'_, Self>, chunk: Option<usize>) -> Result<()> {
        let sizes = contract::linear_cross_entropy(&call)?;
        self.fill_zero(call.losses)?;
        if let Some((dx, _)) = &mut call.dx {
            self.fill_zero(dx)?;
        }
        if sizes.tokens == 0 {
            return Ok(());
        }
        let mut extents = loss_extents(sizes, call.precision, call.dx.is_some());
        extents.chunk = chunk.unwrap_or(extents.chunk);
        let supervised = self.supervised(call.labels, sizes)?;
        match call.precision {
            Precision::F32 => self.exact_cross_entropy(call, &supervised, (sizes, extents)),
            Precision::Bf16 => self.tensor_cross_entropy(call, &supervised, (sizes, extents)),
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

    /// Any encoding of the head, products on tensor cores, no wait for the device.
    fn tensor_cross_entropy(
        &self,
        mut call: LinearCrossEntropy<'_, Self>,
        supervised: &Supervised<R>,
        (sizes, extents): (LinearSizes, LossExtents),
    ) -> Result<()> {
        let mut chunk = self.chunk(sizes, extents, call.dx.is_some())?;
        let head = self.right(call.head, Precision::Bf16)?;
        let is_hopper = loss_hopper::does(self.runtime().machine(), &head, sizes.outputs, sizes.inputs);
        let scale = call.dx.as_ref().map(|(_, scale)| *scale);
        for first in (0..sizes.tokens).step_by(extents.chunk) {
            let place = Place {
                first,
                count: &supervised.count,
            };
            let into = (&mut chunk.hidden, &mut chunk.labels);
            self.gather(
                (call.x, call.labels),
                supervised,
                into,
                [first, extents.chunk, sizes.inputs],
            )?;
            match is_hopper {
                true => self.hopper_logits(&head, &mut chunk, &place)?,
                false => self.logits(&head, &mut chunk, &place)?,
            }
            self.sums(&mut chunk, supervised, first, (call.losses, scale))?;
            if let Some((dx, _)) = &mut call.dx {
                match is_hopper {
                    true => self.hopper_head_dx(&head, &mut chunk, &place)?,
                    false => self.head_dx(&head, &mut chunk, &place)?,
                }
                self.collect(&head, &chunk, supervised, first, dx)?;
            }
        }
        Ok(())
    }

    /// Memory for one chunk after another, as [`LossExtents::tensor_bytes`] counts it.
    fn chunk(&self, sizes: LinearSizes, extents: LossExtents, has_gradient: bool) -> Result<Chunk<R>> {
        let (rows, width) = (extents.chunk, sizes.inputs);
        let gradient = || {
            Ok(ChunkGradient {
                powers: self.alloc(DType::BF16, [rows, extents.pitch])?,
                factors: self.alloc(DType::F32, [rows, 2])?,
                parts: self.alloc(DType::F32, [extents.parts, rows, width])?,
            })
        };
        Ok(Chunk {
            hidden: self.alloc(DType::BF16, [rows, width])?,
            labels: self.alloc(DType::I32, [rows])?,
            label_logits: self.alloc(DType::F32, [rows])?,
            runs: self.alloc(DType::F32, [rows, extents.runs(), 2])?,
            gradient: has_gradient.then(gradient).transpose()?,
            extents,
            sizes,
        })
    }

    /// A chunk's exponentials and their sums.
    fn logits(&self, head: &Right<'_, R>, chunk: &mut Chunk<R>, place: &Place<'_, R>) -> Result<()> {
        let [weight, absmax, nested, map, offset] = weight_arguments(head);
        let (rows, sizes) = (chunk.extents.chunk, chunk.sizes);
        let arguments = [
            Argument::In(&chunk.hidden),
            weight,
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
            Argument::Size(sizes.inputs),
            Argument::Size(sizes.outputs),
            Argument::Size(chunk.extents.pitch),
        ];
        let geometry = LARGE.geometry(rows, sizes.outputs, 1);
        self.launch(&LOGITS, &[weight_type(head)], geometry, &arguments)
    }

    /// Losses of a chunk, and what its gradient is multiplied by.
    fn sums(
        &self,
        chunk: &mut Chunk<R>,
        supervised: &Supervised<R>,
        first: usize,
        (losses, scale): (&mut Tensor<Self>, Option<&Tensor<Self>>),
    ) -> Result<()> {
        let (powers, factors) = match &mut chunk.gradient {
            None => (None, None),
            Some(gradient) => (Some(&mut gradient.powers), Some(&mut gradient.factors)),
        };
        let rows = chunk.extents.chunk;
        let arguments = [
            Argument::In(&chunk.runs),
            Argument::In(&supervised.rows),
            Argument::In(&supervised.count),
            Argument::In(&chunk.label_logits),
            Argument::OptionalOut(powers),
            Argument::Out(losses),
            Argument::OptionalOut(factors),
            Argument::Size(first),
            Argument::Size(rows),
            Argument::Size(chunk.extents.pitch),
            Argument::Optional(scale),
        ];
        self.launch(&SUMS, &[], Geometry::cover(rows, 1), &arguments)
    }

    /// The parts of a chunk's product with the head's columns.
    fn head_dx(&self, head: &Right<'_, R>, chunk: &mut Chunk<R>, place: &Place<'_, R>) -> Result<()> {
        let Some(gradient) = &mut chunk.gradient else {
            return Ok(());
        };
        let [weight, absmax, nested, map, offset] = weight_arguments(head);
        let (extents, sizes) = (chunk.extents, chunk.sizes);
        let arguments = [
            Argument::In(&gradient.powers),
            weight,
            absmax,
            nested,
            map,
            offset,
            Argument::In(place.count),
            Argument::Out(&mut gradient.parts),
            Argument::Size(place.first),
            Argument::Size(extents.chunk),
            Argument::Size(sizes.inputs),
            Argument::Size(sizes.outputs),
            Argument::Size(extents.pitch),
            Argument::Size(extents.part),
        ];
        let geometry = LARGE.geometry(extents.chunk, sizes.inputs, extents.parts);
        self.launch(&GRADIENT, &[weight_type(head)], geometry, &arguments)
    }

    /// The parts, added, and the label's own row of the head, to the rows of dx.
    fn collect(
        &self,
        head: &Right<'_, R>,
        chunk: &Chunk<R>,
        supervised: &Supervised<R>,
        first: usize,
        dx: &mut Tensor<Self>,
    ) -> Result<()> {
        let Some(gradient) = &chunk.gradient else {
            return Ok(());
        };
        let [weight, absmax, nested, map, offset] = weight_arguments(head);
        let (rows, width, types) = (chunk.extents.chunk, chunk.sizes.inputs, [dx.dtype(), weight_type(head)]);
        let arguments = [
            Argument::In(&gradient.parts),
            Argument::In(&gradient.factors),
            Argument::In(&chunk.labels),
            weight,
            absmax,
            nested,
            map,
            offset,
            Argument::In(&supervised.rows),
            Argument::In(&supervised.count),
            Argument::Out(dx),
            Argument::Size(first),
            Argument::Size(rows),
            Argument::Size(width),
            Argument::Size(chunk.extents.parts),
        ];
        let geometry = Geometry::cover(rows * width, THREADS as usize);
        self.launch(&COLLECT, &types, geometry, &arguments)
    }

    /// The reference: products in f32. Rows beyond the supervised ones are computed from what happens to be there and used by nobody:
    /// asking the host how many there are would keep a step from being recorded.
    fn exact_cross_entropy(
        &self,
        mut call: LinearCrossEntropy<'_, Self>,
        supervised: &Supervised<R>,
        (sizes, extents): (LinearSizes, LossExtents),
    ) -> Result<()> {
        let (rows, width, vocabulary, chunk) = (sizes.tokens, sizes.inputs, sizes.outputs, extents.chunk);
        let mut logits = self.alloc(DType::F32, [chunk, vocabulary])?;
        let gradient = call.dx.is_some().then(|| self.alloc(DType::F32, [chunk, vocabulary]));
        let mut gradient = gradient.transpose()?;
        let mut hidden = self.alloc(DType::F32, [chunk, width])?;
        let mut labels = self.alloc(DType::I32, [chunk])?;
        let head = self.right(call.head, Precision::F32)?;
        let factor = call.dx.as_ref().map(|(_, factor)| *factor);
        for first in (0..rows).step_by(chunk) {
            let here = chunk.min(rows - first);
            let into = (&mut hidden, &mut labels);
            self.gather((call.x, call.labels), supervised, into, [first, chunk, width])?;
            let sizes = [here, vocabulary, width, 0];
            self.product(Precision::F32, plain(&hidden, (&head, Reads::Rows), &mut logits, sizes))?;
            let arguments = [
                Argument::In(&logits),
                Argument::In(call.labels),
                Argument::In(&supervised.rows),
                Argument::In(&supervised.count),
                Argument::Out(call.losses),
                Argument::OptionalOut(gradient.as_mut()),
                Argument::Size(first),
                Argument::Size(chunk),
                Argument::Size(vocabulary),
                Argument::Size(vocabulary),
                Argument::Optional(factor),
            ];
            self.launch(&SOFTMAX, &[], Geometry::cover(chunk, 1), &arguments)?;
            if let (Some((dx, _)), Some(dz)) = (&mut call.dx, &gradient) {
                let product = plain(dz, (&head, Reads::Columns), &mut hidden, [here, width, vocabulary, 0]);
                self.product(Precision::F32, product)?;
                self.scatter(&hidden, supervised, dx, [first, chunk, width])?;
            }
        }
        Ok(())
    }

    /// `extents` are the chunk's first row, its rows, and `C`.
    fn scatter(
        &self,
        sums: &Tensor<Self>,
        supervised: &Supervised<R>,
        dx: &mut Tensor<Self>,
        [first, chunk, width]: [usize; 3],
    ) -> Result<()> {
        let dtype = dx.dtype();
        let arguments = [
            Argument::In(sums),
            Argument::In(&supervised.rows),
            Argument::In(&supervised.count),
            Argument::Out(dx),
            Argument::Size(first),
            Argument::Size(chunk),
            Argument::Size(width),
            Argument::Size(1),
        ];
        let geometry = Geometry::cover(chunk * width, THREADS as usize);
        self.launch(&SCATTER, &[dtype], geometry, &arguments)
    }

    /// The rows of a chunk and their labels.
    fn gather(
        &self,
        (x, labels): (&Tensor<Self>, &Tensor<Self>),
        supervised: &Supervised<R>,
        (hidden, of_rows): (&mut Tensor<Self>, &mut Tensor<Self>),
        [first, chunk, width]: [usize; 3],
    ) -> Result<()> {
        let types = [x.dtype(), hidden.dtype()];
        let arguments = [
            Argument::In(x),
            Argument::In(labels),
            Argument::In(&supervised.rows),
            Argument::In(&supervised.count),
            Argument::Out(hidden),
            Argument::Out(of_rows),
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

    fn bits(device: &Emulated, precision: Precision, chunk: Option<usize>) -> [Vec<u8>; 2] {
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
        device.cross_entropy(call, chunk).unwrap();
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
                let whole = bits(&device, precision, None);
                for rows in [128, 256, 330] {
                    assert_eq!(bits(&device, precision, Some(rows)), whole, "{precision:?} {rows}");
                }
            }
        }
    }
}
