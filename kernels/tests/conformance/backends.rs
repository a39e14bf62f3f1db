//! Which backends the suite runs on, and the table of what ran.

use std::fmt;

use brightrun_kernels::Tensor;
use brightrun_kernels::cpu::{Cpu, SimdLevel};
use brightrun_kernels::ops::{Backend, Precision};
use brightrun_kernels::oracle::{Real, cast};
use brightrun_kernels::testing::Judge;

/// Runs `cases` on every backend there is and prints how many tensors were compared on each. Fails with every broken case.
pub fn on_every_backend(op: &str, cases: impl Fn(&mut Run<'_, Cpu>)) {
    let mut failures = Vec::new();
    println!(
        "{op:<24} {:<16} {:>8} {:>8} {:>12}",
        "backend", "cases", "tensors", "worst/bound"
    );
    for (name, backend) in backends() {
        let mut run = Run {
            name: &name,
            backend: &backend,
            cases: 0,
            tensors: 0,
            closest: 0.0,
            failures: Vec::new(),
        };
        cases(&mut run);
        println!(
            "{:<24} {:<16} {:>8} {:>8} {:>12.3}",
            "", run.name, run.cases, run.tensors, run.closest
        );
        assert!(run.cases > 0, "{op}: no case ran on {name}");
        failures.append(&mut run.failures);
    }
    assert!(
        failures.is_empty(),
        "{} comparisons failed:\n{}",
        failures.len(),
        failures.join("\n")
    );
}

/// The backends of this build on this machine: the CPU at each level it has. Levels it lacks are printed as absent.
pub fn backends() -> Vec<(String, Cpu)> {
    let supported = SimdLevel::ALL.into_iter().filter(|level| level.is_supported());
    supported
        .map(|level| (format!("cpu/{level}"), Cpu::with_simd(Some(2), level).unwrap()))
        .collect()
}

/// The cases of one op on one backend.
pub struct Run<'a, B: Backend> {
    pub name: &'a str,
    pub backend: &'a B,
    cases: usize,
    tensors: usize,
    closest: f64,
    failures: Vec<String>,
}

/// One case on one backend: compares its tensors.
pub struct Case<'r, 'a, B: Backend> {
    run: &'r mut Run<'a, B>,
    judge: Judge,
}

impl<'a, B: Backend> Run<'a, B> {
    /// Starts a case; `length` is the number of terms of its longest sum.
    pub fn case(&mut self, what: impl fmt::Display, length: usize) -> Case<'_, 'a, B> {
        self.cases += 1;
        let judge = Judge {
            case: format!("{what} on {}", self.name),
            length,
            cancelling: 0.0,
        };
        Case { run: self, judge }
    }
}

impl<B: Backend> Case<'_, '_, B> {
    /// Says how large the terms are that cancel in the results.
    pub fn cancelling(mut self, magnitude: f64) -> Self {
        self.judge.cancelling = magnitude;
        self
    }

    /// Judges one result, given what the oracle and the plain loop say.
    pub fn compare(&mut self, tensor: &str, ours: &Tensor<B>, plain: &[f64], oracle: &[f64]) {
        let ours = self.run.backend.read_f32(ours).unwrap();
        self.run.tensors += 1;
        match self.judge.compare(tensor, &ours, plain, oracle) {
            Ok(verdict) if verdict.bound > 0.0 => {
                self.run.closest = self.run.closest.max(verdict.error / verdict.bound)
            }
            Ok(_) => {}
            Err(message) => self.run.failures.push(message),
        }
    }
}

/// Evaluates `$body` three times, with `$N` the oracle's and the plain loop's number type: `(plain, oracle)`.
#[macro_export]
macro_rules! judged {
    ($precision:expr, $N:ident, $body:expr) => {{
        use brightrun_kernels::oracle::{Mixed, Single};
        fn same<T>(value: T) -> T {
            value
        }
        let oracle: Vec<Vec<f64>> = {
            type $N = f64;
            same($body)
        };
        let plain: Vec<Vec<f64>> = match $precision {
            brightrun_kernels::ops::Precision::F32 => {
                type $N = Single;
                same($body)
            }
            brightrun_kernels::ops::Precision::Bf16 => {
                type $N = Mixed;
                same($body)
            }
        };
        (plain, oracle)
    }};
}

/// Values as f64.
pub fn wide<N: Real>(values: Vec<N>) -> Vec<f64> {
    values.into_iter().map(Real::get).collect()
}

/// Host values in the number type of a loop.
pub fn narrow<N: Real>(values: &[f32]) -> Vec<N> {
    cast(values)
}

pub const PRECISIONS: [Precision; 2] = [Precision::F32, Precision::Bf16];
