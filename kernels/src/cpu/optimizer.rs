//! Gradient norm and AdamW.

use super::Cpu;
use super::simd::rows::{AdamWStep, adamw, sum_of_squares};
use super::view::{floats, floats_mut};
use crate::contract;
use crate::error::Result;
use crate::ops::{AdamW, OptimizerOps};
use crate::tensor::Tensor;

/// Elements of a task. It decides the order of the norm's sum, so it is a constant.
const PART: usize = 16 * 1024;

impl OptimizerOps for Cpu {
    fn squared_norm(&self, tensors: &[&Tensor<Self>]) -> Result<f64> {
        let mut sum = 0.0;
        for tensor in tensors {
            let values = floats("squared_norm", "tensors", tensor)?;
            let mut parts = vec![0.0; values.len().div_ceil(PART)];
            self.for_items(&mut parts, |index, part| {
                let values = &values[index * PART..values.len().min((index + 1) * PART)];
                *part = sum_of_squares(self.inner.simd, values);
            });
            sum += parts.iter().sum::<f64>();
        }
        Ok(sum)
    }

    fn adamw_step(
        &self,
        parameter: &mut Tensor<Self>,
        gradient: &Tensor<Self>,
        m: &mut Tensor<Self>,
        v: &mut Tensor<Self>,
        settings: &AdamW,
    ) -> Result<()> {
        const OP: &str = "adamw_step";
        contract::adamw_step(parameter, gradient, m, v, settings)?;
        let gradient = floats(OP, "gradient", gradient)?;
        let (m, v) = (floats_mut(OP, "m", m)?, floats_mut(OP, "v", v)?);
        let parameter = floats_mut(OP, "parameter", parameter)?;
        let step = settings.step as f64;
        // The corrections in f64, as Python computes them for torch.
        let correction1 = 1.0 - f64::from(settings.beta1).powf(step);
        let correction2 = 1.0 - f64::from(settings.beta2).powf(step);
        let rate = f64::from(settings.learning_rate);
        let step = AdamWStep {
            gradient_scale: settings.gradient_scale,
            keep: (1.0 - rate * f64::from(settings.weight_decay)) as f32,
            one_minus_beta1: (1.0 - f64::from(settings.beta1)) as f32,
            beta2: settings.beta2,
            one_minus_beta2: (1.0 - f64::from(settings.beta2)) as f32,
            rate: (rate / correction1) as f32,
            root2: correction2.sqrt() as f32,
            epsilon: settings.epsilon,
        };
        let parts = parameter
            .chunks_mut(PART)
            .zip(gradient.chunks(PART))
            .zip(m.chunks_mut(PART).zip(v.chunks_mut(PART)));
        let simd = self.inner.simd;
        self.for_each_item(parts.collect(), |((w, g), (m, v))| adamw(simd, w, g, m, v, &step));
        Ok(())
    }
}
