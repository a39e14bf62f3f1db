//! Short causal convolution with SiLU, a document and a row at a time.

use std::ops::Range;

use super::Cpu;
use super::simd::{Simd, gates};
use super::view::{floats, floats_mut, widened};
use crate::contract::{self, ConvolutionSizes};
use crate::error::Result;
use crate::ops::{ConvolutionBackward, ConvolutionForward, ConvolutionOps};
use crate::tensor::{Segments, Tensor};

/// Frozen taps and bias, one row of `C` per tap, so that channels are neighbours.
struct Filter {
    taps: Vec<f32>,
    bias: Vec<f32>,
    count: usize,
    channels: usize,
    simd: Simd,
}

impl ConvolutionOps for Cpu {
    fn convolution_forward(&self, call: ConvolutionForward<'_, Self>) -> Result<()> {
        const OP: &str = "convolution_forward";
        let sizes = contract::convolution_forward(&call)?;
        let filter = Filter::new(self, OP, call.weight, call.bias, sizes)?;
        let x = floats(OP, "x", call.x)?;
        let (channels, past) = (sizes.channels, sizes.taps - 1);
        let documents = documents_of_rows(call.segments);
        let state = match call.state {
            Some(state) => Some(floats_mut(OP, "state", state)?),
            None => None,
        };
        if channels == 0 {
            return Ok(());
        }
        let before = state.as_deref();
        self.for_rows(floats_mut(OP, "y", call.y)?, channels, |first, y| {
            for (row, y) in y.chunks_exact_mut(channels).enumerate() {
                let (document, range) = &documents[first + row];
                let before = before.map_or(&[][..], |all| &all[document * past * channels..][..past * channels]);
                filter.preactivation(y, x, before, first + row, range);
                gates::silu(filter.simd, y);
            }
        });
        if let Some(state) = state {
            let states = state.chunks_exact_mut((past * channels).max(1));
            for (state, range) in states.zip(call.segments.ranges()) {
                advance(state, &x[range.start * channels..range.end * channels]);
            }
        }
        Ok(())
    }

    fn convolution_backward(&self, call: ConvolutionBackward<'_, Self>) -> Result<()> {
        const OP: &str = "convolution_backward";
        let sizes = contract::convolution_backward(&call)?;
        let filter = Filter::new(self, OP, call.weight, call.bias, sizes)?;
        let (x, dy) = (floats(OP, "x", call.x)?, floats(OP, "dy", call.dy)?);
        let channels = sizes.channels;
        let documents = documents_of_rows(call.segments);
        if channels == 0 {
            return Ok(());
        }
        let mut dz = self.scratch::<f32>(x.len())?;
        self.for_rows(dz.values_mut(), channels, |first, dz| {
            for (row, dz) in dz.chunks_exact_mut(channels).enumerate() {
                filter.preactivation(dz, x, &[], first + row, &documents[first + row].1);
                gates::silu_backward(filter.simd, dz, &dy[(first + row) * channels..]);
            }
        });
        let dz = dz.values();
        self.for_rows(floats_mut(OP, "dx", call.dx)?, channels, |first, dx| {
            for (row, dx) in dx.chunks_exact_mut(channels).enumerate() {
                dx.fill(0.0);
                let end = documents[first + row].1.end;
                for later in 0..sizes.taps.min(end - first - row) {
                    let dz = &dz[(first + row + later) * channels..][..channels];
                    gates::add_product(filter.simd, dx, filter.tap(sizes.taps - 1 - later), dz);
                }
            }
        });
        Ok(())
    }
}

impl Filter {
    fn new(
        cpu: &Cpu,
        op: &'static str,
        weight: &Tensor<Cpu>,
        bias: Option<&Tensor<Cpu>>,
        sizes: ConvolutionSizes,
    ) -> Result<Self> {
        let ConvolutionSizes { channels, taps } = sizes;
        let weight = widened(op, "weight", weight)?;
        let bias = match bias {
            Some(bias) => widened(op, "bias", bias)?,
            None => vec![0.0; channels],
        };
        let transposed = (0..taps * channels).map(|i| weight[i % channels * taps + i / channels]);
        Ok(Self {
            taps: transposed.collect(),
            bias,
            count: taps,
            channels,
            simd: cpu.inner.simd,
        })
    }

    fn tap(&self, index: usize) -> &[f32] {
        &self.taps[index * self.channels..][..self.channels]
    }

    /// `z` of row `row` of the document at `range`. `before` has the `K − 1` inputs before the document, or nothing for zeros.
    fn preactivation(&self, z: &mut [f32], x: &[f32], before: &[f32], row: usize, range: &Range<usize>) {
        z.copy_from_slice(&self.bias);
        let past = self.count - 1;
        for tap in 0..self.count {
            // Row `row + tap − past` of the input.
            let source = match (row + tap).checked_sub(past) {
                Some(source) if source >= range.start => &x[source * self.channels..],
                _ if before.is_empty() => continue,
                _ => &before[(row + tap - range.start) * self.channels..],
            };
            gates::add_product(self.simd, z, self.tap(tap), &source[..self.channels]);
        }
    }
}

/// The document of every row: its index and its rows.
fn documents_of_rows(segments: &Segments) -> Vec<(usize, Range<usize>)> {
    let documents = segments.ranges().enumerate();
    documents
        .flat_map(|(document, range)| range.clone().map(move |_| (document, range.clone())))
        .collect()
}

/// The state after `inputs`: the last of the two together.
fn advance(state: &mut [f32], inputs: &[f32]) {
    let new = inputs.len().min(state.len());
    state.copy_within(new.., 0);
    let kept = state.len() - new;
    state[kept..].copy_from_slice(&inputs[inputs.len() - new..]);
}
