//! Gated DeltaNet as Qwen3-Next has it (Yang, Kautz & Hatamizadeh 2024, arXiv 2412.06464).
//!
//! ```text
//! q, k, v, z = in_proj_qkvz(x)      fused: per key head its query, its key, then values and z of its value heads
//! b, a       = in_proj_ba(x)        fused likewise
//! q, k, v    = silu(convolution(q, k, v))
//! q, k       = l2norm(q), l2norm(k)                  per head
//! g, β       = −exp(A_log) · softplus(a + dt_bias), σ(b)
//! o          = delta rule(q, k, v, g, β), with scale 1/√Dk
//! y          = (norm(o) · silu(z)) · Woutᵀ           the norm per value head
//! ```
//!
//! The convolution works on each channel by itself, so q, k and v each have a part of it and are never concatenated.
//!
//! Kept for the backward pass: what the two input projections gave, the delta rule's solved triangles and its output. Convolutions,
//! norms and gates are computed again: they cost no product.

use brightrun_kernels::ops::{
    Columns, ConvolutionForward, DELTA_CHUNK, DeltaBackward, DeltaForward, DeltaGatesForward, DeltaInputsBackward,
    DeltaInputsForward, GatedNormBackward, GatedNormForward, Write,
};
use brightrun_kernels::{Backend, DType, Tensor};

use crate::error::Result;
use crate::model::attention::joined;
use crate::model::linear::Linear;
use crate::model::lora::LoraGradients;
use crate::model::pass::Pass;

/// ε of the l2 norm of queries and keys: not in the config, a constant of the reference implementation.
const L2_EPS: f32 = 1e-6;

/// One layer's Gated DeltaNet.
#[derive(Debug)]
pub struct DeltaNet<B: Backend> {
    pub(crate) qkvz: Linear<B>,
    pub(crate) ba: Linear<B>,
    pub(crate) out: Linear<B>,
    /// The convolution's parts for q, k and v, f32 or bf16 `[channels, taps]`.
    pub(crate) taps: [Tensor<B>; 3],
    /// f32 or bf16 `[Hv]`.
    pub(crate) a_log: Tensor<B>,
    /// f32 or bf16 `[Hv]`.
    pub(crate) dt_bias: Tensor<B>,
    /// f32 or bf16 `[Dv]`.
    pub(crate) norm: Tensor<B>,
    pub(crate) norm_eps: f32,
    pub(crate) key_heads: usize,
    pub(crate) value_heads: usize,
    pub(crate) key_dim: usize,
    pub(crate) value_dim: usize,
}

/// What the backward pass needs of the forward pass.
pub struct DeltaTrace<B: Backend> {
    projected: Projected<B>,
    /// f32 `[T, Hv, chunk]`.
    solved: Tensor<B>,
    /// Activation `[T, Hv, Dv]`.
    out: Tensor<B>,
    qkvz_hidden: Option<Tensor<B>>,
    ba_hidden: Option<Tensor<B>>,
    out_hidden: Option<Tensor<B>>,
}

/// What the delta rule remembers of one document.
pub struct DeltaState<B: Backend> {
    /// The last inputs of each part of the convolution, f32 `[1, taps − 1, channels]`.
    convolution: [Tensor<B>; 3],
    /// f32 `[1, Hv, Dk, Dv]`.
    delta: Tensor<B>,
}

/// Outputs of the input projections.
struct Projected<B: Backend> {
    /// Activation `[T, Hk·(2·Dk + 2·G·Dv)]`.
    fused: Tensor<B>,
    /// Activation `[T, 2·Hv]`.
    ba: Tensor<B>,
}

/// What the delta rule and the norm behind it take.
struct Inputs<B: Backend> {
    /// Activations `[T, Hk, Dk]`.
    q: Tensor<B>,
    k: Tensor<B>,
    /// Activations `[T, Hv, Dv]`.
    v: Tensor<B>,
    z: Tensor<B>,
    /// f32 `[T, Hv]`.
    decay: Tensor<B>,
    beta: Tensor<B>,
}

