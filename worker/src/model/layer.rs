//! A decoder layer: a mixer of positions and a feed-forward part, each behind a norm and beside the residual stream.
//!
//! ```text
//! x ← x + mixer(norm(x))
//! x ← x + feed_forward(norm(x))
//! ```
//!
//! What a layer keeps for its backward pass is a choice made per layer and per pass: its input always (the activation
//! checkpoint), and the rest either kept or computed again from it. Both ways run the same ops on the same values, so they
//! give the same bits.

use brightrun_kernels::ops::Write;
use brightrun_kernels::{Backend, Tensor};

use crate::error::Result;
use crate::model::attention::{Attention, AttentionTrace};
use crate::model::cache::KeyValueCache;
use crate::model::linear::Linear;
use crate::model::lora::LoraGradients;
use crate::model::mlp::{Mlp, MlpTrace};
use crate::model::norm::Norm;
use crate::model::pass::Pass;

/// What lets positions see each other.
#[derive(Debug)]
pub enum Mixer<B: Backend> {
    /// Causal softmax attention.
    Attention(Attention<B>),
}

/// What works on each position by itself.
#[derive(Debug)]
pub enum FeedForward<B: Backend> {
    /// A dense SwiGLU MLP.
    Mlp(Mlp<B>),
}

/// One decoder layer.
#[derive(Debug)]
pub struct Layer<B: Backend> {
    pub(crate) input_norm: Norm<B>,
    pub(crate) mixer: Mixer<B>,
    pub(crate) middle_norm: Norm<B>,
    pub(crate) feed_forward: FeedForward<B>,
}

/// What a layer keeps between its forward and its backward pass.
pub struct LayerTrace<B: Backend> {
    /// The residual stream before the layer, activation `[T, C]`.
    input: Tensor<B>,
    /// The last projection's `u`: small, and the only part of it that the backward pass reads.
    down_hidden: Option<Tensor<B>>,
    /// Everything else, or `None` when it is to be computed again.
    inner: Option<InnerTrace<B>>,
}

struct InnerTrace<B: Backend> {
    mixer: MixerTrace<B>,
    /// The residual stream between mixer and feed-forward part.
    middle: Tensor<B>,
    feed_forward: FeedForwardTrace<B>,
}

/// A mixer's trace.
pub enum MixerTrace<B: Backend> {
    /// Of [`Mixer::Attention`].
    Attention(AttentionTrace<B>),
}

/// A feed-forward part's trace.
pub enum FeedForwardTrace<B: Backend> {
    /// Of [`FeedForward::Mlp`].
    Mlp(MlpTrace<B>),
}

/// What a mixer remembers of the positions decoded so far.
pub enum MixerState<B: Backend> {
    /// Of [`Mixer::Attention`].
    Attention(KeyValueCache<B>),
}

impl<B: Backend> Layer<B> {
    /// All projections that may carry an adapter.
    pub fn linears(&self) -> Vec<&Linear<B>> {
        let Mixer::Attention(attention) = &self.mixer;
        let FeedForward::Mlp(mlp) = &self.feed_forward;
        attention.linears().into_iter().chain(mlp.linears()).collect()
    }

    /// Whether the pass adapts any projection of this layer.
    pub fn is_adapted(&self, pass: &Pass<'_, B>) -> bool {
        self.linears().iter().any(|linear| linear.is_adapted(pass))
    }

    /// Bytes that keeping everything costs beyond the checkpoint.
    pub fn inner_trace_bytes(&self, pass: &Pass<'_, B>) -> u64 {
        let Mixer::Attention(attention) = &self.mixer;
        let FeedForward::Mlp(mlp) = &self.feed_forward;
        let middle = pass.tokens() * attention.o.outputs() * pass.dtype.size_bytes();
        attention.trace_bytes(pass) + mlp.trace_bytes(pass) + middle as u64
    }

    /// Updates the residual stream `x`, activation `[T, C]`, and keeps nothing.
    ///
    /// # Errors
    /// The backend's own.
    pub fn forward(&self, pass: &Pass<'_, B>, x: &mut Tensor<B>) -> Result<()> {
        let (mixed, _) = self.mix(pass, x)?;
        self.add(pass, x, mixed)?;
        let (y, _) = self.feed(pass, x)?;
        self.add(pass, x, y)
    }

    /// As [`Layer::forward`], keeping the checkpoint and, where `keep` says so, everything else.
    ///
    /// # Errors
    /// The backend's own.
    pub fn forward_traced(&self, pass: &Pass<'_, B>, x: &mut Tensor<B>, keep: bool) -> Result<LayerTrace<B>> {
        let input = pass.duplicate(x)?;
        let (mixed, mixer) = self.mix(pass, x)?;
        let mixer = keep.then_some(mixer);
        self.add(pass, x, mixed)?;
        let middle = if keep { Some(pass.duplicate(x)?) } else { None };
        let normed = self.middle_norm.forward(pass, x)?.y;
        let FeedForward::Mlp(mlp) = &self.feed_forward;
        let trace = mlp.open(pass, &normed)?;
        drop(normed);
        let closed = mlp.close(pass, &trace)?;
        let inner = mixer.zip(middle).map(|(mixer, middle)| InnerTrace {
            mixer,
            middle,
            feed_forward: FeedForwardTrace::Mlp(trace),
        });
        self.add(pass, x, closed.y)?;
        Ok(LayerTrace {
            input,
            down_hidden: closed.hidden,
            inner,
        })
    }

