//! Connecting: each way it can fail is told apart, with a hint and without the password.

use brightrun_queue::private_server::{Options, PrivateServer};
use brightrun_queue::{Error, NewJob, Queue, QueueConfig};
use serde_json::json;

use crate::support::database;

const CANARY: &str = "obviously-fake-canary";

async fn failure(url: &str) -> Error {
    let error = Queue::connect(&QueueConfig::new(url).unwrap()).await.unwrap_err();
    assert!(
        !format!("{error} {error:?} {}", error.hint()).contains(CANARY),
        "{error}"
    );
    error
}

#[tokio::test]
async fn a_wrong_password_a_missing_database_and_a_dead_port_are_told_apart() {
    let server = PrivateServer::start(&Options {
        loopback: true,
        ..Options::default()
    })
    .unwrap();
    let good = server.loopback_url("postgres").unwrap();
    Queue::connect(&QueueConfig::new(&good).unwrap()).await.unwrap();
    let (_, place) = good.split_once('@').unwrap();
    let wrong = format!("postgresql://postgres:{CANARY}@{place}");
    assert!(matches!(failure(&wrong).await, Error::WrongPassword { .. }));
    let without = format!("postgresql://postgres@{place}");
    assert!(matches!(failure(&without).await, Error::WrongPassword { .. }));
    let missing = format!("{}/nowhere", good.strip_suffix("/postgres").unwrap());
    assert!(matches!(failure(&missing).await, Error::DatabaseMissing { .. }));
    let required = format!("{good}?sslmode=require");
    let error = failure(&required).await;
    assert!(error.to_string().contains("TLS"), "{error}");
    server.stop().unwrap();
    let gone = format!("postgresql://postgres:{CANARY}@{place}");
    let error = failure(&gone).await;
    assert!(matches!(error, Error::Unreachable { .. }), "{error:?}");
}

#[tokio::test]
async fn an_empty_database_asks_for_the_migration() {
    let url = brightrun_queue::private_server::testing::fresh_database("empty")
        .await
        .unwrap();
    let queue = Queue::connect(&QueueConfig::new(&url).unwrap()).await.unwrap();
    for error in [
        queue.check_schema().await.unwrap_err(),
        queue.enqueue(&NewJob::new("work", json!({}))).await.unwrap_err(),
    ] {
        assert!(matches!(error, Error::SchemaMissing { .. }), "{error:?}");
        assert!(error.hint().contains("brightrun migrate"));
    }
}

#[tokio::test]
async fn a_failed_migration_names_the_line_and_changes_nothing() {
    let db = database().await;
    let script = "create table public.half_done ();\n\ncreate table oops(;\n";
    let error = db.queue.migrate(script).await.unwrap_err();
    assert!(matches!(error, Error::Migration { line: Some(3), .. }), "{error:?}");
    let row = db
        .client()
        .await
        .query_one("select to_regclass('public.half_done') is null", &[])
        .await
        .unwrap();
    assert!(row.get::<_, bool>(0));
}
