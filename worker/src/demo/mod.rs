//! The main job on one machine: a private Postgres, a folder as storage, a miniature model.
//!
//! What runs here is what runs in production: the rows are inserted as an app inserts them (`demo/insert_rows.sql`), the
//! trigger queues the job, a [`Runner`](brightrun_queue::Runner) claims it, the training handler trains it, and the projection
//! writes the app's tables. Only the surroundings are small.

pub mod miniature;

use std::path::{Path, PathBuf};

use brightrun_queue::private_server::{Options, PrivateServer};
use brightrun_queue::{Queue, QueueConfig};
use serde_json::json;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::artifact;
use crate::cli::DemoArguments;
use crate::cli::output::{print_json, print_line};
use crate::cli::service::{SCHEMA, Submission, follow, train_runner};
use crate::config::Config;
use crate::dataset;
use crate::demo::miniature::Miniature;
use crate::error::{Failure, Result};
use crate::job::services::open_storage;

/// The sample data set: BrightRun, CC-BY-4.0.
const SAMPLE: &str = include_str!("../../../demo/sample.jsonl");
/// How a user comes to be.
const INSERT_USER: &str = include_str!("../../../demo/insert_user.sql");
/// The demo's user.
const USER: Uuid = Uuid::from_u128(0xd0d0_0000_0000_4000_8000_0000_0000_0001);

/// `brightrun demo`.
///
/// # Errors
/// Whatever fails on the way, with its own code.
pub async fn run(config: Config, arguments: &DemoArguments) -> Result<()> {
    let say = |line: &str| {
        if arguments.output.json {
            Ok(())
        } else {
            print_line(line)
        }
    };
    let folder = arguments
        .dir
        .clone()
        .unwrap_or_else(|| PathBuf::from(".brightrun/demo"));
    let folder = absolute(&folder)?;
    let dataset = write_dataset(&folder, arguments.dataset.as_deref())?;
    let (examples, report) = dataset::load(&dataset)?;
    report.failure().map_or(Ok(()), Err)?;

    let model = match &arguments.model {
        Some(model) => model.clone(),
        None => {
            say(
                "1/5  Writing a miniature Qwen3 checkpoint (random weights: it proves the pipeline, not the language)",
            )?;
            let texts: Vec<String> = examples
                .iter()
                .flat_map(|example| &example.messages)
                .map(|message| message.content.clone())
                .collect();
            let model = folder.join("model");
            Miniature::default().write(&model, &texts)?;
            model
        }
    };
    say("2/5  Starting a private PostgreSQL and applying schema.sql")?;
    let server = start_server()?;
    let url = server
        .create_database("brightrun_demo")
        .await
        .map_err(|error| Failure::system("DEMO_SERVER", error.to_string()))?;
    let queue = Queue::connect(&QueueConfig::new(&url)?).await?;
    queue.migrate(SCHEMA).await?;

    say(&format!(
        "3/5  Uploading {} examples and inserting the rows an app inserts",
        examples.len()
    ))?;
    let config = demo_config(config, &folder, model.clone(), arguments.model.is_none());
    let storage = open_storage(&config)?;
    let client = queue.client().await?;
    client
        .execute(INSERT_USER, &[&USER])
        .await
        .map_err(|error| Failure::system("DEMO_ROWS", format!("The demo's user cannot be inserted: {error}")))?;
    let job = submission(dataset, report.bytes, hyperparameters(arguments))
        .submit(&queue, &*storage)
        .await?;

    say("4/5  Training")?;
    let shutdown = CancellationToken::new();
    let runner = train_runner(queue.clone(), &config, storage, false)?;
    let worker = tokio::spawn(runner.run(shutdown.clone()));
    let followed = tokio::select! {
        followed = follow(&queue, job, arguments.output.json) => followed,
        () = crate::cli::service::terminated() => Err(Failure::user("DEMO_INTERRUPTED", "The demo was interrupted").hint("Run it again")),
    };
    shutdown.cancel();
    worker
        .await
        .map_err(|error| Failure::system("INTERNAL_PANIC", format!("The worker ended badly: {error}")))??;
    let status = followed?;
    drop(queue);

    let artifact = artifact::artifact_id(job);
    let adapter = folder
        .join("storage")
        .join(&config.storage.models_bucket)
        .join(USER.to_string())
        .join(artifact.to_string());
    server
        .stop()
        .map_err(|error| Failure::system("DEMO_SERVER", format!("The private PostgreSQL did not stop: {error}")))?;
    if arguments.output.json {
        return print_json(
            &json!({ "job_id": job, "artifact_id": artifact, "adapter": adapter, "model": model, "result": status.result }),
        );
    }
    report_result(&adapter, &model, &status)
}

