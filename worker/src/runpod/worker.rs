//! The worker as its caller sees it: settings in, an exit code out.

use std::collections::BTreeMap;
use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;

use super::environment::Environment;
use super::fitness::{self, Check};
use super::handler::Handler;
use super::heartbeat::{Heartbeat, InFlight};
use super::http::Http;
use super::memory::Memory;
use super::outcome::Identity;
use super::pace::Pace;
use super::routes::Routes;
use super::running::Shared;
use super::supervisor::Supervisor;
use crate::error::{Failure, Result};

/// What happens to running jobs when the worker is told to leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DrainMode {
    /// They finish, however long it takes.
    Finish,
    /// They save what another worker needs to continue, and end without a result: the platform hands them out again.
    Checkpoint,
}

/// How the worker behaves.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Jobs at once, to begin with; [`Handler::concurrency`] may change it.
    pub concurrency: usize,
    /// What SIGTERM means for running jobs.
    pub drain: DrainMode,
    /// Time for [`DrainMode::Checkpoint`]. The default fits into Docker's ten seconds before SIGKILL.
    pub drain_limit: Duration,
    /// Folder for results on their way and delivered ones, on durable storage; `None` keeps them in memory.
    pub results_folder: Option<PathBuf>,
    /// Largest result body in bytes.
    pub output_limit: usize,
    /// Largest result body of a job that a client waits for (its id begins with `sync-`).
    pub sync_output_limit: usize,
    /// Ask to be replaced after every job.
    pub refresh_after_each_job: bool,
    /// Leave after a handler has panicked: a GPU context may be broken.
    pub leave_after_panic: bool,
    /// Also stream `{"error": …}` when a streaming handler fails. What the platform does with it is not documented.
    pub stream_errors: bool,
    /// Level of RunPod's protocol that heartbeats report; the platform may switch features by it.
    pub protocol_version: String,
    /// Listen to SIGTERM and SIGINT.
    pub handle_signals: bool,
    /// Waiting times.
    pub pace: Pace,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            concurrency: 1,
            drain: DrainMode::Checkpoint,
            drain_limit: Duration::from_secs(8),
            results_folder: None,
            output_limit: 9_500_000,
            sync_output_limit: 19_000_000,
            refresh_after_each_job: false,
            leave_after_panic: false,
            stream_errors: false,
            protocol_version: "1.12.0".to_owned(),
            handle_signals: true,
            pace: Pace::default(),
        }
    }
}

impl Settings {
    /// Lays `DRAIN_MODE` (`finish` or `checkpoint`) and `DRAIN_SECONDS` over these settings.
    ///
    /// # Errors
    /// `RUNPOD_SETTING_INVALID` for any other value.
    pub fn with_variables(mut self, variables: &BTreeMap<String, String>) -> Result<Self> {
        let invalid = |name: &str, accepted: &str| {
            Failure::user(
                "RUNPOD_SETTING_INVALID",
                format!("{name} has a value that is not understood"),
            )
            .at(format!("environment variable `{name}`"))
            .hint(format!("Use {accepted}"))
        };
        match variables.get("DRAIN_MODE").map(String::as_str) {
            None | Some("") => {}
            Some("finish") => self.drain = DrainMode::Finish,
            Some("checkpoint") => self.drain = DrainMode::Checkpoint,
            Some(_) => return Err(invalid("DRAIN_MODE", "`finish` or `checkpoint`")),
        }
        if let Some(text) = variables.get("DRAIN_SECONDS").filter(|text| !text.is_empty()) {
            let seconds = text
                .parse()
                .map_err(|_| invalid("DRAIN_SECONDS", "a whole number of seconds"))?;
            self.drain_limit = Duration::from_secs(seconds);
        }
        Ok(self)
    }
}

/// How the worker ended. The caller should end the process with this code without waiting for handlers: one that cannot be stopped is
/// the reason for some of these exits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exit {
    /// 0: everything was brought to an end. 1: unfit, or a job had to be abandoned.
    pub code: u8,
    /// Why, in words.
    pub reason: String,
}

impl Exit {
    pub(crate) fn new(code: u8, reason: impl Into<String>) -> Self {
        Self {
            code,
            reason: reason.into(),
        }
    }
}

/// Asks a running worker to leave, as SIGTERM does. The second request makes it leave at once.
#[derive(Clone, Debug)]
pub struct Shutdown(mpsc::UnboundedSender<()>);

impl Shutdown {
    /// One request.
    pub fn request(&self) {
        // A worker that is gone has left already.
        let _has_left = self.0.send(());
    }
}

/// A serverless worker that has not started.
pub struct Worker {
    environment: Environment,
    settings: Settings,
    checks: Vec<Check>,
    shutdown: (mpsc::UnboundedSender<()>, mpsc::UnboundedReceiver<()>),
}

