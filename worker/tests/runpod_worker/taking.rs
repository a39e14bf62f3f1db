//! T: taking jobs.

use std::io::Write;
use std::time::Duration;

use serde_json::json;

use crate::fake_runpod::{FakeRunPod, Route, Step};
use crate::support::{Mock, quick, settings, start};

fn concurrent(count: usize) -> brightrun_worker::runpod::Settings {
    brightrun_worker::runpod::Settings {
        concurrency: count,
        ..settings()
    }
}

#[test]
fn t01_an_object_is_one_job_and_its_result_is_posted() {
    let plane = FakeRunPod::start();
    let _worker = start(&plane, Mock::default(), settings());
    plane.job("job-1", json!({"a": 1, "u": "é✓"}));
    assert_eq!(plane.result("job-1"), json!({"output": {"echo": {"a": 1, "u": "é✓"}}}));
    let take = &plane.of(Route::Take)[0];
    assert_eq!(take.target, "/v2/ep1/job-take/pod1?gpu=SIM+1&job_in_progress=0");
    assert_eq!(take.method, "GET");
    let done = &plane.of(Route::Done)[0];
    assert_eq!(done.target, "/v2/ep1/job-done/pod1/job-1?gpu=SIM+1&isStream=false");
}

#[test]
fn t02_after_a_long_poll_the_worker_asks_again_at_once_and_only_once() {
    let plane = FakeRunPod::start();
    plane.script(Route::Take, [Step::status(204).after(Duration::from_millis(1100))]);
    let _worker = start(&plane, Mock::default(), settings());
    plane.more(Route::Ping, 3);
    assert_eq!(
        plane.of(Route::Take).len(),
        2,
        "one poll ended, one is open\n{}",
        plane.trace()
    );
}

#[test]
fn t03_instant_empty_answers_are_asked_again_with_growing_pauses() {
    let plane = FakeRunPod::start();
    plane.script(Route::Take, (0..6).map(|_| Step::status(204)));
    let mut never_a_long_poll = settings();
    // However slow this machine is just now, these answers came at once.
    never_a_long_poll.pace.long_poll = Duration::from_secs(3600);
    let _worker = start(&plane, Mock::default(), never_a_long_poll);
    plane.eventually("six takes", |_| plane.of(Route::Take).len() > 6);
    // Waits that grow so reach one a second: at most twelve takes in the first five seconds.
    for (wait, least) in plane.waits(Route::Take).into_iter().zip([50, 100, 200, 400, 800, 1000]) {
        assert!(wait >= Duration::from_millis(least), "{wait:?} instead of {least} ms");
    }
}

#[test]
fn t04_t08_t09_no_answer_of_the_take_keeps_a_later_job_from_running() {
    let plane = FakeRunPod::start();
    plane.script(
        Route::Take,
        [
            Step::status(400),
            Step::status(500),
            Step::status(503),
            Step::Drop,
            Step::raw(200, "text/html", "<html>"),
            Step::raw(200, "application/json", ""),
            Step::raw(200, "application/json", "{bad"),
            Step::raw(200, "application/json", "null"),
            Step::raw(200, "application/json", "[]"),
            Step::raw(200, "application/json", "\"x\""),
            Step::status(418),
        ],
    );
    let _worker = start(&plane, Mock::default(), settings());
    plane.job("job-1", json!({"return": 7}));
    assert_eq!(plane.result("job-1"), json!({"output": 7}));
    assert_eq!(plane.of(Route::Done).len(), 1, "nothing else was posted");
}

#[test]
fn t05_a_429_is_waited_out_while_heartbeats_go_on() {
    assert!(
        brightrun_worker::runpod::Pace::default().take_busy >= Duration::from_millis(4500),
        "in production"
    );
    let plane = FakeRunPod::start();
    plane.script(Route::Take, [Step::status(429)]);
    let _worker = start(&plane, Mock::default(), settings());
    plane.eventually("a second take", |_| plane.of(Route::Take).len() > 1);
    assert!(plane.waits(Route::Take)[0] >= quick().take_busy);

    let plane = FakeRunPod::start();
    plane.script(Route::Take, [Step::status(429)]);
    let mut patient = settings();
    patient.pace.take_busy = Duration::from_secs(3600);
    let _worker = start(&plane, Mock::default(), patient);
    plane.some(Route::Take);
    plane.more(Route::Ping, 3);
    assert_eq!(plane.of(Route::Take).len(), 1, "the 429 is still waited out");
}

