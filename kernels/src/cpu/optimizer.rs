//! Gradient norm and AdamW.

use super::Cpu;
use super::simd::rows::{AdamWStep, adamw, sum_of_squares};
use super::view::{floats, floats_mut};
use crate::error::Result;
use crate::ops::{AdamW, BlockMoment, MOMENT_BLOCK, OptimizerOps};
use crate::tensor::Tensor;
use crate::{contract, dynamic};

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
        let step = numbers(settings);
        let parts = parameter
            .chunks_mut(PART)
            .zip(gradient.chunks(PART))
            .zip(m.chunks_mut(PART).zip(v.chunks_mut(PART)));
        let simd = self.inner.simd;
        self.for_each_item(parts.collect(), |((w, g), (m, v))| adamw(simd, w, g, m, v, &step));
        Ok(())
    }

    fn adamw_8bit_step(
        &self,
        parameter: &mut Tensor<Self>,
        gradient: &Tensor<Self>,
        m: &mut BlockMoment<Self>,
        v: &mut BlockMoment<Self>,
        settings: &AdamW,
    ) -> Result<()> {
        const OP: &str = "adamw_8bit_step";
        contract::adamw_8bit_step(parameter, gradient, (m, v), settings)?;
        let gradient = floats(OP, "gradient", gradient)?;
        let parameter = floats_mut(OP, "parameter", parameter)?;
        let moments = [m, v].map(|moment| {
            let absmax = floats_mut(OP, "absmax", &mut moment.absmax)?;
            Ok((moment.codes.buffer_mut().bytes_mut(), absmax))
        });
        let [m, v] = moments;
        let ((m_codes, m_absmax), (v_codes, v_absmax)) = (m?, v?);
        let weights = parameter.chunks_mut(MOMENT_BLOCK).zip(gradient.chunks(MOMENT_BLOCK));
        let m = m_codes.chunks_mut(MOMENT_BLOCK).zip(m_absmax);
        let v = v_codes.chunks_mut(MOMENT_BLOCK).zip(v_absmax);
        let mut blocks: Vec<_> = weights.zip(m.zip(v)).collect();
        let (step, simd) = (numbers(settings), self.inner.simd);
        let (signed, unsigned) = (dynamic::signed(), dynamic::unsigned());
        let tasks: Vec<_> = blocks.chunks_mut(PART / MOMENT_BLOCK).collect();
        self.for_each_item(tasks, |blocks| {
            for ((w, g), ((m_codes, m_absmax), (v_codes, v_absmax))) in blocks {
                let (mut m, mut v) = ([0.0; MOMENT_BLOCK], [0.0; MOMENT_BLOCK]);
                let (m, v) = (&mut m[..w.len()], &mut v[..w.len()]);
                decode(&signed, m_codes, **m_absmax, m);
                decode(&unsigned, v_codes, **v_absmax, v);
                adamw(simd, w, g, m, v, &step);
                **m_absmax = encode(&signed, m, 0, m_codes);
                // A positive second moment stays positive.
                **v_absmax = encode(&unsigned, v, 1, v_codes);
            }
        });
        Ok(())
    }
}

/// A step's numbers, the corrections in f64, as Python computes them for torch.
fn numbers(settings: &AdamW) -> AdamWStep {
    let step = settings.step as f64;
    let correction1 = 1.0 - f64::from(settings.beta1).powf(step);
    let correction2 = 1.0 - f64::from(settings.beta2).powf(step);
    let rate = f64::from(settings.learning_rate);
    AdamWStep {
        gradient_scale: settings.gradient_scale,
        keep: (1.0 - rate * f64::from(settings.weight_decay)) as f32,
        one_minus_beta1: (1.0 - f64::from(settings.beta1)) as f32,
        beta2: settings.beta2,
        one_minus_beta2: (1.0 - f64::from(settings.beta2)) as f32,
        rate: (rate / correction1) as f32,
        root2: correction2.sqrt() as f32,
        epsilon: settings.epsilon,
    }
}

fn decode(map: &[f32; 256], codes: &[u8], absmax: f32, values: &mut [f32]) {
    for (value, code) in values.iter_mut().zip(codes) {
        *value = map[usize::from(*code)] * absmax;
    }
}

/// Codes of a block; gives its scale. Values above 0 get at least the code `least`.
fn encode(map: &[f32; 256], values: &[f32], least: u8, codes: &mut [u8]) -> f32 {
    let absmax = values.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
    let divisor = if absmax == 0.0 { 1.0 } else { absmax };
    for (code, value) in codes.iter_mut().zip(values) {
        *code = dynamic::nearest(map, value / divisor);
        if *value > 0.0 {
            *code = (*code).max(least);
        }
    }
    absmax
}
