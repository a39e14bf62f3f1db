//! Projectors: the app's tables follow in the same transaction, or the transition does not happen.

use std::time::Duration;

use brightrun_queue::{Blame, Error, JobFailure, JobState, NewJob};
use serde_json::json;
use uuid::Uuid;

use crate::support::{LONG, database};

#[tokio::test]
async fn it_is_told_every_transition_and_report_with_attempt_and_worker() {
    let db = database().await;
    db.with_projector("work").await;
    let lease = db.running("work").await;
    let id = lease.job_id;
    db.queue.heartbeat(&[(lease, Some(json!({"step": 1})))]).await.unwrap();
    db.queue.report(&lease, "phase", &json!("not an object")).await.unwrap();
    db.queue
        .fail(&lease, &JobFailure::new(Blame::System, "TEST", "broke"), None)
        .await
        .unwrap();
    db.make_due(id).await;
    let lease = db.queue.claim_job("second", id, LONG).await.unwrap().unwrap().lease;
    db.queue
        .snooze(&lease, Duration::from_secs(9), Some("busy"))
        .await
        .unwrap();
    db.make_due(id).await;
    let lease = db.queue.claim_job("third", id, LONG).await.unwrap().unwrap().lease;
    db.queue.release(&lease, Some("shutdown")).await.unwrap();
    let lease = db.queue.claim_job("fourth", id, LONG).await.unwrap().unwrap().lease;
    db.queue.complete(&lease, &json!({"loss": 0.5})).await.unwrap();

    let told = db.told(id).await;
    let names: Vec<&str> = told.iter().map(|(event, _)| event.as_str()).collect();
    assert_eq!(
        names,
        [
            "enqueued",
            "claimed",
            "progress",
            "phase",
            "retry",
            "resumed",
            "snoozed",
            "resumed",
            "released",
            "resumed",
            "completed"
        ]
    );
    assert_eq!(told[0].1, json!({"attempt": 0, "worker": null}));
    assert_eq!(told[1].1, json!({"attempt": 1, "worker": "holder"}));
    assert_eq!(told[2].1, json!({"step": 1, "attempt": 1, "worker": "holder"}));
    assert_eq!(
        told[3].1,
        json!({"value": "not an object", "attempt": 1, "worker": "holder"})
    );
    assert_eq!(
        (&told[4].1["code"], &told[4].1["blame"]),
        (&json!("TEST"), &json!("system"))
    );
    assert!(told[4].1["retry_at"].is_string());
    assert_eq!(
        (&told[6].1["reason"], &told[6].1["attempt"]),
        (&json!("busy"), &json!(2))
    );
    assert_eq!(told[10].1, json!({"loss": 0.5, "attempt": 2, "worker": "fourth"}));
}

#[tokio::test]
async fn cancels_and_final_failures_are_told_too() {
    let db = database().await;
    db.with_projector("work").await;
    let waiting = db.enqueue("work").await;
    db.queue.cancel(waiting, Some("why")).await.unwrap();
    let (event, detail) = db.told(waiting).await.pop().unwrap();
    assert_eq!((event.as_str(), &detail["reason"]), ("cancelled", &json!("why")));

    let lease = db.running("work").await;
    db.queue.cancel(lease.job_id, None).await.unwrap();
    db.queue.complete(&lease, &json!({})).await.unwrap();
    let (event, detail) = db.told(lease.job_id).await.pop().unwrap();
    assert_eq!(
        (event.as_str(), &detail["instead_of"]),
        ("cancelled", &json!("completed"))
    );

    let lease = db.running("work").await;
    db.queue
        .fail(&lease, &JobFailure::new(Blame::User, "TEST", "your file"), None)
        .await
        .unwrap();
    let (event, detail) = db.told(lease.job_id).await.pop().unwrap();
    assert_eq!((event.as_str(), &detail["message"]), ("failed", &json!("your file")));
    db.queue.redrive(lease.job_id, None).await.unwrap();
    assert_eq!(db.told_names(lease.job_id).await.last().unwrap(), "redriven");
}

