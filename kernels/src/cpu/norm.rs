//! RMS normalisation.

use super::Cpu;
use super::simd::rows::{rms_norm_backward, rms_norm_forward};
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
        let simd = self.inner.simd;
        self.for_rows2(outputs, (width, 1), |first, y, rstd| {
            let rows = x[first * width..].chunks_exact(width);
            for ((x, y), rstd) in rows.zip(y.chunks_exact_mut(width)).zip(rstd) {
                *rstd = rms_norm_forward(simd, x, &weight, call.eps, y);
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
        let (simd, accumulate) = (self.inner.simd, write == Write::Accumulate);
        self.for_rows(floats_mut(OP, "dx", dx)?, width, |first, dx| {
            let rows = x[first * width..]
                .chunks_exact(width)
                .zip(dy[first * width..].chunks_exact(width));
            for (((x, dy), dx), rstd) in rows.zip(dx.chunks_exact_mut(width)).zip(&rstd[first..]) {
                rms_norm_backward(simd, x, &weight, *rstd, dy, dx, accumulate);
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
