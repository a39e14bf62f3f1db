//! Causal self-attention with grouped heads: projections, optional QK-norm, RoPE.
//!
//! ```text
//! q, k, v = x·Wqᵀ, x·Wkᵀ, x·Wvᵀ        (+ bias, + adapter)
//! q, k    = rope(norm(q)), rope(norm(k))   (the norm per head, where the family has one)
//! y       = attention(q, k, v) · Woᵀ
//! ```
//!
//! Where the family gates its attention, the query projection also holds, head by head, a gate `g` behind each query, and
//! `y = (attention(q, k, v) ⊙ σ(g)) · Woᵀ`.

use brightrun_kernels::ops::{AttentionBackward, AttentionForward, Columns, RopeDirection, SigmoidGateBackward, Write};
use brightrun_kernels::{Backend, DType, Segments, Tensor};

use crate::error::Result;
use crate::model::cache::KeyValueCache;
use crate::model::linear::{Linear, Projected};
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
    /// Whether `q` also holds the output's gate.
    pub(crate) is_gated: bool,
}

/// What the backward pass needs of the forward pass.
pub struct AttentionTrace<B: Backend> {
    q: Heads<B>,
    k: Heads<B>,
    v: Heads<B>,
    /// Activation `[T, H·D]`, before it is gated.
    out: Tensor<B>,
    /// Activation `[T, H·D]`.
    gate: Option<Tensor<B>>,
    /// f32 `[T, H]`.
    lse: Tensor<B>,
    o_hidden: Option<Tensor<B>>,
}

