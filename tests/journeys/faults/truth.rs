//! Every promise, from the rows and the objects alone.

use std::collections::{BTreeMap, BTreeSet};

use brightrun_worker::artifact::artifact_id;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use uuid::Uuid;

use super::stage::Stage;

/// Panics where a promise is broken. How many jobs ended how.
pub async fn check(stage: &Stage, seed: u64) -> BTreeMap<String, usize> {
    let database = &stage.world.database;
    let mut ends = BTreeMap::new();
    let mut whole = BTreeSet::new();
    assert_eq!(database.count("brightrun.violations()", &[]).await, 0, "seed {seed}");
    for job in &stage.jobs {
        let told = format!("seed {seed}, job {job}");
        let row = database.job(*job).await;
        let status = row["status"].as_str().unwrap().to_owned();
        assert_eq!(
            database.engine_state(*job).await.as_deref(),
            Some(status.as_str()),
            "app and engine disagree: {told}"
        );
        if stage.cancelled.contains(job) {
            assert_eq!(status, "cancelled", "a cancel was overwritten: {told}");
        }
        let is_completed = status == "completed";
        one_of_each(stage, *job, &row, is_completed, &told).await;
        if is_completed {
            whole.extend(whole_artifact(stage, *job, &told));
        }
        *ends.entry(status).or_insert(0) += 1;
    }
    let there: BTreeSet<String> = stage.store.models().into_iter().collect();
    let orphans: Vec<&String> = there.difference(&whole).collect();
    assert!(orphans.is_empty(), "seed {seed}: orphan objects {orphans:?}");
    ends
}

/// One end, one cost record for a job that had begun, one artifact for one that is completed, one word to the user.
async fn one_of_each(stage: &Stage, job: Uuid, row: &Value, is_completed: bool, told: &str) {
    let database = &stage.world.database;
    let ended = "brightrun.event where job_id = $1 and event in ('completed', 'failed', 'cancelled')";
    assert_eq!(database.count(ended, &[&job]).await, 1, "terminal states: {told}");
    let costs = database.count("cost_records where job_id = $1", &[&job]).await;
    assert!(
        costs == 1 || (costs == 0 && row["started_at"].is_null()),
        "{costs} cost records: {told}"
    );
    let artifacts = database.count("model_artifacts where job_id = $1", &[&job]).await;
    assert_eq!(artifacts, i64::from(is_completed), "artifacts: {told}, {row:#}");
    for kind in ["job_started", "job_completed", "job_failed", "artifact_ready"] {
        let told_times = "notifications where metadata ->> 'job_id' = $1 and type = $2";
        let times = database.count(told_times, &[&job.to_string(), &kind]).await;
        assert!(times <= 1, "the user was told {kind} {times} times: {told}");
    }
    assert_eq!(stage.world.leases(job).await, 0, "a lease is left: {told}");
}

/// The paths of a completed job's files, all of which are as the manifest says, and were verified.
fn whole_artifact(stage: &Stage, job: Uuid, told: &str) -> Vec<String> {
    let folder = format!("{}/{}", stage.world.user, artifact_id(job));
    let path = |name: &str| format!("{folder}/{name}");
    let read = |name: &str| {
        let found = stage.store.model(&path(name));
        found.unwrap_or_else(|| panic!("completed, but {name} is missing: {told}"))
    };
    let manifest: Value = serde_json::from_slice(&read("manifest.json")).unwrap();
    assert_eq!(manifest["artifact_id"], json!(artifact_id(job)), "{told}");
    assert!(
        manifest["verification"]["recomputed_loss"].is_number(),
        "completed, but never verified: {told}"
    );
    let files = manifest["files"].as_object().unwrap();
    assert!(files.contains_key("adapter_model.safetensors"), "{told}");
    for (name, record) in files {
        let hash = hex::encode(Sha256::digest(read(name)));
        assert_eq!(record["sha256"], json!(hash), "{told}: {name}");
    }
    let names = files.keys().map(String::as_str).chain(["manifest.json"]);
    names.map(path).collect()
}
