//! D: deliveries are at least once.

use std::time::Duration;

use brightrun_worker::runpod::{Claim, Settings};
use serde_json::json;

use crate::fake_runpod::{FakeRunPod, Route, Step};
use crate::support::{Mock, settings, start};

#[test]
fn d01_the_same_job_twice_in_a_batch_and_again_while_it_runs_is_one_run() {
    let plane = FakeRunPod::start();
    let three = Settings {
        concurrency: 3,
        ..settings()
    };
    let job = json!({"id": "same", "input": {"wait": true}});
    plane.script(Route::Take, [Step::json(json!([job, job])), Step::json(json!([job]))]);
    let worker = start(&plane, Mock::default(), three);
    plane.eventually("a third take", |_| plane.of(Route::Take).len() == 3);
    worker.mock.release(3);
    plane.result("same");
    plane.more(Route::Ping, 1);
    assert_eq!((worker.mock.runs(), plane.results("same").len()), (1, 1));
}

#[test]
fn d02_a_job_that_comes_back_after_its_end_gets_the_remembered_result() {
    let plane = FakeRunPod::start();
    let worker = start(&plane, Mock::default(), settings());
    for round in 1..=2 {
        plane.job("same", json!({"return": {"loss": 1.5}}));
        plane.eventually("a result", |_| plane.results("same").len() == round);
    }
    assert_eq!(worker.mock.runs(), 1);
    assert_eq!(plane.results("same")[0], plane.results("same")[1]);
}

#[test]
fn d02_a_failed_job_that_comes_back_is_tried_again() {
    let plane = FakeRunPod::start();
    let worker = start(&plane, Mock::default(), settings());
    for round in 1..=2 {
        plane.job("same", json!({"fail": "this time"}));
        plane.eventually("a result", |_| plane.results("same").len() == round);
        plane.eventually("the next take", |_| plane.of(Route::Take).len() == round + 1);
    }
    assert_eq!(worker.mock.runs(), 2);
}

#[test]
fn a_result_that_could_not_be_delivered_is_posted_by_the_next_process_on_the_same_volume() {
    let volume = tempfile::tempdir().unwrap();
    let mut durable = Settings {
        results_folder: Some(volume.path().join("results")),
        ..settings()
    };
    durable.pace.post_limit = Duration::from_millis(200);
    let first = FakeRunPod::start();
    first.always(Route::Done, Step::Drop);
    let worker = start(&first, Mock::default(), durable.clone());
    first.job("job-1", json!({"return": {"adapter": "a/b"}}));
    first.eventually("the worker to give up", |_| first.of(Route::Take).len() == 2);
    drop(worker);

    let second = FakeRunPod::start();
    let worker = start(&second, Mock::default(), durable);
    second.job("job-1", json!({"return": "computed again"}));
    assert_eq!(second.result("job-1"), json!({"output": {"adapter": "a/b"}}));
    assert_eq!(worker.mock.runs(), 0);
}

#[test]
fn d04_a_job_that_another_worker_has_is_waited_for_and_reported() {
    let plane = FakeRunPod::start();
    let mock = Mock {
        claims: vec![
            Claim::Elsewhere,
            Claim::Elsewhere,
            Claim::Done(json!({"from": "the other"})),
        ]
        .into(),
        ..Mock::default()
    };
    let worker = start(&plane, mock, settings());
    plane.job("job-1", json!({}));
    assert_eq!(plane.result("job-1"), json!({"output": {"from": "the other"}}));
    assert_eq!(worker.mock.runs(), 0, "it is not run a second time");
}

#[test]
fn d04_a_job_whose_other_worker_is_gone_is_run_here() {
    let plane = FakeRunPod::start();
    let mock = Mock {
        claims: vec![Claim::Elsewhere].into(),
        ..Mock::default()
    };
    let _worker = start(&plane, mock, settings());
    plane.job("job-1", json!({"return": "here"}));
    assert_eq!(plane.result("job-1"), json!({"output": "here"}));
}

#[test]
fn d04_a_job_that_another_worker_keeps_is_refused_in_the_end() {
    let plane = FakeRunPod::start();
    let mock = Mock {
        claims: vec![Claim::Elsewhere; 10_000].into(),
        ..Mock::default()
    };
    let mut strict = settings();
    strict.pace.claim_limit = Duration::from_millis(100);
    let _worker = start(&plane, mock, strict);
    plane.job("job-1", json!({}));
    assert!(
        plane.result("job-1")["error"]
            .as_str()
            .unwrap()
            .contains("RUNPOD_RUN_LOCKED")
    );
}

#[test]
fn d04_a_stop_ends_the_waiting_for_another_worker() {
    let plane = FakeRunPod::start();
    let mock = Mock {
        claims: vec![Claim::Elsewhere; 10_000].into(),
        ..Mock::default()
    };
    let _worker = start(&plane, mock, settings());
    plane.job("job-1", json!({}));
    plane.eventually("it is reported", |requests| {
        requests.iter().any(|request| request.pinged() == ["job-1"])
    });
    plane.stop([json!("job-1")]);
    plane.eventually("the slot to be free", |_| plane.of(Route::Take).len() == 2);
    assert!(plane.results("job-1").is_empty());
}

#[test]
fn d05_a_job_that_kills_its_process_three_times_is_refused_the_fourth_time() {
    let volume = tempfile::tempdir().unwrap();
    let durable = Settings {
        results_folder: Some(volume.path().join("results")),
        ..settings()
    };
    // A process that dies leaves its job without an end: so does a worker that is told to leave twice.
    for _ in 0..3 {
        let plane = FakeRunPod::start();
        let worker = start(&plane, Mock::default(), durable.clone());
        plane.job("job-1", json!({"stubborn": true}));
        plane.eventually("it runs", |_| worker.mock.runs() == 1);
        worker.leave();
        worker.leave();
        assert_eq!(worker.exit().code, 1);
    }
    let plane = FakeRunPod::start();
    let worker = start(&plane, Mock::default(), durable);
    plane.queue([json!({"id": "job-1", "input": {}}), json!({"id": "other", "input": {}})]);
    assert!(
        plane.result("job-1")["error"]
            .as_str()
            .unwrap()
            .contains("RUNPOD_JOB_KILLS_WORKERS")
    );
    plane.result("other");
    assert_eq!(worker.mock.runs(), 1, "only the other one");
}

#[test]
fn d05_jobs_that_end_in_any_way_are_not_counted() {
    let volume = tempfile::tempdir().unwrap();
    let durable = Settings {
        results_folder: Some(volume.path().join("results")),
        ..settings()
    };
    let plane = FakeRunPod::start();
    let worker = start(&plane, Mock::default(), durable);
    for round in 1..=5 {
        plane.job("job-1", json!({"fail": "again"}));
        plane.eventually("a result", |_| plane.results("job-1").len() == round);
        plane.eventually("the next take", |_| plane.of(Route::Take).len() == round + 1);
    }
    assert_eq!(worker.mock.runs(), 5);
}
