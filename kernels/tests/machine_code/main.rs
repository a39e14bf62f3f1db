//! The machine code of every kernel, read without a GPU: NVRTC compiles, NVIDIA's disassemblers tell what came out.
//!
//! The compiler and the disassemblers are those that `scripts/fetch-test-assets` puts into `.brightrun/nvrtc`, or those of the
//! folder that `BRIGHTRUN_NVRTC` names. Where they are missing each test says so by name and judges nothing;
//! `BRIGHTRUN_REQUIRE_NVRTC=1` makes that a failure.
//!
//! `docs/reference/kernels.md` is what these tests read, as a page:
//!
//! ```text
//! BRIGHTRUN_UPDATE_PAGES=1 cargo test --release -p brightrun-kernels --test machine_code
//! ```

#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

mod cost;
mod expected;
mod occupancy;
mod page;
mod resources;
mod roofline;
mod sass;
mod shapes;
mod tools;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use brightrun_kernels::cuda::{Target, entries};

use self::resources::Resources;
use self::sass::Code;
use self::tools::Tools;

/// The targets whose machine code is described: the first with what the kernels need, and the one with a path of its own.
const DESCRIBED: [&str; 2] = ["sm_80", "sm_90a"];

/// The targets that every run compiles for: the machines this is meant for, and the first of each later generation. The others
/// differ from one of these in what the kernels do not use; `BRIGHTRUN_EVERY_TARGET=1` adds them.
const COMPILED: [&str; 6] = ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120"];
const EVERY: &str = "BRIGHTRUN_EVERY_TARGET";

/// Everything read of one entry for one target.
pub struct Read {
    pub resources: Resources,
    pub code: Code,
}

/// By target, then by entry.
type Readings = BTreeMap<String, BTreeMap<String, Read>>;

fn sources() -> BTreeSet<&'static str> {
    entries().iter().map(|entry| entry.source).collect()
}

/// Does `work` to every item on as many threads as there are, and collects what it gives.
fn spread<T: Sync, U: Send>(items: &[T], work: impl Fn(&T) -> U + Sync) -> Vec<U> {
    let threads = std::thread::available_parallelism()
        .map_or(1, usize::from)
        .min(items.len().max(1));
    let next = AtomicUsize::new(0);
    let done = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let result = work(item);
                    done.lock().unwrap().push(result);
                }
            });
        }
    });
    done.into_inner().unwrap()
}

/// Whether a source is compiled for a target.
pub fn is_for(source: &str, target: &str) -> bool {
    let entry = entries().into_iter().find(|entry| entry.source == source);
    entry.is_some_and(|entry| entry.only.is_none_or(|only| only == target))
}

fn pairs(targets: &[Target]) -> Vec<(&'static str, Target)> {
    let pairs = targets
        .iter()
        .flat_map(|target| sources().into_iter().map(|source| (source, *target)));
    pairs
        .filter(|(source, target)| is_for(source, &target.to_string()))
        .collect()
}

/// Machine code of every source for the described targets.
fn readings(tools: &Tools) -> Readings {
    let targets: Vec<Target> = DESCRIBED.iter().map(|text| text.parse().unwrap()).collect();
    let read = spread(&pairs(&targets), |(source, target)| {
        let cubin = tools.cubin(source, *target);
        let mut resources = tools.resources(&cubin);
        let code = tools.code(&cubin);
        let read: Vec<(String, Read)> = code
            .into_iter()
            .map(|(name, code)| {
                let resources = resources
                    .remove(&name)
                    .unwrap_or_else(|| panic!("no resource usage of {name}"));
                let resources = resources.without_reserved(target.number());
                (name, Read { resources, code })
            })
            .collect();
        (target.to_string(), read)
    });
    let mut readings = Readings::new();
    for (target, entries) in read {
        readings.entry(target).or_default().extend(entries);
    }
    readings
}

#[test]
fn every_entry_compiles_for_every_target() {
    let Some(tools) = tools::find("every_entry_compiles_for_every_target") else {
        return;
    };
    let mut targets = tools.compiler().targets().unwrap();
    for wanted in COMPILED {
        assert!(targets.iter().any(|target| target.to_string() == wanted), "{targets:?}");
    }
    if std::env::var_os(EVERY).is_none() {
        targets.retain(|target| COMPILED.contains(&target.to_string().as_str()));
    }
    let missing = spread(&pairs(&targets), |(source, target)| {
        let resources = tools.resources(&tools.cubin(source, *target));
        let wanted = entries().into_iter().filter(|entry| entry.source == *source);
        let absent = wanted.filter(|entry| !resources.contains_key(&entry.name));
        absent
            .map(|entry| format!("{} for {target}", entry.name))
            .collect::<Vec<_>>()
    });
    let missing: Vec<String> = missing.into_iter().flatten().collect();
    assert!(missing.is_empty(), "compiled code without its entries: {missing:?}");
    let names: Vec<String> = targets.iter().map(Target::to_string).collect();
    let everywhere = entries().iter().filter(|entry| entry.only.is_none()).count();
    println!("{everywhere} entries compile for {}", names.join(", "));
    for only in entries().iter().filter_map(|entry| entry.only).collect::<BTreeSet<_>>() {
        let count = entries().iter().filter(|entry| entry.only == Some(only)).count();
        println!("{count} more for {only} only");
    }
}

#[test]
fn matrix_kernels_use_tensor_cores_nothing_spills_and_the_page_says_what_is() {
    let Some(tools) = tools::find("matrix_kernels_use_tensor_cores_nothing_spills_and_the_page_says_what_is") else {
        return;
    };
    let readings = readings(&tools);
    let kernels: BTreeMap<String, &'static str> =
        entries().into_iter().map(|entry| (entry.name, entry.kernel)).collect();
    let mut trouble = Vec::new();
    for (target, entries) in &readings {
        for (name, read) in entries {
            let kernel = kernels.get(name).unwrap_or_else(|| panic!("{name} is no entry"));
            trouble
                .extend(expected::judge(name, kernel, read).map(|problem| format!("{name} for {target}: {problem}")));
        }
    }
    trouble.extend(expected::strangers(&kernels.values().copied().collect()));
    assert!(trouble.is_empty(), "{trouble:#?}");
    page::check(&tools, &readings);
}
