//! Lanes: a batch is one lease, every place of it ends at most once, and nothing is lost.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use brightrun_queue::{
    Batch, BatchJob, BatchPlace, Blame, JobFailure, Lane, LaneConfig, LaneHandler, LaneRunner, LaneStats,
};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::support::{Database, LONG, database, eventually};

fn numbers(count: usize) -> Vec<Value> {
    (0..count).map(|number| json!(number)).collect()
}

async fn claim(lane: &Lane, limit: usize) -> Batch {
    lane.claim("w", limit, LONG, 0).await.unwrap().unwrap()
}

async fn stats(db: &Database) -> LaneStats {
    db.queue.lane_stats().await.unwrap().remove(0)
}

fn done(jobs: &[BatchJob]) -> Vec<(BatchPlace, Option<JobFailure>)> {
    jobs.iter().map(|job| (job.place, None)).collect()
}

fn failure(blame: Blame) -> Option<JobFailure> {
    Some(JobFailure::new(blame, "TEST", "broke"))
}

#[tokio::test]
async fn jobs_come_in_order_and_what_has_ended_is_gone() {
    let db = database().await;
    let lane = db.queue.lane("quick");
    let ids = lane.push_many(&numbers(25), None).await.unwrap();
    let first = claim(&lane, 10).await;
    assert_eq!(
        first.jobs.iter().map(|job| job.payload.clone()).collect::<Vec<_>>(),
        numbers(10)
    );
    assert_eq!(first.jobs.iter().map(|job| job.id).collect::<Vec<_>>(), ids[..10]);
    assert_eq!(lane.finish(&done(&first.jobs)).await.unwrap(), [true; 10]);
    let second = claim(&lane, 100).await;
    assert_eq!(second.jobs.len(), 15);
    assert_eq!(lane.claim("w", 1, LONG, 0).await.unwrap(), None);
    assert_eq!((stats(&db).await.ready, stats(&db).await.running), (0, 15));
    assert_eq!(lane.finish(&done(&second.jobs)).await.unwrap(), [true; 15]);
    assert_eq!(db.queue.lane_stats().await.unwrap(), []);
}

#[tokio::test]
async fn every_place_ends_once_and_a_token_that_is_not_held_ends_nothing() {
    let db = database().await;
    let lane = db.queue.lane("quick");
    lane.push_many(&numbers(3), None).await.unwrap();
    let batch = claim(&lane, 3).await;
    let place = |place| {
        (
            BatchPlace {
                token: batch.token,
                place,
            },
            None,
        )
    };
    let told = lane
        .finish(&[place(1), place(1), place(0), place(4), place(3)])
        .await
        .unwrap();
    assert_eq!(told, [true, false, false, false, true]);
    assert_eq!(lane.finish(&[place(3), place(2)]).await.unwrap(), [false, true]);
    assert_eq!(lane.finish(&[place(2)]).await.unwrap(), [false], "the batch is gone");
    let foreign = (
        BatchPlace {
            token: batch.token + 1000,
            place: 1,
        },
        None,
    );
    assert_eq!(lane.finish(&[foreign]).await.unwrap(), [false]);
}

#[tokio::test]
async fn a_batch_that_was_taken_away_can_end_nothing_and_its_jobs_come_back_once() {
    let db = database().await;
    let lane = db.queue.lane("quick");
    lane.push_many(&numbers(4), None).await.unwrap();
    let zombie = claim(&lane, 4).await;
    assert_eq!(lane.finish(&done(&zombie.jobs[..1])).await.unwrap(), [true]);
    db.sweep_at("0 seconds").await;
    db.sweep_at("1 hour").await;
    assert_eq!(lane.beat(&[zombie.token]).await.unwrap(), [false]);
    assert_eq!(lane.finish(&done(&zombie.jobs)).await.unwrap(), [false; 4]);
    let told = stats(&db).await;
    assert_eq!(
        (told.scheduled, told.running),
        (3, 0),
        "the one that had ended stays ended"
    );
    make_due(&db).await;
    let again = claim(&lane, 10).await;
    assert_eq!(
        again.jobs.iter().map(|job| job.id).collect::<Vec<_>>(),
        zombie.jobs[1..].iter().map(|job| job.id).collect::<Vec<_>>()
    );
    assert!(
        again.jobs.iter().all(|job| job.attempt == 2),
        "a lost lease uses up an attempt"
    );
}

