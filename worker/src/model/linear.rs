//! A frozen projection that may carry an adapter.

use brightrun_kernels::ops::{LinearBackward, LinearForward, LoraBackward, LoraForward, Write};
use brightrun_kernels::{Backend, DType, Tensor, Weight};

use crate::error::{Failure, Result};
use crate::model::lora::{LoraGradients, ModuleId};
use crate::model::pass::Pass;

/// `y = x · Wᵀ + bias`, plus the adapter of its module when the pass has one.
#[derive(Debug)]
pub struct Linear<B: Backend> {
    pub(crate) module: ModuleId,
    pub(crate) weight: Weight<B>,
    pub(crate) bias: Option<Tensor<B>>,
}

/// What a projection gives: its output and, if adapted, `u = x · Aᵀ` for the backward pass.
pub struct Projected<B: Backend> {
    /// Activation `[T, O]`.
    pub y: Tensor<B>,
    /// f32 `[T, R]`.
    pub hidden: Option<Tensor<B>>,
}

impl<B: Backend> Linear<B> {
    /// `O`.
    pub fn outputs(&self) -> usize {
        self.weight.extents().0
    }

    /// `I`.
    pub fn inputs(&self) -> usize {
        self.weight.extents().1
    }

    /// Bytes of the weight and the bias.
    pub fn size_bytes(&self) -> u64 {
        (self.weight.size_bytes() + self.bias.as_ref().map_or(0, Tensor::size_bytes)) as u64
    }

    /// Whether the pass has an adapter for this module.
    pub fn is_adapted(&self, pass: &Pass<'_, B>) -> bool {
        pass.lora.is_some_and(|lora| lora.adapts(self.module))
    }

    /// Projects `x`, activation `[T, I]`.
    ///
    /// # Errors
    /// The backend's own.
    pub fn forward(&self, pass: &Pass<'_, B>, x: &Tensor<B>) -> Result<Projected<B>> {
        let device = pass.device;
        let rows = x.shape().rows();
        let mut y = pass.activation([rows, self.outputs()])?;
        let adapter = pass
            .lora
            .and_then(|lora| Some((lora.pair(self.module)?, lora.config())));
        let mut hidden = match adapter {
            Some((_, config)) => Some(device.alloc(DType::F32, [rows, config.rank])?),
            None => None,
        };
        let lora = match (adapter, hidden.as_mut()) {
            (Some((pair, config)), Some(hidden)) => Some(LoraForward {
                a: &pair.a,
                b: &pair.b,
                scale: config.scale(),
                hidden,
            }),
            _ => None,
        };
        device.linear_forward(LinearForward {
            x,
            weight: &self.weight,
            bias: self.bias.as_ref(),
            lora,
            precision: pass.precision,
            y: &mut y,
        })?;
        Ok(Projected { y, hidden })
    }

    /// Adds this module's dA and dB to `gradients` and writes the gradient of the input where `dx` asks for it. `x` and
    /// `hidden` are the forward pass's.
    ///
    /// # Errors
    /// The backend's own.
    pub fn backward(
        &self,
        pass: &Pass<'_, B>,
        gradients: &mut LoraGradients<B>,
        saved: (&Tensor<B>, Option<&Tensor<B>>),
        dy: &Tensor<B>,
        dx: Option<(&mut Tensor<B>, Write)>,
    ) -> Result<()> {
        let (x, hidden) = saved;
        let adapter = match pass.lora.and_then(|lora| Some((lora, lora.pair(self.module)?))) {
            None => None,
            Some((lora, pair)) => {
                let (hidden, (gradient_a, gradient_b)) = hidden
                    .zip(gradients.of(lora, self.module))
                    .ok_or_else(|| foreign_trace(&pair.path))?;
                Some(LoraBackward {
                    x,
                    a: &pair.a,
                    b: &pair.b,
                    scale: lora.config().scale(),
                    hidden,
                    gradient_a,
                    gradient_b,
                })
            }
        };
        if adapter.is_none() && dx.is_none() {
            return Ok(());
        }
        pass.device.linear_backward(LinearBackward {
            dy,
            weight: &self.weight,
            lora: adapter,
            precision: pass.precision,
            dx,
        })?;
        Ok(())
    }
}

/// The trace or the gradients were made with another adapter than the pass has.
pub(crate) fn foreign_trace(path: &str) -> Failure {
    Failure::system(
        "INTERNAL_TRACE",
        format!("The backward pass of `{path}` got another adapter's trace or gradients"),
    )
}
