//! Who may do what to which row, asked the way PostgREST asks.

#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

#[path = "support/database.rs"]
#[allow(dead_code)]
mod database;

use database::{Api, Database, sqlstate};
use uuid::Uuid;

/// What became of a statement about a row of user A.
#[derive(Debug, PartialEq, Eq, Clone, Copy)]
enum Answer {
    /// It saw or wrote the row.
    Done,
    /// It ran and touched nothing.
    Nothing,
    /// It was refused with SQLSTATE 42501.
    Refused,
}
use Answer::{Done, Nothing, Refused};

/// A user with one row in each of the app's tables.
struct Owner {
    user: Uuid,
    dataset: Uuid,
    job: Uuid,
}

async fn owner_of_rows(database: &Database) -> Owner {
    let user = database.user().await;
    let dataset = database.ready_dataset(user).await;
    let job = database.signed_in(user).await.insert_job(dataset).await.unwrap();
    database
        .owner
        .batch_execute(&format!(
            "insert into metrics_points (job_id, epoch, step, training_loss, learning_rate) values ('{job}', 1, 1, 2, 0.001);
             insert into model_artifacts (user_id, job_id, dataset_id, name, quality_metrics, training_summary, configuration,
                                          artifacts)
               values ('{user}', '{job}', '{dataset}', 'model', '{{}}', '{{}}', '{{}}', '{{}}');
             insert into cost_records (user_id, job_id, cost_type, amount, billing_period)
               values ('{user}', '{job}', 'training_compute', 1, '2026-01-01');
             insert into notifications (user_id, type, title, message) values ('{user}', 'job_queued', 'title', 'message');
             insert into brightrun.dataset_issue (dataset_id, ordinal, user_id, severity, line, code, message)
               values ('{dataset}', 1, '{user}', 'error', 3, 'DATA_TEST', 'message');
             insert into training_files (name, json_file_path, jsonl_file_path, created_by)
               values ('{user}', 'a', 'b', '{user}');"
        ))
        .await
        .unwrap();
    Owner { user, dataset, job }
}

async fn answer(api: &mut Api, statement: &str) -> Answer {
    let result = if statement.starts_with("select") {
        api.query(statement, &[]).await.map(|rows| rows.len() as u64)
    } else {
        api.execute(statement, &[]).await
    };
    match result {
        Ok(0) => Nothing,
        Ok(_) => Done,
        Err(error) if sqlstate(&error) == "42501" => Refused,
        Err(error) => panic!("{statement}: {error:?}"),
    }
}

/// Each statement against a row of user A, and what anon, A, another user and the service key get.
///
/// The order of the commands keeps the row alive for the later ones: service_role deletes last.
async fn check(statement: impl Fn(&Owner) -> String, expected: [Answer; 4]) {
    let database = Database::migrated().await;
    let owner = owner_of_rows(&database).await;
    let stranger = database.user().await;
    let statement = statement(&owner);
    let callers = [
        ("anon", None),
        ("authenticated", Some(owner.user)),
        ("authenticated", Some(stranger)),
        ("service_role", None),
    ];
    let mut found = Vec::new();
    // The owner of the row comes last but one, so that a statement that works does not spoil the others.
    for index in [0, 2, 1, 3] {
        let (role, user) = callers[index];
        let answered = answer(&mut database.api(role, user).await, &statement).await;
        found.push((index, answered));
    }
    found.sort_by_key(|(index, _)| *index);
    let found: Vec<_> = found.into_iter().map(|(_, answered)| answered).collect();
    assert_eq!(found, expected, "[anon, owner, stranger, service] of {statement}");
}

fn rows_of(table: &str, user: Uuid) -> String {
    let of_the_job = format!("in (select id from training_jobs where user_id = '{user}')");
    match table {
        "metrics_points" => format!("metrics_points where job_id {of_the_job}"),
        "training_files" => format!("training_files where name = '{user}'"),
        _ => format!("{table} where user_id = '{user}'"),
    }
}