async fn make_due(db: &Database) {
    db.client()
        .await
        .batch_execute("update brightrun.brief set due_at = '-infinity' where due_at is not null")
        .await
        .unwrap();
}

#[tokio::test]
async fn a_beat_keeps_a_batch() {
    let db = database().await;
    let lane = db.queue.lane("quick");
    lane.push(&json!(1)).await.unwrap();
    let batch = claim(&lane, 1).await;
    let later = db.later("9 minutes").await;
    later
        .query_one("select brightrun.brief_beat(array[$1::bigint])", &[&batch.token])
        .await
        .unwrap();
    db.sweep_at("0 seconds").await;
    db.sweep_at("15 minutes").await;
    assert_eq!(lane.finish(&done(&batch.jobs)).await.unwrap(), [true]);
}

#[tokio::test]
async fn failures_are_tried_again_then_die_and_can_be_redriven() {
    let db = database().await;
    let lane = db.queue.lane("quick");
    lane.push_many(&numbers(2), None).await.unwrap();
    for attempt in 1..=5 {
        let batch = claim(&lane, 2).await;
        assert!(batch.jobs.iter().all(|job| job.attempt == attempt));
        let blames = [Blame::System, Blame::Platform];
        let endings: Vec<_> = batch
            .jobs
            .iter()
            .zip(blames)
            .map(|(job, blame)| (job.place, failure(blame)))
            .collect();
        lane.finish(&endings).await.unwrap();
        make_due(&db).await;
    }
    assert_eq!(lane.claim("w", 2, LONG, 0).await.unwrap(), None);
    assert_eq!(stats(&db).await.dead, 2);
    assert_eq!(lane.redrive(10).await.unwrap(), 2);
    let batch = claim(&lane, 2).await;
    assert!(batch.jobs.iter().all(|job| job.attempt == 1));
    lane.finish(&[(batch.jobs[0].place, failure(Blame::User)), (batch.jobs[1].place, None)])
        .await
        .unwrap();
    let told = stats(&db).await;
    assert_eq!(
        (told.dead, told.scheduled, told.running),
        (1, 0, 0),
        "a user's fault is not tried again"
    );
}

#[tokio::test]
async fn a_release_gives_the_rest_back_uncounted() {
    let db = database().await;
    let lane = db.queue.lane("quick");
    lane.push_many(&numbers(3), None).await.unwrap();
    let batch = claim(&lane, 3).await;
    lane.finish(&done(&batch.jobs[..1])).await.unwrap();
    assert_eq!(lane.release(batch.token).await.unwrap(), 2);
    assert_eq!(lane.release(batch.token).await.unwrap(), 0);
    let again = claim(&lane, 3).await;
    assert_eq!(
        again
            .jobs
            .iter()
            .map(|job| (job.payload.clone(), job.attempt))
            .collect::<Vec<_>>(),
        [(json!(1), 1), (json!(2), 1)]
    );
}

#[tokio::test]
async fn a_lower_bound_hides_what_is_below_it_and_zero_hides_nothing() {
    let db = database().await;
    let lane = db.queue.lane("quick");
    lane.push_many(&numbers(3), None).await.unwrap();
    let first = claim(&lane, 2).await;
    assert_eq!(lane.claim("w", 9, LONG, first.last_seq + 2).await.unwrap(), None);
    assert_eq!(claim(&lane, 9).await.jobs.len(), 1);
}

/// Counts how often each job ran, and fails some of them once.
struct Count(Arc<Mutex<HashMap<i64, u32>>>);

