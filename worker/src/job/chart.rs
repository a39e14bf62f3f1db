//! Which steps become points of the app's chart.
//!
//! The app reads the first hundred points of a job by time and no more, and its quality stars compare the first
//! with the last. So at most [`MOST_POINTS`] steps are kept, spread evenly, always with the first and the last.

/// As many points as the app ever shows.
pub const MOST_POINTS: u64 = 100;

/// Whether step `step` (counted from 1) of `total` is charted. At most [`MOST_POINTS`] steps of a run are, and the answer
/// depends on nothing else, so that a resumed run charts the same steps.
pub fn is_charted(step: u64, total: u64) -> bool {
    if step == 1 || step == total {
        return true;
    }
    let share = |step: u64| u128::from(step) * u128::from(MOST_POINTS - 2) / u128::from(total.max(1));
    step < total && share(step) != share(step.saturating_sub(1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn at_most_a_hundred_points_with_first_and_last(total in 1_u64..5_000) {
            let charted: Vec<u64> = (1..=total).filter(|step| is_charted(*step, total)).collect();
            prop_assert!(charted.len() as u64 <= MOST_POINTS);
            prop_assert_eq!(charted.first().copied(), Some(1));
            prop_assert_eq!(charted.last().copied(), Some(total));
        }

        #[test]
        fn a_short_run_is_charted_whole(total in 1_u64..=98) {
            prop_assert!((1..=total).all(|step| is_charted(step, total)));
        }

        #[test]
        fn a_long_run_is_charted_evenly(total in 200_u64..5_000) {
            let charted: Vec<u64> = (1..=total).filter(|step| is_charted(*step, total)).collect();
            let widest = charted.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or(0);
            prop_assert!(widest <= total / 98 + 2);
        }
    }
}
