//! The app's cancel, an UPDATE by a signed-in user, at every stage of a job.

use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use brightrun_worker::error::Result;
use brightrun_worker::secret::Secret;
use brightrun_worker::storage::{Fetched, ObjectEntry, ObjectInfo, Storage};
use bytes::Bytes;
use tokio::sync::Semaphore;
use uuid::Uuid;

use crate::database::eventually;
use crate::world::World;

/// A storage whose downloads or uploads say that they began and wait until they may go on.
struct Gate {
    inner: Arc<dyn Storage>,
    holds_downloads: bool,
    arrived: Semaphore,
    open: Semaphore,
}

impl Gate {
    fn new(inner: Arc<dyn Storage>, holds_downloads: bool) -> Arc<Self> {
        let (arrived, open) = (Semaphore::new(0), Semaphore::new(0));
        Arc::new(Self {
            inner,
            holds_downloads,
            arrived,
            open,
        })
    }

    async fn pass(&self, is_download: bool) {
        if is_download == self.holds_downloads {
            self.arrived.add_permits(1);
            self.open.acquire().await.unwrap().forget();
        }
    }
}

#[async_trait]
impl Storage for Gate {
    fn describe(&self) -> String {
        self.inner.describe()
    }
    async fn put_file(&self, bucket: &str, path: &str, file: &Path, content_type: &str) -> Result<ObjectInfo> {
        self.pass(false).await;
        self.inner.put_file(bucket, path, file, content_type).await
    }
    async fn put_bytes(&self, bucket: &str, path: &str, bytes: Bytes, content_type: &str) -> Result<ObjectInfo> {
        self.inner.put_bytes(bucket, path, bytes, content_type).await
    }
    async fn get_to_file(&self, bucket: &str, path: &str, target: &Path) -> Result<Fetched> {
        self.pass(true).await;
        self.inner.get_to_file(bucket, path, target).await
    }
    async fn get_bytes(&self, bucket: &str, path: &str, limit_bytes: u64) -> Result<Bytes> {
        self.inner.get_bytes(bucket, path, limit_bytes).await
    }
    async fn head(&self, bucket: &str, path: &str) -> Result<Option<ObjectInfo>> {
        self.inner.head(bucket, path).await
    }
    async fn list(&self, bucket: &str, folder: &str) -> Result<Vec<ObjectEntry>> {
        self.inner.list(bucket, folder).await
    }
    async fn delete(&self, bucket: &str, path: &str) -> Result<()> {
        self.inner.delete(bucket, path).await
    }
    async fn signed_url(&self, bucket: &str, path: &str, seconds: u64) -> Result<Secret> {
        self.inner.signed_url(bucket, path, seconds).await
    }
}

/// The app's own statement, under the policies of a signed-in user.
async fn cancel(world: &World, job: Uuid) {
    let mut app = world.database.signed_in(world.user).await;
    assert_eq!(app.cancel_job(job, 0.0).await.unwrap(), 1);
}

