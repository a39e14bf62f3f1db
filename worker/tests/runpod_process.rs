//! The serverless worker as a process of its own: signals, exit codes, kills, and what it writes to standard output.
//!
//! The program starts itself again as the worker (`--as-worker`), so that what is killed is a process and not a thread; it needs a `main`
//! and reads the usual filter argument.
#![allow(clippy::unwrap_used, clippy::panic)]

#[path = "../../tests/support/fake_runpod.rs"]
mod fake_runpod;
#[path = "../../tests/support/runpod_worker.rs"]
mod support;

use std::io::Read;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use brightrun_worker::runpod::local::listen;
use brightrun_worker::runpod::{
    DrainMode, Environment, LocalApi, LocalFlags, LocalOptions, LogLayer, OutputForm, Settings, Worker,
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use fake_runpod::{CANARY_KEY, FakeRunPod, PATIENCE, Route, Step};
use support::{Mock, settings};

const TESTS: [(&str, fn()); 12] = [
    ("h08_a_killed_worker_is_silent", h08_a_killed_worker_is_silent),
    ("x01_an_idle_worker_leaves_at_once", x01_an_idle_worker_leaves_at_once),
    (
        "x02_a_job_is_finished_after_the_signal",
        x02_a_job_is_finished_after_the_signal,
    ),
    (
        "x03_a_job_is_interrupted_in_checkpoint_mode",
        x03_a_job_is_interrupted_in_checkpoint_mode,
    ),
    (
        "x05_the_second_signal_ends_the_process",
        x05_the_second_signal_ends_the_process,
    ),
    ("x06_sigint_is_like_sigterm", x06_sigint_is_like_sigterm),
    (
        "f01_an_unfit_worker_exits_with_an_error",
        f01_an_unfit_worker_exits_with_an_error,
    ),
    (
        "l01_every_line_is_json_with_three_keys_even_after_a_panic",
        l01_every_line_is_json_with_three_keys_even_after_a_panic,
    ),
    (
        "t04_what_is_expected_is_no_trouble_in_the_log",
        t04_what_is_expected_is_no_trouble_in_the_log,
    ),
    (
        "t19_a_take_address_of_another_form_is_warned_of_once",
        t19_a_take_address_of_another_form_is_warned_of_once,
    ),
    (
        "z01_of_thousands_of_jobs_under_faults_each_has_one_accepted_result",
        z01_of_thousands_of_jobs_under_faults_each_has_one_accepted_result,
    ),
    (
        "l02_l03_lines_are_cut_and_hold_no_key",
        l02_l03_lines_are_cut_and_hold_no_key,
    ),
];

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.iter().any(|argument| argument == "--as-worker") {
        std::process::exit(i32::from(work()));
    }
    if arguments.iter().any(|argument| argument == "--rp_serve_api") {
        return serve(&arguments);
    }
    let is_listing = arguments.iter().any(|argument| argument == "--list");
    let is_exact = arguments.iter().any(|argument| argument == "--exact");
    let filters: Vec<&String> = arguments.iter().filter(|argument| !argument.starts_with('-')).collect();
    let fits = |name: &str| {
        filters.is_empty()
            || filters.iter().any(|filter| {
                if is_exact {
                    name == *filter
                } else {
                    name.contains(filter.as_str())
                }
            })
    };
    for (name, test) in TESTS.iter().filter(|(name, _)| fits(name)) {
        if is_listing {
            println!("{name}: test");
            continue;
        }
        // A panic ends the program with an error, which is this test's verdict.
        test();
        println!("test {name} ... ok");
    }
}

/// The worker process.
fn work() -> u8 {
    let variables = Environment::variables();
    let environment = Environment::read(&variables).unwrap();
    let layer = LogLayer::new(
        std::io::stdout,
        environment.redactor.clone(),
        environment.endpoint.is_some(),
    );
    tracing_subscriber::registry()
        .with(environment.log_level)
        .with(layer)
        .init();
    LogLayer::catch_panics();
    let defaults = Settings {
        handle_signals: true,
        concurrency: variables
            .get("TEST_CONCURRENCY")
            .map_or(1, |count| count.parse().unwrap()),
        ..settings()
    };
    let settings = defaults.with_variables(&variables).unwrap();
    assert_eq!(
        settings.drain == DrainMode::Checkpoint,
        variables.get("DRAIN_MODE").is_some_and(|mode| mode == "checkpoint")
    );
    let jobs = tokio::runtime::Runtime::new().unwrap();
    let handler = Arc::new(Loud(Mock::default()));
    let mut worker = Worker::new(environment, settings);
    if let Some(reason) = variables.get("TEST_UNFIT").cloned() {
        worker = worker.check("test", move || async move { Err(reason) });
    }
    let exit = worker.run(handler, jobs.handle().clone());
    // A handler that cannot be stopped is not waited for.
    jobs.shutdown_background();
    exit.code
}

