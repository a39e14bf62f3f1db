//! What sets jobs apart: limits, turns, machines, budgets, age, time, keys, order among jobs, logs and checkpoints.

use std::collections::HashMap;
use std::time::Duration;

use brightrun_queue::{Error, JobState, Machine, NewJob, Requirements, Schedule, Scope};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::support::{Database, LONG, database, request};

fn job() -> NewJob {
    NewJob::new("work", json!({}))
}

async fn running(db: &Database) -> i64 {
    db.queue.stats().await.unwrap().iter().map(|kind| kind.running).sum()
}

async fn make_fair(db: &Database) {
    db.client()
        .await
        .batch_execute("insert into brightrun.job_kind (kind, fair) values ('work', true)")
        .await
        .unwrap();
}

// --- limits ---

#[tokio::test]
async fn a_key_runs_one_at_a_time_unless_told_otherwise_and_hides_nobody_else() {
    let db = database().await;
    for _ in 0..50 {
        db.queue
            .enqueue(&NewJob {
                concurrency_key: Some("model".into()),
                ..job()
            })
            .await
            .unwrap();
    }
    let free = db.enqueue("work").await;
    let claimed = db.claim("w", "work", 10).await;
    assert_eq!(
        claimed.len(),
        2,
        "one of the key, and the one that came after fifty of it"
    );
    assert!(claimed.iter().any(|job| job.lease.job_id == free));
    db.queue.set_limit(Scope::Key("model"), Some(3), 1.0).await.unwrap();
    assert_eq!(db.claim("w", "work", 10).await.len(), 2);
    assert_eq!(db.claim("w", "work", 10).await.len(), 0);
}

/// Ten workers race for a key with room for three, for many rounds; ends come at random.
#[tokio::test(flavor = "multi_thread")]
async fn limits_are_exact_under_races() {
    let db = database().await;
    make_fair(&db).await;
    db.queue.set_limit(Scope::Key("k"), Some(3), 1.0).await.unwrap();
    db.queue.set_limit(Scope::NewOwners, Some(2), 1.0).await.unwrap();
    let owners: Vec<Uuid> = (0..3).map(|_| Uuid::new_v4()).collect();
    for number in 0..150 {
        let owner = Some(owners[number % 3]);
        let concurrency_key = (number % 2 == 0).then(|| "k".to_owned());
        db.queue
            .enqueue(&NewJob {
                owner,
                concurrency_key,
                ..job()
            })
            .await
            .unwrap();
    }
    let mut workers = tokio::task::JoinSet::new();
    for number in 0..10 {
        let queue = db.queue.clone();
        workers.spawn(async move {
            let mut idle = 0;
            while idle < 200 {
                let claimed = queue
                    .claim(&request(&format!("w{number}"), &["work"], 2))
                    .await
                    .unwrap();
                idle = if claimed.is_empty() { idle + 1 } else { 0 };
                for job in claimed {
                    tokio::task::yield_now().await;
                    queue.complete(&job.lease, &json!({})).await.unwrap();
                }
            }
        });
    }
    workers.join_all().await;
    let client = db.client().await;
    // By the history: how many leases of each key and owner were open after each claim.
    let worst = client
        .query_one(
            "with steps as (
                 select event.seq, share.key, share.owner, case when event.event in ('claimed', 'resumed') then 1 else -1 end as step
                 from brightrun.event join brightrun.job on job.id = event.job_id join brightrun.share on share.id = job.share_id
                 where event.event in ('claimed', 'resumed', 'completed')),
             levels as (
                 select sum(step) filter (where key = 'k') over (order by seq) as of_key, sum(step) over (partition by owner order by seq) as of_owner
                 from steps)
             select max(of_key), max(of_owner), (select count(*) from steps where step = -1) from levels",
            &[],
        )
        .await
        .unwrap();
    assert_eq!(
        (worst.get::<_, i64>(0), worst.get::<_, i64>(1)),
        (3, 2),
        "reached and never passed"
    );
    assert_eq!(worst.get::<_, i64>(2), 150, "all of them ran");
}

