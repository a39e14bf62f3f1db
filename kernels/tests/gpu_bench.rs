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

use brightrun_kernels::counting::{Counting, Habits};

use self::clock::Clock;

impl Clock for Counting {
    fn milliseconds(&self, work: &mut dyn FnMut()) -> f64 {
        work();
        0.0
    }

    fn describe(&self) -> serde_json::Value {
        serde_json::json!({ "device": "counting" })
    }
}

/// Shapes are divided by this: contracts do not depend on sizes.
const SHRINK: usize = 256;

#[test]
fn every_case_and_its_check_keep_the_contracts_of_their_ops() {
    let device = Counting::new(Habits::gpu());
    let cases = cases::all(SHRINK);
    for case in &cases {
        let mut body = cases::prepare(&device, case).unwrap_or_else(|error| panic!("{}: {error}", case.name));
        body().unwrap_or_else(|error| panic!("{}: {error}", case.name));
        check::check(&device, case.work).unwrap_or_else(|error| panic!("check of {}: {error}", case.name));
    }
}

#[test]
fn every_goal_of_a_kernel_has_a_case() {
    let cases = cases::all(SHRINK);
    // K8 is K5 and K7 beside another peer.
    for goal in (1..=15).filter(|goal| *goal != 8) {
        let goal = format!("K{goal}");
        assert!(cases.iter().any(|case| case.goal == goal), "{goal} has no case");
    }
}
