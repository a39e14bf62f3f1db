//! One job from the moment it may run to the moment its result is out of our hands.

use std::sync::Arc;

use bytes::Bytes;
use serde_json::{Value, json};
use tokio::runtime::Handle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use super::handler::{Claim, Handler, JobContext, OutputForm, StopReason, StopSignal};
use super::heartbeat::InFlight;
use super::http::Http;
use super::job::RunPodJob;
use super::memory::{Memory, Remembered};
use super::outcome::{Identity, Outcome};
use super::pace::Pace;
use super::post::{Delivery, deliver};
use super::pump::{self, Channel};
use super::redact::Redactor;
use super::routes::Routes;
use super::worker::Settings;
use crate::error::{Failure, Result};

/// Starts of one job that ended with the death of the process; the next one is refused.
const MOST_STARTS: u32 = 3;

/// What all jobs of a worker share.
pub(crate) struct Shared {
    pub http: Http,
    pub routes: Routes,
    pub identity: Identity,
    pub redactor: Redactor,
    pub memory: Memory,
    pub in_flight: InFlight,
    pub settings: Settings,
}

/// How a job ended, as far as the worker is concerned.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Ended {
    pub job: String,
    /// The platform was asked to replace this worker.
    pub refresh: bool,
    /// The handler panicked.
    pub panicked: bool,
}

/// Brings one job to its end.
pub(crate) async fn run(
    shared: Arc<Shared>,
    handler: Arc<dyn Handler>,
    jobs: Handle,
    job: RunPodJob,
    stop: StopSignal,
) -> Ended {
    let ended = Ended {
        job: job.id.clone(),
        ..Ended::default()
    };
    if let Some(remembered) = shared.memory.find(&job.id) {
        tracing::warn!("this job was computed before: its result is posted again");
        post(&shared, remembered, &stop).await;
        return ended;
    }
    tracing::info!("Started.");
    let redactor = shared.redactor.with(job.secrets());
    let starts = shared.memory.begin(&job.id);
    let (result, chunks) = if starts > MOST_STARTS {
        (Ok(Err(killed_too_often(starts))), Vec::new())
    } else {
        compute(&shared, Arc::clone(&handler), jobs, job, &stop).await
    };
    shared.memory.end(&ended.job);
    let (result, panicked) = match result {
        Ok(result) => (result, false),
        Err(panic) => (Err(panic), true),
    };
    match (stop.reason(), &result) {
        (Some(StopReason::Cancelled), _) => {
            tracing::info!("Stopped; nothing is posted.");
            return Ended { panicked, ..ended };
        }
        (Some(StopReason::Draining), Err(failure)) => {
            tracing::info!(
                code = failure.code,
                "Interrupted; nothing is posted, the platform hands the job out again."
            );
            return Ended { panicked, ..ended };
        }
        _ => {}
    }
    let form = handler.output();
    let is_stream = form != OutputForm::Value;
    let result = result.map(|value| final_value(value, form, chunks));
    let mut outcome = within_limit(&shared, &ended.job, Outcome::of(result, &shared.identity, &redactor));
    if shared.settings.refresh_after_each_job {
        outcome = outcome.refreshing();
    }
    let refresh = outcome.refresh;
    stream_error(&shared, &ended.job, &outcome, is_stream).await;
    let remembered = Remembered {
        body: outcome.body,
        job: ended.job.clone(),
        is_stream,
        is_failure: outcome.is_failure,
    };
    shared.memory.keep(&remembered);
    post(&shared, remembered, &stop).await;
    Ended {
        refresh,
        panicked,
        ..ended
    }
}

/// Runs the handler where it belongs and its messages beside it. The outer error is a panic.
async fn compute(
    shared: &Shared,
    handler: Arc<dyn Handler>,
    jobs: Handle,
    job: RunPodJob,
    stop: &StopSignal,
) -> (Result<Result<Value>>, Vec<Value>) {
    let (context, outgoing) = JobContext::new(stop.clone());
    let ended = CancellationToken::new();
    let channel = Channel {
        http: &shared.http,
        routes: &shared.routes,
        pace: &shared.settings.pace,
        job: &job.id,
        aggregate: handler.output() == OutputForm::Stream { aggregate: true },
    };
    let work = claim_and_run(handler, job.clone(), context, shared.settings.pace.clone());
    let work = jobs.spawn(work.in_current_span());
    let finish = async {
        let result = work.await;
        ended.cancel();
        result.map_err(panic_failure)
    };
    tokio::join!(finish, pump::run(channel, outgoing, ended.clone(), stop.clone()))
}

fn killed_too_often(starts: u32) -> Failure {
    Failure::system(
        "RUNPOD_JOB_KILLS_WORKERS",
        format!(
            "The worker died during each of the last {} attempts at this job",
            starts - 1
        ),
    )
    .hint(
        "Most often the machine's memory is too small: choose a larger GPU or a smaller model, or shorten the examples",
    )
}