impl<B: Backend> DeltaNet<B> {
    /// Its projections.
    pub fn linears(&self) -> [&Linear<B>; 3] {
        [&self.qkvz, &self.ba, &self.out]
    }

    /// Bytes a trace of this pass occupies.
    pub fn trace_bytes(&self, pass: &Pass<'_, B>) -> u64 {
        let activations = self.qkvz.outputs() + self.ba.outputs() + self.value_heads * self.value_dim;
        let floats = self.value_heads * DELTA_CHUNK;
        let bytes = activations * pass.dtype.size_bytes() + floats * DType::F32.size_bytes();
        (pass.tokens() * bytes) as u64 + pass.hidden_bytes(&self.linears())
    }

    /// `x` is the normalised layer input, activation `[T, C]`; gives `y` of the same shape and the trace.
    ///
    /// # Errors
    /// The backend's own.
    pub fn forward(&self, pass: &Pass<'_, B>, x: &Tensor<B>) -> Result<(Tensor<B>, DeltaTrace<B>)> {
        let (qkvz, ba) = (self.qkvz.forward(pass, x)?, self.ba.forward(pass, x)?);
        let projected = Projected {
            fused: qkvz.y,
            ba: ba.y,
        };
        let inputs = self.inputs(pass, &projected)?;
        let (out, solved) = self.rule(pass, &inputs, None)?;
        let z = inputs.z;
        let (normed, _) = self.normed(pass, &out, &z)?;
        drop(z);
        let last = self.out.forward(pass, &joined(normed)?)?;
        let trace = DeltaTrace {
            projected,
            solved,
            out,
            qkvz_hidden: qkvz.hidden,
            ba_hidden: ba.hidden,
            out_hidden: last.hidden,
        };
        Ok((last.y, trace))
    }

    /// As [`DeltaNet::forward`] for a pass that keeps nothing.
    ///
    /// # Errors
    /// The backend's own.
    pub fn output(&self, pass: &Pass<'_, B>, x: &Tensor<B>) -> Result<Tensor<B>> {
        let projected = Projected {
            fused: self.qkvz.forward(pass, x)?.y,
            ba: self.ba.forward(pass, x)?.y,
        };
        let inputs = self.inputs(pass, &projected)?;
        drop(projected);
        self.finished(pass, inputs, None)
    }

    /// An empty memory for one document.
    ///
    /// # Errors
    /// The backend's own.
    pub fn state(&self, device: &B) -> Result<DeltaState<B>> {
        let past = |taps: &Tensor<B>| {
            let (channels, width) = (taps.shape().rows(), taps.shape().row());
            device.zeros(DType::F32, [1, width - 1, channels])
        };
        let [q, k, v] = &self.taps;
        Ok(DeltaState {
            convolution: [past(q)?, past(k)?, past(v)?],
            delta: device.zeros(DType::F32, [1, self.value_heads, self.key_dim, self.value_dim])?,
        })
    }

    /// The forward pass of the next positions of one document.
    ///
    /// # Errors
    /// The backend's own.
    pub fn forward_cached(&self, pass: &Pass<'_, B>, x: &Tensor<B>, state: &mut DeltaState<B>) -> Result<Tensor<B>> {
        let projected = Projected {
            fused: self.qkvz.forward(pass, x)?.y,
            ba: self.ba.forward(pass, x)?.y,
        };
        let inputs = self.continued(pass, &projected, &mut state.convolution)?;
        drop(projected);
        self.finished(pass, inputs, Some(&mut state.delta))
    }

    /// What follows the inputs, keeping nothing.
    fn finished(&self, pass: &Pass<'_, B>, inputs: Inputs<B>, state: Option<&mut Tensor<B>>) -> Result<Tensor<B>> {
        let (out, solved) = self.rule(pass, &inputs, state)?;
        let z = inputs.z;
        drop(solved);
        let (normed, _) = self.normed(pass, &out, &z)?;
        drop((out, z));
        Ok(self.out.forward(pass, &joined(normed)?)?.y)
    }

