//! Commands that talk to the queue: `migrate`, `orchestrate`, `worker`, `status`, `watch`, `cancel`, `enqueue`.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use brightrun_queue::{JobState, JobStatus, Queue, QueueConfig, Runner, RunnerConfig};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::device::on_device;
use super::output::{self, print_json, print_line};
use super::{EnqueueArguments, JobArguments, OrchestrateArguments, WorkerArguments, serverless};
use crate::config::{Config, database_url};
use crate::error::{Failure, Result};
use crate::job::run::TrainHandler;
use crate::job::services::{Services, model_folder, open_storage};
use crate::job::validate::ValidateHandler;
use crate::orchestrator::Orchestrator;
use crate::orchestrator::metrics::{self, Metrics};
use crate::orchestrator::webhooks::Webhooks;
use crate::secret::Secret;
use crate::storage::name::sanitized_file_name;

/// The schema, whole: what `brightrun migrate` applies.
pub const SCHEMA: &str = include_str!("../../../schema.sql");

impl From<brightrun_queue::Error> for Failure {
    fn from(error: brightrun_queue::Error) -> Self {
        let failure = if error.is_transient() {
            Failure::platform(error.code(), error.to_string())
        } else {
            Failure::system(error.code(), error.to_string())
        };
        failure.hint(error.hint())
    }
}

/// Connects to the database of `DATABASE_URL`.
pub async fn connect() -> Result<Queue> {
    let url = database_url()?;
    Ok(Queue::connect(&QueueConfig::new(url.expose())?).await?)
}

/// Resolves on the first SIGINT or SIGTERM.
pub async fn terminated() {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut interrupt), Ok(mut terminate)) = (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
    else {
        tracing::warn!("signals cannot be watched here; this process can only be killed");
        return std::future::pending().await;
    };
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
}

/// A token that the first SIGINT or SIGTERM cancels.
pub fn shutdown_token() -> CancellationToken {
    let token = CancellationToken::new();
    let shared = token.clone();
    tokio::spawn(async move {
        terminated().await;
        tracing::info!("shutting down: running jobs write a checkpoint and go back to the queue");
        shared.cancel();
    });
    token
}

/// `brightrun migrate`.
pub async fn migrate() -> Result<()> {
    let queue = connect().await?;
    queue.migrate(SCHEMA).await?;
    print_line(&format!("The schema is in place at {}.", queue.place()))
}

pub(super) fn runner_config(config: &Config, slots: usize, until_idle: bool) -> RunnerConfig {
    RunnerConfig {
        slots,
        lease: Duration::from_secs(config.worker.lease_seconds),
        heartbeat: Duration::from_secs(config.worker.heartbeat_seconds),
        poll: Duration::from_secs(config.worker.poll_seconds),
        until_idle,
        ..RunnerConfig::default()
    }
}

/// A runner that trains.
///
/// # Errors
/// When the compute backend cannot start.
pub fn train_runner(
    queue: Queue,
    config: &Config,
    storage: Arc<dyn crate::storage::Storage>,
    until_idle: bool,
) -> Result<Runner> {
    let runner = Runner::new(queue, runner_config(config, config.worker.slots, until_idle));
    on_device!(config, |device| {
        let services = Arc::new(Services::new(config.clone(), storage, device));
        Ok(runner.handler("train", TrainHandler::new(services)))
    })
}

/// A runner that validates data sets.
pub fn validate_runner(
    queue: Queue,
    config: &Config,
    storage: Arc<dyn crate::storage::Storage>,
    until_idle: bool,
) -> Runner {
    let handler = ValidateHandler::new(storage, config.worker.work_dir.join("validation"));
    Runner::new(queue, runner_config(config, 2, until_idle)).handler("validate_dataset", handler)
}

