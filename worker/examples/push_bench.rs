//! How the orchestrator keeps up: many jobs through a fake RunPod endpoint with a few slots, real Postgres, the real binary.
//!
//!     cargo run --release -p brightrun-worker --example push_bench -- [JOBS] [SLOTS] [WORK_MS] [RESULT.json]
//!
//! A slot stands for a GPU: it takes a pushed job from the fake control plane, claims its row, waits, and completes the row. Measured
//! are the orchestrator's memory and CPU time from the kernel's tables, and how long a free slot waits for its next job.
#![allow(clippy::unwrap_used, clippy::panic)]

#[path = "../../tests/support/fake_runpod.rs"]
mod fake_runpod;

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use brightrun_queue::{Claimed, JobState, Queue, QueueConfig};
use brightrun_worker::artifact::artifact_id;
use brightrun_worker::cli::service::SCHEMA;
use fake_runpod::{CANARY_KEY, FakeRunPod, Route};
use serde_json::{Value, json};
use uuid::Uuid;

/// Clock ticks a second, as the kernel counts CPU time for programs on Linux.
const TICKS: f64 = 100.0;

struct Orchestrator(Child);

impl Drop for Orchestrator {
    fn drop(&mut self) {
        let _gone = self.0.kill();
        let _reaped = self.0.wait();
    }
}

/// What the slots tell.
#[derive(Default)]
struct Told {
    done: AtomicUsize,
    is_over: AtomicBool,
    waits_ms: Mutex<Vec<f64>>,
}

#[tokio::main]
async fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |place: usize, default| arguments.get(place).map_or(default, |text| text.parse().unwrap());
    let (jobs, slots, work_ms) = (number(0, 10_000), number(1, 50), number(2, 500));
    let url = brightrun_queue::private_server::testing::fresh_database("bench")
        .await
        .unwrap();
    let queue = Queue::connect(&QueueConfig::new(&url).unwrap().pool_size(8))
        .await
        .unwrap();
    queue.migrate(SCHEMA).await.unwrap();
    let user = insert(&queue, jobs).await;
    let plane = Arc::new(FakeRunPod::start());
    let folder = tempfile::tempdir().unwrap();
    let orchestrator = start(&url, &plane, slots, folder.path());
    let told = Arc::new(Told::default());
    let started = Instant::now();
    let running: Vec<_> = (0..slots)
        .map(|slot| {
            tokio::spawn(work(
                slot,
                queue.clone(),
                plane.clone(),
                told.clone(),
                user,
                work_ms as u64,
            ))
        })
        .collect();
    let mut peak_rss = 0;
    while told.done.load(Ordering::Relaxed) < jobs {
        tokio::time::sleep(Duration::from_millis(500)).await;
        peak_rss = peak_rss.max(resident_bytes(orchestrator.0.id()));
    }
    let seconds = started.elapsed().as_secs_f64();
    let cpu = cpu_seconds(orchestrator.0.id());
    told.is_over.store(true, Ordering::Relaxed);
    for slot in running {
        slot.await.unwrap();
    }
    let mut waits = std::mem::take(&mut *told.waits_ms.lock().unwrap());
    waits.sort_by(f64::total_cmp);
    let at = |share: f64| waits[((waits.len() - 1) as f64 * share) as usize];
    let runs = plane.of(Route::Run).len();
    let result = json!({
        "what": "jobs pushed by one orchestrator to a fake endpoint; each slot claims, waits and completes the row",
        "jobs": jobs, "slots": slots, "work_ms": work_ms, "seconds": round(seconds),
        "jobs_per_second": round(jobs as f64 / seconds),
        "slots_busy_share": round(jobs as f64 * work_ms as f64 / 1000.0 / (seconds * slots as f64)),
        "orchestrator": {
            "peak_rss_mb": round(peak_rss as f64 / 1e6), "cpu_seconds": round(cpu), "cpu_share_of_one_core": round(cpu / seconds),
        },
        "free_slot_waits_ms": {"median": round(at(0.5)), "p95": round(at(0.95)), "max": round(at(1.0))},
        "submissions": runs, "status_calls": plane.of(Route::Status).len(),
        "violations": queue.violations().await.unwrap().len(),
        "cores": std::thread::available_parallelism().unwrap().get(),
    });
    println!("{result:#}");
    if let Some(path) = arguments.get(3) {
        std::fs::write(path, format!("{result:#}\n")).unwrap();
    }
}

fn round(number: f64) -> f64 {
    (number * 1000.0).round() / 1000.0
}

