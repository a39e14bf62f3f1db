//! Illegal rows are refused even from the owner, and the history is kept and let go as told.

use brightrun_queue::JobState;
use serde_json::json;

use crate::support::database;

#[tokio::test]
async fn illegal_rows_cannot_be_written_even_by_hand() {
    let db = database().await;
    let client = db.client().await;
    let ready = db.enqueue("work").await;
    let running = db.running("work").await.job_id;
    let done = db.running("work").await;
    db.queue.complete(&done, &json!({})).await.unwrap();
    let done = done.job_id;
    let cancelled = db.enqueue("work").await;
    db.queue.cancel(cancelled, None).await.unwrap();
    let lease = |id| {
        format!(
            "insert into brightrun.lease (job_id, queue, kind, priority, worker, attempt, claims, lease_for, started_at,
             claimed_at, beat_at, expires_at) values ('{id}', 'default', 'work', 0, 'w', 1, 1, '1 minute', now(), now(), now(), now())"
        )
    };
    let wait = |id| {
        format!(
            "insert into brightrun.ready (job_id, queue, kind, priority, run_at) values ('{id}', 'default', 'work', 0, now())"
        )
    };
    let set = |id, what| format!("update brightrun.job set {what} where id = '{id}'");
    for (illegal, code) in [
        (lease(ready), "23514"),
        (lease(done), "23514"),
        (wait(running), "23514"),
        (wait(done), "23514"),
        (lease(uuid::Uuid::new_v4()), "23503"),
        (
            set(
                running,
                "outcome = 'completed', attempt = 1, finished_at = now(), result = '{}'",
            ),
            "23514",
        ),
        (set(ready, "finished_at = now()"), "23514"),
        (set(ready, "outcome = 'completed'"), "23514"),
        (set(ready, "result = '{}'"), "23514"),
        (set(ready, "error = '{}'"), "23514"),
        (set(done, "outcome = 'failed', error = '{}', result = null"), "BR003"),
        (
            set(
                done,
                "outcome = null, attempt = null, finished_at = null, result = null",
            ),
            "BR003",
        ),
        (set(done, "cancel_requested_at = now()"), "BR003"),
        (set(cancelled, "outcome = 'completed', result = '{}'"), "BR003"),
        (format!("delete from brightrun.job where id = '{running}'"), "23503"),
        (
            "update brightrun.lease set expires_at = now() + interval '2 days', deadline_at = now()".into(),
            "23514",
        ),
    ] {
        let error = client.batch_execute(&illegal).await.unwrap_err();
        assert_eq!(error.code().map(|code| code.code()), Some(code), "{illegal}: {error}");
    }
    db.assert_whole().await;
}

#[tokio::test]
async fn the_audit_finds_a_job_that_lost_its_baton() {
    let db = database().await;
    let id = db.enqueue("work").await;
    db.client()
        .await
        .execute("delete from brightrun.ready where job_id = $1", &[&id])
        .await
        .unwrap();
    assert_eq!(db.queue.violations().await.unwrap(), [(id, 0)]);
}

#[tokio::test]
async fn stats_count_what_waits_and_runs() {
    let db = database().await;
    db.running("one").await;
    db.enqueue("one").await;
    db.enqueue("two").await;
    let stats = db.queue.stats().await.unwrap();
    let counts: Vec<_> = stats
        .iter()
        .map(|row| (row.kind.as_str(), row.ready, row.running))
        .collect();
    assert_eq!(counts, [("one", 1, 1), ("two", 1, 0)]);
    assert!(stats[0].oldest_ready_seconds.unwrap() >= 0.0);
    let listed = db.queue.jobs(Some("one"), Some(JobState::Running), 10).await.unwrap();
    assert_eq!(listed.len(), 1);
}

#[tokio::test]
async fn history_without_a_partition_waits_in_the_default_one_and_moves_when_its_day_is_made() {
    let db = database().await;
    let id = db.enqueue("work").await;
    let clock = db.later("20 days").await;
    clock
        .query("select * from brightrun.claim_job('w', $1)", &[&id])
        .await
        .unwrap();
    let stray = "select count(*) from brightrun.event_default";
    assert_eq!(clock.query_one(stray, &[]).await.unwrap().get::<_, i64>(0), 1);
    clock.query("select brightrun.maintain()", &[]).await.unwrap();
    assert_eq!(clock.query_one(stray, &[]).await.unwrap().get::<_, i64>(0), 0);
    assert_eq!(
        db.event_names(id).await,
        ["enqueued", "claimed"],
        "nothing was lost on the way"
    );
}

#[tokio::test]
async fn old_history_and_old_jobs_go_and_younger_ones_stay() {
    let db = database().await;
    let old = db.running("work").await;
    db.queue.complete(&old, &json!({})).await.unwrap();
    let unfinished = db.enqueue("work").await;
    let clock = db.later("45 days").await;
    clock.query("select brightrun.maintain()", &[]).await.unwrap();
    assert_eq!(
        db.queue.events(old.job_id, 0).await.unwrap(),
        vec![],
        "30 days of history are kept"
    );
    assert_eq!(db.state(old.job_id).await, "completed", "90 days of jobs are kept");
    let clock = db.later("100 days").await;
    clock.query("select brightrun.maintain()", &[]).await.unwrap();
    assert_eq!(db.queue.status(old.job_id).await.unwrap(), None);
    assert_eq!(db.state(unfinished).await, "ready", "an unfinished job is never pruned");
}
