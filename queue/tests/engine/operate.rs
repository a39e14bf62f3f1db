//! Operating: pausing, draining, redriving, explaining, measuring, alarming.

use std::time::Duration;

use brightrun_queue::{Blame, JobFailure, NewJob};
use serde_json::json;

use crate::support::{Database, LONG, database};

#[tokio::test]
async fn a_paused_queue_grants_nothing_finishes_what_runs_and_goes_on_when_resumed() {
    let db = database().await;
    let lease = db.running("work").await;
    let id = db.enqueue("work").await;
    assert_eq!(db.queue.pause("default", Some("a new model")).await.unwrap(), 1);
    assert_eq!(db.claim("w", "work", 9).await, vec![]);
    assert_eq!(db.queue.claim_job("w", id, LONG).await.unwrap(), None);
    assert_eq!(
        db.queue.explain(id).await.unwrap()[0],
        "The queue `default` is paused: a new model."
    );
    db.queue.complete(&lease, &json!({})).await.unwrap();
    assert_eq!(db.queue.pause("default", None).await.unwrap(), 0, "drained");
    assert!(db.queue.resume("default").await.unwrap());
    assert!(!db.queue.resume("default").await.unwrap());
    assert_eq!(db.claim("w", "work", 9).await.len(), 1);
}

async fn fail(db: &Database, code: &str) -> uuid::Uuid {
    let lease = db.running("work").await;
    db.queue
        .fail(&lease, &JobFailure::new(Blame::User, code, "broke"), None)
        .await
        .unwrap();
    lease.job_id
}

#[tokio::test]
async fn failed_jobs_are_redriven_by_kind_and_code_in_bites() {
    let db = database().await;
    for _ in 0..3 {
        fail(&db, "DATA_BAD").await;
    }
    let other = fail(&db, "GPU_LOST").await;
    assert_eq!(db.queue.redrive_many("work", Some("DATA_BAD"), 2).await.unwrap(), 2);
    assert_eq!(db.queue.redrive_many("work", Some("DATA_BAD"), 2).await.unwrap(), 1);
    assert_eq!(db.state(other).await, "failed");
    assert_eq!(db.queue.redrive_many("work", None, 9).await.unwrap(), 1);
    db.assert_whole().await;
}

#[tokio::test]
async fn jobs_of_a_kind_are_cancelled_in_bites_of_one_owner_or_of_all() {
    let db = database().await;
    let (one, other) = (uuid::Uuid::new_v4(), uuid::Uuid::new_v4());
    let mut jobs = Vec::new();
    for owner in [one, one, one, other] {
        let job = NewJob {
            owner: Some(owner),
            ..NewJob::new("work", json!({}))
        };
        jobs.push(db.queue.enqueue(&job).await.unwrap());
    }
    let running = db.queue.claim_job("w", jobs[0], LONG).await.unwrap().unwrap().lease;
    let cancel = async |owner, limit| {
        let cancelled = db.queue.cancel_many("work", owner, Some("a wrong preset"), limit).await;
        cancelled.unwrap()
    };
    assert_eq!(cancel(Some(one), 2).await, 2);
    assert_eq!(cancel(Some(one), 2).await, 1);
    assert_eq!(cancel(Some(one), 2).await, 0);
    assert_eq!(db.state(jobs[0]).await, "running", "its worker is told");
    assert_eq!(
        db.queue.complete(&running, &json!({})).await.unwrap(),
        brightrun_queue::JobState::Cancelled
    );
    assert_eq!(
        (db.state(jobs[2]).await, db.state(jobs[3]).await),
        ("cancelled", "ready")
    );
    assert_eq!(cancel(None, 9).await, 1);
    db.assert_whole().await;
}

#[tokio::test]
async fn every_reason_not_to_run_is_told() {
    let db = database().await;
    let first = db.enqueue("work").await;
    let second = db.enqueue("work").await;
    assert!(db.queue.explain(second).await.unwrap()[0].starts_with("1 jobs of its kind are before it, and 0 run"));
    let after = db
        .queue
        .enqueue(&NewJob {
            after: vec![first],
            ..NewJob::new("work", json!({}))
        })
        .await
        .unwrap();
    assert_eq!(
        db.queue.explain(after).await.unwrap()[0],
        format!("It waits for job {first}, which is ready.")
    );
    let later = NewJob {
        delay: Some(Duration::from_secs(3600)),
        ..NewJob::new("work", json!({}))
    };
    let later = db.queue.enqueue(&later).await.unwrap();
    assert!(db.queue.explain(later).await.unwrap()[0].starts_with("Its time is "));
    let lease = db.queue.claim_job("w", first, LONG).await.unwrap().unwrap().lease;
    assert!(db.queue.explain(first).await.unwrap()[0].starts_with("It runs in attempt 1 of 3 on w"));
    assert_eq!(db.queue.top(5).await.unwrap()[0].job_id, first);
    db.queue
        .fail(
            &lease,
            &JobFailure::new(Blame::User, "X", "the data set is empty"),
            None,
        )
        .await
        .unwrap();
    assert!(db.queue.explain(first).await.unwrap()[0].ends_with(": the data set is empty."));
    assert!(db.queue.explain(uuid::Uuid::new_v4()).await.unwrap()[0].starts_with("There is no job"));
}

