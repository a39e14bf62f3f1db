//! The head and cross-entropy, a few rows at a time.

use super::Cpu;
use super::products::rounded;
use super::view::{floats, floats_mut, integers};
use crate::contract;
use crate::error::{Error, Result};
use crate::ops::{LinearCrossEntropy, LossOps};

/// The label of a position where nothing is learnt.
const UNSUPERVISED: i32 = -100;

/// Bytes of logits that exist at once.
const CHUNK_BYTES: usize = 32 << 20;

impl LossOps for Cpu {
    fn linear_cross_entropy(&self, call: LinearCrossEntropy<'_, Self>) -> Result<()> {
        const OP: &str = "linear_cross_entropy";
        let sizes = contract::linear_cross_entropy(&call)?;
        let (width, vocabulary) = (sizes.inputs, sizes.outputs);
        let labels = integers(OP, "labels", call.labels)?;
        let allowed = |label: i32| label == UNSUPERVISED || usize::try_from(label).is_ok_and(|l| l < vocabulary);
        if let Some(outside) = labels.iter().find(|label| !allowed(**label)) {
            return Err(Error::Value {
                op: OP,
                argument: "labels",
                problem: format!("has {outside}, which is neither -100 nor below {vocabulary}"),
            });
        }
        let x = rounded(floats(OP, "x", call.x)?, call.precision);
        let head = rounded(&self.decoded(call.head)?, call.precision);
        let losses = floats_mut(OP, "losses", call.losses)?;
        losses.fill(0.0);
        let mut dx = match call.dx {
            Some((dx, factor)) => Some((floats_mut(OP, "dx", dx)?, factor)),
            None => None,
        };
        if let Some((dx, _)) = &mut dx {
            dx.fill(0.0);
        }
        let rows: Vec<usize> = (0..labels.len()).filter(|t| labels[*t] != UNSUPERVISED).collect();
        for rows in rows.chunks((CHUNK_BYTES / (4 * vocabulary.max(1))).max(1)) {
            let gathered: Vec<f32> = rows.iter().flat_map(|t| &x[t * width..][..width]).copied().collect();
            let mut logits = vec![0.0; rows.len() * vocabulary];
            self.add_product_nt(&mut logits, &gathered, &head, width, vocabulary, 1.0);
            for (z, t) in logits.chunks_exact_mut(vocabulary).zip(rows) {
                losses[*t] = softmax_gradient(z, labels[*t] as usize, dx.as_ref().map_or(0.0, |(_, factor)| *factor));
            }
            if let Some((dx, _)) = &mut dx {
                let logits = rounded(&logits, call.precision);
                let mut out = vec![0.0; rows.len() * width];
                self.add_product_nn(&mut out, &logits, &head, vocabulary, width, 1.0);
                for (row, t) in out.chunks_exact(width.max(1)).zip(rows) {
                    dx[t * width..][..width].copy_from_slice(row);
                }
            }
        }
        Ok(())
    }
}

/// The loss of one row of logits, which become `factor · (softmax − onehot)`.
fn softmax_gradient(z: &mut [f32], label: usize, factor: f32) -> f32 {
    let largest = z.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = z.iter().map(|z| f64::from((z - largest).exp())).sum();
    let log_sum = largest + sum.ln() as f32;
    let loss = log_sum - z[label];
    for z in z.iter_mut() {
        *z = factor * (*z - log_sum).exp();
    }
    z[label] -= factor;
    loss
}
