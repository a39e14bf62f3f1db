//! Gates, gated and l2 norms, and columns.

use super::Cpu;
use super::activation::logistic;
use super::view::{floats, floats_mut, widened};
use crate::contract::{self, GateSizes};
use crate::error::Result;
use crate::ops::{Columns, GateOps, GatedNormBackward, GatedNormForward, SigmoidGateBackward, Write};
use crate::tensor::Tensor;

impl GateOps for Cpu {
    fn sigmoid_gate_forward(
        &self,
        x: &Tensor<Self>,
        gate: &Tensor<Self>,
        y: &mut Tensor<Self>,
        write: Write,
    ) -> Result<()> {
        const OP: &str = "sigmoid_gate_forward";
        let sizes = contract::sigmoid_gate_forward(x, gate, y)?;
        let (x, gate) = (floats(OP, "x", x)?, floats(OP, "gate", gate)?);
        self.for_rows(floats_mut(OP, "y", y)?, sizes.width, |first, y| {
            for (row, y) in y.chunks_exact_mut(sizes.width).enumerate() {
                let x = &x[(first + row) * sizes.width..][..sizes.width];
                let gates = gates(gate, first + row, sizes);
                for ((y, x), gate) in y.iter_mut().zip(x).zip(gates) {
                    let value = x * logistic(*gate);
                    *y = match write {
                        Write::Overwrite => value,
                        Write::Accumulate => *y + value,
                    };
                }
            }
        });
        Ok(())
    }

    fn sigmoid_gate_backward(&self, call: SigmoidGateBackward<'_, Self>) -> Result<()> {
        const OP: &str = "sigmoid_gate_backward";
        let sizes = contract::sigmoid_gate_backward(&call)?;
        let (x, gate) = (floats(OP, "x", call.x)?, floats(OP, "gate", call.gate)?);
        let dy = floats(OP, "dy", call.dy)?;
        let outputs = (floats_mut(OP, "dx", call.dx)?, floats_mut(OP, "dgate", call.dgate)?);
        let width = sizes.width;
        let gate_width = if sizes.scalar { 1 } else { width };
        self.for_rows2(outputs, (width, gate_width), |first, dx, dgate| {
            let rows = dx.chunks_exact_mut(width).zip(dgate.chunks_exact_mut(gate_width));
            for (row, (dx, dgate)) in rows.enumerate() {
                let at = (first + row) * width;
                let gates = gates(gate, first + row, sizes);
                dgate.fill(0.0);
                for (i, gate) in gates.enumerate() {
                    let (x, dy, sigma) = (x[at + i], dy[at + i], logistic(*gate));
                    dx[i] = dy * sigma;
                    dgate[if sizes.scalar { 0 } else { i }] += dy * x * (sigma * (1.0 - sigma));
                }
            }
        });
        Ok(())
    }

    fn gated_norm_forward(&self, call: GatedNormForward<'_, Self>) -> Result<()> {
        const OP: &str = "gated_norm_forward";
        let width = contract::gated_norm_forward(&call)?;
        let (x, gate) = (floats(OP, "x", call.x)?, floats(OP, "gate", call.gate)?);
        let weight = widened(OP, "weight", call.weight)?;
        let outputs = (floats_mut(OP, "y", call.y)?, floats_mut(OP, "rstd", call.rstd)?);
        self.for_rows2(outputs, (width, 1), |first, y, rstd| {
            for (row, (y, rstd)) in y.chunks_exact_mut(width).zip(rstd).enumerate() {
                let at = (first + row) * width;
                let (x, gate) = (&x[at..][..width], &gate[at..][..width]);
                *rstd = reciprocal_root(inner(x, x) / width as f64, call.eps);
                for (((y, x), z), w) in y.iter_mut().zip(x).zip(gate).zip(&weight) {
                    *y = x * *rstd * w * (z * logistic(*z));
                }
            }
        });
        Ok(())
    }

