//! The graphile_worker crate, set up for rate as its own benchmark does: local queue, batched completion.

use std::time::Duration;

use graphile_worker::tokio_postgres::TokioPostgresDatabase;
use graphile_worker::{Database, IntoTaskHandlerResult, JobSpec, LocalQueueConfig, RawJobSpec, TaskHandler, WorkerContext, WorkerOptions, WorkerUtils};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::{Engine, Outcome, Tally};

const SCHEMA: &str = "graphile_worker";

#[derive(Clone)]
pub struct Graphile(Database);

#[derive(Clone, Deserialize, Serialize)]
struct Bench {}

impl TaskHandler for Bench {
    const IDENTIFIER: &'static str = "bench";

    async fn run(self, context: WorkerContext) -> impl IntoTaskHandlerResult {
        if let Some(tally) = context.get_ext::<Tally>() {
            tally.entered();
        }
        Ok::<(), String>(())
    }
}

impl Engine for Graphile {
    const OPEN: &'static str = "select exists (select from graphile_worker._private_jobs)";

    async fn connect(url: &str) -> Outcome<Self> {
        Ok(Self(TokioPostgresDatabase::from_url(url, 16)?.into()))
    }

    async fn setup(&self) -> Outcome {
        Ok(WorkerUtils::new(self.0.clone(), SCHEMA).migrate().await?)
    }

    async fn enqueue(&self, count: usize) -> Outcome {
        let utils = WorkerUtils::new(self.0.clone(), SCHEMA);
        if count == 1 {
            utils.add_raw_job("bench", json!({}), JobSpec::default()).await?;
        } else {
            let job = || RawJobSpec { identifier: "bench".into(), payload: json!({}), spec: JobSpec::default() };
            utils.add_raw_jobs(&(0..count).map(|_| job()).collect::<Vec<_>>()).await?;
        }
        Ok(())
    }

    async fn work(&self, slots: usize, tally: Tally) -> Outcome {
        let options = WorkerOptions::default()
            .database(self.0.clone())
            .schema(SCHEMA)
            .concurrency(slots)
            .poll_interval(Duration::from_secs(1))
            .local_queue(LocalQueueConfig::default().with_size(500))
            .complete_job_batch_delay(Duration::from_millis(1))
            .add_extension(tally)
            .define_job::<Bench>();
        options.init().await?.run().await?;
        Ok(())
    }
}
