//! The runner: handlers as a process that survives what happens to processes.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use brightrun_queue::private_server::{Options, PrivateServer};
use brightrun_queue::{
    Blame, CancelReply, Ending, Handler, JobContext, JobFailure, JobState, NewJob, Queue, QueueConfig, Runner,
    RunnerConfig, RunnerReport, StopReason,
};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::support::{database, engine_section, eventually, long_text};

/// Does what the payload says, and tells the test that it has begun.
struct Obedient {
    begun: mpsc::UnboundedSender<JobContext>,
}

#[async_trait]
impl Handler for Obedient {
    async fn run(&self, context: JobContext) -> Ending {
        let _ = self.begun.send(context.clone());
        match context.payload()["do"].as_str() {
            Some("panic") => panic!("as told"),
            Some("fail") => Ending::Fail(JobFailure::new(Blame::User, "TEST", "as told")),
            Some("snooze") => Ending::Snooze(Duration::from_secs(3600), "as told".into()),
            Some("wait") => match context.stop().stopped().await {
                StopReason::Shutdown => Ending::Release("shutdown".into()),
                reason => Ending::Complete(json!({"stopped": format!("{reason:?}")})),
            },
            Some("never end") => std::future::pending().await,
            Some("too large a result") => Ending::Complete(json!(long_text())),
            _ => Ending::Complete(json!({"ok": true})),
        }
    }
}

/// Intervals short enough for a test, on a lease long enough for a loaded machine.
fn quick() -> RunnerConfig {
    RunnerConfig {
        slots: 4,
        lease: Duration::from_secs(60),
        heartbeat: Duration::from_millis(50),
        poll: Duration::from_millis(50),
        sweep: Duration::from_millis(100),
        drain: Duration::from_secs(20),
        ..RunnerConfig::default()
    }
}

struct Started {
    begun: mpsc::UnboundedReceiver<JobContext>,
    shutdown: CancellationToken,
    task: JoinHandle<RunnerReport>,
}

impl Started {
    async fn next(&mut self) -> JobContext {
        tokio::time::timeout(Duration::from_secs(60), self.begun.recv())
            .await
            .expect("a job begins")
            .unwrap()
    }

    async fn stop(self) -> RunnerReport {
        self.shutdown.cancel();
        tokio::time::timeout(Duration::from_secs(60), self.task)
            .await
            .expect("the runner ends")
            .unwrap()
    }
}

fn start(queue: &Queue, config: RunnerConfig) -> Started {
    let (sender, begun) = mpsc::unbounded_channel();
    let runner = Runner::new(queue.clone(), config).handler("work", Obedient { begun: sender });
    let shutdown = CancellationToken::new();
    let token = shutdown.clone();
    let task = tokio::spawn(async move { runner.run(token).await.unwrap() });
    Started { begun, shutdown, task }
}

async fn enqueue(queue: &Queue, what: &str) -> Uuid {
    queue.enqueue(&NewJob::new("work", json!({"do": what}))).await.unwrap()
}