    /// The delta rule's output and its solved triangles.
    fn rule(
        &self,
        pass: &Pass<'_, B>,
        inputs: &Inputs<B>,
        state: Option<&mut Tensor<B>>,
    ) -> Result<(Tensor<B>, Tensor<B>)> {
        let mut out = pass.activation(inputs.v.shape())?;
        let solved = [pass.tokens(), self.value_heads, DELTA_CHUNK];
        let mut solved = pass.device.alloc(DType::F32, solved)?;
        pass.device.delta_rule_forward(DeltaForward {
            q: &inputs.q,
            k: &inputs.k,
            v: &inputs.v,
            decay: &inputs.decay,
            beta: &inputs.beta,
            segments: pass.segments,
            scale: self.scale(),
            state,
            out: &mut out,
            solved: &mut solved,
        })?;
        Ok((out, solved))
    }

    fn scale(&self) -> f32 {
        1.0 / (self.key_dim as f32).sqrt()
    }

    /// Value heads per key head.
    fn ratio(&self) -> usize {
        self.value_heads / self.key_heads
    }

    /// Places of q, k, v and z in each key head's part of `in_proj_qkvz`.
    fn qkvz_columns(&self) -> [Columns; 4] {
        let (key, value) = (self.key_dim, self.ratio() * self.value_dim);
        [(0, key), (key, key), (2 * key, value), (2 * key + value, value)].map(|part| self.columns(part))
    }

    /// Places of b and a in each key head's part of `in_proj_ba`.
    fn ba_columns(&self) -> [Columns; 2] {
        [(0, self.ratio()), (self.ratio(), self.ratio())].map(|part| self.columns(part))
    }

    fn columns(&self, (source, width): (usize, usize)) -> Columns {
        Columns {
            groups: self.key_heads,
            source,
            target: 0,
            width,
        }
    }

    /// What the projections gave, cut apart, convolved and normalised: of documents without a past.
    fn inputs(&self, pass: &Pass<'_, B>, projected: &Projected<B>) -> Result<Inputs<B>> {
        let mut inputs = self.unwritten(pass)?;
        pass.device.delta_inputs_forward(DeltaInputsForward {
            fused: &projected.fused,
            ba: &projected.ba,
            taps: self.taps.each_ref(),
            a_log: &self.a_log,
            dt_bias: &self.dt_bias,
            eps: L2_EPS,
            segments: pass.segments,
            q: &mut inputs.q,
            k: &mut inputs.k,
            v: &mut inputs.v,
            z: &mut inputs.z,
            decay: &mut inputs.decay,
            beta: &mut inputs.beta,
        })?;
        Ok(inputs)
    }

    fn unwritten(&self, pass: &Pass<'_, B>) -> Result<Inputs<B>> {
        let keys = [pass.tokens(), self.key_heads, self.key_dim];
        let values = [pass.tokens(), self.value_heads, self.value_dim];
        let gates = [pass.tokens(), self.value_heads];
        Ok(Inputs {
            q: pass.activation(keys)?,
            k: pass.activation(keys)?,
            v: pass.activation(values)?,
            z: pass.activation(values)?,
            decay: pass.device.alloc(DType::F32, gates)?,
            beta: pass.device.alloc(DType::F32, gates)?,
        })
    }

