//! A job that exists nowhere but in its input: fetched from an address, delivered to the configured storage.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use brightrun_kernels::Backend;
use brightrun_queue::StopReason as QueueStop;
use rustix::fs::{FlockOperation, flock};
use serde_json::Value;
use url::Url;

use super::input::{WholeJob, is_loopback};
use super::payload::{self, Success};
use crate::artifact::{self, Destination};
use crate::dataset;
use crate::error::{Failure, Result};
use crate::job::compute::{Computed, OwnedLabels, Work, compute};
use crate::job::input::Resolved;
use crate::job::link::Link;
use crate::job::reporter::{Reporter, Stage};
use crate::job::services::{Services, blocking};
use crate::recipe;
use crate::runpod::{Claim, JobContext, StopReason};
use crate::storage::url_source::PlainHttp;
use crate::storage::{HttpOptions, UrlSource};

/// How long a delivered file's address works; the app copies the files within minutes.
const ADDRESS_SECONDS: u64 = 24 * 3600;

/// Runs whole jobs.
pub(super) struct WholeJobs<B: Backend> {
    services: Arc<Services<B>>,
    encrypted: UrlSource,
    this_machine: UrlSource,
    /// Locks of claimed jobs, by RunPod's id. A lock ends with the process, however that ends.
    locks: Mutex<HashMap<String, File>>,
}

impl<B: Backend> WholeJobs<B> {
    pub fn new(services: Arc<Services<B>>) -> Result<Self> {
        Ok(Self {
            services,
            encrypted: UrlSource::new(HttpOptions::default(), PlainHttp::Refused)?,
            this_machine: UrlSource::new(HttpOptions::default(), PlainHttp::Allowed)?,
            locks: Mutex::default(),
        })
    }

    /// Locks the job, so that two workers on one volume never write the same checkpoints. The lock's file stays for ever: were it
    /// removed, two workers could each hold the lock of a file of that name.
    pub fn claim(&self, delivery: &str, job: &WholeJob) -> Result<Claim> {
        let folder = self.services.config.worker.work_dir.join("locks");
        let trouble = |error: std::io::Error| {
            Failure::system("WORK_DIR_UNWRITABLE", format!("The job cannot be locked: {error}"))
                .at(folder.display().to_string())
                .hint("Check that the volume is mounted and has space, or set worker.work_dir to another folder")
        };
        std::fs::create_dir_all(&folder).map_err(trouble)?;
        let lock = File::create(folder.join(job.train.job_id.to_string())).map_err(trouble)?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {
                self.locks
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .insert(delivery.to_owned(), lock);
                Ok(Claim::Run)
            }
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(Claim::Elsewhere),
            Err(error) => Err(trouble(error.into())),
        }
    }

    /// Runs a claimed job.
    pub async fn run(&self, delivery: &str, job: WholeJob, context: JobContext) -> Result<Value> {
        let lock = self
            .locks
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(delivery);
        let folder = self.folder(&job);
        let attempt = Attempt {
            owner: self,
            job,
            link: Arc::new(Platform(context)),
            folder: folder.clone(),
        };
        let result = attempt.run().await;
        let was_cancelled = matches!(attempt.link.stop(), Some(QueueStop::Cancel(_)));
        if was_cancelled {
            self.services
                .remove_uploaded(attempt.job.train.user_id, attempt.job.train.job_id)
                .await;
        }
        // What failed or was interrupted is kept for the next delivery, which continues from its checkpoint.
        if (result.is_ok() || was_cancelled)
            && let Err(error) = std::fs::remove_dir_all(&folder)
        {
            tracing::warn!(%error, "the folder of an ended job cannot be removed");
        }
        drop(lock);
        result
    }

    fn folder(&self, job: &WholeJob) -> PathBuf {
        self.services.job_folder(job.train.job_id)
    }

    fn source(&self, job: &WholeJob) -> &UrlSource {
        let is_here = Url::parse(job.dataset_url.expose()).is_ok_and(|url| is_loopback(&url));
        if is_here && self.services.config.worker.loopback_datasets {
            &self.this_machine
        } else {
            &self.encrypted
        }
    }
}

/// RunPod as the one who hears and stops.
struct Platform(JobContext);

