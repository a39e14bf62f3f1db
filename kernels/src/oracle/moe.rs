//! Mixture of experts; formulas in [`MoeOps`](crate::ops::MoeOps). Grouped rows are plain lists here: row `m` is of slot
//! `slots[m]` and belongs to expert `experts[m]`.

use super::{Layer, LinearGradients, Real, linear_backward, linear_forward, swiglu_backward, swiglu_forward};

/// Where the slots of all tokens go.
#[derive(Clone, Debug)]
pub struct Route<N> {
    /// `[T, k]`.
    pub experts: Vec<usize>,
    /// `[T, k]`.
    pub weights: Vec<N>,
    /// `[M]`: slots ordered by expert, and within one as they come.
    pub slots: Vec<usize>,
}

impl<N: Real> Route<N> {
    /// The expert of each grouped row.
    pub fn row_experts(&self) -> Vec<usize> {
        self.slots.iter().map(|slot| self.experts[*slot]).collect()
    }
}

fn softmax<N: Real>(logits: &[N]) -> Vec<N> {
    let largest = logits.iter().copied().fold(logits[0], |a, b| if b > a { b } else { a });
    let powers: Vec<N> = logits.iter().map(|z| (*z - largest).exp()).collect();
    let sum = N::sum(powers.iter().copied());
    powers.into_iter().map(|power| power / sum).collect()
}

/// Routes rows of `experts` logits to `top` experts each.
pub fn route<N: Real>(logits: &[N], experts: usize, top: usize, renormalise: bool) -> Route<N> {
    let (mut chosen, mut weights) = (Vec::new(), Vec::new());
    for logits in logits.chunks_exact(experts) {
        let mut order: Vec<usize> = (0..experts).collect();
        // A stable sort leaves equals in the order of their indices.
        // Adding zero makes −0 and 0 equal.
        let key = |expert: &usize| logits[*expert].get() + 0.0;
        order.sort_by(|a, b| key(b).total_cmp(&key(a)));
        let p = softmax(logits);
        let best = order.iter().take(top).map(|expert| p[*expert]);
        let sum = if renormalise { N::sum(best.clone()) } else { N::new(1.0) };
        weights.extend(best.map(|p| p / sum));
        chosen.extend(order.into_iter().take(top));
    }
    let mut slots: Vec<usize> = (0..chosen.len()).collect();
    slots.sort_by_key(|slot| chosen[*slot]);
    Route {
        experts: chosen,
        weights,
        slots,
    }
}

/// `dlogits`, by the rules of the quotient and of softmax.
pub fn route_backward<N: Real>(
    logits: &[N],
    route: &Route<N>,
    experts: usize,
    renormalise: bool,
    dweights: &[N],
) -> Vec<N> {
    let tokens = logits.len() / experts;
    let top = route.experts.len() / tokens.max(1);
    let mut dlogits = Vec::new();
    for (t, logits) in logits.chunks_exact(experts).enumerate() {
        let p = softmax(logits);
        let (chosen, dw) = (&route.experts[t * top..][..top], &dweights[t * top..][..top]);
        let sum = N::sum(chosen.iter().map(|expert| p[*expert]));
        let mut dp = vec![N::new(0.0); experts];
        for (j, expert) in chosen.iter().enumerate() {
            dp[*expert] = match renormalise {
                // w_i = p_i / Σ p
                true => {
                    let through_sum = N::sum(chosen.iter().zip(dw).map(|(other, dw)| p[*other] * *dw));
                    dw[j] / sum - through_sum / (sum * sum)
                }
                false => dw[j],
            };
        }
        let mean = N::sum(p.iter().zip(&dp).map(|(p, dp)| *p * *dp));
        dlogits.extend(p.iter().zip(&dp).map(|(p, dp)| *p * (*dp - mean)));
    }
    dlogits
}

/// `(y, u)` of rows `x`, each through the layer of its expert.
pub fn grouped_linear_forward<N: Real>(x: &[N], experts: &[usize], layers: &[Layer<'_, N>]) -> (Vec<N>, Vec<N>) {
    let (mut y, mut u) = (Vec::new(), Vec::new());
    for (m, expert) in experts.iter().enumerate() {
        let layer = &layers[*expert];
        let (row, hidden) = linear_forward(&x[m * layer.inputs..][..layer.inputs], layer);
        y.extend(row);
        u.extend(hidden);
    }
    (y, u)
}

/// Gradients of every expert's rows and adapter, expert by expert; the rows are ordered by expert.
pub fn grouped_linear_backward<N: Real>(
    x: &[N],
    u: &[N],
    dy: &[N],
    experts: &[usize],
    layers: &[Layer<'_, N>],
) -> Vec<LinearGradients<N>> {
    let own = |(expert, layer): (usize, &Layer<'_, N>)| {
        let start = experts.partition_point(|other| *other < expert);
        let end = experts.partition_point(|other| *other <= expert);
        let rank = layer.adapter.as_ref().map_or(0, |adapter| adapter.rank);
        linear_backward(
            &x[start * layer.inputs..end * layer.inputs],
            &u[start * rank..end * rank],
            &dy[start * layer.outputs..end * layer.outputs],
            layer,
        )
    };
    layers.iter().enumerate().map(own).collect()
}

/// Rows of `width` that the grouped rows of a routing to `top` experts read, by token.
pub fn by_token<N: Real>(values: &[N], route: &Route<N>, top: usize, width: usize) -> Vec<N> {
    let rows = route
        .slots
        .iter()
        .flat_map(|slot| &values[slot / top * width..][..width]);
    rows.copied().collect()
}

/// `w_m · silu(gate_m) · up_m`.
pub fn routed_swiglu_forward<N: Real>(gate: &[N], up: &[N], route: &Route<N>, width: usize) -> Vec<N> {
    let activation = swiglu_forward(gate, up);
    let weight = |i: usize| route.weights[route.slots[i / width]];
    activation.iter().enumerate().map(|(i, a)| weight(i) * *a).collect()
}

/// `(dgate, dup, dw)`, the last by slot.
pub fn routed_swiglu_backward<N: Real>(
    gate: &[N],
    up: &[N],
    route: &Route<N>,
    dy: &[N],
    width: usize,
) -> (Vec<N>, Vec<N>, Vec<N>) {
    let weighted: Vec<N> = (0..dy.len())
        .map(|i| route.weights[route.slots[i / width]] * dy[i])
        .collect();
    let (dgate, dup) = swiglu_backward(gate, up, &weighted);
    let activation = swiglu_forward(gate, up);
    let mut dweights = vec![N::new(0.0); route.slots.len()];
    for (m, slot) in route.slots.iter().enumerate() {
        dweights[*slot] = N::sum((m * width..(m + 1) * width).map(|i| dy[i] * activation[i]));
    }
    (dgate, dup, dweights)
}

/// `y_t = Σ_j rows of token t`.
pub fn combine<N: Real>(grouped: &[N], route: &Route<N>, top: usize, width: usize) -> Vec<N> {
    let mut row_of = vec![0; route.slots.len()];
    for (m, slot) in route.slots.iter().enumerate() {
        row_of[*slot] = m;
    }
    let tokens = route.slots.len() / top;
    let element = |i: usize| {
        let slots = i / width * top..(i / width + 1) * top;
        N::sum(slots.map(|slot| grouped[row_of[slot] * width + i % width]))
    };
    (0..tokens * width).map(element).collect()
}
