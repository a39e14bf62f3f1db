//! Enqueueing: idempotent, transactional, bounded.

use std::collections::HashSet;

use brightrun_queue::{Error, NewJob};
use serde_json::json;
use uuid::Uuid;

use crate::support::{database, long_text};

#[tokio::test]
async fn a_rolled_back_transaction_leaves_no_job() {
    let db = database().await;
    let mut client = db.queue.client().await.unwrap();
    let transaction = client.transaction().await.unwrap();
    let id = db
        .queue
        .enqueue_in(&transaction, &NewJob::new("work", json!({})))
        .await
        .unwrap();
    transaction.rollback().await.unwrap();
    assert_eq!(db.queue.status(id).await.unwrap(), None);
    assert_eq!(db.queue.events(id, 0).await.unwrap(), vec![]);
    assert_eq!(db.claim("w", "work", 1).await, vec![]);

    let transaction = client.transaction().await.unwrap();
    let id = db
        .queue
        .enqueue_in(&transaction, &NewJob::new("work", json!({})))
        .await
        .unwrap();
    assert_eq!(
        db.queue.status(id).await.unwrap(),
        None,
        "not visible before the commit"
    );
    transaction.commit().await.unwrap();
    assert_eq!(db.state(id).await, "ready");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_key_gives_one_job_however_many_ask_at_once() {
    let db = database().await;
    let mut askers = tokio::task::JoinSet::new();
    for number in 0..16 {
        let queue = db.queue.clone();
        askers.spawn(async move {
            let job = NewJob {
                idempotency_key: Some("order 7".into()),
                ..NewJob::new("work", json!(number))
            };
            queue.enqueue(&job).await.unwrap()
        });
    }
    let ids: HashSet<Uuid> = askers.join_all().await.into_iter().collect();
    assert_eq!(ids.len(), 1);
    assert_eq!(db.claim("w", "work", 100).await.len(), 1);
}

#[tokio::test]
async fn a_key_is_per_kind_and_is_remembered_after_the_job_has_ended() {
    let db = database().await;
    let job = NewJob {
        idempotency_key: Some("k".into()),
        ..NewJob::new("work", json!({}))
    };
    let id = db.queue.enqueue(&job).await.unwrap();
    let lease = db.claim("w", "work", 1).await[0].lease;
    db.queue.complete(&lease, &json!({})).await.unwrap();
    assert_eq!(db.queue.enqueue(&job).await.unwrap(), id);
    assert_eq!(db.state(id).await, "completed");
    let other = NewJob {
        kind: "other".into(),
        ..job
    };
    assert_ne!(db.queue.enqueue(&other).await.unwrap(), id);
}

#[tokio::test]
async fn a_known_id_returns_the_existing_job_unchanged() {
    let db = database().await;
    let id = Uuid::new_v4();
    let first = NewJob {
        id: Some(id),
        ..NewJob::new("work", json!("first"))
    };
    let second = NewJob {
        id: Some(id),
        ..NewJob::new("work", json!("second"))
    };
    assert_eq!(db.queue.enqueue(&first).await.unwrap(), id);
    assert_eq!(db.queue.enqueue(&second).await.unwrap(), id);
    assert_eq!(db.queue.status(id).await.unwrap().unwrap().payload, json!("first"));
    assert_eq!(db.event_names(id).await, ["enqueued"]);
}

#[tokio::test]
async fn values_out_of_bounds_are_refused_with_the_rules_name() {
    let db = database().await;
    let fresh = || NewJob::new("work", json!({}));
    for (job, rule) in [
        (
            NewJob {
                kind: String::new(),
                ..fresh()
            },
            "job_kind_is_a_name",
        ),
        (
            NewJob {
                max_attempts: 0,
                ..fresh()
            },
            "job_attempts_allowed",
        ),
        (
            NewJob {
                payload: json!(long_text()),
                ..fresh()
            },
            "job_payload_is_bounded",
        ),
        (
            NewJob {
                idempotency_key: Some(String::new()),
                ..fresh()
            },
            "job_key_is_short",
        ),
    ] {
        let error = db.queue.enqueue(&job).await.unwrap_err();
        assert!(
            matches!(error, Error::Rejected { .. }) && error.to_string().contains(rule),
            "{rule}: {error}"
        );
    }
}
