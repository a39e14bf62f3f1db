//! Who may do what to which row, asked the way PostgREST asks.

#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

#[path = "support/database.rs"]
#[allow(dead_code)]
mod database;

use database::{Api, Database, sqlstate};
use tokio_postgres::Client;
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

/// What a role gets for a verb on a table, of rows of its own (if it can have any) and of somebody else's.
struct Cell {
    own: Answer,
    others: Answer,
}

impl Cell {
    fn word(&self) -> &'static str {
        match (self.own, self.others) {
            (Done, Done) => "all",
            (Done, _) => "own",
            (Nothing, Nothing) | (Nothing, Refused) | (Refused, Nothing) => "none",
            (Refused, Refused) => "–",
            (_, Done) => "others",
        }
    }
}

/// One statement in a transaction that is rolled back. A violated key comes after the policies: it counts as allowed.
async fn probe(api: &Client, role: &str, user: Option<Uuid>, statement: &str) -> Answer {
    let claims = user.map_or_else(
        || format!("{{\"role\": \"{role}\"}}"),
        |user| format!("{{\"role\": \"{role}\", \"sub\": \"{user}\"}}"),
    );
    api.batch_execute(&format!(
        "begin; set local role {role}; select set_config('request.jwt.claims', '{claims}', true)"
    ))
    .await
    .unwrap();
    let told = match api.execute(statement, &[]).await {
        Ok(0) => Nothing,
        Ok(_) => Done,
        Err(error) if sqlstate(&error) == "42501" => Refused,
        Err(error) if sqlstate(&error).starts_with("23") => Done,
        Err(error) => panic!("{role}: {statement}: {error:?}"),
    };
    api.batch_execute("rollback").await.unwrap();
    told
}

/// The page says what the database does: every role, table and verb is tried on rows of two users, and the table of answers must be
/// the one in `docs/reference/rls.md`. `BRIGHTRUN_BLESS=1` writes the page.
#[tokio::test]
async fn the_matrix_of_rights_is_the_one_in_the_documents() {
    let database = Database::migrated().await;
    let owners = [owner_of_rows(&database).await, owner_of_rows(&database).await];
    let rows = database
        .owner
        .query(
            "select table_schema || '.' || table_name, table_type = 'VIEW' from information_schema.tables
             where (table_schema = 'public' or table_schema = 'brightrun') and table_name !~ '^event_'
             order by table_schema desc, table_name",
            &[],
        )
        .await
        .unwrap();
    let roles = ["anon", "authenticated", "service_role", "brightrun_worker"];
    let mut page = String::from(
        "# Who may do what to which table\n\nWritten by the test `the_matrix_of_rights_is_the_one_in_the_documents`, which tries every cell on rows of two users, as PostgREST\n\
         does: `set local role`, `request.jwt.claims`. Not to be edited by hand: `BRIGHTRUN_BLESS=1 cargo test --release -p brightrun-worker --test rls matrix`.\n\n\
         s, i, u, d: select, insert, update, delete. **all**: of any row; **own**: of the caller's rows; **none**: it runs and touches nothing; –: refused.\n\
         An empty table shows none where the statement is allowed. A user's update of a job can only cancel it. Engine tables are written\n\
         through functions only.\n\n",
    );
    page.push_str(&format!(
        "| table | {} |\n|---|{}\n",
        roles.join(" | "),
        "---|".repeat(roles.len())
    ));
    for row in rows {
        let (table, is_view): (String, bool) = (row.get(0), row.get(1));
        let mut line = format!("| `{}` ", table.trim_start_matches("public."));
        for role in roles {
            let words = cells(&database.owner, &table, is_view, role, &owners).await;
            let all_refused = words.iter().all(|(_, word)| *word == "–");
            let told = words
                .iter()
                .map(|(verb, word)| format!("{verb} {word}"))
                .collect::<Vec<_>>()
                .join(", ");
            line.push_str(&format!("| {} ", if all_refused { "–" } else { &told }));
        }
        page.push_str(&line);
        page.push_str("|\n");
    }
    let place = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/reference/rls.md");
    if std::env::var_os("BRIGHTRUN_BLESS").is_some() {
        std::fs::write(place, &page).unwrap();
    }
    let written = std::fs::read_to_string(place).unwrap_or_default();
    assert!(
        written == page,
        "docs/reference/rls.md does not say what the database does:\n{page}"
    );
}

