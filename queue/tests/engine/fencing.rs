//! Fencing: only the newest token of a job is listened to.

use std::time::Duration;

use brightrun_queue::{Blame, Error, HeartbeatReply, JobFailure, JobState, Lease};
use serde_json::json;

use crate::support::{Database, LONG, database};

/// Every write a worker can make about a running job, each with the result it gave.
async fn every_write(db: &Database, lease: &Lease) -> Vec<(&'static str, Result<(), Error>)> {
    let failure = JobFailure::new(Blame::System, "TEST", "zombie");
    vec![
        ("report", db.queue.report(lease, "hello", &json!({})).await),
        ("complete", db.queue.complete(lease, &json!({})).await.map(drop)),
        ("fail", db.queue.fail(lease, &failure, None).await.map(drop)),
        (
            "snooze",
            db.queue.snooze(lease, Duration::from_secs(1), None).await.map(drop),
        ),
        ("release", db.queue.release(lease, None).await.map(drop)),
    ]
}

async fn beat(db: &Database, lease: Lease) -> HeartbeatReply {
    let replies = db
        .queue
        .heartbeat(&[(lease, Some(json!({"from": "zombie"})))])
        .await
        .unwrap();
    replies[0].1.clone()
}

#[tokio::test]
async fn a_zombies_every_write_is_refused_while_its_successor_runs() {
    let db = database().await;
    let zombie = db.running("work").await;
    db.sweep_at("0").await;
    assert_eq!(db.sweep_at("1 hour").await, [(zombie.job_id, "scheduled".to_owned())]);
    db.make_due(zombie.job_id).await;
    let successor = db
        .queue
        .claim_job("successor", zombie.job_id, LONG)
        .await
        .unwrap()
        .unwrap();
    assert!(successor.lease.token > zombie.token, "tokens only grow");

    let events = db.event_names(zombie.job_id).await;
    for (write, result) in every_write(&db, &zombie).await {
        assert!(matches!(result, Err(Error::LeaseLost { .. })), "{write}: {result:?}");
    }
    assert_eq!(beat(&db, zombie).await, HeartbeatReply::Lost);
    assert_eq!(
        db.event_names(zombie.job_id).await,
        events,
        "nothing of the zombie was recorded"
    );
    let status = db.queue.status(zombie.job_id).await.unwrap().unwrap();
    assert_eq!((status.state, status.progress), (JobState::Running, None));
    assert_eq!(
        db.queue
            .complete(&successor.lease, &json!({"by": "successor"}))
            .await
            .unwrap(),
        JobState::Completed
    );
}

#[tokio::test]
async fn after_the_end_every_other_token_is_told_that_the_job_has_ended() {
    let db = database().await;
    let first = db.running("work").await;
    db.queue.release(&first, None).await.unwrap();
    let second = db
        .queue
        .claim_job("second", first.job_id, LONG)
        .await
        .unwrap()
        .unwrap()
        .lease;
    db.queue.complete(&second, &json!({"by": "second"})).await.unwrap();
    for (write, result) in every_write(&db, &first).await {
        assert!(matches!(result, Err(Error::JobFinished { .. })), "{write}: {result:?}");
    }
    assert_eq!(beat(&db, first).await, HeartbeatReply::Lost);
    assert_eq!(
        db.queue.status(first.job_id).await.unwrap().unwrap().result,
        Some(json!({"by": "second"}))
    );
}

#[tokio::test]
async fn an_ending_can_be_repeated_and_is_told_again_what_it_did() {
    let db = database().await;
    let lease = db.running("work").await;
    for _ in 0..2 {
        assert_eq!(
            db.queue.complete(&lease, &json!({"n": 1})).await.unwrap(),
            JobState::Completed
        );
    }
    assert_eq!(db.event_names(lease.job_id).await, ["enqueued", "claimed", "completed"]);

    let lease = db.running("work").await;
    let failure = JobFailure::new(Blame::Platform, "TEST", "the answer was lost");
    for _ in 0..2 {
        assert_eq!(
            db.queue.fail(&lease, &failure, None).await.unwrap(),
            JobState::Scheduled
        );
    }
    assert_eq!(db.event_names(lease.job_id).await, ["enqueued", "claimed", "retry"]);
}

#[tokio::test]
async fn a_job_that_does_not_exist_is_its_own_error() {
    let db = database().await;
    let nobody = Lease {
        job_id: uuid::Uuid::new_v4(),
        token: 1,
    };
    for (write, result) in every_write(&db, &nobody).await {
        assert!(matches!(result, Err(Error::JobMissing { .. })), "{write}: {result:?}");
    }
}

#[tokio::test]
async fn one_lost_lease_among_many_does_not_hurt_the_others() {
    let db = database().await;
    let alive = db.running("work").await;
    let lost = db.running("work").await;
    db.queue.release(&lost, None).await.unwrap();
    let replies = db
        .queue
        .heartbeat(&[(lost, None), (alive, Some(json!({"step": 3})))])
        .await
        .unwrap();
    assert!(replies.contains(&(lost, HeartbeatReply::Lost)), "{replies:?}");
    assert!(
        replies
            .iter()
            .any(|(lease, reply)| *lease == alive && matches!(reply, HeartbeatReply::Alive { .. })),
        "{replies:?}"
    );
    assert_eq!(
        db.queue.status(alive.job_id).await.unwrap().unwrap().progress,
        Some(json!({"step": 3}))
    );
}