    /// The same of one document that goes on, op by op: the convolution remembers its last inputs.
    fn continued(
        &self,
        pass: &Pass<'_, B>,
        projected: &Projected<B>,
        [q_state, k_state, v_state]: &mut [Tensor<B>; 3],
    ) -> Result<Inputs<B>> {
        let [q_columns, k_columns, v_columns, z_columns] = self.qkvz_columns();
        let [q_taps, k_taps, v_taps] = &self.taps;
        let fused = &projected.fused;
        let q = convolved(pass, &cut(pass, fused, q_columns)?, q_taps, q_state)?;
        let k = convolved(pass, &cut(pass, fused, k_columns)?, k_taps, k_state)?;
        let v = convolved(pass, &cut(pass, fused, v_columns)?, v_taps, v_state)?;
        let [b_columns, a_columns] = self.ba_columns();
        let (b, a) = (
            cut(pass, &projected.ba, b_columns)?,
            cut(pass, &projected.ba, a_columns)?,
        );
        let mut decay = pass.device.alloc(DType::F32, a.shape())?;
        let mut beta = pass.device.alloc(DType::F32, b.shape())?;
        pass.device.delta_gates_forward(DeltaGatesForward {
            a: &a,
            b: &b,
            a_log: &self.a_log,
            dt_bias: &self.dt_bias,
            decay: &mut decay,
            beta: &mut beta,
        })?;
        Ok(Inputs {
            q: self.unit(pass, q)?,
            k: self.unit(pass, k)?,
            v: self.value_heads_of(v)?,
            z: self.value_heads_of(cut(pass, fused, z_columns)?)?,
            decay,
            beta,
        })
    }

    /// l2-normalises each head of `[T, Hk·Dk]`.
    fn unit(&self, pass: &Pass<'_, B>, joined: Tensor<B>) -> Result<Tensor<B>> {
        let rows = joined.shape().rows();
        let raw = joined.reshaped([rows, self.key_heads, self.key_dim])?;
        let mut y = pass.activation(raw.shape())?;
        let mut rnorm = pass.device.alloc(DType::F32, [raw.shape().rows()])?;
        pass.device.l2_norm_forward(&raw, L2_EPS, &mut y, &mut rnorm)?;
        Ok(y)
    }

    fn value_heads_of(&self, joined: Tensor<B>) -> Result<Tensor<B>> {
        let rows = joined.shape().rows();
        Ok(joined.reshaped([rows, self.value_heads, self.value_dim])?)
    }

    /// `norm(out) · silu(z)` and the norm's `rstd`.
    fn normed(&self, pass: &Pass<'_, B>, out: &Tensor<B>, z: &Tensor<B>) -> Result<(Tensor<B>, Tensor<B>)> {
        let mut y = pass.activation(out.shape())?;
        let mut rstd = pass.device.alloc(DType::F32, [out.shape().rows()])?;
        pass.device.gated_norm_forward(GatedNormForward {
            x: out,
            gate: z,
            weight: &self.norm,
            eps: self.norm_eps,
            y: &mut y,
            rstd: &mut rstd,
        })?;
        Ok((y, rstd))
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
        trace: DeltaTrace<B>,
        x: &Tensor<B>,
        dy: &Tensor<B>,
        mut dx: Option<&mut Tensor<B>>,
    ) -> Result<()> {
        let DeltaTrace {
            projected,
            solved,
            out,
            qkvz_hidden,
            ba_hidden,
            out_hidden,
        } = trace;
        let inputs_matter = dx.is_some() || pass.adapts_any(&[self.qkvz.module, self.ba.module]);
        let inputs = self.inputs(pass, &projected)?;
        let (normed, rstd) = self.normed(pass, &out, &inputs.z)?;
        let normed = joined(normed)?;
        let saved = (&normed, out_hidden.as_ref());
        if !inputs_matter {
            return self.out.backward(pass, gradients, saved, dy, None);
        }
        let mut dnormed = pass.activation(normed.shape())?;
        self.out
            .backward(pass, gradients, saved, dy, Some((&mut dnormed, Write::Overwrite)))?;
        drop(normed);
        let dnormed = self.value_heads_of(dnormed)?;
        let (dout, dz) = self.normed_backward(pass, (&out, &inputs.z, &rstd), &dnormed)?;
        drop((out, dnormed));
        let Projected { fused: dfused, ba: dba } = self.inputs_backward(pass, projected, inputs, solved, (dout, dz))?;
        let wanted = dx.as_deref_mut().map(|dx| (dx, Write::Overwrite));
        self.qkvz
            .backward(pass, gradients, (x, qkvz_hidden.as_ref()), &dfused, wanted)?;
        let wanted = dx.map(|dx| (dx, Write::Accumulate));
        self.ba.backward(pass, gradients, (x, ba_hidden.as_ref()), &dba, wanted)
    }