    fn gated_norm_backward(&self, call: GatedNormBackward<'_, Self>) -> Result<()> {
        const OP: &str = "gated_norm_backward";
        let width = contract::gated_norm_backward(&call)?;
        let (x, gate) = (floats(OP, "x", call.x)?, floats(OP, "gate", call.gate)?);
        let (dy, rstd) = (floats(OP, "dy", call.dy)?, floats(OP, "rstd", call.rstd)?);
        let weight = widened(OP, "weight", call.weight)?;
        let outputs = (floats_mut(OP, "dx", call.dx)?, floats_mut(OP, "dgate", call.dgate)?);
        self.for_rows2(outputs, (width, width), |first, dx, dgate| {
            let rows = dx.chunks_exact_mut(width).zip(dgate.chunks_exact_mut(width));
            for (row, (dx, dgate)) in rows.enumerate() {
                let (at, rstd) = ((first + row) * width, rstd[first + row]);
                let x = &x[at..][..width];
                for (i, (dx, dgate)) in dx.iter_mut().zip(dgate).enumerate() {
                    let (z, dy) = (gate[at + i], dy[at + i]);
                    let sigma = logistic(z);
                    *dgate = dy * (x[i] * rstd * weight[i]) * sigma * (1.0 + z * (1.0 - sigma));
                    *dx = dy * (z * sigma) * weight[i];
                }
                normalised_gradient(dx, x, rstd, inner(dx, x) / width as f64);
            }
        });
        Ok(())
    }

    fn l2_norm_forward(
        &self,
        x: &Tensor<Self>,
        eps: f32,
        y: &mut Tensor<Self>,
        rnorm: &mut Tensor<Self>,
    ) -> Result<()> {
        const OP: &str = "l2_norm_forward";
        let width = contract::l2_norm_forward(x, y, rnorm)?;
        let x = floats(OP, "x", x)?;
        let outputs = (floats_mut(OP, "y", y)?, floats_mut(OP, "rnorm", rnorm)?);
        self.for_rows2(outputs, (width, 1), |first, y, rnorm| {
            let rows = x[first * width..].chunks_exact(width);
            for ((x, y), rnorm) in rows.zip(y.chunks_exact_mut(width)).zip(rnorm) {
                *rnorm = reciprocal_root(inner(x, x), eps);
                for (y, x) in y.iter_mut().zip(x) {
                    *y = x * *rnorm;
                }
            }
        });
        Ok(())
    }

    fn l2_norm_backward(
        &self,
        x: &Tensor<Self>,
        rnorm: &Tensor<Self>,
        dy: &Tensor<Self>,
        dx: &mut Tensor<Self>,
    ) -> Result<()> {
        const OP: &str = "l2_norm_backward";
        let width = contract::l2_norm_backward(x, rnorm, dy, dx)?;
        let (x, dy) = (floats(OP, "x", x)?, floats(OP, "dy", dy)?);
        let rnorm = floats(OP, "rnorm", rnorm)?;
        self.for_rows(floats_mut(OP, "dx", dx)?, width, |first, dx| {
            for (row, dx) in dx.chunks_exact_mut(width).enumerate() {
                let at = (first + row) * width;
                let x = &x[at..][..width];
                dx.copy_from_slice(&dy[at..][..width]);
                normalised_gradient(dx, x, rnorm[first + row], inner(dx, x));
            }
        });
        Ok(())
    }

    fn copy_columns(&self, source: &Tensor<Self>, target: &mut Tensor<Self>, columns: Columns) -> Result<()> {
        const OP: &str = "copy_columns";
        let (length, target_length) = contract::copy_columns(source, target, columns)?;
        let source = floats(OP, "source", source)?;
        let (stride, target_stride) = (length / columns.groups, target_length / columns.groups);
        if columns.width == 0 {
            return Ok(());
        }
        self.for_rows(floats_mut(OP, "target", target)?, target_length, |first, target| {
            for (group, target) in target.chunks_exact_mut(target_stride).enumerate() {
                let group = first * columns.groups + group;
                let source = &source[group * stride + columns.source..][..columns.width];
                target[columns.target..][..columns.width].copy_from_slice(source);
            }
        });
        Ok(())
    }
}

/// The gates of one row, one for each of its elements.
fn gates(gate: &[f32], row: usize, sizes: GateSizes) -> impl Iterator<Item = &f32> {
    let (own, times) = match sizes.scalar {
        true => (&gate[row..=row], sizes.width),
        false => (&gate[row * sizes.width..][..sizes.width], 1),
    };
    own.iter().flat_map(move |gate| std::iter::repeat_n(gate, times))
}

/// `⟨a, b⟩` in f64.
fn inner(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

fn reciprocal_root(square: f64, eps: f32) -> f32 {
    (1.0 / (square + f64::from(eps)).sqrt()) as f32
}

/// `r (h − x · r² · pull)` in place of `h`.
fn normalised_gradient(h: &mut [f32], x: &[f32], r: f32, pull: f64) {
    let pull = (f64::from(r) * f64::from(r) * pull) as f32;
    for (h, x) in h.iter_mut().zip(x) {
        *h = r * (*h - x * pull);
    }
}
