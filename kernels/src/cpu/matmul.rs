//! Linear layers with LoRA.

use super::Cpu;
use super::products::{rounded, transposed};
use super::view::{floats, floats_mut, widened};
use crate::contract::{self, LinearSizes};
use crate::error::Result;
use crate::ops::{LinearBackward, LinearForward, MatmulOps, Write};

impl MatmulOps for Cpu {
    fn linear_forward(&self, call: LinearForward<'_, Self>) -> Result<()> {
        const OP: &str = "linear_forward";
        let LinearSizes {
            inputs, outputs, rank, ..
        } = contract::linear_forward(&call)?;
        let precision = call.precision;
        let x = rounded(floats(OP, "x", call.x)?, precision);
        let weight = rounded(&self.decoded(call.weight)?, precision);
        let y = floats_mut(OP, "y", call.y)?;
        y.fill(0.0);
        if let Some(bias) = call.bias {
            let bias = widened(OP, "bias", bias)?;
            for row in y.chunks_exact_mut(outputs.max(1)) {
                row.copy_from_slice(&bias);
            }
        }
        self.add_product_nt(y, &x, &weight, inputs, outputs, 1.0);
        if let Some(lora) = call.lora {
            let a = rounded(floats(OP, "lora.a", lora.a)?, precision);
            let b = rounded(floats(OP, "lora.b", lora.b)?, precision);
            let hidden = floats_mut(OP, "lora.hidden", lora.hidden)?;
            hidden.fill(0.0);
            self.add_product_nt(hidden, &x, &a, inputs, rank, 1.0);
            self.add_product_nt(y, &rounded(hidden, precision), &b, rank, outputs, lora.scale);
        }
        Ok(())
    }

    fn linear_backward(&self, call: LinearBackward<'_, Self>) -> Result<()> {
        const OP: &str = "linear_backward";
        let LinearSizes {
            tokens,
            inputs,
            outputs,
            rank,
        } = contract::linear_backward(&call)?;
        let precision = call.precision;
        let dy = rounded(floats(OP, "dy", call.dy)?, precision);
        let mut through = None;
        if let Some(lora) = call.lora {
            let a = rounded(floats(OP, "lora.a", lora.a)?, precision);
            let b = rounded(floats(OP, "lora.b", lora.b)?, precision);
            let mut v = vec![0.0; tokens * rank];
            self.add_product_nn(&mut v, &dy, &b, outputs, rank, lora.scale);
            let v = rounded(&v, precision);
            let x = rounded(floats(OP, "lora.x", lora.x)?, precision);
            let hidden = rounded(floats(OP, "lora.hidden", lora.hidden)?, precision);
            let da = floats_mut(OP, "lora.gradient_a", lora.gradient_a)?;
            self.add_product_nn(da, &transposed(&v, tokens, rank), &x, tokens, inputs, 1.0);
            let db = floats_mut(OP, "lora.gradient_b", lora.gradient_b)?;
            let transposed_dy = transposed(&dy, tokens, outputs);
            self.add_product_nn(db, &transposed_dy, &hidden, tokens, rank, lora.scale);
            through = Some((v, a));
        }
        if let Some((dx, write)) = call.dx {
            let weight = rounded(&self.decoded(call.weight)?, precision);
            let dx = floats_mut(OP, "dx", dx)?;
            if write == Write::Overwrite {
                dx.fill(0.0);
            }
            self.add_product_nn(dx, &dy, &weight, outputs, inputs, 1.0);
            if let Some((v, a)) = through {
                self.add_product_nn(dx, &v, &a, rank, inputs, 1.0);
            }
        }
        Ok(())
    }
}
