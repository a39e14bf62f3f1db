//! Jobs that RunPod hands out: references to rows, and whole jobs without a database.
//!
//! ```text
//!                        ┌─ {"job_id"}                      → reference.rs: claim the row's job, run it as any worker does
//!   RunPod ─▶ claim/run ─┤
//!                        └─ {"job_id", "dataset_url", …}    → whole.rs: fetch, train, deliver to the configured storage
//! ```
//!
//! | file | what it knows |
//! |---|---|
//! | [`input`] | what a client may send, and what is wrong with it |
//! | `reference` | the claim decides whose job it is; the row decides how it ended |
//! | `whole` | a job that exists nowhere but in its input |
//! | [`payload`] | progress and results in the words of the app's poller |
//!
//! Deliveries are at least once. A reference is answered from the row: claimed, still running elsewhere, or ended. A whole job is
//! locked by its folder on the volume.

pub mod input;
pub mod payload;
mod reference;
mod whole;

use std::sync::Arc;

use async_trait::async_trait;
use brightrun_kernels::Backend;
use brightrun_queue::RunnerConfig;
use serde_json::Value;

use self::input::Request;
use self::reference::References;
use self::whole::WholeJobs;
use super::services::Services;
use crate::error::{Failure, Result};
use crate::runpod::{Claim, Handler, JobContext, RunPodJob};
use crate::secret::Secret;

/// Where references to rows are looked up.
pub struct Database {
    /// `DATABASE_URL`.
    pub url: Secret,
    /// Leases, heartbeats and the worker's name.
    pub runner: RunnerConfig,
}

/// Trains what RunPod hands out.
pub struct ServerlessHandler<B: Backend> {
    references: Option<References<B>>,
    whole: WholeJobs<B>,
}

impl<B: Backend> ServerlessHandler<B> {
    /// A handler; without a database it takes whole jobs only. Nothing is contacted before the first job.
    pub fn new(services: Arc<Services<B>>, database: Option<Database>) -> Result<Self> {
        Ok(Self {
            references: database.map(|database| References::new(services.clone(), database)),
            whole: WholeJobs::new(services)?,
        })
    }

    fn read(&self, job: &RunPodJob) -> Result<Request> {
        Request::read(&job.input, self.references.is_some())
    }

    fn references(&self) -> Result<&References<B>> {
        // `Request::read` names the fields of a whole job where there is no database.
        self.references
            .as_ref()
            .ok_or_else(|| Failure::system("CONFIG_MISSING", "No database is configured"))
    }
}

#[async_trait]
impl<B: Backend> Handler for ServerlessHandler<B> {
    async fn claim(&self, job: &RunPodJob) -> Result<Claim> {
        match self.read(job)? {
            Request::Reference(id) => self.references()?.claim(&job.id, id).await,
            Request::Whole(whole) => self.whole.claim(&job.id, &whole),
        }
    }

    async fn run(&self, job: RunPodJob, context: JobContext) -> Result<Value> {
        match self.read(&job)? {
            Request::Reference(_) => self.references()?.run(&job.id, context).await,
            Request::Whole(whole) => self.whole.run(&job.id, *whole, context).await,
        }
    }
}