impl Worker {
    /// A worker for this environment.
    pub fn new(environment: Environment, settings: Settings) -> Self {
        Self {
            environment,
            settings,
            checks: Vec::new(),
            shutdown: mpsc::unbounded_channel(),
        }
    }

    /// Adds a check that is made before the first job; its error says what is wrong in words. Checks of the caller come before the
    /// built-in ones and are made even where those are switched off.
    #[must_use]
    pub fn check<F>(mut self, name: &str, run: impl FnOnce() -> F + Send + 'static) -> Self
    where
        F: Future<Output = Result<(), String>> + Send + 'static,
    {
        self.checks.push(Check::new(name, run));
        self
    }

    /// A handle that asks the worker to leave.
    pub fn shutdown(&self) -> Shutdown {
        Shutdown(self.shutdown.0.clone())
    }

    /// Works until told to leave. Blocks the calling thread, which talks to the platform; handlers run on `jobs`.
    ///
    /// Call it from a thread that is no worker of a runtime: the program's main thread, or `spawn_blocking`.
    pub fn run(self, handler: Arc<dyn Handler>, jobs: tokio::runtime::Handle) -> Exit {
        let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => runtime,
            Err(error) => return Exit::new(1, format!("no runtime: {error}")),
        };
        let exit = runtime.block_on(self.work(handler, jobs));
        // An address lookup under way cannot be interrupted and is not waited for.
        runtime.shutdown_background();
        exit.unwrap_or_else(|failure| Exit::new(1, failure.to_string()))
    }

    async fn work(self, handler: Arc<dyn Handler>, jobs: tokio::runtime::Handle) -> Result<Exit> {
        let Self {
            environment,
            settings,
            mut checks,
            shutdown,
        } = self;
        let http = Http::for_worker(environment.key.as_ref())?;
        let routes = Routes::new(&environment, &settings.protocol_version);
        announce(&environment, &routes);
        if settings.handle_signals {
            listen_to_signals(Shutdown(shutdown.0.clone()))?;
        }
        if !environment.skip_system_checks {
            checks.extend(fitness::built_in(&environment, &routes));
        }
        if let Err((check, reason)) = fitness::run_all(checks).await {
            let reason = environment.redactor.clean(&reason).into_owned();
            tracing::error!(%check, %reason, "this worker is unfit and leaves");
            fitness::report(&http, &routes, &check, &reason).await;
            return Ok(Exit::new(1, format!("the check `{check}` failed: {reason}")));
        }
        let in_flight = InFlight::default();
        // The heartbeat has clients of its own: a connection that a post has blocked must not delay it.
        let heartbeat = match (
            &environment.ping,
            environment.worker_is_named && environment.key.is_some(),
        ) {
            (Some(_), true) => Some(Heartbeat::start(
                routes.clone(),
                Http::for_worker(environment.key.as_ref())?,
                in_flight.clone(),
                environment.ping_interval,
            )?),
            _ => None,
        };
        let shared = Arc::new(Shared {
            identity: Identity {
                worker_id: environment.worker_id,
                hostname: environment.hostname,
                protocol_version: settings.protocol_version.clone(),
            },
            http,
            routes,
            redactor: environment.redactor,
            memory: Memory::new(settings.results_folder.clone()),
            in_flight,
            settings,
        });
        Ok(Supervisor::new(shared, handler, jobs, heartbeat, shutdown.1)
            .run()
            .await)
    }
}

/// What an operator should know at the start: notes, and the names of the platform's variables, never their values.
fn announce(environment: &Environment, routes: &Routes) {
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        worker = environment.worker_id,
        "Starting serverless worker."
    );
    for note in &environment.notes {
        tracing::warn!("{note}");
    }
    if !routes.are_derivable() {
        tracing::warn!("RUNPOD_WEBHOOK_GET_JOB has no /job-take/: batches and the stop channel are off");
    }
    let names: Vec<String> = Environment::variables()
        .into_keys()
        .filter(|name| name.starts_with("RUNPOD_"))
        .collect();
    tracing::debug!(variables = names.join(" "), "set by the platform");
}

fn listen_to_signals(shutdown: Shutdown) -> Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    for kind in [SignalKind::terminate(), SignalKind::interrupt()] {
        let mut arrivals = signal(kind).map_err(|error| {
            Failure::system(
                "RUNPOD_SIGNALS_UNAVAILABLE",
                format!("No signal handler could be installed: {error}"),
            )
        })?;
        let shutdown = shutdown.clone();
        tokio::spawn(async move {
            while arrivals.recv().await.is_some() {
                shutdown.request();
            }
        });
    }
    Ok(())
}
