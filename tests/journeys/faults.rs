//! Everything goes wrong at once, at random instants, and the rows are true afterwards.
//!
//! One run is a few jobs, two RunPod workers, an orchestrator, and an injector that kills, signals, cuts connections, delivers
//! twice, cancels, and takes the storage away. `BRIGHTRUN_FAULT_RUNS=100 cargo test --release -p brightrun-worker --test journeys
//! faults -- --nocapture` makes a hundred; `BRIGHTRUN_FAULT_SEED` repeats one. What was injected when is printed.

use std::collections::BTreeMap;
use std::process::Child;
use std::sync::Arc;
use std::time::Duration;

use brightrun_worker::artifact::artifact_id;
use brightrun_worker::orchestrator::Orchestrator;
use brightrun_worker::orchestrator::metrics::Metrics;
use brightrun_worker::orchestrator::settings::EndpointSettings;
use brightrun_worker::secret::Secret;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::fake_runpod::{CANARY_KEY, FakeRunPod, Route, Step};
use crate::world::World;

/// Jobs of one run.
const JOBS: usize = 4;

/// Faults of one run.
const FAULTS: usize = 12;

/// What can go wrong.
const KINDS: [&str; 9] = [
    "kill -9",
    "SIGTERM",
    "results reset",
    "control plane down",
    "429 storm",
    "duplicate delivery",
    "database connections cut",
    "storage refuses",
    "cancel by the user",
];

/// SplitMix64: small, and the same on every machine.
struct Random(u64);

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
}

struct Run {
    world: World,
    plane: Arc<FakeRunPod>,
    workers: Vec<Child>,
    jobs: Vec<Uuid>,
    cancelled: Vec<Uuid>,
    duplicates: usize,
    random: Random,
}

impl Drop for Run {
    fn drop(&mut self) {
        for worker in &mut self.workers {
            let _gone = worker.kill();
            let _reaped = worker.wait();
        }
    }
}

impl Run {
    async fn new(seed: u64) -> Self {
        let (mut world, plane) = (World::new().await, Arc::new(FakeRunPod::start()));
        brightrun_worker::storage::http::install_crypto_provider();
        world.config.orchestrator.api_base = plane.api();
        world.config.orchestrator.poll_seconds = 1;
        world.config.orchestrator.endpoints = vec![EndpointSettings {
            id: "ep1".to_owned(),
            gpu_types: Vec::new(),
            max_jobs: 3,
        }];
        let owner = &world.database.owner;
        let quick = "update brightrun.job_kind set retry_base = '100 milliseconds', retry_cap = '1 second'";
        owner.batch_execute(quick).await.unwrap();
        let mut run = Self {
            world,
            plane,
            workers: Vec::new(),
            jobs: Vec::new(),
            cancelled: Vec::new(),
            duplicates: 0,
            random: Random(seed),
        };
        for _ in 0..JOBS {
            let epochs = 3 + run.random.below(12);
            let job = run.world.job(10, epochs).await;
            run.jobs.push(job);
        }
        // Most runs should end well in spite of many counted attempts; some run out of them.
        let attempts = "update brightrun.job set max_attempts = 3 + (abs(hashtext(id::text)) % 10)";
        run.world.database.owner.batch_execute(attempts).await.unwrap();
        run
    }

