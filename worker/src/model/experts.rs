//! The routed experts of a layer: three frozen stacks of matrices, and adapters as PEFT has them, one for gate and up together
//! and one for down.
//!
//! The adapter of gate and up is one pair: A is shared, B `[E, 2·F, R]` is the gate's rows over the up projection's. The ops want
//! the halves apart, so they are copied out before they are used, and gradients are copied back: a layer's B is thousands of
//! times smaller than its experts.

use brightrun_kernels::ops::{
    Columns, GroupedLinearBackward, GroupedLinearForward, GroupedLoraBackward, GroupedLoraForward,
    RoutedSwigluBackward, Routing, RowOrder, Write,
};
use brightrun_kernels::{Backend, DType, Tensor, WeightStack};

use crate::error::Result;
use crate::model::attention::reversed;
use crate::model::linear::{Projected, foreign_trace};
use crate::model::lora::{LoraGradients, LoraPair, LoraSet, ModuleId};
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
    /// Activation `[M, F]`.
    gate: Tensor<B>,
    /// Activation `[M, F]`.
    up: Tensor<B>,
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

    /// Bytes of [`Wide`] for `rows` grouped rows.
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

    /// Gate and up of every token for each of its experts; `x` is an activation `[T, C]`.
    ///
    /// # Errors
    /// The backend's own.
    pub fn open(&self, pass: &Pass<'_, B>, x: &Tensor<B>, routing: &Routing<B>) -> Result<Wide<B>> {
        let rows = routing.slots.shape().elements();
        let adapter = self.adapter(pass, self.gate_up_module);
        let mut hidden = match adapter {
            Some((lora, _)) => Some(pass.device.alloc(DType::F32, [rows, lora.config().rank])?),
            None => None,
        };
        let mut project = |weight: &WeightStack<B>, half: usize| -> Result<Tensor<B>> {
            let mut y = pass.activation([rows, self.width()])?;
            let b = match adapter {
                Some((_, pair)) => Some(self.half(pass, &pair.b, half)?),
                None => None,
            };
            // Both halves write the same `u`.
            let lora = match (adapter, &b, hidden.as_mut()) {
                (Some((lora, pair)), Some(b), Some(hidden)) => Some(GroupedLoraForward {
                    a: &pair.a,
                    b,
                    scale: lora.config().scale(),
                    hidden,
                }),
                _ => None,
            };
            pass.device.grouped_linear_forward(GroupedLinearForward {
                x,
                x_order: RowOrder::Token,
                routing,
                weight,
                lora,
                precision: pass.precision,
                y: &mut y,
            })?;
            Ok(y)
        };
        Ok(Wide {
            gate: project(&self.gate, 0)?,
            up: project(&self.up, 1)?,
            hidden,
        })
    }

    /// The weighted sum of each token's experts, activation `[T, C]`, and `u` of the down projection.
    ///
    /// # Errors
    /// The backend's own.
    pub fn close(&self, pass: &Pass<'_, B>, wide: &Wide<B>, routing: &Routing<B>) -> Result<Projected<B>> {
        let activated = self.activated(pass, wide, routing)?;
        let rows = routing.slots.shape().elements();
        let adapter = self.adapter(pass, self.down_module);
        let mut hidden = match adapter {
            Some((lora, _)) => Some(pass.device.alloc(DType::F32, [rows, lora.config().rank])?),
            None => None,
        };
        let lora = match (adapter, hidden.as_mut()) {
            (Some((lora, pair)), Some(hidden)) => Some(GroupedLoraForward {
                a: &pair.a,
                b: &pair.b,
                scale: lora.config().scale(),
                hidden,
            }),
            _ => None,
        };
        let mut grouped = pass.activation([rows, self.hidden()])?;
        pass.device.grouped_linear_forward(GroupedLinearForward {
            x: &activated,
            x_order: RowOrder::Grouped,
            routing,
            weight: &self.down,
            lora,
            precision: pass.precision,
            y: &mut grouped,
        })?;
        drop(activated);
        let mut y = pass.activation([pass.tokens(), self.hidden()])?;
        pass.device.combine(&grouped, routing, &mut y, Write::Overwrite)?;
        Ok(Projected { y, hidden })
    }

    /// `w · silu(gate) · up`, recomputed where it is needed.
    fn activated(&self, pass: &Pass<'_, B>, wide: &Wide<B>, routing: &Routing<B>) -> Result<Tensor<B>> {
        let mut y = pass.activation(wide.gate.shape())?;
        pass.device
            .routed_swiglu_forward(&wide.gate, &wide.up, routing, &mut y)?;
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
        let wide_matters = inputs_matter || self.adapter(pass, self.gate_up_module).is_some();
        let mut dactivated = match wide_matters {
            true => Some(pass.activation(wide.gate.shape())?),
            false => None,
        };
        self.down_backward(pass, gradients, (&wide, down_hidden), routing, dy, dactivated.as_mut())?;
        let Some(dactivated) = dactivated else {
            return Ok(None);
        };
        let (mut dgate, mut dup) = (pass.activation(wide.gate.shape())?, pass.activation(wide.up.shape())?);
        let mut weights = pass.device.alloc(DType::F32, routing.weights.shape())?;
        pass.device.routed_swiglu_backward(RoutedSwigluBackward {
            gate: &wide.gate,
            up: &wide.up,
            routing,
            dy: &dactivated,
            dgate: &mut dgate,
            dup: &mut dup,
            dweights: &mut weights,
        })?;
        drop((dactivated, wide.gate, wide.up));
        let mut rows = match inputs_matter {
            true => Some(pass.activation([routing.slots.shape().elements(), self.hidden()])?),
            false => None,
        };
        let parts = [
            (&self.gate, dgate, Write::Overwrite),
            (&self.up, dup, Write::Accumulate),
        ];
        for (half, (weight, dy, write)) in parts.into_iter().enumerate() {
            let dx = rows.as_mut().map(|rows| (rows, write));
            self.half_backward(
                pass,
                gradients,
                (weight, half),
                (x, wide.hidden.as_ref()),
                routing,
                &dy,
                dx,
            )?;
        }
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

    #[allow(clippy::too_many_arguments)] // What a backward pass is made of.
    fn half_backward(
        &self,
        pass: &Pass<'_, B>,
        gradients: &mut LoraGradients<B>,
        (weight, half): (&WeightStack<B>, usize),
        (x, hidden): (&Tensor<B>, Option<&Tensor<B>>),
        routing: &Routing<B>,
        dy: &Tensor<B>,
        dx: Option<(&mut Tensor<B>, Write)>,
    ) -> Result<()> {
        let mut call = GroupedLinearBackward {
            dy,
            dy_order: RowOrder::Grouped,
            routing,
            weight,
            lora: None,
            precision: pass.precision,
            dx,
        };
        let Some((lora, pair)) = self.adapter(pass, self.gate_up_module) else {
            if call.dx.is_some() {
                pass.device.grouped_linear_backward(call)?;
            }
            return Ok(());
        };
        let (hidden, (gradient_a, whole)) = hidden
            .zip(gradients.of(lora, self.gate_up_module))
            .ok_or_else(|| foreign_trace(&pair.path))?;
        let b = self.half(pass, &pair.b, half)?;
        let mut gradient_b = self.half(pass, whole, half)?;
        call.lora = Some(GroupedLoraBackward {
            x,
            x_order: RowOrder::Token,
            a: &pair.a,
            b: &b,
            scale: lora.config().scale(),
            hidden,
            gradient_a,
            gradient_b: &mut gradient_b,
        });
        pass.device.grouped_linear_backward(call)?;
        let columns = half_columns(gradient_b.shape().elements() / self.count(), half);
        pass.device.copy_columns(&gradient_b, whole, reversed(columns))?;
        Ok(())
    }

    /// The gate's (0) or the up projection's (1) half of `[E, 2·F, R]`, as `[E, F, R]`.
    fn half(&self, pass: &Pass<'_, B>, whole: &Tensor<B>, half: usize) -> Result<Tensor<B>> {
        let rank = whole.shape().row();
        let mut part = pass.device.alloc(DType::F32, [self.count(), self.width(), rank])?;
        let columns = half_columns(self.width() * rank, half);
        pass.device.copy_columns(whole, &mut part, columns)?;
        Ok(part)
    }
}

fn half_columns(width: usize, half: usize) -> Columns {
    Columns {
        groups: 1,
        source: half * width,
        target: 0,
        width,
    }
}