#[tokio::test]
async fn a_worker_sent_for_one_job_is_held_to_the_limit_as_well() {
    let db = database().await;
    let mut ids = Vec::new();
    for _ in 0..2 {
        ids.push(
            db.queue
                .enqueue(&NewJob {
                    concurrency_key: Some("one".into()),
                    ..job()
                })
                .await
                .unwrap(),
        );
    }
    let first = db.queue.claim_job("w", ids[0], LONG).await.unwrap().unwrap();
    assert_eq!(db.queue.claim_job("w", ids[1], LONG).await.unwrap(), None);
    assert!(db.queue.explain(ids[1]).await.unwrap()[0].contains("`one` runs 1 jobs and may run 1"));
    db.queue.release(&first.lease, None).await.unwrap();
    assert!(db.queue.claim_job("w", ids[1], LONG).await.unwrap().is_some());
}

// --- fair turns ---

#[tokio::test]
async fn owners_take_turns_however_many_jobs_one_of_them_has() {
    let db = database().await;
    make_fair(&db).await;
    let (greedy, modest) = (Uuid::new_v4(), Uuid::new_v4());
    for owner in [[greedy; 20].as_slice(), &[modest; 4]].concat() {
        db.queue
            .enqueue(&NewJob {
                owner: Some(owner),
                ..job()
            })
            .await
            .unwrap();
    }
    let mut turns: HashMap<Uuid, usize> = HashMap::new();
    for claimed in db.claim("w", "work", 8).await {
        *turns.entry(claimed.owner.unwrap()).or_default() += 1;
    }
    assert_eq!((turns[&greedy], turns[&modest]), (4, 4));
}

#[tokio::test]
async fn who_used_less_of_late_goes_first_and_weight_counts() {
    let db = database().await;
    make_fair(&db).await;
    let (heavy, light) = (Uuid::new_v4(), Uuid::new_v4());
    let enqueue = |owner| NewJob {
        owner: Some(owner),
        ..job()
    };
    for owner in [heavy, heavy, light] {
        db.queue.enqueue(&enqueue(owner)).await.unwrap();
    }
    let first = db.claim("w", "work", 1).await.remove(0);
    assert_eq!(first.owner, Some(heavy), "equal so far: the order of coming");
    // It runs for an hour.
    let later = db.later("1 hour").await;
    later
        .execute(
            "select brightrun.complete($1, $2)",
            &[&first.lease.job_id, &first.lease.token],
        )
        .await
        .unwrap();
    assert_eq!(db.claim("w", "work", 1).await[0].owner, Some(light));
    // With a weight that makes his hour small, he is before somebody who used a minute.
    db.queue.set_limit(Scope::Owner(heavy), None, 1000.0).await.unwrap();
    db.queue.enqueue(&enqueue(light)).await.unwrap();
    assert_eq!(db.claim("w", "work", 1).await[0].owner, Some(heavy));
}

// --- machines ---

