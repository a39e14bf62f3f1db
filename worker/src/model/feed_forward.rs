//! What works on each position by itself: a dense MLP or a mixture of experts, behind one interface.

use brightrun_kernels::{Backend, Tensor};

use crate::error::Result;
use crate::model::lora::{LoraGradients, ModuleId};
use crate::model::mixer::foreign;
use crate::model::mlp::{Mlp, MlpTrace};
use crate::model::moe::{Moe, MoeTrace};
use crate::model::pass::Pass;

/// What works on each position by itself.
#[derive(Debug)]
pub enum FeedForward<B: Backend> {
    /// A dense SwiGLU MLP.
    Mlp(Box<Mlp<B>>),
    /// A mixture of experts.
    Moe(Box<Moe<B>>),
}

/// What an opened feed-forward part is for, which decides what is written down of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Its output alone.
    Output,
    /// Its output, and later a backward pass.
    Both,
    /// A backward pass alone: the output was made long ago, and the last projection is not computed again.
    Backward,
}

impl Purpose {
    /// Whether the last projection follows.
    pub fn closes(self) -> bool {
        self != Self::Backward
    }

    /// Whether a backward pass follows.
    pub fn keeps(self) -> bool {
        self != Self::Output
    }
}

/// A feed-forward part's trace, the last projection's `u` apart.
pub enum FeedForwardTrace<B: Backend> {
    /// Of [`FeedForward::Mlp`].
    Mlp(MlpTrace<B>),
    /// Of [`FeedForward::Moe`].
    Moe(Box<MoeTrace<B>>),
}

impl<B: Backend> FeedForward<B> {
    /// All modules that may carry an adapter.
    pub fn modules(&self) -> Vec<ModuleId> {
        match self {
            Self::Mlp(mlp) => mlp.linears().map(|linear| linear.module).to_vec(),
            Self::Moe(moe) => moe.modules(),
        }
    }

    /// Bytes a trace of this pass occupies.
    pub fn trace_bytes(&self, pass: &Pass<'_, B>) -> u64 {
        match self {
            Self::Mlp(mlp) => mlp.trace_bytes(pass),
            Self::Moe(moe) => moe.trace_bytes(pass),
        }
    }

    /// Everything up to the last projection of `x`, activation `[T, C]`.
    ///
    /// # Errors
    /// The backend's own.
    pub fn open(&self, pass: &Pass<'_, B>, x: &Tensor<B>, purpose: Purpose) -> Result<FeedForwardTrace<B>> {
        Ok(match self {
            Self::Mlp(mlp) => FeedForwardTrace::Mlp(mlp.open(pass, x)?),
            Self::Moe(moe) => FeedForwardTrace::Moe(Box::new(moe.open(pass, x, purpose)?)),
        })
    }

    /// The last projection, added to the residual stream, activation `[T, C]`; gives its `u`. A recomputing backward pass leaves
    /// this out: nobody reads its output there, and its `u` was kept.
    ///
    /// # Errors
    /// The backend's own.
    pub fn close(
        &self,
        pass: &Pass<'_, B>,
        trace: &mut FeedForwardTrace<B>,
        residual: &mut Tensor<B>,
    ) -> Result<Option<Tensor<B>>> {
        match (self, trace) {
            (Self::Mlp(mlp), FeedForwardTrace::Mlp(trace)) => mlp.close_into(pass, trace, residual),
            (Self::Moe(moe), FeedForwardTrace::Moe(trace)) => moe.close(pass, trace, residual),
            _ => Err(foreign("trace")),
        }
    }

    /// Adds the adapters' gradients and overwrites `dx`, where given, with the gradient of `x`. `down_hidden` is the `u` that
    /// [`FeedForward::close`] gave.
    ///
    /// # Errors
    /// The backend's own.
    pub fn backward(
        &self,
        pass: &Pass<'_, B>,
        gradients: &mut LoraGradients<B>,
        (trace, down_hidden): (FeedForwardTrace<B>, Option<&Tensor<B>>),
        x: &Tensor<B>,
        dy: &Tensor<B>,
        dx: Option<&mut Tensor<B>>,
    ) -> Result<()> {
        match (self, trace) {
            (Self::Mlp(mlp), FeedForwardTrace::Mlp(trace)) => {
                mlp.backward(pass, gradients, (trace, down_hidden), x, dy, dx)
            }
            (Self::Moe(moe), FeedForwardTrace::Moe(trace)) => {
                moe.backward(pass, gradients, (*trace, down_hidden), x, dy, dx)
            }
            _ => Err(foreign("trace")),
        }
    }
}
