//! AdamW's state beside an adapter.

use brightrun_kernels::ops::{AdamW, BlockMoment, MOMENT_BLOCK, MomentsMut, Trained};
use brightrun_kernels::{Backend, DType, Shape, Tensor};

use crate::error::Result;
use crate::model::{LoraGradients, LoraSet};
use crate::spec::{OptimizerKind, TrainSpec};

/// Tensors smaller than this keep f32 moments, as in bitsandbytes: 8 bits would save nothing there.
const MIN_8BIT_ELEMENTS: usize = 4096;

/// First and second moment of one tensor.
#[derive(Debug)]
pub enum Moments<B: Backend> {
    /// f32, shaped as the tensor.
    F32 {
        /// Mean of gradients.
        m: Tensor<B>,
        /// Mean of squared gradients.
        v: Tensor<B>,
    },
    /// 8 bits, block by block.
    Blocks {
        /// Mean of gradients.
        m: BlockMoment<B>,
        /// Mean of squared gradients.
        v: BlockMoment<B>,
    },
}

/// AdamW over all factors of an adapter.
#[derive(Debug)]
pub struct Optimizer<B: Backend> {
    beta1: f32,
    beta2: f32,
    epsilon: f32,
    weight_decay: f32,
    /// Moments of A and of B, pair by pair.
    moments: Vec<[Moments<B>; 2]>,
}

/// Bytes of both moments of a tensor of so many elements.
pub fn moment_bytes(kind: OptimizerKind, elements: usize) -> u64 {
    let bytes = match is_8bit(kind, elements) {
        false => 2 * elements * DType::F32.size_bytes(),
        true => 2 * (elements + elements.div_ceil(MOMENT_BLOCK) * DType::F32.size_bytes()),
    };
    bytes as u64
}

fn is_8bit(kind: OptimizerKind, elements: usize) -> bool {
    kind == OptimizerKind::Adamw8bit && elements >= MIN_8BIT_ELEMENTS
}

impl<B: Backend> Moments<B> {
    fn zeros(device: &B, kind: OptimizerKind, shape: Shape) -> Result<Self> {
        Ok(match is_8bit(kind, shape.elements()) {
            false => Self::F32 {
                m: device.zeros(DType::F32, shape)?,
                v: device.zeros(DType::F32, shape)?,
            },
            true => Self::Blocks {
                m: BlockMoment::zeros(device, shape)?,
                v: BlockMoment::zeros(device, shape)?,
            },
        })
    }

    /// A factor's part of a step, with these as its moments.
    fn of<'a>(&'a mut self, parameter: &'a mut Tensor<B>, gradient: &'a Tensor<B>) -> Trained<'a, B> {
        Trained {
            parameter,
            gradient,
            moments: match self {
                Self::F32 { m, v } => MomentsMut::Single { m, v },
                Self::Blocks { m, v } => MomentsMut::Blocks { m, v },
            },
        }
    }

    /// All tensors, each under the name that a checkpoint has it by.
    pub fn tensors(&self) -> Vec<(&'static str, &Tensor<B>)> {
        match self {
            Self::F32 { m, v } => vec![("m", m), ("v", v)],
            Self::Blocks { m, v } => vec![
                ("m.codes", &m.codes),
                ("m.absmax", &m.absmax),
                ("v.codes", &v.codes),
                ("v.absmax", &v.absmax),
            ],
        }
    }

    /// As [`Moments::tensors`], to be restored.
    pub fn tensors_mut(&mut self) -> Vec<(&'static str, &mut Tensor<B>)> {
        match self {
            Self::F32 { m, v } => vec![("m", m), ("v", v)],
            Self::Blocks { m, v } => vec![
                ("m.codes", &mut m.codes),
                ("m.absmax", &mut m.absmax),
                ("v.codes", &mut v.codes),
                ("v.absmax", &mut v.absmax),
            ],
        }
    }
}

impl<B: Backend> Optimizer<B> {
    /// Moments of zero.
    ///
    /// # Errors
    /// The backend's own.
    pub fn new(device: &B, spec: &TrainSpec, lora: &LoraSet<B>) -> Result<Self> {
        let moments = lora
            .pairs()
            .iter()
            .map(|pair| {
                Ok([
                    Moments::zeros(device, spec.optimizer, pair.a.shape())?,
                    Moments::zeros(device, spec.optimizer, pair.b.shape())?,
                ])
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            beta1: spec.beta1,
            beta2: spec.beta2,
            epsilon: spec.epsilon,
            weight_decay: spec.weight_decay,
            moments,
        })
    }

    /// Updates every factor. `step` counts from 1; `gradient_scale` is the clipping coefficient.
    ///
    /// # Errors
    /// The backend's own.
    pub fn apply(
        &mut self,
        device: &B,
        lora: &mut LoraSet<B>,
        gradients: &LoraGradients<B>,
        (step, learning_rate, gradient_scale): (u64, f64, f64),
    ) -> Result<()> {
        let settings = AdamW {
            learning_rate: learning_rate as f32,
            beta1: self.beta1,
            beta2: self.beta2,
            epsilon: self.epsilon,
            weight_decay: self.weight_decay,
            step,
            gradient_scale: gradient_scale as f32,
        };
        let pairs = lora
            .pairs_mut()
            .iter_mut()
            .zip(gradients.pairs())
            .zip(&mut self.moments);
        let factors = pairs.flat_map(|((pair, (gradient_a, gradient_b)), [a, b])| {
            [a.of(&mut pair.a, gradient_a), b.of(&mut pair.b, gradient_b)]
        });
        Ok(device.adamw_step_many(factors.collect(), &settings)?)
    }

    /// Moments of A and of B, pair by pair.
    pub fn moments(&self) -> &[[Moments<B>; 2]] {
        &self.moments
    }

    /// Moments, to be restored.
    pub fn moments_mut(&mut self) -> &mut [[Moments<B>; 2]] {
        &mut self.moments
    }

    /// Bytes of all moments.
    pub fn size_bytes(&self) -> u64 {
        let all = self.moments.iter().flatten().flat_map(Moments::tensors);
        all.map(|(_, tensor)| tensor.size_bytes() as u64).sum()
    }
}
