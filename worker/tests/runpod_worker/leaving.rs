//! X and F: the ways out. Signals, exit codes and kills are in the test `runpod_process`.

use std::time::Duration;

use brightrun_worker::runpod::{DrainMode, Environment, Settings, StopReason, Worker};
use serde_json::json;

use crate::fake_runpod::{FakeRunPod, Route, Step};
use crate::support::{Mock, settings, start, start_worker};

fn checkpointing() -> Settings {
    Settings {
        drain: DrainMode::Checkpoint,
        drain_limit: Duration::from_secs(20),
        ..settings()
    }
}

#[test]
fn x02_a_draining_worker_finishes_its_jobs_and_takes_no_more() {
    let plane = FakeRunPod::start();
    let worker = start(&plane, Mock::default(), settings());
    plane.job("job-1", json!({"wait": true}));
    plane.eventually("it runs", |_| worker.mock.runs() == 1);
    worker.leave();
    plane.job("never", json!({}));
    plane.more(Route::Ping, 2);
    worker.mock.release(1);
    let exit = worker.exit();
    assert_eq!(exit.code, 0, "{}", exit.reason);
    assert_eq!((plane.results("job-1").len(), plane.of(Route::Take).len()), (1, 1));
}

#[test]
fn x03_in_checkpoint_mode_a_job_is_told_to_save_and_nothing_is_posted() {
    let plane = FakeRunPod::start();
    let worker = start(&plane, Mock::default(), checkpointing());
    plane.job("job-1", json!({"block": true}));
    plane.eventually("it runs", |_| worker.mock.runs() == 1);
    worker.leave();
    let mock = std::sync::Arc::clone(&worker.mock);
    assert_eq!(worker.exit().code, 0);
    assert_eq!(*mock.stopped_with.lock().unwrap(), [StopReason::Draining]);
    assert!(plane.results("job-1").is_empty());
}

#[test]
fn x03_a_job_that_is_done_when_the_signal_comes_still_delivers() {
    let plane = FakeRunPod::start();
    plane.script(Route::Done, [Step::status(503), Step::status(503)]);
    let mut slow = checkpointing();
    slow.pace.post_retry = (Duration::from_millis(200), Duration::from_millis(200));
    let worker = start(&plane, Mock::default(), slow);
    plane.job("job-1", json!({"return": 1}));
    plane.eventually("a try", |_| !plane.of(Route::Done).is_empty());
    worker.leave();
    assert_eq!(worker.exit().code, 0);
    assert_eq!(plane.results("job-1").len(), 3);
}

#[test]
fn x03_a_job_that_does_not_save_in_time_is_abandoned_with_an_error() {
    let plane = FakeRunPod::start();
    let mut strict = checkpointing();
    strict.drain_limit = Duration::from_millis(200);
    let worker = start(&plane, Mock::default(), strict);
    plane.job("job-1", json!({"stubborn": true}));
    plane.eventually("it runs", |_| worker.mock.runs() == 1);
    worker.leave();
    assert_eq!(worker.exit().code, 1);
}

#[test]
fn x04_a_job_on_the_open_take_is_run_or_left_unreported() {
    for (mode, results) in [(settings(), 1), (checkpointing(), 0)] {
        let plane = FakeRunPod::start();
        let worker = start(&plane, Mock::default(), mode);
        plane.some(Route::Take);
        worker.leave();
        plane.job("late", json!({}));
        assert_eq!(worker.exit().code, 0);
        assert_eq!(plane.results("late").len(), results);
        let reported = plane.of(Route::Ping).iter().any(|ping| !ping.pinged().is_empty());
        assert!(!reported || results == 1, "reported and dropped\n{}", plane.trace());
    }
}

#[test]
fn x05_the_second_request_ends_the_worker_at_once() {
    let plane = FakeRunPod::start();
    let worker = start(&plane, Mock::default(), settings());
    plane.job("job-1", json!({"stubborn": true}));
    plane.eventually("it runs", |_| worker.mock.runs() == 1);
    worker.leave();
    worker.leave();
    assert_eq!(worker.exit().code, 1);
}

