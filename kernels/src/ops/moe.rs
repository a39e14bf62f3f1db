//! Mixture of experts: a frozen router sends each token to its `k` best of `E` frozen experts, each with an adapter of its
//! own if wanted. All tensors of the routing stay on the device: no expert waits for the host.
//!
//! *Routing.* With `z = logits[t]` and `p = softmax(z)` over all experts:
//!
//! ```text
//! chosen = the k experts with the largest z, largest first; of equals the lower index
//! w_j    = p_chosen(j)                       or, renormalised, p_chosen(j) / Σ_i p_chosen(i)
//!
//! plain:         dz_e = p_e (g_e − Σ_j p_chosen(j) dw_j)      g_chosen(j) = dw_j, elsewhere 0
//! renormalised:  dz_chosen(j) = w_j (dw_j − Σ_i w_i dw_i)     elsewhere 0
//! ```
//!
//! The choice itself has no gradient. The router is frozen, but what flows through `dz` reaches the hidden state.
//!
//! *Grouped rows.* The `M = T · k` pairs of a token and one of its experts are the **slots** `s = t · k + j`. Ordered by
//! expert, and within an expert by slot, they are the **grouped rows** of the expert ops: expert `e` owns rows
//! `offsets[e]..offsets[e + 1]`, so its matrix is read once for all its tokens.
//!
//! *The expert layer* of Qwen3-MoE and Qwen3-Next, `y_t = Σ_j w_tj · down_e(silu(gate_e(x_t)) · up_e(x_t))`, is
//!
//! ```text
//! gate = grouped_linear(x by token)     up = grouped_linear(x by token)      [M, F]
//! a    = w · silu(gate) · up            routed_swiglu                        [M, F]
//! rows = grouped_linear(a)              down                                 [M, C]
//! y_t  = Σ_j rows[row of slot t·k + j]  combine                              [T, C]
//! ```
//!
//! The routing weight multiplies the activation *before* the down projection, which is linear, adapter included, so nothing
//! changes but rounding. What it buys: the gradient of `w` is `⟨da, silu(gate) · up⟩`, which needs neither the rows of `down`
//! nor recomputing them (Guo et al. 2025, SonicMoE, arXiv 2512.14080, use the same identity), and the gradient of those rows
//! is `dy` itself, read by token and never written.
//!
//! ```text
//! da        = grouped_linear_backward(dy by token)        down
//! dgate, dup, dw = routed_swiglu_backward(da)
//! drows     = grouped_linear_backward(dgate) + grouped_linear_backward(dup)
//! dx_t     += Σ_j drows[row of slot t·k + j]              combine
//! dlogits   = route_backward(dw), and from there linear_backward of the router
//! ```

use super::moe_parts as parts;
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::{ActivationOps, Device, GateOps, Precision, Write};
use crate::stack::WeightStack;
use crate::tensor::Tensor;
use crate::weight::Weight;

/// Where each token goes, as [`MoeOps::route`] writes it and every other op here reads it.
#[derive(Debug)]
pub struct Routing<D: Device> {
    /// i32 `[T, k]`: the experts of each token, the most probable first.
    pub experts: Tensor<D>,
    /// f32 `[T, k]`: their weights `w`.
    pub weights: Tensor<D>,
    /// i32 `[M]`: the slot of each grouped row. Its token is `slots[m] / k`.
    pub slots: Tensor<D>,
    /// i32 `[M]`: the grouped row of each slot; the inverse of `slots`.
    pub rows: Tensor<D>,
    /// i32 `[E + 1]`: where each expert's grouped rows begin. Differences are the number of tokens per expert, for the
    /// balance of the routing.
    pub offsets: Tensor<D>,
}

impl<D: Device> Routing<D> {
    /// Room for the routing of `tokens` tokens to `top` of `experts` experts each.
    ///
    /// # Errors
    /// As [`Device::alloc`].
    pub fn alloc(device: &D, tokens: usize, experts: usize, top: usize) -> Result<Self> {
        Ok(Self {
            experts: device.alloc(DType::I32, [tokens, top])?,
            weights: device.alloc(DType::F32, [tokens, top])?,
            slots: device.alloc(DType::I32, [tokens * top])?,
            rows: device.alloc(DType::I32, [tokens * top])?,
            offsets: device.alloc(DType::I32, [experts + 1])?,
        })
    }

