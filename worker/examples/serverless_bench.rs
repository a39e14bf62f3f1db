//! What the serverless worker promises in milliseconds, measured: tests time nothing.
//!
//!     cargo build --release -p brightrun-worker
//!     cargo run --release -p brightrun-worker --example serverless_bench -- [RESULT.json]
//!
//! | measured | promise |
//! |---|---|
//! | from starting the program to its first request for a job, preflight included | 300 ms on the CPU |
//! | from the acknowledgement of a result to the next request for a job | 100 ms |
//! | between two heartbeats | their interval, within ten per cent |
//!
//! Everything is seen from the control plane: a machine that is busy with other things makes every number larger, never smaller.
#![allow(clippy::unwrap_used, clippy::panic)]

#[path = "../../tests/support/fake_runpod.rs"]
mod fake_runpod;
#[path = "../../tests/support/runpod_worker.rs"]
mod support;

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Instant;

use brightrun_worker::demo::miniature::Miniature;
use fake_runpod::{FakeRunPod, Route};
use serde_json::{Value, json};
use support::{Mock, settings};

/// Starts of the program.
const STARTS: usize = 30;

/// Jobs, one after the other.
const JOBS: usize = 300;

/// Heartbeats, a second apart.
const HEARTBEATS: usize = 30;

fn main() {
    let result = json!({
        "what": "the serverless worker seen from a control plane on the same machine; milliseconds",
        "start_to_first_take_ms": summary(starts()),
        "result_to_next_take_ms": summary(gaps_between_jobs()),
        "heartbeat_interval_ms": summary(heartbeats()),
        "cores": std::thread::available_parallelism().unwrap().get(),
        "load_average": std::fs::read_to_string("/proc/loadavg").unwrap_or_default().split(' ').next().unwrap_or_default(),
    });
    println!("{result:#}");
    if let Some(path) = std::env::args().nth(1) {
        std::fs::write(path, format!("{result:#}\n")).unwrap();
    }
}

fn summary(mut milliseconds: Vec<f64>) -> Value {
    milliseconds.sort_by(f64::total_cmp);
    let at = |share: f64| (milliseconds[((milliseconds.len() - 1) as f64 * share) as usize] * 100.0).round() / 100.0;
    json!({"count": milliseconds.len(), "least": at(0.0), "median": at(0.5), "p95": at(0.95), "most": at(1.0)})
}

/// The whole program with a small checkpoint, from its start to its first take.
fn starts() -> Vec<f64> {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    let text =
        "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}, {\"role\": \"assistant\", \"content\": \"b\"}]}\n";
    let small = Miniature {
        hidden: 32,
        layers: 2,
        heads: 2,
        key_value_heads: 1,
        head_dim: 16,
        intermediate: 64,
        vocabulary: 512,
        seed: 7,
    };
    small.write(&model, &[text.to_owned()]).unwrap();
    let program: PathBuf = std::env::current_exe().unwrap().parent().unwrap().join("../brightrun");
    let started = |_| {
        let plane = FakeRunPod::start();
        let mut command = Command::new(&program);
        command
            .arg("worker")
            .current_dir(folder.path())
            .env_clear()
            .envs(plane.variables())
            // The network check belongs to every start; a disk that is not this program's is no part of it.
            .env("RUNPOD_SKIP_AUTO_SYSTEM_CHECKS", "false")
            .env("RUNPOD_MIN_DISK_PERCENT", "0")
            .env("RUNPOD_MIN_MEMORY_GB", "0")
            .env("RUNPOD_ENDPOINT_ID", "ep1")
            .env("BRIGHTRUN_MODEL_PATH", &model)
            .env("BRIGHTRUN_MODEL_BASE_MODEL", "local/miniature")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let begun = Instant::now();
        let mut child = command.spawn().unwrap();
        plane.some(Route::Take);
        let took = plane.of(Route::Take)[0].at - begun;
        child.kill().unwrap();
        child.wait().unwrap();
        took.as_secs_f64() * 1000.0
    };
    (0..STARTS).map(started).collect()
}

fn gaps_between_jobs() -> Vec<f64> {
    let plane = FakeRunPod::start();
    let _worker = support::start(&plane, Mock::default(), settings());
    plane.queue((0..JOBS).map(|number| json!({"id": format!("job-{number}"), "input": {"return": number}})));
    plane.result(&format!("job-{}", JOBS - 1));
    plane.eventually("the last take", |_| plane.of(Route::Take).len() > JOBS);
    let (results, takes) = (plane.of(Route::Done), plane.of(Route::Take));
    let pairs = results.iter().zip(takes.iter().skip(1));
    pairs
        .map(|(result, take)| (take.at - result.answered.unwrap()).as_secs_f64() * 1000.0)
        .collect()
}

fn heartbeats() -> Vec<f64> {
    let plane = FakeRunPod::start();
    let _worker = support::start(&plane, Mock::default(), settings());
    plane.patiently("heartbeats", std::time::Duration::from_secs(300), |_| {
        plane.of(Route::Ping).len() > HEARTBEATS
    });
    let pings = plane.of(Route::Ping);
    let pairs = pings.windows(2);
    pairs
        .map(|pair| (pair[1].at - pair[0].at).as_secs_f64() * 1000.0)
        .collect()
}