/// Waits for the engine to let go, and checks what must hold whenever the cancel came.
async fn assert_cancelled(world: &World, job: Uuid) {
    eventually("the engine's job is cancelled", || async {
        world.database.engine_state(job).await.as_deref() == Some("cancelled")
    })
    .await;
    let row = world.database.job(job).await;
    assert_eq!(
        (row["status"].as_str(), row["artifact_id"].as_str()),
        (Some("cancelled"), None),
        "{row:#}"
    );
    assert!(
        row["completed_at"].is_string() && row["final_cost"].is_number(),
        "{row:#}"
    );
    assert_eq!(world.leases(job).await, 0);
    assert_eq!(
        world.database.count("model_artifacts where job_id = $1", &[&job]).await,
        0
    );
    assert!(world.database.count("cost_records where job_id = $1", &[&job]).await <= 1);
    for told in world.database.notifications(world.user).await {
        assert_eq!(told["type"], "job_started", "{told:#}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_queued_job_is_cancelled_before_any_worker_sees_it() {
    let world = World::new().await;
    let job = world.job(4, 1).await;
    cancel(&world, job).await;
    assert_cancelled(&world, job).await;
    assert_eq!(world.work().await.claimed, 0);
    assert_eq!(world.database.count("cost_records where job_id = $1", &[&job]).await, 0);
}

async fn cancelled_while_held(holds_downloads: bool, stage: &str) {
    let world = World::new().await;
    let job = world.job(4, 1).await;
    let gate = Gate::new(world.storage(), holds_downloads);
    let worker = world.worker_with(gate.clone()).await;
    gate.arrived.acquire().await.unwrap().forget();
    eventually(&format!("stage {stage}"), || async {
        world.database.job(job).await["current_stage"] == stage
    })
    .await;
    cancel(&world, job).await;
    gate.open.add_permits(1000);
    assert_cancelled(&world, job).await;
    worker.stop().await;
    assert_cancelled(&world, job).await;
    // The next job's worker takes back whatever the cancelled one had uploaded.
    let next = world.job(4, 1).await;
    world.work_until(next, "completed").await;
    let folder = format!("{}/{}", world.user, brightrun_worker::artifact::artifact_id(job));
    assert!(world.storage().list("lora-models", &folder).await.unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_is_cancelled_while_its_data_set_is_fetched() {
    cancelled_while_held(true, "fetching_dataset").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_is_cancelled_while_its_adapter_is_uploaded() {
    cancelled_while_held(false, "uploading").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_is_cancelled_between_two_steps() {
    let world = World::new().await;
    let job = world.job(1500, 20).await;
    let worker = world.worker().await;
    eventually("a step in the row", || async {
        world.database.job(job).await["current_step"].as_u64() > Some(0)
    })
    .await;
    cancel(&world, job).await;
    assert_cancelled(&world, job).await;
    worker.stop().await;
    let row = world.database.job(job).await;
    assert!(row["current_step"].as_u64() < row["total_steps"].as_u64(), "{row:#}");
    let folder = format!("{}/{}", world.user, brightrun_worker::artifact::artifact_id(job));
    assert!(world.storage().list("lora-models", &folder).await.unwrap().is_empty());
    assert_eq!(
        world.database.count("cost_records where job_id = $1", &[&job]).await,
        1,
        "compute time was used"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_is_cancelled_while_its_adapter_is_proven() {
    let mut world = World::new().await;
    // Little to learn from and much to prove by: the proof outlasts several heartbeats.
    world.config.train.validation_share = 0.5;
    world.config.train.max_steps = Some(1);
    let job = world.job(24_000, 1).await;
    let worker = world.worker().await;
    eventually("the proof", || async {
        world.database.job(job).await["current_stage"] == "verifying"
    })
    .await;
    cancel(&world, job).await;
    assert_cancelled(&world, job).await;
    worker.stop().await;
    assert_cancelled(&world, job).await;
    assert!(!world.delivered(job, "adapter_model.safetensors").exists());
}

/// What the app's own trigger or another session could do at the very moment of an engine's write.
async fn cancel_in_the_transaction_of(world: &World, stage: &str) {
    let trigger = format!(
        "create function cancel_at_stage() returns trigger language plpgsql as $$
         begin
           update public.training_jobs set status = 'cancelled', completed_at = now(), final_cost = 0
            where id = new.id and status <> 'cancelled';
           return null;
         end $$;
         create trigger cancel_at_stage after update on training_jobs for each row
           when (new.current_stage = '{stage}' and old.current_stage is distinct from new.current_stage)
           execute function cancel_at_stage()"
    );
    world.database.owner.batch_execute(&trigger).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_in_the_very_transaction_of_a_stage_wins() {
    // The two stages that are written by themselves, not with a heartbeat.
    for stage in ["initializing", "loading"] {
        let world = World::new().await;
        cancel_in_the_transaction_of(&world, stage).await;
        let job = world.job(200, 2).await;
        world.work().await;
        let row = world.database.job(job).await;
        assert_eq!(row["status"], "cancelled", "{row:#}");
        assert_eq!(world.database.engine_state(job).await.as_deref(), Some("cancelled"));
        assert_eq!(
            (world.leases(job).await, &row["artifact_id"]),
            (0, &serde_json::Value::Null)
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_completed_job_keeps_its_artifact_whatever_is_cancelled_later() {
    let world = World::new().await;
    let job = world.job(4, 1).await;
    let before = world.work_until(job, "completed").await;
    let mut app = world.database.signed_in(world.user).await;
    // The policies may refuse the statement or let it touch nothing; either way nothing is undone.
    let _ = app.cancel_job(job, 0.0).await;
    assert_eq!(world.database.engine_state(job).await.as_deref(), Some("completed"));
    assert_eq!(world.database.job(job).await["artifact_id"], before["artifact_id"]);
    assert_eq!(
        world.database.count("model_artifacts where job_id = $1", &[&job]).await,
        1
    );
    assert_eq!(world.database.count("cost_records where job_id = $1", &[&job]).await, 1);
    assert!(!world.adapter(job).is_empty());
}
