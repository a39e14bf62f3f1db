//! The database itself pushes jobs: `schema_push.sql` over a stand-in of pg_net, which records requests and carries them out.

use std::process::Child;
use std::sync::Arc;

use brightrun_queue::private_server::{Options, PrivateServer};
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use uuid::Uuid;

use crate::database::{Database, SCHEMA, eventually};
use crate::fake_runpod::{CANARY_KEY, FakeRunPod, Route, Step};
use crate::world::World;

const PUSH: &str = include_str!("../../schema_push.sql");
const STAND_IN: &str = include_str!("../fixtures/pg_net_stand_in.sql");

/// A project whose database pushes to one endpoint.
struct Project {
    world: World,
    plane: Arc<FakeRunPod>,
}

/// What pg_net's own worker does: requests leave, answers come as rows.
struct Carrier(JoinHandle<()>);

impl Drop for Carrier {
    fn drop(&mut self) {
        self.0.abort();
    }
}

struct Worker(Child);

impl Drop for Worker {
    fn drop(&mut self) {
        let _gone = self.0.kill();
        let _reaped = self.0.wait();
    }
}

impl Project {
    async fn new() -> Self {
        let database = Database::empty().await;
        database.owner.batch_execute(STAND_IN).await.unwrap();
        database.owner.batch_execute(SCHEMA).await.unwrap();
        Self::on(database).await
    }

    async fn on(database: Database) -> Self {
        brightrun_worker::storage::http::install_crypto_provider();
        // As often as you like.
        for _ in 0..2 {
            database.owner.batch_execute(PUSH).await.unwrap();
        }
        let project = Self {
            world: World::at(database).await,
            plane: Arc::new(FakeRunPod::start()),
        };
        let owner = &project.world.database.owner;
        let key = "select vault.create_secret($1, 'RUNPOD_API_KEY')";
        owner.execute(key, &[&CANARY_KEY]).await.unwrap();
        let endpoint = "insert into brightrun.push_endpoint (id, gpu_types, max_jobs) values ('ep1', '{A100-80GB}', 2)";
        owner.batch_execute(endpoint).await.unwrap();
        let base = "update brightrun.push_setting set api_base = $1, look_every = '10 milliseconds'";
        owner.execute(base, &[&project.plane.api()]).await.unwrap();
        owner
            .batch_execute(
                "update brightrun.job_kind set retry_base = '10 milliseconds', retry_cap = '10 milliseconds'",
            )
            .await
            .unwrap();
        project
    }

    /// Starts carrying requests out.
    async fn carrier(&self) -> Carrier {
        let database = self.world.database.connect().await;
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        Carrier(tokio::spawn(async move {
            loop {
                let next = "delete from net.http_request_queue where id = (select min(id) from net.http_request_queue)
                            returning id, method, url, headers, body";
                let Some(row) = database.query_opt(next, &[]).await.unwrap() else {
                    tokio::time::sleep(std::time::Duration::from_millis(5)).await;
                    continue;
                };
                let (id, method, url): (i64, String, String) = (row.get(0), row.get(1), row.get(2));
                let (headers, body): (Value, Option<Value>) = (row.get(3), row.get(4));
                let mut request = client.request(method.parse().unwrap(), url);
                for (name, value) in headers.as_object().unwrap() {
                    request = request.header(name, value.as_str().unwrap());
                }
                if let Some(body) = body {
                    request = request.body(body.to_string());
                }
                let (status, content) = match request.send().await {
                    Ok(answer) => (Some(i32::from(answer.status().as_u16())), answer.text().await.ok()),
                    Err(_) => (None, None),
                };
                let heard = "insert into net._http_response (id, status_code, content) values ($1, $2, $3)";
                database.execute(heard, &[&id, &status, &content]).await.unwrap();
            }
        }))
    }

    /// What the schedule does.
    async fn tick(&self) -> Value {
        self.world.database.json("select brightrun.push_tick()", &[]).await
    }

    /// Ticks until something is true.
    async fn ticking<F: Future<Output = bool>>(&self, what: &str, holds: impl Fn() -> F) {
        eventually(what, || async {
            self.tick().await;
            holds().await
        })
        .await;
    }

    async fn row(&self, job: Uuid) -> Value {
        self.world.database.job(job).await
    }

    async fn sent(&self, job: Uuid) -> String {
        self.ticking("the job is submitted", || async {
            self.row(job).await["external_job_id"].is_string()
        })
        .await;
        self.row(job).await["external_job_id"].as_str().unwrap().to_owned()
    }

    async fn is_forgotten(&self) -> bool {
        self.world.database.count("brightrun.dispatch", &[]).await == 0
    }

    fn runs(&self, job: Uuid) -> usize {
        let runs = self.plane.of(Route::Run);
        runs.iter()
            .filter(|request| request.json()["input"]["job_id"] == json!(job))
            .count()
    }

