//! A frozen RMS norm.

use brightrun_kernels::ops::{AddNormForward, NormBackward, NormForward, NormWeight, Write};
use brightrun_kernels::{Backend, DType, Tensor};

use crate::error::Result;
use crate::model::pass::Pass;

/// An RMS norm over the innermost extent.
#[derive(Debug)]
pub struct Norm<B: Backend> {
    pub(crate) weight: Tensor<B>,
    pub(crate) style: NormWeight,
    pub(crate) eps: f32,
}

/// A normalised tensor and what its backward pass needs.
pub struct Normed<B: Backend> {
    /// Activation, shaped as the input.
    pub y: Tensor<B>,
    /// f32 `[N]`.
    pub rstd: Tensor<B>,
}

impl<B: Backend> Norm<B> {
    /// Normalises `x`.
    ///
    /// # Errors
    /// The backend's own.
    pub fn forward(&self, pass: &Pass<'_, B>, x: &Tensor<B>) -> Result<Normed<B>> {
        let mut y = pass.activation(x.shape())?;
        let mut rstd = pass.device.alloc(DType::F32, [x.shape().rows()])?;
        pass.device.rms_norm_forward(NormForward {
            x,
            weight: &self.weight,
            style: self.style,
            eps: self.eps,
            y: &mut y,
            rstd: &mut rstd,
        })?;
        Ok(Normed { y, rstd })
    }

    /// Adds `added` to the residual stream `x`, and normalises the sum.
    ///
    /// # Errors
    /// The backend's own.
    pub fn forward_adding(&self, pass: &Pass<'_, B>, x: &mut Tensor<B>, added: &Tensor<B>) -> Result<Normed<B>> {
        let mut y = pass.activation(x.shape())?;
        let mut rstd = pass.device.alloc(DType::F32, [x.shape().rows()])?;
        pass.device.add_rms_norm_forward(AddNormForward {
            x,
            added,
            weight: &self.weight,
            style: self.style,
            eps: self.eps,
            y: &mut y,
            rstd: &mut rstd,
        })?;
        Ok(Normed { y, rstd })
    }

    /// Writes or adds the gradient of the input, from the forward input `x` and its `rstd`.
    ///
    /// # Errors
    /// The backend's own.
    pub fn backward(
        &self,
        pass: &Pass<'_, B>,
        (x, rstd): (&Tensor<B>, &Tensor<B>),
        dy: &Tensor<B>,
        dx: (&mut Tensor<B>, Write),
    ) -> Result<()> {
        pass.device.rms_norm_backward(NormBackward {
            x,
            weight: &self.weight,
            style: self.style,
            rstd,
            dy,
            dx,
        })?;
        Ok(())
    }
}
