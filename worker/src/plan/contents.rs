//! What the tensors of a skeleton hold: random numbers, made on the device and of the size that a trained model's have.
//!
//! Every tensor is filled by a stream of its own ([`RandomOps`]), so no matrix is like another, the same seed gives the same model on
//! every backend, and nothing of its size passes through the host.
//!
//! **Why activations stay finite through any number of layers.** A matrix has elements of deviation `1 / √inputs`, as a trained one about
//! has: it turns inputs of mean square 1 into outputs of mean square 1, and before every matrix stands a norm, a sum of values weighted
//! to 1, or SwiGLU, which makes less of them. What writes to the residual stream is smaller by `√(2 · layers)` (Radford et al. 2019), so
//! that all `2 · layers` writers together add no more than the mean square that the embedding began with.
//!
//! NF4 codes are uniform bytes, each of the sixteen values equally likely; scales are `offset + map[code] · nested_absmax` with uniform
//! codes, and lie within 0.32 and 1.68 of `offset`, which makes the deviation of the elements what it should be.

use std::cell::Cell;

use brightrun_kernels::ops::Noise;
use brightrun_kernels::weight::{NF4_BLOCK, NF4_NESTED_BLOCK};
use brightrun_kernels::{
    Backend, DType, Nf4Scales, Nf4Stack, Nf4StackScales, Nf4Weight, Tensor, Weight, WeightStack, dynamic,
};

use crate::error::Result;
use crate::model::random::CounterRandom;

/// The root of the mean square of NF4's sixteen values.
const NF4_ROOT: f64 = 0.517_18;

/// The mean of nested scales of the second level, as a share of the offset, and their deviation as a share of that mean.
const NESTED_SHARE: f32 = 0.5;
const NESTED_SPREAD: f32 = 0.1;

/// How far the offsets of a stack's experts spread.
const OFFSET_SPREAD: f32 = 0.02;

/// Fills the tensors of a skeleton, one after another.
pub(super) struct Filler<'a, B: Backend> {
    pub(super) device: &'a B,
    /// `None` leaves tensors as they are.
    pub(super) seed: Option<u64>,
    /// How many tensors have been filled.
    filled: Cell<u64>,
}

impl<'a, B: Backend> Filler<'a, B> {
    pub(super) fn new(device: &'a B, seed: Option<u64>) -> Self {
        Self {
            device,
            seed,
            filled: Cell::new(0),
        }
    }

    fn fill(&self, tensor: &mut Tensor<B>, noise: Noise) -> Result<()> {
        let Some(seed) = self.seed else {
            return Ok(());
        };
        let number = self.filled.replace(self.filled.get() + 1);
        let key = CounterRandom::new(seed, &format!("skeleton {number}")).key();
        Ok(self.device.fill_random(tensor, key, noise)?)
    }

    /// f32 or bf16 about `mean`.
    pub(super) fn normal(&self, tensor: &mut Tensor<B>, mean: f32, deviation: f32) -> Result<()> {
        self.fill(tensor, Noise::Normal { mean, deviation })
    }

    /// A matrix whose elements have this deviation.
    pub(super) fn weight(&self, weight: &mut Weight<B>, deviation: f32) -> Result<()> {
        let Nf4Weight { codes, scales, .. } = match weight {
            Weight::Dense(tensor) => return self.normal(tensor, 0.0, deviation),
            Weight::Nf4(weight) => weight,
        };
        self.fill(codes, Noise::Bytes)?;
        match scales {
            Nf4Scales::Flat(absmax) => self.flat(absmax, deviation),
            Nf4Scales::Nested {
                codes,
                nested_absmax,
                nested_code,
                offset,
            } => {
                *offset = nested_offset(deviation);
                self.nested(codes, nested_absmax, nested_code, *offset)
            }
        }
    }

    /// The same of every expert's matrix.
    pub(super) fn stack(&self, stack: &mut WeightStack<B>, deviation: f32) -> Result<()> {
        let Nf4Stack { codes, scales, .. } = match stack {
            WeightStack::Dense(tensor) => return self.normal(tensor, 0.0, deviation),
            WeightStack::Nf4(stack) => stack,
        };
        self.fill(codes, Noise::Bytes)?;
        match scales {
            Nf4StackScales::Flat(absmax) => self.flat(absmax, deviation),
            Nf4StackScales::Nested {
                codes,
                nested_absmax,
                nested_code,
                offsets,
            } => {
                let offset = nested_offset(deviation);
                self.normal(offsets, offset, OFFSET_SPREAD * offset)?;
                self.nested(codes, nested_absmax, nested_code, offset)
            }
        }
    }

    fn flat(&self, absmax: &mut Tensor<B>, deviation: f32) -> Result<()> {
        let mean = (f64::from(deviation) / NF4_ROOT) as f32;
        self.normal(absmax, mean, NESTED_SPREAD * mean)
    }

    fn nested(
        &self,
        codes: &mut Tensor<B>,
        nested_absmax: &mut Tensor<B>,
        nested_code: &mut Tensor<B>,
        offset: f32,
    ) -> Result<()> {
        self.fill(codes, Noise::Bytes)?;
        let mean = NESTED_SHARE * offset;
        self.normal(nested_absmax, mean, NESTED_SPREAD * mean)?;
        if self.seed.is_some() {
            let map: Vec<u8> = dynamic::signed().iter().flat_map(|value| value.to_le_bytes()).collect();
            self.device.write(nested_code, &map)?;
        }
        Ok(())
    }
}

/// The offset of nested scales that gives elements of this deviation: `deviation / (NF4_ROOT · √(mean square of scale over offset))`.
pub(super) fn nested_offset(deviation: f32) -> f32 {
    let square = |value: &f32| f64::from(*value).powi(2);
    let of_map = dynamic::signed().iter().map(square).sum::<f64>() / 256.0;
    let of_scales = 1.0 + of_map * f64::from(NESTED_SHARE).powi(2) * (1.0 + f64::from(NESTED_SPREAD).powi(2));
    (f64::from(deviation) / (NF4_ROOT * of_scales.sqrt())) as f32
}

/// A matrix in NF4 with nested scales, its contents unspecified.
pub(super) fn unfilled_nf4<B: Backend>(device: &B, [outputs, inputs]: [usize; 2]) -> Result<Weight<B>> {
    let elements = outputs * inputs;
    let blocks = elements.div_ceil(NF4_BLOCK);
    Ok(Weight::Nf4(Nf4Weight {
        codes: device.alloc(DType::U8, [elements.div_ceil(2)])?,
        scales: Nf4Scales::Nested {
            codes: device.alloc(DType::U8, [blocks])?,
            nested_absmax: device.alloc(DType::F32, [blocks.div_ceil(NF4_NESTED_BLOCK)])?,
            nested_code: device.alloc(DType::F32, [256])?,
            offset: 0.0,
        },
        outputs,
        inputs,
    }))
}