#[tokio::test]
async fn only_a_machine_that_will_do_gets_the_job() {
    let db = database().await;
    let requires = Requirements {
        vram_mb: 80_000,
        gpu_classes: vec!["H100".into(), "H200".into()],
        gpu_count: 2,
        max_price: Some(4.0),
        fallback: Vec::new(),
    };
    let id = db
        .queue
        .enqueue(&NewJob {
            requires: Some(requires),
            ..job()
        })
        .await
        .unwrap();
    let good = Machine {
        vram_mb: 81_559,
        gpu_class: Some("h200".into()),
        gpu_count: 2,
        price_per_hour: Some(3.99),
    };
    for machine in [
        None,
        Some(Machine::default()),
        Some(Machine {
            vram_mb: 79_999,
            ..good.clone()
        }),
        Some(Machine {
            gpu_class: Some("A100".into()),
            ..good.clone()
        }),
        Some(Machine {
            gpu_class: None,
            ..good.clone()
        }),
        Some(Machine {
            gpu_count: 1,
            ..good.clone()
        }),
        Some(Machine {
            price_per_hour: Some(4.01),
            ..good.clone()
        }),
        Some(Machine {
            price_per_hour: None,
            ..good.clone()
        }),
    ] {
        let mut asked = request("w", &["work"], 5);
        asked.machine = machine.clone();
        assert_eq!(db.queue.claim(&asked).await.unwrap(), vec![], "{machine:?}");
    }
    let mut asked = request("w", &["work"], 5);
    asked.machine = Some(good);
    assert_eq!(db.queue.claim(&asked).await.unwrap()[0].lease.job_id, id);
}

/// Against brute force: what is granted is exactly what will do, whatever the mixture.
#[tokio::test(flavor = "multi_thread")]
async fn matching_agrees_with_brute_force() {
    let db = database().await;
    let (handle, database) = (tokio::runtime::Handle::current(), &db);
    let need = (
        prop::sample::select(vec![0_u32, 16, 48]),
        0..3_u32,
        prop::sample::subsequence(vec!["a", "b"], 0..=2),
    );
    let strategy = (
        prop::collection::vec(need, 1..6),
        prop::sample::select(vec![0_u32, 16, 47, 48]),
        0..3_u32,
        prop::sample::select(vec!["a", "b", "c"]),
    );
    let mut runner = TestRunner::new_with_rng(
        Config {
            cases: 25,
            failure_persistence: None,
            ..Config::default()
        },
        proptest::test_runner::TestRng::deterministic_rng(proptest::test_runner::RngAlgorithm::ChaCha),
    );
    tokio::task::block_in_place(|| {
        runner
            .run(&strategy, |(needs, vram, count, class)| {
                handle.block_on(async {
                    let mut expected = Vec::new();
                    for (vram_mb, gpu_count, classes) in &needs {
                        let gpu_classes = classes.iter().map(|class| (*class).to_owned()).collect();
                        let requires = Requirements {
                            vram_mb: *vram_mb,
                            gpu_classes,
                            gpu_count: *gpu_count,
                            max_price: None,
                            fallback: Vec::new(),
                        };
                        let id = database
                            .queue
                            .enqueue(&NewJob {
                                requires: Some(requires),
                                ..job()
                            })
                            .await
                            .unwrap();
                        if *vram_mb <= vram && *gpu_count <= count && (classes.is_empty() || classes.contains(&class)) {
                            expected.push(id);
                        }
                    }
                    let mut asked = request("w", &["work"], 100);
                    asked.machine = Some(Machine {
                        vram_mb: vram,
                        gpu_class: Some(class.into()),
                        gpu_count: count,
                        price_per_hour: None,
                    });
                    let mut granted: Vec<Uuid> = database
                        .queue
                        .claim(&asked)
                        .await
                        .unwrap()
                        .iter()
                        .map(|job| job.lease.job_id)
                        .collect();
                    granted.sort_unstable();
                    expected.sort_unstable();
                    assert_eq!(granted, expected);
                    let client = database.client().await;
                    client
                        .batch_execute(
                            "delete from brightrun.ready; delete from brightrun.lease; delete from brightrun.job",
                        )
                        .await
                        .unwrap();
                });
                Ok(())
            })
            .unwrap();
    });
}

// --- money ---

