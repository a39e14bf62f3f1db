//! A mixture of experts in place of an MLP: router, routed experts, and in some families an expert that every token visits.
//!
//! ```text
//! w, e = top-k of softmax(x·Wrᵀ), renormalised where the family does
//! y    = Σ_j w_j · expert_{e_j}(x)  +  σ(x·Wsᵀ) · shared(x)
//! ```
//!
//! The router is frozen, but the gradient of its weights flows through it to `x`. There is no auxiliary loss: balancing experts
//! is for pretraining, and a frozen router could not follow it.

use brightrun_kernels::ops::{
    CombineResidual, LinearBackward, LinearForward, RouteBackward, Routing, SigmoidGateBackward, Write,
};
use brightrun_kernels::{Backend, DType, Tensor, Weight};

use crate::error::Result;
use crate::model::experts::{Experts, Wide};
use crate::model::feed_forward::Purpose;
use crate::model::linear::{Linear, Projected};
use crate::model::lora::{LoraGradients, ModuleId};
use crate::model::mlp::{Mlp, MlpTrace};
use crate::model::pass::Pass;

/// One layer's mixture of experts.
#[derive(Debug)]
pub struct Moe<B: Backend> {
    /// Frozen `[E, C]`.
    pub(crate) router: Weight<B>,
    pub(crate) experts: Experts<B>,
    /// `k`.
    pub(crate) top: usize,
    pub(crate) renormalise: bool,
    pub(crate) shared: Option<SharedExpert<B>>,
}

/// The expert that every token visits.
#[derive(Debug)]
pub struct SharedExpert<B: Backend> {
    pub(crate) mlp: Mlp<B>,
    /// `[1, C]`.
    pub(crate) gate: Linear<B>,
}

/// What the backward pass needs of the forward pass, the routed experts' last `u` apart.
pub struct MoeTrace<B: Backend> {
    /// f32 `[T, E]`.
    logits: Tensor<B>,
    routing: Routing<B>,
    wide: Wide<B>,
    shared: Option<SharedTrace<B>>,
}

struct SharedTrace<B: Backend> {
    mlp: MlpTrace<B>,
    /// Its output before the gate, and the last `u`.
    closed: Projected<B>,
    /// Activation `[T, 1]`.
    gate: Projected<B>,
}

impl<B: Backend> Moe<B> {
    /// All modules that may carry an adapter.
    pub fn modules(&self) -> Vec<ModuleId> {
        let mut modules = vec![self.experts.gate_up_module, self.experts.down_module];
        if let Some(shared) = &self.shared {
            modules.extend(shared.linears().map(|linear| linear.module));
        }
        modules
    }

    /// Bytes a trace of this pass occupies.
    pub fn trace_bytes(&self, pass: &Pass<'_, B>) -> u64 {
        let (tokens, experts) = (pass.tokens(), self.experts.count());
        let rows = tokens * self.top;
        let routing = 4 * (tokens * experts + 4 * rows + experts + 1);
        let shared = match &self.shared {
            None => 0,
            Some(shared) => {
                let outputs = tokens * (shared.mlp.down.outputs() + 1) * pass.dtype.size_bytes();
                let hidden = pass.hidden_bytes(&[&shared.mlp.down, &shared.gate]);
                shared.mlp.trace_bytes(pass) + hidden + outputs as u64
            }
        };
        self.experts.wide_bytes(pass, rows) + shared + routing as u64
    }

    /// Routes `x`, activation `[T, C]`, and computes everything but the routed experts' last projection.
    ///
    /// # Errors
    /// The backend's own.
    pub fn open(&self, pass: &Pass<'_, B>, x: &Tensor<B>, purpose: Purpose) -> Result<MoeTrace<B>> {
        let logits = self.logits(pass, x)?;
        let mut routing = Routing::alloc(pass.device, pass.tokens(), self.experts.count(), self.top)?;
        pass.device.route(&logits, self.renormalise, &mut routing)?;
        if let Some(loads) = pass.loads {
            loads.add(pass.device, &routing)?;
        }
        let shared = match &self.shared {
            Some(shared) => Some(shared.forward(pass, x)?),
            None => None,
        };
        Ok(MoeTrace {
            wide: self.experts.open(pass, x, &routing, purpose)?,
            logits,
            routing,
            shared,
        })
    }

    fn logits(&self, pass: &Pass<'_, B>, x: &Tensor<B>) -> Result<Tensor<B>> {
        let mut y = pass.activation([pass.tokens(), self.experts.count()])?;
        pass.device.linear_forward(LinearForward {
            x,
            weight: &self.router,
            bias: None,
            lora: None,
            precision: pass.precision,
            y: &mut y,
        })?;
        pass.converted(y, DType::F32)
    }