#[test]
fn t06_retry_after_is_obeyed() {
    let plane = FakeRunPod::start();
    plane.script(Route::Take, [Step::status(429).with("Retry-After", "2")]);
    let _worker = start(&plane, Mock::default(), settings());
    plane.eventually("a second take", |_| plane.of(Route::Take).len() > 1);
    assert!(plane.waits(Route::Take)[0] >= Duration::from_secs(2));
}

#[test]
fn t07_a_401_does_not_make_the_worker_spin_and_a_later_job_runs() {
    let plane = FakeRunPod::start();
    plane.script(Route::Take, (0..5).map(|_| Step::status(401)));
    let _worker = start(&plane, Mock::default(), settings());
    plane.job("job-1", json!({}));
    plane.result("job-1");
    let (first, longest) = (quick().take_error.0, quick().take_denied_max);
    for (tries, wait) in plane.waits(Route::Take).into_iter().take(5).enumerate() {
        // Full jitter halves a wait at most.
        let least = (first * (1 << tries)).min(longest) / 2;
        assert!(wait >= least, "{wait:?} is shorter than {least:?}");
    }
}

#[test]
fn t10_t18_an_array_from_the_single_address_with_a_charset_is_several_jobs() {
    let plane = FakeRunPod::start();
    let jobs = json!([{"id": "a", "input": {"return": 1}}, {"id": "b", "input": {"return": 2}}]);
    plane.script(
        Route::Take,
        [Step::raw(200, "application/json; charset=utf-8", jobs.to_string())],
    );
    let _worker = start(&plane, Mock::default(), settings());
    assert_eq!(
        (plane.result("a"), plane.result("b")),
        (json!({"output": 1}), json!({"output": 2}))
    );
}

#[test]
fn t11_an_absent_or_null_input_is_an_empty_object() {
    let plane = FakeRunPod::start();
    plane.queue([json!({"id": "absent"}), json!({"id": "null", "input": null})]);
    let _worker = start(&plane, Mock::default(), settings());
    for id in ["absent", "null"] {
        assert_eq!(plane.result(id), json!({"output": {"echo": {}}}));
    }
}

#[test]
fn t12_t13_elements_that_are_no_jobs_are_left_alone_and_the_others_run() {
    let plane = FakeRunPod::start();
    let batch = json!([
        {"id": "good-1", "input": {}}, {"input": {}}, 17, {"id": 5, "input": {}}, {"id": "", "input": {}}, {"id": "good-2", "input": {}},
    ]);
    plane.script(Route::Take, [Step::json(json!({"input": {}})), Step::json(batch)]);
    let _worker = start(&plane, Mock::default(), concurrent(3));
    plane.result("good-1");
    plane.result("good-2");
    plane.job("later", json!({}));
    plane.result("later");
    assert_eq!(plane.of(Route::Done).len(), 3, "{}", plane.trace());
}

#[test]
fn t14_more_jobs_than_asked_for_all_run_and_are_reported_from_the_start() {
    let plane = FakeRunPod::start();
    plane.hand_out_at_once(7);
    let all: Vec<String> = (0..7).map(|number| format!("job-{number}")).collect();
    plane.queue(all.iter().map(|id| json!({"id": id, "input": {"wait": true}})));
    let worker = start(&plane, Mock::default(), concurrent(3));
    plane.eventually("a heartbeat with all seven", |requests| {
        requests.iter().any(|request| request.pinged() == all)
    });
    assert_eq!(plane.of(Route::Take).len(), 1, "no more is asked for while some wait");
    worker.mock.release(7);
    for id in &all {
        plane.result(id);
    }
    assert_eq!(worker.mock.most_at_once.load(std::sync::atomic::Ordering::SeqCst), 3);
}

