//! Which backends the suite runs on, and the table of what ran.

use std::fmt;

use brightrun_kernels::cpu::{Cpu, SimdLevel};
use brightrun_kernels::cuda::{self, Cuda};
use brightrun_kernels::emu::{self, Emulated};
use brightrun_kernels::ops::{Backend, Precision};
use brightrun_kernels::oracle::{Real, cast};
use brightrun_kernels::testing::Judge;
use brightrun_kernels::{DType, Error, Op, Support, Tensor};
use half::bf16;

/// Backends that must be there, by their names without what follows a slash, separated by commas; absence then fails.
const REQUIRED: &str = "BRIGHTRUN_REQUIRED_BACKENDS";

/// The only backends to try, by the same names; without it, all.
const TRIED: &str = "BRIGHTRUN_BACKENDS";

/// The most multiply-adds of one case, for runs under tools that make everything slow.
const MOST_WORK: &str = "BRIGHTRUN_MOST_WORK";

/// Multiply-adds of one case that an emulated device can afford: a fraction of a second.
const EMULATED_WORK: usize = 20_000_000;

/// Runs the cases of one op, which needs these ops, on every backend there is, and prints how many tensors were compared on
/// each; a backend or an op that is absent is printed as absent. Fails with every broken case.
///
/// The cases are compiled once for each type of backend, so they may use nothing that only one of them has.
#[macro_export]
macro_rules! on_every_backend {
    ($what:expr, [$($needed:ident),* $(,)?], |$run:ident| $cases:expr) => {{
        let needed: &[brightrun_kernels::Op] = &[$(brightrun_kernels::Op::$needed),*];
        let mut report = $crate::backends::Report::new($what, needed);
        for (name, backend) in $crate::backends::cpus() {
            report.run(&name, &backend, |$run| $cases);
        }
        if $crate::backends::is_tried("emulated") {
            match $crate::backends::emulated() {
                Ok(backend) => report.run("emulated", &backend, |$run| $cases),
                Err(reason) => report.absent("emulated", &reason),
            }
        }
        if $crate::backends::has_hopper_kernels(needed) && $crate::backends::is_tried("emulated") {
            match $crate::backends::emulated_hopper() {
                Ok(backend) => report.run("emulated/sm_90a", &backend, |$run| $cases),
                Err(reason) => report.absent("emulated", &reason),
            }
        }
        if $crate::backends::is_tried("cuda") {
            match $crate::backends::cuda() {
                Ok(backend) => report.run("cuda", &backend, |$run| $cases),
                Err(reason) => report.absent("cuda", &reason),
            }
        }
        report.finish();
    }};
}

/// Whether a backend is to be tried.
pub fn is_tried(name: &str) -> bool {
    std::env::var(TRIED).map_or(true, |tried| tried.split(',').any(|tried| tried == name))
}

/// The most multiply-adds of a case on a backend.
fn most_work<B: Traits>() -> usize {
    let named = std::env::var(MOST_WORK).ok().map(|most| most.parse().unwrap());
    named.map_or(B::MOST_WORK, |named: usize| named.min(B::MOST_WORK))
}

/// The CPU at each level it has.
pub fn cpus() -> Vec<(String, Cpu)> {
    if !is_tried("cpu") {
        return Vec::new();
    }
    let supported = SimdLevel::ALL.into_iter().filter(|level| level.is_supported());
    supported
        .map(|level| (format!("cpu/{level}"), Cpu::with_simd(Some(2), level).unwrap()))
        .collect()
}

/// The kernels, emulated; or why they cannot be.
pub fn emulated() -> Result<Emulated, String> {
    or_why_not(emu::emulated(Some(2)))
}

/// The kernels, emulated as a device with Hopper's instructions.
pub fn emulated_hopper() -> Result<Emulated, String> {
    or_why_not(emu::emulated_as(Some(2), (9, 0)))
}

/// Whether Hopper does any of these ops by kernels of its own; the others would only be run twice.
pub fn has_hopper_kernels(ops: &[Op]) -> bool {
    let own = |op: &Op| {
        matches!(
            op,
            Op::AttentionForward
                | Op::AttentionBackward
                | Op::LinearForward
                | Op::LinearBackward
                | Op::LinearCrossEntropy
                | Op::GroupedLinearForward
                | Op::GroupedLinearBackward
                | Op::GroupedSwigluForward
                | Op::GroupedPairBackward
        )
    };
    ops.iter().any(own)
}

fn or_why_not(backend: brightrun_kernels::Result<Emulated>) -> Result<Emulated, String> {
    match backend {
        Ok(backend) => Ok(backend),
        Err(Error::Unsupported { reason, .. }) => Err(reason),
        Err(error) => panic!("{error}"),
    }
}

/// The first NVIDIA device; or why there is none.
pub fn cuda() -> Result<Cuda, String> {
    match cuda::cuda(0) {
        Ok(backend) => Ok(backend),
        Err(Error::Unsupported { reason, .. }) => Err(reason),
        Err(error) => panic!("{error}"),
    }
}

/// What ran of one op.
pub struct Report {
    needed: &'static [Op],
    /// The table, printed in one piece since tests run side by side.
    table: String,
    failures: Vec<String>,
}

impl Report {
    pub fn new(what: &str, needed: &'static [Op]) -> Self {
        let table = format!(
            "{what:<24} {:<16} {:>8} {:>8} {:>9} {:>12}\n",
            "backend", "cases", "tensors", "too large", "worst/bound"
        );
        let failures = Vec::new();
        Self {
            needed,
            table,
            failures,
        }
    }

