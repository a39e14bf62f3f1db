//! `brightrun worker` where somebody else hands out the jobs: RunPod, the local API, or one file.

use std::sync::Arc;

use brightrun_queue::RunnerConfig;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use uuid::Uuid;

use super::device::on_device;
use super::{Command, WorkerArguments, service};
use crate::config::{Config, database_url};
use crate::error::{Failure, Result};
use crate::job::serverless::{Database, ServerlessHandler};
use crate::job::services::{Services, open_storage};
use crate::preflight;
use crate::runpod::local::{listen, run_once};
use crate::runpod::{Environment, Handler, LocalApi, LocalOptions, LogLayer, Redactor, Settings, Worker};

/// Who hands out the jobs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Giver {
    /// Clients of the local API.
    LocalApi,
    /// `--test_input`, or the file `test_input.json` where there is neither a platform nor a database.
    Once,
    /// RunPod, which has started this process.
    Platform,
}

impl Giver {
    /// Decides as RunPod's SDK does; `None` means the queue.
    pub fn of(arguments: &WorkerArguments) -> Option<Self> {
        let flags = &arguments.runpod;
        if arguments.serve || flags.serve {
            Some(Self::LocalApi)
        } else if flags.test_input.is_some() {
            Some(Self::Once)
        } else if Environment::is_production(&Environment::variables()) {
            Some(Self::Platform)
        } else if database_url().is_err() && std::path::Path::new("test_input.json").exists() {
            Some(Self::Once)
        } else {
            None
        }
    }
}

/// Starts the log that RunPod's console reads. False for every other command and worker, which log as usual.
pub fn init_logging(command: &Command) -> bool {
    let variables = Environment::variables();
    let is_platform = matches!(command, Command::Worker(arguments) if Giver::of(arguments) == Some(Giver::Platform));
    let Some(environment) = is_platform.then(|| Environment::read(&variables).ok()).flatten() else {
        return false;
    };
    let is_json = environment.endpoint.is_some();
    let layer = LogLayer::new(std::io::stdout, environment.redactor, is_json);
    // A second initialisation (tests in one process) keeps the first.
    let _first_stays = tracing_subscriber::registry()
        .with(environment.log_level)
        .with(layer)
        .try_init();
    LogLayer::catch_panics();
    true
}

/// Works for `giver`. Where a job or its platform decides the exit code, this does not return.
///
/// # Errors
/// `RUNPOD_…` when the environment, the address or the input is wrong; the storage's when it is not configured.
pub async fn work(config: Config, arguments: &WorkerArguments, giver: Giver) -> Result<()> {
    let variables = Environment::variables();
    let redactor = Redactor::of_environment(variables.clone());
    let handler = handler(&config, giver)?;
    let code = match giver {
        Giver::LocalApi => return serve(handler, arguments, redactor).await,
        Giver::Once => {
            let folder = std::path::Path::new(".");
            let input = arguments.runpod.test_input.as_deref();
            run_once(handler, input, folder, &redactor, &mut std::io::stdout()).await?
        }
        Giver::Platform => {
            let settings = Settings {
                concurrency: config.worker.slots,
                results_folder: Some(config.worker.work_dir.join("results")),
                ..Settings::default()
            };
            let settings = settings.with_variables(&variables)?;
            if database_url().is_ok() {
                tokio::spawn(look_at_the_database());
            }
            let quick = config.clone();
            let worker = Worker::new(Environment::read(&variables)?, settings)
                .check("preflight", move || async move { fit(&preflight::quick(&quick).await) });
            let jobs = tokio::runtime::Handle::current();
            let exit = tokio::task::spawn_blocking(move || worker.run(handler, jobs)).await;
            let exit = exit.map_err(|error| Failure::system("INTERNAL_PANIC", error.to_string()))?;
            tracing::info!(code = exit.code, "Leaving: {}.", exit.reason);
            exit.code
        }
    };
    // A handler that cannot be stopped is not waited for: it is the reason for some of these ends.
    std::process::exit(i32::from(code))
}

/// Beside the first take: a worker whose database is away waits for it, but its operator should read why in the first seconds.
async fn look_at_the_database() {
    for check in preflight::database(service::connect()).await {
        if !check.ok {
            tracing::warn!(check = check.name, "{}", check.detail);
        }
    }
}

/// What the quick checks found wrong, in words for RunPod's console.
fn fit(checks: &[preflight::Check]) -> std::result::Result<(), String> {
    let wrong: Vec<&str> = checks
        .iter()
        .filter(|check| !check.ok)
        .map(|check| check.detail.as_str())
        .collect();
    if wrong.is_empty() { Ok(()) } else { Err(wrong.join(" ")) }
}

fn handler(config: &Config, giver: Giver) -> Result<Arc<dyn Handler>> {
    let storage = open_storage(config)?;
    let database = database_url().ok().map(|url| Database {
        url,
        runner: RunnerConfig {
            worker: worker_name(giver),
            ..service::runner_config(config, config.worker.slots, false)
        },
    });
    on_device!(config, |device| {
        let services = Arc::new(Services::new(config.clone(), storage, device));
        Ok(Arc::new(ServerlessHandler::new(services, database)?))
    })
}

/// Fresh for each process. The orchestrator tells by its beginning that a push has arrived.
fn worker_name(giver: Giver) -> String {
    let pod = std::env::var("RUNPOD_POD_ID").ok().filter(|pod| !pod.is_empty());
    match (giver, pod) {
        (Giver::Platform, Some(pod)) => format!("runpod:{pod:.100}:{}", Uuid::new_v4().simple()),
        _ => format!("runpod:local:{}", Uuid::new_v4().simple()),
    }
}

async fn serve(handler: Arc<dyn Handler>, arguments: &WorkerArguments, redactor: Redactor) -> Result<()> {
    let flags = &arguments.runpod;
    let (port, slots) = if flags.serve {
        (flags.port, flags.concurrency)
    } else {
        (arguments.port, arguments.slots.unwrap_or(1))
    };
    let options = LocalOptions {
        slots,
        compatibility: flags.compatibility,
        endpoint: std::env::var("RUNPOD_ENDPOINT_ID").ok(),
        redactor,
        ..LocalOptions::default()
    };
    let api = LocalApi::new(handler, options)?;
    let listener = listen(&flags.host, port).await?;
    if let Ok(address) = listener.local_addr() {
        // On standard output, so that a script that chose port 0 learns the port.
        super::output::print_line(&format!("Serving http://{address}/v2/local"))?;
    }
    api.serve(listener, service::terminated()).await
}