impl Link for Platform {
    fn progress(&self, progress: Value) {
        self.0.progress(payload::progress(&progress));
    }

    fn stop(&self) -> Option<QueueStop> {
        self.0.stopped().reason().map(|reason| match reason {
            StopReason::Cancelled => QueueStop::Cancel(None),
            StopReason::Draining => QueueStop::Shutdown,
        })
    }
}

/// One delivery of one job.
struct Attempt<'a, B: Backend> {
    owner: &'a WholeJobs<B>,
    job: WholeJob,
    link: Arc<Platform>,
    folder: PathBuf,
}

impl<B: Backend> Attempt<'_, B> {
    async fn run(&self) -> Result<Value> {
        let services = &self.owner.services;
        let job = &self.job.train;
        let resolved = job.resolve(&services.config)?;
        let mut reporter = Reporter::new(self.link.clone(), Instant::now());
        self.enter(&mut reporter, Stage::FetchingDataset)?;
        let file = self.fetch().await?;
        self.enter(&mut reporter, Stage::Validating)?;
        let scanned = file.clone();
        let report = blocking(move || dataset::check(&scanned)).await?;
        report.failure().map_or(Ok(()), Err)?;
        let template = services.template().await?;
        let (shared, spec) = (template.clone(), resolved.spec.clone());
        let data = blocking(move || recipe::prepare(&file, &shared, &spec)).await?;
        let destination = Destination {
            bucket: services.config.storage.models_bucket.clone(),
            ..Destination::new(job.user_id, artifact::artifact_id(job.job_id))
        };
        let prefix = format!("{}/{}", destination.user_id, destination.artifact_id);
        services.storage.probe(&destination.bucket, &prefix).await?;

        self.enter(&mut reporter, Stage::Loading)?;
        let started = Instant::now();
        let loaded = services.base(resolved.spec.base_dtype, template).await?;
        let work = Work {
            data: Arc::new(data),
            spec: resolved.spec.clone(),
            labels: OwnedLabels {
                job_id: job.job_id,
                base_model: resolved.base_model.clone(),
                dataset_name: job.dataset.name.clone(),
                warnings: resolved.warnings.clone(),
            },
            folder: self.folder.clone(),
        };
        let reporter = Reporter::new(self.link.clone(), started);
        let computed = compute(loaded, work, reporter).await?.map_err(|_| stopped())?;
        self.deliver(&resolved, computed, &destination, started).await
    }

    async fn deliver(
        &self,
        resolved: &Resolved,
        computed: Computed<B>,
        destination: &Destination,
        started: Instant,
    ) -> Result<Value> {
        let storage = &*self.owner.services.storage;
        let Computed {
            mut reporter, delivery, ..
        } = computed;
        self.enter(&mut reporter, Stage::Uploading)?;
        let paths = artifact::upload(storage, destination, &delivery.files, |_| {}).await?;
        self.check_stop()?;
        let mut urls = BTreeMap::new();
        for (name, path) in &paths {
            let url = storage.signed_url(&destination.bucket, path, ADDRESS_SECONDS).await?;
            urls.insert(name.clone(), url.expose().to_owned());
        }
        Ok(Success {
            job_id: &self.job.job_id,
            base_model: &resolved.base_model,
            rank: resolved.spec.rank,
            urls,
            paths: &paths,
            delivery: &delivery,
            seconds: started.elapsed().as_secs_f64(),
            warnings: &resolved.warnings,
        }
        .output())
    }

    async fn fetch(&self) -> Result<PathBuf> {
        let target = self.folder.join("dataset");
        let fetched = self
            .owner
            .source(&self.job)
            .fetch(&self.job.dataset_url, &target)
            .await?;
        tracing::info!(bytes = fetched.bytes, sha256 = %fetched.sha256, "data set fetched");
        fetched.not_empty("`dataset_url`")?;
        Ok(target)
    }

    fn enter(&self, reporter: &mut Reporter, stage: Stage) -> Result<()> {
        self.check_stop()?;
        reporter.enter(stage);
        Ok(())
    }

    fn check_stop(&self) -> Result<()> {
        self.link.stop().map_or(Ok(()), |_| Err(stopped()))
    }
}

fn stopped() -> Failure {
    Failure::platform("RUNPOD_STOPPED", "The job was stopped")
}
