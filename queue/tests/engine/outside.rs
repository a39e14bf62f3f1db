//! pg_cron and pg_net are used where a project has them, and never needed. Both are stood in for by what they show of themselves.

use std::time::Duration;

use brightrun_queue::{NewJob, Schedule};
use serde_json::{Value, json};
use tokio_postgres::Client;

use crate::support::{Database, database, engine_section};

/// The part of pg_cron's and pg_net's own SQL that callers see.
const EXTENSIONS: &str = "
    create schema cron;
    create table cron.job (jobid bigint generated always as identity, jobname text unique, schedule text, command text);
    create table cron.job_run_details (jobid bigint, end_time timestamptz);
    create function cron.schedule(job_name text, schedule text, command text) returns bigint language sql as $$
        insert into cron.job (jobname, schedule, command) values ($1, $2, $3)
        on conflict (jobname) do update set schedule = excluded.schedule, command = excluded.command returning jobid $$;
    create schema net;
    create table net.asked (url text, body jsonb);
    create function net.http_post(url text, body jsonb default '{}', params jsonb default '{}', headers jsonb default '{}',
                                  timeout_milliseconds integer default 5000) returns bigint language sql as $$
        insert into net.asked values ($1, $2); select 1::bigint $$;";

async fn ready(db: &Database) -> i64 {
    db.queue.stats().await.unwrap().iter().map(|kind| kind.ready).sum()
}

async fn asked(client: &Client) -> Vec<Value> {
    let rows = client.query("select body from net.asked", &[]).await.unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

#[tokio::test]
async fn with_pg_cron_recurring_jobs_come_into_being_while_no_process_lives() {
    let db = database().await;
    let client = db.client().await;
    client.batch_execute(EXTENSIONS).await.unwrap();
    for _ in 0..2 {
        db.queue.migrate(&engine_section()).await.unwrap();
    }
    let jobs = client
        .query("select schedule, command from cron.job", &[])
        .await
        .unwrap();
    assert_eq!(jobs.len(), 1, "set, not added");
    assert_eq!(jobs[0].get::<_, &str>(0), "* * * * *");
    let command: String = jobs[0].get(1);

    db.queue
        .set_schedule(&Schedule::every("hourly", "work", Duration::from_secs(3600)))
        .await
        .unwrap();
    // Watched since long ago, so that whoever sweeps would judge it.
    db.sweep_at("0 seconds").await;
    let held = db.running("held").await;
    client
        .batch_execute(
            "insert into cron.job_run_details select 1, now() - interval '2 days' union all select 1, now()
                                union all select 2, now() - interval '2 days'",
        )
        .await
        .unwrap();
    let later = db.later("61 minutes").await;
    for _ in 0..2 {
        later.batch_execute(&command).await.unwrap();
        assert_eq!(ready(&db).await, 1);
    }
    assert_eq!(db.state(held.job_id).await, "running", "it judges no lease");
    let kept: i64 = client
        .query_one("select count(*) from cron.job_run_details", &[])
        .await
        .unwrap()
        .get(0);
    assert_eq!(kept, 2, "of ours the old line goes, of others none");
}

#[tokio::test]
async fn with_pg_net_somebody_outside_is_told_when_jobs_wait_and_nobody_lives() {
    let db = database().await;
    let client = db.client().await;
    client.batch_execute(EXTENSIONS).await.unwrap();
    db.enqueue("work").await;
    client.batch_execute("select brightrun.tick()").await.unwrap();
    assert_eq!(asked(&client).await, [Value::Null; 0], "nobody is to be told");
    client
        .batch_execute(
            "update brightrun.housekeeping set wake_url = 'https://example.org/wake'; select brightrun.tick()",
        )
        .await
        .unwrap();
    let told = [json!({"type": "jobs_waiting", "waiting": 1})];
    assert_eq!(asked(&client).await, told);
    db.sweep_at("0 seconds").await;
    client.batch_execute("select brightrun.tick()").await.unwrap();
    assert_eq!(asked(&client).await, told, "a worker swept: it will see for itself");
    let refused = client
        .batch_execute("update brightrun.housekeeping set wake_url = 'file:///etc/passwd'")
        .await;
    assert!(refused.is_err());
}

#[tokio::test]
async fn without_them_and_where_they_refuse_nothing_is_missing() {
    let db = database().await;
    let client = db.client().await;
    db.queue.enqueue(&NewJob::new("work", json!({}))).await.unwrap();
    client
        .batch_execute(
            "update brightrun.housekeeping set wake_url = 'https://example.org/wake'; select brightrun.tick()",
        )
        .await
        .unwrap();
    client
        .batch_execute(
            "create schema cron;
             create function cron.schedule(text, text, text) returns bigint language plpgsql as $$
             begin raise exception 'not for you' using errcode = '42501'; end $$;",
        )
        .await
        .unwrap();
    db.queue.migrate(&engine_section()).await.unwrap();
    assert_eq!(ready(&db).await, 1);
}
