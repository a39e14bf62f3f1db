//! The whole life of a training job on one screen: [`Attempt::run`].

use std::sync::Arc;
use std::time::Instant;

use async_trait::async_trait;
use brightrun_kernels::Backend;
use brightrun_queue::{Blame as QueueBlame, Ending, Handler, JobContext, JobFailure, StopReason};
use serde::Serialize;
use serde_json::Value;
use tracing::Instrument;

use super::compute::{Computed, OwnedLabels, Work, compute};
use super::input::{Resolved, TrainJob};
use super::projection::{self, Completed, Progress, ResolvedReport, RunningReport};
use super::reporter::{Reporter, Stage};
use super::services::{Services, blocking};
use crate::artifact::{self, Destination};
use crate::dataset;
use crate::error::{Blame, Failure, Result};
use crate::recipe::{self, Prepared};
use crate::storage::Fetched;
use crate::train::data_order::DataOrder;

/// Runs jobs of kind `train`.
pub struct TrainHandler<B: Backend> {
    services: Arc<Services<B>>,
}

impl<B: Backend> TrainHandler<B> {
    /// A handler that uses `services`.
    pub fn new(services: Arc<Services<B>>) -> Self {
        Self { services }
    }
}

#[async_trait]
impl<B: Backend> Handler for TrainHandler<B> {
    async fn run(&self, context: JobContext) -> Ending {
        let span = tracing::info_span!("job", id = %context.lease().job_id, attempt = context.job().attempt);
        let services = self.services.clone();
        async move {
            services.sweep_job_folders(context.queue()).await;
            let mut attempt = Attempt {
                services,
                context,
                started: Instant::now(),
            };
            let result = attempt.run().await;
            attempt.end(result).await
        }
        .instrument(span)
        .await
    }
}

/// Why an attempt ended without an adapter.
pub enum Interruption {
    /// Something failed.
    Failed(Failure),
    /// The queue asked for it.
    Stopped(StopReason),
}

impl From<Failure> for Interruption {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

/// One attempt at one job.
struct Attempt<B: Backend> {
    services: Arc<Services<B>>,
    context: JobContext,
    started: Instant,
}

impl<B: Backend> Attempt<B> {
    async fn run(&mut self) -> std::result::Result<Value, Interruption> {
        let job = TrainJob::parse(self.context.payload())?;
        let resolved = job.resolve(&self.services.config)?;
        self.report("resolved", &ResolvedReport::new(&resolved, None)).await?;

        self.stage(Stage::FetchingDataset)?;
        let fetched = self.fetch_dataset(&job).await?;
        self.stage(Stage::Validating)?;
        let (data, template) = self.prepare(&job, &resolved).await?;
        let total_steps = DataOrder::new(&resolved.spec, data.train.len()).total_steps() as u64;
        self.report("resolved", &ResolvedReport::new(&resolved, Some(total_steps)))
            .await?;
        self.rehearse_storage(&job).await?;

        self.stage(Stage::Loading)?;
        let running = RunningReport {
            stage: Stage::Loading.name(),
            gpu_type: &resolved.gpu_type,
            gpu_count: resolved.gpu_count,
        };
        self.report("running", &running).await?;
        self.started = Instant::now();
        let loaded = self.services.base(resolved.spec.base_dtype, template).await?;

        let mut warnings = resolved.warnings.clone();
        warnings.extend(size_warning(&job, &fetched));
        let labels = OwnedLabels {
            job_id: job.job_id,
            base_model: resolved.base_model.clone(),
            dataset_name: job.dataset.name.clone(),
            warnings,
        };
        let work = Work {
            data: Arc::new(data),
            spec: resolved.spec.clone(),
            labels: labels.clone(),
            folder: self.services.job_folder(job.job_id),
        };
        let reporter = Reporter::new(Arc::new(self.context.clone()), self.started);
        let Computed {
            reporter,
            learnt,
            delivery,
        } = compute(loaded, work, reporter).await?.map_err(Interruption::Stopped)?;

        self.stage(Stage::Uploading)?;
        let destination = Destination {
            bucket: self.services.config.storage.models_bucket.clone(),
            ..Destination::new(job.user_id, artifact::artifact_id(job.job_id))
        };
        let paths = artifact::upload(&*self.services.storage, &destination, &delivery.files, |_| {}).await?;
        if let Err(interruption) = self.check_stop() {
            if matches!(interruption, Interruption::Stopped(StopReason::Cancel(_))) {
                self.services.remove_uploaded(job.user_id, job.job_id).await;
            }
            return Err(interruption);
        }
        let artifact = projection::artifact(&job, &resolved, &learnt, &delivery, reporter.points(), paths);
        Ok(projection::encode(&Completed {
            artifact: &artifact,
            metrics: reporter.final_metrics(&delivery),
            epoch: delivery.metrics.epochs,
            step: delivery.metrics.steps,
            points: reporter.points(),
            gpu_seconds: self.gpu_seconds(),
            warnings: &labels.warnings,
        }))
    }

