//! A user, his data, a database, a storage folder and workers: the stage of every journey.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, OnceLock};

use brightrun_queue::{Queue, QueueConfig, RunnerReport};
use brightrun_worker::artifact::artifact_id;
use brightrun_worker::cli::service::{train_runner, validate_runner};
use brightrun_worker::config::Config;
use brightrun_worker::demo::miniature::Miniature;
use brightrun_worker::storage::{Storage, local::LocalStorage};
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::database::Database;

/// The rows an app inserts, as documented for its developers.
pub const INSERT_ROWS: &str = include_str!("../../demo/insert_rows.sql");
/// The name jobs and adapters give the base model.
pub const BASE_MODEL: &str = "brightrun/miniature-qwen3";

/// Everything one journey needs. What it leaves on disk goes with it.
pub struct World {
    pub database: Database,
    pub folder: tempfile::TempDir,
    pub config: Config,
    pub user: Uuid,
    /// What every worker, orchestrator and command of the journey connects with: a login that may only execute
    /// the engine's functions.
    pub url: String,
}

/// A data set of `examples` conversations, all different.
pub fn dataset(examples: usize) -> String {
    (0..examples)
        .map(|number| {
            let record = json!({ "messages": [
                { "role": "user", "content": format!("What comes after {number}?") },
                { "role": "assistant", "content": format!("After {number} comes {}. Calmly, one at a time.", number + 1) },
            ]});
            format!("{record}\n")
        })
        .collect()
}

/// The folder of the one model of all journeys. The same bytes in every run.
pub fn model() -> &'static Path {
    static MODEL: OnceLock<PathBuf> = OnceLock::new();
    MODEL.get_or_init(|| {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("journeys-model");
        let tiny = Miniature {
            hidden: 32,
            layers: 2,
            heads: 2,
            key_value_heads: 1,
            head_dim: 16,
            intermediate: 64,
            vocabulary: 512,
            seed: 7,
        };
        tiny.write(&folder, &[dataset(40)]).unwrap();
        folder
    })
}

impl World {
    /// A stage with a fresh database of the shared server.
    pub async fn new() -> Self {
        Self::at(Database::migrated().await).await
    }