#[tokio::test]
async fn rows_are_seen_by_their_owner_only() {
    for table in [
        "datasets",
        "training_jobs",
        "metrics_points",
        "model_artifacts",
        "cost_records",
        "notifications",
    ] {
        check(
            |owner| format!("select 1 from {}", rows_of(table, owner.user)),
            [Nothing, Done, Nothing, Done],
        )
        .await;
    }
    check(
        |owner| format!("select 1 from {}", rows_of("training_files", owner.user)),
        [Done, Done, Done, Done],
    )
    .await;
    check(
        |owner| format!("select 1 from dataset_issues where dataset_id = '{}'", owner.dataset),
        [Refused, Done, Nothing, Done],
    )
    .await;
}

#[tokio::test]
async fn a_user_inserts_only_rows_of_his_own() {
    check(
        |owner| {
            format!(
                "insert into datasets (user_id, name, storage_path, file_name, file_size)
                 values ('{0}', 'n', '{0}/' || gen_random_uuid() || '/f.jsonl', 'f.jsonl', 1)",
                owner.user
            )
        },
        [Refused, Done, Refused, Done],
    )
    .await;
    check(
        |owner| {
            format!(
                "insert into training_jobs (user_id, dataset_id, preset_id, hyperparameters, gpu_config, total_epochs,
                     estimated_total_cost) values ('{}', '{}', 'fast', '{{}}', '{{}}', 1, 0)",
                owner.user, owner.dataset
            )
        },
        [Refused, Done, Refused, Done],
    )
    .await;
    check(
        |owner| {
            format!(
                "insert into notifications (user_id, type, title, message) values ('{}', 't', 't', 'm')",
                owner.user
            )
        },
        [Refused, Done, Refused, Done],
    )
    .await;
    check(
        |owner| {
            format!(
                "insert into training_files (name, json_file_path, jsonl_file_path, created_by)
                 values (gen_random_uuid()::text, 'a', 'b', '{}')",
                owner.user
            )
        },
        [Refused, Done, Refused, Done],
    )
    .await;
}

#[tokio::test]
async fn results_and_costs_are_written_by_the_server_only() {
    check(
        |owner| {
            format!(
                "insert into metrics_points (job_id, epoch, step, training_loss, learning_rate) values ('{}', 1, 2, 1, 0.1)",
                owner.job
            )
        },
        [Refused, Refused, Refused, Done],
    )
    .await;
    check(
        |owner| {
            format!(
                "insert into cost_records (user_id, cost_type, amount, billing_period)
                 values ('{}', 'training_compute', -100, '2026-01-01')",
                owner.user
            )
        },
        [Refused, Refused, Refused, Done],
    )
    .await;
    for (table, change) in [
        ("metrics_points", "training_loss = 0"),
        ("model_artifacts", "name = 'mine'"),
        ("cost_records", "amount = 0"),
    ] {
        check(
            |owner| {
                let (name, condition) = rows_of(table, owner.user)
                    .split_once(" where ")
                    .map(|(a, b)| (a.to_owned(), b.to_owned()))
                    .unwrap();
                format!("update {name} set {change} where {condition}")
            },
            [Refused, Refused, Refused, Done],
        )
        .await;
        check(
            |owner| format!("delete from {}", rows_of(table, owner.user)),
            [Refused, Refused, Refused, Done],
        )
        .await;
    }
}

#[tokio::test]
async fn a_user_changes_only_rows_of_his_own() {
    check(
        |owner| {
            format!(
                "update datasets set deleted_at = now() where user_id = '{}'",
                owner.user
            )
        },
        [Refused, Done, Nothing, Done],
    )
    .await;
    check(
        |owner| format!("update notifications set read = true where user_id = '{}'", owner.user),
        [Refused, Done, Nothing, Done],
    )
    .await;
    check(
        |owner| {
            format!(
                "update training_jobs set status = 'cancelled' where id = '{}' and status = 'queued'",
                owner.job
            )
        },
        [Refused, Done, Nothing, Nothing],
    )
    .await;
    check(
        |owner| {
            format!(
                "update training_files set description = 'd' where name = '{}'",
                owner.user
            )
        },
        [Refused, Done, Nothing, Done],
    )
    .await;
}