/// The local API as a process, with the flags of RunPod's SDK, for `tests/support/runpod_client.py`. Jobs that wait are never let go.
fn serve(arguments: &[String]) {
    let (flags, rest) = LocalFlags::parse(arguments.iter().cloned()).unwrap();
    let form = match rest.iter().any(|argument| argument == "--stream") {
        true => OutputForm::Stream { aggregate: true },
        false => OutputForm::Value,
    };
    let options = LocalOptions {
        slots: flags.concurrency,
        compatibility: flags.compatibility,
        ..LocalOptions::default()
    };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let api = LocalApi::new(
            Arc::new(Mock {
                form,
                ..Mock::default()
            }),
            options,
        )
        .unwrap();
        let listener = listen(&flags.host, flags.port).await.unwrap();
        println!("{}", listener.local_addr().unwrap());
        api.serve(listener, std::future::pending()).await.unwrap();
    });
}

/// The usual test handler, which also writes its input's `log` to the log.
struct Loud(Mock);

#[async_trait::async_trait]
impl brightrun_worker::runpod::Handler for Loud {
    async fn run(
        &self,
        job: brightrun_worker::runpod::RunPodJob,
        context: brightrun_worker::runpod::JobContext,
    ) -> brightrun_worker::error::Result<Value> {
        if let Some(line) = job.input["log"].as_str() {
            tracing::info!("{line}");
        }
        self.0.run(job, context).await
    }
}

/// A worker process that ends with the test.
struct Process {
    child: Child,
}

impl Process {
    fn start(plane: &FakeRunPod, more: &[(&str, &str)]) -> Self {
        let child = Command::new(std::env::current_exe().unwrap())
            .arg("--as-worker")
            .env_clear()
            .envs(plane.variables())
            .env("RUNPOD_ENDPOINT_ID", "ep1")
            .envs(more.iter().copied())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        Self { child }
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    fn exit(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "the worker does not leave");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits for the end and returns all lines.
    fn lines(mut self) -> Vec<String> {
        let mut text = String::new();
        self.child.stdout.take().unwrap().read_to_string(&mut text).unwrap();
        self.exit();
        text.lines().map(str::to_owned).collect()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _may_have_left = self.child.kill();
        let _may_have_left = self.child.wait();
    }
}

fn busy(plane: &FakeRunPod, input: Value) {
    plane.job("job-1", input);
    plane.eventually("a heartbeat with the job", |requests| {
        requests.iter().any(|request| request.pinged() == ["job-1"])
    });
}

fn h08_a_killed_worker_is_silent() {
    let plane = FakeRunPod::start();
    let mut process = Process::start(&plane, &[]);
    busy(&plane, json!({"wait": true}));
    process.signal(Signal::KILL);
    process.exit();
    let before = plane.requests().len();
    // Another worker's heartbeats measure the time.
    let witness_plane = FakeRunPod::start();
    let _witness = support::start(&witness_plane, Mock::default(), settings());
    witness_plane.more(Route::Ping, 3);
    assert_eq!(plane.requests().len(), before, "{}", plane.trace());
}

fn x01_an_idle_worker_leaves_at_once() {
    let plane = FakeRunPod::start();
    let mut process = Process::start(&plane, &[]);
    plane.some(Route::Take);
    plane.some(Route::Stop);
    let told = Instant::now();
    process.signal(Signal::TERM);
    assert_eq!(process.exit().code(), Some(0));
    // Both long polls are open for as long as the test lasts; without closing them the worker would wait 90 s.
    assert!(told.elapsed() < Duration::from_secs(20), "{:?}", told.elapsed());
}

fn x02_a_job_is_finished_after_the_signal() {
    let plane = FakeRunPod::start();
    plane.script(Route::Done, [Step::status(200).after(Duration::from_millis(500))]);
    let mut process = Process::start(&plane, &[("DRAIN_MODE", "finish")]);
    plane.job("job-1", json!({"return": 1}));
    plane.eventually("the result on its way", |_| !plane.of(Route::Done).is_empty());
    process.signal(Signal::TERM);
    assert_eq!(process.exit().code(), Some(0));
    assert_eq!(plane.results("job-1").len(), 1);
}

fn x03_a_job_is_interrupted_in_checkpoint_mode() {
    let plane = FakeRunPod::start();
    let mut process = Process::start(&plane, &[("DRAIN_MODE", "checkpoint"), ("DRAIN_SECONDS", "20")]);
    busy(&plane, json!({"block": true}));
    process.signal(Signal::TERM);
    assert_eq!(process.exit().code(), Some(0));
    assert!(plane.of(Route::Done).is_empty(), "nothing is posted");
}

fn x05_the_second_signal_ends_the_process() {
    let plane = FakeRunPod::start();
    let mut process = Process::start(&plane, &[]);
    busy(&plane, json!({"stubborn": true}));
    process.signal(Signal::TERM);
    plane.more(Route::Ping, 2);
    process.signal(Signal::TERM);
    assert_eq!(process.exit().code(), Some(1));
}

fn x06_sigint_is_like_sigterm() {
    let plane = FakeRunPod::start();
    let mut process = Process::start(&plane, &[]);
    plane.some(Route::Take);
    process.signal(Signal::INT);
    assert_eq!(process.exit().code(), Some(0));
}

fn f01_an_unfit_worker_exits_with_an_error() {
    let plane = FakeRunPod::start();
    let mut process = Process::start(&plane, &[("TEST_UNFIT", "no GPU")]);
    assert_eq!(process.exit().code(), Some(1));
    assert!(plane.of(Route::Take).is_empty());
    assert!(
        plane.requests()[0]
            .target
            .contains("status=unhealthy&check=test&reason=no%20GPU&runpod_version=")
    );
}

fn l01_every_line_is_json_with_three_keys_even_after_a_panic() {
    let plane = FakeRunPod::start();
    let process = Process::start(&plane, &[("RUNPOD_DEBUG_LEVEL", "DEBUG")]);
    plane.queue([
        json!({"id": "bad", "input": {"panic": "two\nlines"}}),
        json!({"id": "good", "input": {"log": "from inside"}, "batchId": "batch-1"}),
    ]);
    plane.result("good");
    process.signal(Signal::TERM);
    let lines: Vec<Value> = process
        .lines()
        .iter()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("{line}")))
        .collect();
    for line in &lines {
        let keys: Vec<&String> = line.as_object().unwrap().keys().collect();
        assert_eq!(keys, ["requestId", "message", "level"], "{line}");
    }
    let of_job = |job: &str, text: &str| {
        lines
            .iter()
            .any(|line| line["requestId"] == job && line["message"].as_str().unwrap().contains(text))
    };
    assert!(of_job("bad", "panic at") && of_job("bad", "two\nlines"), "{lines:#?}");
    assert!(
        of_job("good", "Started.") && of_job("good", "[batchId=batch-1] from inside") && of_job("good", "Finished."),
        "{lines:#?}"
    );
}