    /// A stage on a migrated database.
    pub async fn at(database: Database) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut config = Config::default();
        config.model.path = Some(model().to_path_buf());
        config.model.base_model = BASE_MODEL.to_owned();
        config.storage.location = format!("local:{}", folder.path().join("storage").display());
        config.worker.work_dir = folder.path().join("work");
        config.worker.threads = 1;
        config.worker.heartbeat_seconds = 1;
        config.worker.poll_seconds = 1;
        config.worker.lease_seconds = 3;
        config.train.max_length = 128;
        config.train.checkpoint_every = 1;
        let user = database.user().await;
        let url = database.worker_url().await;
        Self {
            url,
            database,
            folder,
            config,
            user,
        }
    }

    pub fn storage_folder(&self) -> PathBuf {
        self.folder.path().join("storage")
    }

    pub fn storage(&self) -> Arc<dyn Storage> {
        Arc::new(LocalStorage::new(self.storage_folder()))
    }

    /// Where a file of a finished job lies.
    pub fn delivered(&self, job: Uuid, file: &str) -> PathBuf {
        self.storage_folder()
            .join("lora-models")
            .join(self.user.to_string())
            .join(artifact_id(job).to_string())
            .join(file)
    }

    pub fn adapter(&self, job: Uuid) -> Vec<u8> {
        std::fs::read(self.delivered(job, "adapter_model.safetensors")).unwrap()
    }

    /// The newest checkpoint of a job that a worker has on disk; 0 when there is none.
    pub fn checkpointed_step(&self, job: Uuid) -> u64 {
        let folder = self
            .config
            .worker
            .work_dir
            .join("jobs")
            .join(job.to_string())
            .join("checkpoints");
        let names = std::fs::read_dir(folder).into_iter().flatten().flatten();
        names
            .filter_map(|entry| {
                let name = entry.file_name().into_string().ok()?;
                name.strip_prefix("step-")?.strip_suffix(".ckpt")?.parse().ok()
            })
            .max()
            .unwrap_or(0)
    }

    /// Puts a data set's file into storage.
    pub fn upload(&self, dataset: Uuid, text: &str) {
        let folder = self
            .storage_folder()
            .join("lora-datasets")
            .join(self.user.to_string())
            .join(dataset.to_string());
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("data.jsonl"), text).unwrap();
    }

    /// Inserts a data set and a job on it as an app does; the file is the caller's to upload.
    pub async fn insert(&self, dataset: Uuid, hyperparameters: Value) -> Uuid {
        let job = Uuid::new_v4();
        let gpu = json!({ "type": "A100-80GB", "count": 2 });
        let path = format!("{}/{dataset}/data.jsonl", self.user);
        self.database
            .owner
            .execute(
                INSERT_ROWS,
                &[
                    &self.user,
                    &dataset,
                    &job,
                    &"Kind answers",
                    &path,
                    &"data.jsonl",
                    &0_i64,
                    &hyperparameters,
                    &gpu,
                ],
            )
            .await
            .unwrap();
        job
    }

    /// A job on a fresh data set of `examples` examples that is in storage.
    pub async fn job(&self, examples: usize, epochs: usize) -> Uuid {
        let id = Uuid::new_v4();
        self.upload(id, &dataset(examples));
        self.insert(id, settings(epochs)).await
    }

    /// The data set of a job.
    pub async fn dataset_of(&self, job: Uuid) -> Value {
        self.database
            .json(
                "select to_jsonb(data) from datasets data join training_jobs job on job.dataset_id = data.id where job.id = $1",
                &[&job],
            )
            .await
    }

    pub async fn queue(&self) -> Queue {
        Queue::connect(&QueueConfig::new(&self.url).unwrap()).await.unwrap()
    }

    /// A worker of this process on the local storage.
    pub async fn worker(&self) -> Worker {
        self.worker_with(self.storage()).await
    }

    /// A worker of this process on another storage.
    pub async fn worker_with(&self, storage: Arc<dyn Storage>) -> Worker {
        let runner = train_runner(self.queue().await, &self.config, storage, false).unwrap();
        let shutdown = CancellationToken::new();
        let task = tokio::spawn(runner.run(shutdown.clone()));
        Worker { shutdown, task }
    }

    /// Validates every data set that waits for it.
    pub async fn validate_all(&self) {
        validate_runner(self.queue().await, &self.config, self.storage(), true)
            .run(CancellationToken::new())
            .await
            .unwrap();
    }

    /// Works until nothing is left to do.
    pub async fn work(&self) -> RunnerReport {
        train_runner(self.queue().await, &self.config, self.storage(), true)
            .unwrap()
            .run(CancellationToken::new())
            .await
            .unwrap()
    }

    /// Works until nothing is left to do, and returns the row of `job`, which must have ended as `status`.
    pub async fn work_until(&self, job: Uuid, status: &str) -> Value {
        self.work().await;
        let row = self.database.job(job).await;
        assert_eq!(row["status"], status, "{row:#}");
        row
    }

    /// Waits until the app's row of `job` has `status`.
    pub async fn becomes(&self, job: Uuid, status: &str) -> Value {
        crate::database::eventually(&format!("status {status}"), || async {
            self.database.job(job).await["status"] == status
        })
        .await;
        self.database.job(job).await
    }

    /// The binary with this stage's settings and database.
    pub fn brightrun(&self, arguments: &[&str]) -> Command {
        let file = self.folder.path().join("brightrun.toml");
        std::fs::write(&file, toml::to_string(&self.config).unwrap()).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_brightrun"));
        command
            .args(arguments)
            .current_dir(self.folder.path())
            .env("BRIGHTRUN_CONFIG", file)
            .env("DATABASE_URL", &self.url)
            .env_remove("RUST_LOG")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// Starts the binary as a worker that writes its log to `log`.
    pub fn worker_process(&self, log: &str) -> Child {
        let log = std::fs::File::create(self.folder.path().join(log)).unwrap();
        self.brightrun(&["worker"]).stderr(log).spawn().unwrap()
    }

    /// Rows of the engine's lease table for `job`.
    pub async fn leases(&self, job: Uuid) -> i64 {
        self.database.count("brightrun.lease where job_id = $1", &[&job]).await
    }
}

/// Short-dialect settings of a job whose every step is one example.
pub fn settings(epochs: usize) -> Value {
    json!({ "learning_rate": 1e-3, "batch_size": 1, "epochs": epochs, "rank": 4, "alpha": 8 })
}

/// A worker of this process.
pub struct Worker {
    shutdown: CancellationToken,
    task: JoinHandle<brightrun_queue::Result<RunnerReport>>,
}

impl Worker {
    /// Asks it to stop and waits until it has.
    pub async fn stop(self) -> RunnerReport {
        self.shutdown.cancel();
        self.task.await.unwrap().unwrap()
    }
}

/// Standard output, standard error and exit code of a finished program.
pub fn spoken(output: &Output) -> (String, String, i32) {
    (
        String::from_utf8_lossy(&output.stdout).into_owned(),
        String::from_utf8_lossy(&output.stderr).into_owned(),
        output.status.code().unwrap_or(-1),
    )
}
