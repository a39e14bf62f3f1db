//! A worker dies in the middle; what another one makes of the rest is what an undisturbed run makes of the whole.

use rustix::process::{Pid, Signal, kill_process};
use uuid::Uuid;

use crate::database::eventually;
use crate::world::World;

/// Ten examples, one held out, 20 epochs of one example a step.
const STEPS: u64 = 180;

async fn adapter_of_an_undisturbed_run(world: &World) -> Vec<u8> {
    let job = world.job(10, 20).await;
    let row = world.work_until(job, "completed").await;
    assert_eq!(row["total_steps"].as_u64(), Some(STEPS));
    world.adapter(job)
}

/// Starts a worker process and signals it as soon as a job's checkpoint has reached `step`.
async fn signal_at(world: &World, job: Uuid, step: u64, signal: Signal) -> std::process::ExitStatus {
    let mut process = world.worker_process(&format!("{job}.log"));
    eventually("a checkpoint", || async { world.checkpointed_step(job) >= step }).await;
    kill_process(Pid::from_child(&process), signal).unwrap();
    let status = process.wait().unwrap();
    let reached = world.checkpointed_step(job);
    assert!(
        (step..STEPS).contains(&reached),
        "the run ended before the signal: step {reached}"
    );
    status
}

async fn finish_with_another_worker(world: &World, job: Uuid) -> serde_json::Value {
    let worker = world.worker().await;
    let row = world.becomes(job, "completed").await;
    worker.stop().await;
    row
}

/// What the engine's history says of the attempts of a job.
async fn count(world: &World, job: Uuid, event: &str) -> i64 {
    world
        .database
        .count("brightrun.event where job_id = $1 and event = $2", &[&job, &event])
        .await
}

#[tokio::test(flavor = "multi_thread")]
async fn after_kill_nine_another_worker_finishes_with_the_same_adapter_bytes() {
    let world = World::new().await;
    let expected = adapter_of_an_undisturbed_run(&world).await;
    // Random in every run: the rule holds at every step. The panic message of a failure names the one.
    for third in 0..3 {
        let step = 1 + third * 35 + u64::from(Uuid::new_v4().as_bytes()[0]) % 35;
        let job = world.job(10, 20).await;
        signal_at(&world, job, step, Signal::KILL).await;
        let row = finish_with_another_worker(&world, job).await;
        assert!(world.adapter(job) == expected, "killed after step {step}: other bytes");
        assert_eq!(row["current_step"].as_u64(), Some(STEPS));
        assert_eq!(row["retry_count"].as_u64(), Some(1), "an abandoned attempt counts");
        let claims = count(&world, job, "claimed").await + count(&world, job, "resumed").await;
        assert_eq!(claims, 2, "killed after step {step}");
        assert_eq!(world.database.count("cost_records where job_id = $1", &[&job]).await, 1);
        assert_eq!(
            world.database.count("model_artifacts where job_id = $1", &[&job]).await,
            1
        );
        let points = "(select step from metrics_points where job_id = $1 group by step having count(*) > 1) as twice";
        assert_eq!(
            world.database.count(points, &[&job]).await,
            0,
            "a step is charted twice"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_gives_the_job_back_uncounted_and_the_next_worker_continues_it() {
    let world = World::new().await;
    let expected = adapter_of_an_undisturbed_run(&world).await;
    let job = world.job(10, 20).await;
    let status = signal_at(&world, job, 20, Signal::TERM).await;
    assert!(status.success(), "{status}");
    let row = world.database.job(job).await;
    assert_eq!(
        (row["status"].as_str(), row["retry_count"].as_u64()),
        (Some("queued"), Some(0))
    );
    assert_eq!((world.leases(job).await, count(&world, job, "released").await), (0, 1));
    let stopped_at = world.checkpointed_step(job);

    let row = finish_with_another_worker(&world, job).await;
    assert!(
        world.adapter(job) == expected,
        "stopped after step {stopped_at}: other bytes"
    );
    assert_eq!(row["retry_count"].as_u64(), Some(0));
    assert_eq!(world.queue().await.status(job).await.unwrap().unwrap().attempt, 1);
}
