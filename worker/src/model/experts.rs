//! The routed experts of a layer: three frozen stacks of matrices, and adapters as PEFT has them, one for gate and up together
//! and one for down.
//!
//! The adapter of gate and up is one pair: A is shared, B `[E, 2·F, R]` is the gate's rows over the up projection's.
//!
//! Gate and up go through one op with the activation behind them, and one on the way back, so that a backend may keep what
//! nobody asks for from ever being written.

use brightrun_kernels::ops::{
    GroupedLinearBackward, GroupedLinearForward, GroupedLoraBackward, GroupedLoraForward, GroupedPairBackward,
    GroupedSwigluForward, RoutedSwigluBackward, Routing, RowOrder, Write,
};
use brightrun_kernels::{Backend, DType, Tensor, WeightStack};

use crate::error::Result;
use crate::model::feed_forward::Purpose;
use crate::model::linear::foreign_trace;
use crate::model::lora::{LoraGradients, LoraPair, LoraSet, ModuleId};
use crate::model::mixer::foreign;
use crate::model::pass::Pass;

/// The routed experts of a layer.
#[derive(Debug)]
pub struct Experts<B: Backend> {
    /// `[E, F, C]`.
    pub(crate) gate: WeightStack<B>,
    /// `[E, F, C]`.
    pub(crate) up: WeightStack<B>,
    /// `[E, C, F]`.
    pub(crate) down: WeightStack<B>,
    pub(crate) gate_up_module: ModuleId,
    pub(crate) down_module: ModuleId,
}

/// The wide projections of grouped rows.
pub struct Wide<B: Backend> {
    /// Gate and up, activations `[M, F]`, where a backward pass needs them.
    kept: Option<(Tensor<B>, Tensor<B>)>,
    /// `w · silu(gate) · up`, activation `[M, F]`, until the down projection has taken it.
    activated: Option<Tensor<B>>,
    /// `u` of the adapter that gate and up share, f32 `[M, R]`.
    hidden: Option<Tensor<B>>,
}

/// What the experts' backward pass gives.
pub struct ExpertGradients<B: Backend> {
    /// Gradient of the grouped rows' inputs, activation `[M, C]`.
    pub rows: Tensor<B>,
    /// Gradient of the routing weights, f32 `[T, k]`.
    pub weights: Tensor<B>,
}

impl<B: Backend> Experts<B> {
    /// `E`.
    pub fn count(&self) -> usize {
        self.gate.extents().0
    }

    /// `F`.
    pub fn width(&self) -> usize {
        self.gate.extents().1
    }

    /// `C`.
    fn hidden(&self) -> usize {
        self.gate.extents().2
    }

    /// Bytes of a [`Wide`] that a backward pass keeps, for `rows` grouped rows.
    pub fn wide_bytes(&self, pass: &Pass<'_, B>, rows: usize) -> u64 {
        let rank = match self.adapter(pass, self.gate_up_module) {
            Some((lora, _)) => lora.config().rank,
            None => 0,
        };
        (rows * (2 * self.width() * pass.dtype.size_bytes() + rank * DType::F32.size_bytes())) as u64
    }