#[tokio::test]
async fn a_budget_is_a_deadline_at_the_machines_price_over_all_runs() {
    let db = database().await;
    let mut asked = request("w", &["work"], 1);
    asked.machine = Some(Machine {
        price_per_hour: Some(60.0),
        ..Machine::default()
    });
    let id = db
        .queue
        .enqueue(&NewJob {
            budget: Some(10.0),
            ..job()
        })
        .await
        .unwrap();
    let first = db.queue.claim(&asked).await.unwrap().remove(0);
    let left = first.deadline_left.unwrap().as_secs_f64();
    assert!((598.0..=600.0).contains(&left), "ten minutes at a dollar each: {left}");
    // Four minutes later it is interrupted: six are left for the next run.
    let later = db.later("4 minutes").await;
    later
        .execute(
            "select brightrun.release($1, $2)",
            &[&first.lease.job_id, &first.lease.token],
        )
        .await
        .unwrap();
    let second = db.queue.claim(&asked).await.unwrap().remove(0);
    let left = second.deadline_left.unwrap().as_secs_f64();
    assert!((357.0..=361.0).contains(&left), "{left}");
    // A heartbeat does not reach past it, and the sweep after it ends the job for good, whatever attempts are left.
    let later = db.later("7 minutes").await;
    let reply: String = later
        .query_one(
            "select reply from brightrun.heartbeat(array[$1::uuid], array[$2::bigint])",
            &[&id, &second.lease.token],
        )
        .await
        .unwrap()
        .get(0);
    assert_eq!(reply, "deadline");
    db.sweep_at("7 minutes").await;
    let status = db.queue.status(id).await.unwrap().unwrap();
    assert_eq!(
        (status.state, status.error.unwrap()["code"].as_str()),
        (JobState::Failed, Some("QUEUE_BUDGET_EXCEEDED"))
    );
    let spent: f64 = db
        .client()
        .await
        .query_one(
            "select sum(cost)::float8 from brightrun.usage where job_id = $1",
            &[&id],
        )
        .await
        .unwrap()
        .get(0);
    assert!(
        (10.9..11.1).contains(&spent),
        "four minutes and seven: the overshoot is the sweep's delay: {spent}"
    );
}

#[tokio::test]
async fn every_run_of_a_metered_kind_leaves_one_row_of_usage() {
    let db = database().await;
    db.client()
        .await
        .batch_execute("insert into brightrun.job_kind (kind, metered) values ('work', true)")
        .await
        .unwrap();
    let owner = Uuid::new_v4();
    let id = db
        .queue
        .enqueue(&NewJob {
            owner: Some(owner),
            ..job()
        })
        .await
        .unwrap();
    let first = db.queue.claim_job("w", id, LONG).await.unwrap().unwrap();
    db.queue.release(&first.lease, None).await.unwrap();
    let second = db.queue.claim_job("w", id, LONG).await.unwrap().unwrap();
    for told in db
        .queue
        .complete_many(&[(second.lease, json!({})), (second.lease, json!({}))])
        .await
        .unwrap()
    {
        told.unwrap();
    }
    let rows = db
        .client()
        .await
        .query(
            "select token, ended, owner = $1 from brightrun.usage order by token",
            &[&owner],
        )
        .await
        .unwrap();
    let seen: Vec<(i64, String, bool)> = rows.iter().map(|row| (row.get(0), row.get(1), row.get(2))).collect();
    assert_eq!(
        seen,
        [
            (first.lease.token, "released".into(), true),
            (second.lease.token, "completed".into(), true)
        ]
    );
}

// --- time ---

#[tokio::test]
async fn a_waiting_job_gains_priority_with_age_and_no_more_than_allowed() {
    let db = database().await;
    db.client()
        .await
        .batch_execute("insert into brightrun.job_kind (kind, age_step, age_most) values ('work', '1 minute', 3)")
        .await
        .unwrap();
    let old = db.queue.enqueue(&NewJob { priority: 5, ..job() }).await.unwrap();
    db.sweep_at("150 seconds").await;
    let young = db.queue.enqueue(&NewJob { priority: 4, ..job() }).await.unwrap();
    let order: Vec<Uuid> = db
        .claim("w", "work", 2)
        .await
        .iter()
        .map(|job| job.lease.job_id)
        .collect();
    assert_eq!(order, [old, young], "two minutes made 3 of 5");
    let capped = db.queue.enqueue(&NewJob { priority: 5, ..job() }).await.unwrap();
    db.sweep_at("1 day").await;
    db.sweep_at("2 days").await;
    let row = db
        .client()
        .await
        .query_one("select priority from brightrun.ready where job_id = $1", &[&capped])
        .await
        .unwrap();
    assert_eq!(row.get::<_, i16>(0), 2);
}