#[tokio::test]
async fn a_raising_projector_rolls_the_transition_back() {
    let db = database().await;
    db.with_projector("work").await;
    let lease = db.running("work").await;
    for event in ["completed", "retry", "failed", "snoozed", "released", "phase"] {
        db.raise_on(event).await;
    }
    let failure = |blame| JobFailure::new(blame, "TEST", "broke");
    for (what, result) in [
        ("complete", db.queue.complete(&lease, &json!({})).await.map(drop)),
        (
            "retry",
            db.queue.fail(&lease, &failure(Blame::System), None).await.map(drop),
        ),
        (
            "fail",
            db.queue.fail(&lease, &failure(Blame::User), None).await.map(drop),
        ),
        ("snooze", db.queue.snooze(&lease, LONG, None).await.map(drop)),
        ("release", db.queue.release(&lease, None).await.map(drop)),
        ("report", db.queue.report(&lease, "phase", &json!({})).await),
    ] {
        assert!(
            matches!(&result, Err(Error::Database { code, .. }) if code == "P0042"),
            "{what}: {result:?}"
        );
    }
    assert_eq!(db.state(lease.job_id).await, "running");
    assert_eq!(db.event_names(lease.job_id).await, ["enqueued", "claimed"]);

    db.raise_on("enqueued").await;
    let id = Uuid::new_v4();
    let job = NewJob {
        id: Some(id),
        ..NewJob::new("work", json!({}))
    };
    db.queue.enqueue(&job).await.unwrap_err();
    assert_eq!(db.queue.status(id).await.unwrap(), None);
}

#[tokio::test]
async fn a_job_whose_claim_raises_steps_aside_for_the_next_one() {
    let db = database().await;
    db.with_projector("work").await;
    let poisoned = db.enqueue("work").await;
    let healthy = db.enqueue("work").await;
    db.client()
        .await
        .batch_execute(&format!(
            "create or replace function public.project(p_job uuid, p_event text, p_detail jsonb) returns void
             language plpgsql as $$ begin
                 if p_job = '{poisoned}' and p_event = 'claimed' then raise exception 'poison'; end if;
             end $$"
        ))
        .await
        .unwrap();
    let claimed = db.claim("w", "work", 2).await;
    assert_eq!(
        claimed.iter().map(|job| job.lease.job_id).collect::<Vec<_>>(),
        [healthy]
    );
    let status = db.queue.status(poisoned).await.unwrap().unwrap();
    assert_eq!((status.state, status.attempt), (JobState::Scheduled, 0));
    assert_eq!(status.error.unwrap()["code"], "QUEUE_PROJECTOR_FAILED");
    assert_eq!(db.event_names(poisoned).await, ["enqueued", "projector_error"]);
    db.assert_whole().await;
}

#[tokio::test]
async fn a_raising_or_blocked_progress_does_not_cost_the_lease() {
    let db = database().await;
    db.with_projector("work").await;
    let lease = db.running("work").await;
    db.raise_on("progress").await;
    let clock = db.later("9 minutes").await;
    let beat =
        "select reply from brightrun.heartbeat(array[$1::uuid], array[$2::bigint], array['{\"step\": 1}'::jsonb])";
    let reply: String = clock
        .query_one(beat, &[&lease.job_id, &lease.token])
        .await
        .unwrap()
        .get(0);
    assert_eq!(reply, "alive");
    assert_eq!(db.event_names(lease.job_id).await.last().unwrap(), "projector_error");

    let mut owner = db.client().await;
    owner.batch_execute("truncate public.told_raises").await.unwrap();
    owner
        .execute("insert into public.app values ($1, 'running')", &[&lease.job_id])
        .await
        .unwrap();
    let app = owner.transaction().await.unwrap();
    app.execute("update public.app set status = 'held'", &[]).await.unwrap();
    let reply: String = clock
        .query_one(beat, &[&lease.job_id, &lease.token])
        .await
        .unwrap()
        .get(0);
    assert_eq!(reply, "alive", "the app holds its row, the beat goes through");
    app.rollback().await.unwrap();
    db.sweep_at("0").await;
    assert_eq!(db.sweep_at("18 minutes").await, []);
}

#[tokio::test]
async fn a_projector_that_is_missing_says_so() {
    let db = database().await;
    db.client()
        .await
        .batch_execute("insert into brightrun.job_kind (kind, projector) values ('work', 'public.nowhere')")
        .await
        .unwrap();
    let error = db.queue.enqueue(&NewJob::new("work", json!({}))).await.unwrap_err();
    assert!(
        error.to_string().contains("public.nowhere(uuid, text, jsonb)"),
        "{error}"
    );
}

#[tokio::test]
async fn event_names_of_the_engine_cannot_be_reported() {
    let db = database().await;
    let lease = db.running("work").await;
    for event in ["completed", "cancelled", "claimed"] {
        let error = db.queue.report(&lease, event, &json!({})).await.unwrap_err();
        assert!(matches!(error, Error::Rejected { .. }), "{event}: {error}");
    }
}
