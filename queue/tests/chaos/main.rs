//! Chaos: many workers do everything at random, with wrong clocks, while connections are killed and the server is crashed; then every
//! promise is checked against what was seen. `BRIGHTRUN_CHAOS_SECONDS` makes it longer, `BRIGHTRUN_CHAOS_SEED` repeats a run's choices
//! (not its interleaving, which is the machine's).
#![allow(clippy::unwrap_used, clippy::panic)]

mod actors;
mod checker;
mod history;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use actors::{Actor, World};
use brightrun_queue::private_server::{Options, PrivateServer};
use checker::{Logged, Remains, breaches};
use history::{Call, Entry};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio_postgres::{Client, NoTls};

/// Enough to race. With few, many claims are alone for a moment, so that their order can be judged.
const MANY: u64 = 8;
const FEW: u64 = 2;

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}

async fn connect(url: &str) -> Client {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        match tokio_postgres::connect(url, NoTls).await {
            Ok((client, connection)) => {
                tokio::spawn(connection);
                return client;
            }
            Err(error) => assert!(Instant::now() < deadline, "the server is away for good: {error}"),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn engine(server: &PrivateServer) -> String {
    let url = server.create_database("chaos").await.unwrap();
    let file = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../schema.sql")).unwrap();
    let section = &file[file.find("-- >>> engine").unwrap()..file.find("-- <<< engine").unwrap()];
    let client = connect(&url).await;
    client.batch_execute(section).await.unwrap();
    let limits = "insert into brightrun.limit_rule (scope, name, at_most) values ('key', 'a', 1), ('key', 'b', 2), ('key', 'c', 3)";
    client.batch_execute(limits).await.unwrap();
    // Marks move with every place, instead of every few thousand.
    client
        .batch_execute("update brightrun.settling set step = 1")
        .await
        .unwrap();
    url
}

/// How much is to happen at least. A machine that is busy with other things needs longer for it.
#[derive(Clone, Copy)]
struct Least {
    seconds: u64,
    calls: usize,
}

/// How much longer than told a run may take until enough has happened.
const PATIENCE: Duration = Duration::from_secs(600);

/// How long recovery may take on a machine that is busy with other things.
const RECOVERY: Duration = Duration::from_secs(600);

/// A power failure. A recovery that takes longer than a start usually does is waited for: a server that was not ready in time is
/// stopped by its manager and started again, which only continues the recovery.
async fn crash(server: &mut PrivateServer) {
    let deadline = Instant::now() + RECOVERY;
    server.halt_immediate().unwrap();
    loop {
        match server.resume() {
            Ok(()) => return,
            Err(error) => assert!(Instant::now() < deadline, "the server does not recover: {error}"),
        }
        // A start that was given up has left a process behind, and its lock on the folder with it.
        server.halt_immediate().unwrap();
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

/// Breaks connections all the time, and now and then the server, as a power failure would.
async fn nemesis(server: &mut PrivateServer, world: &World, random: &mut StdRng, least: Least, crashes: bool) -> u32 {
    let (until, patience) = (
        Instant::now() + Duration::from_secs(least.seconds),
        Instant::now() + Duration::from_secs(least.seconds) + PATIENCE,
    );
    let mut crashed = 0;
    let mut next_crash = Instant::now() + Duration::from_secs(10);
    while Instant::now() < until || world.history.count() < least.calls {
        assert!(Instant::now() < patience, "{} calls only", world.history.count());
        tokio::time::sleep(Duration::from_millis(random.random_range(50..1500))).await;
        if crashes && Instant::now() >= next_crash {
            crash(server).await;
            crashed += 1;
            next_crash = Instant::now() + Duration::from_secs(random.random_range(10..25));
        } else {
            let victim = "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'chaos' order by random() limit 2";
            // The killer's own connection may be a victim of the crash before.
            let _ = connect(&world.url).await.batch_execute(victim).await;
        }
    }
    crashed
}

/// Everything ends: expired leases are swept by a clock far ahead, what waits is claimed and completed.
async fn settle(url: &str) {
    let client = connect(url).await;
    client
        .batch_execute("set brightrun.test_now_offset = '1 day'")
        .await
        .unwrap();
    // What waits for its turn under a limit would take thousands of rounds.
    let limited = "select brightrun.cancel(job_id, 'it is over') from brightrun.ready where share_id is not null";
    client.batch_execute(limited).await.unwrap();
    let deadline = Instant::now() + PATIENCE;
    for round in 1.. {
        // The clock moves on, so that retries come due and the steadiness rule is met.
        client
            .batch_execute(&format!("set brightrun.test_now_offset = '{round} days'"))
            .await
            .unwrap();
        for statement in [
            "select brightrun.rescue_expired(10000, interval '1000 years')",
            "select brightrun.complete(job_id, token) from brightrun.claim('settler', array['chaos'], 1000)",
            "select brightrun.brief_finish(array_fill(token, array[cardinality(ids)]), array(select generate_series(1, cardinality(ids))))
             from brightrun.brief_claim('settler', 'chaos', 10000)",
        ] {
            client.batch_execute(statement).await.unwrap();
        }
        let left = "select (select count(*) from brightrun.ready) + (select count(*) from brightrun.lease) + (select count(*) from brightrun.brief)
                           + (select count(*) from brightrun.brief_batch)";
        if client.query_one(left, &[]).await.unwrap().get::<_, i64>(0) == 0 {
            return;
        }
        assert!(Instant::now() < deadline, "something never ends");
    }
}

async fn remains(url: &str, settled: &[i64]) -> Remains {
    let client = connect(url).await;
    let mut remains = Remains::default();
    for row in client
        .query("select id, state from brightrun.job_status", &[])
        .await
        .unwrap()
    {
        remains.states.insert(row.get(0), row.get(1));
    }
    let limited = "select job.id, share.key, limit_rule.at_most::bigint from brightrun.job join brightrun.share on share.id = job.share_id
                   join brightrun.limit_rule on limit_rule.scope = 'key' and limit_rule.name = share.key";
    for row in client.query(limited, &[]).await.unwrap() {
        remains.limited.insert(row.get(0), (row.get(1), row.get(2)));
    }
    let log = "select seq, job_id, event, token from brightrun.event order by seq";
    remains.log = client
        .query(log, &[])
        .await
        .unwrap()
        .iter()
        .map(|row| Logged {
            seq: row.get(0),
            job: row.get(1),
            event: row.get(2),
            token: row.get(3),
        })
        .collect();
    remains.lane_dead = client
        .query("select id from brightrun.brief_dead", &[])
        .await
        .unwrap()
        .iter()
        .map(|row| row.get(0))
        .collect();
    remains.lane_dead.extend(settled);
    remains
}

/// What of the lane is left when the actors have gone: waiting, or in batches nobody knows any more.
async fn lane_left(url: &str) -> Vec<i64> {
    let sql = "select id from brightrun.brief
               union all
               select ids[place] from brightrun.brief_batch, generate_series(1, length(ended)) as place where get_bit(ended, place - 1) = 0";
    connect(url)
        .await
        .query(sql, &[])
        .await
        .unwrap()
        .iter()
        .map(|row| row.get(0))
        .collect()
}

struct Run {
    entries: Vec<Entry>,
    breaches: Vec<String>,
    crashed: u32,
    jobs: usize,
}

async fn run(least: Least, seed: u64, actors: u64, crashes: bool, plant: Option<(&str, &str, &str)>) -> Run {
    let mut server = PrivateServer::start(&Options {
        durable: true,
        ..Options::default()
    })
    .unwrap();
    let url = engine(&server).await;
    if let Some((function, sound, broken)) = plant {
        let client = connect(&url).await;
        let row = client
            .query_one("select pg_get_functiondef($1::text::regprocedure)", &[&function])
            .await
            .unwrap();
        let source: String = row.get(0);
        assert!(source.contains(sound), "the planted bug has nowhere to go");
        client.batch_execute(&source.replace(sound, broken)).await.unwrap();
    }
    let world = Arc::new(World {
        url: url.clone(),
        history: Default::default(),
        over: false.into(),
        jobs: Default::default(),
    });
    let mut random = StdRng::seed_from_u64(seed);
    let mut playing = tokio::task::JoinSet::new();
    for _ in 0..actors {
        playing.spawn(Actor::new(world.clone(), random.random()).play());
    }
    let crashed = nemesis(&mut server, &world, &mut random, least, crashes).await;
    world.over.store(true, Ordering::Relaxed);
    playing.join_all().await;
    let left = lane_left(&url).await;
    settle(&url).await;
    let remains = remains(&url, &left).await;
    let entries = world.history.entries();
    let strays = connect(&url)
        .await
        .query_one("select strays from brightrun.settling", &[])
        .await
        .unwrap();
    let violations = connect(&url)
        .await
        .query("select job_id from brightrun.violations()", &[])
        .await
        .unwrap();
    let mut found = breaches(&entries, &remains);
    if strays.get::<_, i64>(0) > 0 {
        found.push("a waiting job lay below the mark where claims begin".to_owned());
    }
    found.extend(
        violations
            .iter()
            .map(|row| format!("job {} is not in exactly one place", row.get::<_, uuid::Uuid>(0))),
    );
    Run {
        entries,
        breaches: found,
        crashed,
        jobs: remains.states.len(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_promise_holds_whatever_happens() {
    let seconds = number("BRIGHTRUN_CHAOS_SECONDS").unwrap_or(120);
    let seed = number("BRIGHTRUN_CHAOS_SEED").unwrap_or_else(|| rand::rng().random());
    println!("BRIGHTRUN_CHAOS_SEED={seed} BRIGHTRUN_CHAOS_SECONDS={seconds}");
    let least = Least { seconds, calls: 2000 };
    let run = run(least, seed, MANY, true, None).await;
    let count = |what: fn(&Call) -> bool| {
        run.entries
            .iter()
            .filter(|entry| entry.is_accepted() && what(&entry.call))
            .count()
    };
    println!(
        "{} calls, {} crashes of the server, {} jobs, {} claims, {} accepted writes, {} lane batches",
        run.entries.len(),
        run.crashed,
        run.jobs,
        count(|call| matches!(call, Call::Claim { .. })),
        count(|call| matches!(call, Call::Write { .. })),
        count(|call| matches!(call, Call::Take { .. })),
    );
    assert!(
        run.breaches.is_empty(),
        "seed {seed}: {} breaches, such as {:#?}",
        run.breaches.len(),
        &run.breaches[..run.breaches.len().min(10)]
    );
    assert!(run.crashed > 0 && run.jobs > 50, "nothing happened");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_order_holds_where_it_can_be_judged() {
    let seed = number("BRIGHTRUN_CHAOS_SEED").unwrap_or_else(|| rand::rng().random());
    let least = Least {
        seconds: 5,
        calls: 2000,
    };
    let run = run(least, seed, FEW, false, None).await;
    let judged = checker::lonely_claims(&run.entries).len();
    assert!(
        run.breaches.is_empty(),
        "seed {seed}: {:#?}",
        &run.breaches[..run.breaches.len().min(10)]
    );
    assert!(judged > 20, "only {judged} claims could be judged");
}

/// A checker that finds nothing proves nothing until it has found something: each of these engines has one mistake in it.
#[tokio::test(flavor = "multi_thread")]
async fn a_planted_mistake_is_found() {
    for (function, sound, broken, expected) in [
        // The token is not checked.
        (
            "brightrun.complete(uuid,bigint,jsonb)",
            "and token = p_token for update",
            "for update",
            "by stale token",
        ),
        // The limit is not counted under the key's lock.
        (
            "brightrun._admit(bigint)",
            ">= v_rule.at_most",
            ">= v_rule.at_most + 1",
            "its limit is",
        ),
        // The claim takes the newest first.
        (
            "brightrun.claim(text,text[],integer,interval,text,jsonb)",
            "order by priority, ready_seq limit v_left",
            "order by priority, ready_seq desc limit v_left",
            "with a better place",
        ),
        // A batch can end a place twice.
        (
            "brightrun.brief_finish(bigint[],integer[],jsonb[],interval)",
            "pg_catalog.get_bit(v_batch.ended, p_places[v_place] - 1) = 1",
            "false",
            "done twice",
        ),
    ] {
        let actors = if expected.contains("better place") { FEW } else { MANY };
        let least = Least {
            seconds: 5,
            calls: 3000,
        };
        let run = run(least, 7, actors, false, Some((function, sound, broken))).await;
        let caught = run.breaches.iter().find(|breach| breach.contains(expected));
        println!(
            "{function} with `{broken}` for `{sound}`: {} breaches in {} calls, such as: {}",
            run.breaches.len(),
            run.entries.len(),
            caught.map_or("none of the kind", String::as_str)
        );
        assert!(
            caught.is_some(),
            "{function} without `{sound}` was not noticed: {:?}",
            &run.breaches[..run.breaches.len().min(3)]
        );
    }
}