    /// Bytes of all its tensors: `16 · T · k + 4 · (E + 1)`.
    pub fn size_bytes(&self) -> usize {
        [&self.experts, &self.weights, &self.slots, &self.rows, &self.offsets]
            .iter()
            .map(|tensor| tensor.size_bytes())
            .sum()
    }
}

/// Arguments of [`MoeOps::route_backward`].
pub struct RouteBackward<'a, D: Device> {
    /// f32 `[T, E]`: the forward input.
    pub logits: &'a Tensor<D>,
    /// What [`MoeOps::route`] made of it.
    pub routing: &'a Routing<D>,
    /// As in the forward pass.
    pub renormalise: bool,
    /// f32 `[T, k]`: gradient of the weights.
    pub dweights: &'a Tensor<D>,
    /// Out: f32 `[T, E]`.
    pub dlogits: &'a mut Tensor<D>,
}

/// How the rows of an operand are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RowOrder {
    /// The operand has `T` rows, one per token; grouped row `m` reads row `slots[m] / k`.
    Token,
    /// The operand has `M` rows, in grouped order.
    Grouped,
}

/// The adapters of all experts of one projection, going forward.
///
/// PEFT keeps the same numbers as `lora_A` `[R·E, I]`, expert-major, which is `a` byte for byte, and `lora_B` `[O, R·E]` with
/// the expert index fastest: `b[e][o][r] = lora_B[o][r · E + e]`. Where PEFT has one adapter on the fused `gate_up_proj`, its
/// `a` is given to both the gate's and the up projection's op, and its `lora_B` is cut in two along `O`.
pub struct GroupedLoraForward<'a, D: Device> {
    /// f32 `[E, R, I]`.
    pub a: &'a Tensor<D>,
    /// f32 `[E, O, R]`.
    pub b: &'a Tensor<D>,
    /// `s = alpha / R`.
    pub scale: f32,
    /// Out: `u`, f32 `[M, R]`; the backward pass needs it.
    pub hidden: &'a mut Tensor<D>,
}

/// Arguments of [`MoeOps::grouped_linear_forward`].
pub struct GroupedLinearForward<'a, D: Device> {
    /// Activation `[T, I]` or `[M, I]`.
    pub x: &'a Tensor<D>,
    /// Which of the two.
    pub x_order: RowOrder,
    /// Whose row is whose.
    pub routing: &'a Routing<D>,
    /// Frozen `[E, O, I]`.
    pub weight: &'a WeightStack<D>,
    /// The adapters, if this projection has them.
    pub lora: Option<GroupedLoraForward<'a, D>>,
    /// Precision of the products.
    pub precision: Precision,
    /// Out: activation `[M, O]`.
    pub y: &'a mut Tensor<D>,
}

/// The adapters of all experts of one projection, going backward.
pub struct GroupedLoraBackward<'a, D: Device> {
    /// The layer's input, activation `[T, I]` or `[M, I]`.
    pub x: &'a Tensor<D>,
    /// Which of the two.
    pub x_order: RowOrder,
    /// f32 `[E, R, I]`.
    pub a: &'a Tensor<D>,
    /// f32 `[E, O, R]`.
    pub b: &'a Tensor<D>,
    /// `s = alpha / R`.
    pub scale: f32,
    /// `u` of the forward pass, f32 `[M, R]`.
    pub hidden: &'a Tensor<D>,
    /// In and out: dA is **added** here, f32 `[E, R, I]`.
    pub gradient_a: &'a mut Tensor<D>,
    /// In and out: dB is **added** here, f32 `[E, O, R]`.
    pub gradient_b: &'a mut Tensor<D>,
}

/// Arguments of [`MoeOps::grouped_linear_backward`].
pub struct GroupedLinearBackward<'a, D: Device> {
    /// Gradient of the output, activation `[T, O]` or `[M, O]`.
    pub dy: &'a Tensor<D>,
    /// Which of the two.
    pub dy_order: RowOrder,
    /// Whose row is whose.
    pub routing: &'a Routing<D>,
    /// Frozen `[E, O, I]`.
    pub weight: &'a WeightStack<D>,
    /// The adapters, if this projection has them.
    pub lora: Option<GroupedLoraBackward<'a, D>>,
    /// Precision of the products.
    pub precision: Precision,
    /// Gradient of the input's grouped rows, activation `[M, I]`, and how it is written; `None` where nothing below is
    /// trained.
    pub dx: Option<(&'a mut Tensor<D>, Write)>,
}

