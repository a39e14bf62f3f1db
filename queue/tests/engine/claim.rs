//! Claims: each job to one worker, in order, and no more than asked for.

use std::collections::HashSet;
use std::time::Duration;

use brightrun_queue::NewJob;
use serde_json::json;

use crate::support::{LONG, connect, database, request};

#[tokio::test(flavor = "multi_thread")]
async fn eight_workers_claim_each_of_1000_jobs_exactly_once() {
    let db = database().await;
    let client = db.client().await;
    client
        .execute("select brightrun.enqueue('work') from generate_series(1, 1000)", &[])
        .await
        .unwrap();
    let mut workers = tokio::task::JoinSet::new();
    for number in 0..8 {
        let queue = db.queue.clone();
        workers.spawn(async move {
            let mut mine = Vec::new();
            loop {
                let claimed = queue
                    .claim(&request(&format!("w{number}"), &["work"], 7))
                    .await
                    .unwrap();
                if claimed.is_empty() {
                    return mine;
                }
                assert!(claimed.len() <= 7);
                for job in claimed {
                    queue.complete(&job.lease, &json!({})).await.unwrap();
                    mine.push(job.lease);
                }
            }
        });
    }
    let claimed: Vec<_> = workers.join_all().await.into_iter().flatten().collect();
    let jobs: HashSet<_> = claimed.iter().map(|lease| lease.job_id).collect();
    let tokens: HashSet<_> = claimed.iter().map(|lease| lease.token).collect();
    assert_eq!((claimed.len(), jobs.len(), tokens.len()), (1000, 1000, 1000));
    let row = client
        .query_one("select count(*) filter (where event = 'claimed'), count(*) filter (where event = 'completed') from brightrun.event", &[])
        .await
        .unwrap();
    assert_eq!((row.get::<_, i64>(0), row.get::<_, i64>(1)), (1000, 1000));
    db.assert_whole().await;
}

#[tokio::test]
async fn lower_priority_numbers_run_first_then_the_order_of_becoming_ready() {
    let db = database().await;
    let mut expected = Vec::new();
    for (name, priority) in [("c", 5), ("a", -5), ("d", 5), ("b", 0)] {
        let job = NewJob {
            priority,
            ..NewJob::new("work", json!(name))
        };
        db.queue.enqueue(&job).await.unwrap();
        expected.push(name);
    }
    expected.sort_unstable();
    let mut seen = Vec::new();
    for _ in 0..4 {
        seen.push(db.claim("w", "work", 1).await[0].payload.as_str().unwrap().to_owned());
    }
    assert_eq!(seen, expected);
}

#[tokio::test]
async fn with_one_slot_the_best_job_of_all_kinds_is_taken() {
    let db = database().await;
    let late = NewJob {
        priority: 9,
        ..NewJob::new("one", json!({}))
    };
    let urgent = NewJob {
        priority: 1,
        ..NewJob::new("two", json!({}))
    };
    db.queue.enqueue(&late).await.unwrap();
    db.queue.enqueue(&urgent).await.unwrap();
    let claimed = db
        .queue
        .claim(&request("w", &["one", "two", "absent"], 1))
        .await
        .unwrap();
    assert_eq!(claimed[0].kind, "two");
}

#[tokio::test]
async fn other_kinds_and_other_queues_are_left_alone() {
    let db = database().await;
    db.enqueue("theirs").await;
    let elsewhere = NewJob {
        queue: "elsewhere".into(),
        ..NewJob::new("work", json!({}))
    };
    db.queue.enqueue(&elsewhere).await.unwrap();
    assert_eq!(db.claim("w", "work", 10).await, vec![]);
    let mut there = request("w", &["work"], 10);
    there.queue = "elsewhere".into();
    assert_eq!(db.queue.claim(&there).await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_given_job_is_claimed_once_and_only_when_its_time_has_come() {
    let db = database().await;
    db.enqueue("work").await;
    let id = db.enqueue("work").await;
    let claimed = db.queue.claim_job("w1", id, LONG).await.unwrap().unwrap();
    assert_eq!(claimed.lease.job_id, id);
    assert!(claimed.lease_left > Duration::from_secs(500) && claimed.lease_left <= LONG);
    assert_eq!(db.queue.claim_job("w2", id, LONG).await.unwrap(), None);

    let later = NewJob {
        delay: Some(Duration::from_secs(3600)),
        ..NewJob::new("work", json!({}))
    };
    let id = db.queue.enqueue(&later).await.unwrap();
    assert_eq!(db.state(id).await, "scheduled");
    assert_eq!(db.queue.claim_job("w1", id, LONG).await.unwrap(), None);
    let clock = db.later("2 hours").await;
    let rows = clock
        .query("select job_id from brightrun.claim_job('w1', $1)", &[&id])
        .await
        .unwrap();
    assert_eq!(rows.len(), 1);
}

#[tokio::test]
async fn scheduled_jobs_become_ready_in_the_order_of_their_times() {
    let db = database().await;
    for (name, seconds) in [("second", 200), ("first", 100), ("not yet", 9000)] {
        let job = NewJob {
            delay: Some(Duration::from_secs(seconds)),
            ..NewJob::new("work", json!(name))
        };
        db.queue.enqueue(&job).await.unwrap();
    }
    assert_eq!(db.claim("w", "work", 10).await, vec![]);
    let clock = db.later("1 hour").await;
    let rows = clock
        .query("select payload from brightrun.claim('w', array['work'], 10)", &[])
        .await
        .unwrap();
    let names: Vec<serde_json::Value> = rows.iter().map(|row| row.get(0)).collect();
    assert_eq!(names, [json!("first"), json!("second")]);
}

#[tokio::test]
async fn a_claim_whose_answer_was_lost_is_given_back_uncounted() {
    let db = database().await;
    for _ in 0..3 {
        db.enqueue("work").await;
    }
    let heard = db.claim("w", "work", 1).await;
    db.claim("w", "work", 2).await;
    let others = db.enqueue("work").await;
    db.claim("other", "work", 1).await;
    assert_eq!(db.queue.release_unknown("w", &[heard[0].lease.token]).await.unwrap(), 2);
    assert_eq!(db.state(heard[0].lease.job_id).await, "running");
    assert_eq!(db.state(others).await, "running");
    let again = db.claim("w", "work", 10).await;
    assert_eq!(
        again.iter().map(|job| (job.attempt, job.claims)).collect::<Vec<_>>(),
        [(1, 2), (1, 2)]
    );
}

#[tokio::test]
async fn the_claim_reads_the_head_of_its_index_past_ineligible_rows() {
    let db = database().await;
    let client = connect(&db.url).await;
    client
        .batch_execute(
            "select brightrun.enqueue('other') from generate_series(1, 2000);
             select brightrun.enqueue('work') from generate_series(1, 2000);
             analyze brightrun.ready;",
        )
        .await
        .unwrap();
    let rows = client
        .query(
            "explain select job_id from brightrun.ready
             where queue = 'default' and kind = 'work' and requirement_id = 0 and ready_seq is not null and share_id is null
             order by priority, ready_seq limit 10 for update skip locked",
            &[],
        )
        .await
        .unwrap();
    let plan: String = rows.iter().map(|row| row.get::<_, String>(0) + "\n").collect();
    assert!(
        plan.contains("Index Scan using ready_claim_open") && !plan.contains("Sort"),
        "{plan}"
    );
}