/// One user, one data set, and the jobs.
async fn insert(queue: &Queue, jobs: usize) -> Uuid {
    let (user, dataset) = (Uuid::new_v4(), Uuid::new_v4());
    let client = queue.client().await.unwrap();
    client
        .execute("insert into auth.users (id) values ($1)", &[&user])
        .await
        .unwrap();
    let path = format!("{user}/{dataset}/a.jsonl");
    client
        .execute(
            "insert into datasets (id, user_id, name, status, training_ready, storage_path, file_name, file_size)
             values ($1, $2, 'bench', 'ready', true, $3, 'a.jsonl', 1)",
            &[&dataset, &user, &path],
        )
        .await
        .unwrap();
    let count = i32::try_from(jobs).unwrap();
    client
        .execute(
            r#"insert into training_jobs (id, user_id, dataset_id, preset_id, hyperparameters, gpu_config, status, current_stage,
                   progress, current_epoch, total_epochs, current_step, total_steps, estimated_total_cost, queued_at)
               select gen_random_uuid(), $1, $2, 'balanced', '{"rank": 16}', '{"type": "A100-80GB", "count": 1}', 'queued',
                      'queued', 0, 0, 1, 0, 1, 1, now()
                 from generate_series(1, $3)"#,
            &[&user, &dataset, &count],
        )
        .await
        .unwrap();
    user
}

fn start(url: &str, plane: &FakeRunPod, slots: usize, folder: &std::path::Path) -> Orchestrator {
    let program: PathBuf = std::env::current_exe().unwrap().parent().unwrap().join("../brightrun");
    let endpoints = json!([{"id": "ep1", "max_jobs": slots}]).to_string();
    let child = Command::new(program)
        .arg("orchestrate")
        .current_dir(folder)
        .env("DATABASE_URL", url)
        .env("RUNPOD_API_KEY", CANARY_KEY)
        .env("BRIGHTRUN_ORCHESTRATOR_API_BASE", plane.api())
        .env("BRIGHTRUN_ORCHESTRATOR_POLL_SECONDS", "1")
        .env("BRIGHTRUN_ORCHESTRATOR_ENDPOINTS", endpoints)
        .env("RUST_LOG", "warn")
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    Orchestrator(child)
}

/// One slot.
async fn work(slot: usize, queue: Queue, plane: Arc<FakeRunPod>, told: Arc<Told>, user: Uuid, work_ms: u64) {
    let name = format!("runpod:bench:{slot}");
    let mut free_since = Instant::now();
    while !told.is_over.load(Ordering::Relaxed) {
        let Some(delivery) = plane.take() else {
            tokio::time::sleep(Duration::from_millis(5)).await;
            continue;
        };
        told.waits_ms
            .lock()
            .unwrap()
            .push(free_since.elapsed().as_secs_f64() * 1000.0);
        let job: Uuid = delivery["input"]["job_id"].as_str().unwrap().parse().unwrap();
        let claimed = claim(&queue, &name, job).await;
        if let Some(claimed) = claimed {
            tokio::time::sleep(Duration::from_millis(work_ms)).await;
            queue.complete(&claimed.lease, &finished(user, job)).await.unwrap();
            told.done.fetch_add(1, Ordering::Relaxed);
        }
        plane.end(delivery["id"].as_str().unwrap(), "COMPLETED");
        free_since = Instant::now();
    }
}

/// As a worker does: a job that cannot be had just now, since its submission is being noted, is asked for again.
async fn claim(queue: &Queue, name: &str, job: Uuid) -> Option<Claimed> {
    loop {
        if let Some(claimed) = queue.claim_job(name, job, Duration::from_secs(60)).await.unwrap() {
            return Some(claimed);
        }
        let state = queue.status(job).await.unwrap().map(|status| status.state);
        if state != Some(JobState::Ready) {
            return None;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn finished(user: Uuid, job: Uuid) -> Value {
    let id = artifact_id(job);
    json!({
        "epoch": 1, "step": 1, "gpu_seconds": 1, "metrics": {"training_loss": 1.0},
        "artifact": {"id": id, "artifacts": {
            "adapter_model.safetensors": format!("{user}/{id}/adapter_model.safetensors"),
            "adapter_config.json": format!("{user}/{id}/adapter_config.json"),
        }},
    })
}

fn resident_bytes(process: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{process}/statm")).unwrap_or_default();
    let pages: u64 = text.split(' ').nth(1).and_then(|pages| pages.parse().ok()).unwrap_or(0);
    pages * 4096
}

fn cpu_seconds(process: u32) -> f64 {
    let text = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    let after_name = text.rsplit(')').next().unwrap_or_default();
    let ticks = |place: usize| {
        after_name
            .split(' ')
            .nth(place)
            .and_then(|text| text.parse::<f64>().ok())
    };
    (ticks(12).unwrap_or(0.0) + ticks(13).unwrap_or(0.0)) / TICKS
}
