//! The gated delta rule (Yang, Kautz & Hatamizadeh 2024, arXiv 2412.06464): linear attention whose state forgets and
//! corrects itself.
//!
//! Per document and value head `h`, with key head `h · Hk / Hv`, a state `S` of `[Dk, Dv]` that starts at zero, log decay `g ≤ 0`
//! and strength `β`:
//!
//! ```text
//! S  ← e^{g_t} S
//! S  ← S + k_tᵀ β_t (v_t − k_t S)
//! o_t = scale · q_t S
//! ```
//!
//! # Chunks
//! Token by token this is bound by reading and writing `S`. A chunk of [`DELTA_CHUNK`] tokens of one document (its last chunk
//! may be shorter) does it with small matrix products, in the WY form (Yang et al. 2024, arXiv 2406.06484). With the cumulated
//! decay of the chunk `c_i = Σ_{j ≤ i} g_j`, all differences taken before `exp` so that nothing overflows:
//!
//! ```text
//! L_ij = β_i (k_i · k_j) e^{c_i − c_j}                    j < i        A = (I + L)⁻¹
//! r_i  = β_i (v_i − e^{c_i} k_i S)                        u = A r      the corrected values
//! P_ij = (q_i · k_j) e^{c_i − c_j}                        j ≤ i
//! o    = scale · (e^{c_i} q_i S + P u)
//! S'   = e^{c_n} S + Σ_i (e^{c_n − c_i} k_i)ᵀ u_i
//! ```
//!
//! # Saved and recomputed
//! Saved for the backward pass: its inputs and `A`, the solved triangle of each chunk. Recomputed: the states at the chunks'
//! beginnings and `u`, document by document and head by head; then a reverse pass carries `dS` from chunk to chunk.
//!
//! # Generation
//! `state` takes in and gives out the state of every document, so a prompt is one call, and each further token of `n` sequences
//! is a call with `n` documents of one token, for which the chunk form is the recurrence itself. Training passes `None`.
//!
//! # Gates
//! ```text
//! g  = −exp(A_log) · softplus(a + dt_bias)      da = dg · (−exp(A_log)) · σ(a + dt_bias)
//! β  = σ(b)                                     db = dβ · β (1 − β)
//! ```

use crate::error::Result;
use crate::ops::{ConvolutionOps, Device, GateOps, delta_parts};
use crate::tensor::{Segments, Tensor};

/// Tokens of a chunk: `A` has rows of this many elements. The size used by the method's authors and every peer.
pub const DELTA_CHUNK: usize = 64;

/// Arguments of [`DeltaOps::delta_rule_forward`].
pub struct DeltaForward<'a, D: Device> {
    /// Activation `[T, Hk, Dk]`, l2-normalised where the model wants it ([`GateOps::l2_norm_forward`](super::GateOps::l2_norm_forward)).
    pub q: &'a Tensor<D>,
    /// Activation `[T, Hk, Dk]`, likewise.
    pub k: &'a Tensor<D>,
    /// Activation `[T, Hv, Dv]`; `Hv` is a multiple of `Hk`.
    pub v: &'a Tensor<D>,
    /// `g`, f32 `[T, Hv]`, natural logarithm, at most 0.
    pub decay: &'a Tensor<D>,
    /// `β`, f32 `[T, Hv]`.
    pub beta: &'a Tensor<D>,
    /// Documents.
    pub segments: &'a Segments,
    /// Factor of the output, usually `1 / sqrt(Dk)`.
    pub scale: f32,
    /// In and out: the state of each document before its first and after its last token, f32 `[documents, Hv, Dk, Dv]`.
    /// `None`: zero at every beginning, and not kept.
    pub state: Option<&'a mut Tensor<D>>,
    /// Out: activation `[T, Hv, Dv]`.
    pub out: &'a mut Tensor<D>,
    /// Out: `A`, f32 `[T, Hv, 64]`: row `i` of its chunk's matrix, 0 beyond the diagonal.
    pub solved: &'a mut Tensor<D>,
}

