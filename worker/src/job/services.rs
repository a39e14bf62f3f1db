//! What all jobs of a worker share: settings, storage, the compute backend, the base model in memory.

use std::path::PathBuf;
use std::sync::Arc;

use brightrun_kernels::Backend;
use brightrun_kernels::cpu::Cpu;
use brightrun_queue::{JobState, Queue};
use tokio::sync::Mutex;
use uuid::Uuid;

use crate::artifact;
use crate::config::Config;
use crate::error::{Blame, Failure, Result};
use crate::model::load::log::{LoadLog, say_how_it_went};
use crate::recipe::Base;
use crate::spec::BaseDtype;
use crate::storage::{self, HttpOptions, Storage, StorageConfig};
use crate::template::ChatTemplate;

/// The services of a worker process.
pub struct Services<B: Backend = Cpu> {
    /// Settings.
    pub config: Config,
    /// Where data sets and adapters lie.
    pub storage: Arc<dyn Storage>,
    /// Where the arithmetic is done.
    pub device: B,
    loaded: Mutex<Option<Arc<Loaded<B>>>>,
}

/// A base model with its tokenizer and template.
pub struct Loaded<B: Backend> {
    /// Tokenizer and template.
    pub template: Arc<ChatTemplate>,
    /// The weights.
    pub base: Base<B>,
}

/// Opens the storage that the settings name; credentials come from the environment.
///
/// # Errors
/// `STORAGE_…` naming every missing variable.
pub fn open_storage(config: &Config) -> Result<Arc<dyn Storage>> {
    let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let place = StorageConfig::from_variables(Some(&config.storage.location), variable)?;
    storage::open(&place, &HttpOptions::default())
}

/// The folder of the configured checkpoint, or of the configured model wherever it lies on this machine.
///
/// # Errors
/// `MODEL_PATH_MISSING` when the configured folder is not there; `MODEL_NOT_FOUND`, `MODEL_AMBIGUOUS`.
pub fn model_folder(config: &Config) -> Result<PathBuf> {
    // A worker without its model is not the job's fault: another worker may have it.
    config.model.locate().map_err(|failure| Failure {
        blame: Blame::System,
        ..failure
    })
}

impl<B: Backend> Services<B> {
    /// Services on a device.
    pub fn new(config: Config, storage: Arc<dyn Storage>, device: B) -> Self {
        Self {
            config,
            storage,
            device,
            loaded: Mutex::new(None),
        }
    }

    /// Tokenizer and template alone: enough to look at a data set, and ready in a moment.
    ///
    /// # Errors
    /// As [`model_folder`]; `TEMPLATE_…`.
    pub async fn template(&self) -> Result<Arc<ChatTemplate>> {
        if let Some(loaded) = &*self.loaded.lock().await {
            return Ok(loaded.template.clone());
        }
        let folder = model_folder(&self.config)?;
        blocking(move || ChatTemplate::load(&folder).map(Arc::new)).await
    }

    /// The base model in the wanted encoding. It stays in memory for the next job; another encoding replaces it.
    ///
    /// # Errors
    /// As [`model_folder`]; the loader's own.
    pub async fn base(&self, dtype: BaseDtype, template: Arc<ChatTemplate>) -> Result<Arc<Loaded<B>>> {
        let mut slot = self.loaded.lock().await;
        if let Some(loaded) = slot.as_ref().filter(|loaded| loaded.base.dtype == dtype) {
            return Ok(loaded.clone());
        }
        // The old one goes first: two models may not fit.
        *slot = None;
        let (device, folder) = (self.device.clone(), model_folder(&self.config)?);
        let settings = self.config.model.load_settings();
        let loaded = blocking(move || {
            let base = Base::load_with(&device, &folder, dtype, &settings, &mut LoadLog::new().reporter())?;
            say_how_it_went(&base.report);
            Ok(Arc::new(Loaded { template, base }))
        })
        .await?;
        *slot = Some(loaded.clone());
        Ok(loaded)
    }

    /// The folder of a job's download, checkpoints and artifact.
    pub fn job_folder(&self, job_id: Uuid) -> PathBuf {
        self.config.worker.work_dir.join("jobs").join(job_id.to_string())
    }

    /// Removes the folders of jobs that have ended, and what was uploaded for those that were not completed: their last worker
    /// may have died, or learnt of the cancel only after its upload. Best effort: what cannot be asked or removed stays.
    pub async fn sweep_job_folders(&self, queue: &Queue) {
        let Ok(entries) = std::fs::read_dir(self.config.worker.work_dir.join("jobs")) else {
            return;
        };
        for entry in entries.flatten() {
            let Some(job_id) = entry.file_name().to_str().and_then(|name| Uuid::try_parse(name).ok()) else {
                continue;
            };
            let Ok(Some(status)) = queue.status(job_id).await else {
                continue;
            };
            if !status.state.is_terminal() {
                continue;
            }
            if status.state != JobState::Completed
                && let Some(owner) = status.owner
            {
                self.remove_uploaded(owner, job_id).await;
            }
            if let Err(error) = std::fs::remove_dir_all(entry.path()) {
                tracing::warn!(%job_id, %error, "the folder of an ended job cannot be removed");
            }
        }
    }

    /// Takes back what was uploaded for a job that nobody wants any more. Best effort.
    pub async fn remove_uploaded(&self, user_id: Uuid, job_id: Uuid) {
        let bucket = &self.config.storage.models_bucket;
        let folder = format!("{user_id}/{}", artifact::artifact_id(job_id));
        let objects = self.storage.list(bucket, &folder).await.unwrap_or_default();
        for object in objects {
            if let Err(failure) = self.storage.delete(bucket, &format!("{folder}/{}", object.name)).await {
                tracing::warn!(%failure, "an uploaded file of a cancelled job could not be removed");
            }
        }
    }
}

/// Runs computation or file work on a thread of its own.
///
/// # Errors
/// The work's own; `INTERNAL_PANIC` when it panicked.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let span = tracing::Span::current();
    match tokio::task::spawn_blocking(move || span.in_scope(work)).await {
        Ok(result) => result,
        Err(error) => match error.try_into_panic() {
            // The runner records it as INTERNAL_PANIC with its text.
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(error) => Err(Failure::system(
                "INTERNAL_INTERRUPTED",
                format!("A thread was interrupted: {error}"),
            )),
        },
    }
}
