//! Linear layers with LoRA.
//!
//! The adapter's second product is a second term of the layer's own product, so it costs its arithmetic and little else.

use super::matrix::{Factor, Matrix};
use super::products::{RowsAre, Term, transposed};
use super::simd::{Start, rows as simd_rows};
use super::view::{floats, floats_mut, widened};
use super::{Cpu, Products};
use crate::contract::{self, LinearSizes};
use crate::error::Result;
use crate::ops::{LinearBackward, LinearForward, LoraBackward, MatmulOps, Write};

impl MatmulOps for Cpu {
    fn linear_forward(&self, call: LinearForward<'_, Self>) -> Result<()> {
        let sizes = contract::linear_forward(&call)?;
        match self.products(call.precision) {
            Products::Single { rounded } => self.forward::<f32>(call, sizes, rounded),
            Products::Half => self.forward::<u16>(call, sizes, true),
        }
    }

    fn linear_backward(&self, call: LinearBackward<'_, Self>) -> Result<()> {
        let sizes = contract::linear_backward(&call)?;
        match self.products(call.precision) {
            Products::Single { rounded } => self.backward::<f32>(call, sizes, rounded),
            Products::Half => self.backward::<u16>(call, sizes, true),
        }
    }
}

impl Cpu {
    fn forward<E: Factor>(&self, call: LinearForward<'_, Self>, sizes: LinearSizes, rounded: bool) -> Result<()> {
        const OP: &str = "linear_forward";
        let LinearSizes {
            tokens,
            inputs,
            outputs,
            rank,
            ..
        } = sizes;
        let x = self.left::<E>(floats(OP, "x", call.x)?, [tokens, inputs], rounded)?;
        let weight = Matrix::of_weight(call.weight, rounded)?;
        let y = floats_mut(OP, "y", call.y)?;
        let bias = call.bias.map(|bias| widened(OP, "bias", bias)).transpose()?;
        let start = bias.as_deref().map_or(Start::Zero, Start::Columns);
        let term = Term {
            left: x.view(),
            right: &weight,
            rows_are: RowsAre::Columns,
        };
        let Some(lora) = call.lora else {
            self.product(&[term], y, outputs, start);
            return Ok(());
        };
        let a = Matrix::of_values(floats(OP, "lora.a", lora.a)?, inputs, rounded);
        let b = Matrix::of_values(floats(OP, "lora.b", lora.b)?, rank, rounded);
        let hidden = floats_mut(OP, "lora.hidden", lora.hidden)?;
        let down = Term {
            left: x.view(),
            right: &a,
            rows_are: RowsAre::Columns,
        };
        self.product(&[down], hidden, rank, Start::Zero);
        let hidden = self.scaled_left::<E>(hidden, [tokens, rank], lora.scale, rounded)?;
        let up = Term {
            left: hidden.view(),
            right: &b,
            rows_are: RowsAre::Columns,
        };
        self.product(&[term, up], y, outputs, start);
        Ok(())
    }

    fn backward<E: Factor>(&self, call: LinearBackward<'_, Self>, sizes: LinearSizes, rounded: bool) -> Result<()> {
        const OP: &str = "linear_backward";
        let LinearSizes {
            tokens,
            inputs,
            outputs,
            rank,
        } = sizes;
        let exact_dy = floats(OP, "dy", call.dy)?;
        let dy = self.left::<E>(exact_dy, [tokens, outputs], rounded)?;
        let weight = Matrix::of_weight(call.weight, rounded)?;
        let mut through = self.scratch::<f32>(tokens * rank)?;
        let mut adapter = None;
        if let Some(lora) = call.lora {
            let b = Matrix::of_values(floats(OP, "lora.b", lora.b)?, rank, rounded);
            let term = Term {
                left: dy.view(),
                right: &b,
                rows_are: RowsAre::Depth,
            };
            self.product(&[term], through.values_mut(), rank, Start::Zero);
            simd_rows::scale(self.inner.simd, through.values_mut(), lora.scale);
            adapter = Some(Matrix::of_values(floats(OP, "lora.a", lora.a)?, inputs, rounded));
            self.adapter_gradients::<E>(lora, exact_dy, through.values(), sizes, rounded)?;
        }
        let Some((dx, write)) = call.dx else {
            return Ok(());
        };
        let dx = floats_mut(OP, "dx", dx)?;
        let start = match write {
            Write::Overwrite => Start::Zero,
            Write::Accumulate => Start::Output,
        };
        let term = Term {
            left: dy.view(),
            right: &weight,
            rows_are: RowsAre::Depth,
        };
        match adapter {
            None => self.product(&[term], dx, inputs, start),
            Some(a) => {
                let through = self.left::<E>(through.values(), [tokens, rank], rounded)?;
                let down = Term {
                    left: through.view(),
                    right: &a,
                    rows_are: RowsAre::Depth,
                };
                self.product(&[term, down], dx, inputs, start);
            }
        }
        Ok(())
    }

    /// `dA += vᵀ · x` and `dB += s · dyᵀ · u`, with `v = s · dy · B`. The second is computed as its transpose, `uᵀ · dy`, so
    /// that the long side lies along the panels.
    fn adapter_gradients<E: Factor>(
        &self,
        lora: LoraBackward<'_, Self>,
        dy: &[f32],
        v: &[f32],
        sizes: LinearSizes,
        rounded: bool,
    ) -> Result<()> {
        const OP: &str = "linear_backward";
        let LinearSizes {
            tokens,
            inputs,
            outputs,
            rank,
        } = sizes;
        let mut turned = self.scratch::<f32>(tokens * rank)?;

        transposed(v, rank, turned.values_mut());
        let left = self.left::<E>(turned.values(), [rank, tokens], rounded)?;
        let x = Matrix::of_values(floats(OP, "lora.x", lora.x)?, inputs, rounded);
        let da = floats_mut(OP, "lora.gradient_a", lora.gradient_a)?;
        let term = Term {
            left: left.view(),
            right: &x,
            rows_are: RowsAre::Depth,
        };
        self.product(&[term], da, inputs, Start::Output);
        drop(left);

        transposed(floats(OP, "lora.hidden", lora.hidden)?, rank, turned.values_mut());
        let left = self.left::<E>(turned.values(), [rank, tokens], rounded)?;
        let dy = Matrix::of_values(dy, outputs, rounded);
        let mut product = self.scratch::<f32>(rank * outputs)?;
        let term = Term {
            left: left.view(),
            right: &dy,
            rows_are: RowsAre::Depth,
        };
        self.product(&[term], product.values_mut(), outputs, Start::Zero);
        let mut db = self.scratch::<f32>(rank * outputs)?;
        transposed(product.values(), outputs, db.values_mut());
        simd_rows::scale(self.inner.simd, db.values_mut(), lora.scale);
        simd_rows::add(
            self.inner.simd,
            floats_mut(OP, "lora.gradient_b", lora.gradient_b)?,
            db.values(),
        );
        Ok(())
    }
}
