//! Two worker processes, two hundred jobs, nothing twice.

use std::process::Stdio;

use serde_json::json;
use uuid::Uuid;

use crate::world::{World, dataset};

const JOBS: i64 = 200;

#[tokio::test(flavor = "multi_thread")]
async fn two_workers_share_two_hundred_jobs_and_none_is_done_twice() {
    let mut world = World::new().await;
    world.config.train.max_steps = Some(1);
    world.config.train.validation_share = 0.0;
    // A job that waits for a busy disk must not look abandoned.
    world.config.worker.lease_seconds = 60;
    let settings = json!({ "batch_size": 1, "epochs": 1, "rank": 4 });
    for _ in 0..JOBS {
        let id = Uuid::new_v4();
        world.upload(id, &dataset(1));
        world.insert(id, settings.clone()).await;
    }
    let mut workers = Vec::new();
    for name in ["first", "second"] {
        let mut worker = world.brightrun(&["worker", "--until-idle"]);
        worker.env("BRIGHTRUN_WORKER_WORK_DIR", world.folder.path().join(name));
        workers.push(worker.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
    }
    for mut worker in workers {
        let status = tokio::task::spawn_blocking(move || worker.wait())
            .await
            .unwrap()
            .unwrap();
        assert!(status.success(), "{status}");
    }
    let claims = "select coalesce(jsonb_agg(claims), '[]') from (
                    select count(*) as claims from brightrun.event where event = 'claimed' group by worker) as each";
    let claims = world.database.json(claims, &[]).await;
    assert_eq!(claims.as_array().map(Vec::len), Some(2), "only one worked: {claims}");
    let failures =
        "select coalesce(jsonb_agg(distinct error_message), '[]') from training_jobs where error_message is not null";
    assert_eq!(world.database.json(failures, &[]).await, json!([]));

    let once = world
        .database
        .json(
            "select coalesce(jsonb_agg(to_jsonb(found)), '[]') from (
               select job.id, job.status,
                      (select count(*) from model_artifacts where job_id = job.id) as artifacts,
                      (select count(*) from cost_records where job_id = job.id) as costs,
                      (select count(*) from notifications where metadata ->> 'job_id' = job.id::text
                                                             and type = 'job_completed') as notifications,
                      (select count(*) from brightrun.event where job_id = job.id and event = 'claimed') as claims,
                      (select count(*) from brightrun.event where job_id = job.id
                                                             and event in ('completed', 'failed', 'cancelled')) as endings
                 from training_jobs job) as found
              where (status, artifacts, costs, notifications, claims, endings) is distinct from
                    ('completed', 1, 1, 1, 1, 1)",
            &[],
        )
        .await;
    assert_eq!(once, json!([]));
    assert_eq!(world.database.count("training_jobs", &[]).await, JOBS);
    assert_eq!(world.database.count("brightrun.violations()", &[]).await, 0);
}
