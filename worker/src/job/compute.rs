//! The computing part of a job: training, writing and proving, on a thread of its own.

use std::path::PathBuf;
use std::sync::Arc;

use brightrun_kernels::Backend;
use brightrun_queue::StopReason;

use super::reporter::{Reporter, Stage};
use super::services::{Loaded, blocking};
use crate::artifact::AdapterDtype;
use crate::error::Result;
use crate::recipe::{self, Checkpoints, Delivery, Labels, Learnt, Prepared};
use crate::spec::TrainSpec;
use crate::template::ChatTemplate;
use crate::train;

/// What is to be computed.
pub struct Work {
    /// The tokenised data set.
    pub data: Arc<Prepared>,
    /// The settings of the run.
    pub spec: TrainSpec,
    /// What the artifact says about itself.
    pub labels: OwnedLabels,
    /// Folder of checkpoints and artifact.
    pub folder: PathBuf,
}

/// What came of it.
pub struct Computed<B: Backend> {
    /// With the chart and the last measurements.
    pub reporter: Reporter,
    /// The adapter in memory.
    pub learnt: Learnt<B>,
    /// Its proven files.
    pub delivery: Delivery,
}

/// Trains, continuing from a checkpoint where there is one, then writes and proves the artifact. The inner error is a stop that
/// was asked for; a checkpoint is on disk then.
///
/// # Errors
/// Those of [`recipe::learn`] and [`recipe::deliver`].
pub async fn compute<B: Backend>(
    loaded: Arc<Loaded<B>>,
    work: Work,
    mut reporter: Reporter,
) -> Result<std::result::Result<Computed<B>, StopReason>> {
    blocking(move || {
        let checkpoints = work.folder.join("checkpoints");
        let place = Checkpoints {
            folder: &checkpoints,
            resume: true,
        };
        reporter.enter(Stage::Training);
        let learnt = recipe::learn(&loaded.base, &work.data, &work.spec, Some(place), &mut reporter)?;
        if let train::Outcome::Stopped(_) = learnt.summary.outcome {
            return Ok(Err(reporter.stop_reason()));
        }
        reporter.enter(Stage::Verifying);
        let labels = work.labels.borrow(&loaded.template);
        let artifact = work.folder.join("artifact");
        let delivery = recipe::deliver(&loaded.base, &work.data, &work.spec, &learnt, &labels, &artifact)?;
        Ok(Ok(Computed {
            reporter,
            learnt,
            delivery,
        }))
    })
    .await
}

/// [`Labels`] that can cross to another thread.
#[derive(Clone)]
pub struct OwnedLabels {
    /// The job.
    pub job_id: uuid::Uuid,
    /// The base model's name.
    pub base_model: String,
    /// The data set's name.
    pub dataset_name: String,
    /// What users should know.
    pub warnings: Vec<String>,
}

impl OwnedLabels {
    fn borrow<'a>(&self, template: &'a ChatTemplate) -> Labels<'a> {
        Labels {
            template,
            job_id: self.job_id,
            base_model: self.base_model.clone(),
            dataset_name: self.dataset_name.clone(),
            adapter_dtype: AdapterDtype::F32,
            warnings: self.warnings.clone(),
        }
    }
}
