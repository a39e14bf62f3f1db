//! Numerics beside the timing: a case's product against the same product in float32, on the same operands and device.
//!
//! The conformance suite judges every op at shapes made to break it; this shows that at the shapes that are timed the kernels compute
//! what they are timed for. Ops without a reference precision of their own are left to the suite.

use brightrun_kernels::ops::{
    GroupedLinearBackward, GroupedLinearForward, LinearBackward, LinearForward, Precision, RowOrder, Write,
};
use brightrun_kernels::{Result, Tensor};
use serde_json::{Value, json};

use crate::cases::{Work, routing};
use crate::clock::Clock;
use crate::operands::{activation, room, stack, weight};

/// Rows that are compared: the first and the last so many.
const ROWS: usize = 64;

/// Largest and mean difference over the root mean square of the reference; `null` for ops that are not compared here.
pub fn check<B: Clock>(backend: &B, work: Work) -> Result<Value> {
    let [fast, exact] = match work {
        Work::Linear {
            tokens,
            outputs,
            inputs,
            nf4,
            rank: 0,
        } => {
            let (x, weight) = (
                activation(backend, &[tokens, inputs], 1.0, 1)?,
                weight(backend, outputs, inputs, nf4, 2)?,
            );
            both(backend, [tokens, outputs], |precision, y| {
                backend.linear_forward(LinearForward {
                    x: &x,
                    weight: &weight,
                    bias: None,
                    lora: None,
                    precision,
                    y,
                })
            })?
        }
        Work::LinearInput {
            tokens,
            outputs,
            inputs,
            nf4,
        } => {
            let (dy, weight) = (
                activation(backend, &[tokens, outputs], 1.0, 1)?,
                weight(backend, outputs, inputs, nf4, 2)?,
            );
            both(backend, [tokens, inputs], |precision, dx| {
                backend.linear_backward(LinearBackward {
                    dy: &dy,
                    weight: &weight,
                    lora: None,
                    precision,
                    dx: Some((dx, Write::Overwrite)),
                })
            })?
        }
        Work::Grouped {
            tokens,
            experts,
            top,
            outputs,
            inputs,
        } => {
            let routing = routing(backend, tokens, experts, top)?;
            let (x, stack) = (
                activation(backend, &[tokens, inputs], 1.0, 1)?,
                stack(backend, experts, outputs, inputs)?,
            );
            both(backend, [tokens * top, outputs], |precision, y| {
                backend.grouped_linear_forward(GroupedLinearForward {
                    x: &x,
                    x_order: RowOrder::Token,
                    routing: &routing,
                    weight: &stack,
                    lora: None,
                    precision,
                    y,
                })
            })?
        }
        Work::GroupedInput {
            tokens,
            experts,
            top,
            outputs,
            inputs,
        } => {
            let routing = routing(backend, tokens, experts, top)?;
            let (dy, stack) = (
                activation(backend, &[tokens * top, outputs], 1.0, 1)?,
                stack(backend, experts, outputs, inputs)?,
            );
            both(backend, [tokens * top, inputs], |precision, dx| {
                backend.grouped_linear_backward(GroupedLinearBackward {
                    dy: &dy,
                    dy_order: RowOrder::Grouped,
                    routing: &routing,
                    weight: &stack,
                    lora: None,
                    precision,
                    dx: Some((dx, Write::Overwrite)),
                })
            })?
        }
        _ => return Ok(Value::Null),
    };
    Ok(compared(&fast, &exact))
}

/// Some rows of a result in both precisions.
fn both<B: Clock>(
    backend: &B,
    shape: [usize; 2],
    product: impl Fn(Precision, &mut Tensor<B>) -> Result<()>,
) -> Result<[Vec<f32>; 2]> {
    let in_precision = |precision| {
        let mut out = room(backend, &shape)?;
        product(precision, &mut out)?;
        let mut values = backend.read_f32(&out)?;
        let rows = ROWS.min(shape[0]) * shape[1];
        let end = values.split_off(values.len() - rows);
        values.truncate(rows);
        values.extend(end);
        Ok(values)
    };
    Ok([in_precision(Precision::Bf16)?, in_precision(Precision::F32)?])
}

fn compared(fast: &[f32], exact: &[f32]) -> Value {
    let count = exact.len().max(1) as f64;
    let scale = (exact.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>() / count).sqrt();
    let differences = || fast.iter().zip(exact).map(|(a, b)| f64::from(a - b).abs());
    let largest = differences().fold(0.0, |worst: f64, one| if one.is_nan() { one } else { worst.max(one) });
    json!({ "largest": largest / scale, "mean": differences().sum::<f64>() / count / scale, "rows": 2 * ROWS })
}
