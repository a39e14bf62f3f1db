//! Where claims begin: no waiting job is ever below a mark, whatever is late, taken back, moved or new. Each scenario is played twice:
//! on the engine as it is, where every job must be claimed in its order, and on engines that lack the one rule it needs, where that
//! must be noticed.

use std::time::Duration;

use brightrun_queue::{JobState, Queue};
use tokio_postgres::Client;
use uuid::Uuid;

use crate::support::{Database, database, within};

const NOBODY: [Uuid; 0] = [];

/// For what waits for other tests' transactions, on a machine that is busy.
const PATIENCE: Duration = Duration::from_secs(300);

/// What went wrong, or nothing.
type Told = Result<(), String>;

/// A database in which every place in the queue is a step, so that marks move as often as they can, and nobody looks below them: what
/// that would bring back is what is to be noticed.
async fn restless() -> (Database, Client) {
    let db = database().await;
    let client = db.client().await;
    step(&client, 1).await;
    look_again(&client, "infinity").await;
    (db, client)
}

async fn step(client: &Client, places: i64) {
    client
        .execute("update brightrun.settling set step = $1", &[&places])
        .await
        .unwrap();
}

/// Sets when the last look below the marks was.
async fn look_again(client: &Client, last: &str) {
    let sql = format!("update brightrun.settling set looked_at = '{last}'");
    client.batch_execute(&sql).await.unwrap();
}

async fn run(client: &Client, sql: &str) {
    client.batch_execute(sql).await.unwrap();
}

async fn number(client: &Client, sql: &str) -> i64 {
    client.query_one(sql, &[]).await.unwrap().get(0)
}

async fn enqueue(client: &Client, kind: &str, priority: i32) -> Uuid {
    let sql = "select brightrun.enqueue($1, p_priority => $2)";
    client.query_one(sql, &[&kind, &priority]).await.unwrap().get(0)
}