async fn cells(
    owner: &Client,
    table: &str,
    is_view: bool,
    role: &'static str,
    owners: &[Owner; 2],
) -> Vec<(&'static str, &'static str)> {
    let user = (role == "authenticated").then_some(owners[0].user);
    let columns: Vec<String> = owner
        .query("select column_name::text from information_schema.columns where table_schema || '.' || table_name = $1 and is_generated = 'NEVER'
                and not (is_identity = 'YES' and identity_generation = 'ALWAYS')", &[&table])
        .await
        .unwrap()
        .iter()
        .map(|row| row.get(0))
        .collect();
    // Which rows are whose: by the user's column, or by the job or data set of his.
    let of = |whose: &Owner| {
        let has = |column: &str| columns.iter().any(|name| name == column);
        if has("user_id") {
            format!("user_id = '{}'", whose.user)
        } else if has("created_by") {
            format!("created_by = '{}'", whose.user)
        } else if has("job_id") {
            format!("job_id = '{}'", whose.job)
        } else if has("dataset_id") {
            format!("dataset_id = '{}'", whose.dataset)
        } else {
            "true".to_owned()
        }
    };
    let verbs: &[&str] = if is_view { &["s"] } else { &["s", "i", "u", "d"] };
    let mut words = Vec::new();
    for verb in verbs {
        let mut answers = Vec::new();
        for whose in owners {
            let which = of(whose);
            let column = columns.first().cloned().unwrap_or_default();
            let statement = match *verb {
                "s" if role == "authenticated" && table == "brightrun.job" => {
                    format!("select id from {table} where owner = '{}'", whose.user)
                }
                "s" => format!("select 1 from {table} where {which}"),
                // All that a user may change of a job of his is that it shall end.
                "u" if table == "public.training_jobs" => {
                    format!("update {table} set status = 'cancelled' where {which}")
                }
                "u" if columns.iter().any(|name| name == "name") && table == "public.datasets" => {
                    format!("update {table} set name = name where {which}")
                }
                "u" => format!("update {table} set {column} = {column} where {which}"),
                "d" => format!("delete from {table} where {which}"),
                _ => {
                    let sample = format!("select to_jsonb(sample)::text from {table} as sample where {which} limit 1");
                    let row = owner.query_opt(&sample, &[]).await.unwrap();
                    let sample: String = row.map_or_else(|| "{}".to_owned(), |row| row.get(0));
                    let mut sample: serde_json::Value = serde_json::from_str(&sample).unwrap();
                    if let Some(fields) = sample.as_object_mut()
                        && fields.contains_key("id")
                        && table.starts_with("public.")
                    {
                        fields.insert("id".into(), Uuid::new_v4().to_string().into());
                    }
                    let names = columns
                        .iter()
                        .map(|name| format!("\"{name}\""))
                        .collect::<Vec<_>>()
                        .join(", ");
                    format!(
                        "insert into {table} ({names}) select {names} from jsonb_populate_record(null::{table}, '{}')",
                        sample.to_string().replace('\'', "''")
                    )
                }
            };
            answers.push(probe(owner, role, user, &statement).await);
        }
        words.push((
            *verb,
            Cell {
                own: answers[0],
                others: answers[1],
            }
            .word(),
        ));
    }
    words
}

/// With levels and data, as its worker logged it; by nobody else.
#[tokio::test]
async fn the_log_of_a_job_is_readable_by_its_owner_only() {
    let database = Database::migrated().await;
    let (owner, stranger) = (owner_of_rows(&database).await, database.user().await);
    database
        .owner
        .batch_execute(
            "select brightrun.log(job_id, token, 'warn', 'loss', 'it rose', '{\"by\": 1}') from brightrun.claim('w', array['train'])",
        )
        .await
        .unwrap();
    let log = "select level, type, message, data::text from job_events where job_id = $1 and type = 'loss'";
    let seen = database
        .signed_in(owner.user)
        .await
        .query(log, &[&owner.job])
        .await
        .unwrap();
    let words: Vec<String> = (0..4).map(|column| seen[0].get(column)).collect();
    assert_eq!(words, ["warn", "loss", "it rose", "{\"by\": 1}"]);
    assert!(
        database
            .signed_in(stranger)
            .await
            .query(log, &[&owner.job])
            .await
            .unwrap()
            .is_empty()
    );
    assert!(
        database
            .api("anon", None)
            .await
            .query(log, &[&owner.job])
            .await
            .is_err()
    );
}

/// A project with Supabase's publication has the job rows in it, once, however often the schema is applied.
#[tokio::test]
async fn job_rows_join_the_realtime_publication_where_there_is_one() {
    let database = Database::migrated().await;
    database
        .owner
        .batch_execute(
            "do $$ begin create publication supabase_realtime; exception when duplicate_object then null; end $$",
        )
        .await
        .unwrap();
    for _ in 0..2 {
        database.owner.batch_execute(database::SCHEMA).await.unwrap();
    }
    let rows = database
        .owner
        .query(
            "select tablename::text from pg_publication_tables where pubname = 'supabase_realtime' order by 1",
            &[],
        )
        .await
        .unwrap();
    let tables: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
    assert_eq!(tables, ["datasets", "notifications", "training_jobs"]);
}
