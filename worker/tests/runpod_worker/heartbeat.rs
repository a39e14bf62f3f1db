//! H: heartbeats.

use std::time::{Duration, Instant};

use brightrun_worker::runpod::{Environment, Settings, Worker};
use serde_json::json;

use crate::fake_runpod::{FakeRunPod, Request, Route, Step};
use crate::support::{Mock, settings, start, start_worker};

fn last_ping(requests: &[Request]) -> Option<&Request> {
    requests.iter().rfind(|request| request.route == Route::Ping)
}

#[test]
fn h01_heartbeats_begin_before_the_first_take_and_are_never_closer_than_their_interval() {
    let plane = FakeRunPod::start();
    plane.script(Route::Take, [Step::Hang]);
    let begun = Instant::now();
    let _worker = start(&plane, Mock::default(), settings());
    plane.some(Route::Take);
    plane.eventually("four heartbeats", |_| plane.of(Route::Ping).len() >= 4);
    let pings = plane.of(Route::Ping);
    assert_eq!(pings[0].target, "/v2/ep1/ping/pod1?gpu=SIM+1&runpod_version=1.12.0");
    // From before the first to the fourth, three intervals have passed, whatever the load.
    assert!(
        pings[3].at - begun >= Duration::from_secs(3),
        "{:?}",
        pings[3].at - begun
    );
}

#[test]
fn h02_a_heartbeat_names_the_jobs_that_run() {
    let plane = FakeRunPod::start();
    let two = Settings {
        concurrency: 2,
        ..settings()
    };
    let worker = start(&plane, Mock::default(), two);
    plane.queue([
        json!({"id": "a", "input": {"wait": 1}}),
        json!({"id": "b", "input": {"wait": 1}}),
    ]);
    plane.eventually("both", |requests| {
        last_ping(requests).is_some_and(|ping| ping.target.contains("&job_id=a%2Cb&"))
    });
    worker.mock.release(2);
    plane.eventually("none", |requests| {
        last_ping(requests).is_some_and(|ping| ping.parameter("job_id").is_none())
    });
}

#[test]
fn h03_a_heartbeat_in_trouble_is_tried_again_before_the_next_one_is_due() {
    let plane = FakeRunPod::start();
    let mut variables = plane.variables();
    // The next one is due in an hour: what comes sooner is a repetition.
    variables.insert("RUNPOD_PING_INTERVAL".to_owned(), "3600000".to_owned());
    plane.script(Route::Ping, [Step::status(500), Step::status(200)]);
    let worker = Worker::new(Environment::read(&variables).unwrap(), settings());
    let worker = start_worker(worker, Mock::default());
    plane.eventually("the repetition", |_| plane.of(Route::Ping).len() == 2);
    drop(worker);

    let plane = FakeRunPod::start();
    plane.script(
        Route::Ping,
        [
            Step::status(500),
            Step::status(500),
            Step::status(200),
            Step::Drop,
            Step::status(404),
        ],
    );
    let _worker = start(&plane, Mock::default(), settings());
    plane.eventually("five tries", |_| plane.of(Route::Ping).len() >= 5);
    assert!(
        plane.waits(Route::Ping)[1] >= Duration::from_millis(200),
        "the second repetition is not immediate"
    );
}

#[test]
fn h04_a_handler_that_blocks_every_thread_of_its_runtime_does_not_delay_heartbeats() {
    let plane = FakeRunPod::start();
    let many = Settings {
        concurrency: 4,
        ..settings()
    };
    let worker = start(&plane, Mock::default(), many);
    // Two threads run handlers; four handlers never yield.
    plane.queue((0..4).map(|number| json!({"id": format!("job-{number}"), "input": {"stubborn": true}})));
    plane.eventually("all four", |requests| {
        last_ping(requests).is_some_and(|ping| ping.pinged().len() == 4)
    });
    plane.more(Route::Ping, 3);
    worker.mock.release(4);
    for number in 0..4 {
        plane.result(&format!("job-{number}"));
    }
}

#[test]
fn h05_a_job_is_in_every_heartbeat_from_its_take_to_its_acknowledged_result() {
    let plane = FakeRunPod::start();
    plane.script(Route::Done, [Step::status(200).after(Duration::from_millis(2500))]);
    let worker = start(&plane, Mock::default(), settings());
    plane.job("job-1", json!({"wait": true}));
    plane.eventually("a heartbeat with it", |requests| {
        last_ping(requests).is_some_and(|ping| ping.pinged() == ["job-1"])
    });
    plane.more(Route::Ping, 1);
    worker.mock.release(1);
    plane.eventually("the next take", |_| plane.of(Route::Take).len() == 2);
    let (acknowledged, requests) = (plane.of(Route::Done)[0].answered.unwrap(), plane.requests());
    let first_with = requests.iter().find(|request| !request.pinged().is_empty()).unwrap().at;
    // A heartbeat that was read before the acknowledgement was written was sent before it was received.
    let during = requests
        .iter()
        .filter(|request| request.route == Route::Ping && request.at >= first_with && request.at < acknowledged);
    assert!(during.clone().count() >= 2, "{}", plane.trace());
    assert!(
        during.into_iter().all(|ping| ping.pinged() == ["job-1"]),
        "{}",
        plane.trace()
    );
}

#[test]
fn h06_without_key_or_worker_id_or_address_there_are_no_heartbeats_but_the_worker_works() {
    for missing in ["RUNPOD_AI_API_KEY", "RUNPOD_POD_ID", "RUNPOD_WEBHOOK_PING"] {
        let plane = FakeRunPod::start();
        let mut variables = plane.variables();
        variables.remove(missing);
        let environment = Environment::read(&variables).unwrap();
        assert!(
            environment.notes.iter().any(|note| note.contains(missing)),
            "{:?}",
            environment.notes
        );
        let _worker = start_worker(Worker::new(environment, settings()), Mock::default());
        plane.job("job-1", json!({}));
        plane.result("job-1");
        assert!(plane.of(Route::Ping).is_empty(), "{missing}");
    }
}