/// Arguments of [`DeltaOps::delta_rule_backward`], for a forward pass whose documents started at zero.
pub struct DeltaBackward<'a, D: Device> {
    /// Activation `[T, Hk, Dk]`.
    pub q: &'a Tensor<D>,
    /// Activation `[T, Hk, Dk]`.
    pub k: &'a Tensor<D>,
    /// Activation `[T, Hv, Dv]`.
    pub v: &'a Tensor<D>,
    /// f32 `[T, Hv]`.
    pub decay: &'a Tensor<D>,
    /// f32 `[T, Hv]`.
    pub beta: &'a Tensor<D>,
    /// Forward `A`, f32 `[T, Hv, 64]`.
    pub solved: &'a Tensor<D>,
    /// Gradient of the output, activation `[T, Hv, Dv]`.
    pub dout: &'a Tensor<D>,
    /// Documents.
    pub segments: &'a Segments,
    /// Factor of the output.
    pub scale: f32,
    /// Out: `[T, Hk, Dk]`, summed over the value heads of the group.
    pub dq: &'a mut Tensor<D>,
    /// Out: `[T, Hk, Dk]`, likewise.
    pub dk: &'a mut Tensor<D>,
    /// Out: `[T, Hv, Dv]`.
    pub dv: &'a mut Tensor<D>,
    /// Out: f32 `[T, Hv]`.
    pub ddecay: &'a mut Tensor<D>,
    /// Out: f32 `[T, Hv]`.
    pub dbeta: &'a mut Tensor<D>,
}

/// Arguments of [`DeltaOps::delta_gates_forward`]; `N` is `Hv`.
pub struct DeltaGatesForward<'a, D: Device> {
    /// Activation `[T, N]`.
    pub a: &'a Tensor<D>,
    /// Activation `[T, N]`.
    pub b: &'a Tensor<D>,
    /// Frozen f32 or bf16 `[N]`.
    pub a_log: &'a Tensor<D>,
    /// Frozen f32 or bf16 `[N]`.
    pub dt_bias: &'a Tensor<D>,
    /// Out: `g`, f32 `[T, N]`.
    pub decay: &'a mut Tensor<D>,
    /// Out: `β`, f32 `[T, N]`.
    pub beta: &'a mut Tensor<D>,
}

/// Arguments of [`DeltaOps::delta_gates_backward`].
pub struct DeltaGatesBackward<'a, D: Device> {
    /// Activation `[T, N]`.
    pub a: &'a Tensor<D>,
    /// Frozen f32 or bf16 `[N]`.
    pub a_log: &'a Tensor<D>,
    /// Frozen f32 or bf16 `[N]`.
    pub dt_bias: &'a Tensor<D>,
    /// Forward `β`, f32 `[T, N]`.
    pub beta: &'a Tensor<D>,
    /// f32 `[T, N]`.
    pub ddecay: &'a Tensor<D>,
    /// f32 `[T, N]`.
    pub dbeta: &'a Tensor<D>,
    /// Out: activation `[T, N]`.
    pub da: &'a mut Tensor<D>,
    /// Out: activation `[T, N]`.
    pub db: &'a mut Tensor<D>,
}

/// Arguments of [`DeltaOps::delta_inputs_forward`]; `G = Hv / Hk`.
pub struct DeltaInputsForward<'a, D: Device> {
    /// Activation `[T, Hk·(2·Dk + 2·G·Dv)]`: for each key head its query, its key, and its value heads' values and `z`.
    pub fused: &'a Tensor<D>,
    /// Activation `[T, 2·Hv]`: for each key head `b` of its value heads, and then `a`.
    pub ba: &'a Tensor<D>,
    /// The convolution's parts for q, k and v, f32 or bf16 `[channels, K]`.
    pub taps: [&'a Tensor<D>; 3],
    /// Frozen f32 or bf16 `[Hv]`.
    pub a_log: &'a Tensor<D>,
    /// Frozen f32 or bf16 `[Hv]`.
    pub dt_bias: &'a Tensor<D>,
    /// Added to the sum of squares of a head of q or k.
    pub eps: f32,
    /// Documents, none of which has a past.
    pub segments: &'a Segments,
    /// Out: activation `[T, Hk, Dk]`, convolved and of length 1 in each head.
    pub q: &'a mut Tensor<D>,
    /// Out: as `q`.
    pub k: &'a mut Tensor<D>,
    /// Out: activation `[T, Hv, Dv]`, convolved.
    pub v: &'a mut Tensor<D>,
    /// Out: activation `[T, Hv, Dv]`, as it is.
    pub z: &'a mut Tensor<D>,
    /// Out: f32 `[T, Hv]`.
    pub decay: &'a mut Tensor<D>,
    /// Out: f32 `[T, Hv]`.
    pub beta: &'a mut Tensor<D>,
}