    /// As [`Layer::forward`], for the next positions of one document.
    ///
    /// # Errors
    /// The backend's own.
    pub fn forward_cached(&self, pass: &Pass<'_, B>, x: &mut Tensor<B>, state: &mut MixerState<B>) -> Result<()> {
        let normed = self.input_norm.forward(pass, x)?.y;
        let (Mixer::Attention(attention), MixerState::Attention(cache)) = (&self.mixer, state);
        let mixed = attention.forward_cached(pass, &normed, cache)?;
        self.add(pass, x, mixed)?;
        let (y, _) = self.feed(pass, x)?;
        self.add(pass, x, y)
    }

    /// Turns `dy`, the gradient of the layer's output, into the gradient of its input, and adds the adapters' gradients.
    /// With `below` false nothing under this layer is trained, and `dy` is left as it happens to be.
    ///
    /// # Errors
    /// The backend's own.
    pub fn backward(
        &self,
        pass: &Pass<'_, B>,
        gradients: &mut LoraGradients<B>,
        trace: LayerTrace<B>,
        dy: &mut Tensor<B>,
        below: bool,
    ) -> Result<()> {
        let LayerTrace {
            input,
            down_hidden,
            inner,
        } = trace;
        let inner = match inner {
            Some(inner) => inner,
            None => self.recompute(pass, &input)?,
        };
        let Mixer::Attention(attention) = &self.mixer;
        let mixer_matters = below || attention.linears().iter().any(|linear| linear.is_adapted(pass));
        self.feed_backward(
            pass,
            gradients,
            (inner.feed_forward, down_hidden),
            &inner.middle,
            dy,
            mixer_matters,
        )?;
        drop(inner.middle);
        if !mixer_matters {
            return Ok(());
        }
        let normed = self.input_norm.forward(pass, &input)?;
        let MixerTrace::Attention(mixer) = inner.mixer;
        if !below {
            return attention.backward(pass, gradients, mixer, &normed.y, dy, None);
        }
        let mut dnormed = pass.activation(input.shape())?;
        attention.backward(pass, gradients, mixer, &normed.y, dy, Some(&mut dnormed))?;
        let saved = (&input, &normed.rstd);
        self.input_norm.backward(pass, saved, &dnormed, (dy, Write::Accumulate))
    }

    fn feed_backward(
        &self,
        pass: &Pass<'_, B>,
        gradients: &mut LoraGradients<B>,
        (trace, down_hidden): (FeedForwardTrace<B>, Option<Tensor<B>>),
        middle: &Tensor<B>,
        dy: &mut Tensor<B>,
        mixer_matters: bool,
    ) -> Result<()> {
        let (FeedForward::Mlp(mlp), FeedForwardTrace::Mlp(trace)) = (&self.feed_forward, trace);
        let normed = self.middle_norm.forward(pass, middle)?;
        let saved = (trace, down_hidden.as_ref());
        if !mixer_matters {
            return mlp.backward(pass, gradients, saved, &normed.y, dy, None);
        }
        let mut dnormed = pass.activation(middle.shape())?;
        mlp.backward(pass, gradients, saved, &normed.y, dy, Some(&mut dnormed))?;
        self.middle_norm
            .backward(pass, (middle, &normed.rstd), &dnormed, (dy, Write::Accumulate))
    }

    /// The forward pass again, from the checkpoint, without the last projection.
    fn recompute(&self, pass: &Pass<'_, B>, input: &Tensor<B>) -> Result<InnerTrace<B>> {
        let (mixed, mixer) = self.mix(pass, input)?;
        let mut middle = pass.duplicate(input)?;
        self.add(pass, &mut middle, mixed)?;
        let normed = self.middle_norm.forward(pass, &middle)?.y;
        let FeedForward::Mlp(mlp) = &self.feed_forward;
        let feed_forward = FeedForwardTrace::Mlp(mlp.open(pass, &normed)?);
        Ok(InnerTrace {
            mixer,
            middle,
            feed_forward,
        })
    }

    fn mix(&self, pass: &Pass<'_, B>, x: &Tensor<B>) -> Result<(Tensor<B>, MixerTrace<B>)> {
        let normed = self.input_norm.forward(pass, x)?.y;
        let Mixer::Attention(attention) = &self.mixer;
        let (y, trace) = attention.forward(pass, &normed)?;
        Ok((y, MixerTrace::Attention(trace)))
    }

    fn feed(&self, pass: &Pass<'_, B>, x: &Tensor<B>) -> Result<(Tensor<B>, Option<Tensor<B>>)> {
        let normed = self.middle_norm.forward(pass, x)?.y;
        let FeedForward::Mlp(mlp) = &self.feed_forward;
        let trace = mlp.open(pass, &normed)?;
        let closed = mlp.close(pass, &trace)?;
        Ok((closed.y, closed.hidden))
    }

    fn add(&self, pass: &Pass<'_, B>, x: &mut Tensor<B>, y: Tensor<B>) -> Result<()> {
        Ok(pass.device.add_assign(x, &y)?)
    }
}