    /// Adds the output to the residual stream, activation `[T, C]`, and gives the routed experts' last `u`.
    ///
    /// # Errors
    /// The backend's own.
    pub fn close(
        &self,
        pass: &Pass<'_, B>,
        trace: &mut MoeTrace<B>,
        residual: &mut Tensor<B>,
    ) -> Result<Option<Tensor<B>>> {
        let (grouped, hidden) = self.experts.close(pass, &mut trace.wide, &trace.routing)?;
        pass.device.combine_residual(CombineResidual {
            grouped: &grouped,
            routing: &trace.routing,
            shared: trace.shared.as_ref().map(|shared| (&shared.closed.y, &shared.gate.y)),
            x: residual,
        })?;
        Ok(hidden)
    }

    /// Adds the adapters' gradients and overwrites `dx`, where given, with the gradient of `x`. `down_hidden` is the `u` that
    /// [`Moe::close`] gave.
    ///
    /// # Errors
    /// The backend's own.
    pub fn backward(
        &self,
        pass: &Pass<'_, B>,
        gradients: &mut LoraGradients<B>,
        (trace, down_hidden): (MoeTrace<B>, Option<&Tensor<B>>),
        x: &Tensor<B>,
        dy: &Tensor<B>,
        mut dx: Option<&mut Tensor<B>>,
    ) -> Result<()> {
        let mut write = Write::Overwrite;
        if let (Some(shared), Some(trace)) = (&self.shared, trace.shared) {
            shared.backward(pass, gradients, trace, x, dy, dx.as_deref_mut())?;
            write = Write::Accumulate;
        }
        let saved = (trace.wide, down_hidden);
        let flows = self
            .experts
            .backward(pass, gradients, saved, &trace.routing, x, dy, dx.is_some())?;
        let (Some(flows), Some(dx)) = (flows, dx) else {
            return Ok(());
        };
        pass.device.combine(&flows.rows, &trace.routing, dx, write)?;
        drop(flows.rows);
        self.router_backward(pass, &trace.logits, &trace.routing, &flows.weights, dx)
    }

    /// Adds to `dx` what flows through the routing weights.
    fn router_backward(
        &self,
        pass: &Pass<'_, B>,
        logits: &Tensor<B>,
        routing: &Routing<B>,
        dweights: &Tensor<B>,
        dx: &mut Tensor<B>,
    ) -> Result<()> {
        let mut dlogits = pass.device.alloc(DType::F32, logits.shape())?;
        pass.device.route_backward(RouteBackward {
            logits,
            routing,
            renormalise: self.renormalise,
            dweights,
            dlogits: &mut dlogits,
        })?;
        pass.device.linear_backward(LinearBackward {
            dy: &pass.converted(dlogits, pass.dtype)?,
            weight: &self.router,
            lora: None,
            precision: pass.precision,
            dx: Some((dx, Write::Accumulate)),
        })?;
        Ok(())
    }
}

impl<B: Backend> SharedExpert<B> {
    fn linears(&self) -> [&Linear<B>; 4] {
        let [gate, up, down] = self.mlp.linears();
        [gate, up, down, &self.gate]
    }

    fn forward(&self, pass: &Pass<'_, B>, x: &Tensor<B>) -> Result<SharedTrace<B>> {
        let mlp = self.mlp.open(pass, x)?;
        Ok(SharedTrace {
            closed: self.mlp.close(pass, &mlp)?,
            mlp,
            gate: self.gate.forward(pass, x)?,
        })
    }

    fn backward(
        &self,
        pass: &Pass<'_, B>,
        gradients: &mut LoraGradients<B>,
        trace: SharedTrace<B>,
        x: &Tensor<B>,
        dy: &Tensor<B>,
        mut dx: Option<&mut Tensor<B>>,
    ) -> Result<()> {
        let SharedTrace { mlp, closed, gate } = trace;
        let mut doutput = pass.activation(closed.y.shape())?;
        let mut dgate = pass.activation(gate.y.shape())?;
        pass.device.sigmoid_gate_backward(SigmoidGateBackward {
            x: &closed.y,
            gate: &gate.y,
            dy,
            dx: &mut doutput,
            dgate: &mut dgate,
        })?;
        drop(closed.y);
        let saved = (mlp, closed.hidden.as_ref());
        self.mlp
            .backward(pass, gradients, saved, x, &doutput, dx.as_deref_mut())?;
        let saved = (x, gate.hidden.as_ref());
        let dx = dx.map(|dx| (dx, Write::Accumulate));
        self.gate.backward(pass, gradients, saved, &dgate, dx)
    }
}