async fn claim(client: &Client, kind: &str, limit: i32) -> Vec<Uuid> {
    let sql = "select job_id from brightrun.claim('w', array[$1], $2)";
    let rows = client.query(sql, &[&kind, &limit]).await.unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

/// Claims that find nothing take the settling through all its steps, as far as transactions that write let them.
async fn nudge(client: &Client) {
    for _ in 0..6 {
        assert_eq!(claim(client, "nothing", 1).await, NOBODY);
    }
}

/// Until every place drawn so far has settled, which waits for older transactions of the whole server, other tests' too.
async fn settle(client: &Client) {
    let left = "select last_value - settled from brightrun.ready_seq, brightrun.settling";
    within(PATIENCE, "all places settle", || async {
        nudge(client).await;
        (number(client, left).await == 0).then_some(())
    })
    .await;
}

async fn sweep(client: &Client) {
    run(client, "select brightrun.rescue_expired()").await;
}

/// All marks are as high as they may be.
async fn turn(client: &Client) {
    settle(client).await;
    sweep(client).await;
}

/// `count` jobs come and go.
async fn pass(client: &Client, kind: &str, count: usize) {
    for _ in 0..count {
        enqueue(client, kind, 0).await;
    }
    let done = "select count(brightrun.complete(job_id, token)) from brightrun.claim('w', array[$1], $2)";
    let done = client.query_one(done, &[&kind, &(count as i32)]).await.unwrap();
    assert_eq!(done.get::<_, i64>(0), count as i64);
}

async fn expect(what: &str, client: &Client, limit: i32, jobs: &[Uuid]) -> Told {
    let found = claim(client, "work", limit).await;
    if found == jobs {
        Ok(())
    } else {
        Err(format!("{what}: claimed {found:?} instead of {jobs:?}"))
    }
}

async fn a_low_place_is_committed_late(db: &Database, client: &Client) -> Told {
    let writer = db.client().await;
    run(&writer, "begin").await;
    let late = enqueue(&writer, "work", 0).await;
    for _ in 0..2 {
        pass(client, "work", 5).await;
        nudge(client).await;
        sweep(client).await;
    }
    run(&writer, "commit").await;
    expect("committed late", client, 10, &[late]).await?;
    pass(client, "work", 5).await;
    Ok(())
}

async fn claims_are_rolled_back(db: &Database, client: &Client) -> Told {
    pass(client, "work", 1).await;
    turn(client).await;
    let mut jobs = Vec::new();
    for _ in 0..5 {
        jobs.push(enqueue(client, "work", 0).await);
    }
    settle(client).await;
    // This one raises the mark itself, and takes that back.
    let other = db.client().await;
    run(&other, "begin").await;
    assert_eq!(claim(&other, "work", 3).await, jobs[..3]);
    run(&other, "rollback").await;
    // This one leaves the mark to others.
    step(client, 1000).await;
    run(&other, "begin").await;
    assert_eq!(claim(&other, "work", 3).await, jobs[..3]);
    step(client, 1).await;
    expect("beside a claim under way", client, 10, &jobs[3..]).await?;
    turn(client).await;
    run(&other, "rollback").await;
    expect("after a rollback", client, 10, &jobs[..3]).await
}

async fn a_row_is_moved_by_hand(_: &Database, client: &Client) -> Told {
    let old = enqueue(client, "work", 5).await;
    pass(client, "work", 5).await;
    turn(client).await;
    run(client, "update brightrun.ready set priority = 0").await;
    expect("moved to a priority", client, 10, &[old]).await
}

async fn a_row_leaves_its_share(_: &Database, client: &Client) -> Told {
    let sql = "select brightrun.enqueue('other', p_concurrency_key => 'k')";
    let shared: Uuid = client.query_one(sql, &[]).await.unwrap().get(0);
    pass(client, "work", 5).await;
    turn(client).await;
    run(client, "update brightrun.ready set share_id = null, kind = 'work'").await;
    expect("without its share", client, 10, &[shared]).await
}

async fn a_job_ages(db: &Database, client: &Client) -> Told {
    let aging = "insert into brightrun.job_kind (kind, age_step, age_most) values ('work', '1 minute', 5)";
    run(client, aging).await;
    let old = enqueue(client, "work", 5).await;
    pass(client, "work", 5).await;
    turn(client).await;
    db.sweep_at("1 hour").await;
    assert_eq!(number(client, "select priority::bigint from brightrun.ready").await, 0);
    expect("aged", client, 10, &[old]).await
}

async fn a_requirement_widens(db: &Database, client: &Client) -> Told {
    let enqueued = |requires: &str| format!("select brightrun.enqueue('work', p_requires => '{requires}')");
    let fallback = r#"{"gpu_classes": ["H100"], "fallback": [{"after_seconds": 60, "gpu_classes": ["A100"]}]}"#;
    let picky: Uuid = client.query_one(&enqueued(fallback), &[]).await.unwrap().get(0);
    let on_a100 = r#"select job_id from brightrun.claim('w', '{work}', 10, p_can => '{"gpu_class": "A100"}')"#;
    for _ in 0..5 {
        run(client, &enqueued(r#"{"gpu_classes": ["H100", "A100"]}"#)).await;
    }
    assert_eq!(client.query(on_a100, &[]).await.unwrap().len(), 5);
    turn(client).await;
    db.sweep_at("2 minutes").await;
    let found: Vec<Uuid> = client
        .query(on_a100, &[])
        .await
        .unwrap()
        .iter()
        .map(|row| row.get(0))
        .collect();
    if found == [picky] {
        Ok(())
    } else {
        Err(format!("widened: claimed {found:?}"))
    }
}

/// The mark is still below the row when it is moved, and would pass it before the move is committed.
async fn a_move_is_under_way(db: &Database, client: &Client) -> Told {
    let old = enqueue(client, "work", 5).await;
    let (_, last) = (enqueue(client, "work", 0).await, enqueue(client, "work", 0).await);
    step(client, 1000).await;
    assert_eq!(claim(client, "work", 1).await.len(), 1);
    step(client, 1).await;
    settle(client).await;
    let mover = db.client().await;
    run(
        &mover,
        "begin; update brightrun.ready set priority = 0 where priority = 5",
    )
    .await;
    expect("beside a move under way", client, 10, &[last]).await?;
    turn(client).await;
    run(&mover, "commit").await;
    expect("after the move", client, 10, &[old]).await
}

/// The mover does not see that its mark has moved. It may fail, with 40001, but not succeed and lose the row.
async fn an_old_snapshot_moves_a_row(db: &Database, client: &Client) -> Told {
    let old = enqueue(client, "work", 5).await;
    let mover = db.client().await;
    run(
        &mover,
        "begin isolation level repeatable read; select from brightrun.mark",
    )
    .await;
    pass(client, "work", 5).await;
    turn(client).await;
    if let Err(error) = mover.batch_execute("update brightrun.ready set priority = 0").await {
        assert_eq!(error.code().unwrap().code(), "40001", "{error}");
    }
    run(&mover, "commit").await;
    expect("moved by an old snapshot", client, 10, &[old]).await
}

/// The sample holds the row's place, but the horizon was taken before the mover had its id: nobody waits for it.
async fn a_mover_is_younger_than_the_horizon(db: &Database, client: &Client) -> Told {
    let old = enqueue(client, "work", 5).await;
    enqueue(client, "work", 0).await;
    assert_eq!(claim(client, "work", 1).await.len(), 1);
    let writer = db.client().await;
    run(&writer, "begin; select pg_current_xact_id()").await;
    nudge(client).await;
    let waiting = "select count(*) from brightrun.settling where horizon is not null and settled < sampled";
    assert_eq!(number(client, waiting).await, 1, "the writer holds the horizon");
    let mover = db.client().await;
    run(&mover, "begin; update brightrun.ready set priority = 0").await;
    run(&writer, "commit").await;
    turn(client).await;
    run(&mover, "commit").await;
    expect("moved by a younger transaction", client, 10, &[old]).await
}

async fn priorities_are_new(_: &Database, client: &Client) -> Told {
    pass(client, "work", 5).await;
    turn(client).await;
    let (behind, middle, ahead) = (
        enqueue(client, "work", 5).await,
        enqueue(client, "work", 0).await,
        enqueue(client, "work", -5).await,
    );
    for (what, job) in [("ahead", ahead), ("between", middle), ("behind", behind)] {
        expect(what, client, 1, &[job]).await?;
        turn(client).await;
    }
    // Now that they are known, the same again, in one claim.
    let (behind, middle, ahead) = (
        enqueue(client, "work", 5).await,
        enqueue(client, "work", 0).await,
        enqueue(client, "work", -5).await,
    );
    expect("all at once", client, 10, &[ahead, middle, behind]).await
}

async fn a_snapshot_is_held(db: &Database, client: &Client) -> Told {
    step(client, 100).await;
    let holder = db.client().await;
    run(
        &holder,
        "begin isolation level repeatable read; select from brightrun.job",
    )
    .await;
    let many = "select brightrun.enqueue_many('work', array_fill('{}'::jsonb, array[250]))";
    for _ in 0..40 {
        run(client, many).await;
        assert_eq!(claim(client, "work", 250).await.len(), 250);
    }
    run(client, many).await;
    let read = "select idx_tup_read from pg_stat_user_indexes where indexrelname = 'ready_claim_open'";
    turn(client).await;
    run(client, "select pg_stat_force_next_flush()").await;
    let before = number(client, read).await;
    for _ in 0..10 {
        assert_eq!(claim(client, "work", 1).await.len(), 1);
    }
    run(client, "select pg_stat_force_next_flush()").await;
    let each = (number(client, read).await - before) / 10;
    // 10,000 claimed jobs are still in the index. One claim's worth and a few steps may be read, with a raise.
    if each < 2500 {
        Ok(())
    } else {
        Err(format!("a claim reads {each} index entries"))
    }
}

async fn ids_come_from_another_server(_: &Database, client: &Client) -> Told {
    pass(client, "work", 5).await;
    settle(client).await;
    enqueue(client, "work", 0).await;
    let restored =
        "update brightrun.settling set sampled = settled + 1, sampled_by = '999999999999', horizon = '999999999999'";
    run(client, restored).await;
    nudge(client).await;
    let foreign = "select count(*) from brightrun.settling where greatest(sampled_by, horizon) >= '999999999999'";
    if number(client, foreign).await == 0 {
        Ok(())
    } else {
        Err("what another server began is waited for".into())
    }
}

async fn play(scenario: &str, db: &Database, client: &Client) -> Told {
    match scenario {
        "late commit" => a_low_place_is_committed_late(db, client).await,
        "rollback" => claims_are_rolled_back(db, client).await,
        "moved by hand" => a_row_is_moved_by_hand(db, client).await,
        "left its share" => a_row_leaves_its_share(db, client).await,
        "ageing" => a_job_ages(db, client).await,
        "widening" => a_requirement_widens(db, client).await,
        "move under way" => a_move_is_under_way(db, client).await,
        "old snapshot" => an_old_snapshot_moves_a_row(db, client).await,
        "younger mover" => a_mover_is_younger_than_the_horizon(db, client).await,
        "new priorities" => priorities_are_new(db, client).await,
        "held snapshot" => a_snapshot_is_held(db, client).await,
        "restored" => ids_come_from_another_server(db, client).await,
        other => Err(format!("no scenario {other}")),
    }
}

const SCENARIOS: [&str; 12] = [
    "late commit",
    "rollback",
    "moved by hand",
    "left its share",
    "ageing",
    "widening",
    "move under way",
    "old snapshot",
    "younger mover",
    "new priorities",
    "held snapshot",
    "restored",
];

#[tokio::test]
async fn no_waiting_job_is_ever_below_the_mark() {
    for scenario in SCENARIOS {
        let (db, client) = restless().await;
        play(scenario, &db, &client)
            .await
            .unwrap_or_else(|error| panic!("{scenario}: {error}"));
        // The one sweep that looks below all marks agrees.
        look_again(&client, "-infinity").await;
        sweep(&client).await;
        assert_eq!(
            number(&client, "select strays from brightrun.settling").await,
            0,
            "{scenario}"
        );
        db.assert_whole().await;
    }
}

/// An engine without one of the rules: the function, what is taken out of it, and what then goes wrong.
struct Plant {
    function: &'static str,
    edits: &'static [(&'static str, &'static str)],
    scenarios: &'static [&'static str],
}

const CLAIM: &str = "brightrun.claim(text,text[],integer,interval,text,jsonb)";
const RAISE: &str = "brightrun._raise_marks(text,text,integer,smallint[])";

const PLANTS: [Plant; 10] = [
    // Nobody waits for those that drew a place and have not committed.
    Plant {
        function: "brightrun._settle()",
        edits: &[(
            "v_seen.horizon >= pg_catalog.pg_snapshot_xmin",
            "false and v_seen.horizon >= pg_catalog.pg_snapshot_xmin",
        )],
        scenarios: &["late commit"],
    },
    // Rows that a claim under way has locked are taken for gone.
    Plant {
        function: RAISE,
        edits: &[(
            "order by ready_seq limit 1;",
            "order by ready_seq limit 1 for update skip locked;",
        )],
        scenarios: &["rollback"],
    },
    // Moves do not lower marks.
    Plant {
        function: "brightrun._keep_marks()",
        edits: &[("where ready_seq <= v_below and share_id", "where false and share_id")],
        scenarios: &["moved by hand", "left its share", "ageing", "widening"],
    },
    // A move whose mark is low enough does not hold it there.
    Plant {
        function: "brightrun._keep_marks()",
        edits: &[
            (
                "where queue = v_moved.queue",
                "where low > v_moved.seq and queue = v_moved.queue",
            ),
            ("exit when found;", "exit;"),
        ],
        scenarios: &["move under way"],
    },
    // An old snapshot is believed.
    Plant {
        function: "brightrun._keep_marks()",
        edits: &[("= 'read committed'", "is not null")],
        scenarios: &["old snapshot"],
    },
    // Every transaction is thought to be waited for.
    Plant {
        function: "brightrun._keep_marks()",
        edits: &[(
            "pg_catalog.pg_current_xact_id() < coalesce(horizon, sampled_by)",
            "true",
        )],
        scenarios: &["younger mover"],
    },
    // What lies ahead of the first mark is not read.
    Plant {
        function: CLAIM,
        edits: &[(
            "select min(priority) from brightrun.mark",
            "select 0 * min(priority) - 32768 from brightrun.mark",
        )],
        scenarios: &["new priorities"],
    },
    // What lies between and behind marked priorities is not read.
    Plant {
        function: CLAIM,
        edits: &[(
            "lead(priority::integer, 1, 32768)",
            "lead(priority::integer, 32768, priority + 1)",
        )],
        scenarios: &["new priorities"],
    },
    // Marks stay where they are.
    Plant {
        function: RAISE,
        edits: &[("if v_low <= v_to - v_step then", "if false then")],
        scenarios: &["held snapshot"],
    },
    // Ids of another server are waited for.
    Plant {
        function: "brightrun._settle()",
        edits: &[("v_foreign := coalesce(", "v_foreign := false and coalesce(")],
        scenarios: &["restored"],
    },
];

#[tokio::test]
async fn without_any_one_of_their_rules_the_marks_lose_jobs() {
    for plant in PLANTS {
        for scenario in plant.scenarios {
            let (db, client) = restless().await;
            let sql = "select pg_get_functiondef($1::text::regprocedure)";
            let mut source: String = client.query_one(sql, &[&plant.function]).await.unwrap().get(0);
            for (sound, broken) in plant.edits {
                assert!(source.contains(sound), "{}: `{sound}` is not there", plant.function);
                source = source.replace(sound, broken);
            }
            run(&client, &source).await;
            let told = play(scenario, &db, &client).await;
            assert!(
                told.is_err(),
                "{} with {:?} was not noticed by: {scenario}",
                plant.function,
                plant.edits
            );
        }
    }
}

#[tokio::test]
async fn marks_follow_the_claims_and_stop_for_a_transaction_that_goes_on_writing() {
    let (db, client) = restless().await;
    pass(&client, "work", 20).await;
    turn(&client).await;
    let low = "select low from brightrun.mark where kind = 'work'";
    assert_eq!(number(&client, low).await, 21);
    let writer = db.client().await;
    run(&writer, "begin; select pg_current_xact_id()").await;
    pass(&client, "work", 20).await;
    nudge(&client).await;
    sweep(&client).await;
    assert_eq!(number(&client, low).await, 21, "nobody knows what the writer will do");
    run(&writer, "commit").await;
    turn(&client).await;
    assert_eq!(number(&client, low).await, 41);
    // Others know nothing of that mark.
    pass(&client, "other", 1).await;
    let elsewhere = "select brightrun.enqueue('work', p_queue => 'elsewhere')";
    run(&client, elsewhere).await;
    let there = "select count(*) from brightrun.claim('w', '{work}', p_queue => 'elsewhere')";
    assert_eq!(number(&client, there).await, 1);
}

#[tokio::test]
async fn what_becomes_ready_again_gets_a_place_above_the_mark() {
    let (db, client) = restless().await;
    let queue: &Queue = &db.queue;
    let id = enqueue(&client, "work", 0).await;
    let ready_again = [
        "select brightrun.release(job_id, token) from brightrun.lease",
        "select brightrun.fail(job_id, token, '{\"code\": \"X\", \"blame\": \"system\"}', '0') from brightrun.lease",
        "select brightrun.snooze(job_id, token, '0') from brightrun.lease",
        "select brightrun.fail(job_id, token, '{\"code\": \"X\", \"blame\": \"user\"}') from brightrun.lease;
         select brightrun.redrive(id) from brightrun.job where outcome = 'failed'",
        "select brightrun.release_unknown('w', '{}')",
    ];
    for again in ready_again {
        assert_eq!(claim(&client, "work", 1).await, [id], "before {again}");
        pass(&client, "work", 3).await;
        turn(&client).await;
        run(&client, again).await;
    }
    // In a transaction of another isolation, too, which moves no mark.
    run(&client, "begin isolation level repeatable read").await;
    assert_eq!(claim(&client, "work", 1).await, [id]);
    run(&client, "commit").await;
    assert_eq!(queue.status(id).await.unwrap().unwrap().state, JobState::Running);
}

#[tokio::test]
async fn nothing_but_a_move_waits_for_a_mark() {
    let (db, client) = restless().await;
    pass(&client, "work", 5).await;
    turn(&client).await;
    let holder = db.client().await;
    run(
        &holder,
        "begin; select from brightrun.mark for update; select from brightrun.settling for update",
    )
    .await;
    run(&client, "set lock_timeout = '20s'").await;
    for taken in 1..=5 {
        let id = enqueue(&client, "work", 0).await;
        assert_eq!(claim(&client, "work", 1).await, [id]);
        run(&client, "select brightrun.release(job_id, token) from brightrun.lease").await;
        nudge(&client).await;
        sweep(&client).await;
        assert_eq!(claim(&client, "work", 9).await.len(), taken);
    }
}

#[tokio::test]
async fn a_row_below_its_mark_is_found_counted_and_told() {
    let (db, client) = restless().await;
    pass(&client, "work", 5).await;
    turn(&client).await;
    let lost = enqueue(&client, "work", 0).await;
    run(&client, "update brightrun.mark set low = 1000000").await;
    assert_eq!(claim(&client, "work", 1).await, NOBODY);
    look_again(&client, "-infinity").await;
    sweep(&client).await;
    assert_eq!(claim(&client, "work", 1).await, [lost]);
    let doctor = db.queue.doctor().await.unwrap();
    assert!(
        doctor
            .iter()
            .any(|found| found.item == "marks" && found.ok == Some(false)),
        "{doctor:?}"
    );
    assert!(
        db.queue
            .metrics()
            .await
            .unwrap()
            .contains("brightrun_queue_strays_total 1\n")
    );
}

#[tokio::test]
async fn marks_that_nobody_moves_are_forgotten_and_their_jobs_are_not() {
    let (db, client) = restless().await;
    pass(&client, "work", 5).await;
    turn(&client).await;
    let id = enqueue(&client, "work", 0).await;
    run(&db.later("2 days").await, "select brightrun.prune(interval '90 days')").await;
    assert_eq!(number(&client, "select count(*) from brightrun.mark").await, 0);
    assert_eq!(claim(&client, "work", 1).await, [id]);
}

#[tokio::test]
async fn racing_claims_take_every_job_once_while_marks_move() {
    const EACH: usize = 60;
    let (db, client) = restless().await;
    let mut writers = tokio::task::JoinSet::new();
    for writer in 0..4_usize {
        let client = db.client().await;
        writers.spawn(async move {
            for round in 0..EACH / 3 {
                run(&client, "begin").await;
                for job in 0..3 {
                    enqueue(&client, "work", ((writer + round + job) % 3) as i32).await;
                    tokio::task::yield_now().await;
                }
                run(&client, "commit").await;
            }
        });
    }
    let mut claimers = tokio::task::JoinSet::new();
    let found = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    for claimer in 0..4 {
        let (client, found) = (db.client().await, found.clone());
        claimers.spawn(async move {
            within(PATIENCE, "all jobs are claimed", || async {
                let jobs = claim(&client, "work", 1 + claimer).await;
                if claimer == 0 {
                    run(&client, "select brightrun.rescue_expired()").await;
                }
                let mut found = found.lock().unwrap();
                found.extend(jobs);
                (found.len() >= 4 * EACH).then_some(())
            })
            .await;
        });
    }
    writers.join_all().await;
    claimers.join_all().await;
    let mut found = found.lock().unwrap().clone();
    found.sort();
    found.dedup();
    assert_eq!(found.len(), 4 * EACH);
    turn(&client).await;
    assert!(
        number(&client, "select max(low) from brightrun.mark").await > 1,
        "no mark ever moved"
    );
    db.assert_whole().await;
}

/// Stretches are read one after the other, and rows locked one by one: whoever claims beside it finds the next best.
#[tokio::test]
async fn a_claim_locks_the_jobs_it_takes_and_none_behind_them() {
    let (db, client) = restless().await;
    let mut jobs = Vec::new();
    for round in 0..2 {
        jobs.clear();
        for priority in [-1, 0, 0, 1, 1, 2] {
            jobs.push(enqueue(&client, "work", priority).await);
        }
        if round == 0 {
            // So that each priority has a mark.
            assert_eq!(claim(&client, "work", 9).await, jobs);
            turn(&client).await;
        }
    }
    let first = db.client().await;
    run(&first, "begin").await;
    assert_eq!(claim(&first, "work", 2).await, jobs[..2]);
    assert_eq!(claim(&client, "work", 2).await, jobs[2..4]);
    run(&first, "rollback").await;
    assert_eq!(claim(&client, "work", 9).await, [&jobs[..2], &jobs[4..]].concat());
}
