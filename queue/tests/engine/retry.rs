//! Retry by blame, dead letters, redrive, and what is not an attempt.

use std::time::Duration;

use brightrun_queue::{Blame, Error, JobFailure, JobState, NewJob};
use serde_json::json;

use crate::support::{LONG, database};

fn failure(blame: Blame) -> JobFailure {
    JobFailure {
        detail: json!({"at": "step 3"}),
        ..JobFailure::new(blame, "TEST_FAILED", "it broke")
    }
}

#[tokio::test]
async fn a_users_mistake_is_final_at_once() {
    let db = database().await;
    let lease = db.running("work").await;
    assert_eq!(
        db.queue.fail(&lease, &failure(Blame::User), None).await.unwrap(),
        JobState::Failed
    );
    let status = db.queue.status(lease.job_id).await.unwrap().unwrap();
    assert_eq!(
        status.error,
        Some(json!({"code": "TEST_FAILED", "blame": "user", "message": "it broke", "detail": {"at": "step 3"}}))
    );
    assert_eq!((status.attempt, status.max_attempts), (1, 3));
}

#[tokio::test]
async fn other_failures_are_tried_again_until_the_attempts_are_used_up_then_redriven() {
    let db = database().await;
    let id = db.enqueue("work").await;
    for (attempt, blame) in [(1, Blame::System), (2, Blame::Platform), (3, Blame::System)] {
        let claimed = db.queue.claim_job("w", id, LONG).await.unwrap().unwrap();
        assert_eq!(claimed.attempt, attempt);
        let state = db.queue.fail(&claimed.lease, &failure(blame), None).await.unwrap();
        if attempt < 3 {
            assert_eq!(state, JobState::Scheduled);
            db.make_due(id).await;
        } else {
            assert_eq!(state, JobState::Failed);
        }
    }
    assert_eq!(
        db.event_names(id)
            .await
            .iter()
            .filter(|event| *event == "retry")
            .count(),
        2
    );
    assert_eq!(
        db.queue.claim_job("w", id, LONG).await.unwrap(),
        None,
        "a dead letter is not claimed"
    );

    assert!(db.queue.redrive(id, Some("the cause is mended")).await.unwrap());
    assert_eq!(db.state(id).await, "ready");
    assert!(!db.queue.redrive(id, None).await.unwrap(), "it is no dead letter now");
    let claimed = db.queue.claim_job("w", id, LONG).await.unwrap().unwrap();
    assert_eq!(claimed.attempt, 1, "a fresh set of attempts");
    assert_eq!(
        db.queue.complete(&claimed.lease, &json!({})).await.unwrap(),
        JobState::Completed
    );
    assert!(
        !db.queue.redrive(id, None).await.unwrap(),
        "only failed jobs are redriven"
    );
    db.assert_whole().await;
}

#[tokio::test]
async fn backoff_doubles_stays_under_its_cap_and_is_spread_over_its_upper_half() {
    let db = database().await;
    let client = db.client().await;
    for (attempt, full) in [(1, 10.0), (2, 20.0), (4, 80.0), (7, 600.0), (1000, 600.0)] {
        let row = client
            .query_one(
                "select min(s), max(s), count(distinct s)::int from (
                    select extract(epoch from brightrun.backoff($1, interval '10 seconds', interval '10 minutes'))::float8 s
                    from generate_series(1, 200)) x",
                &[&attempt],
            )
            .await
            .unwrap();
        let (least, most, distinct): (f64, f64, i32) = (row.get(0), row.get(1), row.get(2));
        assert!(
            least >= full / 2.0 && most <= full,
            "attempt {attempt}: {least}..{most} of {full}"
        );
        assert!(distinct > 100, "attempt {attempt}: the waits are spread");
    }
}

#[tokio::test]
async fn the_retry_waits_as_long_as_the_kind_or_the_worker_says() {
    let db = database().await;
    let client = db.client().await;
    client
        .batch_execute(
            "insert into brightrun.job_kind (kind, retry_base, retry_cap) values ('slow', '1 hour', '2 hours')",
        )
        .await
        .unwrap();
    let lease = db.running("slow").await;
    db.queue.fail(&lease, &failure(Blame::Platform), None).await.unwrap();
    let status = db.queue.status(lease.job_id).await.unwrap().unwrap();
    let wait = status.run_at - status.started_at.unwrap();
    assert!(
        wait >= chrono::TimeDelta::minutes(30) && wait <= chrono::TimeDelta::minutes(61),
        "{wait}"
    );

    let lease = db.running("slow").await;
    db.queue
        .fail(&lease, &failure(Blame::Platform), Some(Duration::from_secs(5)))
        .await
        .unwrap();
    let status = db.queue.status(lease.job_id).await.unwrap().unwrap();
    assert!(status.run_at - status.started_at.unwrap() < chrono::TimeDelta::minutes(2));
}

#[tokio::test]
async fn snoozed_and_released_runs_are_not_attempts() {
    let db = database().await;
    let job = NewJob {
        max_attempts: 1,
        ..NewJob::new("work", json!({}))
    };
    let id = db.queue.enqueue(&job).await.unwrap();
    for claims in 1..=3 {
        let claimed = db.queue.claim_job("w", id, LONG).await.unwrap().unwrap();
        assert_eq!((claimed.attempt, claimed.claims), (1, claims));
        let state = db.queue.release(&claimed.lease, Some("shutdown")).await.unwrap();
        assert_eq!(state, JobState::Ready);
    }
    let claimed = db.queue.claim_job("w", id, LONG).await.unwrap().unwrap();
    let state = db
        .queue
        .snooze(&claimed.lease, Duration::from_secs(3600), Some("no GPU"))
        .await
        .unwrap();
    assert_eq!(state, JobState::Scheduled);
    assert_eq!(db.queue.claim_job("w", id, LONG).await.unwrap(), None);
    db.make_due(id).await;
    let claimed = db.queue.claim_job("w", id, LONG).await.unwrap().unwrap();
    assert_eq!((claimed.attempt, claimed.claims), (1, 5));
    assert_eq!(
        db.queue
            .fail(&claimed.lease, &failure(Blame::System), None)
            .await
            .unwrap(),
        JobState::Failed
    );
}

#[tokio::test]
async fn a_failure_without_code_or_blame_is_refused() {
    let db = database().await;
    let lease = db.running("work").await;
    let nameless = JobFailure::new(Blame::User, "", "what?");
    let error = db.queue.fail(&lease, &nameless, None).await.unwrap_err();
    assert!(matches!(error, Error::Rejected { .. }), "{error}");
    assert_eq!(db.state(lease.job_id).await, "running");
}