    fn adapter<'a>(&self, pass: &Pass<'a, B>, module: ModuleId) -> Option<(&'a LoraSet<B>, &'a LoraPair<B>)> {
        pass.lora.and_then(|lora| Some((lora, lora.pair(module)?)))
    }

    /// Gate and up of every token for each of its experts, and what `purpose` asks for; `x` is an activation `[T, C]`.
    ///
    /// # Errors
    /// The backend's own.
    pub fn open(&self, pass: &Pass<'_, B>, x: &Tensor<B>, routing: &Routing<B>, purpose: Purpose) -> Result<Wide<B>> {
        let shape = [routing.slots.shape().elements(), self.width()];
        let mut wide = Wide {
            kept: match purpose.keeps() {
                true => Some((pass.activation(shape)?, pass.activation(shape)?)),
                false => None,
            },
            activated: match purpose.closes() {
                true => Some(pass.activation(shape)?),
                false => None,
            },
            hidden: self.hidden_of(pass, self.gate_up_module, shape[0])?,
        };
        pass.device.grouped_swiglu_forward(GroupedSwigluForward {
            x,
            routing,
            gate: &self.gate,
            up: &self.up,
            lora: self.forward_adapter(pass, self.gate_up_module, wide.hidden.as_mut()),
            precision: pass.precision,
            wide: wide.kept.as_mut().map(|(gate, up)| (gate, up)),
            y: wide.activated.as_mut(),
        })?;
        Ok(wide)
    }

    /// Room for the `u` of a module's adapter, if it has one.
    fn hidden_of(&self, pass: &Pass<'_, B>, module: ModuleId, rows: usize) -> Result<Option<Tensor<B>>> {
        Ok(match self.adapter(pass, module) {
            Some((lora, _)) => Some(pass.device.alloc(DType::F32, [rows, lora.config().rank])?),
            None => None,
        })
    }

    fn forward_adapter<'a>(
        &self,
        pass: &Pass<'a, B>,
        module: ModuleId,
        hidden: Option<&'a mut Tensor<B>>,
    ) -> Option<GroupedLoraForward<'a, B>> {
        let ((lora, pair), hidden) = self.adapter(pass, module).zip(hidden)?;
        Some(GroupedLoraForward {
            a: &pair.a,
            b: &pair.b,
            scale: lora.config().scale(),
            hidden,
        })
    }

    /// What each token's experts give it, a grouped row each, activation `[M, C]`, and `u` of the down projection. Takes the
    /// activation out of `wide`.
    ///
    /// # Errors
    /// The backend's own.
    pub fn close(
        &self,
        pass: &Pass<'_, B>,
        wide: &mut Wide<B>,
        routing: &Routing<B>,
    ) -> Result<(Tensor<B>, Option<Tensor<B>>)> {
        let activated = match wide.activated.take() {
            Some(activated) => activated,
            None => self.activated(pass, wide, routing)?,
        };
        let rows = routing.slots.shape().elements();
        let mut hidden = self.hidden_of(pass, self.down_module, rows)?;
        let mut grouped = pass.activation([rows, self.hidden()])?;
        pass.device.grouped_linear_forward(GroupedLinearForward {
            x: &activated,
            x_order: RowOrder::Grouped,
            routing,
            weight: &self.down,
            lora: self.forward_adapter(pass, self.down_module, hidden.as_mut()),
            precision: pass.precision,
            y: &mut grouped,
        })?;
        Ok((grouped, hidden))
    }

    /// `w · silu(gate) · up`, recomputed where it is needed.
    fn activated(&self, pass: &Pass<'_, B>, wide: &Wide<B>, routing: &Routing<B>) -> Result<Tensor<B>> {
        let (gate, up) = wide.kept.as_ref().ok_or_else(|| foreign("trace"))?;
        let mut y = pass.activation(gate.shape())?;
        pass.device.routed_swiglu_forward(gate, up, routing, &mut y)?;
        Ok(y)
    }

    /// Adds the adapters' gradients; with `inputs_matter` also gives what flows on to the input and to the routing weights.
    /// `x` and `dy` are activations `[T, C]`, `down_hidden` is [`Experts::close`]'s `u`.
    ///
    /// # Errors
    /// The backend's own.
    #[allow(clippy::too_many_arguments)] // What a backward pass is made of.
    pub fn backward(
        &self,
        pass: &Pass<'_, B>,
        gradients: &mut LoraGradients<B>,
        (wide, down_hidden): (Wide<B>, Option<&Tensor<B>>),
        routing: &Routing<B>,
        x: &Tensor<B>,
        dy: &Tensor<B>,
        inputs_matter: bool,
    ) -> Result<Option<ExpertGradients<B>>> {
        let shape = [routing.slots.shape().elements(), self.width()];
        let wide_matters = inputs_matter || self.adapter(pass, self.gate_up_module).is_some();
        let mut dactivated = match wide_matters {
            true => Some(pass.activation(shape)?),
            false => None,
        };
        self.down_backward(pass, gradients, (&wide, down_hidden), routing, dy, dactivated.as_mut())?;
        let Some(dactivated) = dactivated else {
            return Ok(None);
        };
        let Wide { kept, hidden, .. } = wide;
        let (gate, up) = kept.ok_or_else(|| foreign("trace"))?;
        let (mut dgate, mut dup) = (pass.activation(shape)?, pass.activation(shape)?);
        let mut weights = pass.device.alloc(DType::F32, routing.weights.shape())?;
        pass.device.routed_swiglu_backward(RoutedSwigluBackward {
            gate: &gate,
            up: &up,
            routing,
            dy: &dactivated,
            dgate: &mut dgate,
            dup: &mut dup,
            dweights: &mut weights,
        })?;
        drop((dactivated, gate, up));
        let mut rows = match inputs_matter {
            true => Some(pass.activation([shape[0], self.hidden()])?),
            false => None,
        };
        let lora = match self.adapter(pass, self.gate_up_module) {
            Some((lora, pair)) => {
                let (hidden, (gradient_a, gradient_b)) = hidden
                    .as_ref()
                    .zip(gradients.of(lora, self.gate_up_module))
                    .ok_or_else(|| foreign_trace(&pair.path))?;
                Some(GroupedLoraBackward {
                    x,
                    x_order: RowOrder::Token,
                    a: &pair.a,
                    b: &pair.b,
                    scale: lora.config().scale(),
                    hidden,
                    gradient_a,
                    gradient_b,
                })
            }
            None => None,
        };
        pass.device.grouped_pair_backward(GroupedPairBackward {
            dgate: &dgate,
            dup: &dup,
            routing,
            gate: &self.gate,
            up: &self.up,
            lora,
            precision: pass.precision,
            dx: rows.as_mut(),
        })?;
        Ok(rows.map(|rows| ExpertGradients { rows, weights }))
    }

    fn down_backward(
        &self,
        pass: &Pass<'_, B>,
        gradients: &mut LoraGradients<B>,
        (wide, hidden): (&Wide<B>, Option<&Tensor<B>>),
        routing: &Routing<B>,
        dy: &Tensor<B>,
        dactivated: Option<&mut Tensor<B>>,
    ) -> Result<()> {
        let adapter = self.adapter(pass, self.down_module);
        let activated = match adapter {
            Some(_) => Some(self.activated(pass, wide, routing)?),
            None => None,
        };
        let lora = match (adapter, &activated) {
            (Some((lora, pair)), Some(activated)) => {
                let (hidden, (gradient_a, gradient_b)) = hidden
                    .zip(gradients.of(lora, self.down_module))
                    .ok_or_else(|| foreign_trace(&pair.path))?;
                Some(GroupedLoraBackward {
                    x: activated,
                    x_order: RowOrder::Grouped,
                    a: &pair.a,
                    b: &pair.b,
                    scale: lora.config().scale(),
                    hidden,
                    gradient_a,
                    gradient_b,
                })
            }
            _ => None,
        };
        if lora.is_none() && dactivated.is_none() {
            return Ok(());
        }
        pass.device.grouped_linear_backward(GroupedLinearBackward {
            dy,
            dy_order: RowOrder::Token,
            routing,
            weight: &self.down,
            lora,
            precision: pass.precision,
            dx: dactivated.map(|dx| (dx, Write::Overwrite)),
        })?;
        Ok(())
    }
}
