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
//! Kept for the backward pass: what the two input projections gave, the gates, the delta rule's solved triangles and its
//! output. Convolutions and norms are computed again: they cost no product.

use brightrun_kernels::ops::{
    Columns, ConvolutionBackward, ConvolutionForward, DELTA_CHUNK, DeltaBackward, DeltaForward, DeltaGatesBackward,
    DeltaGatesForward, DeltaInputsForward, GatedNormBackward, GatedNormForward, Write,
};
use brightrun_kernels::{Backend, DType, Tensor};

use crate::error::Result;
use crate::model::attention::{joined, reversed};
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
    inputs: Inputs<B>,
    gates: Gates<B>,
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

/// The parts of `in_proj_qkvz`'s output.
struct Inputs<B: Backend> {
    /// q, k and v before the convolution, activations `[T, channels]`.
    parts: [Tensor<B>; 3],
    /// Activation `[T, Hv, Dv]`.
    z: Tensor<B>,
}

/// The delta rule's gates.
struct Gates<B: Backend> {
    /// Activation `[T, Hv]`.
    a: Tensor<B>,
    /// f32 `[T, Hv]`.
    decay: Tensor<B>,
    /// f32 `[T, Hv]`.
    beta: Tensor<B>,
}

/// Convolved and normalised inputs of the delta rule.
struct Mixed<B: Backend> {
    q: Unit<B>,
    k: Unit<B>,
    /// Activation `[T, Hv, Dv]`.
    v: Tensor<B>,
}

/// l2-normalised heads.
struct Unit<B: Backend> {
    /// Before the norm, activation `[T, Hk, Dk]`.
    raw: Tensor<B>,
    /// f32 `[T·Hk]`.
    rnorm: Tensor<B>,
    /// Activation `[T, Hk, Dk]`.
    y: Tensor<B>,
}

impl<B: Backend> DeltaNet<B> {
    /// Its projections.
    pub fn linears(&self) -> [&Linear<B>; 3] {
        [&self.qkvz, &self.ba, &self.out]
    }

    /// Bytes a trace of this pass occupies.
    pub fn trace_bytes(&self, pass: &Pass<'_, B>) -> u64 {
        let values = self.value_heads * self.value_dim;
        let activations = self.qkvz.outputs() + values + self.value_heads;
        let floats = self.value_heads * (2 + DELTA_CHUNK);
        let bytes = activations * pass.dtype.size_bytes() + floats * DType::F32.size_bytes();
        (pass.tokens() * bytes) as u64 + pass.hidden_bytes(&self.linears())
    }

    /// `x` is the normalised layer input, activation `[T, C]`; gives `y` of the same shape and the trace.
    ///
    /// # Errors
    /// The backend's own.
    pub fn forward(&self, pass: &Pass<'_, B>, x: &Tensor<B>) -> Result<(Tensor<B>, DeltaTrace<B>)> {
        self.run(pass, x, None)
    }

    /// As [`DeltaNet::forward`] for a pass that keeps nothing: what lies between the projections is one op.
    ///
    /// # Errors
    /// The backend's own.
    pub fn output(&self, pass: &Pass<'_, B>, x: &Tensor<B>) -> Result<Tensor<B>> {
        let (fused, ba) = (self.qkvz.forward(pass, x)?.y, self.ba.forward(pass, x)?.y);
        let keys = [pass.tokens(), self.key_heads, self.key_dim];
        let values = [pass.tokens(), self.value_heads, self.value_dim];
        let (mut q, mut k) = (pass.activation(keys)?, pass.activation(keys)?);
        let (mut v, mut z) = (pass.activation(values)?, pass.activation(values)?);
        let gates = [pass.tokens(), self.value_heads];
        let (mut decay, mut beta) = (
            pass.device.alloc(DType::F32, gates)?,
            pass.device.alloc(DType::F32, gates)?,
        );
        pass.device.delta_inputs_forward(DeltaInputsForward {
            fused: &fused,
            ba: &ba,
            taps: self.taps.each_ref(),
            a_log: &self.a_log,
            dt_bias: &self.dt_bias,
            eps: L2_EPS,
            segments: pass.segments,
            q: &mut q,
            k: &mut k,
            v: &mut v,
            z: &mut z,
            decay: &mut decay,
            beta: &mut beta,
        })?;
        drop((fused, ba));
        let mut out = pass.activation(values)?;
        let mut solved = pass
            .device
            .alloc(DType::F32, [pass.tokens(), self.value_heads, DELTA_CHUNK])?;
        pass.device.delta_rule_forward(DeltaForward {
            q: &q,
            k: &k,
            v: &v,
            decay: &decay,
            beta: &beta,
            segments: pass.segments,
            scale: self.scale(),
            state: None,
            out: &mut out,
            solved: &mut solved,
        })?;
        drop((q, k, v, decay, beta, solved));
        let (normed, _) = self.normed(pass, &out, &z)?;
        drop((out, z));
        Ok(self.out.forward(pass, &joined(normed)?)?.y)
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
        Ok(self.run(pass, x, Some(state))?.0)
    }