#[async_trait::async_trait]
impl LaneHandler for Count {
    async fn run(&self, job: &BatchJob) -> Result<(), JobFailure> {
        *self.0.lock().unwrap().entry(job.id).or_default() += 1;
        match job.payload.as_u64() {
            Some(number) if number % 500 == 7 && job.attempt == 1 => {
                Err(JobFailure::new(Blame::System, "TEST", "once"))
            }
            Some(number) if number % 500 == 8 && job.attempt == 1 => panic!("once"),
            _ => Ok(()),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn three_runners_run_each_of_5000_jobs_to_its_one_end() {
    let db = database().await;
    let client = db.client().await;
    client
        .batch_execute("insert into brightrun.brief_lane (lane, retry_base) values ('quick', '1 millisecond')")
        .await
        .unwrap();
    let lane = db.queue.lane("quick");
    lane.push_many(&numbers(5000), None).await.unwrap();
    let seen = Arc::new(Mutex::new(HashMap::new()));
    let shutdown = CancellationToken::new();
    let mut runners = tokio::task::JoinSet::new();
    for _ in 0..3 {
        let config = LaneConfig {
            batch: 64,
            slots: 4,
            poll: Duration::from_millis(10),
            ..LaneConfig::default()
        };
        runners.spawn(LaneRunner::new(lane.clone(), config, Count(seen.clone())).run(shutdown.clone()));
    }
    eventually("the lane is empty", || async {
        db.queue.lane_stats().await.unwrap().is_empty().then_some(())
    })
    .await;
    shutdown.cancel();
    let reports: Vec<_> = runners.join_all().await.into_iter().map(Result::unwrap).collect();
    assert_eq!(
        reports.iter().map(|report| report.ended).sum::<u64>(),
        5020,
        "5000 jobs and 20 first attempts that failed"
    );
    let seen = seen.lock().unwrap();
    assert_eq!((seen.len(), seen.values().sum::<u32>()), (5000, 5020));
}

/// What a runner has claimed and not begun when it stops goes back at once.
#[tokio::test(flavor = "multi_thread")]
async fn a_runner_that_stops_gives_back_what_it_has_not_run() {
    struct Block(CancellationToken);
    #[async_trait::async_trait]
    impl LaneHandler for Block {
        async fn run(&self, _: &BatchJob) -> Result<(), JobFailure> {
            self.0.cancelled().await;
            Ok(())
        }
    }
    let db = database().await;
    let lane = db.queue.lane("quick");
    lane.push_many(&numbers(50), None).await.unwrap();
    let (shutdown, unblock) = (CancellationToken::new(), CancellationToken::new());
    let config = LaneConfig {
        batch: 10,
        slots: 2,
        ..LaneConfig::default()
    };
    let runner = tokio::spawn(LaneRunner::new(lane.clone(), config, Block(unblock.clone())).run(shutdown.clone()));
    eventually("it has claimed", || async {
        (stats(&db).await.running >= 10).then_some(())
    })
    .await;
    shutdown.cancel();
    unblock.cancel();
    assert_eq!(runner.await.unwrap().unwrap().ended, 2);
    let told = stats(&db).await;
    assert_eq!((told.ready, told.running), (48, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_lane_runner_is_woken_by_a_push() {
    let db = database().await;
    let lane = db.queue.lane("quick");
    let seen = Arc::new(Mutex::new(HashMap::new()));
    let shutdown = CancellationToken::new();
    // Without the hint it would look again after an hour.
    let config = LaneConfig {
        poll: Duration::from_secs(3600),
        ..LaneConfig::default()
    };
    let runner = tokio::spawn(LaneRunner::new(lane.clone(), config, Count(seen.clone())).run(shutdown.clone()));
    let listening = "select count(*) from pg_stat_activity where datname = current_database() and query ilike '%listen brightrun_ready%'";
    let client = db.client().await;
    eventually("it listens", || async {
        (client.query_one(listening, &[]).await.unwrap().get::<_, i64>(0) > 1).then_some(())
    })
    .await;
    for count in 1..=3 {
        lane.push(&json!(1)).await.unwrap();
        eventually("it ran", || async {
            (seen.lock().unwrap().len() == count).then_some(())
        })
        .await;
    }
    shutdown.cancel();
    assert_eq!(runner.await.unwrap().unwrap().ended, 3);
}
