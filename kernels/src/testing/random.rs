//! Seeded inputs.

/// A small generator (SplitMix64, Steele et al. 2014): the same seed gives the same inputs everywhere.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// A generator; neighbouring seeds give unrelated values.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0xD1B5_4A32_D192_ED03)
    }

    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        bits ^ (bits >> 31)
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: usize) -> usize {
        (self.bits() % bound as u64) as usize
    }

    /// A number in 0..1.
    pub fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Values of about the normal distribution (Irwin–Hall of twelve).
    pub fn normal(&mut self, count: usize) -> Vec<f32> {
        (0..count)
            .map(|_| ((0..12).map(|_| self.unit()).sum::<f64>() - 6.0) as f32)
            .collect()
    }

    /// Values whose magnitudes span many powers of two, with some exact zeros: what breaks careless sums.
    pub fn adversarial(&mut self, count: usize) -> Vec<f32> {
        let values = self.normal(count);
        values
            .into_iter()
            .map(|value| match self.below(16) {
                0 => 0.0,
                1 => value * 1e3,
                power => value * (-(power as f32)).exp2(),
            })
            .collect()
    }
}
