//! Causal self-attention with grouped heads: projections, optional QK-norm, RoPE.
//!
//! ```text
//! q, k, v = x·Wqᵀ, x·Wkᵀ, x·Wvᵀ        (+ bias, + adapter)
//! q, k    = rope(norm(q)), rope(norm(k))   (the norm per head, where the family has one)
//! y       = attention(q, k, v) · Woᵀ
//! ```

use brightrun_kernels::ops::{AttentionBackward, AttentionForward, RopeDirection, Write};
use brightrun_kernels::{Backend, DType, Segments, Tensor};

use crate::error::Result;
use crate::model::cache::KeyValueCache;
use crate::model::linear::Linear;
use crate::model::lora::LoraGradients;
use crate::model::norm::{Norm, Normed};
use crate::model::pass::Pass;

/// One layer's attention.
#[derive(Debug)]
pub struct Attention<B: Backend> {
    pub(crate) q: Linear<B>,
    pub(crate) k: Linear<B>,
    pub(crate) v: Linear<B>,
    pub(crate) o: Linear<B>,
    pub(crate) q_norm: Option<Norm<B>>,
    pub(crate) k_norm: Option<Norm<B>>,
    pub(crate) head_dim: usize,
}

/// What the backward pass needs of the forward pass.
pub struct AttentionTrace<B: Backend> {
    q: Heads<B>,
    k: Heads<B>,
    v: Heads<B>,
    /// Activation `[T, H·D]`.
    out: Tensor<B>,
    /// f32 `[T, H]`.
    lse: Tensor<B>,
    o_hidden: Option<Tensor<B>>,
}

/// Projected heads, ready for the scores.
struct Heads<B: Backend> {
    /// Activation `[T, H, D]`, normalised and rotated.
    ready: Tensor<B>,
    /// Before the norm, `[T, H, D]`, and the norm's `rstd`; `None` without a norm.
    raw: Option<(Tensor<B>, Tensor<B>)>,
    /// The adapter's `u`.
    hidden: Option<Tensor<B>>,
}

impl<B: Backend> Attention<B> {
    fn query_heads(&self) -> usize {
        self.q.outputs() / self.head_dim
    }

    /// Width of one position in a key or value cache: `K·D`.
    pub fn key_width(&self) -> usize {
        self.k.outputs()
    }

    fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }

    /// Its projections.
    pub fn linears(&self) -> [&Linear<B>; 4] {
        [&self.q, &self.k, &self.v, &self.o]
    }

    /// Bytes a trace of this pass occupies.
    pub fn trace_bytes(&self, pass: &Pass<'_, B>) -> u64 {
        let raw = |linear: &Linear<B>, norm: &Option<Norm<B>>| match norm {
            Some(_) => linear.outputs() * (1 + 1),
            None => linear.outputs(),
        };
        let values = raw(&self.q, &self.q_norm) + raw(&self.k, &self.k_norm) + self.v.outputs() + self.q.outputs();
        let hidden = pass.hidden_bytes(&self.linears());
        (pass.tokens() * (values * pass.dtype.size_bytes() + 3 * 4 * self.query_heads())) as u64 + hidden
    }

    /// `x` is the normalised layer input, activation `[T, C]`; gives `y` of the same shape and the trace.
    ///
    /// # Errors
    /// The backend's own.
    pub fn forward(&self, pass: &Pass<'_, B>, x: &Tensor<B>) -> Result<(Tensor<B>, AttentionTrace<B>)> {
        let (q, k, v) = self.heads(pass, x)?;
        let (out, lse) = self.scores(pass, &q.ready, (&k.ready, &v.ready), pass.segments)?;
        let projected = self.o.forward(pass, &out)?;
        let trace = AttentionTrace {
            q,
            k,
            v,
            out,
            lse,
            o_hidden: projected.hidden,
        };
        Ok((projected.y, trace))
    }

    /// The forward pass of the next positions of one document, whose earlier keys and values are in `cache`.
    ///
    /// # Errors
    /// The backend's own.
    pub fn forward_cached(&self, pass: &Pass<'_, B>, x: &Tensor<B>, cache: &mut KeyValueCache<B>) -> Result<Tensor<B>> {
        let (q, k, v) = self.heads(pass, x)?;
        cache.append(pass.device, k.ready, v.ready)?;
        let keys = Segments::from_lengths([cache.length()]);
        let (out, _) = cache.with_heads(self.head_dim, |k, v| self.scores(pass, &q.ready, (k, v), &keys))?;
        Ok(self.o.forward(pass, &out)?.y)
    }

    fn heads(&self, pass: &Pass<'_, B>, x: &Tensor<B>) -> Result<(Heads<B>, Heads<B>, Heads<B>)> {
        let q = self.rotated(pass, &self.q, self.q_norm.as_ref(), x)?;
        let k = self.rotated(pass, &self.k, self.k_norm.as_ref(), x)?;
        let v = self.v.forward(pass, x)?;
        let v = Heads {
            ready: self.split(v.y)?,
            raw: None,
            hidden: v.hidden,
        };
        Ok((q, k, v))
    }

    fn rotated(
        &self,
        pass: &Pass<'_, B>,
        linear: &Linear<B>,
        norm: Option<&Norm<B>>,
        x: &Tensor<B>,
    ) -> Result<Heads<B>> {
        let projected = linear.forward(pass, x)?;
        let raw = self.split(projected.y)?;
        let (mut ready, raw) = match norm {
            None => (raw, None),
            Some(norm) => {
                let Normed { y, rstd } = norm.forward(pass, &raw)?;
                (y, Some((raw, rstd)))
            }
        };
        pass.device
            .rope(&mut ready, &pass.positions, &pass.rope, RopeDirection::Forward)?;
        Ok(Heads {
            ready,
            raw,
            hidden: projected.hidden,
        })
    }

    /// `[T, H·D]` → `[T, H, D]`.
    fn split(&self, tensor: Tensor<B>) -> Result<Tensor<B>> {
        let (rows, width) = (tensor.shape().rows(), tensor.shape().row());
        Ok(tensor.reshaped([rows, width / self.head_dim, self.head_dim])?)
    }

    /// Gives the attention's output `[T, H·D]` and its log-sum-exp.
    fn scores(
        &self,
        pass: &Pass<'_, B>,
        q: &Tensor<B>,
        (k, v): (&Tensor<B>, &Tensor<B>),
        key_segments: &Segments,
    ) -> Result<(Tensor<B>, Tensor<B>)> {
        let tokens = pass.tokens();
        let mut out = pass.activation([tokens, self.query_heads(), self.head_dim])?;
        let mut lse = pass.device.alloc(DType::F32, [tokens, self.query_heads()])?;
        pass.device.attention_forward(AttentionForward {
            q,
            k,
            v,
            query_segments: pass.segments,
            key_segments,
            scale: self.scale(),
            precision: pass.precision,
            out: &mut out,
            lse: &mut lse,
        })?;
        Ok((joined(out)?, lse))
    }

    /// Adds the adapters' gradients and writes the gradient of `x` where `dx` asks for it. Consumes the trace, so that each
    /// part of it is freed as soon as it has been used.
    ///
    /// # Errors
    /// The backend's own.
    pub fn backward(
        &self,
        pass: &Pass<'_, B>,
        gradients: &mut LoraGradients<B>,
        trace: AttentionTrace<B>,
        x: &Tensor<B>,
        dy: &Tensor<B>,
        mut dx: Option<&mut Tensor<B>>,
    ) -> Result<()> {
        let inputs_matter = dx.is_some() || [&self.q, &self.k, &self.v].iter().any(|linear| linear.is_adapted(pass));
        if !inputs_matter {
            return self
                .o
                .backward(pass, gradients, (&trace.out, trace.o_hidden.as_ref()), dy, None);
        }
        let mut dout = pass.activation([pass.tokens(), self.o.inputs()])?;
        let saved = (&trace.out, trace.o_hidden.as_ref());
        self.o
            .backward(pass, gradients, saved, dy, Some((&mut dout, Write::Overwrite)))?;
        let [dq, dk, dv] = self.scores_backward(
            pass,
            &trace.q.ready,
            &trace.k.ready,
            &trace.v.ready,
            trace.out,
            trace.lse,
            dout,
        )?;
        let dq = rotated_backward(pass, self.q_norm.as_ref(), trace.q.raw, dq)?;
        let dk = rotated_backward(pass, self.k_norm.as_ref(), trace.k.raw, dk)?;
        let dv = joined(dv)?;
        let parts = [
            (&self.q, trace.q.hidden, dq, Write::Overwrite),
            (&self.k, trace.k.hidden, dk, Write::Accumulate),
            (&self.v, trace.v.hidden, dv, Write::Accumulate),
        ];
        for (linear, hidden, gradient, write) in parts {
            let dx = dx.as_deref_mut().map(|dx| (dx, write));
            linear.backward(pass, gradients, (x, hidden.as_ref()), &gradient, dx)?;
        }
        Ok(())
    }

    #[allow(clippy::too_many_arguments)] // The op's own operands, by value where they end here.
    fn scores_backward(
        &self,
        pass: &Pass<'_, B>,
        q: &Tensor<B>,
        k: &Tensor<B>,
        v: &Tensor<B>,
        out: Tensor<B>,
        lse: Tensor<B>,
        dout: Tensor<B>,
    ) -> Result<[Tensor<B>; 3]> {
        let (out, dout) = (self.split(out)?, self.split(dout)?);
        let mut dq = pass.activation(q.shape())?;
        let mut dk = pass.activation(k.shape())?;
        let mut dv = pass.activation(v.shape())?;
        pass.device.attention_backward(AttentionBackward {
            q,
            k,
            v,
            out: &out,
            lse: &lse,
            dout: &dout,
            segments: pass.segments,
            scale: self.scale(),
            precision: pass.precision,
            dq: &mut dq,
            dk: &mut dk,
            dv: &mut dv,
        })?;
        Ok([dq, dk, dv])
    }
}

/// Back through RoPE and the norm; gives the gradient of the projection's output, `[T, H·D]`.
fn rotated_backward<B: Backend>(
    pass: &Pass<'_, B>,
    norm: Option<&Norm<B>>,
    raw: Option<(Tensor<B>, Tensor<B>)>,
    mut gradient: Tensor<B>,
) -> Result<Tensor<B>> {
    pass.device
        .rope(&mut gradient, &pass.positions, &pass.rope, RopeDirection::Backward)?;
    let Some((norm, (raw, rstd))) = norm.zip(raw) else {
        return joined(gradient);
    };
    let mut before = pass.activation(raw.shape())?;
    norm.backward(pass, (&raw, &rstd), &gradient, (&mut before, Write::Overwrite))?;
    joined(before)
}

/// `[T, H, D]` → `[T, H·D]`.
fn joined<B: Backend>(tensor: Tensor<B>) -> Result<Tensor<B>> {
    let extents = tensor.shape();
    let rows = extents.extents().first().copied().unwrap_or(0);
    let width = extents.extents().iter().skip(1).product::<usize>();
    Ok(tensor.reshaped([rows, width])?)
}