/// Arguments of [`DeltaOps::delta_inputs_backward`]; those of the forward pass are what it had.
pub struct DeltaInputsBackward<'a, D: Device> {
    /// See [`DeltaInputsForward::fused`].
    pub fused: &'a Tensor<D>,
    /// See [`DeltaInputsForward::ba`].
    pub ba: &'a Tensor<D>,
    /// See [`DeltaInputsForward::taps`].
    pub taps: [&'a Tensor<D>; 3],
    /// Frozen f32 or bf16 `[Hv]`.
    pub a_log: &'a Tensor<D>,
    /// Frozen f32 or bf16 `[Hv]`.
    pub dt_bias: &'a Tensor<D>,
    /// Added to the sum of squares of a head of q or k.
    pub eps: f32,
    /// Documents, none of which has a past.
    pub segments: &'a Segments,
    /// Forward `β`, f32 `[T, Hv]`.
    pub beta: &'a Tensor<D>,
    /// Activation `[T, Hk, Dk]`.
    pub dq: &'a Tensor<D>,
    /// Activation `[T, Hk, Dk]`.
    pub dk: &'a Tensor<D>,
    /// Activation `[T, Hv, Dv]`.
    pub dv: &'a Tensor<D>,
    /// Activation `[T, Hv, Dv]`.
    pub dz: &'a Tensor<D>,
    /// f32 `[T, Hv]`.
    pub ddecay: &'a Tensor<D>,
    /// f32 `[T, Hv]`.
    pub dbeta: &'a Tensor<D>,
    /// Out: as `fused`.
    pub dfused: &'a mut Tensor<D>,
    /// Out: as `ba`.
    pub dba: &'a mut Tensor<D>,
}

/// Gated DeltaNet's recurrence.
pub trait DeltaOps: Device {
    /// Writes `out`, `solved` and, if given, the final `state`. Factors enter products in the activations' dtype; the state, the
    /// cumulated decay and all sums are f32 or wider.
    ///
    /// # Errors
    /// Shapes or dtypes outside the contract.
    fn delta_rule_forward(&self, call: DeltaForward<'_, Self>) -> Result<()>;

    /// Writes `dq`, `dk`, `dv`, `ddecay`, `dbeta`.
    ///
    /// # Errors
    /// Shapes or dtypes outside the contract.
    fn delta_rule_backward(&self, call: DeltaBackward<'_, Self>) -> Result<()>;

    /// Writes `decay` and `beta`; see the module's formula.
    ///
    /// # Errors
    /// Shapes or dtypes outside the contract.
    fn delta_gates_forward(&self, call: DeltaGatesForward<'_, Self>) -> Result<()>;

    /// Writes `da` and `db`.
    ///
    /// # Errors
    /// Shapes or dtypes outside the contract.
    fn delta_gates_backward(&self, call: DeltaGatesBackward<'_, Self>) -> Result<()>;

    /// Everything between the input projections and the delta rule: the projections cut apart ([`GateOps::copy_columns`]),
    /// [`ConvolutionOps::convolution_forward`] of q, k and v, [`GateOps::l2_norm_forward`] of the heads of q and k, and
    /// [`DeltaOps::delta_gates_forward`].
    ///
    /// # Errors
    /// Shapes or dtypes outside the contract.
    fn delta_inputs_forward(&self, call: DeltaInputsForward<'_, Self>) -> Result<()>
    where
        Self: GateOps + ConvolutionOps,
    {
        delta_parts::inputs_forward(self, call)
    }

    /// The way back of [`DeltaOps::delta_inputs_forward`], which computes again what it needs of it: writes `dfused` and `dba`.
    /// [`GateOps::l2_norm_backward`], [`ConvolutionOps::convolution_backward`] and [`DeltaOps::delta_gates_backward`], and their
    /// results put together as the projections have them.
    ///
    /// # Errors
    /// Shapes or dtypes outside the contract.
    fn delta_inputs_backward(&self, call: DeltaInputsBackward<'_, Self>) -> Result<()>
    where
        Self: GateOps + ConvolutionOps,
    {
        delta_parts::inputs_backward(self, call)
    }
}
