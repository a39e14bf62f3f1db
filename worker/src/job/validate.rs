//! Jobs of kind `validate_dataset`: a row turns `ready` or `error`, with every problem as a row of its own.

use std::sync::Arc;

use async_trait::async_trait;
use brightrun_queue::{Blame as QueueBlame, Ending, Handler, JobContext, JobFailure, StopReason};
use serde::Deserialize;
use serde_json::{Value, json};
use tracing::Instrument;

use super::input::DatasetRow;
use super::projection;
use super::services::blocking;
use crate::dataset::{self, Issue, Report};
use crate::error::{Blame, Failure, Result};
use crate::storage::Storage;

/// Validates data sets.
pub struct ValidateHandler {
    storage: Arc<dyn Storage>,
    work_dir: std::path::PathBuf,
}

#[derive(Deserialize)]
struct ValidateJob {
    dataset: DatasetRow,
}

impl ValidateHandler {
    /// A handler that fetches from `storage` into `work_dir`.
    pub fn new(storage: Arc<dyn Storage>, work_dir: impl Into<std::path::PathBuf>) -> Self {
        Self {
            storage,
            work_dir: work_dir.into(),
        }
    }

    async fn validate(&self, context: &JobContext) -> Result<Value> {
        let job: ValidateJob = serde_json::from_value(context.payload().clone()).map_err(|error| {
            Failure::user(
                "JOB_PAYLOAD_INVALID",
                format!("The data set's row cannot be understood: {error}"),
            )
        })?;
        std::fs::create_dir_all(&self.work_dir).map_err(|error| {
            Failure::system(
                "WORK_DIR_UNWRITABLE",
                format!("The work folder cannot be made: {error}"),
            )
            .at(self.work_dir.display().to_string())
        })?;
        let folder = tempfile::tempdir_in(&self.work_dir).map_err(|error| {
            Failure::system(
                "WORK_DIR_UNWRITABLE",
                format!("The work folder cannot be written: {error}"),
            )
            .at(self.work_dir.display().to_string())
        })?;
        let file = folder.path().join("dataset");
        let row = &job.dataset;
        self.storage
            .get_to_file(&row.storage_bucket, &row.storage_path, &file)
            .await
            .map_err(|failure| Failure {
                // The app's own validator began its message so, and its page looks for nothing else.
                message: format!("Failed to download file: {}", failure.message),
                ..failure
            })?;
        let report = blocking(move || dataset::check(&file)).await?;
        report_issues(context, &report)
            .await
            .map_err(|error| Failure::platform(error.code(), error.to_string()).hint(error.hint()))?;
        Ok(verdict(&report))
    }
}

/// Most bytes of issues in one report: half of what the engine takes, since its count is of its own spelling.
const ISSUE_PART_BYTES: usize = 512 << 10;

/// Sends every issue, in as many reports as they need.
///
/// # Errors
/// The queue's own: the lease is lost, or the database is away.
pub async fn report_issues(context: &JobContext, report: &Report) -> brightrun_queue::Result<()> {
    for part in parts(&report.issues) {
        context.report("issues", &json!({ "issues": part })).await?;
    }
    Ok(())
}

/// Cuts issues into parts of at most [`ISSUE_PART_BYTES`]; no part is empty.
fn parts(issues: &[Issue]) -> Vec<Vec<Value>> {
    let mut parts: Vec<Vec<Value>> = Vec::new();
    let mut room = 0;
    for issue in issues.iter().map(projection::encode) {
        let bytes = issue.to_string().len();
        match parts.last_mut().filter(|_| bytes <= room) {
            Some(part) => part.push(issue),
            None => {
                parts.push(vec![issue]);
                room = ISSUE_PART_BYTES;
            }
        }
        room = room.saturating_sub(bytes);
    }
    parts
}

/// The result of a validation, as the projection in `schema.sql` wants it. The issues go before it: see [`report_issues`].
pub fn verdict(report: &Report) -> Value {
    json!({
        "valid": report.is_ready(),
        "error_count": report.errors,
        "error_message": report.error_message(),
        "statistics": {
            "total_training_pairs": report.examples,
            "total_tokens": report.estimated_tokens,
            "avg_turns_per_conversation": report.average_turns_per_conversation(),
            "avg_tokens_per_turn": report.average_tokens_per_turn(),
        },
        "sample_data": report.sample_data,
    })
}

#[async_trait]
impl Handler for ValidateHandler {
    async fn run(&self, context: JobContext) -> Ending {
        let span = tracing::info_span!("job", id = %context.lease().job_id, attempt = context.job().attempt);
        self.run_inside(context).instrument(span).await
    }
}

impl ValidateHandler {
    async fn run_inside(&self, context: JobContext) -> Ending {
        tokio::select! {
            result = self.validate(&context) => match result {
                Ok(verdict) => Ending::Complete(verdict),
                Err(failure) => Ending::Fail(refusal(&failure)),
            },
            reason = context.stop().stopped() => match reason {
                StopReason::Deadline => Ending::Fail(refusal(&Failure::user("JOB_DEADLINE", "The validation took too long"))),
                _ => Ending::Release("stopped".to_owned()),
            },
        }
    }
}

fn refusal(failure: &Failure) -> JobFailure {
    let blame = match failure.blame {
        Blame::User => QueueBlame::User,
        Blame::System => QueueBlame::System,
        Blame::Platform => QueueBlame::Platform,
    };
    JobFailure {
        detail: projection::failure_detail(failure, 0.0),
        ..JobFailure::new(blame, failure.code.as_str(), failure.message.as_str())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn any_number_of_issues_goes_out_in_order_in_parts_the_engine_takes() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        for line in 0..900 {
            std::io::Write::write_all(&mut file, format!("{{\"{}\": {line}}}\n", "k".repeat(900)).as_bytes()).unwrap();
        }
        let issues = dataset::check(file.path()).unwrap().issues;
        let many: Vec<Issue> = issues.iter().cycle().take(8 * issues.len()).cloned().collect();
        let parts = parts(&many);
        assert!(parts.len() > 1 && parts.iter().all(|part| !part.is_empty()));
        for part in &parts {
            assert!(json!({ "issues": part }).to_string().len() < 1 << 20);
        }
        assert_eq!(parts.concat(), many.iter().map(projection::encode).collect::<Vec<_>>());
    }
}
