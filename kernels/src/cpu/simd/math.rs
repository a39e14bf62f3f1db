//! Scalar functions written so that loops over them vectorise: no branches, no tables, no library calls.

/// How `a · b + c` is computed.
pub(super) trait Fused {
    /// `a · b + c`.
    fn fused(a: f32, b: f32, c: f32) -> f32;
}

/// With one rounding: for levels that have fused multiply-add.
pub(super) struct OneRounding;

/// With two roundings: elsewhere a fused multiply-add would be a slow library call.
pub(super) struct TwoRoundings;

impl Fused for OneRounding {
    #[inline(always)]
    fn fused(a: f32, b: f32, c: f32) -> f32 {
        a.mul_add(b, c)
    }
}

impl Fused for TwoRoundings {
    #[inline(always)]
    fn fused(a: f32, b: f32, c: f32) -> f32 {
        a * b + c
    }
}

/// `e^x` to about one unit in the last place, with subnormal results, infinities and NaN as they should be.
///
/// `x = n · ln 2 + r` with `|r| ≤ ln 2 / 2`, and `e^r` by Cephes' polynomial (Moshier 1992). `2^n` is applied in two halves, so
/// that neither leaves the exponent range.
#[inline(always)]
pub(super) fn exp<F: Fused>(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 · 2²³: adding it leaves the nearest integer in the low bits
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let x = x.clamp(-104.0, 89.0);
    let shifted = F::fused(x, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = F::fused(n, -LN2_LOW, F::fused(n, -LN2_HIGH, x));
    let p = F::fused(1.987_569_1e-4, r, 1.398_199_9e-3);
    let p = F::fused(p, r, 8.333_452e-3);
    let p = F::fused(p, r, 4.166_579_6e-2);
    let p = F::fused(p, r, 1.666_666_5e-1);
    let p = F::fused(p, r, 0.5);
    let y = F::fused(p, r * r, r) + 1.0;
    let n = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    let half = n >> 1;
    let power = |n: i32| f32::from_bits((n.wrapping_add(127) as u32) << 23);
    y * power(half) * power(n.wrapping_sub(half))
}

/// `1 / (1 + e^−x)`.
#[inline(always)]
pub(super) fn logistic<F: Fused>(x: f32) -> f32 {
    1.0 / (1.0 + exp::<F>(-x))
}

/// The bits of the nearest bf16 value, ties to even; NaN stays NaN.
#[inline(always)]
pub(super) fn bf16_bits(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7FFF).wrapping_add((bits >> 16) & 1) >> 16;
    let quiet = (bits >> 16) | 0x40;
    (if value.is_nan() { quiet } else { rounded }) as u16
}

/// The f32 value of bf16 bits.
#[inline(always)]
pub(super) fn widen(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check<F: Fused>() {
        let mut worst = 0.0f64;
        let mut x = -87.0f32;
        while x < 88.7 {
            let exact = f64::from(x).exp();
            let unit = f64::from((exact as f32).next_up()) - f64::from(exact as f32);
            worst = worst.max((f64::from(exp::<F>(x)) - exact).abs() / unit);
            x += 0.000_731;
        }
        assert!(worst < 2.0, "{worst} units in the last place");
        assert_eq!(exp::<F>(0.0), 1.0);
        assert_eq!(exp::<F>(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp::<F>(-200.0), 0.0);
        assert_eq!(exp::<F>(f32::INFINITY), f32::INFINITY);
        assert!(exp::<F>(f32::NAN).is_nan());
        assert!(
            (exp::<F>(-95.0) / (-95.0f32).exp() - 1.0).abs() < 1e-2,
            "subnormal results are gradual"
        );
    }

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        check::<OneRounding>();
        check::<TwoRoundings>();
    }

    #[test]
    fn bf16_rounding_is_that_of_the_half_crate() {
        for bits in (0..=u32::MAX).step_by(9_973) {
            let value = f32::from_bits(bits);
            let theirs = half::bf16::from_f32(value);
            assert!(
                bf16_bits(value) == theirs.to_bits() || value.is_nan() && theirs.is_nan(),
                "{value:e}"
            );
        }
    }
}
