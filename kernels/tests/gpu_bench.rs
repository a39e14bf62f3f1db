//! The cases of the GPU bench, where there is no GPU: each is set up and called on a backend that computes nothing, has a GPU's
//! dtypes and checks every shape and dtype against the contracts. On a device a case that breaks one would be absent from its table.
#![allow(clippy::unwrap_used, clippy::panic, dead_code)]

#[path = "../../benches/gpu/cases.rs"]
mod cases;
#[path = "../../benches/gpu/check.rs"]
mod check;
#[path = "../../benches/gpu/clock.rs"]
mod clock;
#[path = "../../benches/gpu/operands.rs"]
mod operands;
#[path = "../../benches/gpu/prepare.rs"]
mod prepare;
#[path = "../../benches/gpu/routing.rs"]
mod routing;
#[path = "../../benches/gpu/work.rs"]
mod work;

use brightrun_kernels::counting::{Counting, Habits};
use brightrun_kernels::cpu::Cpu;
use brightrun_kernels::ops::Precision;

use self::clock::Clock;
use self::work::{CACHE_BYTES, Work};

impl Clock for Counting {
    fn milliseconds(&self, work: &mut dyn FnMut()) -> f64 {
        work();
        0.0
    }

    fn describe(&self) -> serde_json::Value {
        serde_json::json!({ "device": "counting" })
    }
}

/// Tokens, experts and vocabulary are divided by this: contracts do not depend on sizes, nor does what rounding loses on these.
const SHRINK: usize = 4096;

#[test]
fn every_case_keeps_the_contract_of_its_op() {
    let device = Counting::new(Habits::gpu());
    for case in &cases::all(SHRINK) {
        let body = prepare::prepare(&device, case.work, Precision::Bf16, 2);
        let mut body = body.unwrap_or_else(|error| panic!("{}: {error}", case.name));
        body(None).unwrap_or_else(|error| panic!("{}: {error}", case.name));
    }
}

#[test]
fn every_case_computes_in_bf16_what_it_does_in_float32() {
    let device = Cpu::new(None).unwrap();
    for case in &cases::all(SHRINK) {
        let checked = check::check(&device, case.work).unwrap_or_else(|error| panic!("{}: {error}", case.name));
        let mean = checked["mean"].as_f64().unwrap_or(f64::NAN);
        // Factors rounded to 8 bits, and moments to the 8 bits of their map.
        let bound = if matches!(case.work, Work::Adamw8bit { .. }) {
            0.1
        } else {
            0.02
        };
        assert!(mean <= bound, "{}: {checked}", case.name);
    }
}

#[test]
fn every_goal_of_a_kernel_has_a_case_and_what_is_measured_beside_one_is_a_case() {
    let cases = cases::all(1);
    // K8 is K5 and K7 beside another peer.
    for goal in (1..=15).filter(|goal| *goal != 8) {
        let goal = format!("K{goal}");
        assert!(cases.iter().any(|case| case.goal == goal), "{goal} has no case");
    }
    for case in &cases {
        let is_case = |name: &String| cases.iter().any(|other| other.name == *name);
        assert!(case.beside.as_ref().is_none_or(is_case), "{}", case.name);
        // Nothing is measured out of the cache.
        assert!(case.bytes * case.turns() as f64 >= CACHE_BYTES, "{}", case.name);
    }
}

#[test]
fn routed_rows_are_those_of_the_histogram_and_every_token_has_its_choices() {
    for (tokens, experts, top) in [(1024, 512, 10), (4096, 512, 10), (16_384, 512, 10), (64, 16, 10)] {
        for skewed in [true, false] {
            let counts = routing::counts(tokens, experts, top, skewed);
            let mut rows = vec![0; experts];
            for mut chosen in routing::chosen(tokens, experts, top, skewed) {
                chosen.sort_unstable();
                chosen.dedup();
                assert_eq!(chosen.len(), top, "{tokens} tokens of {experts}");
                chosen.iter().for_each(|expert| rows[*expert] += 1);
            }
            assert_eq!(rows, counts);
            let (busiest, mean) = (*counts.iter().max().unwrap(), tokens * top / experts);
            if experts == 512 {
                let is_skewed = (4 * mean..=8 * mean).contains(&busiest) && counts.contains(&0);
                assert_eq!(is_skewed, skewed, "{busiest} of {mean}");
            }
        }
    }
}
