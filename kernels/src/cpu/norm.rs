//! RMS normalisation.

use super::Cpu;
use super::view::{floats, floats_mut, widened};
use crate::contract::{self, NormSizes};
use crate::error::Result;
use crate::ops::{NormBackward, NormForward, NormOps, NormWeight, Write};
use crate::tensor::Tensor;

impl NormOps for Cpu {
    fn rms_norm_forward(&self, call: NormForward<'_, Self>) -> Result<()> {
        const OP: &str = "rms_norm_forward";
        let NormSizes { width, .. } = contract::rms_norm_forward(&call)?;
        let weight = factors(OP, call.weight, call.style)?;
        let x = floats(OP, "x", call.x)?;
        let outputs = (floats_mut(OP, "y", call.y)?, floats_mut(OP, "rstd", call.rstd)?);
        self.for_rows2(outputs, (width, 1), |first, y, rstd| {
            let rows = x[first * width..].chunks_exact(width);
            for ((x, y), rstd) in rows.zip(y.chunks_exact_mut(width)).zip(rstd) {
                let squares: f64 = x.iter().map(|x| f64::from(*x) * f64::from(*x)).sum();
                *rstd = (1.0 / (squares / width as f64 + f64::from(call.eps)).sqrt()) as f32;
                for ((y, x), w) in y.iter_mut().zip(x).zip(&weight) {
                    *y = x * *rstd * w;
                }
            }
        });
        Ok(())
    }

    fn rms_norm_backward(&self, call: NormBackward<'_, Self>) -> Result<()> {
        const OP: &str = "rms_norm_backward";
        let NormSizes { width, .. } = contract::rms_norm_backward(&call)?;
        let weight = factors(OP, call.weight, call.style)?;
        let (x, dy) = (floats(OP, "x", call.x)?, floats(OP, "dy", call.dy)?);
        let rstd = floats(OP, "rstd", call.rstd)?;
        let (dx, write) = call.dx;
        self.for_rows(floats_mut(OP, "dx", dx)?, width, |first, dx| {
            let rows = x[first * width..]
                .chunks_exact(width)
                .zip(dy[first * width..].chunks_exact(width));
            for (((x, dy), dx), rstd) in rows.zip(dx.chunks_exact_mut(width)).zip(&rstd[first..]) {
                let products = x.iter().zip(dy).zip(&weight);
                let mean = products
                    .map(|((x, dy), w)| f64::from(dy * w) * f64::from(*x))
                    .sum::<f64>()
                    / width as f64;
                let pull = rstd * rstd * mean as f32;
                for (((dx, x), dy), w) in dx.iter_mut().zip(x).zip(dy).zip(&weight) {
                    let value = rstd * (dy * w - x * pull);
                    *dx = match write {
                        Write::Overwrite => value,
                        Write::Accumulate => *dx + value,
                    };
                }
            }
        });
        Ok(())
    }
}

/// What the normalised value is multiplied by.
fn factors(op: &'static str, weight: &Tensor<Cpu>, style: NormWeight) -> Result<Vec<f32>> {
    let mut weight = widened(op, "weight", weight)?;
    if style == NormWeight::ZeroCentred {
        weight.iter_mut().for_each(|w| *w += 1.0);
    }
    Ok(weight)
}