    fn worker(&self) -> Worker {
        let log = std::fs::File::create(self.world.folder.path().join("worker.log")).unwrap();
        let mut command = self.world.brightrun(&["worker"]);
        Worker(command.envs(self.plane.variables()).stdout(log).spawn().unwrap())
    }

    /// Tables but pg_net's and Vault's own with a row that holds the key.
    async fn tainted(&self) -> Vec<String> {
        let listed = "select format('%I.%I', table_schema, table_name) from information_schema.tables
                       where table_type = 'BASE TABLE' and table_schema not in ('pg_catalog', 'information_schema', 'net', 'vault')";
        let tables = self.world.database.owner.query(listed, &[]).await.unwrap();
        assert!(tables.len() > 20, "the tables were not found");
        let mut tainted = Vec::new();
        for table in tables {
            let table: String = table.get(0);
            let rows = format!("{table} as every where every::text like '%{CANARY_KEY}%'");
            if self.world.database.count(&rows, &[]).await > 0 {
                tainted.push(table);
            }
        }
        tainted
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_inserted_row_is_pushed_by_the_database_trained_and_forgotten_at_runpod() {
    let project = Project::new().await;
    let job = project.world.job(10, 2).await;
    // The trigger has asked already; no tick was needed.
    let asked = project
        .world
        .database
        .json(
            "select jsonb_agg(to_jsonb(request)) from net.http_request_queue request",
            &[],
        )
        .await;
    assert_eq!(asked.as_array().unwrap().len(), 1, "{asked:#}");
    assert_eq!(asked[0]["url"], json!(format!("{}/ep1/run", project.plane.api())));
    assert_eq!(
        asked[0]["headers"]["Authorization"],
        json!(format!("Bearer {CANARY_KEY}"))
    );
    assert_eq!(
        asked[0]["body"]["input"],
        json!({"job_id": job}),
        "a reference and nothing else"
    );
    assert!(asked[0]["body"]["policy"]["executionTimeout"].as_u64().unwrap() >= 3_600_000);
    let _carrier = project.carrier().await;
    project.sent(job).await;
    assert_eq!(project.row(job).await["current_stage"], "queued_on_gpu");
    let _worker = project.worker();
    project
        .ticking("the job is completed", || async {
            project.row(job).await["status"] == "completed"
        })
        .await;
    project.ticking("no dispatch is left", || project.is_forgotten()).await;
    assert_eq!(project.runs(job), 1);
    assert!(project.plane.of(Route::Cancel).is_empty(), "{}", project.plane.trace());
    assert_eq!(project.tainted().await, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_insert_succeeds_without_the_key_and_the_job_is_pushed_once_there_is_one() {
    let project = Project::new().await;
    let owner = &project.world.database.owner;
    owner.batch_execute("delete from vault.secrets").await.unwrap();
    let job = project.world.job(10, 1).await;
    assert_eq!(project.row(job).await["status"], "queued");
    assert!(project.is_forgotten().await, "nothing is half done");
    let refused = owner.query_one("select brightrun.push_tick()", &[]).await.unwrap_err();
    assert!(
        refused
            .as_db_error()
            .unwrap()
            .message()
            .contains("no secret named RUNPOD_API_KEY"),
        "{refused}"
    );
    let key = "select vault.create_secret($1, 'RUNPOD_API_KEY')";
    owner.execute(key, &[&CANARY_KEY]).await.unwrap();
    let _carrier = project.carrier().await;
    project.sent(job).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_gets_no_more_than_it_takes_and_rests_after_a_429() {
    let project = Project::new().await;
    project
        .plane
        .script(Route::Run, [Step::status(429), Step::status(500), Step::Drop]);
    let _carrier = project.carrier().await;
    let mut jobs = Vec::new();
    for _ in 0..3 {
        jobs.push(project.world.job(10, 1).await);
    }
    project
        .ticking("the endpoint rests", || async {
            let rests = "brightrun.push_endpoint where rests_until is not null";
            project.world.database.count(rests, &[]).await == 1
        })
        .await;
    let sent = "brightrun.dispatch where external_id is not null";
    let hurry = "update brightrun.push_endpoint set rests_until = null;
                 update brightrun.dispatch set due_at = now()
                  where external_id is null and not exists (select from brightrun.push_call where job_id = dispatch.job_id)";
    eventually("two are sent", || async {
        // Rests and doubts are minutes in life.
        project.world.database.owner.batch_execute(hurry).await.unwrap();
        project.tick().await;
        project.world.database.count(sent, &[]).await == 2
    })
    .await;
    for _ in 0..5 {
        project.tick().await;
    }
    assert_eq!(
        project.world.database.count("brightrun.dispatch", &[]).await,
        2,
        "the third one waits"
    );
    for job in jobs {
        assert_eq!(
            project.row(job).await["retry_count"],
            0,
            "trouble of the platform is no attempt"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_pg_net_lost_is_made_again_once_its_hold_is_over() {
    let project = Project::new().await;
    let job = project.world.job(10, 1).await;
    // pg_net's tables are unlogged: a crash empties them.
    let crash = "truncate net.http_request_queue, net._http_response";
    project.world.database.owner.batch_execute(crash).await.unwrap();
    let _carrier = project.carrier().await;
    project.tick().await;
    assert_eq!(project.runs(job), 0, "its hold is not over");
    let later = "update brightrun.dispatch set due_at = now()";
    project.world.database.owner.batch_execute(later).await.unwrap();
    project.sent(job).await;
    assert_eq!(project.runs(job), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_ends_at_runpod_unclaimed_is_an_attempt_a_cancel_is_passed_on_and_a_ceiling_refuses() {
    let project = Project::new().await;
    let _carrier = project.carrier().await;
    let job = project.world.job(10, 1).await;
    let mut known = String::new();
    for (attempt, status) in ["FAILED", "TIMED_OUT", "CANCELLED"].into_iter().enumerate() {
        project
            .ticking("a new run", || async {
                project.row(job).await["external_job_id"]
                    .as_str()
                    .is_some_and(|id| id != known)
            })
            .await;
        known = project.sent(job).await;
        assert_eq!(project.row(job).await["retry_count"], json!(attempt));
        project.plane.end(&known, status);
    }
    project
        .ticking("the job has failed", || async {
            project.row(job).await["status"] == "failed"
        })
        .await;
    let row = project.row(job).await;
    assert!(
        row["error_message"].as_str().unwrap().contains("[RUNPOD_CANCELLED]"),
        "{row:#}"
    );

    let waiting = project.world.job(10, 1).await;
    let remote = project.sent(waiting).await;
    let mut app = project.world.database.signed_in(project.world.user).await;
    app.cancel_job(waiting, 0.0).await.unwrap();
    project
        .ticking("the run is cancelled", || async {
            let jobs = project.plane.submitted();
            jobs.iter()
                .any(|job| job["id"] == json!(remote) && job["status"] == "CANCELLED")
        })
        .await;
    project.ticking("no dispatch is left", || project.is_forgotten()).await;

    let cheap = "update brightrun.push_setting set max_job_dollars = 0.01";
    project.world.database.owner.batch_execute(cheap).await.unwrap();
    let dear = project.world.job(10, 1).await;
    project
        .ticking("the job is refused", || async {
            project.row(dear).await["status"] == "failed"
        })
        .await;
    let row = project.row(dear).await;
    assert!(
        row["error_message"].as_str().unwrap().contains("[JOB_TOO_EXPENSIVE]"),
        "{row:#}"
    );
    assert_eq!(project.runs(dear), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_key_is_in_no_file_of_the_server_but_pg_nets_and_vaults_own() {
    let server = PrivateServer::start(&Options::default()).unwrap();
    let database = Database::at(server.create_database("push").await.unwrap()).await;
    database.owner.batch_execute(STAND_IN).await.unwrap();
    database.owner.batch_execute(SCHEMA).await.unwrap();
    let project = Project::on(database).await;
    let job = project.world.job(10, 1).await;
    let _carrier = project.carrier().await;
    project.sent(job).await;
    let owner = &project.world.database.owner;
    owner.batch_execute("checkpoint").await.unwrap();
    let own = "select pg_relation_filepath(oid) from pg_class where relnamespace in ('net'::regnamespace, 'vault'::regnamespace)
                and relkind in ('r', 'i', 't')
               union select pg_relation_filepath(reltoastrelid) from pg_class
                where relnamespace in ('net'::regnamespace, 'vault'::regnamespace) and reltoastrelid <> 0";
    let own: Vec<Option<String>> = owner
        .query(own, &[])
        .await
        .unwrap()
        .iter()
        .map(|row| row.get(0))
        .collect();
    let mut found = Vec::new();
    holding(&server.folder().join("data/base"), CANARY_KEY.as_bytes(), &mut found);
    let foreign: Vec<_> = found
        .iter()
        .filter(|path| {
            let path = path.display().to_string();
            !own.iter().flatten().any(|known| path.ends_with(known.as_str()))
        })
        .collect();
    assert!(foreign.is_empty(), "{foreign:?}");
    let log = std::fs::read_to_string(server.folder().join("server.log")).unwrap();
    assert!(!log.contains(CANARY_KEY));
}

/// Files below a folder that hold some bytes.
fn holding(folder: &std::path::Path, bytes: &[u8], found: &mut Vec<std::path::PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap().flatten() {
        let path = entry.path();
        if path.is_dir() {
            holding(&path, bytes, found);
        } else if std::fs::read(&path).is_ok_and(|content| content.windows(bytes.len()).any(|window| window == bytes)) {
            found.push(path);
        }
    }
}
