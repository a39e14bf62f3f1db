//! Causal attention over packed documents, with grouped key/value heads.
//!
//! For query row `i` of a document, head `h`, key/value head `h · K / H`, and the rows `j ≤ i + (keys − queries)` of the
//! same document (bottom-right aligned, so that with more keys than queries the queries are the last positions):
//!
//! ```text
//! s_ij = scale · q_i · k_j      p_ij = exp(s_ij − lse_i)      o_i = Σ_j p_ij v_j      lse_i = log Σ_j exp(s_ij)
//!
//! δ_i  = do_i · o_i             ds_ij = p_ij (do_i · v_j − δ_i)
//! dq_i = scale Σ_j ds_ij k_j    dk_j = scale Σ_i ds_ij q_i       dv_j = Σ_i p_ij do_i
//! ```
//!
//! Scores are never materialised for a whole document (Dao 2023, arXiv 2307.08691). A query row with no visible key gives 0
//! and `lse = −∞`.

use crate::error::Result;
use crate::ops::Device;
use crate::tensor::{Segments, Tensor};

/// Arguments of [`AttentionOps::attention_forward`].
pub struct AttentionForward<'a, D: Device> {
    /// Activation `[Tq, H, D]`.
    pub q: &'a Tensor<D>,
    /// Activation `[≥ Tk, K, D]`; rows beyond the last key segment are ignored.
    pub k: &'a Tensor<D>,
    /// Activation `[≥ Tk, K, D]`.
    pub v: &'a Tensor<D>,
    /// Documents of `q`; `Tq` is their total.
    pub query_segments: &'a Segments,
    /// Documents of `k` and `v`: as many as of `q`, none shorter.
    pub key_segments: &'a Segments,
    /// Factor of the scores, usually `1 / sqrt(D)`.
    pub scale: f32,
    /// Precision of the products.
    pub precision: super::Precision,
    /// Out: activation `[Tq, H, D]`.
    pub out: &'a mut Tensor<D>,
    /// Out: f32 `[Tq, H]`, natural logarithm.
    pub lse: &'a mut Tensor<D>,
}

/// Arguments of [`AttentionOps::attention_backward`]; queries and keys have the same documents.
pub struct AttentionBackward<'a, D: Device> {
    /// Activation `[T, H, D]`.
    pub q: &'a Tensor<D>,
    /// Activation `[T, K, D]`.
    pub k: &'a Tensor<D>,
    /// Activation `[T, K, D]`.
    pub v: &'a Tensor<D>,
    /// Forward output `[T, H, D]`.
    pub out: &'a Tensor<D>,
    /// Forward `lse`, f32 `[T, H]`.
    pub lse: &'a Tensor<D>,
    /// Gradient of the output `[T, H, D]`.
    pub dout: &'a Tensor<D>,
    /// Documents.
    pub segments: &'a Segments,
    /// Factor of the scores.
    pub scale: f32,
    /// Precision of the products.
    pub precision: super::Precision,
    /// Out: `[T, H, D]`.
    pub dq: &'a mut Tensor<D>,
    /// Out: `[T, K, D]`, summed over the query heads of the group.
    pub dk: &'a mut Tensor<D>,
    /// Out: `[T, K, D]`.
    pub dv: &'a mut Tensor<D>,
}

/// Variable-length causal attention.
pub trait AttentionOps: Device {
    /// Writes `out` and `lse`. Softmax in f32. Any `D`; `H` is a multiple of `K`.
    ///
    /// # Errors
    /// Shapes or dtypes outside the contract.
    fn attention_forward(&self, call: AttentionForward<'_, Self>) -> Result<()>;

    /// Writes `dq`, `dk`, `dv`; probabilities are recomputed from `lse`.
    ///
    /// # Errors
    /// Shapes or dtypes outside the contract.
    fn attention_backward(&self, call: AttentionBackward<'_, Self>) -> Result<()>;
}
