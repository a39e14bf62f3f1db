//! Linear layers; formulas in [`MatmulOps`](crate::ops::MatmulOps).

use super::Real;

/// `A [R, I]`, `B [O, R]` and the scale.
#[derive(Clone, Copy)]
pub struct Adapter<'a, N> {
    /// `[R, I]`.
    pub a: &'a [N],
    /// `[O, R]`.
    pub b: &'a [N],
    /// `alpha / R`.
    pub scale: N,
    /// `R`.
    pub rank: usize,
}

/// A frozen matrix `[O, I]`, its bias, and its adapter.
#[derive(Clone, Copy)]
pub struct Layer<'a, N> {
    /// `[O, I]`.
    pub weight: &'a [N],
    /// `[O]`.
    pub bias: Option<&'a [N]>,
    /// The adapter.
    pub adapter: Option<Adapter<'a, N>>,
    /// `I`.
    pub inputs: usize,
    /// `O`.
    pub outputs: usize,
}

/// What [`linear_backward`] gives.
pub struct LinearGradients<N> {
    /// `[T, I]`.
    pub dx: Vec<N>,
    /// `[R, I]`, empty without an adapter.
    pub da: Vec<N>,
    /// `[O, R]`, empty without an adapter.
    pub db: Vec<N>,
}

/// `A · Bᵀ` of `[M, K]` and `[N, K]`.
fn product_nt<N: Real>(a: &[N], b: &[N], [m, n, k]: [usize; 3]) -> Vec<N> {
    (0..m * n)
        .map(|i| {
            let (a, b) = (&a[i / n * k..][..k], &b[i % n * k..][..k]);
            N::dot(a.iter().copied().zip(b.iter().copied()))
        })
        .collect()
}

fn transposed<N: Real>(values: &[N], columns: usize) -> Vec<N> {
    let rows = values.len() / columns.max(1);
    (0..values.len())
        .map(|i| values[i % rows * columns + i / rows])
        .collect()
}

/// `(y, u)`: `y = x · Wᵀ + bias + s · u · Bᵀ` with `u = x · Aᵀ`.
pub fn linear_forward<N: Real>(x: &[N], layer: &Layer<'_, N>) -> (Vec<N>, Vec<N>) {
    let tokens = x.len() / layer.inputs.max(1);
    let mut y = product_nt(x, layer.weight, [tokens, layer.outputs, layer.inputs]);
    if let Some(bias) = layer.bias {
        y.iter_mut()
            .zip(bias.iter().cycle())
            .for_each(|(y, bias)| *y = *y + *bias);
    }
    let Some(adapter) = &layer.adapter else {
        return (y, Vec::new());
    };
    let u = product_nt(x, adapter.a, [tokens, adapter.rank, layer.inputs]);
    let scaled: Vec<N> = u.iter().map(|u| adapter.scale * *u).collect();
    let low_rank = product_nt(&scaled, adapter.b, [tokens, layer.outputs, adapter.rank]);
    y.iter_mut().zip(low_rank).for_each(|(y, value)| *y = *y + value);
    (y, u)
}

/// Gradients for `x`, `A` and `B`; `u` is the forward pass's.
pub fn linear_backward<N: Real>(x: &[N], u: &[N], dy: &[N], layer: &Layer<'_, N>) -> LinearGradients<N> {
    let Layer { inputs, outputs, .. } = *layer;
    let tokens = dy.len() / outputs.max(1);
    let mut dx = product_nt(dy, &transposed(layer.weight, inputs), [tokens, inputs, outputs]);
    let Some(adapter) = &layer.adapter else {
        return LinearGradients {
            dx,
            da: Vec::new(),
            db: Vec::new(),
        };
    };
    let rank = adapter.rank;
    let scaled = |values: Vec<N>| -> Vec<N> { values.into_iter().map(|value| adapter.scale * value).collect() };
    let v = scaled(product_nt(dy, &transposed(adapter.b, rank), [tokens, rank, outputs]));
    let through = product_nt(&v, &transposed(adapter.a, inputs), [tokens, inputs, rank]);
    dx.iter_mut().zip(through).for_each(|(dx, value)| *dx = *dx + value);
    let da = product_nt(&transposed(&v, rank), &transposed(x, inputs), [rank, inputs, tokens]);
    let db = scaled(product_nt(
        &transposed(dy, outputs),
        &transposed(u, rank),
        [outputs, rank, tokens],
    ));
    LinearGradients { dx, da, db }
}
