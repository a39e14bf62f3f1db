//! The SwiGLU MLP: `y = (silu(x·Wgᵀ) ⊙ x·Wuᵀ) · Wdᵀ`.

use brightrun_kernels::ops::Write;
use brightrun_kernels::{Backend, Tensor};

use crate::error::Result;
use crate::model::linear::{Linear, Projected};
use crate::model::lora::LoraGradients;
use crate::model::pass::Pass;

/// One layer's MLP.
#[derive(Debug)]
pub struct Mlp<B: Backend> {
    pub(crate) gate: Linear<B>,
    pub(crate) up: Linear<B>,
    pub(crate) down: Linear<B>,
}

/// What the backward pass needs of the forward pass, the down projection's `u` apart.
pub struct MlpTrace<B: Backend> {
    gate: Projected<B>,
    up: Projected<B>,
}

impl<B: Backend> Mlp<B> {
    /// Its projections.
    pub fn linears(&self) -> [&Linear<B>; 3] {
        [&self.gate, &self.up, &self.down]
    }

    /// Bytes a trace of this pass occupies.
    pub fn trace_bytes(&self, pass: &Pass<'_, B>) -> u64 {
        let values = self.gate.outputs() + self.up.outputs();
        (pass.tokens() * values * pass.dtype.size_bytes()) as u64 + pass.hidden_bytes(&[&self.gate, &self.up])
    }

    /// The two wide projections of `x`, activation `[T, C]`.
    ///
    /// # Errors
    /// The backend's own.
    pub fn open(&self, pass: &Pass<'_, B>, x: &Tensor<B>) -> Result<MlpTrace<B>> {
        Ok(MlpTrace {
            gate: self.gate.forward(pass, x)?,
            up: self.up.forward(pass, x)?,
        })
    }

    /// The way back to the model's width: what [`Mlp::close_into`] adds.
    ///
    /// # Errors
    /// The backend's own.
    pub fn close(&self, pass: &Pass<'_, B>, trace: &MlpTrace<B>) -> Result<Projected<B>> {
        let activated = activated(pass, trace)?;
        self.down.forward(pass, &activated)
    }

    /// Adds the output to the residual stream, activation `[T, C]`, and gives the down projection's `u`. A recomputing backward
    /// pass leaves this out: nobody reads its output there, and its `u` was kept.
    ///
    /// # Errors
    /// The backend's own.
    pub fn close_into(
        &self,
        pass: &Pass<'_, B>,
        trace: &MlpTrace<B>,
        residual: &mut Tensor<B>,
    ) -> Result<Option<Tensor<B>>> {
        let closed = self.close(pass, trace)?;
        pass.device.add_assign(residual, &closed.y)?;
        Ok(closed.hidden)
    }

    /// Adds the adapters' gradients and overwrites `dx`, where given, with the gradient of `x`. `down_hidden` is the `u` that
    /// [`Mlp::close`] gave.
    ///
    /// # Errors
    /// The backend's own.
    pub fn backward(
        &self,
        pass: &Pass<'_, B>,
        gradients: &mut LoraGradients<B>,
        (trace, down_hidden): (MlpTrace<B>, Option<&Tensor<B>>),
        x: &Tensor<B>,
        dy: &Tensor<B>,
        mut dx: Option<&mut Tensor<B>>,
    ) -> Result<()> {
        let (gate, up) = (trace.gate.y.shape(), trace.up.y.shape());
        let mut dactivated = pass.activation(gate)?;
        {
            let activated = activated(pass, &trace)?;
            let saved = (&activated, down_hidden);
            self.down
                .backward(pass, gradients, saved, dy, Some((&mut dactivated, Write::Overwrite)))?;
        }
        let (mut dgate, mut dup) = (pass.activation(gate)?, pass.activation(up)?);
        pass.device
            .swiglu_backward(&trace.gate.y, &trace.up.y, &dactivated, &mut dgate, &mut dup)?;
        drop((trace.gate.y, trace.up.y, dactivated));
        let parts = [
            (&self.gate, trace.gate.hidden, dgate, Write::Overwrite),
            (&self.up, trace.up.hidden, dup, Write::Accumulate),
        ];
        for (linear, hidden, gradient, write) in parts {
            let dx = dx.as_deref_mut().map(|dx| (dx, write));
            linear.backward(pass, gradients, (x, hidden.as_ref()), &gradient, dx)?;
        }
        Ok(())
    }
}

/// `silu(gate) ⊙ up`, recomputed where it is needed: it is as large as either factor and costs no product.
fn activated<B: Backend>(pass: &Pass<'_, B>, trace: &MlpTrace<B>) -> Result<Tensor<B>> {
    let mut y = pass.activation(trace.gate.y.shape())?;
    pass.device.swiglu_forward(&trace.gate.y, &trace.up.y, &mut y)?;
    Ok(y)
}
