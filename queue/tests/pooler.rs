//! Everything but listening works through a pooler that gives each transaction another connection.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use brightrun_queue::private_server::{Options, PrivateServer};
use brightrun_queue::{
    BatchJob, Ending, Handler, JobContext, JobFailure, JobState, LaneConfig, LaneHandler, LaneRunner, NewJob, Queue,
    QueueConfig, Runner, RunnerConfig,
};
use serde_json::{Value, json};
use tokio_postgres::NoTls;
use tokio_util::sync::CancellationToken;

/// A pgbouncer in transaction mode before a private server.
struct Pooler {
    process: Child,
    port: u16,
    folder: tempfile::TempDir,
    server: PrivateServer,
}

impl Drop for Pooler {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn program() -> Option<&'static str> {
    ["pgbouncer", "/usr/sbin/pgbouncer", "/usr/local/bin/pgbouncer"]
        .into_iter()
        .find(|program| {
            Command::new(program)
                .arg("--version")
                .output()
                .is_ok_and(|output| output.status.success())
        })
}

impl Pooler {
    /// `None`, with a printed word, where pgbouncer is not installed.
    async fn start() -> Option<Self> {
        let Some(program) = program() else {
            println!("skipped: pgbouncer is not installed (apt-get install pgbouncer)");
            return None;
        };
        let server = PrivateServer::start(&Options {
            loopback: true,
            ..Options::default()
        })
        .unwrap();
        let direct = QueueConfig::new(&server.loopback_url("postgres").unwrap()).unwrap();
        let password = server.loopback_url("postgres").unwrap();
        let password = password
            .split(':')
            .nth(2)
            .unwrap()
            .split('@')
            .next()
            .unwrap()
            .to_owned();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let folder = tempfile::tempdir().unwrap();
        let settings = folder.path().join("pgbouncer.ini");
        // Three server connections for many clients: each transaction of a client is likely to get another one.
        std::fs::write(
            &settings,
            format!(
                "[databases]\n* = host=127.0.0.1 port={} user=postgres password={password}\n[pgbouncer]\nlisten_addr = 127.0.0.1\n\
                 listen_port = {port}\nunix_socket_dir =\nauth_type = any\npool_mode = transaction\ndefault_pool_size = 3\nmax_client_conn = 100\n\
                 server_reset_query =\nlogfile =\npidfile =\n",
                direct.place().port
            ),
        )
        .unwrap();
        let mut command = Command::new(program);
        // It refuses to run as root.
        if std::fs::metadata("/proc/self").is_ok_and(|own| std::os::unix::fs::MetadataExt::uid(&own) == 0) {
            std::fs::set_permissions(folder.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
            command.args(["-u", "nobody"]);
        }
        let process = command
            .arg(&settings)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let pooler = Self {
            process,
            port,
            folder,
            server,
        };
        let deadline = Instant::now() + Duration::from_secs(30);
        while tokio_postgres::connect(&pooler.url("postgres"), NoTls).await.is_err() {
            assert!(
                Instant::now() < deadline,
                "pgbouncer does not answer ({})",
                pooler.folder.path().display()
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Some(pooler)
    }

    fn url(&self, database: &str) -> String {
        format!("postgresql://postgres@127.0.0.1:{}/{database}", self.port)
    }

    /// A database with the engine, reached through the pooler.
    async fn queue(&self) -> Queue {
        let name = format!("pooled_{}", uuid::Uuid::new_v4().simple());
        let direct = self.server.create_database(&name).await.unwrap();
        let file = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../schema.sql")).unwrap();
        let section = &file[file.find("-- >>> engine").unwrap()..file.find("-- <<< engine").unwrap()];
        let direct = Queue::connect(&QueueConfig::new(&direct).unwrap()).await.unwrap();
        direct.migrate(section).await.unwrap();
        Queue::connect(&QueueConfig::new(&self.url(&name)).unwrap().pool_size(8))
            .await
            .unwrap()
    }
}

struct Count(Arc<AtomicUsize>);

#[async_trait::async_trait]
impl Handler for Count {
    async fn run(&self, context: JobContext) -> Ending {
        context.progress(json!({"step": 1}));
        context.report("note", &json!({})).await.unwrap();
        context.checkpoint(&json!({"step": 1})).await.unwrap();
        if context.job().attempt == 1 && self.0.fetch_add(1, Ordering::Relaxed).is_multiple_of(10) {
            return Ending::Snooze(Duration::from_millis(1), "later".into());
        }
        Ending::Complete(json!({}))
    }
}

#[async_trait::async_trait]
impl LaneHandler for Count {
    async fn run(&self, _: &BatchJob) -> Result<(), JobFailure> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_lanes_cancels_and_heartbeats_work_through_a_transaction_pooler() {
    let Some(pooler) = Pooler::start().await else { return };
    let queue = pooler.queue().await;
    let template = NewJob {
        max_attempts: 5,
        ..NewJob::new("work", Value::Null)
    };
    let mut ids = queue.enqueue_many(&template, &vec![json!({}); 100]).await.unwrap();
    ids.push(queue.enqueue(&template).await.unwrap());
    let mut client = queue.client().await.unwrap();
    let transaction = client.transaction().await.unwrap();
    ids.push(queue.enqueue_in(&transaction, &template).await.unwrap());
    transaction.commit().await.unwrap();
    drop(client);
    let cancelled = ids.remove(0);
    queue.cancel(cancelled, None).await.unwrap();
    let shutdown = CancellationToken::new();
    let mut runners = tokio::task::JoinSet::new();
    for _ in 0..3 {
        let habits = RunnerConfig {
            slots: 4,
            listen: false,
            heartbeat: Duration::from_millis(20),
            poll: Duration::from_millis(20),
            ..RunnerConfig::default()
        };
        runners.spawn(
            Runner::new(queue.clone(), habits)
                .handler("work", Count(Arc::default()))
                .run(shutdown.clone()),
        );
    }
    let deadline = Instant::now() + Duration::from_secs(120);
    while queue
        .jobs(Some("work"), Some(JobState::Completed), 1000)
        .await
        .unwrap()
        .len()
        < ids.len()
    {
        assert!(Instant::now() < deadline, "{:?}", queue.stats().await.unwrap());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    shutdown.cancel();
    for report in runners.join_all().await {
        assert_eq!(report.unwrap().given_up, 0);
    }
    assert_eq!(
        queue.status(cancelled).await.unwrap().unwrap().state,
        JobState::Cancelled
    );
    assert_eq!(queue.violations().await.unwrap(), vec![]);

    let lane = queue.lane("quick");
    lane.push_many(&vec![json!({}); 3000], None).await.unwrap();
    let count = Arc::new(AtomicUsize::new(0));
    let habits = LaneConfig {
        listen: false,
        until_idle: true,
        ..LaneConfig::default()
    };
    let report = LaneRunner::new(lane, habits, Count(count.clone()))
        .run(CancellationToken::new())
        .await
        .unwrap();
    assert_eq!((report.ended, count.load(Ordering::Relaxed)), (3000, 3000));
}

/// What is lost there, so that nobody wonders: a wake-up. Polling finds the job.
#[tokio::test(flavor = "multi_thread")]
async fn a_runner_that_listens_through_a_pooler_still_finds_its_work_by_polling() {
    let Some(pooler) = Pooler::start().await else { return };
    let queue = pooler.queue().await;
    let shutdown = CancellationToken::new();
    let habits = RunnerConfig {
        listen: true,
        poll: Duration::from_millis(100),
        ..RunnerConfig::default()
    };
    let runner = tokio::spawn(
        Runner::new(queue.clone(), habits)
            .handler("work", Count(Arc::new(AtomicUsize::new(1))))
            .run(shutdown.clone()),
    );
    let id = queue.enqueue(&NewJob::new("work", json!({}))).await.unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while queue.status(id).await.unwrap().unwrap().state != JobState::Completed {
        assert!(Instant::now() < deadline, "it was not found");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    shutdown.cancel();
    runner.await.unwrap().unwrap();
}
