//! Short causal convolution with SiLU; formulas in [`ConvolutionOps`](crate::ops::ConvolutionOps).

use super::Real;
use super::gate::logistic;
use crate::tensor::Segments;

/// Taps `[C, K]` and bias `[C]`.
#[derive(Clone, Copy)]
pub struct Filter<'a, N> {
    /// `[C, K]`.
    pub weight: &'a [N],
    /// `[C]`.
    pub bias: &'a [N],
}

impl<N: Real> Filter<'_, N> {
    fn taps(&self) -> usize {
        self.weight.len() / self.bias.len().max(1)
    }

    /// `z` at row `t` of `rows`; `before` has the `K − 1` inputs before the document.
    fn preactivation(&self, x: &[N], before: &[N], t: usize, start: usize, channel: usize) -> N {
        let (channels, taps) = (self.bias.len(), self.taps());
        (0..taps).fold(self.bias[channel], |sum, tap| {
            // Counted from the first of the inputs before the document.
            let place = t - start + tap;
            let input = match place < taps - 1 {
                true => before[place * channels + channel],
                false => x[(start + place + 1 - taps) * channels + channel],
            };
            sum + self.weight[channel * taps + tap] * input
        })
    }
}

/// `y`, `[T, C]`. `state`, `[documents, K − 1, C]`, has the inputs before each document and then the last ones of it.
pub fn convolution_forward<N: Real>(x: &[N], filter: &Filter<'_, N>, segments: &Segments, state: &mut [N]) -> Vec<N> {
    let channels = filter.bias.len();
    let past = (filter.taps() - 1) * channels;
    let mut y = Vec::new();
    for (document, rows) in segments.ranges().enumerate() {
        let state = &mut state[document * past..][..past];
        for t in rows.clone() {
            y.extend((0..channels).map(|channel| {
                let z = filter.preactivation(x, state, t, rows.start, channel);
                z * logistic(z)
            }));
        }
        let all = [&*state, &x[rows.start * channels..rows.end * channels]].concat();
        state.copy_from_slice(&all[all.len() - past..]);
    }
    y
}

/// `dx`, for documents with nothing before them.
pub fn convolution_backward<N: Real>(x: &[N], filter: &Filter<'_, N>, segments: &Segments, dy: &[N]) -> Vec<N> {
    let (channels, taps) = (filter.bias.len(), filter.taps());
    let before = vec![N::new(0.0); (taps - 1) * channels];
    let mut dx = vec![N::new(0.0); x.len()];
    for rows in segments.ranges() {
        for (t, channel) in rows
            .clone()
            .flat_map(|t| (0..channels).map(move |channel| (t, channel)))
        {
            let z = filter.preactivation(x, &before, t, rows.start, channel);
            let sigma = logistic(z);
            let dz = dy[t * channels + channel] * sigma * (N::new(1.0) + z * (N::new(1.0) - sigma));
            for tap in 0..taps {
                let Some(source) = (t + tap + 1).checked_sub(taps).filter(|source| *source >= rows.start) else {
                    continue;
                };
                let dx = &mut dx[source * channels + channel];
                *dx = *dx + filter.weight[channel * taps + tap] * dz;
            }
        }
    }
    dx
}
