//! What all jobs of an owner may cost together.

use brightrun_queue::{Claimed, JobState, Machine, NewJob, Period};
use serde_json::json;
use uuid::Uuid;

use crate::support::{Database, LONG, database, request};

/// A dollar a minute.
async fn claim(db: &Database, limit: usize) -> Vec<Claimed> {
    let mut asked = request("w", &["work"], limit);
    asked.machine = Some(Machine {
        price_per_hour: Some(60.0),
        ..Machine::default()
    });
    db.queue.claim(&asked).await.unwrap()
}

async fn enqueue(db: &Database, owner: Uuid) -> Uuid {
    let job = NewJob {
        owner: Some(owner),
        ..NewJob::new("work", json!({}))
    };
    db.queue.enqueue(&job).await.unwrap()
}

#[tokio::test]
async fn an_owner_whose_money_is_gone_is_stopped_and_starts_nothing_until_there_is_more() {
    let db = database().await;
    let owner = Uuid::new_v4();
    db.queue.set_budget(owner, Some(10.0), Period::Ever).await.unwrap();
    let jobs = [enqueue(&db, owner).await, enqueue(&db, owner).await];
    let runs = claim(&db, 2).await;
    db.queue
        .checkpoint(&runs[0].lease, &json!({"step": 400}))
        .await
        .unwrap();
    assert_eq!(db.sweep_at("4 minutes").await, vec![], "eight of ten");
    let mut stopped = db.sweep_at("6 minutes").await;
    stopped.sort();
    let mut expected = jobs.map(|job| (job, "failed".to_owned()));
    expected.sort();
    assert_eq!(stopped, expected);
    let error = db.queue.status(jobs[0]).await.unwrap().unwrap().error.unwrap();
    assert_eq!(
        (&error["code"], &error["blame"]),
        (&json!("QUEUE_OWNER_BUDGET_EXCEEDED"), &json!("user"))
    );
    let account = db.queue.budget(owner).await.unwrap().unwrap();
    assert!(
        (12.0..12.1).contains(&account.spent),
        "the overshoot is the sweep's delay: {account:?}"
    );

    // Nothing of his is claimed, however many wait; others behind him are.
    let waiting = [enqueue(&db, owner).await, enqueue(&db, owner).await];
    let other = enqueue(&db, Uuid::new_v4()).await;
    let granted: Vec<Uuid> = claim(&db, 1).await.iter().map(|job| job.lease.job_id).collect();
    assert_eq!(granted, [other]);
    assert_eq!(db.queue.claim_job("w", waiting[0], LONG).await.unwrap(), None);
    let why = db.queue.explain(waiting[0]).await.unwrap();
    assert!(why[0].starts_with("Its owner's money is gone: "), "{why:?}");

    // With more money what waits runs, and what was stopped resumes where it was.
    db.queue.set_budget(owner, Some(100.0), Period::Ever).await.unwrap();
    assert!(db.queue.redrive(jobs[0], None).await.unwrap());
    db.make_due(waiting[0]).await;
    let resumed = claim(&db, 9).await;
    assert_eq!(resumed.len(), 2, "one waits out its minute");
    let first = resumed.iter().find(|job| job.lease.job_id == jobs[0]).unwrap();
    assert_eq!(first.checkpoint, Some(json!({"step": 400})));
    db.assert_whole().await;
}

#[tokio::test]
async fn only_what_falls_into_the_period_counts() {
    let db = database().await;
    let owner = Uuid::new_v4();
    assert_eq!(db.queue.budget(owner).await.unwrap(), None);
    // Two hours before midnight to one after it, at three an hour.
    db.client()
        .await
        .execute(
            "insert into brightrun.usage (token, job_id, kind, owner, worker, started_at, ended_at, price_per_hour, cost, ended)
             select 1, gen_random_uuid(), 'work', $1, 'w', midnight - interval '2 hours', midnight + interval '1 hour', 3, 9, 'completed'
             from (select date_trunc('day', now(), 'UTC') as midnight) today",
            &[&owner],
        )
        .await
        .unwrap();
    for (period, expected) in [(Period::Day, 3.0), (Period::Ever, 9.0)] {
        db.queue.set_budget(owner, Some(100.0), period).await.unwrap();
        let account = db.queue.budget(owner).await.unwrap().unwrap();
        assert!((account.spent - expected).abs() < 1e-6, "{period:?}: {account:?}");
        assert_eq!(account.since.is_some(), period == Period::Day);
    }
    db.queue.set_budget(owner, Some(3.0), Period::Day).await.unwrap();
    let job = enqueue(&db, owner).await;
    assert_eq!(claim(&db, 1).await, vec![]);
    assert_eq!(db.state(job).await, "scheduled");
    let tomorrow = db.later("1 day").await;
    let claimed = "select count(*) from brightrun.claim('w', '{work}', 1, p_can => '{\"price_per_hour\": 60}')";
    assert_eq!(tomorrow.query_one(claimed, &[]).await.unwrap().get::<_, i64>(0), 1);
}

#[tokio::test]
async fn a_run_without_a_price_costs_nothing() {
    let db = database().await;
    let owner = Uuid::new_v4();
    db.queue.set_budget(owner, Some(0.5), Period::Month).await.unwrap();
    let job = enqueue(&db, owner).await;
    let lease = db.claim("w", "work", 1).await.remove(0).lease;
    db.sweep_at("9 minutes").await;
    assert_eq!(
        db.queue.complete(&lease, &json!({})).await.unwrap(),
        JobState::Completed
    );
    assert_eq!(db.state(job).await, "completed");
}

/// Whatever made it fail: a redrive resumes.
#[tokio::test]
async fn a_redriven_job_gets_its_last_checkpoint() {
    let db = database().await;
    let lease = db.running("work").await;
    db.queue.checkpoint(&lease, &json!({"step": 7})).await.unwrap();
    let failure = brightrun_queue::JobFailure::new(brightrun_queue::Blame::User, "X", "broke");
    db.queue.fail(&lease, &failure, None).await.unwrap();
    for _ in 0..2 {
        assert!(db.queue.redrive(lease.job_id, None).await.unwrap());
        let again = db.claim("w", "work", 1).await.remove(0);
        assert_eq!(again.checkpoint, Some(json!({"step": 7})));
        db.queue.fail(&again.lease, &failure, None).await.unwrap();
    }
}