#[tokio::test]
async fn cron_lines_mean_what_they_mean_to_cron() {
    let db = database().await;
    let client = db.client().await;
    for (cron, after, zone, expected) in [
        (
            "*/15 9-17 * * 1-5",
            "2026-11-20T17:50:00Z",
            "UTC",
            "2026-11-23T09:00:00Z",
        ),
        ("0 0 1 * *", "2026-12-01T00:00:00Z", "UTC", "2027-01-01T00:00:00Z"),
        ("0 12 13 * 5", "2026-11-22T00:00:00Z", "UTC", "2026-11-27T12:00:00Z"),
        ("5,35 0 29 2 *", "2026-03-01T00:00:00Z", "UTC", "2028-02-29T00:05:00Z"),
        ("0 6 * * 7", "2026-11-22T06:00:00Z", "UTC", "2026-11-29T06:00:00Z"),
        (
            "30 2 * * *",
            "2026-03-28T23:00:00Z",
            "Europe/Berlin",
            "2026-03-30T00:30:00Z",
        ),
        (
            "0 9 * * *",
            "2026-10-24T12:00:00Z",
            "Europe/Berlin",
            "2026-10-25T08:00:00Z",
        ),
        (
            "0 9 * * *",
            "2026-07-01T12:00:00Z",
            "America/New_York",
            "2026-07-01T13:00:00Z",
        ),
    ] {
        let sql = "select brightrun.cron_next($1, $2::text::timestamptz, $3) = $4::text::timestamptz,
                          brightrun.cron_next($1, $2::text::timestamptz, $3)::text";
        let row = client.query_one(sql, &[&cron, &after, &zone, &expected]).await.unwrap();
        assert!(
            row.get::<_, bool>(0),
            "{cron} after {after} in {zone}: {}",
            row.get::<_, String>(1)
        );
    }
    for broken in [
        "* * * *",
        "60 * * * *",
        "* * 0 * *",
        "*/0 * * * *",
        "5-1 * * * *",
        "a * * * *",
        "0 0 31 2 *",
    ] {
        let error = db
            .queue
            .set_schedule(&Schedule::cron("broken", "work", broken))
            .await
            .unwrap_err();
        assert!(matches!(error, Error::Rejected { .. }), "{broken}: {error}");
    }
}

#[tokio::test]
async fn a_schedule_enqueues_each_time_once_and_makes_up_missed_times_with_one_job() {
    let db = database().await;
    db.queue
        .set_schedule(&Schedule::every("hourly", "work", Duration::from_secs(3600)))
        .await
        .unwrap();
    let count = async || {
        db.queue
            .stats()
            .await
            .unwrap()
            .iter()
            .map(|kind| kind.ready)
            .sum::<i64>()
    };
    db.sweep_at("59 minutes").await;
    assert_eq!(count().await, 0);
    for _ in 0..2 {
        db.sweep_at("61 minutes").await;
        assert_eq!(count().await, 1);
    }
    db.sweep_at("10 hours 1 minute").await;
    assert_eq!(count().await, 2);
    db.sweep_at("11 hours 1 minute").await;
    assert_eq!(count().await, 3, "the rhythm goes on where it was");
    assert!(db.queue.drop_schedule("hourly").await.unwrap());
    db.sweep_at("30 hours").await;
    assert_eq!(count().await, 3);
}

// --- keys ---