#[tokio::test]
async fn a_user_deletes_only_datasets_of_his_own() {
    check(
        |owner| {
            format!(
                "delete from datasets where user_id = '{}' and not exists (select from training_jobs where dataset_id = datasets.id)",
                owner.user
            )
        },
        [Refused, Nothing, Nothing, Nothing],
    )
    .await;
    for table in ["training_jobs", "notifications", "training_files"] {
        let nobody = if table == "training_jobs" { "and false" } else { "" };
        let service = if table == "training_jobs" { Nothing } else { Done };
        check(
            |owner| format!("delete from {} {nobody}", rows_of(table, owner.user)),
            [Refused, Refused, Refused, service],
        )
        .await;
    }
    let database = Database::migrated().await;
    let user = database.user().await;
    let dataset = database.ready_dataset(user).await;
    let removed = "delete from datasets where id = $1";
    let stranger = database.user().await;
    assert_eq!(
        database
            .signed_in(stranger)
            .await
            .execute(removed, &[&dataset])
            .await
            .unwrap(),
        0
    );
    assert_eq!(
        database
            .signed_in(user)
            .await
            .execute(removed, &[&dataset])
            .await
            .unwrap(),
        1
    );
}

#[tokio::test]
async fn a_row_cannot_be_given_to_somebody_else() {
    let database = Database::migrated().await;
    let owner = owner_of_rows(&database).await;
    let stranger = database.user().await;
    let mut app = database.signed_in(owner.user).await;
    for table in ["datasets", "notifications"] {
        let gift = format!("update {table} set user_id = $1");
        assert_eq!(sqlstate(&app.execute(&gift, &[&stranger]).await.unwrap_err()), "42501");
    }
}

#[tokio::test]
async fn a_dataset_cannot_name_somebody_elses_object() {
    let database = Database::migrated().await;
    let user = database.user().await;
    let stranger = database.user().await;
    let mut app = database.signed_in(user).await;
    let insert = "insert into datasets (user_id, name, storage_bucket, storage_path, file_name, file_size)
                  values ($1, 'n', $2, $3, 'f', 1)";
    for (bucket, path) in [
        ("lora-datasets", format!("{stranger}/d/f.jsonl")),
        ("lora-datasets", format!("{user}/../{stranger}/d/f.jsonl")),
        ("lora-models", format!("{user}/d/f.jsonl")),
        ("conversation-files", format!("{user}/d/raw.json")),
    ] {
        let refused = app.execute(insert, &[&user, &bucket, &path]).await.unwrap_err();
        assert_eq!(sqlstate(&refused), "42501", "{bucket} {path}");
    }
    for (bucket, path) in [
        ("lora-datasets", format!("{user}/d/my..file.jsonl")),
        ("training-files", "42/training.jsonl".to_owned()),
    ] {
        assert_eq!(app.execute(insert, &[&user, &bucket, &path]).await.unwrap(), 1);
    }
    let moved = format!("update datasets set storage_path = '{stranger}/x'  where storage_bucket = 'lora-datasets'");
    assert_eq!(sqlstate(&app.execute(&moved, &[]).await.unwrap_err()), "42501");
}

#[tokio::test]
async fn a_job_cannot_train_on_somebody_elses_dataset() {
    let database = Database::migrated().await;
    let owner = owner_of_rows(&database).await;
    let stranger = database.user().await;
    let refused = database
        .signed_in(stranger)
        .await
        .insert_job(owner.dataset)
        .await
        .unwrap_err();
    assert_eq!(sqlstate(&refused), "42501");
}

#[tokio::test]
async fn a_new_job_cannot_claim_a_history() {
    let database = Database::migrated().await;
    let user = database.user().await;
    let dataset = database.ready_dataset(user).await;
    let mut app = database.signed_in(user).await;
    for (column, value) in [
        ("status", "'completed'"),
        ("status", "null"),
        ("progress", "50"),
        ("current_cost", "-5"),
        ("final_cost", "0"),
        ("started_at", "now()"),
        ("external_job_id", "'taken'"),
        ("error_message", "'x'"),
        ("retry_count", "1"),
    ] {
        let insert = format!(
            "insert into training_jobs (user_id, dataset_id, preset_id, hyperparameters, gpu_config, total_epochs,
                 estimated_total_cost, {column}) values ($1, $2, 'fast', '{{}}', '{{}}', 1, 0, {value})"
        );
        let refused = app.execute(&insert, &[&user, &dataset]).await.unwrap_err();
        assert_eq!(sqlstate(&refused), "42501", "{column} = {value}");
    }
}

