//! As [`tests`](super::tests), for the ops of mixtures of experts and of linear attention.

use super::tests::{check, values, weighted};
use super::*;
use crate::tensor::Segments;

fn negative(values: Vec<f64>) -> Vec<f64> {
    values.into_iter().map(|value| -value.abs()).collect()
}

#[test]
fn delta_rule_gradients_are_the_derivatives() {
    let heads = DeltaHeads {
        key_heads: 1,
        value_heads: 2,
        key_dim: 3,
        value_dim: 2,
        scale: 0.7,
    };
    let segments = Segments::from_lengths([3, 0, 2]);
    let (q, k, v) = (values(1, 5 * 3), values(2, 5 * 3), values(3, 5 * 4));
    let (decay, beta, dout) = (negative(values(4, 5 * 2)), values(5, 5 * 2), values(6, 5 * 4));
    let inputs = DeltaInputs {
        q: &q,
        k: &k,
        v: &v,
        decay: &decay,
        beta: &beta,
    };
    let loss = |inputs: DeltaInputs<'_, f64>| {
        let mut state = vec![0.0; 3 * 2 * 6];
        weighted(&delta_rule_forward(&inputs, &heads, &segments, &mut state), &dout)
    };
    let gradients = delta_rule_backward(&inputs, &dout, &heads, &segments);
    check("dq", &q, &gradients.dq, |q| loss(DeltaInputs { q, ..inputs }));
    check("dk", &k, &gradients.dk, |k| loss(DeltaInputs { k, ..inputs }));
    check("dv", &v, &gradients.dv, |v| loss(DeltaInputs { v, ..inputs }));
    check("ddecay", &decay, &gradients.ddecay, |decay| {
        loss(DeltaInputs { decay, ..inputs })
    });
    check("dbeta", &beta, &gradients.dbeta, |beta| {
        loss(DeltaInputs { beta, ..inputs })
    });
}

#[test]
fn delta_gate_gradients_are_the_derivatives() {
    let (a, b) = (values(1, 6), values(2, 6));
    let (a_log, dt_bias, ddecay, dbeta) = (values(3, 3), values(4, 3), values(5, 6), values(6, 6));
    let loss = |a: &[f64], b: &[f64]| {
        let (decay, beta) = delta_gates_forward(a, b, &a_log, &dt_bias);
        weighted(&decay, &ddecay) + weighted(&beta, &dbeta)
    };
    let (_, beta) = delta_gates_forward(&a, &b, &a_log, &dt_bias);
    let (da, db) = delta_gates_backward(&a, &beta, (&a_log, &dt_bias), (&ddecay, &dbeta));
    check("da", &a, &da, |a| loss(a, &b));
    check("db", &b, &db, |b| loss(&a, b));
}

#[test]
fn convolution_gradient_is_the_derivative() {
    let segments = Segments::from_lengths([4, 1, 2]);
    let (x, weight, bias, dy) = (values(1, 7 * 2), values(2, 2 * 3), values(3, 2), values(4, 7 * 2));
    let filter = Filter {
        weight: &weight,
        bias: &bias,
    };
    let dx = convolution_backward(&x, &filter, &segments, &dy);
    check("dx", &x, &dx, |x| {
        weighted(&convolution_forward(x, &filter, &segments, &mut [0.0; 3 * 2 * 2]), &dy)
    });
}

#[test]
fn gate_gradients_are_the_derivatives() {
    let (x, dy) = (values(1, 6), values(2, 6));
    for gates in [2, 6] {
        let gate = values(3, gates);
        let (dx, dgate) = sigmoid_gate_backward(&x, &gate, &dy);
        check("dx", &x, &dx, |x| weighted(&sigmoid_gate_forward(x, &gate), &dy));
        check("dgate", &gate, &dgate, |gate| {
            weighted(&sigmoid_gate_forward(&x, gate), &dy)
        });
    }
}

#[test]
fn gated_norm_gradients_are_the_derivatives() {
    let (x, gate, weight, dy) = (values(1, 8), values(2, 8), values(3, 4), values(4, 8));
    let loss = |x: &[f64], gate: &[f64]| weighted(&gated_norm_forward(x, gate, &weight, 1e-3).0, &dy);
    let (_, rstd) = gated_norm_forward(&x, &gate, &weight, 1e-3);
    let (dx, dgate) = gated_norm_backward(&x, &gate, &weight, &rstd, &dy);
    check("dx", &x, &dx, |x| loss(x, &gate));
    check("dgate", &gate, &dgate, |gate| loss(&x, gate));
}

