//! How evenly a mixture's routers spread the tokens of an evaluation.
//!
//! Routers are frozen, so nothing here can be trained better; but data far from what a model was pretrained on may send most
//! tokens to few experts, and whoever adapts routed experts wants to know how many of them learn anything.

use std::sync::{Mutex, MutexGuard, PoisonError};

use brightrun_kernels::Backend;
use brightrun_kernels::ops::Routing;
use serde::{Deserialize, Serialize};

use crate::error::Result;

/// Tokens each expert was given, layer by layer, over any number of forward passes.
#[derive(Debug, Default)]
pub struct ExpertLoads {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Tokens of each expert, for each layer with a mixture.
    layers: Vec<Vec<u64>>,
    /// The layer that counts next in the pass at hand.
    next: usize,
}

/// How even the loads are.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct RoutingBalance {
    /// Entropy of an expert's share of the tokens over that of even shares: 1 is even, 0 is one expert for all. The mean over
    /// layers.
    pub entropy: f64,
    /// The most loaded expert's tokens over the mean expert's, in the layer where it is worst.
    pub max_over_mean: f64,
    /// Share of experts that got no token. The mean over layers.
    pub idle_share: f64,
    /// Layers with a mixture.
    pub layers: usize,
    /// Pairs of a token and an expert counted in each layer.
    pub assignments: u64,
}

impl ExpertLoads {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A forward pass begins.
    pub(crate) fn begin(&self) {
        self.state().next = 0;
    }

    /// The next layer's routing. Waits for it: this is for evaluations, never for training steps.
    ///
    /// # Errors
    /// The backend's own.
    pub(crate) fn add<B: Backend>(&self, device: &B, routing: &Routing<B>) -> Result<()> {
        let bytes = device.read(&routing.offsets)?;
        let words = bytes.chunks_exact(4);
        let offsets: Vec<i32> = words
            .map(|word| word.iter().rev().fold(0, |value, byte| value << 8 | i32::from(*byte)))
            .collect();
        let counts = offsets.windows(2).map(|pair| u64::from(pair[1].abs_diff(pair[0])));
        let mut state = self.state();
        let layer = state.next;
        state.next += 1;
        if state.layers.len() <= layer {
            state.layers.push(vec![0; offsets.len().saturating_sub(1)]);
        }
        for (sum, count) in state.layers[layer].iter_mut().zip(counts) {
            *sum += count;
        }
        Ok(())
    }

    /// How even the loads are; `None` without a layer that has experts, or without tokens.
    pub fn balance(&self) -> Option<RoutingBalance> {
        let state = self.state();
        let assignments: u64 = state.layers.first()?.iter().sum();
        if assignments == 0 {
            return None;
        }
        let mean = |value: &dyn Fn(&[u64]) -> f64| {
            state.layers.iter().map(|loads| value(loads)).sum::<f64>() / state.layers.len() as f64
        };
        Some(RoutingBalance {
            entropy: mean(&entropy),
            max_over_mean: state
                .layers
                .iter()
                .map(|loads| max_over_mean(loads))
                .fold(0.0, f64::max),
            idle_share: mean(&idle_share),
            layers: state.layers.len(),
            assignments,
        })
    }
}

fn entropy(loads: &[u64]) -> f64 {
    let total = loads.iter().sum::<u64>() as f64;
    let shares = loads.iter().filter(|load| **load > 0).map(|load| *load as f64 / total);
    let entropy: f64 = shares.map(|share| -share * share.ln()).sum();
    match loads.len() {
        0 | 1 => 1.0,
        experts => entropy / (experts as f64).ln(),
    }
}

fn max_over_mean(loads: &[u64]) -> f64 {
    let largest = loads.iter().copied().max().unwrap_or(0) as f64;
    largest * loads.len() as f64 / loads.iter().sum::<u64>() as f64
}

fn idle_share(loads: &[u64]) -> f64 {
    loads.iter().filter(|load| **load == 0).count() as f64 / loads.len() as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn balance(layers: &[&[u64]]) -> Option<RoutingBalance> {
        let loads = ExpertLoads::default();
        loads.state().layers = layers.iter().map(|layer| layer.to_vec()).collect();
        loads.balance()
    }

    #[test]
    fn even_loads_have_entropy_one_and_one_expert_for_all_has_none() {
        let even = balance(&[&[5, 5, 5, 5]]);
        let expected = RoutingBalance {
            entropy: 1.0,
            max_over_mean: 1.0,
            idle_share: 0.0,
            layers: 1,
            assignments: 20,
        };
        assert_eq!(even, Some(expected));
        let single = balance(&[&[0, 0, 8, 0]]).unwrap_or(expected);
        assert_eq!(
            (single.entropy, single.max_over_mean, single.idle_share),
            (0.0, 4.0, 0.75)
        );
    }

    #[test]
    fn layers_are_averaged_and_the_worst_peak_is_kept() {
        let mixed = balance(&[&[4, 4], &[8, 0]]).map(|it| (it.entropy, it.max_over_mean, it.idle_share));
        assert_eq!(mixed, Some((0.5, 2.0, 0.25)));
        assert_eq!(balance(&[]), None);
        assert_eq!(balance(&[&[0, 0]]), None);
    }
}
