//! The head and cross-entropy, a few rows at a time.

use super::matrix::{Factor, Matrix};
use super::products::{RowsAre, Term};
use super::simd::{Left, Start, rows as simd_rows};
use super::view::{floats, floats_mut, integers};
use super::{Cpu, Products};
use crate::contract;
use crate::error::{Error, Result};
use crate::ops::{LinearCrossEntropy, LossOps};

/// The label of a position where nothing is learnt.
const UNSUPERVISED: i32 = -100;

/// Bytes of logits that exist at once.
pub(crate) const LOGITS_BYTES: usize = 32 << 20;

impl LossOps for Cpu {
    fn linear_cross_entropy(&self, call: LinearCrossEntropy<'_, Self>) -> Result<()> {
        let sizes = contract::linear_cross_entropy(&call)?;
        let vocabulary = sizes.outputs;
        let labels = integers("linear_cross_entropy", "labels", call.labels)?;
        let allowed = |label: i32| label == UNSUPERVISED || usize::try_from(label).is_ok_and(|l| l < vocabulary);
        if let Some(outside) = labels.iter().find(|label| !allowed(**label)) {
            return Err(Error::Value {
                op: "linear_cross_entropy",
                argument: "labels",
                problem: format!("has {outside}, which is neither -100 nor below {vocabulary}"),
            });
        }
        match self.products(call.precision) {
            Products::Single { rounded } => self.cross_entropy::<f32>(call, sizes, rounded),
            Products::Half => self.cross_entropy::<u16>(call, sizes, true),
        }
    }
}

impl Cpu {
    fn cross_entropy<E: Factor>(
        &self,
        call: LinearCrossEntropy<'_, Self>,
        sizes: contract::LinearSizes,
        rounded: bool,
    ) -> Result<()> {
        const OP: &str = "linear_cross_entropy";
        let (width, vocabulary) = (sizes.inputs, sizes.outputs);
        let labels = integers(OP, "labels", call.labels)?;
        let x = floats(OP, "x", call.x)?;
        let head = Matrix::of_weight(call.head, rounded)?;
        let losses = floats_mut(OP, "losses", call.losses)?;
        losses.fill(0.0);
        let (mut dx, factor) = match call.dx {
            Some((dx, factor)) => (Some(floats_mut(OP, "dx", dx)?), floats(OP, "factor", factor)?[0]),
            None => (None, 0.0),
        };
        if let Some(dx) = &mut dx {
            dx.fill(0.0);
        }
        let supervised: Vec<usize> = (0..labels.len()).filter(|t| labels[*t] != UNSUPERVISED).collect();
        let chunk = (LOGITS_BYTES / (4 * vocabulary.max(1))).clamp(1, supervised.len().max(1));
        let mut logits = self.scratch::<f32>(chunk * vocabulary)?;
        let mut hidden = self.scratch::<f32>(chunk * width)?;
        for rows in supervised.chunks(chunk) {
            let logits = &mut logits.values_mut()[..rows.len() * vocabulary];
            let hidden = &mut hidden.values_mut()[..rows.len() * width];
            for (hidden, t) in hidden.chunks_exact_mut(width.max(1)).zip(rows) {
                hidden.copy_from_slice(&x[t * width..][..width]);
            }
            let left = self.left::<E>(hidden, [rows.len(), width], rounded)?;
            let term = Term {
                left: left.view(),
                right: &head,
                rows_are: RowsAre::Columns,
            };
            self.product(&[term], logits, vocabulary, Start::Zero);
            drop(left);
            self.softmax_gradients::<E>(logits, rows, labels, losses, dx.is_some().then_some((factor, rounded)))?;
            if let Some(dx) = &mut dx {
                // The gradients lie in the logits' place, as elements of the product.
                let stride = vocabulary * size_of::<f32>() / size_of::<E>();
                let left = Left {
                    values: bytemuck::cast_slice::<f32, E>(logits),
                    stride,
                    rows: rows.len(),
                };
                let term = Term {
                    left,
                    right: &head,
                    rows_are: RowsAre::Depth,
                };
                self.product(&[term], hidden, width, Start::Zero);
                for (hidden, t) in hidden.chunks_exact(width.max(1)).zip(rows) {
                    dx[t * width..][..width].copy_from_slice(hidden);
                }
            }
        }
        Ok(())
    }

    /// The losses of some rows of logits; with a factor, the logits become `factor · (softmax − onehot)` as elements of the
    /// product that follows (see [`Factor::settle`]).
    fn softmax_gradients<E: Factor>(
        &self,
        logits: &mut [f32],
        rows: &[usize],
        labels: &[i32],
        losses: &mut [f32],
        gradient: Option<(f32, bool)>,
    ) -> Result<()> {
        let simd = self.inner.simd;
        let vocabulary = logits.len() / rows.len();
        let mut of_rows = self.scratch::<f32>(rows.len())?;
        self.for_rows2(
            (logits, of_rows.values_mut()),
            (vocabulary, 1),
            |first, logits, losses| {
                for (i, (z, loss)) in logits.chunks_exact_mut(vocabulary).zip(losses).enumerate() {
                    let label = labels[rows[first + i]] as usize;
                    let (of_label, largest) = (z[label], simd_rows::largest(simd, z));
                    let sum = simd_rows::exponentials(simd, z, largest);
                    *loss = largest + sum.ln() - of_label;
                    if let Some((factor, rounded)) = gradient {
                        let share = factor / sum;
                        let at_label = share * z[label] - factor;
                        E::settle(simd, z, share, rounded, label, at_label);
                    }
                }
            },
        );
        for (t, loss) in rows.iter().zip(of_rows.values()) {
            losses[*t] = *loss;
        }
        Ok(())
    }
}