    /// Turns the result of [`Self::run`] into what the queue is told.
    async fn end(&self, result: std::result::Result<Value, Interruption>) -> Ending {
        match result {
            Ok(completed) => Ending::Complete(completed),
            Err(Interruption::Failed(failure)) => {
                tracing::warn!(%failure, "the attempt failed");
                Ending::Fail(self.queue_failure(&failure))
            }
            Err(Interruption::Stopped(StopReason::Lost)) => Ending::Release("the lease was lost".to_owned()),
            Err(Interruption::Stopped(StopReason::Deadline)) => {
                let failure = Failure::user("JOB_DEADLINE", "The job ran longer than it is allowed to")
                    .hint("Train fewer epochs or on fewer examples, or raise the job's hard deadline");
                Ending::Fail(self.queue_failure(&failure))
            }
            Err(Interruption::Stopped(reason)) => {
                // An ending that carries no cost: said before it. When even that is refused, the lease is gone.
                if let Err(error) = self
                    .context
                    .report("spend", &projection::spend(self.gpu_seconds()))
                    .await
                {
                    tracing::debug!(%error, "the spend of a stopped attempt could not be reported");
                }
                Ending::Release(
                    if reason == StopReason::Shutdown {
                        "shutdown"
                    } else {
                        "cancelled"
                    }
                    .to_owned(),
                )
            }
        }
    }

    fn queue_failure(&self, failure: &Failure) -> JobFailure {
        let blame = match failure.blame {
            Blame::User => QueueBlame::User,
            Blame::System => QueueBlame::System,
            Blame::Platform => QueueBlame::Platform,
        };
        let mut told = JobFailure::new(blame, failure.code.as_str(), failure.message.as_str());
        told.detail = projection::failure_detail(failure, self.gpu_seconds());
        told
    }

    fn gpu_seconds(&self) -> f64 {
        self.started.elapsed().as_secs_f64()
    }

    fn check_stop(&self) -> std::result::Result<(), Interruption> {
        self.context
            .stop()
            .requested()
            .map_or(Ok(()), |reason| Err(Interruption::Stopped(reason)))
    }

    /// Begins a stage: says so with the next heartbeat, and ends here if a stop was asked for.
    fn stage(&self, stage: Stage) -> std::result::Result<(), Interruption> {
        self.check_stop()?;
        tracing::info!(stage = stage.name(), "stage");
        self.context.progress(projection::encode(&Progress {
            progress: stage.begins_at(),
            stage: stage.name(),
            epoch: None,
            step: None,
            total_steps: None,
            metrics: None,
            seconds_left: None,
            points: &[],
            gpu_seconds: self.gpu_seconds(),
        }));
        Ok(())
    }

    async fn report(&self, event: &str, detail: &impl Serialize) -> std::result::Result<(), Interruption> {
        let told = self.context.report(event, &projection::encode(detail)).await;
        self.reported(told)
    }

    /// What a refused report means for the attempt.
    fn reported(&self, told: brightrun_queue::Result<()>) -> std::result::Result<(), Interruption> {
        match told {
            Ok(()) => Ok(()),
            Err(error) if error.is_lost() => Err(Interruption::Stopped(StopReason::Lost)),
            Err(error) => {
                self.check_stop()?;
                Err(queue_trouble(&error).into())
            }
        }
    }

    async fn fetch_dataset(&self, job: &TrainJob) -> Result<Fetched> {
        let row = &job.dataset;
        let target = self.dataset_file(job);
        let fetched = self
            .services
            .storage
            .get_to_file(&row.storage_bucket, &row.storage_path, &target)
            .await?;
        tracing::info!(bytes = fetched.bytes, sha256 = %fetched.sha256, "data set fetched");
        fetched.not_empty(&format!("{}/{}", row.storage_bucket, row.storage_path))
    }

    fn dataset_file(&self, job: &TrainJob) -> std::path::PathBuf {
        self.services.job_folder(job.job_id).join("dataset")
    }

    /// Reads and tokenises the data set. Its problems become rows, so that a user finds them where the job is.
    async fn prepare(
        &self,
        job: &TrainJob,
        resolved: &Resolved,
    ) -> std::result::Result<(Prepared, Arc<crate::template::ChatTemplate>), Interruption> {
        let file = self.dataset_file(job);
        let scanned = file.clone();
        let report = blocking(move || dataset::check(&scanned)).await?;
        if let Some(failure) = report.failure() {
            self.report("dataset_invalid", &super::validate::verdict(&report))
                .await?;
            let told = super::validate::report_issues(&self.context, &report).await;
            self.reported(told)?;
            return Err(failure.into());
        }
        let template = self.services.template().await?;
        let (shared, spec) = (template.clone(), resolved.spec.clone());
        let data = blocking(move || recipe::prepare(&file, &shared, &spec)).await?;
        Ok((data, template))
    }

    /// Writes, reads back and deletes a small object where the adapter will go: found out now, not after hours of training.
    async fn rehearse_storage(&self, job: &TrainJob) -> Result<()> {
        let prefix = format!("{}/{}", job.user_id, artifact::artifact_id(job.job_id));
        self.services
            .storage
            .probe(&self.services.config.storage.models_bucket, &prefix)
            .await
    }
}

/// The queue's own trouble as a failure of the job.
fn queue_trouble(error: &brightrun_queue::Error) -> Failure {
    Failure::platform(error.code(), error.to_string()).hint(error.hint())
}

/// The client claims a size when it creates the row; what lies in storage decides.
fn size_warning(job: &TrainJob, fetched: &Fetched) -> Option<String> {
    let claimed = u64::try_from(job.dataset.file_size.unwrap_or(0)).unwrap_or(0);
    (claimed > 0 && claimed != fetched.bytes).then(|| {
        format!(
            "The data set's row says {claimed} bytes, its file has {}",
            fetched.bytes
        )
    })
}
