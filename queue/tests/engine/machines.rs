//! Jobs that are content with other machines after waiting in vain for those they prefer.

use std::time::Duration;

use brightrun_queue::{Error, Fallback, Machine, NewJob, Requirements};
use serde_json::json;
use uuid::Uuid;

use crate::support::{Database, database, request};

const NOBODY: [Uuid; 0] = [];

async fn claimed_on(db: &Database, class: &str) -> Vec<Uuid> {
    let mut asked = request("w", &["work"], 9);
    asked.machine = Some(Machine {
        vram_mb: 80_000,
        gpu_class: Some(class.into()),
        gpu_count: 1,
        price_per_hour: None,
    });
    let claimed = db.queue.claim(&asked).await.unwrap();
    claimed.iter().map(|job| job.lease.job_id).collect()
}

fn picky(classes: &[&str]) -> NewJob {
    let after = |minutes: u64, class: &str| Fallback {
        after: Duration::from_secs(60 * minutes),
        gpu_classes: vec![class.into()],
    };
    NewJob {
        requires: Some(Requirements {
            vram_mb: 40_000,
            gpu_classes: classes.iter().map(|class| (*class).to_owned()).collect(),
            fallback: vec![after(10, "A100"), after(20, "L40S")],
            ..Requirements::default()
        }),
        ..NewJob::new("work", json!({}))
    }
}

#[tokio::test]
async fn a_job_is_content_with_more_classes_in_the_order_and_after_the_waits_it_names() {
    let db = database().await;
    let id = db.queue.enqueue(&picky(&["H100"])).await.unwrap();
    db.sweep_at("9 minutes").await;
    assert_eq!(claimed_on(&db, "A100").await, NOBODY);
    assert!(db.queue.explain(id).await.unwrap()[0].contains("content with more after 00:10:00"));
    db.sweep_at("11 minutes").await;
    assert_eq!(claimed_on(&db, "L40S").await, NOBODY);
    assert_eq!(claimed_on(&db, "a100").await, [id]);

    let (second, third) = (
        db.queue.enqueue(&picky(&["H100"])).await.unwrap(),
        db.queue.enqueue(&picky(&["H100"])).await.unwrap(),
    );
    for _ in 0..2 {
        db.sweep_at("21 minutes").await;
    }
    assert_eq!(claimed_on(&db, "L40S").await, [second, third]);
    let kinds: i64 = db
        .client()
        .await
        .query_one("select count(*) from brightrun.requirement where id <> 0", &[])
        .await
        .unwrap()
        .get(0);
    assert_eq!(kinds, 3, "one for each step, however many jobs");
}

#[tokio::test]
async fn a_job_that_runs_anywhere_has_nothing_to_fall_back_to() {
    let db = database().await;
    let error = db.queue.enqueue(&picky(&[])).await.unwrap_err();
    assert!(matches!(error, Error::Rejected { .. }), "{error}");
}