fn report_result(adapter: &Path, model: &Path, status: &brightrun_queue::JobStatus) -> Result<()> {
    let quality = status
        .result
        .as_ref()
        .and_then(|result| result.pointer("/artifact/quality_metrics"));
    let number = |name: &str| {
        quality
            .and_then(|quality| quality.get(name))
            .and_then(serde_json::Value::as_f64)
    };
    print_line("5/5  Delivered: files reloaded, held-out loss recomputed, rows written in one transaction")?;
    print_line("")?;
    if let (Some(loss), Some(reduction)) = (number("final_training_loss"), number("loss_reduction_percent")) {
        print_line(&format!(
            "training loss  {loss:.3} ({reduction:.0} % lower than at the first step)"
        ))?;
    }
    print_line(&format!("adapter        {}", adapter.display()))?;
    print_line("")?;
    print_line("Try it:")?;
    print_line(&format!(
        "  brightrun generate --model {} --adapter {} --prompt \"I am worried about money\" --max-new-tokens 40",
        model.display(),
        adapter.display()
    ))?;
    print_line("The same with a real model (fetch its files from Hugging Face into a folder first):")?;
    print_line("  brightrun demo --model /path/to/Qwen3-0.6B")
}

/// A server in a temporary folder of its own, so that nothing is left and demos do not meet.
fn start_server() -> Result<PrivateServer> {
    PrivateServer::start(&Options::default()).map_err(|error| Failure::system("DEMO_SERVER", error.to_string()))
}

fn absolute(folder: &Path) -> Result<PathBuf> {
    let trouble = |error: std::io::Error| {
        Failure::system("DEMO_FOLDER", format!("The demo's folder cannot be used: {error}"))
            .at(folder.display().to_string())
    };
    std::fs::create_dir_all(folder).map_err(trouble)?;
    folder.canonicalize().map_err(trouble)
}

fn write_dataset(folder: &Path, given: Option<&Path>) -> Result<PathBuf> {
    if let Some(path) = given {
        return Ok(path.to_path_buf());
    }
    let path = folder.join("sample.jsonl");
    std::fs::write(&path, SAMPLE).map_err(|error| {
        Failure::system("DEMO_FOLDER", format!("The sample data set cannot be written: {error}"))
            .at(path.display().to_string())
    })?;
    Ok(path)
}

fn demo_config(mut config: Config, folder: &Path, model: PathBuf, is_miniature: bool) -> Config {
    config.model.base_model = if is_miniature {
        "brightrun/miniature-qwen3".to_owned()
    } else {
        model.display().to_string()
    };
    config.model.path = Some(model);
    config.storage.location = format!("local:{}", folder.join("storage").display());
    config.worker.work_dir = folder.join("work");
    config.worker.heartbeat_seconds = 1;
    config.worker.poll_seconds = 1;
    config.worker.lease_seconds = 30;
    if is_miniature {
        // An untrained base has more to learn than a real one.
        config.train.max_length = 2048;
    }
    config
}

/// Settings that make learning visible in seconds on random weights, or are usual for real ones.
fn hyperparameters(arguments: &DemoArguments) -> serde_json::Value {
    let is_miniature = arguments.model.is_none();
    let epochs = arguments.epochs.unwrap_or(if is_miniature { 5 } else { 1 });
    if is_miniature {
        return json!({ "learning_rate": 1e-3, "batch_size": 1, "epochs": epochs, "rank": 32, "alpha": 256 });
    }
    json!({ "learning_rate": 2e-4, "batch_size": 2, "epochs": epochs, "rank": 16, "alpha": 32 })
}

fn submission(file: PathBuf, bytes: u64, hyperparameters: serde_json::Value) -> Submission {
    Submission {
        user_id: USER,
        name: "EQ Alignment Sample".to_owned(),
        file_name: "sample.jsonl".to_owned(),
        file,
        bytes,
        hyperparameters,
        gpu_config: json!({ "type": "A100-80GB", "count": 1 }),
    }
}