#[tokio::test(flavor = "multi_thread")]
async fn a_live_key_is_taken_until_its_job_has_ended_also_under_races() {
    let db = database().await;
    let keyed = NewJob {
        live_key: Some("index".into()),
        ..job()
    };
    let mut tries = tokio::task::JoinSet::new();
    for _ in 0..16 {
        let (queue, keyed) = (db.queue.clone(), keyed.clone());
        tries.spawn(async move {
            loop {
                match queue.enqueue(&keyed).await {
                    Err(Error::Collision { .. }) => {}
                    told => return told.unwrap(),
                }
            }
        });
    }
    let ids = tries.join_all().await;
    assert!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");
    let lease = db.queue.claim_job("w", ids[0], LONG).await.unwrap().unwrap().lease;
    assert_eq!(db.queue.enqueue(&keyed).await.unwrap(), ids[0], "it runs");
    db.queue.complete(&lease, &json!({})).await.unwrap();
    assert_ne!(db.queue.enqueue(&keyed).await.unwrap(), ids[0], "it has ended");
}

// --- order among jobs ---

/// Dataset validated → train → deliver.
#[tokio::test]
async fn a_job_waits_for_all_it_is_after() {
    let db = database().await;
    let (validate, price) = (db.enqueue("validate").await, db.enqueue("price").await);
    let train = db
        .queue
        .enqueue(&NewJob {
            after: vec![validate, price],
            ..NewJob::new("train", json!({}))
        })
        .await
        .unwrap();
    let deliver = db
        .queue
        .enqueue(&NewJob {
            after: vec![train],
            ..NewJob::new("deliver", json!({}))
        })
        .await
        .unwrap();
    let kinds = ["validate", "price", "train", "deliver"];
    let mut order = Vec::new();
    for expected in [2, 1, 1] {
        let claimed = db.queue.claim(&request("w", &kinds, 9)).await.unwrap();
        assert_eq!(claimed.len(), expected);
        for job in claimed {
            order.push(job.kind.clone());
            db.queue.complete(&job.lease, &json!({})).await.unwrap();
        }
    }
    assert_eq!(order[2..], ["train", "deliver"]);
    assert_eq!(db.state(deliver).await, "completed");
    let late = db
        .queue
        .enqueue(&NewJob {
            after: vec![deliver],
            ..job()
        })
        .await
        .unwrap();
    assert_eq!(db.state(late).await, "ready", "what has ended is not waited for");
}

#[tokio::test]
async fn what_waits_for_a_job_that_does_not_complete_is_cancelled_to_the_last() {
    let db = database().await;
    for how in ["fail", "cancel"] {
        let first = db.running("validate").await;
        let second = db
            .queue
            .enqueue(&NewJob {
                after: vec![first.job_id],
                ..job()
            })
            .await
            .unwrap();
        let third = db
            .queue
            .enqueue(&NewJob {
                after: vec![second],
                ..job()
            })
            .await
            .unwrap();
        if how == "fail" {
            let failure = brightrun_queue::JobFailure::new(brightrun_queue::Blame::User, "TEST", "bad data");
            db.queue.fail(&first, &failure, None).await.unwrap();
        } else {
            db.queue.cancel(first.job_id, None).await.unwrap();
            db.queue.complete(&first, &json!({})).await.unwrap();
        }
        assert_eq!(
            (db.state(second).await, db.state(third).await),
            ("cancelled", "cancelled"),
            "{how}"
        );
        let late = db
            .queue
            .enqueue(&NewJob {
                after: vec![first.job_id],
                ..job()
            })
            .await
            .unwrap();
        assert_eq!(db.state(late).await, "cancelled");
    }
    let error = db
        .queue
        .enqueue(&NewJob {
            after: vec![Uuid::new_v4()],
            ..job()
        })
        .await
        .unwrap_err();
    assert!(matches!(error, Error::Rejected { .. }), "{error}");
    db.assert_whole().await;
}

