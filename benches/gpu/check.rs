//! Numerics beside the timing: what a case's op writes, against the same op in float32, on the same operands.
//!
//! A timing counts only with this. The conformance suite judges every op on the same device at shapes made to break it; here it is
//! shown that at the shapes that are timed the kernels compute what they are timed for.

use brightrun_kernels::Result;
use brightrun_kernels::cpu::Cpu;
use brightrun_kernels::ops::Precision;
use serde_json::{Value, json};

use crate::clock::Clock;
use crate::prepare::{Results, prepare};
use crate::work::Work;

/// Largest and mean difference over the root mean square of the reference, of the tensor that is farthest off, and what it was
/// compared with.
pub fn check<B: Clock>(backend: &B, work: Work) -> Result<Value> {
    let fast = results(backend, work, Precision::Bf16)?;
    let (exact, against) = match on_the_cpu(work) {
        Some(reference) => {
            let cpu = Cpu::new(None)?;
            (results(&cpu, reference, Precision::F32)?, "the CPU backend")
        }
        None => (results(backend, work, Precision::F32)?, "the same op in float32"),
    };
    let differences = fast.iter().zip(&exact).map(|(fast, exact)| Difference::of(fast, exact));
    let worst = differences.max_by(|left, right| left.mean.total_cmp(&right.mean));
    let worst = worst.unwrap_or(Difference {
        largest: f64::NAN,
        mean: f64::NAN,
    });
    let elements: usize = fast.iter().map(Vec::len).sum();
    Ok(json!({ "largest": worst.largest, "mean": worst.mean, "elements": elements, "against": against }))
}

/// What has one precision only is judged by the CPU; moments in 8 bits by those in float32.
fn on_the_cpu(work: Work) -> Option<Work> {
    match work {
        Work::Dequantize { .. } | Work::Quantize { .. } | Work::QuantizeFp8 { .. } | Work::Adamw { .. } => Some(work),
        Work::Adamw8bit { tensors, elements } => Some(Work::Adamw { tensors, elements }),
        _ => None,
    }
}

fn results<B: Clock>(backend: &B, work: Work, precision: Precision) -> Result<Results> {
    let mut results = Results::new();
    prepare(backend, work, precision, 1)?(Some(&mut results))?;
    Ok(results)
}

struct Difference {
    largest: f64,
    mean: f64,
}

impl Difference {
    /// A number on one side only makes both figures NaN, which JSON has as null: that is no agreement.
    fn of(fast: &[f32], exact: &[f32]) -> Self {
        if fast.len() != exact.len() {
            return Self {
                largest: f64::NAN,
                mean: f64::NAN,
            };
        }
        let count = exact.len().max(1) as f64;
        let scale = (exact.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>() / count).sqrt();
        let differences = || fast.iter().zip(exact).map(|(a, b)| f64::from(a - b).abs());
        let largest = differences().fold(0.0, |worst: f64, one| if one.is_nan() { one } else { worst.max(one) });
        Self {
            largest: largest / scale,
            mean: differences().sum::<f64>() / count / scale,
        }
    }
}