    /// Runs the cases on one backend, if it has the ops.
    pub fn run<B: Traits>(&mut self, name: &str, backend: &B, cases: impl Fn(&mut Run<'_, B>)) {
        for op in self.needed {
            if let Support::Absent(reason) = backend.supports(*op) {
                return self.absent(name, &format!("{op:?}: {reason}"));
            }
        }
        let mut run = Run {
            name,
            backend,
            cases: 0,
            tensors: 0,
            too_large: 0,
            closest: 0.0,
            failures: Vec::new(),
        };
        cases(&mut run);
        self.table.push_str(&format!(
            "{:<24} {name:<16} {:>8} {:>8} {:>9} {:>12.3}\n",
            "", run.cases, run.tensors, run.too_large, run.closest
        ));
        assert!(run.cases > 0, "no case ran on {name}");
        self.failures.append(&mut run.failures);
    }

    /// Says that nothing ran on a backend; fails if it is required.
    pub fn absent(&mut self, name: &str, reason: &str) {
        self.table
            .push_str(&format!("{:<24} {name:<16} absent: {reason}\n", ""));
        let required = std::env::var(REQUIRED).unwrap_or_default();
        if required.split(',').any(|required| required == name) {
            self.failures.push(format!("{name} is required, but absent: {reason}"));
        }
    }

    pub fn finish(self) {
        let failures = self.failures;
        print!("{}", self.table);
        assert!(
            failures.is_empty(),
            "{} comparisons failed:\n{}",
            failures.len(),
            failures.join("\n")
        );
    }
}

/// What the suite wants to know of a backend, besides its ops.
pub trait Traits: Backend {
    /// The activations it works on, all of which are to be tried.
    const ACTIVATIONS: &'static [DType];
    /// The most multiply-adds it can afford in one case.
    const MOST_WORK: usize;
}

impl Traits for Cpu {
    const ACTIVATIONS: &'static [DType] = &[DType::F32];
    const MOST_WORK: usize = usize::MAX;
}

impl Traits for Emulated {
    const ACTIVATIONS: &'static [DType] = &[DType::F32, DType::BF16];
    const MOST_WORK: usize = EMULATED_WORK;
}

impl Traits for Cuda {
    const ACTIVATIONS: &'static [DType] = &[DType::F32, DType::BF16];
    const MOST_WORK: usize = usize::MAX;
}

/// The cases of one op on one backend.
pub struct Run<'a, B: Traits> {
    pub name: &'a str,
    pub backend: &'a B,
    cases: usize,
    tensors: usize,
    too_large: usize,
    closest: f64,
    failures: Vec<String>,
}

/// One case on one backend: compares its tensors.
pub struct Case<'r, 'a, B: Traits> {
    run: &'r mut Run<'a, B>,
    judge: Judge,
}

impl<'a, B: Traits> Run<'a, B> {
    /// The dtypes of activations to try.
    pub fn activations(&self) -> &'static [DType] {
        B::ACTIVATIONS
    }

    /// Whether the backend can afford a case of so many multiply-adds; one that it cannot is counted.
    pub fn affords(&mut self, work: usize) -> bool {
        let affords = work <= most_work::<B>();
        self.too_large += usize::from(!affords);
        affords
    }

    /// An activation of these values, which are first rounded to what its dtype holds.
    pub fn upload<const RANK: usize>(&self, dtype: DType, shape: [usize; RANK], values: &mut [f32]) -> Tensor<B> {
        if dtype != DType::BF16 {
            return self.backend.upload_f32(shape, values).unwrap();
        }
        let halves: Vec<bf16> = values.iter().map(|value| bf16::from_f32(*value)).collect();
        for (value, half) in values.iter_mut().zip(&halves) {
            *value = half.to_f32();
        }
        self.backend
            .upload(dtype, shape, bytemuck::cast_slice(&halves))
            .unwrap()
    }

    /// Room for an activation.
    pub fn output<const RANK: usize>(&self, dtype: DType, shape: [usize; RANK]) -> Tensor<B> {
        self.backend.alloc(dtype, shape).unwrap()
    }

    /// Starts a case; `length` is the number of terms of its longest sum.
    pub fn case(&mut self, what: impl fmt::Display, length: usize) -> Case<'_, 'a, B> {
        self.cases += 1;
        let judge = Judge {
            case: format!("{what} on {}", self.name),
            length,
            cancelling: 0.0,
            roundings: 0,
        };
        Case { run: self, judge }
    }
}

impl<B: Traits> Case<'_, '_, B> {
    /// Says how large the terms are that cancel in the results.
    pub fn cancelling(mut self, magnitude: f64) -> Self {
        self.judge.cancelling = magnitude;
        self
    }

    /// Says how many factors the backend rounds to bf16 on the way to an element, beyond those that the plain loop rounds.
    pub fn rounding(mut self, factors: usize) -> Self {
        self.judge.roundings = factors;
        self
    }

    /// Judges one result, given what the oracle and the plain loop say. Where the result is stored in bf16, the plain loop's is
    /// too.
    pub fn compare(&mut self, tensor: &str, ours: &Tensor<B>, plain: &[f64], oracle: &[f64]) {
        let stored = |value: &f64| match ours.dtype() {
            DType::BF16 => bf16::from_f32(*value as f32).to_f64(),
            _ => *value,
        };
        let plain: Vec<f64> = plain.iter().map(stored).collect();
        let ours = self.run.backend.read_f32(ours).unwrap();
        self.run.tensors += 1;
        match self.judge.compare(tensor, &ours, &plain, oracle) {
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
