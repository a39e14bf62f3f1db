//! How far two correct float32 computations of the same number may lie apart.
//!
//! With unit roundoff `u = 2⁻²⁴`, two orders of summing `n` products differ by at most `2·n·u·Σ|aᵢbᵢ|`, and, rounding errors
//! being as good as independent, almost surely by no more than `2·λ·√n·u·Σ|aᵢbᵢ|` with `λ` a small constant (Higham & Mary
//! 2019, doi 10.1137/18M1226312, whose λ = 4 leaves a failure probability of 2·exp(−8) per sum). A chain of `depth` such sums, each
//! on the last one's result, adds its errors up. So, relative to the largest value of a tensor,
//!
//! ```text
//! bound = 2 · λ · depth · √n · u
//! ```
//!
//! where `n` is the longest sum of the model and `depth` counts the sums from the input to the quantity: 7 per layer forward
//! (norm, q/k/v, scores, values, o, gate/up, down; norms are short sums) and the head; backward as many again, and one for the
//! sum over tokens in a weight's gradient. Cancellation inside a sum can make `Σ|ab|` larger than the result; measuring against
//! the largest value of the whole tensor, not against each element, covers it.

/// `λ` of Higham & Mary.
const LAMBDA: f64 = 4.0;

/// Unit roundoff of float32.
const UNIT_ROUNDOFF: f64 = 1.0 / (1u64 << 24) as f64;

/// Sums in a chain through one layer.
const SUMS_PER_LAYER: f64 = 7.0;

/// Bounds for a model of given extents.
#[derive(Clone, Copy)]
pub struct Bounds {
    layers: f64,
    longest_sum: f64,
}

impl Bounds {
    /// `longest_sum` is the largest of the model's widths and of the number of tokens.
    pub fn new(layers: usize, longest_sum: usize) -> Self {
        Self {
            layers: layers as f64,
            longest_sum: longest_sum as f64,
        }
    }

    /// By how much, relatively, a weight may be changed to account for one sum's rounding errors.
    pub fn one_sum(self) -> f64 {
        LAMBDA * self.longest_sum.sqrt() * UNIT_ROUNDOFF
    }

    fn chain(self, depth: f64) -> f64 {
        2.0 * LAMBDA * depth * self.longest_sum.sqrt() * UNIT_ROUNDOFF
    }

    /// Logits, and losses and everything else computed from one forward pass.
    pub fn forward(self) -> f64 {
        self.chain(SUMS_PER_LAYER * self.layers + 1.0)
    }

    /// Gradients.
    pub fn backward(self) -> f64 {
        self.chain(2.0 * (SUMS_PER_LAYER * self.layers + 1.0) + 1.0)
    }

    /// Losses and gradient norms after `steps` updates, relative to themselves. Adam divides each gradient by its own
    /// magnitude, so an update repeats the gradient's relative error, and each step adds one backward pass's error to the
    /// factors' movement.
    pub fn after_steps(self, steps: usize) -> f64 {
        self.backward() * (1.0 + steps as f64)
    }

    /// The trained factors' movement, in the L2 norm. Adam moves every element by about the learning rate, however small its
    /// gradient: one that lies within its own rounding error of zero may go either way. With gradients spread smoothly around
    /// zero the share of such elements is about their relative error `δ`; each is off by as much as it moved, so the L2
    /// error is `√δ`.
    pub fn movement(self) -> f64 {
        self.backward().sqrt()
    }

    /// The same for the median element, which is not one of those.
    pub fn median_movement(self) -> f64 {
        self.backward()
    }
}

/// Largest difference over largest expected magnitude; infinite where lengths differ, NaN where a value is.
pub fn relative_to_largest(got: &[f32], expected: &[f32]) -> f64 {
    if got.len() != expected.len() || expected.is_empty() {
        return f64::INFINITY;
    }
    let largest = expected
        .iter()
        .fold(0.0f64, |largest, value| largest.max(f64::from(value.abs())));
    let worst = got.iter().zip(expected).fold(0.0f64, |worst, (got, expected)| {
        let difference = (f64::from(*got) - f64::from(*expected)).abs();
        if difference.is_nan() {
            f64::NAN
        } else {
            worst.max(difference)
        }
    });
    match largest == 0.0 {
        true => worst,
        false => worst / largest,
    }
}

/// Difference of two vectors in the L2 norm, over the expected vector's.
pub fn relative_norm(got: &[f32], expected: &[f32]) -> f64 {
    if got.len() != expected.len() {
        return f64::INFINITY;
    }
    let square = |value: f64| value * value;
    let difference: f64 = got
        .iter()
        .zip(expected)
        .map(|(got, expected)| square(f64::from(*got) - f64::from(*expected)))
        .sum();
    let size: f64 = expected.iter().map(|value| square(f64::from(*value))).sum();
    (difference / size).sqrt()
}

/// Median absolute difference over the expected root mean square.
pub fn relative_median(got: &[f32], expected: &[f32]) -> f64 {
    if got.len() != expected.len() || expected.is_empty() {
        return f64::INFINITY;
    }
    let mut differences: Vec<f64> = got
        .iter()
        .zip(expected)
        .map(|(got, expected)| f64::from((got - expected).abs()))
        .collect();
    differences.sort_by(f64::total_cmp);
    let squares: f64 = expected.iter().map(|value| f64::from(*value).powi(2)).sum();
    differences[differences.len() / 2] / (squares / expected.len() as f64).sqrt()
}

/// Relative error of one number.
pub fn relative(got: f64, expected: f64) -> f64 {
    if got == expected {
        0.0
    } else {
        (got - expected).abs() / expected.abs()
    }
}
