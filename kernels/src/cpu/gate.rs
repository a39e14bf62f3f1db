//! Gates, gated and l2 norms, and columns.

use bytemuck::{cast_slice, cast_slice_mut};

use super::Cpu;
use super::scratch::with_local;
use super::simd::{Simd, gates, rows};
use super::view::{floats, floats_mut, widened};
use crate::contract::{self, GateSizes};
use crate::dtype::DType;
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
        let (simd, width) = (self.inner.simd, sizes.width);
        self.for_rows(floats_mut(OP, "y", y)?, width, |first, y| {
            if write == Write::Overwrite {
                y.fill(0.0);
            }
            with_gates(gate, first * width..first * width + y.len(), sizes, |at, gate| {
                let y = &mut y[at - first * width..][..gate.len()];
                gates::gate(simd, &x[at..], gate, y, 1.0);
            });
        });
        Ok(())
    }

    fn sigmoid_gate_backward(&self, call: SigmoidGateBackward<'_, Self>) -> Result<()> {
        const OP: &str = "sigmoid_gate_backward";
        let sizes = contract::sigmoid_gate_backward(&call)?;
        let (x, gate) = (floats(OP, "x", call.x)?, floats(OP, "gate", call.gate)?);
        let dy = floats(OP, "dy", call.dy)?;
        let outputs = (floats_mut(OP, "dx", call.dx)?, floats_mut(OP, "dgate", call.dgate)?);
        let (simd, width) = (self.inner.simd, sizes.width);
        let gate_width = if sizes.scalar { 1 } else { width };
        self.for_rows2(outputs, (width, gate_width), |first, dx, dgate| {
            with_gates(gate, first * width..first * width + dx.len(), sizes, |at, gate| {
                let within = at - first * width;
                let (x, dy, dx) = (&x[at..], &dy[at..], &mut dx[within..][..gate.len()]);
                if !sizes.scalar {
                    gates::gate_backward(simd, x, gate, dy, dx, &mut dgate[within..]);
                    return;
                }
                with_local(gate.len(), |each| {
                    gates::gate_backward(simd, x, gate, dy, dx, each);
                    dgate[within / width] = each.iter().sum();
                });
            });
        });
        Ok(())
    }

    fn gated_norm_forward(&self, call: GatedNormForward<'_, Self>) -> Result<()> {
        const OP: &str = "gated_norm_forward";
        let width = contract::gated_norm_forward(&call)?;
        let (x, gate) = (floats(OP, "x", call.x)?, floats(OP, "gate", call.gate)?);
        let weight = widened(OP, "weight", call.weight)?;
        let outputs = (floats_mut(OP, "y", call.y)?, floats_mut(OP, "rstd", call.rstd)?);
        let simd = self.inner.simd;
        self.for_rows2(outputs, (width, 1), |first, y, rstd| {
            for (row, (y, rstd)) in y.chunks_exact_mut(width).zip(rstd).enumerate() {
                let at = (first + row) * width;
                let x = &x[at..][..width];
                *rstd = reciprocal_root(rows::dot(simd, x, x) / width as f32, call.eps);
                gates::gated_norm(simd, x, &gate[at..], &weight, *rstd, y);
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
        let simd = self.inner.simd;
        self.for_rows2(outputs, (width, width), |first, dx, dgate| {
            let rows = dx.chunks_exact_mut(width).zip(dgate.chunks_exact_mut(width));
            for (row, (dx, dgate)) in rows.enumerate() {
                let (at, rstd) = ((first + row) * width, rstd[first + row]);
                let x = &x[at..][..width];
                gates::gated_norm_backward(simd, x, &gate[at..], &weight, rstd, &dy[at..], dx, dgate);
                normalised_gradient(simd, dx, x, rstd, width as f32);
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
        let simd = self.inner.simd;
        self.for_rows2(outputs, (width, 1), |first, y, rnorm| {
            let inputs = x[first * width..].chunks_exact(width);
            for ((x, y), rnorm) in inputs.zip(y.chunks_exact_mut(width)).zip(rnorm) {
                *rnorm = reciprocal_root(rows::dot(simd, x, x), eps);
                gates::scaled(simd, x, *rnorm, y);
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
        let simd = self.inner.simd;
        self.for_rows(floats_mut(OP, "dx", dx)?, width, |first, dx| {
            for (row, dx) in dx.chunks_exact_mut(width).enumerate() {
                let at = (first + row) * width;
                dx.copy_from_slice(&dy[at..][..width]);
                normalised_gradient(simd, dx, &x[at..][..width], rnorm[first + row], 1.0);
            }
        });
        Ok(())
    }

    fn copy_columns(&self, source: &Tensor<Self>, target: &mut Tensor<Self>, columns: Columns) -> Result<()> {
        let lengths = contract::copy_columns(source, target, columns)?;
        let dtype = source.dtype();
        let (source, target) = (source.buffer().bytes(), target.buffer_mut().bytes_mut());
        // Frozen tables are moved so too, and those are bf16.
        match dtype {
            DType::BF16 => self.columns::<u16>(cast_slice(source), cast_slice_mut(target), lengths, columns),
            _ => self.columns::<u32>(cast_slice(source), cast_slice_mut(target), lengths, columns),
        }
        Ok(())
    }
}

impl Cpu {
    /// The columns of elements that are so wide; rows have these lengths.
    fn columns<T: Copy + Send + Sync>(
        &self,
        source: &[T],
        target: &mut [T],
        (length, target_length): (usize, usize),
        columns: Columns,
    ) {
        let (stride, target_stride) = (length / columns.groups, target_length / columns.groups);
        if columns.width == 0 {
            return;
        }
        self.for_rows(target, target_length, |first, target| {
            for (group, target) in target.chunks_exact_mut(target_stride).enumerate() {
                let group = first * columns.groups + group;
                let source = &source[group * stride + columns.source..][..columns.width];
                target[columns.target..][..columns.width].copy_from_slice(source);
            }
        });
    }
}

/// Gives `work` runs of gates, one gate for each element, with the place of the run's first element: a run is a row where one
/// gate serves it, otherwise all of `range`.
fn with_gates(gate: &[f32], range: std::ops::Range<usize>, sizes: GateSizes, mut work: impl FnMut(usize, &[f32])) {
    if !sizes.scalar {
        return work(range.start, &gate[range]);
    }
    with_local(sizes.width, |each| {
        for at in range.step_by(sizes.width) {
            each.fill(gate[at / sizes.width]);
            work(at, each);
        }
    });
}

fn reciprocal_root(square: f32, eps: f32) -> f32 {
    1.0 / (square + eps).sqrt()
}

/// `r (h − x · r² · ⟨h, x⟩ / count)` in place of `h`.
fn normalised_gradient(simd: Simd, h: &mut [f32], x: &[f32], r: f32, count: f32) {
    let pull = r * r * (rows::dot(simd, h, x) / count);
    gates::through_norm(simd, h, x, r, pull);
}