/// Every line of the exposition is a comment or a sample of the family announced before it.
#[tokio::test]
async fn metrics_are_well_formed_and_count() {
    let db = database().await;
    db.running("one").await;
    db.enqueue("on\"e").await;
    fail(&db, "DATA_BAD").await;
    let text = db.queue.metrics().await.unwrap();
    let mut family = "";
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            family = rest.split(' ').next().unwrap();
        } else if !line.starts_with('#') {
            let (name, value) = line.rsplit_once(' ').unwrap();
            assert!(
                name == family || name.starts_with(&format!("{family}{{")),
                "{line} is not of {family}"
            );
            assert!(value.parse::<f64>().is_ok(), "{line}");
        }
    }
    for line in [
        "brightrun_queue_jobs{queue=\"default\",kind=\"one\",state=\"running\"} 1",
        "brightrun_queue_jobs{queue=\"default\",kind=\"on\\\"e\",state=\"ready\"} 1",
        "brightrun_queue_failures_last_hour{kind=\"work\",code=\"DATA_BAD\"} 1",
        "brightrun_queue_ends_last_hour{kind=\"work\",outcome=\"failed\"} 1",
        "brightrun_queue_ends_last_hour{kind=\"work\",outcome=\"completed\"} 0",
        "brightrun_queue_lease_expiry_lag_seconds 0",
    ] {
        assert!(text.lines().any(|found| found == line), "{line} is missing in\n{text}");
    }
}

async fn alarms_at(db: &Database, ahead: &str) -> Vec<String> {
    let rows = db
        .later(ahead)
        .await
        .query("select alarm from brightrun.alarms() order by alarm", &[])
        .await
        .unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

#[tokio::test]
async fn each_alarm_rings_when_it_should_and_not_before() {
    let db = database().await;
    assert_eq!(alarms_at(&db, "0 seconds").await, [""; 0]);
    db.client()
        .await
        .batch_execute("select brightrun.enqueue('work') from generate_series(1, 50)")
        .await
        .unwrap();
    assert_eq!(alarms_at(&db, "4 minutes").await, [""; 0]);
    assert_eq!(
        alarms_at(&db, "40 minutes").await,
        ["queue_age"],
        "fifty are not more than fifty"
    );
    db.enqueue("work").await;
    assert_eq!(alarms_at(&db, "29 minutes").await, ["queue_age"]);
    assert_eq!(alarms_at(&db, "31 minutes").await, ["queue_age", "queue_depth"]);

    let db = database().await;
    for _ in 0..4 {
        let lease = db.running("work").await;
        db.queue.complete(&lease, &json!({})).await.unwrap();
    }
    fail(&db, "X").await;
    assert_eq!(
        alarms_at(&db, "1 hour").await,
        [""; 0],
        "one in five is not above a fifth"
    );
    fail(&db, "X").await;
    assert_eq!(alarms_at(&db, "1 hour").await, ["failure_rate"]);
    assert_eq!(alarms_at(&db, "25 hours").await, [""; 0], "of the last day only");

    let db = database().await;
    db.running("validate_dataset").await;
    db.sweep_at("0 seconds").await;
    assert_eq!(alarms_at(&db, "90 seconds").await, [""; 0]);
    assert_eq!(alarms_at(&db, "6 minutes").await, ["nobody_sweeps", "slow_validation"]);
}

#[tokio::test]
async fn the_doctor_finds_what_is_wrong() {
    let db = database().await;
    let wrong = async || {
        let found = db.queue.doctor().await.unwrap();
        found
            .into_iter()
            .filter(|finding| finding.ok == Some(false))
            .map(|finding| finding.item)
            .collect::<Vec<_>>()
    };
    assert_eq!(wrong().await, [""; 0]);
    let id = db.enqueue("work").await;
    db.client()
        .await
        .batch_execute(&format!(
            "delete from brightrun.ready where job_id = '{id}';
             insert into brightrun.job_kind (kind, projector) values ('lost', 'public.nowhere');
             insert into brightrun.schedule (name, kind, every, next_at, paused) values ('stuck', 'x', '1 day', now(), true);"
        ))
        .await
        .unwrap();
    assert_eq!(wrong().await, ["one_baton", "projector:lost", "schedule:stuck"]);
}
