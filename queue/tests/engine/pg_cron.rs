//! The real pg_cron, in a server of its own: it must be loaded when the server starts.

use std::io::Write;
use std::time::Duration;

use brightrun_queue::private_server::{Options, PrivateServer};
use brightrun_queue::{Queue, QueueConfig, Schedule};
use serde_json::json;
use tokio_postgres::Client;

use crate::support::{connect, engine_section, within};

const DATABASE: &str = "cron_itself";

/// A server that has pg_cron, or `None` where this machine's PostgreSQL has no such extension.
async fn server_with_pg_cron() -> Option<PrivateServer> {
    let plain = PrivateServer::start(&Options::default()).unwrap();
    let available = "select exists (select from pg_available_extensions where name = 'pg_cron')";
    let client = connect(&plain.url("postgres")).await;
    if !client.query_one(available, &[]).await.unwrap().get::<_, bool>(0) {
        return None;
    }
    let settings = [
        ("shared_preload_libraries", "pg_cron"),
        ("cron.database_name", DATABASE),
        // Runs commands inside the server; else pg_cron connects over TCP, which needs a password here.
        ("cron.use_background_workers", "on"),
    ];
    let options = Options {
        settings: settings.map(|(name, value)| (name.to_owned(), value.to_owned())).into(),
        ..Options::default()
    };
    Some(PrivateServer::start(&options).unwrap())
}

async fn count(client: &Client, of: &str) -> i64 {
    let query = format!("select count(*) from {of}");
    client.query_one(&query, &[]).await.unwrap().get(0)
}

#[tokio::test]
async fn the_real_one_brings_recurring_jobs_into_being_while_no_process_lives() {
    let Some(server) = server_with_pg_cron().await else {
        // Past the capture of a test's output: what was not tried is to be seen.
        let told = "not run: recurring jobs by the real pg_cron (this machine's PostgreSQL has no such extension)\n";
        std::io::stderr().write_all(told.as_bytes()).unwrap();
        return;
    };
    let url = server.create_database(DATABASE).await.unwrap();
    let client = connect(&url).await;
    client.batch_execute("create extension pg_cron").await.unwrap();
    let queue = Queue::connect(&QueueConfig::new(&url).unwrap()).await.unwrap();
    for _ in 0..2 {
        queue.migrate(&engine_section()).await.unwrap();
    }
    assert_eq!(count(&client, "cron.job").await, 1, "set, not added");
    let old = "insert into cron.job_run_details (jobid, runid, end_time)
               select jobid, 1000000, now() - interval '2 days' from cron.job
               union all select jobid + 1, 1000001, now() - interval '2 days' from cron.job";
    client.batch_execute(old).await.unwrap();
    let schedule = Schedule {
        payload: json!({"by": "nobody alive"}),
        ..Schedule::every("often", "work", Duration::from_secs(1))
    };
    queue.set_schedule(&schedule).await.unwrap();
    drop(queue);

    // Its distance is a minute, whatever the clock of the database says.
    within(Duration::from_secs(300), "pg_cron's first run", || async {
        let done = count(&client, "cron.job_run_details where status = 'succeeded'").await;
        (done > 0).then_some(())
    })
    .await;
    let ready =
        "brightrun.ready join brightrun.job on job.id = ready.job_id where job.payload ->> 'by' = 'nobody alive'";
    assert!(count(&client, ready).await > 0);
    assert_eq!(count(&client, "cron.job_run_details where status = 'failed'").await, 0);
    assert_eq!(
        count(&client, "cron.job_run_details where runid = 1000000").await,
        0,
        "old lines of ours go"
    );
    assert_eq!(
        count(&client, "cron.job_run_details where runid = 1000001").await,
        1,
        "others' lines stay"
    );
}