/// Two that end at the same moment must not each leave it to the other.
#[tokio::test(flavor = "multi_thread")]
async fn the_last_two_to_end_at_once_set_the_waiting_one_free() {
    let db = database().await;
    for _ in 0..30 {
        let (one, two) = (db.running("part").await, db.running("part").await);
        let whole = db
            .queue
            .enqueue(&NewJob {
                after: vec![one.job_id, two.job_id],
                ..job()
            })
            .await
            .unwrap();
        let result = json!({});
        let (a, b) = tokio::join!(db.queue.complete(&one, &result), db.queue.complete(&two, &result));
        a.unwrap();
        b.unwrap();
        assert_eq!(
            db.claim("w", "work", 9)
                .await
                .iter()
                .map(|job| job.lease.job_id)
                .collect::<Vec<_>>(),
            [whole]
        );
    }
}

// --- what a run says ---

#[tokio::test]
async fn the_next_run_gets_the_last_checkpoint_and_a_zombies_is_refused() {
    let db = database().await;
    let first = db.running("work").await;
    db.queue.checkpoint(&first, &json!({"step": 10})).await.unwrap();
    db.queue.checkpoint(&first, &json!({"step": 20})).await.unwrap();
    db.client()
        .await
        .batch_execute("update brightrun.lease set expires_at = beat_at")
        .await
        .unwrap();
    db.sweep_at("0 seconds").await;
    db.sweep_at("11 minutes").await;
    db.make_due(first.job_id).await;
    let second = db.claim("w", "work", 1).await.remove(0);
    assert_eq!(second.checkpoint, Some(json!({"step": 20})));
    let error = db.queue.checkpoint(&first, &json!({"step": 30})).await.unwrap_err();
    assert!(matches!(error, Error::LeaseLost { .. }), "{error}");
    let error = db
        .queue
        .log(&first, "info", "note", "still here", None)
        .await
        .unwrap_err();
    assert!(matches!(error, Error::LeaseLost { .. }), "{error}");
}

#[tokio::test]
async fn a_log_keeps_level_type_message_and_data() {
    let db = database().await;
    let lease = db.running("work").await;
    db.queue
        .log(&lease, "warn", "loss", "it rose", Some(&json!({"by": 0.5})))
        .await
        .unwrap();
    let event = db.queue.events(lease.job_id, 0).await.unwrap().pop().unwrap();
    assert_eq!((event.level.as_str(), event.event.as_str()), ("warn", "log.loss"));
    assert_eq!(event.detail, json!({"data": {"by": 0.5}, "message": "it rose"}));
    let error = db.queue.log(&lease, "loud", "loss", "it rose", None).await.unwrap_err();
    assert!(matches!(error, Error::Rejected { .. }), "{error}");
}

#[tokio::test]
async fn progress_becomes_a_series_no_denser_than_asked_for() {
    let db = database().await;
    db.client()
        .await
        .batch_execute("insert into brightrun.job_kind (kind, progress_every) values ('work', '10 seconds')")
        .await
        .unwrap();
    let lease = db.running("work").await;
    for (second, step) in [(0, 1), (4, 2), (9, 3), (11, 4), (12, 5), (30, 6)] {
        let client = db.later(&format!("{second} seconds")).await;
        let progress: Value = json!({ "step": step });
        let beat = "select * from brightrun.heartbeat(array[$1::uuid], array[$2::bigint], array[$3::jsonb])";
        client
            .query(beat, &[&lease.job_id, &lease.token, &progress])
            .await
            .unwrap();
    }
    let events = db.queue.events(lease.job_id, 0).await.unwrap();
    let steps: Vec<i64> = events
        .iter()
        .filter(|event| event.event == "progress")
        .map(|event| event.detail["step"].as_i64().unwrap())
        .collect();
    assert_eq!(steps, [1, 4, 6]);
    assert_eq!(running(&db).await, 1);
}
