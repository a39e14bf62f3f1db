//! Jobs of kind `validate_dataset`: a row turns `ready` or `error`, with every problem as a row of its own.

use std::sync::Arc;

use async_trait::async_trait;
use brightrun_queue::{Blame as QueueBlame, Ending, Handler, JobContext, JobFailure, StopReason};
use serde::Deserialize;
use serde_json::{Value, json};

use super::input::DatasetRow;
use super::projection;
use super::services::blocking;
use crate::dataset::{self, Report};
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
        Ok(verdict(&report))
    }
}

/// The result of a validation, as the projection in `schema.sql` wants it.
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
        "issues": report.issues,
    })
}

#[async_trait]
impl Handler for ValidateHandler {
    async fn run(&self, context: JobContext) -> Ending {
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