/// `brightrun worker`.
pub async fn worker(mut config: Config, arguments: &WorkerArguments) -> Result<()> {
    if let Some(model) = &arguments.model {
        config.model.path = Some(model.clone());
    }
    config.worker.slots = arguments.slots.unwrap_or(config.worker.slots).max(1);
    if let Some(giver) = serverless::Giver::of(arguments) {
        return serverless::work(config, arguments, giver).await;
    }
    let storage = open_storage(&config)?;
    let queue = connect().await?;
    // Say now, not with the first job, that the model is not where it should be.
    model_folder(&config)?;
    let report = train_runner(queue, &config, storage, arguments.until_idle)?
        .run(shutdown_token())
        .await?;
    tracing::info!(claimed = report.claimed, given_up = report.given_up, "the worker ends");
    Ok(())
}

/// `brightrun orchestrate`.
pub async fn orchestrate(mut config: Config, arguments: &OrchestrateArguments) -> Result<()> {
    let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    config.orchestrator = std::mem::take(&mut config.orchestrator).with_aliases(variable)?;
    let storage = open_storage(&config)?;
    let queue = connect().await?;
    let shutdown = shutdown_token();
    let metrics = Arc::new(Metrics::default());
    let pushes = !config.orchestrator.endpoints.is_empty();
    if !config.orchestrator.listen.is_empty() {
        let address = &config.orchestrator.listen;
        let address = metrics::serve(address, queue.clone(), metrics.clone(), pushes, shutdown.clone()).await?;
        print_line(&format!("Serving http://{address}/metrics and /health"))?;
    }
    if let Some(webhooks) = webhooks(&queue, &config)? {
        let shutdown = shutdown.clone();
        tokio::spawn(async move { webhooks.run(&shutdown).await });
    }
    let validating = validate_runner(queue.clone(), &config, storage, arguments.until_idle).run(shutdown.clone());
    let report = if pushes {
        let key = api_key()?;
        let orchestrator = Orchestrator::new(queue, config.clone(), &key, metrics)?;
        // With --until-idle the pushing ends with the validation: what is pushed then belongs to the next start.
        let over = CancellationToken::new();
        let validating = async {
            let report = validating.await;
            over.cancel();
            report
        };
        tokio::join!(validating, orchestrator.run(&over)).0?
    } else {
        validating.await?
    };
    tracing::info!(validated = report.claimed, "the orchestrator ends");
    Ok(())
}

/// The sender of webhooks, where an address is set.
fn webhooks(queue: &Queue, config: &Config) -> Result<Option<Webhooks>> {
    let settings = &config.orchestrator;
    if settings.webhook_url.is_empty() {
        return Ok(None);
    }
    let secret = std::env::var("BRIGHTRUN_WEBHOOK_SECRET")
        .ok()
        .filter(|secret| !secret.is_empty());
    let secret = secret.ok_or_else(|| {
        Failure::user(
            "CONFIG_MISSING",
            "A webhook is configured, but no secret to sign it with",
        )
        .at("environment variable `BRIGHTRUN_WEBHOOK_SECRET`")
        .hint("Set it to a random text, and give the app the same")
    })?;
    let poll = Duration::from_secs(settings.poll_seconds);
    Webhooks::new(queue.clone(), &settings.webhook_url, Secret::new(secret), poll).map(Some)
}

