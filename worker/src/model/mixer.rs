//! What lets the positions of a layer see each other: attention or Gated DeltaNet, behind one interface.

use brightrun_kernels::{Backend, Tensor};

use crate::error::{Failure, Result};
use crate::model::attention::{Attention, AttentionTrace};
use crate::model::cache::KeyValueCache;
use crate::model::delta::{DeltaNet, DeltaState, DeltaTrace};
use crate::model::lora::{LoraGradients, ModuleId};
use crate::model::pass::Pass;

/// What lets positions see each other.
#[derive(Debug)]
pub enum Mixer<B: Backend> {
    /// Causal softmax attention.
    Attention(Attention<B>),
    /// Gated DeltaNet.
    Delta(DeltaNet<B>),
}

/// A mixer's trace.
pub enum MixerTrace<B: Backend> {
    /// Of [`Mixer::Attention`].
    Attention(Box<AttentionTrace<B>>),
    /// Of [`Mixer::Delta`].
    Delta(Box<DeltaTrace<B>>),
}

/// What a mixer remembers of the positions decoded so far.
pub enum MixerState<B: Backend> {
    /// Of [`Mixer::Attention`].
    Attention(KeyValueCache<B>),
    /// Of [`Mixer::Delta`].
    Delta(DeltaState<B>),
}

impl<B: Backend> Mixer<B> {
    /// All modules that may carry an adapter.
    pub fn modules(&self) -> Vec<ModuleId> {
        match self {
            Self::Attention(attention) => attention.linears().map(|linear| linear.module).to_vec(),
            Self::Delta(delta) => delta.linears().map(|linear| linear.module).to_vec(),
        }
    }

    /// Bytes a trace of this pass occupies.
    pub fn trace_bytes(&self, pass: &Pass<'_, B>) -> u64 {
        match self {
            Self::Attention(attention) => attention.trace_bytes(pass),
            Self::Delta(delta) => delta.trace_bytes(pass),
        }
    }

    /// `x` is the normalised layer input, activation `[T, C]`; gives `y` of the same shape and the trace.
    ///
    /// # Errors
    /// The backend's own.
    pub fn forward(&self, pass: &Pass<'_, B>, x: &Tensor<B>) -> Result<(Tensor<B>, MixerTrace<B>)> {
        match self {
            Self::Attention(attention) => {
                let (y, trace) = attention.forward(pass, x)?;
                Ok((y, MixerTrace::Attention(Box::new(trace))))
            }
            Self::Delta(delta) => {
                let (y, trace) = delta.forward(pass, x)?;
                Ok((y, MixerTrace::Delta(Box::new(trace))))
            }
        }
    }

    /// As [`Mixer::forward`] for a pass that keeps nothing.
    ///
    /// # Errors
    /// The backend's own.
    pub fn output(&self, pass: &Pass<'_, B>, x: &Tensor<B>) -> Result<Tensor<B>> {
        match self {
            Self::Attention(attention) => Ok(attention.forward(pass, x)?.0),
            Self::Delta(delta) => delta.output(pass, x),
        }
    }

    /// An empty memory for one document of up to `capacity` positions.
    ///
    /// # Errors
    /// The backend's own.
    pub fn state(&self, device: &B, dtype: brightrun_kernels::DType, capacity: usize) -> Result<MixerState<B>> {
        Ok(match self {
            Self::Attention(attention) => {
                MixerState::Attention(KeyValueCache::new(device, dtype, capacity, attention.key_width())?)
            }
            Self::Delta(delta) => MixerState::Delta(delta.state(device)?),
        })
    }

    /// The forward pass of the next positions of one document.
    ///
    /// # Errors
    /// The backend's own.
    pub fn forward_cached(&self, pass: &Pass<'_, B>, x: &Tensor<B>, state: &mut MixerState<B>) -> Result<Tensor<B>> {
        match (self, state) {
            (Self::Attention(attention), MixerState::Attention(cache)) => attention.forward_cached(pass, x, cache),
            (Self::Delta(delta), MixerState::Delta(state)) => delta.forward_cached(pass, x, state),
            _ => Err(foreign("state")),
        }
    }

    /// Adds the adapters' gradients and writes the gradient of `x` where `dx` asks for it.
    ///
    /// # Errors
    /// The backend's own.
    pub fn backward(
        &self,
        pass: &Pass<'_, B>,
        gradients: &mut LoraGradients<B>,
        trace: MixerTrace<B>,
        x: &Tensor<B>,
        dy: &Tensor<B>,
        dx: Option<&mut Tensor<B>>,
    ) -> Result<()> {
        match (self, trace) {
            (Self::Attention(attention), MixerTrace::Attention(trace)) => {
                attention.backward(pass, gradients, *trace, x, dy, dx)
            }
            (Self::Delta(delta), MixerTrace::Delta(trace)) => delta.backward(pass, gradients, *trace, x, dy, dx),
            _ => Err(foreign("trace")),
        }
    }
}

/// A trace or a state came from another kind of layer.
pub(crate) fn foreign(what: &str) -> Failure {
    Failure::system(
        "INTERNAL_TRACE",
        format!("A layer was given the {what} of another kind of layer"),
    )
}
