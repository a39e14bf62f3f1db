//! A database of its own for each test, and callers with the rights the app's callers have.

use std::future::Future;
use std::time::Duration;

use serde_json::{Value, json};
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Config, Error, NoTls, Row};
use uuid::Uuid;

/// The file under test.
pub const SCHEMA: &str = include_str!("../../schema.sql");

/// Parameters of a statement, as tokio-postgres wants them.
pub type Parameters<'a> = &'a [&'a (dyn ToSql + Sync)];

/// One database on the test server, and a connection of the role that owns it.
pub struct Database {
    /// Where it is, for programs that connect by themselves.
    pub url: String,
    config: Config,
    /// A superuser's connection: what the engine's owner may do, and what a test looks at.
    pub owner: Client,
}

impl Database {
    /// A new database with nothing in it.
    pub async fn empty() -> Self {
        let url = brightrun_queue::private_server::testing::fresh_database("app")
            .await
            .unwrap();
        Self::at(url).await
    }

    /// The database at a URL, as it is.
    pub async fn at(url: String) -> Self {
        let config: Config = url.parse().unwrap();
        let owner = connect(&config).await;
        Self { url, config, owner }
    }

    /// A new database with `schema.sql` applied.
    pub async fn migrated() -> Self {
        let database = Self::empty().await;
        database.owner.batch_execute(SCHEMA).await.unwrap();
        database
    }

    /// Another connection with the owner's rights.
    pub async fn connect(&self) -> Client {
        connect(&self.config).await
    }

    /// A connection as another login role. The test server trusts every local role.
    pub async fn connect_as(&self, role: &str) -> Client {
        connect(self.config.clone().user(role)).await
    }

    /// The same database as a login with a worker's rights and no others: a member of `brightrun_worker`.
    pub async fn worker_url(&self) -> String {
        const LOGIN: &str = "do $$ begin
               create role journey_worker login inherit password 'journey-worker' in role brightrun_worker;
             exception when duplicate_object or unique_violation then null;
             end $$";
        self.owner.batch_execute(LOGIN).await.unwrap();
        let (scheme, rest) = self.url.split_once("://").unwrap();
        let (_, place) = rest.split_once('@').unwrap();
        format!("{scheme}://journey_worker:journey-worker@{place}")
    }

    /// A connection that speaks as PostgREST does for the key `role` and, when signed in, the user.
    pub async fn api(&self, role: &'static str, user: Option<Uuid>) -> Api {
        Api {
            client: self.connect().await,
            role,
            user,
        }
    }

    /// PostgREST for a signed-in user.
    pub async fn signed_in(&self, user: Uuid) -> Api {
        self.api("authenticated", Some(user)).await
    }

    /// A new user of the app.
    pub async fn user(&self) -> Uuid {
        let user = Uuid::new_v4();
        self.owner
            .execute("insert into auth.users (id) values ($1)", &[&user])
            .await
            .unwrap();
        user
    }

    /// A dataset that is ready for training, written with the owner's rights.
    pub async fn ready_dataset(&self, user: Uuid) -> Uuid {
        let dataset = Uuid::new_v4();
        self.owner
            .execute(
                "insert into datasets (id, user_id, name, status, training_ready, storage_path, file_name, file_size,
                                       total_training_pairs)
                 values ($1, $2, 'Kind answers', 'ready', true, $3, 'answers.jsonl', 4711, 14)",
                &[&dataset, &user, &format!("{user}/{dataset}/answers.jsonl")],
            )
            .await
            .unwrap();
        dataset
    }

    /// The value of a query with one row and one column of JSON.
    pub async fn json(&self, query: &str, parameters: Parameters<'_>) -> Value {
        self.owner.query_one(query, parameters).await.unwrap().get(0)
    }

    /// A job's row as the app reads it.
    pub async fn job(&self, job: Uuid) -> Value {
        self.json("select to_jsonb(job) from training_jobs job where id = $1", &[&job])
            .await
    }

    /// The state the engine gives a job; `None` if the engine does not know it.
    pub async fn engine_state(&self, job: Uuid) -> Option<String> {
        let row = self
            .owner
            .query_opt("select state from brightrun.status($1)", &[&job])
            .await
            .unwrap();
        row.map(|row| row.get(0))
    }

    /// All notifications of a user but `job_queued` (which the app writes), oldest first.
    pub async fn notifications(&self, user: Uuid) -> Vec<Value> {
        let rows = self
            .owner
            .query(
                "select to_jsonb(told) - array['id', 'user_id', 'created_at', 'read'] from notifications told
                  where user_id = $1 order by created_at, type <> 'job_completed'",
                &[&user],
            )
            .await
            .unwrap();
        rows.iter().map(|row| row.get(0)).collect()
    }

    /// How many rows a query finds.
    pub async fn count(&self, from: &str, parameters: Parameters<'_>) -> i64 {
        self.owner
            .query_one(&format!("select count(*) from {from}"), parameters)
            .await
            .unwrap()
            .get(0)
    }
}

/// PostgREST's way of running a statement: a transaction that first switches the role and sets the claims.
pub struct Api {
    client: Client,
    role: &'static str,
    user: Option<Uuid>,
}

impl Api {
    /// Runs a statement and returns its rows.
    pub async fn query(&mut self, statement: &str, parameters: Parameters<'_>) -> Result<Vec<Row>, Error> {
        let transaction = self.client.transaction().await?;
        let claims = json!({ "sub": self.user, "role": self.role }).to_string();
        transaction
            .batch_execute(&format!("set local role {}", self.role))
            .await?;
        transaction
            .execute("select set_config('request.jwt.claims', $1, true)", &[&claims])
            .await?;
        let rows = transaction.query(statement, parameters).await?;
        transaction.commit().await?;
        Ok(rows)
    }