/// The key of RunPod's public API.
fn api_key() -> Result<Secret> {
    ["RUNPOD_API_KEY", "GPU_CLUSTER_API_KEY"]
        .iter()
        .find_map(|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
        .map(Secret::new)
        .ok_or_else(|| {
            Failure::user("CONFIG_MISSING", "An endpoint is configured, but no RunPod API key")
                .at("environment variable `RUNPOD_API_KEY`")
                .hint("Set it to a key that may use the endpoints of the setting `orchestrator.endpoints`")
        })
}

async fn status_of(queue: &Queue, job: Uuid) -> Result<JobStatus> {
    queue.status(job).await?.ok_or_else(|| {
        Failure::user("JOB_NOT_FOUND", "There is no such job")
            .at(format!("job {job}"))
            .hint("Use the id of the `training_jobs` row")
    })
}

/// `brightrun status`.
pub async fn status(arguments: &JobArguments) -> Result<()> {
    let status = status_of(&connect().await?, arguments.job).await?;
    if arguments.output.json {
        return print_json(&status_json(&status));
    }
    print_line(&format!("job       {}", status.id))?;
    print_line(&format!("state     {}", status.state.name()))?;
    print_line(&format!("attempt   {} of {}", status.attempt, status.max_attempts))?;
    if let Some(progress) = &status.progress {
        print_line(&format!("progress  {}", describe(progress)))?;
    }
    if let Some(worker) = &status.worker {
        print_line(&format!("worker    {worker}"))?;
    }
    if let Some(error) = &status.error {
        print_line(&format!("error     {}", error_text(error)))?;
    }
    if let Some(id) = status.result.as_ref().and_then(|result| result.pointer("/artifact/id")) {
        print_line(&format!("artifact  {}", id.as_str().unwrap_or_default()))?;
    }
    Ok(())
}

fn status_json(status: &JobStatus) -> Value {
    json!({
        "id": status.id, "kind": status.kind, "state": status.state.name(), "attempt": status.attempt,
        "max_attempts": status.max_attempts, "created_at": status.created_at, "started_at": status.started_at,
        "finished_at": status.finished_at, "progress": status.progress, "worker": status.worker, "error": status.error,
        "result": status.result, "cancel_requested_at": status.cancel_requested_at,
    })
}

fn error_text(error: &Value) -> String {
    let part = |name: &str| error.get(name).and_then(Value::as_str).unwrap_or_default();
    format!("{} [{}]", part("message"), part("code"))
}

/// `training, step 3/20, loss 2.1` from a progress object.
fn describe(progress: &Value) -> String {
    let number = |pointer: &str| progress.pointer(pointer).and_then(Value::as_f64);
    let mut parts = vec![
        progress
            .get("stage")
            .and_then(Value::as_str)
            .unwrap_or("running")
            .to_owned(),
    ];
    if let (Some(step), Some(total)) = (number("/step"), number("/total_steps")) {
        parts.push(format!("step {step}/{total}"));
    }
    if let Some(loss) = number("/metrics/training_loss") {
        parts.push(format!("loss {loss:.4}"));
    }
    if let Some(speed) = number("/metrics/throughput") {
        parts.push(format!("{speed:.0} tokens/s"));
    }
    if let Some(seconds) = number("/seconds_left") {
        parts.push(format!("{} left", output::duration(seconds)));
    }
    parts.join(", ")
}

/// `brightrun watch`.
pub async fn watch(arguments: &JobArguments) -> Result<()> {
    let queue = connect().await?;
    follow(&queue, arguments.job, arguments.output.json).await.map(|_| ())
}

/// Shows a job until it ends. A job that failed or was cancelled is a failure of the command, too.
pub async fn follow(queue: &Queue, job: Uuid, as_json: bool) -> Result<JobStatus> {
    let bar = if as_json {
        ProgressBar::hidden()
    } else {
        ProgressBar::new(1000)
    };
    bar.set_style(ProgressStyle::with_template("{wide_bar} {msg}").unwrap_or_else(|_| ProgressStyle::default_bar()));
    let mut last = Value::Null;
    loop {
        let status = status_of(queue, job).await?;
        let shown = status_json(&status);
        if shown != last {
            if as_json {
                print_json(&shown)?;
            }
            let percent = status
                .progress
                .as_ref()
                .and_then(|progress| progress.get("progress"))
                .and_then(Value::as_f64);
            bar.set_position((percent.unwrap_or(0.0) * 10.0) as u64);
            bar.set_message(
                status
                    .progress
                    .as_ref()
                    .map_or_else(|| status.state.name().to_owned(), describe),
            );
            last = shown;
        }
        if status.state.is_terminal() {
            bar.finish_and_clear();
            return ended(status, as_json);
        }
        tokio::time::sleep(Duration::from_millis(400)).await;
    }
}

fn ended(status: JobStatus, as_json: bool) -> Result<JobStatus> {
    match status.state {
        JobState::Completed => {
            if !as_json {
                print_line("The job is completed.")?;
            }
            Ok(status)
        }
        JobState::Cancelled => {
            Err(Failure::user("JOB_CANCELLED", "The job was cancelled").at(format!("job {}", status.id)))
        }
        _ => {
            let text = status
                .error
                .as_ref()
                .map_or_else(|| "no reason is recorded".to_owned(), error_text);
            Err(Failure::system("JOB_FAILED", format!("The job failed: {text}")).at(format!("job {}", status.id)))
        }
    }
}

/// `brightrun cancel`.
pub async fn cancel(arguments: &JobArguments) -> Result<()> {
    let queue = connect().await?;
    status_of(&queue, arguments.job).await?;
    let reply = queue
        .cancel(arguments.job, Some("cancelled from the command line"))
        .await?;
    if arguments.output.json {
        return print_json(&json!({ "id": arguments.job, "reply": format!("{reply:?}") }));
    }
    print_line(&format!("{reply:?}"))
}

/// `brightrun enqueue`.
pub async fn enqueue(config: Config, arguments: &EnqueueArguments) -> Result<()> {
    let mut spec = config.train.clone();
    arguments.train.apply(&mut spec);
    spec.check()?;
    let report = crate::dataset::check(&arguments.dataset)?;
    report.failure().map_or(Ok(()), Err)?;
    let file = arguments
        .dataset
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let submission = Submission {
        user_id: arguments.user,
        name: arguments.name.clone().unwrap_or_else(|| file.clone()),
        file: arguments.dataset.clone(),
        file_name: sanitized_file_name(&file),
        bytes: report.bytes,
        hyperparameters: json!({
            "learning_rate": f64::from(spec.learning_rate), "batch_size": spec.batch_size, "epochs": spec.epochs,
            "rank": spec.rank, "alpha": spec.lora_alpha(), "dropout": 0.0,
        }),
        gpu_config: json!({ "type": "A100-80GB", "count": 1 }),
    };
    let queue = connect().await?;
    let job = submission.submit(&queue, &*open_storage(&config)?).await?;
    if arguments.output.json {
        return print_json(&json!({ "job_id": job }));
    }
    print_line(&format!("Queued as {job}. Follow it with: brightrun watch {job}"))
}

/// What an app runs to have a data set trained on.
const INSERT_ROWS: &str = include_str!("../../../demo/insert_rows.sql");

fn rows_refused(error: impl std::error::Error) -> Failure {
    let cause = error.source().map_or_else(|| error.to_string(), ToString::to_string);
    Failure::user("ENQUEUE_REFUSED", format!("The rows were refused: {cause}"))
        .hint("The user must exist in `auth.users`, and this login must be allowed to insert for him")
}

/// A data set and a training job, as an app would create them.
pub struct Submission {
    /// Whose they are.
    pub user_id: Uuid,
    /// The data set's name.
    pub name: String,
    /// The data set's file.
    pub file: PathBuf,
    /// Its name in storage.
    pub file_name: String,
    /// Its size.
    pub bytes: u64,
    /// Short dialect.
    pub hyperparameters: Value,
    /// Short dialect.
    pub gpu_config: Value,
}

impl Submission {
    /// Uploads the file and inserts both rows in one transaction; the trigger on `training_jobs` queues the job.
    ///
    /// # Errors
    /// `STORAGE_…`, `QUEUE_…`.
    pub async fn submit(&self, queue: &Queue, storage: &dyn crate::storage::Storage) -> Result<Uuid> {
        let (dataset, job) = (Uuid::new_v4(), Uuid::new_v4());
        let path = format!("{}/{dataset}/{}", self.user_id, self.file_name);
        storage
            .put_file("lora-datasets", &path, &self.file, crate::storage::OCTET_STREAM)
            .await?;
        let client = queue.client().await?;
        let bytes = i64::try_from(self.bytes).unwrap_or(i64::MAX);
        client
            .execute(
                INSERT_ROWS,
                &[
                    &self.user_id,
                    &dataset,
                    &job,
                    &self.name,
                    &path,
                    &self.file_name,
                    &bytes,
                    &self.hyperparameters,
                    &self.gpu_config,
                ],
            )
            .await
            .map_err(rows_refused)?;
        queue.wake();
        Ok(job)
    }
}