#[test]
fn x07_a_refresh_that_is_returned_or_configured_is_the_last_job() {
    let always = Settings {
        refresh_after_each_job: true,
        ..settings()
    };
    for (mode, output) in [
        (settings(), json!({"refresh_worker": true, "a": 1})),
        (always, json!({"a": 1})),
    ] {
        let plane = FakeRunPod::start();
        let worker = start(&plane, Mock::default(), mode);
        plane.queue([
            json!({"id": "job-1", "input": {"return": output}}),
            json!({"id": "job-2", "input": {}}),
        ]);
        assert_eq!(worker.exit().code, 0);
        assert_eq!(plane.results("job-1"), [json!({"output": {"a": 1}, "stopPod": true})]);
        assert_eq!(plane.of(Route::Take).len(), 1, "no further take");
    }
}

#[test]
fn f01_a_worker_that_fails_a_check_says_so_and_leaves_without_a_take() {
    let plane = FakeRunPod::start();
    let worker = Worker::new(Environment::read(&plane.variables()).unwrap(), settings())
        .check("first", || async { Ok(()) })
        .check("gpu", || async { Err("no device of 80 GB".to_owned()) })
        .check("never", || async { panic!("a check after a failed one") });
    let exit = start_worker(worker, Mock::default()).exit();
    assert_eq!(exit.code, 1);
    assert!(exit.reason.contains("no device of 80 GB"), "{}", exit.reason);
    let targets: Vec<String> = plane.requests().into_iter().map(|request| request.target).collect();
    assert_eq!(
        targets,
        [
            "/v2/ep1/ping/pod1?gpu=SIM+1&status=unhealthy&check=gpu&reason=no%20device%20of%2080%20GB&runpod_version=1.12.0"
        ]
    );
}

#[test]
fn f02_a_report_that_is_not_answered_does_not_keep_the_worker() {
    let plane = FakeRunPod::start();
    plane.script(Route::Ping, [Step::Hang]);
    let worker = Worker::new(Environment::read(&plane.variables()).unwrap(), settings())
        .check("gpu", || async { Err("broken".to_owned()) });
    assert_eq!(start_worker(worker, Mock::default()).exit().code, 1);
}

#[test]
fn f03_built_in_checks_can_be_skipped_and_the_callers_are_made_nevertheless() {
    let plane = FakeRunPod::start();
    let mut variables = plane.variables();
    variables.insert("RUNPOD_MIN_MEMORY_GB".to_owned(), "1000000".to_owned());
    // Skipped: nobody has a million GiB, and the worker works.
    let worker = start_worker(
        Worker::new(Environment::read(&variables).unwrap(), settings()),
        Mock::default(),
    );
    plane.job("job-1", json!({}));
    plane.result("job-1");
    drop(worker);
    variables.remove("RUNPOD_SKIP_AUTO_SYSTEM_CHECKS");
    let exit = start_worker(
        Worker::new(Environment::read(&variables).unwrap(), settings()),
        Mock::default(),
    )
    .exit();
    assert!(exit.code == 1 && exit.reason.contains("`memory`"), "{}", exit.reason);
}

#[test]
fn the_network_check_asks_the_control_plane_and_nobody_else() {
    let plane = FakeRunPod::start();
    let mut variables = plane.variables();
    variables.remove("RUNPOD_SKIP_AUTO_SYSTEM_CHECKS");
    for name in ["RUNPOD_MIN_MEMORY_GB", "RUNPOD_MIN_DISK_PERCENT"] {
        variables.insert(name.to_owned(), "0".to_owned());
    }
    let worker = start_worker(
        Worker::new(Environment::read(&variables).unwrap(), settings()),
        Mock::default(),
    );
    plane.job("job-1", json!({}));
    plane.result("job-1");
    drop(worker);
    // A port that nobody listens on any more.
    let closed = FakeRunPod::start().variables()["RUNPOD_WEBHOOK_GET_JOB"].clone();
    variables.insert("RUNPOD_WEBHOOK_GET_JOB".to_owned(), closed);
    let exit = start_worker(
        Worker::new(Environment::read(&variables).unwrap(), settings()),
        Mock::default(),
    )
    .exit();
    assert!(exit.code == 1 && exit.reason.contains("`network`"), "{}", exit.reason);
}