/// Everything the scores need, and the gate of what they give.
struct Projections<B: Backend> {
    q: Heads<B>,
    k: Heads<B>,
    v: Heads<B>,
    gate: Option<Tensor<B>>,
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
        self.o.inputs() / self.head_dim
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
        let raw = |width: usize, norm: &Option<Norm<B>>| match norm {
            Some(_) => 2 * width,
            None => width,
        };
        let queries = self.o.inputs();
        let gate = if self.is_gated { queries } else { 0 };
        let values =
            raw(queries, &self.q_norm) + raw(self.k.outputs(), &self.k_norm) + self.v.outputs() + queries + gate;
        let hidden = pass.hidden_bytes(&self.linears());
        (pass.tokens() * (values * pass.dtype.size_bytes() + 3 * 4 * self.query_heads())) as u64 + hidden
    }

    /// `x` is the normalised layer input, activation `[T, C]`; gives `y` of the same shape and the trace.
    ///
    /// # Errors
    /// The backend's own.
    pub fn forward(&self, pass: &Pass<'_, B>, x: &Tensor<B>) -> Result<(Tensor<B>, AttentionTrace<B>)> {
        let Projections { q, k, v, gate } = self.projections(pass, x)?;
        let (out, lse) = self.scores(pass, &q.ready, (&k.ready, &v.ready), pass.segments)?;
        let projected = match &gate {
            None => self.o.forward(pass, &out)?,
            Some(gate) => self.o.forward(pass, &gated(pass, &out, gate)?)?,
        };
        let trace = AttentionTrace {
            q,
            k,
            v,
            out,
            gate,
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
        let Projections { q, k, v, gate } = self.projections(pass, x)?;
        cache.append(pass.device, k.ready, v.ready)?;
        let keys = Segments::from_lengths([cache.length()]);
        let (mut out, _) = cache.with_heads(self.head_dim, |k, v| self.scores(pass, &q.ready, (k, v), &keys))?;
        if let Some(gate) = &gate {
            out = gated(pass, &out, gate)?;
        }
        Ok(self.o.forward(pass, &out)?.y)
    }

    fn projections(&self, pass: &Pass<'_, B>, x: &Tensor<B>) -> Result<Projections<B>> {
        let mut q = self.q.forward(pass, x)?;
        let mut gate = None;
        if self.is_gated {
            let (queries, gates) = self.without_gate(pass, &q.y)?;
            q.y = queries;
            gate = Some(gates);
        }
        let q = self.rotated(pass, q, self.q_norm.as_ref())?;
        let k = self.rotated(pass, self.k.forward(pass, x)?, self.k_norm.as_ref())?;
        let v = self.v.forward(pass, x)?;
        let v = Heads {
            ready: self.split(v.y)?,
            raw: None,
            hidden: v.hidden,
        };
        Ok(Projections { q, k, v, gate })
    }

    /// Cuts `[T, H·2·D]`, a query and a gate per head, into queries and gates, `[T, H·D]` each.
    fn without_gate(&self, pass: &Pass<'_, B>, both: &Tensor<B>) -> Result<(Tensor<B>, Tensor<B>)> {
        let extents = [both.shape().rows(), self.o.inputs()];
        let (mut queries, mut gates) = (pass.activation(extents)?, pass.activation(extents)?);
        let [query, gate] = self.query_and_gate();
        pass.device.copy_columns(both, &mut queries, query)?;
        pass.device.copy_columns(both, &mut gates, gate)?;
        Ok((queries, gates))
    }

    /// The way back of [`Attention::without_gate`].
    fn with_gate(&self, pass: &Pass<'_, B>, queries: &Tensor<B>, gates: &Tensor<B>) -> Result<Tensor<B>> {
        let mut both = pass.activation([queries.shape().rows(), self.q.outputs()])?;
        let [query, gate] = self.query_and_gate().map(reversed);
        pass.device.copy_columns(queries, &mut both, query)?;
        pass.device.copy_columns(gates, &mut both, gate)?;
        Ok(both)
    }

    fn query_and_gate(&self) -> [Columns; 2] {
        let part = |source| Columns {
            groups: self.query_heads(),
            source,
            target: 0,
            width: self.head_dim,
        };
        [part(0), part(self.head_dim)]
    }

    fn rotated(&self, pass: &Pass<'_, B>, projected: Projected<B>, norm: Option<&Norm<B>>) -> Result<Heads<B>> {
        let raw = self.split(projected.y)?;
        let (mut ready, raw) = match norm {
            None => (raw, None),
            Some(norm) => {
                let Normed { y, rstd } = norm.forward(pass, &raw)?;
                (y, Some((raw, rstd)))
            }
        };
        pass.device
            .rope(&mut ready, pass.positions, &pass.rope, RopeDirection::Forward)?;
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
        let mut dout = match inputs_matter {
            true => Some(pass.activation([pass.tokens(), self.o.inputs()])?),
            false => None,
        };
        {
            let again = match &trace.gate {
                Some(gate) => Some(gated(pass, &trace.out, gate)?),
                None => None,
            };
            let saved = (again.as_ref().unwrap_or(&trace.out), trace.o_hidden.as_ref());
            let wanted = dout.as_mut().map(|dout| (dout, Write::Overwrite));
            self.o.backward(pass, gradients, saved, dy, wanted)?;
        }
        let Some(mut dout) = dout else { return Ok(()) };
        let mut dgate = None;
        if let Some(gate) = &trace.gate {
            let (ungated, gradient) = gated_backward(pass, &trace.out, gate, &dout)?;
            dout = ungated;
            dgate = Some(gradient);
        }
        let [dq, dk, dv] = self.scores_backward(
            pass,
            &trace.q.ready,
            &trace.k.ready,
            &trace.v.ready,
            trace.out,
            trace.lse,
            dout,
        )?;
        let mut dq = rotated_backward(pass, self.q_norm.as_ref(), trace.q.raw, dq)?;
        if let Some(dgate) = dgate {
            dq = self.with_gate(pass, &dq, &dgate)?;
        }
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
        .rope(&mut gradient, pass.positions, &pass.rope, RopeDirection::Backward)?;
    let Some((norm, (raw, rstd))) = norm.zip(raw) else {
        return joined(gradient);
    };
    let mut before = pass.activation(raw.shape())?;
    norm.backward(pass, (&raw, &rstd), &gradient, (&mut before, Write::Overwrite))?;
    joined(before)
}

/// `out ⊙ σ(gate)`, all `[T, H·D]`.
fn gated<B: Backend>(pass: &Pass<'_, B>, out: &Tensor<B>, gate: &Tensor<B>) -> Result<Tensor<B>> {
    let mut y = pass.activation(out.shape())?;
    pass.device.sigmoid_gate_forward(out, gate, &mut y, Write::Overwrite)?;
    Ok(y)
}

/// Gradients of `out` and of `gate`.
fn gated_backward<B: Backend>(
    pass: &Pass<'_, B>,
    out: &Tensor<B>,
    gate: &Tensor<B>,
    dy: &Tensor<B>,
) -> Result<(Tensor<B>, Tensor<B>)> {
    let (mut dx, mut dgate) = (pass.activation(out.shape())?, pass.activation(gate.shape())?);
    pass.device.sigmoid_gate_backward(SigmoidGateBackward {
        x: out,
        gate,
        dy,
        dx: &mut dx,
        dgate: &mut dgate,
    })?;
    Ok((dx, dgate))
}

/// The same columns, the other way.
pub(crate) fn reversed(columns: Columns) -> Columns {
    Columns {
        source: columns.target,
        target: columns.source,
        ..columns
    }
}

/// `[T, H, D]` → `[T, H·D]`.
pub(crate) fn joined<B: Backend>(tensor: Tensor<B>) -> Result<Tensor<B>> {
    let extents = tensor.shape();
    let rows = extents.extents().first().copied().unwrap_or(0);
    let width = extents.extents().iter().skip(1).product::<usize>();
    Ok(tensor.reshaped([rows, width])?)
}
