//! C: the stop channel.

use std::time::Duration;

use brightrun_worker::runpod::{Settings, StopReason};
use serde_json::json;

use crate::fake_runpod::{FakeRunPod, Route, Step};
use crate::support::{Mock, settings, start};

fn two() -> Settings {
    Settings {
        concurrency: 2,
        ..settings()
    }
}

#[test]
fn c01_a_stopped_job_is_cancelled_posts_nothing_and_its_sibling_finishes() {
    let plane = FakeRunPod::start();
    let worker = start(&plane, Mock::default(), two());
    plane.queue([
        json!({"id": "stop-me", "input": {"wait": 1, "progress": [1]}}),
        json!({"id": "sibling", "input": {"wait": 1}}),
    ]);
    plane.eventually("both run", |_| worker.mock.runs() == 2);
    plane.stop([json!("stop-me")]);
    plane.eventually("the job to end", |_| {
        !worker.mock.stopped_with.lock().unwrap().is_empty()
    });
    plane.more(Route::Ping, 2);
    assert_eq!(plane.of(Route::Ping).last().unwrap().pinged(), ["sibling"]);
    worker.mock.release(1);
    plane.result("sibling");
    assert!(plane.results("stop-me").is_empty());
    assert_eq!(*worker.mock.stopped_with.lock().unwrap(), [StopReason::Cancelled]);
    assert_eq!(plane.of(Route::Stop)[0].target, "/v2/ep1/job-stop/pod1?gpu=SIM+1");
}

#[test]
fn c02_stops_that_name_nothing_here_are_ignored() {
    let plane = FakeRunPod::start();
    plane.script(
        Route::Stop,
        [
            Step::json(json!({"jobsToStop": ["unknown", 5, null]})),
            Step::json(json!({"jobsToStop": "job-1"})),
            Step::json(json!(["job-1"])),
            Step::raw(200, "application/json", "{bad"),
            Step::raw(200, "text/html", "{\"jobsToStop\":[\"job-1\"]}"),
            Step::status(204),
        ],
    );
    let worker = start(&plane, Mock::default(), settings());
    plane.job("job-1", json!({"wait": true}));
    plane.eventually("the channel to be read", |_| plane.of(Route::Stop).len() > 6);
    worker.mock.release(1);
    plane.result("job-1");
}

#[test]
fn c03_a_blocking_loop_sees_the_stop_at_its_next_step() {
    let plane = FakeRunPod::start();
    let worker = start(&plane, Mock::default(), settings());
    plane.job("job-1", json!({"block": true}));
    plane.eventually("it runs", |_| worker.mock.runs() == 1);
    plane.stop([json!("job-1")]);
    plane.job("next", json!({}));
    plane.result("next");
    assert!(plane.results("job-1").is_empty());
}

#[test]
fn c04_a_job_that_is_stopped_before_its_turn_never_starts() {
    let plane = FakeRunPod::start();
    plane.hand_out_at_once(2);
    plane.queue([
        json!({"id": "first", "input": {"wait": 1}}),
        json!({"id": "queued", "input": {}}),
    ]);
    let worker = start(&plane, Mock::default(), settings());
    plane.eventually("both reported", |requests| {
        requests.iter().any(|request| request.pinged().len() == 2)
    });
    plane.stop([json!("queued")]);
    plane.eventually("one reported", |requests| {
        requests
            .iter()
            .rfind(|request| request.route == Route::Ping)
            .unwrap()
            .pinged()
            == ["first"]
    });
    worker.mock.release(1);
    plane.job("later", json!({}));
    plane.result("later");
    assert_eq!((worker.mock.runs(), plane.results("queued").len()), (2, 0));
}

#[test]
fn c05_a_job_that_ignores_the_signal_makes_the_worker_leave_with_an_error() {
    let plane = FakeRunPod::start();
    let mut strict = settings();
    strict.pace.stop_limit = Duration::from_millis(300);
    let worker = start(&plane, Mock::default(), strict);
    plane.job("job-1", json!({"stubborn": true}));
    plane.eventually("it runs", |_| worker.mock.runs() == 1);
    plane.stop([json!("job-1")]);
    let exit = worker.exit();
    assert_eq!(exit.code, 1, "{}", exit.reason);
    assert!(plane.results("job-1").is_empty());
}

#[test]
fn c06_a_stop_channel_in_trouble_is_asked_with_pauses_and_takes_go_on() {
    let plane = FakeRunPod::start();
    plane.script(
        Route::Stop,
        [Step::status(500), Step::status(429), Step::Drop]
            .into_iter()
            .chain((0..5).map(|_| Step::status(404))),
    );
    let _worker = start(&plane, Mock::default(), settings());
    plane.job("job-1", json!({}));
    plane.result("job-1");
    plane.eventually("eight polls", |_| plane.of(Route::Stop).len() == 8);
    assert!(
        plane.waits(Route::Stop)[1] >= Duration::from_millis(400),
        "the 429 is waited out"
    );
    plane.more(Route::Ping, 2);
    assert_eq!(
        plane.of(Route::Stop).len(),
        8,
        "after five times 404 the channel counts as absent"
    );
}