    /// Gradients of the delta rule's output and of `z`.
    fn normed_backward(
        &self,
        pass: &Pass<'_, B>,
        (out, z, rstd): (&Tensor<B>, &Tensor<B>, &Tensor<B>),
        dy: &Tensor<B>,
    ) -> Result<(Tensor<B>, Tensor<B>)> {
        let (mut dx, mut dgate) = (pass.activation(out.shape())?, pass.activation(z.shape())?);
        pass.device.gated_norm_backward(GatedNormBackward {
            x: out,
            gate: z,
            weight: &self.norm,
            rstd,
            dy,
            dx: &mut dx,
            dgate: &mut dgate,
        })?;
        Ok((dx, dgate))
    }

    /// Back through the delta rule, the norms, the convolution and the gates: gradients of what the projections gave.
    fn inputs_backward(
        &self,
        pass: &Pass<'_, B>,
        projected: Projected<B>,
        inputs: Inputs<B>,
        solved: Tensor<B>,
        (dout, dz): (Tensor<B>, Tensor<B>),
    ) -> Result<Projected<B>> {
        let Inputs {
            q,
            k,
            v,
            z,
            decay,
            beta,
        } = inputs;
        drop(z);
        let (mut dq, mut dk) = (pass.activation(q.shape())?, pass.activation(k.shape())?);
        let mut dv = pass.activation(v.shape())?;
        let mut ddecay = pass.device.alloc(DType::F32, decay.shape())?;
        let mut dbeta = pass.device.alloc(DType::F32, beta.shape())?;
        pass.device.delta_rule_backward(DeltaBackward {
            q: &q,
            k: &k,
            v: &v,
            decay: &decay,
            beta: &beta,
            solved: &solved,
            dout: &dout,
            segments: pass.segments,
            scale: self.scale(),
            dq: &mut dq,
            dk: &mut dk,
            dv: &mut dv,
            ddecay: &mut ddecay,
            dbeta: &mut dbeta,
        })?;
        drop((q, k, v, decay, solved, dout));
        let mut gradients = Projected {
            fused: pass.activation(projected.fused.shape())?,
            ba: pass.activation(projected.ba.shape())?,
        };
        pass.device.delta_inputs_backward(DeltaInputsBackward {
            fused: &projected.fused,
            ba: &projected.ba,
            taps: self.taps.each_ref(),
            a_log: &self.a_log,
            dt_bias: &self.dt_bias,
            eps: L2_EPS,
            segments: pass.segments,
            beta: &beta,
            dq: &dq,
            dk: &dk,
            dv: &dv,
            dz: &dz,
            ddecay: &ddecay,
            dbeta: &dbeta,
            dfused: &mut gradients.fused,
            dba: &mut gradients.ba,
        })?;
        Ok(gradients)
    }
}

/// One part of a fused projection's output, `[T, groups · width]`.
fn cut<B: Backend>(pass: &Pass<'_, B>, fused: &Tensor<B>, columns: Columns) -> Result<Tensor<B>> {
    let mut part = pass.activation([fused.shape().rows(), columns.groups * columns.width])?;
    pass.device.copy_columns(fused, &mut part, columns)?;
    Ok(part)
}

fn convolved<B: Backend>(
    pass: &Pass<'_, B>,
    x: &Tensor<B>,
    taps: &Tensor<B>,
    state: &mut Tensor<B>,
) -> Result<Tensor<B>> {
    let mut y = pass.activation(x.shape())?;
    pass.device.convolution_forward(ConvolutionForward {
        x,
        weight: taps,
        bias: None,
        segments: pass.segments,
        state: Some(state),
        y: &mut y,
    })?;
    Ok(y)
}