fn l02_l03_lines_are_cut_and_hold_no_key() {
    let plane = FakeRunPod::start();
    let process = Process::start(&plane, &[("RUNPOD_DEBUG_LEVEL", "TRACE"), ("RUNPOD_ENDPOINT_ID", "")]);
    let line = format!("begin {} end {CANARY_KEY}", "x".repeat(10_000));
    plane.job("job-1", json!({"log": line, "fail": format!("with {CANARY_KEY}")}));
    plane.result("job-1");
    process.signal(Signal::TERM);
    let lines = process.lines();
    let long = lines.iter().find(|line| line.contains("begin")).unwrap();
    assert!(
        long.starts_with("INFO   | job-1 | begin ") && long.ends_with(" end [redacted]"),
        "{long}"
    );
    assert!(long.contains("bytes cut") && long.len() < 4300, "{}", long.len());
    assert!(
        !lines.iter().any(|line| line.contains(CANARY_KEY)),
        "the key is in the log"
    );
    assert!(!plane.result("job-1").to_string().contains(CANARY_KEY));
}

/// Lines of a log at WARN or above.
fn trouble(lines: &[String]) -> Vec<Value> {
    let parsed = lines.iter().map(|line| serde_json::from_str::<Value>(line).unwrap());
    parsed
        .filter(|line| line["level"] == "WARN" || line["level"] == "ERROR")
        .collect()
}

fn t04_what_is_expected_is_no_trouble_in_the_log() {
    let plane = FakeRunPod::start();
    plane.script(Route::Take, (0..4).map(|_| Step::status(400)));
    let process = Process::start(&plane, &[("RUNPOD_LOG_LEVEL", "DEBUG")]);
    plane.job("job-1", json!({"return": 1}));
    plane.result("job-1");
    assert!(plane.of(Route::Take).len() >= 5, "the 400s were met");
    process.signal(Signal::TERM);
    let lines = process.lines();
    assert!(lines.len() > 3 && trouble(&lines).is_empty(), "{:#?}", trouble(&lines));
}

