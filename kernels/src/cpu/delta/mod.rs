//! The gated delta rule, one head of one document at a time, chunk after chunk.
//!
//! A task gathers its head's rows, works on them in blocks of at most 64 rows, and keeps its results to itself; they are put
//! in their interleaved places afterwards.

mod backward;
mod chunk;
mod forward;

use std::ops::Range;

use self::backward::HeadGradients;
use self::chunk::Head;
use self::forward::HeadOutput;
use super::Cpu;
use super::view::{floats, floats_mut, widened};
use crate::contract::{self, DeltaSizes};
use crate::error::Result;
use crate::ops::{DELTA_CHUNK, DeltaBackward, DeltaForward, DeltaGatesBackward, DeltaGatesForward, DeltaOps};
use crate::tensor::Segments;

impl DeltaOps for Cpu {
    fn delta_rule_forward(&self, call: DeltaForward<'_, Self>) -> Result<()> {
        const OP: &str = "delta_rule_forward";
        let sizes = contract::delta_rule_forward(&call)?;
        let head = Head {
            q: floats(OP, "q", call.q)?,
            k: floats(OP, "k", call.k)?,
            v: floats(OP, "v", call.v)?,
            decay: floats(OP, "decay", call.decay)?,
            beta: floats(OP, "beta", call.beta)?,
            scale: call.scale,
            sizes,
            simd: self.inner.simd,
        };
        let mut state = match call.state {
            Some(state) => Some(floats_mut(OP, "state", state)?),
            None => None,
        };
        let documents: Vec<_> = call.segments.ranges().collect();
        let (heads, state_size) = (sizes.value_heads, sizes.key_dim * sizes.value_dim);
        let results: Vec<HeadOutput> = self.map(documents.len() * heads, |task| {
            let start = match &state {
                Some(state) => state[task * state_size..][..state_size].to_vec(),
                None => vec![0.0; state_size],
            };
            head.forward(documents[task / heads].clone(), task % heads, start)
        });
        let places = Places::new(call.segments, heads);
        let out = floats_mut(OP, "out", call.out)?;
        places.scatter(self, out, sizes.value_dim, |task| &results[task].out);
        let solved = floats_mut(OP, "solved", call.solved)?;
        places.scatter(self, solved, DELTA_CHUNK, |task| &results[task].solved);
        if let Some(state) = &mut state {
            for (state, result) in state.chunks_exact_mut(state_size.max(1)).zip(&results) {
                state.copy_from_slice(&result.state);
            }
        }
        Ok(())
    }

    fn delta_rule_backward(&self, call: DeltaBackward<'_, Self>) -> Result<()> {
        const OP: &str = "delta_rule_backward";
        let sizes = contract::delta_rule_backward(&call)?;
        let head = Head {
            q: floats(OP, "q", call.q)?,
            k: floats(OP, "k", call.k)?,
            v: floats(OP, "v", call.v)?,
            decay: floats(OP, "decay", call.decay)?,
            beta: floats(OP, "beta", call.beta)?,
            scale: call.scale,
            sizes,
            simd: self.inner.simd,
        };
        let (solved, dout) = (floats(OP, "solved", call.solved)?, floats(OP, "dout", call.dout)?);
        let documents: Vec<_> = call.segments.ranges().collect();
        let DeltaSizes {
            key_heads,
            value_heads,
            key_dim,
            value_dim,
            ..
        } = sizes;
        let results: Vec<HeadGradients> = self.map(documents.len() * value_heads, |task| {
            head.backward(documents[task / value_heads].clone(), task % value_heads, solved, dout)
        });
        let places = Places::new(call.segments, value_heads);
        let dv = floats_mut(OP, "dv", call.dv)?;
        places.scatter(self, dv, value_dim, |task| &results[task].dv);
        let ddecay = floats_mut(OP, "ddecay", call.ddecay)?;
        places.scatter(self, ddecay, 1, |task| &results[task].ddecay);
        let dbeta = floats_mut(OP, "dbeta", call.dbeta)?;
        places.scatter(self, dbeta, 1, |task| &results[task].dbeta);
        let places = Places::new(call.segments, key_heads);
        let dq = floats_mut(OP, "dq", call.dq)?;
        places.gather_sum(self, dq, key_dim, value_heads / key_heads, |task| &results[task].dq);
        let dk = floats_mut(OP, "dk", call.dk)?;
        places.gather_sum(self, dk, key_dim, value_heads / key_heads, |task| &results[task].dk);
        Ok(())
    }

