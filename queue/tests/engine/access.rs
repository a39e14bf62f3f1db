//! Who may do what, and that the schema can be applied anywhere, again, and by a non-superuser.

use brightrun_queue::private_server::testing::fresh_database;
use brightrun_queue::{Error, JobState, NewJob, Queue, QueueConfig};
use serde_json::json;

use crate::support::{connect, database, engine_section, request};

#[tokio::test]
async fn the_worker_role_executes_the_engine_and_touches_no_table() {
    let db = database().await;
    let client = db.client().await;
    let login = format!("worker_{}", uuid::Uuid::new_v4().simple());
    client
        .batch_execute(&format!("create role {login} login in role brightrun_worker"))
        .await
        .unwrap();
    // Membership alone must do: grants are on brightrun_worker.
    let url = db.url.replace("postgres@", &format!("{login}@"));
    let queue = Queue::connect(&QueueConfig::new(&url).unwrap()).await.unwrap();
    queue.check_schema().await.unwrap();
    queue.enqueue(&NewJob::new("work", json!({}))).await.unwrap();
    let lease = queue.claim(&request("w", &["work"], 1)).await.unwrap()[0].lease;
    queue.heartbeat(&[(lease, None)]).await.unwrap();
    queue.rescue(10, std::time::Duration::from_secs(9)).await.unwrap();
    queue.maintain().await.unwrap();
    assert_eq!(queue.complete(&lease, &json!({})).await.unwrap(), JobState::Completed);

    let worker = connect(&url).await;
    let tables = client
        .query(
            "select relname::text, relkind = 'v' from pg_class
             where relnamespace = 'brightrun'::regnamespace and relkind in ('r', 'p', 'v')",
            &[],
        )
        .await
        .unwrap();
    assert!(tables.len() >= 10);
    for row in tables {
        let (table, is_view): (&str, bool) = (row.get(0), row.get(1));
        let mut statements = vec![format!("select from brightrun.{table}")];
        if !is_view {
            statements.push(format!("insert into brightrun.{table} default values"));
            statements.push(format!("delete from brightrun.{table}"));
            statements.push(format!("truncate brightrun.{table}"));
        }
        for statement in statements {
            let error = worker.batch_execute(&statement).await.unwrap_err();
            assert_eq!(
                error.code().map(|code| code.code()),
                Some("42501"),
                "{statement}: {error}"
            );
        }
    }
    for forbidden in [
        "select brightrun._leave(null, null, null, null, null, null, null, null)",
        "select brightrun._grant('work', null, 'w', null)",
        "select brightrun.prune('0 seconds')",
        "select brightrun.set_budget(gen_random_uuid(), 1)",
        "select brightrun.set_rate('queue', 'default', 1)",
        "select brightrun.cancel_many('work')",
        "select brightrun.tick()",
        "create table brightrun.mine ()",
    ] {
        let error = worker.batch_execute(forbidden).await.unwrap_err();
        assert_eq!(
            error.code().map(|code| code.code()),
            Some("42501"),
            "{forbidden}: {error}"
        );
    }
    worker
        .batch_execute("set brightrun.test_now_offset = '1 year'")
        .await
        .unwrap();
    let error = worker
        .batch_execute("select * from brightrun.rescue_expired()")
        .await
        .unwrap_err();
    assert_eq!(
        error.code().map(|code| code.code()),
        Some("42501"),
        "a worker cannot move the clock"
    );
}

#[tokio::test]
async fn nobody_else_gets_in() {
    let db = database().await;
    let client = db.client().await;
    let login = format!("stranger_{}", uuid::Uuid::new_v4().simple());
    client
        .batch_execute(&format!("create role {login} login"))
        .await
        .unwrap();
    let url = db.url.replace("postgres@", &format!("{login}@"));
    let queue = Queue::connect(&QueueConfig::new(&url).unwrap()).await.unwrap();
    let error = queue.enqueue(&NewJob::new("work", json!({}))).await.unwrap_err();
    assert!(matches!(error, Error::PermissionDenied { .. }), "{error}");
    assert!(error.hint().contains("brightrun_worker"));
}

#[tokio::test]
async fn every_engine_function_is_taken_from_public_and_has_a_fixed_search_path() {
    let db = database().await;
    let rows = db
        .client()
        .await
        .query(
            "select p.oid::regprocedure::text,
                    has_function_privilege('public', p.oid, 'execute'),
                    coalesce(p.proconfig::text like '%search_path=%', false)
             from pg_proc p where pronamespace = 'brightrun'::regnamespace",
            &[],
        )
        .await
        .unwrap();
    assert!(rows.len() > 40);
    for row in rows {
        let (name, public, fixed): (String, bool, bool) = (row.get(0), row.get(1), row.get(2));
        assert!(!public, "{name} can be executed by everybody");
        assert!(fixed, "{name} has no fixed search_path");
    }
}

/// The statements of a schema file, as an SQL editor would send them one by one.
fn statements(file: &str) -> Vec<String> {
    let (mut all, mut current, mut in_body) = (Vec::new(), String::new(), false);
    for line in file.lines().filter(|line| !line.starts_with("--")) {
        current.push_str(line);
        current.push('\n');
        in_body ^= line.matches("$$").count() % 2 == 1;
        if !in_body && line.ends_with(';') {
            all.push(std::mem::take(&mut current));
        }
    }
    assert_eq!(current.trim(), "", "the file ends with a whole statement");
    all
}