#[tokio::test]
async fn api_roles_cannot_call_the_engine() {
    let database = Database::migrated().await;
    let owner = owner_of_rows(&database).await;
    for statement in [
        "select brightrun.enqueue('train')".to_owned(),
        format!("select brightrun.cancel('{}')", owner.job),
        format!(
            "select brightrun.project_training_job('{}', 'completed', '{{}}')",
            owner.job
        ),
        "select * from brightrun.job".to_owned(),
        "select * from brightrun.training_projection".to_owned(),
    ] {
        for (role, user) in [("anon", None), ("authenticated", Some(owner.user))] {
            assert_eq!(
                answer(&mut database.api(role, user).await, &statement).await,
                Refused,
                "{role}: {statement}"
            );
        }
    }
}

#[tokio::test]
async fn a_worker_can_execute_engine_functions_and_nothing_else() {
    let database = Database::migrated().await;
    let owner = owner_of_rows(&database).await;
    let mut worker = database.api("brightrun_worker", None).await;
    let claimed = worker
        .query("select * from brightrun.claim('w', array['train'])", &[])
        .await
        .unwrap();
    assert_eq!(claimed.len(), 1);
    assert_eq!(
        database.job(owner.job).await["status"],
        "initializing",
        "the projector wrote with the owner's rights"
    );
    let tables: Vec<String> = database
        .owner
        .query(
            "select format('%I.%I', schemaname, tablename) from pg_tables where schemaname in ('public', 'brightrun', 'storage', 'auth')",
            &[],
        )
        .await
        .unwrap()
        .iter()
        .map(|row| row.get(0))
        .collect();
    assert!(tables.len() > 15);
    for table in tables {
        assert_eq!(
            answer(&mut worker, &format!("select 1 from {table}")).await,
            Refused,
            "{table}"
        );
    }
    let project = format!(
        "select brightrun.project_training_job('{}', 'completed', '{{}}')",
        owner.job
    );
    assert_eq!(answer(&mut worker, &project).await, Refused);
}

#[tokio::test]
async fn storage_objects_are_kept_apart_by_folder() {
    let database = Database::migrated().await;
    let user = database.user().await;
    let stranger = database.user().await;
    let upload = "insert into storage.objects (bucket_id, name) values ($1, $2)";
    let mut app = database.signed_in(user).await;
    let mut other = database.signed_in(stranger).await;
    let dataset = format!("{user}/d/f.jsonl");
    let model = format!("{user}/a/adapter_model.safetensors");

    assert_eq!(app.execute(upload, &[&"lora-datasets", &dataset]).await.unwrap(), 1);
    let refused = other
        .execute(upload, &[&"lora-datasets", &format!("{user}/d/g.jsonl")])
        .await
        .unwrap_err();
    assert_eq!(sqlstate(&refused), "42501");
    let refused = app.execute(upload, &[&"lora-models", &model]).await.unwrap_err();
    assert_eq!(sqlstate(&refused), "42501", "models are written by the server");
    let mut service = database.api("service_role", None).await;
    assert_eq!(service.execute(upload, &[&"lora-models", &model]).await.unwrap(), 1);

    for (api, expected) in [(&mut app, 2), (&mut other, 0)] {
        let seen = api.query("select 1 from storage.objects", &[]).await.unwrap();
        assert_eq!(seen.len(), expected);
    }
}

#[tokio::test]
async fn the_history_of_a_job_is_readable_by_its_owner() {
    let database = Database::migrated().await;
    let owner = owner_of_rows(&database).await;
    let stranger = database.user().await;
    let history = "select event from training_job_events($1)";
    let seen = database
        .signed_in(owner.user)
        .await
        .query(history, &[&owner.job])
        .await
        .unwrap();
    assert_eq!(seen[0].get::<_, String>(0), "enqueued");
    let seen = database
        .signed_in(stranger)
        .await
        .query(history, &[&owner.job])
        .await
        .unwrap();
    assert!(seen.is_empty());
    let refused = database
        .api("anon", None)
        .await
        .query(history, &[&owner.job])
        .await
        .unwrap_err();
    assert_eq!(sqlstate(&refused), "42501");
}