fn t19_a_take_address_of_another_form_is_warned_of_once() {
    let plane = FakeRunPod::start();
    let take = format!("{}/v2/ep1/jobs/$ID", plane.url());
    let job = Step::json(json!({"id": "job-1", "input": {"return": 1}}));
    plane.script(Route::Other, [job]);
    plane.always(Route::Other, Step::Hang);
    let process = Process::start(&plane, &[("RUNPOD_WEBHOOK_GET_JOB", &take), ("TEST_CONCURRENCY", "3")]);
    plane.result("job-1");
    plane.eventually("the next take", |_| plane.of(Route::Other).len() == 2);
    plane.more(Route::Ping, 2);
    process.signal(Signal::TERM);
    assert_eq!(plane.of(Route::Other)[0].target, "/v2/ep1/jobs/pod1?job_in_progress=0");
    assert!(plane.of(Route::Stop).is_empty(), "no stop channel can be derived");
    let warned = trouble(&process.lines());
    assert_eq!(warned.len(), 1, "{warned:#?}");
    assert!(
        warned[0]["message"].as_str().unwrap().contains("/job-take/"),
        "{warned:#?}"
    );
}

/// Size of the soak: 3,000 jobs, or as many as `BRIGHTRUN_SOAK_JOBS` says.
fn soak_jobs() -> usize {
    let asked = std::env::var("BRIGHTRUN_SOAK_JOBS").ok();
    asked.map_or(3000, |text| text.parse::<usize>().unwrap() / 10 * 10)
}

fn z01_of_thousands_of_jobs_under_faults_each_has_one_accepted_result() {
    let (plane, soak_jobs) = (FakeRunPod::start(), soak_jobs());
    let mut seed = 0x2545_f491_4f6c_dd17_u64;
    let mut fault = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        match seed % 40 {
            0 => Step::Drop,
            1 => Step::DropEarly,
            2 => Step::status(500),
            3 => Step::status(429).with("Retry-After", "0"),
            _ => Step::Behave,
        }
    };
    plane.script(Route::Done, (0..2 * soak_jobs).map(|_| fault()));
    plane.script(Route::Ping, (0..100).map(|_| fault()));
    // A take that is dropped loses no job here: the fake hands one out only when it answers.
    plane.script(Route::Take, (0..soak_jobs / 4).map(|_| fault()));
    let mut process = Process::start(&plane, &[("TEST_CONCURRENCY", "8"), ("RUNPOD_LOG_LEVEL", "ERROR")]);
    let usage = |process: &Process| {
        let id = process.child.id();
        let status = std::fs::read_to_string(format!("/proc/{id}/status")).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        let kib: usize = line.trim().trim_end_matches(" kB").parse().unwrap();
        (kib, std::fs::read_dir(format!("/proc/{id}/fd")).unwrap().count())
    };
    let mut after_warm_up = (0, 0);
    for part in 0..10 {
        let jobs =
            (0..soak_jobs / 10).map(|number| json!({"id": format!("job-{part}-{number}"), "input": {"progress": [1]}}));
        plane.queue(jobs);
        plane.patiently("all results", Duration::from_secs(120), |requests| {
            let accepted = requests
                .iter()
                .filter(|request| request.accepted && request.is_result());
            accepted.count() >= (part + 1) * soak_jobs / 10
        });
        if part == 1 {
            after_warm_up = usage(&process);
        }
    }
    let (kib, files) = usage(&process);
    println!(
        "{soak_jobs} jobs: {} and {kib} KiB resident after a fifth and at the end, {} and {files} open files",
        after_warm_up.0, after_warm_up.1
    );
    process.signal(Signal::TERM);
    assert_eq!(process.exit().code(), Some(0));
    let mut accepted = std::collections::BTreeMap::<String, usize>::new();
    for request in plane
        .of(Route::Done)
        .iter()
        .filter(|request| request.accepted && request.is_result())
    {
        *accepted.entry(request.job().to_owned()).or_default() += 1;
    }
    assert_eq!(accepted.len(), soak_jobs);
    assert!(
        accepted.values().all(|count| *count == 1),
        "a result was accepted twice"
    );
    assert!(
        kib < after_warm_up.0 + 8 * 1024,
        "{} KiB grew to {kib}",
        after_warm_up.0
    );
    assert!(
        files < after_warm_up.1 + 16,
        "{} open files grew to {files}",
        after_warm_up.1
    );
}