    /// Runs a statement that writes and returns how many rows it wrote.
    pub async fn execute(&mut self, statement: &str, parameters: Parameters<'_>) -> Result<u64, Error> {
        let counted = format!("with written as ({statement} returning 1) select count(*) from written");
        let rows = self.query(&counted, parameters).await?;
        Ok(rows[0].get::<_, i64>(0).unsigned_abs())
    }

    /// Inserts a training job exactly as the app's `POST /api/jobs` does, and returns its id.
    pub async fn insert_job(&mut self, dataset: Uuid) -> Result<Uuid, Error> {
        let user = self.user;
        let rows = self
            .query(
                r#"insert into training_jobs (user_id, dataset_id, preset_id, hyperparameters, gpu_config, status,
                       current_stage, progress, current_epoch, total_epochs, current_step, total_steps,
                       estimated_total_cost, current_cost, current_metrics, queued_at)
                   values ($1, $2, 'balanced',
                       '{"learning_rate": 0.00005, "batch_size": 4, "epochs": 3, "rank": 16}',
                       '{"type": "A100-80GB", "count": 2}', 'queued', 'queued', 0, 0, 3, 0, 12, 4.01, 0, '{}', now())
                   returning id"#,
                &[&user, &dataset],
            )
            .await?;
        Ok(rows[0].get(0))
    }

    /// Cancels a job exactly as the app's `POST /api/jobs/{id}/cancel` does; returns how many rows changed.
    pub async fn cancel_job(&mut self, job: Uuid, current_cost: f64) -> Result<u64, Error> {
        self.execute(
            "update training_jobs set status = 'cancelled', completed_at = now(), final_cost = $2::float8::numeric
              where id = $1",
            &[&job, &current_cost],
        )
        .await
    }
}

/// Waits until `holds` answers true; panics with `what` when it has not within half a minute.
pub async fn eventually<F: Future<Output = bool>>(what: &str, mut holds: impl FnMut() -> F) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(30);
    while !holds().await {
        assert!(tokio::time::Instant::now() < deadline, "never happened: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// The SQLSTATE of a refused statement.
pub fn sqlstate(error: &Error) -> &str {
    error.code().map_or("none", |code| code.code())
}

async fn connect(config: &Config) -> Client {
    let (client, connection) = config.connect(NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

/// A worker's side of the engine for one claimed training job.
pub struct Run {
    client: Client,
    /// The job's id, which is the app's and the engine's.
    pub job: Uuid,
    token: i64,
}

impl Run {
    /// Claims the next job of a kind, with the rights of a worker.
    pub async fn claim(database: &Database, kind: &str) -> Self {
        let client = database.connect().await;
        client.batch_execute("set role brightrun_worker").await.unwrap();
        let row = client
            .query_one(
                "select job_id, token from brightrun.claim('worker-1', array[$1::text])",
                &[&kind],
            )
            .await
            .unwrap();
        Self {
            client,
            job: row.get(0),
            token: row.get(1),
        }
    }

    /// Reports an event.
    pub async fn report(&self, event: &str, detail: Value) {
        let parameters: Parameters<'_> = &[&self.job, &self.token, &event, &detail];
        self.client
            .execute("select brightrun.report($1, $2, $3, $4)", parameters)
            .await
            .unwrap();
    }

    /// Beats with progress, and returns what the engine tells: alive, cancel, deadline or lost.
    pub async fn beat(&self, progress: Value) -> String {
        let parameters: Parameters<'_> = &[&self.job, &self.token, &progress];
        self.client
            .query_one(
                "select reply from brightrun.heartbeat(array[$1::uuid], array[$2::bigint], array[$3::jsonb])",
                parameters,
            )
            .await
            .unwrap()
            .get(0)
    }

    /// Completes, and returns the state that the job got.
    pub async fn complete(&self, result: Value) -> Result<String, Error> {
        let parameters: Parameters<'_> = &[&self.job, &self.token, &result];
        Ok(self
            .client
            .query_one("select brightrun.complete($1, $2, $3)", parameters)
            .await?
            .get(0))
    }

    /// Fails, and returns the state that the job got.
    pub async fn fail(&self, error: Value) -> String {
        let parameters: Parameters<'_> = &[&self.job, &self.token, &error];
        self.client
            .query_one("select brightrun.fail($1, $2, $3)", parameters)
            .await
            .unwrap()
            .get(0)
    }

    /// Gives the job back, and returns the state that it got.
    pub async fn release(&self, reason: &str) -> String {
        let parameters: Parameters<'_> = &[&self.job, &self.token, &reason];
        self.client
            .query_one("select brightrun.release($1, $2, $3)", parameters)
            .await
            .unwrap()
            .get(0)
    }
}

/// What a worker reports when training has succeeded.
pub fn finished(user: Uuid, artifact: Uuid) -> Value {
    let folder = format!("{user}/{artifact}");
    json!({
        "epoch": 3, "step": 12, "gpu_seconds": 3600, "cost": 7.0,
        "metrics": { "training_loss": 0.9, "learning_rate": 0.00005 },
        "artifact": { "id": artifact, "artifacts": {
            "adapter_model.safetensors": format!("{folder}/adapter_model.safetensors"),
            "adapter_config.json": format!("{folder}/adapter_config.json"),
        }},
    })
}
