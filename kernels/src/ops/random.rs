//! Random contents, made where the tensor lies: for measuring without a checkpoint.

use crate::error::Result;
use crate::ops::Device;
use crate::tensor::Tensor;

/// 2⁶⁴ / φ, the increment of SplitMix64 (Steele, Lea & Flood 2014, doi 10.1145/2660193.2660195).
const GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

/// The mean of the sum of four 16-bit numbers.
const CENTRE: f32 = 131_070.0;

/// 64 random bits at `counter` of the stream of `key`: SplitMix64's finaliser over its counter. Streams of unrelated keys are
/// unrelated.
pub fn random_bits(key: u64, counter: u64) -> u64 {
    let mut bits = key.wrapping_add(counter.wrapping_add(1).wrapping_mul(GAMMA));
    bits = (bits ^ bits >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ bits >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ bits >> 31
}

/// What numbers a tensor is filled with.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Noise {
    /// u8, each value equally likely: element `i` is byte `i mod 8` of `random_bits(key, i / 8)`, the lowest first.
    Bytes,
    /// f32 or bf16, about normal: element `i` is `mean + step · (sum of the four 16-bit quarters of random_bits(key, i) − 131 070)` in
    /// f32, with [`Noise::step`]. No element is further from the mean than 2 √3 deviations.
    Normal {
        /// The mean.
        mean: f32,
        /// The standard deviation.
        deviation: f32,
    },
}

impl Noise {
    /// What one unit of the sum of quarters is worth: the deviation over that of the sum, `√((2³² − 1) / 3)`.
    pub fn step(deviation: f32) -> f32 {
        let of_sum = ((f64::from(u32::MAX)) / 3.0).sqrt();
        (f64::from(deviation) / of_sum) as f32
    }
}

/// The number of [`Noise::Normal`] that random bits are, `step` as [`Noise::step`] gives it.
pub(crate) fn normal(bits: u64, mean: f32, step: f32) -> f32 {
    let quarter = |shift: u32| (bits >> shift & 0xffff) as f32;
    // Integers below 2¹⁸: exact.
    mean + step * (quarter(0) + quarter(16) + quarter(32) + quarter(48) - CENTRE)
}

/// Filling with random numbers.
pub trait RandomOps: Device {
    /// Overwrites every element of a contiguous tensor. The contents are a function of `key`, `noise` and the extents alone, the
    /// same bits on every backend.
    ///
    /// # Errors
    /// A dtype that `noise` is not for.
    fn fill_random(&self, tensor: &mut Tensor<Self>, key: u64, noise: Noise) -> Result<()>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normal_numbers_have_the_mean_and_deviation_that_are_asked_for_and_a_bound() {
        let (mean, deviation, count) = (2.0, 0.5, 100_000);
        let step = Noise::step(deviation);
        let values: Vec<f64> = (0..count)
            .map(|i| f64::from(normal(random_bits(11, i), mean, step)))
            .collect();
        let average = values.iter().sum::<f64>() / count as f64;
        let spread = (values.iter().map(|v| (v - average).powi(2)).sum::<f64>() / count as f64).sqrt();
        // Six standard errors never happen by chance.
        let error = 6.0 * f64::from(deviation) / (count as f64).sqrt();
        assert!((average - f64::from(mean)).abs() < error, "{average}");
        assert!((spread - f64::from(deviation)).abs() < error, "{spread}");
        let most = 2.0 * 3f64.sqrt() * f64::from(deviation) * (1.0 + 1e-6);
        assert!(values.iter().all(|value| (value - f64::from(mean)).abs() <= most));
    }
}
