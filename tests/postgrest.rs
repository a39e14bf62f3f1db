//! The app's calls as PostgREST puts them to the database: a login of its own that may become each API role and is none of them, the
//! settings of a request, a transaction that is read only for GET, and the statements in the very shapes that PostgREST makes of
//! selects with embedded tables, inserts, upserts, updates, deletes and calls. The server itself is in no package registry.

#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

#[path = "support/database.rs"]
#[allow(dead_code)]
mod database;

use database::{Database, Run, finished, sqlstate};
use serde_json::{Map, Value, json};
use tokio_postgres::{Client, Error, IsolationLevel};
use uuid::Uuid;

/// One application of PostgREST: its login, and where it looks up the shape of tables.
struct Postgrest<'a> {
    database: &'a Database,
    login: Client,
}

/// Who asks: the role of the key or token, and the user it was signed for.
type Caller = (&'static str, Option<Uuid>);

const ANON: Caller = ("anon", None);

fn user(id: Uuid) -> Caller {
    ("authenticated", Some(id))
}

/// The wrapping of every answer: a count, and the body as one JSON value.
fn answer(source: &str, body: &str) -> String {
    format!(
        "WITH pgrst_source AS ({source}) SELECT null::bigint AS total_result_set, pg_catalog.count(_postgrest_t) AS page_total, \
         {body} AS body, nullif(current_setting('response.headers', true), '') AS response_headers, \
         nullif(current_setting('response.status', true), '') AS response_status FROM ( SELECT * FROM pgrst_source ) _postgrest_t"
    )
}

const LIST: &str = "coalesce(json_agg(_postgrest_t), '[]')";

fn literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

fn names(columns: &[(String, String)], prefix: &str) -> String {
    let quoted = columns.iter().map(|(name, _)| format!("{prefix}\"{name}\""));
    quoted.collect::<Vec<_>>().join(", ")
}

/// `(SELECT … AS json_data) pgrst_payload, LATERAL (…) pgrst_body`: the request's body as rows.
fn payload(columns: &[(String, String)], body: &Value) -> String {
    let reads = if body.is_array() {
        "json_to_recordset"
    } else {
        "json_to_record"
    };
    let typed: Vec<String> = columns
        .iter()
        .map(|(name, kind)| format!("\"{name}\" {kind}"))
        .collect();
    format!(
        "(SELECT {}::json AS json_data) pgrst_payload, LATERAL (SELECT {} FROM {reads}(pgrst_payload.json_data) AS _({})) pgrst_body",
        literal(&body.to_string()),
        names(columns, ""),
        typed.join(", ")
    )
}

impl<'a> Postgrest<'a> {
    async fn before(database: &'a Database) -> Self {
        let login = database.connect_as("authenticator").await;
        Self { database, login }
    }

    /// One request.
    async fn request(&mut self, caller: Caller, method: &str, statement: &str) -> Result<Value, Error> {
        let transaction = self
            .login
            .build_transaction()
            .isolation_level(IsolationLevel::ReadCommitted)
            .read_only(method == "GET")
            .start()
            .await?;
        let claims = json!({ "sub": caller.1, "role": caller.0, "aud": "authenticated" }).to_string();
        transaction
            .execute(
                "select set_config('search_path', $1, true), set_config('role', $2, true), set_config('request.jwt.claims', $3, true), \
                 set_config('request.method', $4, true), set_config('request.path', '/', true), \
                 set_config('request.headers', '{}', true), set_config('request.cookies', '{}', true)",
                &[&"\"public\", \"extensions\"", &caller.0, &claims, &method],
            )
            .await?;
        let row = transaction.query_one(statement, &[]).await?;
        transaction.commit().await?;
        Ok(row.get("body"))
    }

    /// The columns a body names, with their types, from the catalog.
    async fn columns(&self, table: &str, body: &Value) -> Vec<(String, String)> {
        let first: &Map<String, Value> = body.get(0).unwrap_or(body).as_object().unwrap();
        let types = "select format_type(atttypid, null) from pg_attribute where attrelid = $1::text::regclass and attname = $2::text";
        let mut columns = Vec::new();
        for name in first.keys() {
            let row = self.database.owner.query_one(types, &[&table, name]).await.unwrap();
            columns.push((name.clone(), row.get(0)));
        }
        columns
    }

    /// `GET /table?select=…&filter`, where `select` and `filter` are written as PostgREST expands them.
    async fn get(&mut self, caller: Caller, source: &str) -> Result<Value, Error> {
        self.request(caller, "GET", &answer(source, LIST)).await
    }

    /// A select of one table with others embedded, each by the foreign key of a column: `name:table!column(fields)`.
    async fn get_embedded(
        &mut self,
        caller: Caller,
        table: &str,
        embeds: &[(&str, &str, &str, &str)],
        rest: &str,
    ) -> Result<Value, Error> {
        let (mut fields, mut joins) = (format!("\"public\".\"{table}\".*"), String::new());
        for (name, target, column, wanted) in embeds {
            // What PostgREST's schema cache would find; more than one key without a hint is an error 300 to the app.
            let keys: i64 = self
                .database
                .count(
                    "pg_constraint where contype = 'f' and conrelid = $1::text::regclass and confrelid = $2::text::regclass",
                    &[&table, target],
                )
                .await;
            assert_eq!(keys, 1, "{table} → {target}");
            let (alias, inner) = (format!("{table}_{name}_1"), format!("{target}_1"));
            let wanted: Vec<String> = wanted
                .split(',')
                .map(|field| format!("\"{inner}\".\"{field}\""))
                .collect();
            fields.push_str(&format!(", row_to_json(\"{alias}\".*)::jsonb AS \"{name}\""));
            joins.push_str(&format!(
                " LEFT JOIN LATERAL ( SELECT {} FROM \"public\".\"{target}\" AS \"{inner}\" WHERE \"{inner}\".\"id\" = \
                 \"public\".\"{table}\".\"{column}\" ) AS \"{alias}\" ON TRUE",
                wanted.join(", ")
            ));
        }
        self.get(
            caller,
            &format!("SELECT {fields} FROM \"public\".\"{table}\"{joins} {rest}"),
        )
        .await
    }

    /// `POST /table`; with `conflict`, an upsert on that column.
    async fn post(
        &mut self,
        caller: Caller,
        table: &str,
        body: &Value,
        conflict: Option<&str>,
    ) -> Result<Value, Error> {
        let columns = self.columns(table, body).await;
        let upsert = conflict.map_or_else(String::new, |key| {
            let set: Vec<String> = columns
                .iter()
                .map(|(name, _)| format!("\"{name}\" = EXCLUDED.\"{name}\""))
                .collect();
            format!(" ON CONFLICT(\"{key}\") DO UPDATE SET {}", set.join(", "))
        });
        let source = format!(
            "INSERT INTO \"public\".\"{table}\"({}) SELECT {} FROM {}{upsert} RETURNING \"public\".\"{table}\".*",
            names(&columns, ""),
            names(&columns, "\"pgrst_body\"."),
            payload(&columns, body)
        );
        self.request(caller, "POST", &answer(&source, LIST)).await
    }

    /// `PATCH /table?filter`.
    async fn patch(&mut self, caller: Caller, table: &str, body: &Value, filter: &str) -> Result<Value, Error> {
        let columns = self.columns(table, body).await;
        let set: Vec<String> = columns
            .iter()
            .map(|(name, _)| format!("\"{name}\" = \"pgrst_body\".\"{name}\""))
            .collect();
        let source = format!(
            "UPDATE \"public\".\"{table}\" SET {} FROM {} WHERE {filter} RETURNING \"public\".\"{table}\".*",
            set.join(", "),
            payload(&columns, body)
        );
        self.request(caller, "PATCH", &answer(&source, LIST)).await
    }

    /// `DELETE /table?filter`.
    async fn delete(&mut self, caller: Caller, table: &str, filter: &str) -> Result<Value, Error> {
        let source = format!("DELETE FROM \"public\".\"{table}\" WHERE {filter} RETURNING \"public\".\"{table}\".*");
        self.request(caller, "DELETE", &answer(&source, LIST)).await
    }

    /// `POST /rpc/function`, of a function that returns a table.
    async fn call(
        &mut self,
        caller: Caller,
        function: &str,
        parameter: (&str, &str),
        body: &Value,
    ) -> Result<Value, Error> {
        let (name, kind) = parameter;
        let columns = [(name.to_owned(), kind.to_owned())];
        let source = format!(
            "SELECT \"pgrst_call\".* FROM {}, LATERAL \"public\".\"{function}\"(\"{name}\" := pgrst_body.\"{name}\") \"pgrst_call\"",
            payload(&columns, body)
        );
        self.request(caller, "POST", &answer(&source, LIST)).await
    }
}

fn id_is(table: &str, id: Uuid) -> String {
    format!("\"public\".\"{table}\".\"id\" = '{id}'::unknown")
}

fn codes(told: &Result<Value, Error>) -> &str {
    told.as_ref().err().map_or("accepted", sqlstate)
}

/// What the app's `POST /api/jobs` sends.
fn new_job(owner: Uuid, dataset: Uuid) -> Value {
    json!({
        "user_id": owner, "dataset_id": dataset, "preset_id": "balanced",
        "hyperparameters": { "learning_rate": 0.00005, "batch_size": 4, "epochs": 3, "rank": 16 },
        "gpu_config": { "type": "A100-80GB", "count": 2 }, "status": "queued", "current_stage": "queued", "progress": 0,
        "current_epoch": 0, "total_epochs": 3, "current_step": 0, "total_steps": 12, "estimated_total_cost": 4.01,
        "current_cost": 0, "current_metrics": {}, "queued_at": "2026-11-22T12:00:00.000Z",
    })
}

#[tokio::test]
async fn a_job_is_ordered_listed_shown_and_cancelled() {
    let database = Database::migrated().await;
    let mut app = Postgrest::before(&database).await;
    let (owner, stranger) = (database.user().await, database.user().await);
    let dataset = database.ready_dataset(owner).await;

    let made = app
        .post(user(owner), "training_jobs", &new_job(owner, dataset), None)
        .await
        .unwrap();
    let job: Uuid = made[0]["id"].as_str().unwrap().parse().unwrap();
    assert_eq!(database.engine_state(job).await.as_deref(), Some("ready"));
    let told = json!({ "user_id": owner, "type": "job_queued", "title": "Training Job Queued", "message": "It starts shortly",
        "priority": "low", "action_url": format!("/training/jobs/{job}"), "metadata": { "job_id": job } });
    app.post(user(owner), "notifications", &told, None).await.unwrap();
    for caller in [user(stranger), ANON] {
        let refused = app.post(caller, "training_jobs", &new_job(owner, dataset), None).await;
        assert_eq!(codes(&refused), "42501");
    }

    let list = "ORDER BY \"public\".\"training_jobs\".\"created_at\" DESC LIMIT 10 OFFSET 0";
    let embeds = [(
        "dataset",
        "datasets",
        "dataset_id",
        "name,format,total_training_pairs,total_tokens",
    )];
    let seen = app
        .get_embedded(user(owner), "training_jobs", &embeds, list)
        .await
        .unwrap();
    assert_eq!(
        (&seen[0]["status"], &seen[0]["dataset"]["name"]),
        (&json!("queued"), &json!("Kind answers"))
    );
    for caller in [user(stranger), ANON] {
        assert_eq!(
            app.get_embedded(caller, "training_jobs", &embeds, list).await.unwrap(),
            json!([])
        );
    }

    let cancel = json!({ "status": "cancelled", "completed_at": "2026-11-22T13:00:00.000Z", "final_cost": 0 });
    let which = id_is("training_jobs", job);
    let mut cancelled = Vec::new();
    for caller in [user(stranger), user(owner), user(owner)] {
        let changed = app.patch(caller, "training_jobs", &cancel, &which).await.unwrap();
        cancelled.push(changed.as_array().unwrap().len());
    }
    assert_eq!(cancelled, [0, 1, 0], "by its owner, once");
    assert_eq!(codes(&app.patch(ANON, "training_jobs", &cancel, &which).await), "42501");
    assert_eq!(database.engine_state(job).await.as_deref(), Some("cancelled"));
    let lie = json!({ "status": "completed", "progress": 100 });
    let made = app
        .post(user(owner), "training_jobs", &new_job(owner, dataset), None)
        .await
        .unwrap();
    let other: Uuid = made[0]["id"].as_str().unwrap().parse().unwrap();
    let refused = app
        .patch(user(owner), "training_jobs", &lie, &id_is("training_jobs", other))
        .await;
    assert_eq!(codes(&refused), "42501");
}

#[tokio::test]
async fn a_finished_run_is_shown_with_its_curve_costs_model_history_and_news() {
    let database = Database::migrated().await;
    let mut app = Postgrest::before(&database).await;
    let (owner, stranger) = (database.user().await, database.user().await);
    let dataset = database.ready_dataset(owner).await;
    let job = database.signed_in(owner).await.insert_job(dataset).await.unwrap();
    let run = Run::claim(&database, "train").await;
    run.report("running", json!({ "gpu_type": "A100-80GB", "gpu_count": 1 }))
        .await;
    run.beat(
        json!({ "progress": 40, "epoch": 1, "step": 5, "training_loss": 1.5, "learning_rate": 0.00005,
        "metrics": { "training_loss": 1.5, "learning_rate": 0.00005 } }),
    )
    .await;
    let artifact = Uuid::new_v4();
    run.complete(finished(owner, artifact)).await.unwrap();

    let by_job = |table: &str, rest: &str| {
        format!(
            "SELECT \"public\".\"{table}\".* FROM \"public\".\"{table}\" WHERE \"public\".\"{table}\".\"job_id\" = '{job}'::unknown {rest}"
        )
    };
    let curve = by_job("metrics_points", "ORDER BY \"timestamp\" ASC LIMIT 100");
    let costs = by_job("cost_records", "ORDER BY \"recorded_at\" DESC");
    let history = by_job("job_events", "ORDER BY \"seq\" ASC");
    let news = "SELECT \"public\".\"notifications\".* FROM \"public\".\"notifications\" WHERE \"public\".\"notifications\".\"read\" IS FALSE \
                ORDER BY \"created_at\" DESC LIMIT 20";
    let models = "WHERE \"public\".\"model_artifacts\".\"deleted_at\" IS NULL \
                  ORDER BY to_jsonb(\"public\".\"model_artifacts\".\"quality_metrics\")->'overall_score' DESC LIMIT 12 OFFSET 0";
    let embeds = [
        (
            "dataset",
            "datasets",
            "dataset_id",
            "id,name,format,total_training_pairs",
        ),
        ("job", "training_jobs", "job_id", "id,preset_id,created_at,completed_at"),
    ];
    let rows = |told: &Value| told.as_array().unwrap().len();
    for (caller, some) in [(user(owner), true), (user(stranger), false)] {
        for source in [curve.as_str(), &costs, &history, news] {
            assert_eq!(
                rows(&app.get(caller, source).await.unwrap()) > 0,
                some,
                "{caller:?}: {source}"
            );
        }
        let shown = app
            .get_embedded(caller, "model_artifacts", &embeds, models)
            .await
            .unwrap();
        assert_eq!(rows(&shown), usize::from(some));
        let events = app
            .call(
                caller,
                "training_job_events",
                ("job_id", "uuid"),
                &json!({ "job_id": job }),
            )
            .await
            .unwrap();
        assert_eq!(rows(&events) > 0, some);
    }
    let shown = app
        .get_embedded(user(owner), "model_artifacts", &embeds, models)
        .await
        .unwrap();
    assert_eq!(
        (
            &shown[0]["id"],
            &shown[0]["job"]["preset_id"],
            &shown[0]["dataset"]["name"]
        ),
        (&json!(artifact), &json!("balanced"), &json!("Kind answers"))
    );
    // The key without a user: empty lists of the app's tables, a refusal of the engine's views and functions.
    assert_eq!(app.get(ANON, &curve).await.unwrap(), json!([]));
    assert_eq!(codes(&app.get(ANON, &history).await), "42501");
    let refused = app
        .call(
            ANON,
            "training_job_events",
            ("job_id", "uuid"),
            &json!({ "job_id": job }),
        )
        .await;
    assert_eq!(codes(&refused), "42501");

    let seen = json!({ "read": true });
    let unread = app.get(user(owner), news).await.unwrap();
    let note: Uuid = unread[0]["id"].as_str().unwrap().parse().unwrap();
    let which = id_is("notifications", note);
    assert_eq!(
        app.patch(user(stranger), "notifications", &seen, &which).await.unwrap(),
        json!([])
    );
    let read = app.patch(user(owner), "notifications", &seen, &which).await.unwrap();
    assert_eq!(read[0]["read"], true);
    assert_eq!(rows(&app.get(user(owner), news).await.unwrap()), rows(&unread) - 1);
}

#[tokio::test]
async fn a_dataset_is_made_confirmed_found_changed_and_deleted() {
    let database = Database::migrated().await;
    let mut app = Postgrest::before(&database).await;
    let (owner, stranger) = (database.user().await, database.user().await);
    let dataset = Uuid::new_v4();
    let body = |name: &str| {
        json!({ "id": dataset, "user_id": owner, "name": name, "format": "brightrun_lora_v4", "status": "uploading",
            "storage_bucket": "lora-datasets", "storage_path": format!("{owner}/{dataset}/it's.jsonl"),
            "file_name": "it's.jsonl", "file_size": 4711 })
    };
    app.post(user(owner), "datasets", &body("first"), None).await.unwrap();
    let which = id_is("datasets", dataset);
    let confirm = json!({ "status": "validating" });
    assert_eq!(
        app.patch(user(stranger), "datasets", &confirm, &which).await.unwrap(),
        json!([])
    );
    let confirmed = app.patch(user(owner), "datasets", &confirm, &which).await.unwrap();
    assert_eq!(confirmed[0]["status"], "validating");
    assert_eq!(
        database
            .count("brightrun.jobs('validate_dataset') where state = 'ready'", &[])
            .await,
        1
    );

    // An upsert changes a row of one's own and cannot touch another's.
    let upserted = app
        .post(user(owner), "datasets", &body("second"), Some("id"))
        .await
        .unwrap();
    assert_eq!(upserted[0]["name"], "second");
    let mut stolen = body("stolen");
    stolen["user_id"] = json!(stranger);
    let refused = app.post(user(stranger), "datasets", &stolen, Some("id")).await;
    assert_eq!(codes(&refused), "42501");

    let search = "SELECT \"public\".\"datasets\".* FROM \"public\".\"datasets\" WHERE \"public\".\"datasets\".\"deleted_at\" IS NULL AND \
                  \"public\".\"datasets\".\"name\" ilike '%SEC%'::unknown ORDER BY \"created_at\" DESC LIMIT 25 OFFSET 0";
    assert_eq!(app.get(user(owner), search).await.unwrap()[0]["id"], json!(dataset));
    assert_eq!(app.get(user(stranger), search).await.unwrap(), json!([]));

    assert_eq!(app.delete(user(stranger), "datasets", &which).await.unwrap(), json!([]));
    assert_eq!(codes(&app.delete(ANON, "datasets", &which).await), "42501");
    let gone = app.delete(user(owner), "datasets", &which).await.unwrap();
    assert_eq!(gone[0]["name"], "second");
}

/// The server's key passes the policies, and only by its grants.
#[tokio::test]
async fn many_rows_come_in_one_body_with_the_servers_key() {
    let database = Database::migrated().await;
    let mut app = Postgrest::before(&database).await;
    let service = ("service_role", None);
    let owner = database.user().await;
    let note = |title: &str| json!({ "user_id": owner, "type": "job_queued", "title": title, "message": "a\u{301} 'quoted' \\ one" });
    let made = app
        .post(service, "notifications", &json!([note("one"), note("two")]), None)
        .await
        .unwrap();
    assert_eq!(made.as_array().unwrap().len(), 2);
    assert_eq!(made[1]["message"], note("two")["message"]);
    let job = app.get(service, "SELECT * FROM \"brightrun\".\"job_status\"").await;
    assert_eq!(job.unwrap(), json!([]));
}

/// The login itself is nobody, and nothing of a request outlives it.
#[tokio::test]
async fn the_login_has_no_rights_of_its_own_and_forgets_each_caller() {
    let database = Database::migrated().await;
    let mut app = Postgrest::before(&database).await;
    let owner = database.user().await;
    database.ready_dataset(owner).await;
    let all = "SELECT \"public\".\"datasets\".* FROM \"public\".\"datasets\"";
    assert_eq!(app.get(user(owner), all).await.unwrap().as_array().unwrap().len(), 1);
    let without = app.login.query("select * from public.datasets", &[]).await.unwrap_err();
    assert_eq!(sqlstate(&without), "42501");
    let claims: Option<String> = app
        .login
        .query_one("select nullif(current_setting('request.jwt.claims', true), '')", &[])
        .await
        .unwrap()
        .get(0);
    assert_eq!(claims, None);
    // A GET cannot write, whatever it calls.
    let write = format!("UPDATE \"public\".\"datasets\" SET name = 'x' WHERE user_id = '{owner}' RETURNING *");
    assert_eq!(codes(&app.get(user(owner), &write).await), "25006");
}