#[test]
fn t15_t16_the_take_says_whether_jobs_run_and_asks_for_what_is_free() {
    let plane = FakeRunPod::start();
    plane.hand_out_at_once(2);
    plane.queue([
        json!({"id": "a", "input": {"wait": 1}}),
        json!({"id": "b", "input": {"wait": 1}}),
    ]);
    let worker = start(&plane, Mock::default(), concurrent(3));
    plane.eventually("a second take", |_| plane.of(Route::Take).len() > 1);
    let targets: Vec<String> = plane.of(Route::Take).into_iter().map(|take| take.target).collect();
    assert_eq!(
        targets,
        [
            "/v2/ep1/job-take-batch/pod1?gpu=SIM+1&batch_size=3&job_in_progress=0",
            "/v2/ep1/job-take/pod1?gpu=SIM+1&job_in_progress=1"
        ]
    );
    worker.mock.release(2);
}

#[test]
fn t17_the_next_take_follows_the_result_without_a_tick_in_between() {
    let plane = FakeRunPod::start();
    let _worker = start(&plane, Mock::default(), settings());
    // Fifty jobs one after the other: with a pause of a second after each, heartbeats would be as many.
    plane.queue((0..50).map(|number| json!({"id": format!("job-{number}"), "input": {}})));
    plane.result("job-49");
    let requests = plane.requests();
    let between = requests.iter().filter(|request| request.route == Route::Ping).count();
    assert!(between < 25, "{between} heartbeats during 50 jobs");
}

#[test]
fn t21_a_packed_answer_and_a_job_of_twenty_megabytes_are_read() {
    let plane = FakeRunPod::start();
    let text = "x".repeat(20_000_000);
    let job = json!({"id": "big", "input": {"text": text, "return": "read"}}).to_string();
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(job.as_bytes()).unwrap();
    let mut deflate = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::fast());
    deflate
        .write_all(json!({"id": "small", "input": {"return": 1}}).to_string().as_bytes())
        .unwrap();
    plane.script(
        Route::Take,
        [
            Step::raw(200, "application/json", gzip.finish().unwrap()).with("Content-Encoding", "gzip"),
            Step::raw(200, "application/json", deflate.finish().unwrap()).with("Content-Encoding", "deflate"),
        ],
    );
    let _worker = start(&plane, Mock::default(), settings());
    assert_eq!(plane.result("big"), json!({"output": "read"}));
    assert_eq!(plane.result("small"), json!({"output": 1}));
}

#[test]
fn t22_a_take_that_is_never_answered_is_asked_again_after_its_time_and_not_beside_it() {
    let plane = FakeRunPod::start();
    plane.always(Route::Take, Step::Hang);
    let mut patient = settings();
    patient.pace.take_timeout = Duration::from_secs(3600);
    let worker = start(&plane, Mock::default(), patient);
    plane.some(Route::Take);
    plane.more(Route::Ping, 3);
    assert_eq!(plane.of(Route::Take).len(), 1, "none beside the one that is open");
    drop(worker);

    let plane = FakeRunPod::start();
    plane.script(Route::Take, [Step::Hang]);
    let mut impatient = settings();
    impatient.pace.take_timeout = Duration::from_millis(400);
    let _worker = start(&plane, Mock::default(), impatient);
    plane.job("job-1", json!({}));
    plane.result("job-1");
}

#[test]
fn a_redirected_take_is_followed() {
    let plane = FakeRunPod::start();
    plane.script(
        Route::Take,
        [Step::status(307).with("Location", "/v2/ep1/job-take/moved?gpu=1")],
    );
    let _worker = start(&plane, Mock::default(), settings());
    plane.job("job-1", json!({}));
    plane.result("job-1");
    assert_eq!(plane.of(Route::Take)[1].target, "/v2/ep1/job-take/moved?gpu=1");
}

#[test]
fn the_concurrency_a_handler_wishes_is_asked_before_every_take() {
    let plane = FakeRunPod::start();
    let mock = Mock {
        concurrency: Some(4),
        ..Mock::default()
    };
    let _worker = start(&plane, mock, settings());
    plane.some(Route::Take);
    assert_eq!(plane.of(Route::Take)[0].parameter("batch_size"), Some("4"));
}

#[test]
fn unknown_fields_of_a_job_reach_the_handler() {
    let read = brightrun_worker::runpod::RunPodJob::read(
        json!({"id": "a", "input": [1], "future": {"x": 1}, "webhook": "https://c.example/h"}),
    );
    let job = read.unwrap();
    assert_eq!(
        (job.input, job.more.get("future")),
        (json!([1]), Some(&json!({"x": 1})))
    );
    assert_eq!(job.webhook.as_deref(), Some("https://c.example/h"));
}