/// The output of a handler that has ended well, with what it streamed.
pub(crate) fn final_value(value: Value, form: OutputForm, chunks: Vec<Value>) -> Value {
    match (value, form) {
        (Value::Null, OutputForm::Stream { aggregate: true }) => Value::Array(chunks),
        (Value::Null, OutputForm::Stream { aggregate: false }) => Value::Array(Vec::new()),
        (value, _) => value,
    }
}

/// Asks whose job it is until that is clear, then runs it.
pub(crate) async fn claim_and_run(
    handler: Arc<dyn Handler>,
    job: RunPodJob,
    context: JobContext,
    pace: Pace,
) -> Result<Value> {
    let asked = Instant::now();
    loop {
        match handler.claim(&job).await? {
            Claim::Run => return handler.run(job, context).await,
            Claim::Done(output) => return Ok(output),
            Claim::Elsewhere => {}
        }
        if asked.elapsed() >= pace.claim_limit {
            return Err(Failure::system(
                "RUNPOD_RUN_LOCKED",
                "Another worker has been running this job all the time",
            )
            .hint("Its result will come from there; ask for the status of the run, not of this delivery"));
        }
        tracing::info!("another worker has this job; asking again in {:?}", pace.claim_again);
        tokio::select! {
            () = tokio::time::sleep(pace.claim_again) => {}
            _ = context.stopped().wait() => {
                return Err(Failure::platform("RUNPOD_STOPPED", "The job was stopped while another worker had it"));
            }
        }
    }
}

pub(crate) fn panic_failure(error: tokio::task::JoinError) -> Failure {
    let what = match error.try_into_panic() {
        Ok(panic) => panic
            .downcast_ref::<String>()
            .cloned()
            .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
            .unwrap_or_else(|| "no message".to_owned()),
        Err(_) => "the runtime is gone".to_owned(),
    };
    Failure::system(
        "INTERNAL_PANIC",
        format!("The job hit a defect of the program (panic): {what}"),
    )
    .hint("Report this with the job's id; the log has the place")
}

/// The outcome, or a small error in place of one that the platform would refuse.
fn within_limit(shared: &Shared, job: &str, outcome: Outcome) -> Outcome {
    let settings = &shared.settings;
    let limit = if job.starts_with("sync-") {
        settings.sync_output_limit
    } else {
        settings.output_limit
    };
    let size = outcome.body.to_string().len();
    if size <= limit {
        return outcome;
    }
    let failure = Failure::system(
        "RUNPOD_OUTPUT_TOO_LARGE",
        format!("The job's output has {size} bytes; the platform takes {limit}"),
    )
    .hint("Upload the data and return its address, size and hash");
    tracing::error!(size, limit, "the output is too large and is replaced by an error");
    Outcome::of_failure(&failure, &shared.identity, &shared.redactor)
}

async fn stream_error(shared: &Shared, job: &str, outcome: &Outcome, is_stream: bool) {
    if !(shared.settings.stream_errors && is_stream && outcome.is_failure) {
        return;
    }
    if let Some(url) = shared.routes.stream(job) {
        let body = Bytes::from(json!({"output": {"error": outcome.body.get("error")}}).to_string());
        deliver(&shared.http, &shared.settings.pace, &url, job, body).await;
    }
}

/// Posts a result until it is acknowledged, refused or given up, or until the job is cancelled.
async fn post(shared: &Shared, remembered: Remembered, stop: &StopSignal) {
    let delivered = async {
        let first = post_body(shared, &remembered, &remembered.body).await;
        let Delivery::Refused(status) = first else { return first };
        shared.memory.forget(&remembered.job);
        tracing::error!(status, "the result was refused; an error is posted in its place");
        let failure = Failure::platform(
            "RUNPOD_OUTPUT_REFUSED",
            format!("The platform refused the job's output with status {status}"),
        )
        .hint("The job itself has ended; look for its result where it stores files");
        let body = Outcome::of_failure(&failure, &shared.identity, &shared.redactor).body;
        post_body(shared, &remembered, &body).await
    };
    let cancelled = async {
        while stop.wait().await != StopReason::Cancelled {
            std::future::pending::<()>().await;
        }
    };
    let delivery = tokio::select! {
        biased;
        () = cancelled => return tracing::info!("Stopped while its result was on the way."),
        delivery = delivered => delivery,
    };
    match delivery {
        Delivery::Acknowledged => {
            shared.memory.acknowledge(&remembered);
            tracing::info!("Finished.");
        }
        Delivery::Gone => {
            shared.memory.forget(&remembered.job);
            tracing::warn!("the platform does not know this job any more; its result is dropped");
        }
        Delivery::Refused(status) => {
            tracing::error!(status, "neither the result nor an error in its place was accepted")
        }
        Delivery::GivenUp(why) => {
            tracing::error!(%why, "the result could not be delivered; it is kept for the next delivery of this job")
        }
    }
}

async fn post_body(shared: &Shared, remembered: &Remembered, body: &Value) -> Delivery {
    let url = shared.routes.done(&remembered.job, remembered.is_stream);
    let body = Bytes::from(body.to_string());
    deliver(&shared.http, &shared.settings.pace, &url, &remembered.job, body).await
}
