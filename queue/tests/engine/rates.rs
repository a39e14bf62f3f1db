//! Rates: so many starts in so much time, exact whoever asks.

use std::time::Duration;

use brightrun_queue::{Error, NewJob, Rate, RateScope, Scope};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use serde_json::json;

use crate::support::{Database, LONG, database, request};

const HOUR: Duration = Duration::from_secs(3600);

fn rate(starts: i32, per: Duration) -> Option<Rate> {
    Some(Rate { starts, per })
}

async fn enqueue(db: &Database, count: usize, key: Option<&str>) {
    for _ in 0..count {
        let job = NewJob {
            concurrency_key: key.map(str::to_owned),
            ..NewJob::new("work", json!({}))
        };
        db.queue.enqueue(&job).await.unwrap();
    }
}

/// How many a worker gets whose clock runs ahead.
async fn claimed_at(db: &Database, ahead: &str) -> i64 {
    let claim = "select count(*) from brightrun.claim('w', '{work}', 100)";
    db.later(ahead).await.query_one(claim, &[]).await.unwrap().get(0)
}

#[tokio::test]
async fn a_queue_starts_no_more_than_its_rate_and_fills_up_again() {
    let db = database().await;
    db.queue
        .set_rate(RateScope::Queue("default"), rate(3, HOUR))
        .await
        .unwrap();
    enqueue(&db, 10, None).await;
    assert_eq!(claimed_at(&db, "0 seconds").await, 3);
    assert_eq!(claimed_at(&db, "19 minutes").await, 0);
    assert_eq!(
        claimed_at(&db, "21 minutes").await,
        1,
        "a third of an hour, a third of three"
    );
    let waiting = db.queue.jobs(Some("work"), None, 1).await.unwrap()[0].id;
    assert_eq!(
        db.queue.explain(waiting).await.unwrap()[0],
        "The queue `default` may start 3 jobs in 01:00:00 and has done so."
    );
    assert_eq!(db.queue.claim_job("w", waiting, LONG).await.unwrap(), None);
    assert_eq!(claimed_at(&db, "10 hours").await, 3, "no more than a bucket holds");
    db.queue.set_rate(RateScope::Queue("default"), None).await.unwrap();
    assert_eq!(claimed_at(&db, "0 seconds").await, 3, "the rest");
    db.assert_whole().await;
}

#[tokio::test]
async fn a_key_has_a_rate_beside_its_limit_and_holds_up_nobody_else() {
    let db = database().await;
    db.queue.set_limit(Scope::Key("api"), Some(100), 1.0).await.unwrap();
    db.queue.set_rate(RateScope::Key("api"), rate(2, HOUR)).await.unwrap();
    enqueue(&db, 5, Some("api")).await;
    enqueue(&db, 4, None).await;
    assert_eq!(
        claimed_at(&db, "0 seconds").await,
        6,
        "two of the key, and all that have none"
    );
    assert_eq!(claimed_at(&db, "61 minutes").await, 2);
    db.queue.set_rate(RateScope::Key("new"), rate(9, HOUR)).await.unwrap();
    enqueue(&db, 3, Some("new")).await;
    assert_eq!(claimed_at(&db, "61 minutes").await, 1, "a key keeps its limit of one");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rate_is_exact_under_races() {
    let db = database().await;
    db.queue
        .set_rate(RateScope::Queue("default"), rate(7, 24 * HOUR))
        .await
        .unwrap();
    enqueue(&db, 60, None).await;
    let mut workers = tokio::task::JoinSet::new();
    for number in 0..8 {
        let queue = db.queue.clone();
        workers.spawn(async move {
            let mut got = 0;
            for _ in 0..20 {
                got += queue
                    .claim(&request(&format!("w{number}"), &["work"], 2))
                    .await
                    .unwrap()
                    .len();
            }
            got
        });
    }
    assert_eq!(workers.join_all().await.iter().sum::<usize>(), 7);
}

#[tokio::test]
async fn whoever_asks_for_more_than_a_rate_ever_allows_is_refused() {
    let db = database().await;
    assert_eq!(db.queue.take_rate("nobody counts", 1000).await.unwrap(), Duration::ZERO);
    db.queue
        .set_rate(RateScope::Api("provider"), rate(5, HOUR))
        .await
        .unwrap();
    let error = db.queue.take_rate("provider", 6).await.unwrap_err();
    assert!(matches!(error, Error::Rejected { .. }), "{error}");
}

/// Time passes and somebody asks, in any order: granted exactly when the bucket of the model has enough, and otherwise told how long
/// the model says. A token is 20 seconds, which no case takes.
#[test]
fn a_bucket_agrees_with_its_model() {
    const STARTS: i64 = 5;
    const SECONDS_EACH: i64 = 20;
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let db = runtime.block_on(database());
    let steps = prop::collection::vec((0..4_i64, 1..=STARTS as u32), 1..20);
    let mut runner = TestRunner::new(Config {
        cases: 20,
        failure_persistence: None,
        ..Config::default()
    });
    let told = runner.run(&steps, |steps| {
        runtime.block_on(async {
            let per = Duration::from_secs((STARTS * SECONDS_EACH) as u64);
            db.queue
                .set_rate(RateScope::Api("provider"), rate(STARTS as i32, per))
                .await
                .unwrap();
            let client = db.client().await;
            let (mut clock, mut tokens) = (0, STARTS);
            for (passed, asked) in steps {
                clock += passed * SECONDS_EACH;
                tokens = STARTS.min(tokens + passed);
                client
                    .batch_execute(&format!("set brightrun.test_now_offset = '{clock} seconds'"))
                    .await
                    .unwrap();
                let wait: f64 = client
                    .query_one("select brightrun.take_rate('provider', $1)", &[&(asked as i32)])
                    .await
                    .unwrap()
                    .get(0);
                let missing = i64::from(asked) - tokens;
                if missing <= 0 {
                    assert_eq!(wait, 0.0);
                    tokens -= i64::from(asked);
                } else {
                    let exact = (missing * SECONDS_EACH) as f64;
                    assert!(
                        wait > exact - SECONDS_EACH as f64 && wait <= exact,
                        "{wait} for {exact}"
                    );
                }
            }
        });
        Ok(())
    });
    if let Err(error) = told {
        panic!("{error}");
    }
}