#[test]
fn l2_norm_gradient_is_the_derivative_even_at_zero() {
    let (mut x, dy) = (values(1, 9), values(2, 9));
    x[3..6].fill(0.0);
    // Large enough that the differences see a smooth function around the row of zeros.
    let eps = 0.5;
    let (_, rnorm) = l2_norm_forward(&x, 3, eps);
    let dx = l2_norm_backward(&x, 3, &rnorm, &dy);
    check("dx", &x, &dx, |x| weighted(&l2_norm_forward(x, 3, eps).0, &dy));
}

#[test]
fn routing_gradient_is_the_derivative() {
    let (logits, dweights) = (values(1, 3 * 5), values(2, 3 * 2));
    for renormalise in [false, true] {
        let chosen = route(&logits, 5, 2, renormalise);
        let dlogits = route_backward(&logits, &chosen, 5, renormalise, &dweights);
        check("dlogits", &logits, &dlogits, |logits| {
            weighted(&route(logits, 5, 2, renormalise).weights, &dweights)
        });
    }
}

/// Three experts of `[3, 4]` and the way back, over two tokens with two experts each.
struct Experts {
    gate: Vec<f64>,
    up: Vec<f64>,
    down: Vec<f64>,
}

impl Experts {
    fn layers(values: &[f64], outputs: usize, inputs: usize) -> Vec<Layer<'_, f64>> {
        let layer = |weight| Layer {
            weight,
            bias: None,
            adapter: None,
            inputs,
            outputs,
        };
        values.chunks_exact(outputs * inputs).map(layer).collect()
    }

    /// The layer as its definition reads: each token's experts' outputs, weighted and summed.
    fn definition(&self, x: &[f64], route: &Route<f64>) -> Vec<f64> {
        let mut y = vec![0.0; x.len()];
        for (slot, expert) in route.experts.iter().enumerate() {
            let x = &x[slot / 2 * 4..][..4];
            let one = |values, outputs, inputs, x: &[f64]| {
                linear_forward(x, &Self::layers(values, outputs, inputs)[*expert]).0
            };
            let activation = swiglu_forward(&one(&self.gate, 3, 4, x), &one(&self.up, 3, 4, x));
            for (y, row) in y[slot / 2 * 4..].iter_mut().zip(one(&self.down, 4, 3, &activation)) {
                *y += route.weights[slot] * row;
            }
        }
        y
    }
}

#[test]
fn the_composed_expert_layer_is_its_definition_and_its_gradients_the_derivatives() {
    let experts = Experts {
        gate: values(1, 36),
        up: values(2, 36),
        down: values(3, 36),
    };
    let (x, logits, dy) = (values(4, 8), values(5, 6), values(6, 8));
    let chosen = route(&logits, 3, 2, true);
    let owners = chosen.row_experts();
    let [gate, up] = [&experts.gate, &experts.up].map(|w| Experts::layers(w, 3, 4));
    let down = Experts::layers(&experts.down, 4, 3);
    let rows = by_token(&x, &chosen, 2, 4);
    let (gates, ups) = (
        grouped_linear_forward(&rows, &owners, &gate).0,
        grouped_linear_forward(&rows, &owners, &up).0,
    );
    let activation = routed_swiglu_forward(&gates, &ups, &chosen, 3);
    let y = combine(&grouped_linear_forward(&activation, &owners, &down).0, &chosen, 2, 4);
    for (composed, defined) in y.iter().zip(experts.definition(&x, &chosen)) {
        assert!((composed - defined).abs() < 1e-12);
    }

    let joined =
        |gradients: Vec<LinearGradients<f64>>| -> Vec<f64> { gradients.into_iter().flat_map(|own| own.dx).collect() };
    let dy_rows = by_token(&dy, &chosen, 2, 4);
    let da = joined(grouped_linear_backward(&activation, &[], &dy_rows, &owners, &down));
    let (dgate, dup, dweights) = routed_swiglu_backward(&gates, &ups, &chosen, &da, 3);
    let mut drows = joined(grouped_linear_backward(&rows, &[], &dgate, &owners, &gate));
    for (drow, value) in drows
        .iter_mut()
        .zip(joined(grouped_linear_backward(&rows, &[], &dup, &owners, &up)))
    {
        *drow += value;
    }
    let dx = combine(&drows, &chosen, 2, 4);
    check("dx", &x, &dx, |x| weighted(&experts.definition(x, &chosen), &dy));
    let dlogits = route_backward(&logits, &chosen, 3, true, &dweights);
    check("dlogits", &logits, &dlogits, |logits| {
        weighted(&experts.definition(&x, &route(logits, 3, 2, true)), &dy)
    });
}
