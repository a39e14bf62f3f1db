//! Two workers, two hundred jobs, nothing twice.

use serde_json::json;
use uuid::Uuid;

use crate::database::eventually;
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
    let work = world.config.worker.work_dir.clone();
    let mut workers = Vec::new();
    for name in ["first", "second"] {
        world.config.worker.work_dir = work.join(name);
        workers.push(world.worker().await);
    }
    let unfinished = "training_jobs where status in ('queued', 'initializing', 'running')";
    let mut left = JOBS;
    while left > 0 {
        // Half a minute for the next one to end, not for all of them.
        eventually("another job ends", || async {
            world.database.count(unfinished, &[]).await < left
        })
        .await;
        left = world.database.count(unfinished, &[]).await;
    }
    let mut claimed = Vec::new();
    for worker in workers {
        let report = worker.stop().await;
        assert_eq!(report.given_up, 0);
        claimed.push(report.claimed);
    }
    let failures =
        "select coalesce(jsonb_agg(distinct error_message), '[]') from training_jobs where error_message is not null";
    assert_eq!(world.database.json(failures, &[]).await, json!([]));
    assert_eq!(claimed.iter().sum::<u64>(), JOBS.unsigned_abs(), "{claimed:?}");
    assert!(
        claimed.iter().all(|claimed| *claimed > 0),
        "only one worked: {claimed:?}"
    );

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
