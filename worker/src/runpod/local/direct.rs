//! Running a handler without a platform.

use std::sync::Arc;

use serde_json::Value;

use crate::error::Result;
use crate::runpod::handler::{Handler, JobContext, OutputForm, StopSignal};
use crate::runpod::job::RunPodJob;
use crate::runpod::outcome::{Identity, Outcome};
use crate::runpod::pace::Pace;
use crate::runpod::redact::Redactor;
use crate::runpod::running::{claim_and_run, final_value, panic_failure};

/// A job that was run here.
pub(crate) struct Ran {
    pub outcome: Outcome,
    pub chunks: Vec<Value>,
}

/// Who speaks in errors of this machine.
pub(crate) fn identity() -> Identity {
    Identity {
        worker_id: "local".to_owned(),
        hostname: "local".to_owned(),
        protocol_version: "1.12.0".to_owned(),
    }
}

/// Runs one job on the current runtime; `on_chunk` sees each chunk as it comes.
pub(crate) async fn run(
    handler: Arc<dyn Handler>,
    job: RunPodJob,
    form: OutputForm,
    redactor: &Redactor,
    mut on_chunk: impl FnMut(&Value) -> Result<()>,
) -> Result<Ran> {
    let redactor = redactor.with(job.secrets());
    let (context, outgoing) = JobContext::new(StopSignal::default());
    let mut work = tokio::spawn(claim_and_run(handler, job, context, Pace::default()));
    let (mut arriving, mut chunks) = (outgoing.chunks, Vec::new());
    // The job's end decides, not the channel's: a thread of the handler may keep its sender.
    let ended = loop {
        tokio::select! {
            biased;
            Some(chunk) = arriving.recv() => {
                on_chunk(&chunk)?;
                chunks.push(chunk);
            }
            ended = &mut work => break ended,
        }
    };
    while let Ok(chunk) = arriving.try_recv() {
        on_chunk(&chunk)?;
        chunks.push(chunk);
    }
    let result = ended.unwrap_or_else(|error| Err(panic_failure(error)));
    let result = result.map(|value| final_value(value, form, chunks.clone()));
    Ok(Ran {
        outcome: Outcome::of(result, &identity(), &redactor),
        chunks,
    })
}
