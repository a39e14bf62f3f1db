//! AdamW's state beside an adapter.

use brightrun_kernels::ops::AdamW;
use brightrun_kernels::{Backend, DType, Shape, Tensor};

use crate::error::Result;
use crate::model::{LoraGradients, LoraSet};
use crate::spec::TrainSpec;

/// First and second moment of one tensor, f32.
#[derive(Debug)]
pub struct Moments<B: Backend> {
    /// Mean of gradients.
    pub m: Tensor<B>,
    /// Mean of squared gradients.
    pub v: Tensor<B>,
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

impl<B: Backend> Moments<B> {
    fn zeros(device: &B, shape: Shape) -> Result<Self> {
        Ok(Self {
            m: device.zeros(DType::F32, shape)?,
            v: device.zeros(DType::F32, shape)?,
        })
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
                    Moments::zeros(device, pair.a.shape())?,
                    Moments::zeros(device, pair.b.shape())?,
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
        for ((pair, (gradient_a, gradient_b)), [a, b]) in pairs {
            device.adamw_step(&mut pair.a, gradient_a, &mut a.m, &mut a.v, &settings)?;
            device.adamw_step(&mut pair.b, gradient_b, &mut b.m, &mut b.v, &settings)?;
        }
        Ok(())
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
        let all = self.moments.iter().flatten();
        all.map(|moments| (moments.m.size_bytes() + moments.v.size_bytes()) as u64)
            .sum()
    }
}
