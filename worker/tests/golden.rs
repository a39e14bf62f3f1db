//! Agreement with the peers: transformers, PEFT, torch and bitsandbytes.
//!
//! Runs every case folder under `BRIGHTRUN_GOLDEN_DIR` (default: the project's fixtures), choosing by what a folder holds:
//!
//! | the folder holds | checked |
//! |---|---|
//! | `nf4.json` | NF4 codes, scales and decoded values, bit for bit |
//! | `model/` and `expected.json` | logits, token losses, every gradient, optimizer steps, NF4 logits, packed = separate |
//! | neither | nothing; it is named, and does not count as a case |
//!
//! Bounds are derived, see [`bounds`], and for models that magnify errors measured on the model itself, see [`twin`]; none was
//! chosen by looking at a result.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "golden/bounds.rs"]
mod bounds;
#[path = "golden/model_case.rs"]
mod model_case;
#[path = "golden/nf4_case.rs"]
mod nf4_case;
#[path = "golden/round_trip.rs"]
mod round_trip;
#[path = "golden/twin.rs"]
mod twin;

use std::io::Write;
use std::path::{Path, PathBuf};

use brightrun_kernels::cpu::Cpu;
use brightrun_kernels::{Backend, Error, cuda, emu};

/// A quantity's worst error beside its bound.
pub struct Check {
    /// What was compared.
    pub quantity: String,
    /// The worst relative error found.
    pub error: f64,
    /// The largest error allowed.
    pub bound: f64,
}

/// What a case gave: its checks, or why it could not be run.
pub type CaseResult = Result<Vec<Check>, String>;

impl Check {
    /// A check that holds when `error` is at most `bound`; a NaN fails it.
    pub fn new(quantity: impl Into<String>, error: f64, bound: f64) -> Self {
        Self {
            quantity: quantity.into(),
            error,
            bound,
        }
    }

    fn holds(&self) -> bool {
        self.error <= self.bound
    }
}

#[test]
fn golden_cases_agree_with_the_peers() {
    all_agree(&Cpu::new(None).unwrap());
}

/// The CUDA kernels' own sources, run on this machine's CPU.
#[test]
fn golden_cases_agree_on_the_emulated_device() {
    match emu::emulated(None) {
        Ok(device) => all_agree(&device),
        Err(Error::Unsupported { reason, .. }) => absent("emulated", &reason),
        Err(error) => panic!("{error}"),
    }
}

/// The same on a real device, where one is.
#[test]
fn golden_cases_agree_on_the_gpu() {
    match cuda::cuda(0) {
        Ok(device) => all_agree(&device),
        Err(Error::Unsupported { reason, .. }) => absent("cuda", &reason),
        Err(error) => panic!("{error}"),
    }
}

/// Says that a backend is not there; a failure where `BRIGHTRUN_REQUIRED_BACKENDS`, a list with commas, names it.
fn absent(backend: &str, reason: &str) {
    say(&format!("golden on `{backend}`: absent ({reason}); nothing was tested"));
    let required = std::env::var("BRIGHTRUN_REQUIRED_BACKENDS").unwrap_or_default();
    let is_required = required.split(',').any(|name| name.trim() == backend);
    assert!(!is_required, "{backend} is required and absent: {reason}");
}

fn all_agree<B: Backend>(device: &B) {
    let root = std::env::var_os("BRIGHTRUN_GOLDEN_DIR").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/golden"),
        PathBuf::from,
    );
    let mut folders: Vec<PathBuf> = std::fs::read_dir(&root)
        .unwrap_or_else(|error| panic!("{}: {error}", root.display()))
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_dir())
        .collect();
    folders.sort();
    let (mut cases, mut failed) = (0, Vec::new());
    for folder in folders {
        let name = format!("{} on {}", folder.file_name().unwrap().to_string_lossy(), device.name());
        let result = if folder.join("nf4.json").is_file() {
            nf4_case::run(&folder, device)
        } else if folder.join("expected.json").is_file() && folder.join("model").is_dir() {
            model_case::run(&folder, device)
        } else {
            say(&format!("golden {name}: holds no case of this test"));
            continue;
        };
        cases += 1;
        if !report(&name, result) {
            failed.push(name);
        }
    }
    assert!(cases > 0, "no golden case was found in {}", root.display());
    assert!(
        failed.is_empty(),
        "{} of {cases} golden cases disagree: {}",
        failed.len(),
        failed.join(", ")
    );
}

/// One line per case; for a failed one, one more for each broken bound.
fn report(name: &str, result: CaseResult) -> bool {
    let checks = match result {
        Ok(checks) => checks,
        Err(reason) => {
            say(&format!("golden {name}: CANNOT RUN: {reason}"));
            return false;
        }
    };
    let is_good = checks.iter().all(Check::holds);
    let summary: Vec<String> = worst_of_each(&checks)
        .iter()
        .map(|check| {
            format!(
                "{} {:.1e}/{:.1e}",
                check.quantity.split(' ').next().unwrap(),
                check.error,
                check.bound
            )
        })
        .collect();
    let verdict = if is_good { "agrees" } else { "DISAGREES" };
    say(&format!(
        "golden {name}: {verdict} (error/bound): {}",
        summary.join(", ")
    ));
    for check in checks.iter().filter(|check| !check.holds()) {
        say(&format!(
            "    {}: error {:.3e} is above {:.3e}",
            check.quantity, check.error, check.bound
        ));
    }
    is_good
}

/// The worst check of each quantity; the quantity is the first word, the rest says which tensor.
fn worst_of_each(checks: &[Check]) -> Vec<&Check> {
    let mut worst: Vec<&Check> = Vec::new();
    for check in checks {
        let word = check.quantity.split(' ').next();
        match worst.iter_mut().find(|other| other.quantity.split(' ').next() == word) {
            Some(other) if check.error / check.bound > other.error / other.bound || check.error.is_nan() => {
                *other = check
            }
            Some(_) => {}
            None => worst.push(check),
        }
    }
    worst
}

/// Past the test harness's capture, so that a passing run shows its lines too.
fn say(line: &str) {
    let mut direct = std::io::stderr();
    writeln!(direct, "{line}").unwrap();
}
