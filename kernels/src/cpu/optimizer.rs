//! Gradient norm and AdamW.

use super::Cpu;
use super::view::{floats, floats_mut};
use crate::contract;
use crate::error::Result;
use crate::ops::{AdamW, OptimizerOps};
use crate::tensor::Tensor;

impl OptimizerOps for Cpu {
    fn squared_norm(&self, tensors: &[&Tensor<Self>]) -> Result<f64> {
        let mut sum = 0.0;
        for tensor in tensors {
            let values = floats("squared_norm", "tensors", tensor)?;
            sum += values.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>();
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
        let rate = (f64::from(settings.learning_rate) / correction1) as f32;
        let root2 = correction2.sqrt() as f32;
        let keep = (1.0 - f64::from(settings.learning_rate) * f64::from(settings.weight_decay)) as f32;
        let (beta1, beta2) = (settings.beta1, settings.beta2);
        for (((w, g), m), v) in parameter.iter_mut().zip(gradient).zip(m).zip(v) {
            let g = settings.gradient_scale * g;
            *w *= keep;
            *m += (1.0 - beta1) * (g - *m);
            *v = beta2 * *v + (1.0 - beta2) * g * g;
            *w -= rate * *m / (v.sqrt() / root2 + settings.epsilon);
        }
        Ok(())
    }
}