    fn start_worker(&self, place: usize) -> Child {
        let mut command = self.world.brightrun(&["worker"]);
        command
            .envs(self.plane.variables())
            .env("RUNPOD_POD_ID", format!("pod{place}"));
        command
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null());
        command.spawn().unwrap()
    }

    fn restart(&mut self, place: usize, signal: Signal) {
        kill_process(Pid::from_child(&self.workers[place]), signal).unwrap();
        self.workers[place].wait().unwrap();
        self.plane.lose(&format!("pod{place}"));
        self.workers[place] = self.start_worker(place);
    }

    async fn inject(&mut self, kind: &str) {
        let place = self.random.below(self.workers.len());
        match kind {
            "kill -9" => {
                self.restart(place, Signal::KILL);
                self.redeliver().await;
            }
            "SIGTERM" => {
                self.restart(place, Signal::TERM);
                self.redeliver().await;
            }
            "results reset" => self.plane.script(Route::Done, vec![Step::Drop; 4]),
            "control plane down" => {
                for route in [
                    Route::Take,
                    Route::Done,
                    Route::Ping,
                    Route::Stop,
                    Route::Run,
                    Route::Status,
                ] {
                    self.plane.script(route, vec![Step::DropEarly; 3]);
                }
            }
            "429 storm" => {
                for route in [Route::Run, Route::Status, Route::Cancel, Route::Take, Route::Done] {
                    self.plane
                        .script(route, vec![Step::status(429).with("Retry-After", "1"); 2]);
                }
            }
            "duplicate delivery" => self.redeliver().await,
            "database connections cut" => {
                let cut = "select count(pg_terminate_backend(pid)) from pg_stat_activity
                            where datname = current_database() and pid <> pg_backend_pid()";
                self.world.database.owner.query_one(cut, &[]).await.unwrap();
            }
            "storage refuses" => {
                // A file where the bucket's folder should be: every write fails.
                let bucket = self.world.storage_folder().join("lora-models");
                let aside = self.world.storage_folder().join("aside");
                let was_there = std::fs::rename(&bucket, &aside).is_ok();
                if was_there && std::fs::write(&bucket, b"").is_ok() {
                    tokio::time::sleep(Duration::from_millis(400)).await;
                    std::fs::remove_file(&bucket).unwrap();
                }
                if was_there {
                    std::fs::rename(&aside, &bucket).unwrap();
                }
            }
            _ => {
                let job = self.jobs[self.random.below(self.jobs.len())];
                let mut app = self.world.database.signed_in(self.world.user).await;
                // A user may cancel what is not over; the policies refuse the rest.
                if app.cancel_job(job, 0.0).await.unwrap_or(0) == 1 {
                    self.cancelled.push(job);
                }
            }
        }
    }

    /// RunPod hands a lost worker's jobs out again, and sometimes those of a healthy one.
    async fn redeliver(&mut self) {
        let job = self.jobs[self.random.below(self.jobs.len())];
        self.duplicates += 1;
        self.plane
            .job(&format!("again-{}-e1", self.duplicates), json!({"job_id": job}));
    }

    async fn is_over(&self) -> bool {
        let open = "brightrun.job where outcome is null";
        self.world.database.count(open, &[]).await == 0
            && self.world.database.count("brightrun.dispatch", &[]).await == 0
    }

    /// What is known of jobs that have not ended, for a message.
    async fn open(&self) -> Value {
        let open = "select coalesce(jsonb_agg(to_jsonb(job) - array['payload'] || jsonb_build_object('dispatch', to_jsonb(dispatch))), '[]')
                      from brightrun.job_status job left join brightrun.dispatch on dispatch.job_id = job.id
                     where job.finished_at is null or dispatch.job_id is not null";
        json!({"rows": self.world.database.json(open, &[]).await, "runpod": self.plane.submitted(), "trace": self.plane.trace()})
    }

    /// Every promise, from the rows and the files alone.
    async fn check(&self, seed: u64) -> Value {
        let database = &self.world.database;
        let mut ends = BTreeMap::new();
        assert_eq!(database.count("brightrun.violations()", &[]).await, 0, "seed {seed}");
        for job in &self.jobs {
            let told = format!("seed {seed}, job {job}");
            let row = database.job(*job).await;
            let status = row["status"].as_str().unwrap().to_owned();
            assert_eq!(
                database.engine_state(*job).await.as_deref(),
                Some(status.as_str()),
                "{told}"
            );
            if self.cancelled.contains(job) {
                assert_eq!(status, "cancelled", "a cancel was overwritten: {told}");
            }
            let ended = "brightrun.event where job_id = $1 and event in ('completed', 'failed', 'cancelled')";
            assert_eq!(database.count(ended, &[job]).await, 1, "{told}");
            let costs = database.count("cost_records where job_id = $1", &[job]).await;
            assert!(
                costs == 1 || (costs == 0 && row["started_at"].is_null()),
                "{told}: {costs} cost records"
            );
            let artifacts = database.count("model_artifacts where job_id = $1", &[job]).await;
            assert_eq!(artifacts, i64::from(status == "completed"), "{told}, {status}");
            self.check_files(*job, status == "completed", &told);
            *ends.entry(status).or_insert(0) += 1;
        }
        json!(ends)
    }

    /// A completed job's files are whole by their manifest; another one's are gone.
    fn check_files(&self, job: Uuid, is_completed: bool, told: &str) {
        let manifest = self.world.delivered(job, "manifest.json");
        if !is_completed {
            let folder = manifest.parent().unwrap();
            let left: Vec<_> = std::fs::read_dir(folder).into_iter().flatten().flatten().collect();
            assert!(left.is_empty(), "{told}: orphans {left:?}");
            return;
        }
        let manifest: Value = serde_json::from_slice(&std::fs::read(manifest).unwrap()).unwrap();
        assert_eq!(manifest["artifact_id"], json!(artifact_id(job)), "{told}");
        let files = manifest["files"].as_object().unwrap();
        assert!(files.contains_key("adapter_model.safetensors"), "{told}");
        for (name, record) in files {
            let bytes = std::fs::read(self.world.delivered(job, name)).unwrap();
            let hash = hex::encode(Sha256::digest(&bytes));
            assert_eq!(record["sha256"], json!(hash), "{told}: {name}");
        }
    }
}

async fn one_run(seed: u64) -> Value {
    let mut run = Run::new(seed).await;
    run.workers = (0..2).map(|place| run.start_worker(place)).collect();
    let over = CancellationToken::new();
    let key = Secret::new(CANARY_KEY);
    let metrics = Arc::new(Metrics::default());
    let orchestrator = Orchestrator::new(run.world.queue().await, run.world.config.clone(), &key, metrics).unwrap();
    let stop = over.clone();
    let orchestrating = tokio::spawn(async move { orchestrator.run(&stop).await });
    for _ in 0..FAULTS {
        // The instant is the point here: nothing is waited for.
        tokio::time::sleep(Duration::from_millis(50 + run.random.below(600) as u64)).await;
        let kind = KINDS[run.random.below(KINDS.len())];
        run.inject(kind).await;
    }
    let deadline = tokio::time::Instant::now() + Duration::from_secs(180);
    while !run.is_over().await {
        assert!(
            tokio::time::Instant::now() < deadline,
            "seed {seed} hangs: {:#}",
            run.open().await
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // Ended jobs' leftovers are swept by whoever works next.
    let last = run.world.job(10, 1).await;
    run.world.becomes(last, "completed").await;
    over.cancel();
    orchestrating.await.unwrap();
    run.check(seed).await
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_fails_and_whenever_the_rows_are_true_afterwards() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let runs = number("BRIGHTRUN_FAULT_RUNS").unwrap_or(1);
    let first = number("BRIGHTRUN_FAULT_SEED").unwrap_or(1);
    for seed in first..first + runs {
        let ends = one_run(seed).await;
        println!("seed {seed}: {FAULTS} faults, {JOBS} jobs: {ends}");
    }
}