    fn delta_gates_forward(&self, call: DeltaGatesForward<'_, Self>) -> Result<()> {
        const OP: &str = "delta_gates_forward";
        let width = contract::delta_gates_forward(&call)?;
        let (a, b) = (floats(OP, "a", call.a)?, floats(OP, "b", call.b)?);
        let (rate, bias) = (
            rates(&widened(OP, "a_log", call.a_log)?),
            widened(OP, "dt_bias", call.dt_bias)?,
        );
        let outputs = (floats_mut(OP, "decay", call.decay)?, floats_mut(OP, "beta", call.beta)?);
        self.for_rows2(outputs, (width, width), |first, decay, beta| {
            for (i, (decay, beta)) in decay.iter_mut().zip(beta).enumerate() {
                let at = first * width + i;
                *decay = rate[i % width] * softplus(a[at] + bias[i % width]);
                *beta = logistic(b[at]);
            }
        });
        Ok(())
    }

    fn delta_gates_backward(&self, call: DeltaGatesBackward<'_, Self>) -> Result<()> {
        const OP: &str = "delta_gates_backward";
        let width = contract::delta_gates_backward(&call)?;
        let (a, beta) = (floats(OP, "a", call.a)?, floats(OP, "beta", call.beta)?);
        let (ddecay, dbeta) = (floats(OP, "ddecay", call.ddecay)?, floats(OP, "dbeta", call.dbeta)?);
        let (rate, bias) = (
            rates(&widened(OP, "a_log", call.a_log)?),
            widened(OP, "dt_bias", call.dt_bias)?,
        );
        let outputs = (floats_mut(OP, "da", call.da)?, floats_mut(OP, "db", call.db)?);
        self.for_rows2(outputs, (width, width), |first, da, db| {
            for (i, (da, db)) in da.iter_mut().zip(db).enumerate() {
                let at = first * width + i;
                *da = ddecay[at] * rate[i % width] * logistic(a[at] + bias[i % width]);
                *db = dbeta[at] * beta[at] * (1.0 - beta[at]);
            }
        });
        Ok(())
    }
}

/// `−exp(A_log)`.
fn rates(a_log: &[f32]) -> Vec<f32> {
    a_log.iter().map(|a_log| -a_log.exp()).collect()
}

fn logistic(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

/// `log(1 + eˣ)` without overflow.
fn softplus(x: f32) -> f32 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

/// Where the rows of every task's result lie in a packed tensor `[T, heads, width]`; tasks are numbered document by document.
struct Places {
    /// Of every packed row: its document, and its row in it.
    rows: Vec<(usize, usize)>,
    heads: usize,
}

impl Places {
    fn new(segments: &Segments, heads: usize) -> Self {
        let within = |(document, range): (usize, Range<usize>)| (0..range.len()).map(move |row| (document, row));
        Self {
            rows: segments.ranges().enumerate().flat_map(within).collect(),
            heads,
        }
    }

    /// Puts each task's rows in their places.
    fn scatter<'r>(&self, cpu: &Cpu, target: &mut [f32], width: usize, result: impl Fn(usize) -> &'r [f32] + Sync) {
        self.gather_sum(cpu, target, width, 1, result);
    }

    /// Puts the sum of `group` neighbouring tasks' rows in their place.
    fn gather_sum<'r>(
        &self,
        cpu: &Cpu,
        target: &mut [f32],
        width: usize,
        group: usize,
        result: impl Fn(usize) -> &'r [f32] + Sync,
    ) {
        let row_width = self.heads * width;
        if row_width == 0 {
            return;
        }
        cpu.for_rows(target, row_width, |first, target| {
            for (i, target) in target.chunks_exact_mut(width).enumerate() {
                let (document, row) = self.rows[first + i / self.heads];
                let task = (document * self.heads + i % self.heads) * group;
                target.copy_from_slice(&result(task)[row * width..][..width]);
                for other in task + 1..task + group {
                    for (target, value) in target.iter_mut().zip(&result(other)[row * width..]) {
                        *target += value;
                    }
                }
            }
        });
    }
}
