//! Many at once: the same rules as one by one, and index probes whatever the statistics say.

use brightrun_queue::{Error, JobState, Lease, NewJob};
use serde_json::{Value, json};

use crate::support::database;

#[tokio::test]
async fn many_are_enqueued_in_order_and_each_like_one() {
    let db = database().await;
    let template = NewJob {
        priority: 3,
        max_attempts: 7,
        ..NewJob::new("work", Value::Null)
    };
    let payloads: Vec<Value> = (0..250).map(|number| json!({ "number": number })).collect();
    let ids = db.queue.enqueue_many(&template, &payloads).await.unwrap();
    let claimed = db.claim("w", "work", 250).await;
    let seen: Vec<_> = claimed
        .iter()
        .map(|job| (job.lease.job_id, job.payload.clone()))
        .collect();
    let expected: Vec<_> = ids.iter().copied().zip(payloads).collect();
    assert_eq!(seen, expected, "order is the order of the payloads");
    assert!(claimed.iter().all(|job| job.max_attempts == 7));
    assert_eq!(db.event_names(ids[0]).await, ["enqueued", "claimed"]);
    db.assert_whole().await;
}

#[tokio::test]
async fn many_of_a_projected_kind_are_projected_one_by_one_and_stand_or_fall_together() {
    let db = database().await;
    db.with_projector("work").await;
    let ids = db
        .queue
        .enqueue_many(&NewJob::new("work", Value::Null), &[json!(1), json!(2)])
        .await
        .unwrap();
    assert_eq!(db.told_names(ids[1]).await, ["enqueued"]);
    db.raise_on("enqueued").await;
    db.queue
        .enqueue_many(&NewJob::new("work", Value::Null), &[json!(3)])
        .await
        .unwrap_err();
    assert_eq!(db.queue.stats().await.unwrap()[0].ready, 2);
}

#[tokio::test]
async fn what_cannot_be_shared_is_refused() {
    let db = database().await;
    let keyed = NewJob {
        idempotency_key: Some("one".into()),
        ..NewJob::new("work", Value::Null)
    };
    let error = db.queue.enqueue_many(&keyed, &[json!(1), json!(2)]).await.unwrap_err();
    assert!(matches!(error, Error::Rejected { .. }), "{error}");
}

/// One call with every fate in it; only the rows with a current token change anything.
#[tokio::test]
async fn each_row_of_a_batched_completion_has_its_own_token_checked() {
    let db = database().await;
    db.with_projector("told").await;
    let good = db.running("work").await;
    let stale = Lease {
        token: good.token,
        ..db.running("work").await
    };
    let cancelled = db.running("work").await;
    db.queue.cancel(cancelled.job_id, None).await.unwrap();
    let projected = db.running("told").await;
    let ended = db.running("work").await;
    db.queue.release(&ended, None).await.unwrap();
    let missing = Lease {
        job_id: uuid::Uuid::new_v4(),
        token: 1,
    };
    let asked = [good, stale, cancelled, projected, ended, missing, good].map(|lease| (lease, json!({})));
    let told = db.queue.complete_many(&asked).await.unwrap();
    assert!(matches!(told[0], Ok(JobState::Completed)), "{:?}", told[0]);
    assert!(matches!(told[1], Err(Error::LeaseLost { .. })), "{:?}", told[1]);
    assert!(matches!(told[2], Ok(JobState::Cancelled)), "{:?}", told[2]);
    assert!(matches!(told[3], Ok(JobState::Completed)), "{:?}", told[3]);
    assert!(
        matches!(told[4], Ok(JobState::Ready)),
        "a release is told again: {:?}",
        told[4]
    );
    assert!(matches!(told[5], Err(Error::JobMissing { .. })), "{:?}", told[5]);
    assert!(matches!(told[6], Ok(JobState::Completed)), "asked twice: {:?}", told[6]);
    assert_eq!(db.state(stale.job_id).await, "running");
    assert_eq!(db.told_names(projected.job_id).await.last().unwrap(), "completed");
    assert_eq!(
        db.event_names(good.job_id).await,
        ["enqueued", "claimed", "completed"],
        "told once"
    );
    db.assert_whole().await;
}

#[tokio::test]
async fn a_batched_completion_can_be_repeated() {
    let db = database().await;
    let asked = [
        (db.running("work").await, json!({"a": 1})),
        (db.running("work").await, json!({"a": 2})),
    ];
    for _ in 0..2 {
        for told in db.queue.complete_many(&asked).await.unwrap() {
            assert_eq!(told.unwrap(), JobState::Completed);
        }
    }
    let status = db.queue.status(asked[1].0.job_id).await.unwrap().unwrap();
    assert_eq!(status.result, Some(json!({"a": 2})));
}

/// A cancel that holds the job's row is neither waited for beyond half a second nor overwritten.
#[tokio::test(flavor = "multi_thread")]
async fn a_batched_completion_steps_aside_for_a_cancel_in_flight() {
    let db = database().await;
    let (free, contested) = (db.running("work").await, db.running("work").await);
    let mut app = db.client().await;
    let cancelling = app.transaction().await.unwrap();
    cancelling
        .query_one("select brightrun.cancel($1)", &[&contested.job_id])
        .await
        .unwrap();
    let asked = [(free, json!({})), (contested, json!({}))];
    let told = db.queue.complete_many(&asked).await.unwrap();
    assert!(matches!(told[0], Ok(JobState::Completed)), "{:?}", told[0]);
    assert!(matches!(told[1], Err(Error::Collision { .. })), "{:?}", told[1]);
    cancelling.commit().await.unwrap();
    let told = db.queue.complete_many(&asked).await.unwrap();
    assert!(matches!(told[1], Ok(JobState::Cancelled)), "{:?}", told[1]);
    db.assert_whole().await;
}

/// The trap of plans made while the tables were empty: a thousand statements in one transaction, where no statistics can arrive in
/// between, must not read the job table again and again.
#[tokio::test]
async fn no_hot_statement_reads_a_whole_table_even_before_the_first_analyze() {
    let db = database().await;
    let client = db.client().await;
    client
        .batch_execute(
            "do $$
             declare v_jobs uuid[]; v_tokens bigint[];
             begin
                 for i in 1 .. 1000 loop perform brightrun.enqueue('work'); end loop;
                 perform brightrun.enqueue_many('work', array_fill('{}'::jsonb, array[1000]));
                 for i in 1 .. 100 loop perform brightrun.complete(job_id, token) from brightrun.claim('w', '{work}'); end loop;
                 for i in 1 .. 10 loop
                     select array_agg(job_id), array_agg(token) into v_jobs, v_tokens from brightrun.claim('w', '{work}', 50);
                     perform brightrun.complete_many(v_jobs, v_tokens);
                 end loop;
             end $$",
        )
        .await
        .unwrap();
    client.batch_execute("select pg_stat_force_next_flush()").await.unwrap();
    let rows = client
        .query(
            "select relname::text, seq_tup_read from pg_stat_user_tables
             where schemaname = 'brightrun' and relname in ('job', 'ready') and seq_tup_read > 0",
            &[],
        )
        .await
        .unwrap();
    let read: Vec<(String, i64)> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
    assert!(read.is_empty(), "rows read by sequential scans: {read:?}");
}