/// Arguments of [`MoeOps::grouped_swiglu_forward`].
pub struct GroupedSwigluForward<'a, D: Device> {
    /// Activation `[T, I]`, read by token.
    pub x: &'a Tensor<D>,
    /// Whose row is whose, and the weights.
    pub routing: &'a Routing<D>,
    /// Frozen `[E, F, I]`.
    pub gate: &'a WeightStack<D>,
    /// Frozen `[E, F, I]`, encoded as `gate`.
    pub up: &'a WeightStack<D>,
    /// The adapter of both projections: its `b` is `[E, 2·F, R]`, the gate's rows over those of the up projection.
    pub lora: Option<GroupedLoraForward<'a, D>>,
    /// Precision of the products.
    pub precision: Precision,
    /// Out: both projections, activations `[M, F]`; `None` where no backward pass will ask for them.
    pub wide: Option<(&'a mut Tensor<D>, &'a mut Tensor<D>)>,
    /// Out: activation `[M, F]`; `None` where only the projections are wanted.
    pub y: Option<&'a mut Tensor<D>>,
}

/// Arguments of [`MoeOps::grouped_pair_backward`].
pub struct GroupedPairBackward<'a, D: Device> {
    /// Gradients of both projections, activations `[M, F]`.
    pub dgate: &'a Tensor<D>,
    /// As `dgate`.
    pub dup: &'a Tensor<D>,
    /// Whose row is whose.
    pub routing: &'a Routing<D>,
    /// Frozen `[E, F, I]`.
    pub gate: &'a WeightStack<D>,
    /// Frozen `[E, F, I]`, encoded as `gate`.
    pub up: &'a WeightStack<D>,
    /// The adapter of both projections, `b` and `gradient_b` as [`GroupedSwigluForward::lora`] has `b`.
    pub lora: Option<GroupedLoraBackward<'a, D>>,
    /// Precision of the products.
    pub precision: Precision,
    /// Out: gradient of the input's grouped rows, activation `[M, I]`; `None` where nothing below is trained.
    pub dx: Option<&'a mut Tensor<D>>,
}

/// Arguments of [`MoeOps::combine_residual`].
pub struct CombineResidual<'a, D: Device> {
    /// Activation `[M, C]`.
    pub grouped: &'a Tensor<D>,
    /// Whose row is whose.
    pub routing: &'a Routing<D>,
    /// What the expert that every token visits gave, activation `[T, C]`, and its gate before the logistic function,
    /// `[T, 1]`.
    pub shared: Option<(&'a Tensor<D>, &'a Tensor<D>)>,
    /// In and out: the residual stream, activation `[T, C]`.
    pub x: &'a mut Tensor<D>,
}

/// Arguments of [`MoeOps::routed_swiglu_backward`].
pub struct RoutedSwigluBackward<'a, D: Device> {
    /// Activation `[M, F]`: the forward input.
    pub gate: &'a Tensor<D>,
    /// Activation `[M, F]`: the forward input.
    pub up: &'a Tensor<D>,
    /// Whose row is whose, and the weights.
    pub routing: &'a Routing<D>,
    /// Gradient of the output, activation `[M, F]`.
    pub dy: &'a Tensor<D>,
    /// Out: activation `[M, F]`.
    pub dgate: &'a mut Tensor<D>,
    /// Out: activation `[M, F]`.
    pub dup: &'a mut Tensor<D>,
    /// Out: f32 `[T, k]`, gradient of the routing weights.
    pub dweights: &'a mut Tensor<D>,
}

/// Mixture of experts. An expert without a token costs nothing, and its adapter's gradients are left as they are.
pub trait MoeOps: Device {
    /// Chooses experts and weights from `logits`, f32 `[T, E]`, and groups the rows. Softmax in f32 or wider. The logits
    /// decide, not the rounded probabilities; NaN counts as larger than any number and makes its token's weights NaN.
    ///
    /// # Errors
    /// Shapes or dtypes outside the contract; `k` not in `1..=E`.
    fn route(&self, logits: &Tensor<Self>, renormalise: bool, routing: &mut Routing<Self>) -> Result<()>;