async fn ended(queue: &Queue, id: Uuid, state: JobState) {
    eventually(&format!("job is {state}"), || async {
        let status = queue.status(id).await.ok()??;
        (status.state == state).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backlog_larger_than_the_slots_is_worked_off_and_the_runner_ends_when_idle() {
    let db = database().await;
    for _ in 0..25 {
        enqueue(&db.queue, "").await;
    }
    // A poll this long would show if a non-empty claim were not followed by another at once.
    let config = RunnerConfig {
        until_idle: true,
        poll: Duration::from_secs(3600),
        listen: false,
        ..quick()
    };
    let started = start(&db.queue, config);
    let report = tokio::time::timeout(Duration::from_secs(60), started.task)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(
        report,
        RunnerReport {
            claimed: 25,
            given_up: 0
        }
    );
    assert_eq!(
        db.queue.jobs(None, Some(JobState::Completed), 100).await.unwrap().len(),
        25
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn each_ending_reaches_the_engine() {
    let db = database().await;
    let started = start(&db.queue, quick());
    for (what, state) in [
        ("", JobState::Completed),
        ("fail", JobState::Failed),
        ("snooze", JobState::Scheduled),
        ("panic", JobState::Scheduled),
        ("too large a result", JobState::Scheduled),
    ] {
        let id = enqueue(&db.queue, what).await;
        ended(&db.queue, id, state).await;
        let error = db.queue.status(id).await.unwrap().unwrap().error;
        match what {
            "panic" => {
                let error = error.unwrap();
                assert_eq!(
                    (&error["code"], &error["blame"]),
                    (&json!("INTERNAL_PANIC"), &json!("system"))
                );
                assert!(error["message"].as_str().unwrap().contains("as told"));
            }
            "too large a result" => assert_eq!(error.unwrap()["code"], "QUEUE_ENDING_REFUSED"),
            _ => {}
        }
    }
    started.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_reaches_the_handler_with_its_reason() {
    let db = database().await;
    let mut started = start(&db.queue, quick());
    let id = enqueue(&db.queue, "wait").await;
    let context = started.next().await;
    assert_eq!(
        db.queue.cancel(id, Some("enough")).await.unwrap(),
        CancelReply::Requested
    );
    ended(&db.queue, id, JobState::Cancelled).await;
    assert_eq!(
        context.stop().requested(),
        Some(StopReason::Cancel(Some("enough".into())))
    );
    started.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_is_delivered_by_notification_long_before_the_next_heartbeat() {
    let db = database().await;
    let config = RunnerConfig {
        heartbeat: Duration::from_secs(3600),
        poll: Duration::from_secs(3600),
        ..quick()
    };
    let mut started = start(&db.queue, config);
    // With an hour between polls only a notification can bring the job, so listening has begun.
    let id = eventually("the runner listens", || async {
        let listening = db
            .client()
            .await
            .query(
                "select from pg_stat_activity where datname = current_database() and query like 'listen%'",
                &[],
            )
            .await
            .unwrap();
        (!listening.is_empty()).then_some(())
    })
    .await;
    let () = id;
    let id = enqueue(&db.queue, "wait").await;
    started.next().await;
    db.queue.cancel(id, None).await.unwrap();
    ended(&db.queue, id, JobState::Cancelled).await;
    started.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handler_whose_lease_was_lost_is_stopped_and_its_ending_is_not_written() {
    let db = database().await;
    let mut started = start(&db.queue, quick());
    let id = enqueue(&db.queue, "wait").await;
    let context = started.next().await;
    // Somebody else gets the job: here, by hand, as a rescue would.
    db.queue.release(&context.lease(), None).await.unwrap();
    eventually("the handler is told", || async {
        context.stop().is_lost().then_some(())
    })
    .await;
    // The job waits again, so the same runner takes it again, under a new token.
    let again = started.next().await;
    assert_eq!(again.lease().job_id, id);
    assert!(again.lease().token > context.lease().token);
    let report = started.stop().await;
    assert_eq!(report.claimed, 2);
    assert_eq!(db.state(id).await, "ready");
}

#[tokio::test(flavor = "multi_thread")]
async fn shutdown_gives_running_jobs_back_uncounted_with_their_progress() {
    let db = database().await;
    let mut started = start(&db.queue, quick());
    let id = enqueue(&db.queue, "wait").await;
    started.next().await.progress(json!({"step": 7}));
    assert_eq!(
        started.stop().await,
        RunnerReport {
            claimed: 1,
            given_up: 0
        }
    );
    let status = db.queue.status(id).await.unwrap().unwrap();
    assert_eq!((status.state, status.attempt), (JobState::Ready, 0));
    assert_eq!(status.progress, Some(json!({"step": 7})));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handler_that_does_not_stop_is_given_up_and_its_job_given_back() {
    let db = database().await;
    let mut started = start(
        &db.queue,
        RunnerConfig {
            drain: Duration::from_millis(100),
            ..quick()
        },
    );
    let id = enqueue(&db.queue, "never end").await;
    started.next().await;
    assert_eq!(
        started.stop().await,
        RunnerReport {
            claimed: 1,
            given_up: 1
        }
    );
    let status = db.queue.status(id).await.unwrap().unwrap();
    assert_eq!((status.state, status.attempt), (JobState::Ready, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn polling_alone_finds_work_that_nobody_announced() {
    let db = database().await;
    let mut started = start(
        &db.queue,
        RunnerConfig {
            listen: false,
            ..quick()
        },
    );
    db.client()
        .await
        .execute("select brightrun.enqueue('work')", &[])
        .await
        .unwrap();
    started.next().await;
    started.stop().await;
}

/// Computes on the only thread of the shared runtime until it is told that beats have gone out.
struct Selfish {
    url: String,
}

#[async_trait]
impl Handler for Selfish {
    async fn run(&self, context: JobContext) -> Ending {
        let (url, lease) = (self.url.clone(), context.lease());
        context.progress(json!({"seen": true}));
        // A thread of its own looks at the database; this one, the runtime's only one, blocks on it.
        let beaten = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async {
                let queue = Queue::connect(&QueueConfig::new(&url).unwrap()).await.unwrap();
                eventually("a heartbeat arrives", || async {
                    queue.status(lease.job_id).await.unwrap().unwrap().progress
                })
                .await
            })
        })
        .join();
        match beaten {
            Ok(progress) => Ending::Complete(progress),
            Err(_) => Ending::Fail(JobFailure::new(Blame::User, "TEST", "no heartbeat came")),
        }
    }
}

#[tokio::test(flavor = "current_thread")]
async fn heartbeats_go_out_while_a_handler_blocks_the_runtime() {
    let db = database().await;
    let id = enqueue(&db.queue, "").await;
    let config = RunnerConfig {
        until_idle: true,
        ..quick()
    };
    let runner = Runner::new(db.queue.clone(), config).handler("work", Selfish { url: db.url.clone() });
    runner.run(CancellationToken::new()).await.unwrap();
    assert_eq!(
        db.queue.status(id).await.unwrap().unwrap().result,
        Some(json!({"seen": true}))
    );
}

/// Runs through a restart of the database: waits until told, then reports and completes.
struct Patient {
    begun: mpsc::UnboundedSender<()>,
    go_on: Arc<tokio::sync::Notify>,
    runs: Arc<AtomicUsize>,
}

#[async_trait]
impl Handler for Patient {
    async fn run(&self, context: JobContext) -> Ending {
        self.runs.fetch_add(1, Ordering::SeqCst);
        let _ = self.begun.send(());
        self.go_on.notified().await;
        if let Err(error) = context.report("phase", &json!({"after": "outage"})).await {
            return Ending::Fail(JobFailure::new(Blame::User, "TEST", error.to_string()));
        }
        Ending::Complete(json!({"attempt": context.job().attempt}))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_runs_on_through_a_crash_of_the_database_and_delivers_afterwards() {
    let mut server = PrivateServer::start(&Options {
        durable: true,
        ..Options::default()
    })
    .unwrap();
    let url = server.create_database("chaos").await.unwrap();
    let queue = Queue::connect(&QueueConfig::new(&url).unwrap()).await.unwrap();
    queue.migrate(&engine_section()).await.unwrap();
    let (sender, mut begun) = mpsc::unbounded_channel();
    let (go_on, runs) = (Arc::new(tokio::sync::Notify::new()), Arc::new(AtomicUsize::new(0)));
    let handler = Patient {
        begun: sender,
        go_on: go_on.clone(),
        runs: runs.clone(),
    };
    // Leases shorter than the outage: only the grace rule keeps the job from being taken away.
    let config = RunnerConfig {
        lease: Duration::from_secs(2),
        ..quick()
    };
    let shutdown = CancellationToken::new();
    let runner = Runner::new(queue.clone(), config).handler("work", handler);
    let task = tokio::spawn({
        let token = shutdown.clone();
        async move { runner.run(token).await.unwrap() }
    });
    let id = queue.enqueue(&NewJob::new("work", Value::Null)).await.unwrap();
    begun.recv().await.unwrap();

    let server = tokio::task::spawn_blocking(move || {
        server.halt_immediate().unwrap();
        server
    })
    .await
    .unwrap();
    assert!(queue.status(id).await.unwrap_err().is_transient());
    // The handler goes on while there is no database: its report and its ending have to wait.
    go_on.notify_one();
    // The length of the outage, longer than a lease; nothing is awaited here.
    tokio::time::sleep(Duration::from_secs(3)).await;
    let server = tokio::task::spawn_blocking(move || {
        let mut server = server;
        server.resume().unwrap();
        server
    })
    .await
    .unwrap();

    ended(&queue, id, JobState::Completed).await;
    let status = queue.status(id).await.unwrap().unwrap();
    assert_eq!(status.result, Some(json!({"attempt": 1})));
    assert_eq!(runs.load(Ordering::SeqCst), 1, "it ran once");
    let events: Vec<String> = queue
        .events(id, 0)
        .await
        .unwrap()
        .into_iter()
        .map(|event| event.event)
        .collect();
    assert!(events.contains(&"phase".to_owned()), "{events:?}");

    // And the runner itself is as good as new.
    let next = queue.enqueue(&NewJob::new("work", Value::Null)).await.unwrap();
    begun.recv().await.unwrap();
    go_on.notify_one();
    ended(&queue, next, JobState::Completed).await;
    shutdown.cancel();
    task.await.unwrap();
    drop(server);
}

struct OneAtATime {
    go: CancellationToken,
    entered: Arc<std::sync::atomic::AtomicUsize>,
}

#[async_trait::async_trait]
impl Handler for OneAtATime {
    async fn run(&self, _: JobContext) -> Ending {
        self.entered.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        self.go.cancelled().await;
        Ending::Complete(json!({}))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn prefetched_jobs_wait_for_a_slot_and_go_back_uncounted() {
    let db = database().await;
    for _ in 0..6 {
        db.enqueue("work").await;
    }
    let (shutdown, go) = (CancellationToken::new(), CancellationToken::new());
    let entered = Arc::<std::sync::atomic::AtomicUsize>::default();
    let handler = OneAtATime {
        go: go.clone(),
        entered: entered.clone(),
    };
    let config = RunnerConfig {
        slots: 1,
        prefetch: 3,
        ..quick()
    };
    let runner = tokio::spawn(
        Runner::new(db.queue.clone(), config)
            .handler("work", handler)
            .run(shutdown.clone()),
    );
    eventually("one runs and three wait here", || async {
        let running: i64 = db.queue.stats().await.unwrap().iter().map(|kind| kind.running).sum();
        (running == 4 && entered.load(std::sync::atomic::Ordering::SeqCst) > 0).then_some(())
    })
    .await;
    shutdown.cancel();
    eventually("those that wait are given back while the one still runs", || async {
        let running: i64 = db.queue.stats().await.unwrap().iter().map(|kind| kind.running).sum();
        (running == 1).then_some(())
    })
    .await;
    go.cancel();
    assert_eq!(runner.await.unwrap().unwrap().given_up, 0);
    assert_eq!(entered.load(std::sync::atomic::Ordering::SeqCst), 1);
    let waiting = db.queue.jobs(Some("work"), Some(JobState::Ready), 10).await.unwrap();
    assert_eq!(waiting.iter().map(|job| job.attempt).collect::<Vec<_>>(), [0; 5]);
}
