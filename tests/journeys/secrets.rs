//! Planted secrets turn up in no row, no log and no file.

use std::fs;
use std::path::Path;
use std::process::{Child, Command};

use brightrun_queue::private_server::{Options, PrivateServer};
use brightrun_worker::orchestrator::settings::EndpointSettings;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use uuid::Uuid;

use crate::database::{Database, SCHEMA, eventually};
use crate::fake_runpod::FakeRunPod;
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

/// A server whose logins need passwords, a stage on it, and an address whose password is planted.
async fn planted() -> (PrivateServer, World, String) {
    let server = PrivateServer::start(&Options {
        loopback: true,
        ..Options::default()
    })
    .unwrap();
    let database = Database::at(server.create_database("journey").await.unwrap()).await;
    database.owner.batch_execute(SCHEMA).await.unwrap();
    let login = format!("create role canary_login login password '{CANARY}' in role brightrun_worker");
    database.owner.batch_execute(&login).await.unwrap();
    let world = World::at(database).await;
    let trusted = server.loopback_url("journey").unwrap();
    let url = format!(
        "postgresql://canary_login:{CANARY}{}",
        &trusted[trusted.rfind('@').unwrap()..]
    );
    (server, world, url)
}

#[tokio::test(flavor = "multi_thread")]
async fn secrets_reach_no_row_no_log_and_no_file() {
    let (server, mut world, url) = planted().await;
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

/// A process that ends with the test.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _gone = self.0.kill();
        let _reaped = self.0.wait();
    }
}

impl Process {
    /// Starts the program with every secret planted and all it says in a file; cores would be allowed, if it let them.
    fn start(world: &World, arguments: &[&str], url: &str, more: &[(&str, &str)], log: &str) -> Self {
        let program = world.brightrun(arguments);
        let mut command = Command::new("sh");
        command
            .args(["-c", "ulimit -c unlimited 2>/dev/null; exec \"$@\"", "sh"])
            .arg(program.get_program())
            .args(program.get_args())
            .current_dir(world.folder.path());
        for (name, value) in program.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        for name in VARIABLES {
            command.env(name, CANARY);
        }
        let log = fs::File::create(world.folder.path().join(log)).unwrap();
        command
            .env("DATABASE_URL", url)
            .env("RUST_LOG", "trace")
            .env("BRIGHTRUN_WEBHOOK_SECRET", CANARY)
            .envs(more.iter().copied())
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        Self(command.spawn().unwrap())
    }

    fn dies_of(mut self, signal: Signal) {
        kill_process(Pid::from_child(&self.0), signal).unwrap();
        self.0.wait().unwrap();
    }

    fn limits(&self) -> String {
        fs::read_to_string(format!("/proc/{}/limits", self.0.id())).unwrap()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn secrets_of_an_orchestrator_and_a_runpod_worker_reach_no_row_no_log_no_result_no_core_and_no_file() {
    let (server, mut world, url) = planted().await;
    let plane = FakeRunPod::start();
    world.config.orchestrator.api_base = plane.api();
    world.config.orchestrator.poll_seconds = 1;
    // Nobody listens there: the webhook is signed, sent and not accepted.
    world.config.orchestrator.webhook_url = "http://127.0.0.1:1/hook?token=canary-not-a-secret-7f3a".to_owned();
    world.config.orchestrator.endpoints = vec![EndpointSettings {
        id: "ep1".to_owned(),
        gpu_types: Vec::new(),
        max_jobs: 4,
    }];
    let orchestrator = Process::start(&world, &["orchestrate"], &url, &[], "orchestrator.log");
    let variables = plane.variables();
    let mut of_platform: Vec<(&str, &str)> = variables
        .iter()
        .map(|(name, value)| (name.as_str(), value.as_str()))
        .collect();
    of_platform.extend([
        ("RUNPOD_AI_API_KEY", CANARY),
        ("RUNPOD_ENDPOINT_SECRET", CANARY),
        ("RUNPOD_LOG_LEVEL", "TRACE"),
        ("RUNPOD_ENDPOINT_ID", "ep1"),
    ]);
    let worker = Process::start(&world, &["worker"], &url, &of_platform, "worker.log");
    let good = world.job(4, 1).await;
    world.becomes(good, "completed").await;
    let bad = world.insert(Uuid::new_v4(), settings(1)).await;
    world.becomes(bad, "failed").await;
    // A job with credentials of its client's, which names its key where it should not.
    plane.queue([json!({
        "id": "whole-e1", "input": {"job_id": format!("not a job but {CANARY}"), "token": CANARY},
        "s3Config": {"accessId": CANARY, "accessSecret": CANARY}, "webhook": format!("https://c.example/h?key={CANARY}"),
    })]);
    let (plane, refused) = tokio::task::spawn_blocking(move || {
        let refused = plane.result("whole-e1");
        (plane, refused)
    })
    .await
    .unwrap();
    assert!(
        refused["error"].is_string() && !refused.to_string().contains(CANARY),
        "{refused}"
    );
    eventually("the webhook was tried", || async {
        let log = fs::read_to_string(world.folder.path().join("orchestrator.log")).unwrap();
        log.contains("a webhook was not accepted")
    })
    .await;
    for process in [&orchestrator, &worker] {
        let limits = process.limits();
        let cores = limits
            .lines()
            .find(|line| line.starts_with("Max core file size"))
            .unwrap();
        assert_eq!(
            cores.split_whitespace().skip(4).take(2).collect::<Vec<_>>(),
            ["0", "0"],
            "{cores}"
        );
    }
    worker.dies_of(Signal::ABORT);
    orchestrator.dies_of(Signal::ABORT);

    for log in ["worker.log", "orchestrator.log"] {
        let text = fs::read_to_string(world.folder.path().join(log)).unwrap();
        assert!(text.lines().count() > 20, "nothing was logged: {text}");
    }
    // The keys were used: what is sent to RunPod carries them, in one header and nowhere else.
    let requests = plane.requests();
    assert!(
        requests
            .iter()
            .any(|request| request.header("authorization") == Some(CANARY))
    );
    assert!(
        requests
            .iter()
            .any(|request| request.header("authorization") == Some(&format!("Bearer {CANARY}")))
    );
    for request in &requests {
        let body = String::from_utf8_lossy(&request.body);
        assert!(
            !request.target.contains(CANARY) && !body.contains(CANARY),
            "{} {body}",
            request.target
        );
    }
    let mut files = Vec::new();
    tainted_files(world.folder.path(), &mut files);
    // The settings hold the webhook's address, as their owner wrote it.
    files.retain(|file| file.file_name().is_none_or(|name| name != "brightrun.toml"));
    assert!(files.is_empty(), "{files:?}");
    assert_eq!(tainted_tables(&world.database).await, Vec::<String>::new());
    drop(world);
    server.stop().unwrap();
}
