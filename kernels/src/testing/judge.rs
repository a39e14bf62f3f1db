//! The rule: `error(backend) ≤ 2 · error(plain loop) + tiny + roundings`.
//!
//! Errors are the largest absolute difference from the float64 oracle over the whole tensor. `tiny` is what reordering a sum
//! of `length` terms may cost: `length · 2⁻²⁴ · largest value`, the bound of a naive f32 sum (Higham 2002, §4.2). Both come
//! from the case itself; no tolerance is typed by hand. `roundings` is for algorithms that round more factors to bf16 than the
//! plain loop has: a unit roundoff, 2⁻⁸, of the largest value each.

use std::fmt;

/// Judges the tensors of one case.
#[derive(Clone, Debug)]
pub struct Judge {
    /// The case, enough to run it again: op, backend, shape, seed.
    pub case: String,
    /// Terms of the longest sum behind one element.
    pub length: usize,
    /// Size of the terms that cancel in a result, where they may be larger than every result; else 0.
    pub cancelling: f64,
    /// Factors on the way to one element that the backend rounds to bf16 and the plain loop does not have; else 0.
    pub roundings: usize,
}

/// How one tensor fared.
#[derive(Clone, Copy, Debug)]
pub struct Verdict {
    /// Largest error of the backend.
    pub error: f64,
    /// What was allowed.
    pub bound: f64,
}

/// The worst element of a tensor that broke the rule.
struct Worst<'a> {
    judge: &'a Judge,
    tensor: &'a str,
    index: usize,
    ours: f64,
    oracle: f64,
    bound: f64,
}

impl fmt::Display for Worst<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            judge,
            tensor,
            index,
            ours,
            oracle,
            bound,
        } = self;
        let difference = (ours - oracle).abs();
        write!(
            formatter,
            "{}: {tensor}[{index}] is {ours:e}, the oracle says {oracle:e}: off by {difference:e}, allowed {bound:e}",
            judge.case
        )
    }
}

impl Judge {
    /// Compares a whole tensor with the oracle, given what the plain loop of the same precision made of it.
    ///
    /// # Errors
    /// A message naming the case, the worst element, both values and the bound, when the rule is broken, a length differs, or
    /// one side only is not finite.
    pub fn compare(&self, tensor: &str, ours: &[f32], plain: &[f64], oracle: &[f64]) -> Result<Verdict, String> {
        if ours.len() != oracle.len() || plain.len() != oracle.len() {
            return Err(format!(
                "{}: {tensor} has {} elements, not {}",
                self.case,
                ours.len(),
                oracle.len()
            ));
        }
        let largest = oracle
            .iter()
            .filter(|v| v.is_finite())
            .fold(self.cancelling, |a, b| a.max(b.abs()));
        let allowed = plain
            .iter()
            .zip(oracle)
            .map(|(a, b)| difference(*a, *b))
            .filter(|d| d.is_finite())
            .fold(0.0, f64::max);
        let tiny = self.length as f64 * (f64::from(f32::EPSILON) / 2.0) * largest;
        let rounded = self.roundings as f64 * (half::bf16::EPSILON.to_f64() / 2.0) * largest;
        let bound = 2.0 * allowed + tiny + rounded;
        let mut worst = (0, 0.0);
        for (index, (ours, oracle)) in ours.iter().zip(oracle).enumerate() {
            let difference = difference(f64::from(*ours), *oracle);
            if difference > worst.1 {
                worst = (index, difference);
            }
        }
        if worst.1 <= bound {
            return Ok(Verdict { error: worst.1, bound });
        }
        let (index, _) = worst;
        let (ours, oracle) = (f64::from(ours[index]), oracle[index]);
        Err(Worst {
            judge: self,
            tensor,
            index,
            ours,
            oracle,
            bound,
        }
        .to_string())
    }
}

/// How far apart two values are: infinitely, when they differ in kind (NaN, an infinity).
fn difference(a: f64, b: f64) -> f64 {
    if a.is_nan() && b.is_nan() || a == b {
        0.0
    } else if a.is_finite() && b.is_finite() {
        (a - b).abs()
    } else {
        f64::INFINITY
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn judge() -> Judge {
        Judge {
            case: "case".to_owned(),
            length: 4,
            cancelling: 0.0,
            roundings: 0,
        }
    }

    #[test]
    fn twice_the_plain_loops_error_is_allowed_and_no_more() {
        let (plain, oracle) = ([1.01, 2.0], [1.0, 2.0]);
        assert!(judge().compare("y", &[1.0, 2.0199], &plain, &oracle).is_ok());
        let message = judge().compare("y", &[1.0, 2.0201], &plain, &oracle).unwrap_err();
        assert!(message.contains("y[1]"), "{message}");
    }

    #[test]
    fn an_exact_plain_loop_leaves_only_rounding() {
        let (plain, oracle) = ([1.0], [1.0]);
        assert!(judge().compare("y", &[1.0 + f32::EPSILON], &plain, &oracle).is_ok());
        assert!(
            judge()
                .compare("y", &[1.0 + 4.0 * f32::EPSILON], &plain, &oracle)
                .is_err()
        );
    }

    #[test]
    fn a_nan_or_infinity_on_one_side_fails() {
        for (ours, oracle) in [
            (f32::NAN, 1.0),
            (1.0, f64::NAN),
            (f32::INFINITY, 1.0),
            (f32::INFINITY, f64::NEG_INFINITY),
        ] {
            assert!(
                judge().compare("y", &[ours], &[oracle], &[oracle]).is_err(),
                "{ours} against {oracle}"
            );
        }
        assert!(
            judge()
                .compare("y", &[f32::NEG_INFINITY], &[f64::NEG_INFINITY], &[f64::NEG_INFINITY])
                .is_ok()
        );
    }
}
