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
use crate::model::feed_forward::{FeedForward, FeedForwardTrace, Purpose};
use crate::model::lora::LoraGradients;
use crate::model::mixer::{Mixer, MixerState, MixerTrace};
use crate::model::norm::Norm;
use crate::model::pass::Pass;

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

impl<B: Backend> Layer<B> {
    /// Whether the pass adapts anything in this layer.
    pub fn is_adapted(&self, pass: &Pass<'_, B>) -> bool {
        pass.adapts_any(&self.mixer.modules()) || pass.adapts_any(&self.feed_forward.modules())
    }

    /// The part that works on each position by itself.
    pub fn feed_forward(&self) -> &FeedForward<B> {
        &self.feed_forward
    }

    /// Bytes that keeping everything costs beyond the checkpoint.
    pub fn inner_trace_bytes(&self, pass: &Pass<'_, B>) -> u64 {
        let width = self.input_norm.weight.shape().elements();
        let middle = pass.tokens() * width * pass.dtype.size_bytes();
        self.mixer.trace_bytes(pass) + self.feed_forward.trace_bytes(pass) + middle as u64
    }

    /// Updates the residual stream `x`, activation `[T, C]`, and keeps nothing.
    ///
    /// # Errors
    /// The backend's own.
    pub fn forward(&self, pass: &Pass<'_, B>, x: &mut Tensor<B>) -> Result<()> {
        let mixed = self.mix_only(pass, x)?;
        self.feed(pass, x, mixed)
    }

    /// As [`Layer::forward`], keeping the checkpoint and, where `keep` says so, everything else.
    ///
    /// # Errors
    /// The backend's own.
    pub fn forward_traced(&self, pass: &Pass<'_, B>, x: &mut Tensor<B>, keep: bool) -> Result<LayerTrace<B>> {
        let input = pass.duplicate(x)?;
        let (mixed, mixer) = match keep {
            true => {
                let (mixed, trace) = self.mix(pass, x)?;
                (mixed, Some(trace))
            }
            false => (self.mix_only(pass, x)?, None),
        };
        let normed = self.add_and_norm(pass, x, mixed)?;
        let middle = if keep { Some(pass.duplicate(x)?) } else { None };
        let purpose = if keep { Purpose::Both } else { Purpose::Output };
        let mut trace = self.feed_forward.open(pass, &normed, purpose)?;
        drop(normed);
        let down_hidden = self.feed_forward.close(pass, &mut trace, x)?;
        let inner = mixer.zip(middle).map(|(mixer, middle)| InnerTrace {
            mixer,
            middle,
            feed_forward: trace,
        });
        Ok(LayerTrace {
            input,
            down_hidden,
            inner,
        })
    }

    /// As [`Layer::forward`], for the next positions of one document.
    ///
    /// # Errors
    /// The backend's own.
    pub fn forward_cached(&self, pass: &Pass<'_, B>, x: &mut Tensor<B>, state: &mut MixerState<B>) -> Result<()> {
        let normed = self.input_norm.forward(pass, x)?.y;
        let mixed = self.mixer.forward_cached(pass, &normed, state)?;
        self.feed(pass, x, mixed)
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
        match inner {
            Some(inner) => self.backward_from(pass, gradients, (&input, down_hidden, inner), dy, below),
            // Both passes use the same weights.
            None => pass.device.sharing(|| {
                let inner = self.recompute(pass, &input)?;
                self.backward_from(pass, gradients, (&input, down_hidden, inner), dy, below)
            }),
        }
    }

    fn backward_from(
        &self,
        pass: &Pass<'_, B>,
        gradients: &mut LoraGradients<B>,
        (input, down_hidden, inner): (&Tensor<B>, Option<Tensor<B>>, InnerTrace<B>),
        dy: &mut Tensor<B>,
        below: bool,
    ) -> Result<()> {
        let mixer_matters = below || pass.adapts_any(&self.mixer.modules());
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
        let normed = self.input_norm.forward(pass, input)?;
        if !below {
            return self.mixer.backward(pass, gradients, inner.mixer, &normed.y, dy, None);
        }
        let mut dnormed = pass.activation(input.shape())?;
        self.mixer
            .backward(pass, gradients, inner.mixer, &normed.y, dy, Some(&mut dnormed))?;
        let saved = (input, &normed.rstd);
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
        let normed = self.middle_norm.forward(pass, middle)?;
        let saved = (trace, down_hidden.as_ref());
        if !mixer_matters {
            return self.feed_forward.backward(pass, gradients, saved, &normed.y, dy, None);
        }
        let mut dnormed = pass.activation(middle.shape())?;
        self.feed_forward
            .backward(pass, gradients, saved, &normed.y, dy, Some(&mut dnormed))?;
        self.middle_norm
            .backward(pass, (middle, &normed.rstd), &dnormed, (dy, Write::Accumulate))
    }

    /// The forward pass again, from the checkpoint, without the last projection.
    fn recompute(&self, pass: &Pass<'_, B>, input: &Tensor<B>) -> Result<InnerTrace<B>> {
        let (mixed, mixer) = self.mix(pass, input)?;
        let mut middle = pass.duplicate(input)?;
        let normed = self.add_and_norm(pass, &mut middle, mixed)?;
        let feed_forward = self.feed_forward.open(pass, &normed, Purpose::Backward)?;
        Ok(InnerTrace {
            mixer,
            middle,
            feed_forward,
        })
    }

    fn mix(&self, pass: &Pass<'_, B>, x: &Tensor<B>) -> Result<(Tensor<B>, MixerTrace<B>)> {
        let normed = self.input_norm.forward(pass, x)?.y;
        self.mixer.forward(pass, &normed)
    }

    fn mix_only(&self, pass: &Pass<'_, B>, x: &Tensor<B>) -> Result<Tensor<B>> {
        let normed = self.input_norm.forward(pass, x)?.y;
        self.mixer.output(pass, &normed)
    }

    /// Adds what the mixer gave to the residual stream, and then what the feed-forward part makes of it.
    fn feed(&self, pass: &Pass<'_, B>, x: &mut Tensor<B>, mixed: Tensor<B>) -> Result<()> {
        let normed = self.add_and_norm(pass, x, mixed)?;
        let mut trace = self.feed_forward.open(pass, &normed, Purpose::Output)?;
        drop(normed);
        self.feed_forward.close(pass, &mut trace, x)?;
        Ok(())
    }

    fn add_and_norm(&self, pass: &Pass<'_, B>, x: &mut Tensor<B>, mixed: Tensor<B>) -> Result<Tensor<B>> {
        Ok(self.middle_norm.forward_adding(pass, x, &mixed)?.y)
    }
}
