//! Leases end: by silence, by deadline, and not by the database having been away.

use std::time::Duration;

use brightrun_queue::{HeartbeatReply, JobState, NewJob};
use serde_json::json;
use tokio_postgres::Client;

use crate::support::{LONG, database};

async fn sweep(client: &Client) -> usize {
    client
        .query(
            "select * from brightrun.rescue_expired(100, interval '30 seconds')",
            &[],
        )
        .await
        .unwrap()
        .len()
}

#[tokio::test]
async fn a_silent_worker_loses_its_job_which_is_tried_again_and_counted() {
    let db = database().await;
    let lease = db.running("work").await;
    db.queue.heartbeat(&[(lease, Some(json!({"step": 41})))]).await.unwrap();
    db.sweep_at("0").await;
    assert_eq!(db.sweep_at("5 minutes").await, [], "the lease lasts ten");
    assert_eq!(
        db.sweep_at("11 minutes").await,
        [(lease.job_id, "scheduled".to_owned())]
    );
    let status = db.queue.status(lease.job_id).await.unwrap().unwrap();
    assert_eq!(status.attempt, 1);
    let error = status.error.unwrap();
    assert_eq!(
        (&error["code"], &error["blame"]),
        (&json!("QUEUE_LEASE_EXPIRED"), &json!("platform"))
    );
    db.make_due(lease.job_id).await;
    let again = db.queue.claim_job("next", lease.job_id, LONG).await.unwrap().unwrap();
    assert_eq!(
        (again.attempt, again.progress),
        (2, Some(json!({"step": 41}))),
        "it resumes where the last beat was"
    );
}

#[tokio::test]
async fn a_heartbeat_keeps_the_lease() {
    let db = database().await;
    let lease = db.running("work").await;
    db.sweep_at("0").await;
    let clock = db.later("9 minutes").await;
    let reply: String = clock
        .query_one(
            "select reply from brightrun.heartbeat(array[$1::uuid], array[$2::bigint])",
            &[&lease.job_id, &lease.token],
        )
        .await
        .unwrap()
        .get(0);
    assert_eq!(reply, "alive");
    assert_eq!(db.sweep_at("18 minutes").await, []);
    assert_eq!(db.sweep_at("20 minutes").await.len(), 1);
}

#[tokio::test]
async fn the_last_attempt_that_falls_silent_is_a_dead_letter() {
    let db = database().await;
    let job = NewJob {
        max_attempts: 1,
        ..NewJob::new("work", json!({}))
    };
    let id = db.queue.enqueue(&job).await.unwrap();
    db.claim("w", "work", 1).await;
    db.sweep_at("0").await;
    assert_eq!(db.sweep_at("1 hour").await, [(id, "failed".to_owned())]);
}

#[tokio::test]
async fn after_an_outage_nobody_is_declared_dead_before_one_full_lease() {
    let db = database().await;
    let lease = db.running("work").await;
    assert_eq!(
        sweep(&db.client().await).await,
        0,
        "the first sweep ever only begins to watch"
    );
    // Nothing sweeps for an hour: the database was away. The lease expired 50 minutes ago.
    for ahead in ["60 minutes", "60 minutes 20 seconds"] {
        assert_eq!(sweep(&db.later(ahead).await).await, 0, "{ahead}");
    }
    // Watched without a gap for the length of the lease, ten minutes, and still silent.
    let mut rescued = Vec::new();
    for seconds in (40..=620).step_by(20) {
        if sweep(&db.later(&format!("60 minutes {seconds} seconds")).await).await == 1 {
            rescued.push(seconds);
        }
    }
    assert_eq!(rescued.len(), 1);
    assert!((600..=620).contains(&rescued[0]), "{rescued:?}");
    assert_eq!(db.state(lease.job_id).await, "scheduled");
}

#[tokio::test]
async fn a_worker_that_comes_back_after_the_outage_keeps_its_job() {
    let db = database().await;
    let lease = db.running("work").await;
    sweep(&db.client().await).await;
    sweep(&db.later("60 minutes").await).await;
    let clock = db.later("60 minutes 5 seconds").await;
    clock
        .query(
            "select * from brightrun.heartbeat(array[$1::uuid], array[$2::bigint])",
            &[&lease.job_id, &lease.token],
        )
        .await
        .unwrap();
    assert_eq!(db.sweep_at("69 minutes").await, []);
    assert_eq!(
        db.queue.complete(&lease, &json!({})).await.unwrap(),
        JobState::Completed
    );
}

#[tokio::test]
async fn a_hard_deadline_ends_even_a_healthy_run() {
    let db = database().await;
    let job = NewJob {
        hard_deadline: Some(Duration::from_secs(60)),
        ..NewJob::new("work", json!({}))
    };
    db.queue.enqueue(&job).await.unwrap();
    let claimed = db.claim("w", "work", 1).await.remove(0);
    assert!(
        claimed.lease_left <= Duration::from_secs(60),
        "a lease does not reach past the deadline"
    );
    assert!(claimed.deadline_left.unwrap() <= Duration::from_secs(60));
    let replies = db.queue.heartbeat(&[(claimed.lease, None)]).await.unwrap();
    assert!(matches!(replies[0].1, HeartbeatReply::Alive { lease_left } if lease_left <= Duration::from_secs(60)));
    let clock = db.later("61 seconds").await;
    let reply: String = clock
        .query_one(
            "select reply from brightrun.heartbeat(array[$1::uuid], array[$2::bigint])",
            &[&claimed.lease.job_id, &claimed.lease.token],
        )
        .await
        .unwrap()
        .get(0);
    assert_eq!(reply, "deadline");
    assert_eq!(
        db.sweep_at("62 seconds").await,
        [(claimed.lease.job_id, "scheduled".to_owned())]
    );
    let error = db
        .queue
        .status(claimed.lease.job_id)
        .await
        .unwrap()
        .unwrap()
        .error
        .unwrap();
    assert_eq!(error["code"], "QUEUE_DEADLINE_EXCEEDED");
}