    fn run(
        &self,
        pass: &Pass<'_, B>,
        x: &Tensor<B>,
        state: Option<&mut DeltaState<B>>,
    ) -> Result<(Tensor<B>, DeltaTrace<B>)> {
        let (convolution, delta) = match state {
            Some(state) => (Some(&mut state.convolution), Some(&mut state.delta)),
            None => (None, None),
        };
        let qkvz = self.qkvz.forward(pass, x)?;
        let inputs = self.inputs(pass, &qkvz.y)?;
        drop(qkvz.y);
        let ba = self.ba.forward(pass, x)?;
        let gates = self.gates(pass, &ba.y)?;
        drop(ba.y);
        let Mixed { q, k, v } = self.mixed(pass, &inputs.parts, convolution)?;
        let mut out = pass.activation(v.shape())?;
        let mut solved = pass
            .device
            .alloc(DType::F32, [pass.tokens(), self.value_heads, DELTA_CHUNK])?;
        pass.device.delta_rule_forward(DeltaForward {
            q: &q.y,
            k: &k.y,
            v: &v,
            decay: &gates.decay,
            beta: &gates.beta,
            segments: pass.segments,
            scale: self.scale(),
            state: delta,
            out: &mut out,
            solved: &mut solved,
        })?;
        drop((q, k, v));
        let (normed, _) = self.normed(pass, &out, &inputs.z)?;
        let projected = self.out.forward(pass, &joined(normed)?)?;
        let trace = DeltaTrace {
            inputs,
            gates,
            solved,
            out,
            qkvz_hidden: qkvz.hidden,
            ba_hidden: ba.hidden,
            out_hidden: projected.hidden,
        };
        Ok((projected.y, trace))
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

    fn inputs(&self, pass: &Pass<'_, B>, fused: &Tensor<B>) -> Result<Inputs<B>> {
        let [q, k, v, z] = self.qkvz_columns();
        Ok(Inputs {
            parts: [cut(pass, fused, q)?, cut(pass, fused, k)?, cut(pass, fused, v)?],
            z: self.value_heads_of(cut(pass, fused, z)?)?,
        })
    }

    fn gates(&self, pass: &Pass<'_, B>, fused: &Tensor<B>) -> Result<Gates<B>> {
        let [b, a] = self.ba_columns();
        let (b, a) = (cut(pass, fused, b)?, cut(pass, fused, a)?);
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
        Ok(Gates { a, decay, beta })
    }

    fn mixed(
        &self,
        pass: &Pass<'_, B>,
        parts: &[Tensor<B>; 3],
        states: Option<&mut [Tensor<B>; 3]>,
    ) -> Result<Mixed<B>> {
        let [q_state, k_state, v_state] = match states {
            Some(states) => states.each_mut().map(Some),
            None => [None, None, None],
        };
        let ([q, k, v], [q_taps, k_taps, v_taps]) = (parts, &self.taps);
        let q = convolved(pass, q, q_taps, q_state)?;
        let k = convolved(pass, k, k_taps, k_state)?;
        let v = convolved(pass, v, v_taps, v_state)?;
        Ok(Mixed {
            q: self.unit(pass, q)?,
            k: self.unit(pass, k)?,
            v: self.value_heads_of(v)?,
        })
    }

    /// l2-normalises each head of `[T, Hk·Dk]`.
    fn unit(&self, pass: &Pass<'_, B>, joined: Tensor<B>) -> Result<Unit<B>> {
        let rows = joined.shape().rows();
        let raw = joined.reshaped([rows, self.key_heads, self.key_dim])?;
        let mut y = pass.activation(raw.shape())?;
        let mut rnorm = pass.device.alloc(DType::F32, [raw.shape().rows()])?;
        pass.device.l2_norm_forward(&raw, L2_EPS, &mut y, &mut rnorm)?;
        Ok(Unit { raw, rnorm, y })
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
            inputs,
            gates,
            solved,
            out,
            qkvz_hidden,
            ba_hidden,
            out_hidden,
        } = trace;
        let inputs_matter = dx.is_some() || pass.adapts_any(&[self.qkvz.module, self.ba.module]);
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
        let (dqkv, dba) = self.rule_backward(pass, inputs.parts, gates, solved, dout)?;
        let [dq, dk, dv] = &dqkv;
        let dqkvz = fuse(
            pass,
            self.qkvz.outputs(),
            &[dq, dk, dv, &joined(dz)?],
            &self.qkvz_columns(),
        )?;
        drop(dqkv);
        let wanted = dx.as_deref_mut().map(|dx| (dx, Write::Overwrite));
        self.qkvz
            .backward(pass, gradients, (x, qkvz_hidden.as_ref()), &dqkvz, wanted)?;
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

    /// Back through the delta rule, the norms, the convolution and the gates: gradients of q, k and v as they were projected,
    /// and of `in_proj_ba`'s output.
    fn rule_backward(
        &self,
        pass: &Pass<'_, B>,
        parts: [Tensor<B>; 3],
        gates: Gates<B>,
        solved: Tensor<B>,
        dout: Tensor<B>,
    ) -> Result<([Tensor<B>; 3], Tensor<B>)> {
        let Mixed { q, k, v } = self.mixed(pass, &parts, None)?;
        let (mut dq, mut dk) = (pass.activation(q.y.shape())?, pass.activation(k.y.shape())?);
        let mut dv = pass.activation(v.shape())?;
        let mut ddecay = pass.device.alloc(DType::F32, gates.decay.shape())?;
        let mut dbeta = pass.device.alloc(DType::F32, gates.beta.shape())?;
        pass.device.delta_rule_backward(DeltaBackward {
            q: &q.y,
            k: &k.y,
            v: &v,
            decay: &gates.decay,
            beta: &gates.beta,
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
        drop((solved, dout, v));
        let (dq, dk) = (unit_backward(pass, q, dq)?, unit_backward(pass, k, dk)?);
        let ([q, k, v], [q_taps, k_taps, v_taps]) = (&parts, &self.taps);
        let gradients = [
            convolved_backward(pass, q, q_taps, &dq)?,
            convolved_backward(pass, k, k_taps, &dk)?,
            convolved_backward(pass, v, v_taps, &joined(dv)?)?,
        ];
        Ok((gradients, self.gates_backward(pass, &gates, &ddecay, &dbeta)?))
    }

    fn gates_backward(
        &self,
        pass: &Pass<'_, B>,
        gates: &Gates<B>,
        ddecay: &Tensor<B>,
        dbeta: &Tensor<B>,
    ) -> Result<Tensor<B>> {
        let (mut da, mut db) = (pass.activation(gates.a.shape())?, pass.activation(gates.a.shape())?);
        pass.device.delta_gates_backward(DeltaGatesBackward {
            a: &gates.a,
            a_log: &self.a_log,
            dt_bias: &self.dt_bias,
            beta: &gates.beta,
            ddecay,
            dbeta,
            da: &mut da,
            db: &mut db,
        })?;
        fuse(pass, self.ba.outputs(), &[&db, &da], &self.ba_columns())
    }
}

/// One part of a fused projection's output, `[T, groups · width]`.
fn cut<B: Backend>(pass: &Pass<'_, B>, fused: &Tensor<B>, columns: Columns) -> Result<Tensor<B>> {
    let mut part = pass.activation([fused.shape().rows(), columns.groups * columns.width])?;
    pass.device.copy_columns(fused, &mut part, columns)?;
    Ok(part)
}

/// The parts of a fused projection's gradient, put together: the way back of [`cut`].
fn fuse<B: Backend>(pass: &Pass<'_, B>, width: usize, parts: &[&Tensor<B>], columns: &[Columns]) -> Result<Tensor<B>> {
    let mut fused = pass.activation([pass.tokens(), width])?;
    for (part, columns) in parts.iter().zip(columns) {
        pass.device.copy_columns(part, &mut fused, reversed(*columns))?;
    }
    Ok(fused)
}

fn convolved<B: Backend>(
    pass: &Pass<'_, B>,
    x: &Tensor<B>,
    taps: &Tensor<B>,
    state: Option<&mut Tensor<B>>,
) -> Result<Tensor<B>> {
    let mut y = pass.activation(x.shape())?;
    pass.device.convolution_forward(ConvolutionForward {
        x,
        weight: taps,
        bias: None,
        segments: pass.segments,
        state,
        y: &mut y,
    })?;
    Ok(y)
}

fn convolved_backward<B: Backend>(
    pass: &Pass<'_, B>,
    x: &Tensor<B>,
    taps: &Tensor<B>,
    dy: &Tensor<B>,
) -> Result<Tensor<B>> {
    let mut dx = pass.activation(x.shape())?;
    pass.device.convolution_backward(ConvolutionBackward {
        x,
        weight: taps,
        bias: None,
        segments: pass.segments,
        dy,
        dx: &mut dx,
    })?;
    Ok(dx)
}

/// Gradient of the heads before their norm, `[T, Hk·Dk]`.
fn unit_backward<B: Backend>(pass: &Pass<'_, B>, unit: Unit<B>, dy: Tensor<B>) -> Result<Tensor<B>> {
    let mut dx = pass.activation(unit.raw.shape())?;
    pass.device.l2_norm_backward(&unit.raw, &unit.rnorm, &dy, &mut dx)?;
    joined(dx)
}