    /// Gradient of the logits; see the module's formula. Probabilities are recomputed.
    ///
    /// # Errors
    /// Shapes or dtypes outside the contract; a routing that [`MoeOps::route`] did not write.
    fn route_backward(&self, call: RouteBackward<'_, Self>) -> Result<()>;

    /// `y_m = x_m · W_eᵀ + s · (x_m · A_eᵀ) · B_eᵀ` for every grouped row `m` of every expert `e`, also writing
    /// `u_m = x_m · A_eᵀ`. Bytes: the matrices of the experts that have tokens once, `x` and `y` once per slot.
    ///
    /// # Errors
    /// Shapes or dtypes outside the contract; a routing that [`MoeOps::route`] did not write.
    fn grouped_linear_forward(&self, call: GroupedLinearForward<'_, Self>) -> Result<()>;

    /// `dx_m = dy_m · W_e + s · (dy_m · B_e) · A_e`, `dA_e += s · Σ_m (dy_m · B_e)ᵀ · x_m`, `dB_e += s · Σ_m dy_mᵀ · u_m`,
    /// the sums over the expert's rows in their order.
    ///
    /// # Errors
    /// Shapes or dtypes outside the contract; a routing that [`MoeOps::route`] did not write.
    fn grouped_linear_backward(&self, call: GroupedLinearBackward<'_, Self>) -> Result<()>;

    /// `y_m = w_m · silu(gate_m) · up_m`, all `[M, F]`, with `w_m` the weight of the row's slot.
    ///
    /// # Errors
    /// Shapes or dtypes outside the contract; a routing that [`MoeOps::route`] did not write.
    fn routed_swiglu_forward(
        &self,
        gate: &Tensor<Self>,
        up: &Tensor<Self>,
        routing: &Routing<Self>,
        y: &mut Tensor<Self>,
    ) -> Result<()>;

    /// Writes `dgate`, `dup` and `dw_m = ⟨dy_m, silu(gate_m) · up_m⟩` at the row's slot.
    ///
    /// # Errors
    /// Shapes or dtypes outside the contract; a routing that [`MoeOps::route`] did not write.
    fn routed_swiglu_backward(&self, call: RoutedSwigluBackward<'_, Self>) -> Result<()>;

    /// `y_t = Σ_j grouped[row of slot t·k + j]`, in the order of `j`: `grouped` is `[M, C]`, `y` `[T, C]`, both activations.
    ///
    /// # Errors
    /// Shapes or dtypes outside the contract; a routing that [`MoeOps::route`] did not write.
    fn combine(
        &self,
        grouped: &Tensor<Self>,
        routing: &Routing<Self>,
        y: &mut Tensor<Self>,
        write: Write,
    ) -> Result<()>;

    /// Both wide projections of a layer of experts and the activation behind them: [`MoeOps::grouped_linear_forward`] of `gate`
    /// and of `up`, then [`MoeOps::routed_swiglu_forward`] of what these gave as they would be stored. The two share `u`.
    ///
    /// A backend with a kernel for it writes only what is asked for, once.
    ///
    /// # Errors
    /// Shapes or dtypes outside the contract; a routing that [`MoeOps::route`] did not write.
    fn grouped_swiglu_forward(&self, call: GroupedSwigluForward<'_, Self>) -> Result<()>
    where
        Self: GateOps,
    {
        parts::swiglu_forward(self, call)
    }

    /// The way back through both wide projections: `dx_m = dgate_m · G_e + dup_m · U_e` with the adapter's part,
    /// [`MoeOps::grouped_linear_backward`] of each, added up.
    ///
    /// # Errors
    /// Shapes or dtypes outside the contract; a routing that [`MoeOps::route`] did not write.
    fn grouped_pair_backward(&self, call: GroupedPairBackward<'_, Self>) -> Result<()>
    where
        Self: GateOps,
    {
        parts::pair_backward(self, call)
    }

    /// `x_t += Σ_j grouped[row of slot t·k + j] + σ(gate_t) · shared_t`: what a mixture of experts gives, added to the residual
    /// stream. The sum is [`MoeOps::combine`]'s, then the shared expert's part, then `x`.
    ///
    /// # Errors
    /// Shapes or dtypes outside the contract; a routing that [`MoeOps::route`] did not write.
    fn combine_residual(&self, call: CombineResidual<'_, Self>) -> Result<()>
    where
        Self: GateOps + ActivationOps,
    {
        parts::combine_residual(self, call)
    }

    /// Copies one expert's matrix to its place in a stack of the same shape and encoding.
    ///
    /// # Errors
    /// Another shape or encoding than the stack's; an expert beyond its end.
    fn stack_expert(&self, weight: &Weight<Self>, expert: usize, stack: &mut WeightStack<Self>) -> Result<()>;
}
