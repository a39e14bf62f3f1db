//! Everything goes wrong at once, at random instants, and the rows are true afterwards.
//!
//! One run is a few jobs, two RunPod workers, an orchestrator, a database server and a storage of their own, and an injector that
//! deals every kind of fault once, and more of them. Two runs belong to every test run: one with files in a folder, one with
//! storage over HTTP. More of them, for instance as many as fit into an hour:
//!
//! ```text
//! BRIGHTRUN_FAULT_MINUTES=60 BRIGHTRUN_FAULT_REPORT=faults.json \
//!     cargo test --release -p brightrun-worker --test journeys faults -- --nocapture
//! ```
//!
//! `BRIGHTRUN_FAULT_SEED` is the first seed (the same seed deals the same faults; instants are the machine's), `BRIGHTRUN_FAULT_RUNS` the
//! number of runs. With `BRIGHTRUN_FAULT_MINUTES` some outages of the control plane last minutes, as they do in life: the
//! workers' own waiting times are those of production in every run, only the database's waits between attempts are short.
//!
//! | file | what it knows |
//! |---|---|
//! | `stage` | the processes, and that a worker which leaves is replaced |
//! | `disk` | a small file system that can be filled |
//! | `store` | the storage in its two kinds, and its troubles |
//! | `kinds` | what can go wrong, and how it is made to |
//! | `truth` | every promise, from the rows and the objects alone |

mod disk;
mod kinds;
mod stage;
mod store;
mod truth;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use self::kinds::Kind;
use self::stage::Stage;

/// Jobs of one run.
const JOBS: usize = 5;

/// Longest time between two faults.
const PAUSE: Duration = Duration::from_millis(600);

/// Longest outage of the control plane in a run of the everyday tests.
const SHORT_OUTAGE: Duration = Duration::from_secs(2);

/// The same when there is time for it.
const LONG_OUTAGE: Duration = Duration::from_secs(150);

/// How long jobs may take to end once nothing goes wrong any more.
const PATIENCE: Duration = Duration::from_secs(300);

/// SplitMix64: small, and the same on every machine.
pub(crate) struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    /// A length of time below `longest`.
    fn time(&mut self, longest: Duration) -> Duration {
        longest.mul_f64(self.next() as f64 / u64::MAX as f64)
    }
}

/// What is asked of the runs.
struct Plan {
    first_seed: u64,
    runs: u64,
    /// Begin no further run after this; instead of `runs`.
    minutes: Option<u64>,
    report: Option<String>,
}

impl Plan {
    fn of_environment() -> Self {
        let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
        Self {
            first_seed: number("BRIGHTRUN_FAULT_SEED").unwrap_or(1),
            runs: number("BRIGHTRUN_FAULT_RUNS").unwrap_or(2),
            minutes: number("BRIGHTRUN_FAULT_MINUTES"),
            report: std::env::var("BRIGHTRUN_FAULT_REPORT").ok(),
        }
    }

    fn goes_on(&self, done: u64, begun: Instant) -> bool {
        match self.minutes {
            Some(minutes) => begun.elapsed() < Duration::from_secs(minutes * 60),
            None => done < self.runs,
        }
    }

    fn longest_outage(&self) -> Duration {
        if self.minutes.is_some() {
            LONG_OUTAGE
        } else {
            SHORT_OUTAGE
        }
    }
}

/// What one run tells.
struct Told {
    faults: BTreeMap<Kind, usize>,
    ends: BTreeMap<String, usize>,
    /// Workers that left by themselves, as one on a full disk does, and were replaced.
    replaced: usize,
    /// Longest outage of the control plane.
    outage: Duration,
    /// Attempts that a worker or the end of a lease gave back, or that failed.
    attempts: i64,
}

#[derive(Default)]
struct Tally {
    runs: usize,
    faults: BTreeMap<Kind, usize>,
    ends: BTreeMap<String, usize>,
    replaced: usize,
    longest_outage: Duration,
    attempts: i64,
    violations: Vec<String>,
}

impl Tally {
    fn add(&mut self, told: &Told) {
        for (kind, count) in &told.faults {
            *self.faults.entry(*kind).or_default() += count;
        }
        for (end, count) in &told.ends {
            *self.ends.entry(end.clone()).or_default() += count;
        }
        self.replaced += told.replaced;
        self.longest_outage = self.longest_outage.max(told.outage);
        self.attempts += told.attempts;
    }

    fn json(&self, begun: Instant) -> Value {
        let faults: BTreeMap<&str, usize> = self.faults.iter().map(|(kind, count)| (kind.name(), *count)).collect();
        json!({
            "what": "RunPod workers, an orchestrator, a database and a storage of their own under faults at random instants; \
                     every promise checked from rows and objects afterwards",
            "runs": self.runs, "jobs": self.ends.values().sum::<usize>(), "ends": self.ends,
            "faults": faults, "faults_in_all": self.faults.values().sum::<usize>(),
            "attempts_begun": self.attempts, "workers_that_left_by_themselves": self.replaced,
            "longest_outage_seconds": self.longest_outage.as_secs(),
            "minutes": (begun.elapsed().as_secs_f64() / 6.0).round() / 10.0,
            "violations": self.violations.len(), "violations_in_words": self.violations,
        })
    }
}

async fn one_run(seed: u64, longest_outage: Duration) -> Told {
    let mut stage = Stage::new(seed, longest_outage).await;
    let mut faults = BTreeMap::new();
    for kind in stage.deal() {
        // The instant is the point here: nothing is waited for.
        let pause = Duration::from_millis(50) + stage.random.time(PAUSE);
        tokio::time::sleep(pause).await;
        stage.tend();
        if stage.inject(kind).await {
            *faults.entry(kind).or_default() += 1;
        }
    }
    let outage = stage.recover().await;
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while !stage.is_over().await {
        assert!(
            tokio::time::Instant::now() < deadline,
            "seed {seed} hangs: {:#}",
            stage.open().await
        );
        stage.tend();
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // Leftovers of jobs that have ended are swept by whoever works next.
    stage.one_more_job().await;
    let ends = truth::check(&stage, seed).await;
    let begun = "brightrun.event where event in ('claimed', 'resumed')";
    Told {
        faults,
        ends,
        replaced: stage.replaced,
        outage,
        attempts: stage.world.database.count(begun, &[]).await,
    }
}

fn words(panic: tokio::task::JoinError) -> String {
    match panic.try_into_panic() {
        Ok(panic) => panic
            .downcast_ref::<String>()
            .cloned()
            .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
            .unwrap_or_default(),
        Err(error) => error.to_string(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_fails_and_whenever_the_rows_are_true_afterwards() {
    let (plan, begun) = (Plan::of_environment(), Instant::now());
    let mut tally = Tally::default();
    for run in 0.. {
        if !plan.goes_on(run, begun) {
            break;
        }
        let seed = plan.first_seed + run;
        // A task of its own, so that a broken promise of one run is counted and the next one is made.
        match tokio::spawn(one_run(seed, plan.longest_outage())).await {
            Ok(told) => {
                println!(
                    "seed {seed}: {} faults, {:?}",
                    told.faults.values().sum::<usize>(),
                    told.ends
                );
                tally.add(&told);
            }
            Err(panic) => tally.violations.push(format!("seed {seed}: {}", words(panic))),
        }
        tally.runs += 1;
        if let Some(report) = &plan.report {
            std::fs::write(report, format!("{:#}\n", tally.json(begun))).unwrap();
        }
    }
    println!("{:#}", tally.json(begun));
    assert!(tally.violations.is_empty(), "{:#?}", tally.violations);
}
