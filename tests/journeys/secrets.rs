//! Planted secrets turn up in no row, no log and no file.

use std::fs;
use std::path::Path;

use brightrun_queue::private_server::{Options, PrivateServer};
use uuid::Uuid;

use crate::database::{Database, SCHEMA};
use crate::world::{World, settings, spoken};

/// Part of every planted secret; obviously fake.
const CANARY: &str = "canary-not-a-secret-7f3a";

/// Variables that hold secrets in production.
const VARIABLES: [&str; 6] = [
    "SUPABASE_SERVICE_ROLE_KEY",
    "SUPABASE_SECRET_KEY",
    "S3_ACCESS_KEY_ID",
    "S3_SECRET_ACCESS_KEY",
    "S3_SESSION_TOKEN",
    "RUNPOD_API_KEY",
];

/// Files below `folder` whose bytes hold the canary.
fn tainted_files(folder: &Path, found: &mut Vec<std::path::PathBuf>) {
    for entry in fs::read_dir(folder).unwrap().flatten() {
        if entry.path().is_dir() {
            tainted_files(&entry.path(), found);
        } else if fs::read(entry.path())
            .unwrap()
            .windows(CANARY.len())
            .any(|window| window == CANARY.as_bytes())
        {
            found.push(entry.path());
        }
    }
}

/// Tables with a row whose text holds the canary.
async fn tainted_tables(database: &Database) -> Vec<String> {
    let tables = database
        .owner
        .query(
            "select format('%I.%I', table_schema, table_name) from information_schema.tables
              where table_type = 'BASE TABLE' and table_schema not in ('pg_catalog', 'information_schema')",
            &[],
        )
        .await
        .unwrap();
    assert!(tables.len() > 10, "the tables were not found");
    let mut tainted = Vec::new();
    for table in tables {
        let table: String = table.get(0);
        let rows = format!("{table} as every where every::text like '%{CANARY}%'");
        if database.count(&rows, &[]).await > 0 {
            tainted.push(table);
        }
    }
    tainted
}

#[tokio::test(flavor = "multi_thread")]
async fn secrets_reach_no_row_no_log_and_no_file() {
    let server = PrivateServer::start(&Options {
        loopback: true,
        ..Options::default()
    })
    .unwrap();
    let database = Database::at(server.create_database("journey").await.unwrap()).await;
    database.owner.batch_execute(SCHEMA).await.unwrap();
    let login = format!("create role canary_login login password '{CANARY}' in role brightrun_worker");
    database.owner.batch_execute(&login).await.unwrap();
    let mut world = World::at(database).await;
    let trusted = server.loopback_url("journey").unwrap();
    let url = format!(
        "postgresql://canary_login:{CANARY}{}",
        &trusted[trusted.rfind('@').unwrap()..]
    );
    let run = |world: &World, arguments: &[&str], log: &str| {
        let mut command = world.brightrun(arguments);
        command.env("DATABASE_URL", &url).env("RUST_LOG", log);
        for name in VARIABLES {
            command.env(name, CANARY);
        }
        // Nobody listens there: the keys are used, and the refusal is told.
        command
            .env("SUPABASE_URL", "http://127.0.0.1:1")
            .env("S3_ENDPOINT_URL", "http://127.0.0.1:1");
        spoken(&command.output().unwrap())
    };

    // One job that succeeds, one that fails; then storages that cannot be reached with planted keys.
    let good = world.job(4, 1).await;
    let bad = world.insert(Uuid::new_v4(), settings(1)).await;
    let mut said = vec![run(&world, &["worker", "--until-idle"], "debug")];
    assert_eq!(said[0].2, 0, "{}", said[0].1);
    assert_eq!(world.database.job(good).await["status"], "completed");
    assert_eq!(world.database.job(bad).await["status"], "failed");
    let third = world.job(4, 1).await;
    said.push(run(&world, &["status", &third.to_string(), "--json"], "info"));
    world.config.storage.location = "s3".to_owned();
    said.push(run(&world, &["doctor", "--json"], "info"));
    world.config.storage.location = "supabase".to_owned();
    said.push(run(&world, &["doctor"], "info"));
    said.push(run(&world, &["config"], "info"));

    for (output, errors, _) in &said {
        assert!(!output.contains(CANARY), "{output}");
        assert!(!errors.contains(CANARY), "{errors}");
    }
    for doctor in &said[2..4] {
        assert!(
            doctor.0.contains("127.0.0.1"),
            "the storage was not tried: {}",
            doctor.0
        );
    }
    assert!(said[0].1.contains("stage"), "nothing was logged: {}", said[0].1);
    let mut files = Vec::new();
    tainted_files(world.folder.path(), &mut files);
    assert!(files.is_empty(), "{files:?}");
    assert_eq!(tainted_tables(&world.database).await, Vec::<String>::new());
    // The search itself finds what is there.
    world
        .database
        .owner
        .execute("update datasets set description = $1", &[&format!("a {CANARY} b")])
        .await
        .unwrap();
    assert_eq!(tainted_tables(&world.database).await, ["public.datasets"]);
    drop(world);
    server.stop().unwrap();
}
