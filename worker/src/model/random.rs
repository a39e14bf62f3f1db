//! Random numbers as a pure function of a seed, a purpose and a counter.
//!
//! Nothing depends on the order in which numbers are drawn, on the number of threads, or on the version of a library:
//! the same seed gives the same adapter and the same order of examples for ever, which is what lets a resumed run be
//! bit-equal without saving a generator's state.

use brightrun_kernels::ops::random_bits;
use sha2::{Digest, Sha256};

/// A stream of numbers, addressed by a counter.
#[derive(Clone, Copy, Debug)]
pub struct CounterRandom {
    key: u64,
}

impl CounterRandom {
    /// The stream for a purpose (`"lora-init model.layers.0…"`) under a seed. Streams of different purposes are unrelated.
    pub fn new(seed: u64, purpose: &str) -> Self {
        let digest = Sha256::new()
            .chain_update(seed.to_le_bytes())
            .chain_update(purpose)
            .finalize();
        let key = digest.iter().take(8).fold(0, |key, byte| key << 8 | u64::from(*byte));
        Self { key }
    }

    /// What a device fills a tensor by, to have this stream's bits.
    pub fn key(&self) -> u64 {
        self.key
    }

    /// 64 random bits at `counter`, by [`random_bits`].
    pub fn bits(&self, counter: u64) -> u64 {
        random_bits(self.key, counter)
    }

    /// Uniform in `[0, 1)`, 24 bits: every value is exact in f32.
    pub fn unit(&self, counter: u64) -> f32 {
        (self.bits(counter) >> 40) as f32 / (1u32 << 24) as f32
    }

    /// Standard normal (Box & Muller 1958), from the two uniform numbers at `2 · counter` and the one after.
    pub fn normal(&self, counter: u64) -> f64 {
        let uniform = |counter| (self.bits(counter) >> 11) as f64 / (1u64 << 53) as f64;
        // 1 − x is in (0, 1], so its logarithm is finite.
        let radius = (-2.0 * (1.0 - uniform(2 * counter)).ln()).sqrt();
        radius * (std::f64::consts::TAU * uniform(2 * counter + 1)).cos()
    }

    /// Uniform in `0..bound` (Lemire's multiply-shift; the bias is below `bound / 2⁶⁴`). 0 when `bound` is 0.
    pub fn below(&self, counter: u64, bound: usize) -> usize {
        ((u128::from(self.bits(counter)) * bound as u128) >> 64) as usize
    }

    /// A permutation of `0..length` (Fisher–Yates).
    pub fn permutation(&self, length: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..length).collect();
        for last in (1..length).rev() {
            order.swap(last, self.below(last as u64, last + 1));
        }
        order
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_permutation_holds_every_index_once_and_depends_on_seed_and_purpose() {
        let one = CounterRandom::new(1, "a").permutation(1000);
        let mut sorted = one.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..1000).collect::<Vec<_>>());
        assert_ne!(one, CounterRandom::new(2, "a").permutation(1000));
        assert_ne!(one, CounterRandom::new(1, "b").permutation(1000));
        assert_eq!(one, CounterRandom::new(1, "a").permutation(1000));
    }

    #[test]
    fn units_are_uniform_to_sampling_error() {
        let random = CounterRandom::new(7, "units");
        let count = 100_000;
        let values: Vec<f64> = (0..count).map(|counter| f64::from(random.unit(counter))).collect();
        let mean = values.iter().sum::<f64>() / count as f64;
        // The standard error of the mean is sqrt(1/12 / n); six of them never happen by chance.
        assert!((mean - 0.5).abs() < 6.0 * (1.0 / 12.0 / count as f64).sqrt(), "{mean}");
        assert!(values.iter().all(|value| (0.0..1.0).contains(value)));
    }
}