#[tokio::test]
async fn the_schema_is_applied_again_over_live_data_whole_and_statement_by_statement() {
    let db = database().await;
    let lease = db.running("work").await;
    let waiting = db.enqueue("work").await;
    db.queue.migrate(&engine_section()).await.unwrap();
    let client = db.client().await;
    let statements = statements(&engine_section());
    assert!(statements.len() > 60);
    for statement in statements {
        client
            .batch_execute(&statement)
            .await
            .unwrap_or_else(|error| panic!("{error:?}: {statement}"));
    }
    assert_eq!(db.state(waiting).await, "ready");
    assert_eq!(
        db.queue.complete(&lease, &json!({})).await.unwrap(),
        JobState::Completed
    );
    db.assert_whole().await;
}

#[tokio::test]
async fn an_owner_who_is_no_superuser_can_apply_it() {
    let url = fresh_database("owned").await.unwrap();
    let admin = connect(&url).await;
    let owner = format!("owner_{}", uuid::Uuid::new_v4().simple());
    let database = url.rsplit('/').next().unwrap().split('?').next().unwrap();
    admin
        .batch_execute(&format!(
            "create role {owner} login createrole; alter database \"{database}\" owner to {owner}"
        ))
        .await
        .unwrap();
    let url = url.replace("postgres@", &format!("{owner}@"));
    let queue = Queue::connect(&QueueConfig::new(&url).unwrap()).await.unwrap();
    queue.migrate(&engine_section()).await.unwrap();
    queue.migrate(&engine_section()).await.unwrap();
    queue.enqueue(&NewJob::new("work", json!({}))).await.unwrap();
    let lease = queue.claim(&request("w", &["work"], 1)).await.unwrap()[0].lease;
    assert_eq!(queue.complete(&lease, &json!({})).await.unwrap(), JobState::Completed);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_migrations_at_once_take_turns() {
    let url = fresh_database("twice").await.unwrap();
    let queue = Queue::connect(&QueueConfig::new(&url).unwrap()).await.unwrap();
    let mut both = tokio::task::JoinSet::new();
    for _ in 0..2 {
        let queue = queue.clone();
        both.spawn(async move { queue.migrate(&engine_section()).await });
    }
    for migrated in both.join_all().await {
        migrated.unwrap();
    }
    queue.check_schema().await.unwrap();
}

#[tokio::test]
async fn a_newer_schema_is_not_touched_and_a_program_that_is_too_old_is_told() {
    let db = database().await;
    db.client()
        .await
        .batch_execute("update brightrun.version set version = 99 where section = 'engine'")
        .await
        .unwrap();
    let error = db.queue.migrate(&engine_section()).await.unwrap_err();
    assert!(
        matches!(error, Error::Migration { .. }) && error.to_string().contains("version 99"),
        "{error}"
    );
    let error = db.queue.check_schema().await.unwrap_err();
    assert!(matches!(error, Error::SchemaVersion { found: 99, .. }), "{error}");
}

/// The engine as it was first deployed, with a job in every place it can be.
#[tokio::test]
async fn a_database_of_engine_version_1_is_upgraded_with_its_jobs() {
    let url = fresh_database("first").await.unwrap();
    let client = connect(&url).await;
    client
        .batch_execute(include_str!("../fixtures/engine_v1.sql"))
        .await
        .unwrap();
    client
        .batch_execute(
            "select brightrun.enqueue('waiting'), brightrun.enqueue('later', p_delay => '1 hour'), brightrun.enqueue('done'), brightrun.enqueue('held');
             select brightrun.complete(job_id, token) from brightrun.claim('old', '{done}');
             create table held as select * from brightrun.claim('old', '{held}');",
        )
        .await
        .unwrap();
    let queue = Queue::connect(&QueueConfig::new(&url).unwrap()).await.unwrap();
    assert!(matches!(
        queue.check_schema().await,
        Err(Error::SchemaVersion { found: 1, .. })
    ));
    for _ in 0..2 {
        queue.migrate(&engine_section()).await.unwrap();
    }
    queue.check_schema().await.unwrap();
    let held = client.query_one("select job_id, token from held", &[]).await.unwrap();
    let lease = brightrun_queue::Lease {
        job_id: held.get(0),
        token: held.get(1),
    };
    assert_eq!(
        queue.complete(&lease, &json!({})).await.unwrap(),
        JobState::Completed,
        "its worker ends it"
    );
    let claimed = queue
        .claim(&request("new", &["waiting", "later", "done"], 9))
        .await
        .unwrap();
    assert_eq!(
        claimed.iter().map(|job| job.kind.as_str()).collect::<Vec<_>>(),
        ["waiting"]
    );
    // A program of before, which knows fewer parameters, goes on as well.
    client
        .batch_execute("select brightrun.enqueue('old', '{}', null, 'default', 0, null, null, 3)")
        .await
        .unwrap();
    client
        .batch_execute("select * from brightrun.claim('old', '{old}', 1, '1 minute', 'default')")
        .await
        .unwrap();
    assert_eq!(queue.violations().await.unwrap(), vec![]);
}
