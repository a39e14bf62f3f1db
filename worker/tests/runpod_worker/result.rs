//! R: posting results.

use std::time::Duration;

use brightrun_worker::error::Failure;
use brightrun_worker::runpod::Redactor;
use brightrun_worker::runpod::Settings;
use brightrun_worker::runpod::outcome::{Identity, Outcome};
use serde_json::{Value, json};

use crate::fake_runpod::{CANARY_KEY, FakeRunPod, Route, Step};
use crate::support::{Mock, settings, start};

fn identity() -> Identity {
    Identity {
        worker_id: "pod1".to_owned(),
        hostname: "host1".to_owned(),
        protocol_version: "1.12.0".to_owned(),
    }
}

fn body_of(value: Value) -> Value {
    Outcome::of(Ok(value), &identity(), &Redactor::default()).body
}

/// The object inside the `error` string.
fn error_object(body: &Value) -> Value {
    serde_json::from_str(body["error"].as_str().unwrap()).unwrap()
}

#[test]
fn r01_to_r07_every_returned_value_has_its_body() {
    for (returned, body) in [
        (json!("text"), json!({"output": "text"})),
        (json!(3.5), json!({"output": 3.5})),
        (json!([1, 2]), json!({"output": [1, 2]})),
        (json!(null), json!({"output": null})),
        (json!({"a": 1}), json!({"output": {"a": 1}})),
        (json!({}), json!({})),
        (
            json!({"error": "m", "rest": 1}),
            json!({"output": {"rest": 1}, "error": "m"}),
        ),
        (json!({"error": "m"}), json!({"error": "m"})),
        (json!({"error": "", "a": 1}), json!({"output": {"a": 1}})),
        (json!({"error": null}), json!({})),
        (json!({"error": 0}), json!({})),
        (
            json!({"refresh_worker": true, "a": 1}),
            json!({"output": {"a": 1}, "stopPod": true}),
        ),
        (json!({"refresh_worker": false, "a": 1}), json!({"output": {"a": 1}})),
    ] {
        assert_eq!(body_of(returned.clone()), body, "{returned}");
    }
}

#[test]
fn r08_a_failure_is_posted_as_a_string_with_everything_a_client_needs() {
    let plane = FakeRunPod::start();
    let _worker = start(&plane, Mock::default(), settings());
    plane.job("job-1", json!({"fail": "The rank is 0"}));
    let body = plane.result("job-1");
    assert_eq!(body.as_object().unwrap().len(), 1, "only `error`: {body}");
    let error = error_object(&body);
    assert_eq!(error["error_code"], "TEST_FAILED");
    assert_eq!(
        error["error_message"],
        "The rank is 0. the test's handler. [TEST_FAILED]"
    );
    assert_eq!(
        (&error["retryable"], &error["worker_id"], &error["hostname"]),
        (&json!(false), &json!("pod1"), &json!("pod1-host"))
    );
    for key in ["error_type", "error_traceback", "runpod_version"] {
        assert!(error[key].is_string(), "{key}");
    }
}

#[test]
fn r12_an_error_object_becomes_a_string() {
    let body = body_of(json!({"error": {"code": 7}}));
    assert_eq!(body, json!({"error": "{\"code\":7}"}));
}

#[test]
fn r13_a_panic_is_an_error_and_the_worker_goes_on() {
    let plane = FakeRunPod::start();
    let _worker = start(&plane, Mock::default(), settings());
    plane.queue([
        json!({"id": "bad", "input": {"panic": "index 9"}}),
        json!({"id": "good", "input": {}}),
    ]);
    let error = error_object(&plane.result("bad"));
    assert_eq!(
        (&error["error_code"], &error["retryable"]),
        (&json!("INTERNAL_PANIC"), &json!(true))
    );
    assert!(error["error_message"].as_str().unwrap().contains("index 9"));
    plane.result("good");
}

#[test]
fn r13_after_a_panic_a_worker_with_a_gpu_leaves_once_the_error_is_posted() {
    let plane = FakeRunPod::start();
    let fragile = Settings {
        leave_after_panic: true,
        ..settings()
    };
    let worker = start(&plane, Mock::default(), fragile);
    plane.queue([
        json!({"id": "bad", "input": {"panic": "x"}}),
        json!({"id": "never", "input": {}}),
    ]);
    assert_eq!(worker.exit().code, 1);
    assert_eq!(plane.results("bad").len(), 1);
    assert_eq!(plane.of(Route::Take).len(), 1, "no further take");
}

#[test]
fn r14_nan_in_an_output_is_valid_json() {
    assert_eq!(
        body_of(json!({"loss": f64::NAN, "eta": f64::INFINITY})).to_string(),
        r#"{"output":{"loss":null,"eta":null}}"#
    );
}

#[test]
fn r15_r16_a_result_has_the_bytes_and_headers_of_the_protocol() {
    let plane = FakeRunPod::start();
    let _worker = start(&plane, Mock::default(), settings());
    plane.job("job-1", json!({"return": "é✓"}));
    plane.result("job-1");
    let post = &plane.of(Route::Done)[0];
    assert_eq!(post.body, "{\"output\":\"é✓\"}".as_bytes(), "UTF-8, not escaped");
    for (name, value) in [
        ("content-type", "application/x-www-form-urlencoded"),
        ("charset", "utf-8"),
        ("x-request-id", "job-1"),
        ("authorization", CANARY_KEY),
        ("content-length", &post.body.len().to_string()),
    ] {
        assert_eq!(post.header(name), Some(value), "{name}");
    }
    let same_name = post
        .headers
        .iter()
        .filter(|(name, _)| name.eq_ignore_ascii_case("content-type"));
    assert_eq!(same_name.count(), 1);
    plane.some(Route::Ping);
    for poll in [&plane.of(Route::Take)[0], &plane.of(Route::Ping)[0]] {
        assert_eq!(
            (poll.header("authorization"), poll.header("x-request-id")),
            (Some(CANARY_KEY), None)
        );
    }
}

#[test]
fn r17_r18_r19_a_result_is_posted_until_it_is_acknowledged() {
    let plane = FakeRunPod::start();
    let trouble = [
        Step::status(500),
        Step::status(502),
        Step::Drop,
        Step::DropEarly,
        Step::status(429).with("Retry-After", "0"),
        Step::status(408),
        Step::status(401),
    ];
    let tries = trouble.len() + 1;
    plane.script(Route::Done, trouble);
    let _worker = start(&plane, Mock::default(), settings());
    plane.job("job-1", json!({"return": "precious"}));
    plane.job("job-2", json!({}));
    plane.result("job-2");
    let posts = plane.of(Route::Done);
    assert_eq!(posts.len(), tries + 1, "{}", plane.trace());
    let bodies = posts[..tries]
        .iter()
        .map(|post| &post.body)
        .filter(|body| !body.is_empty());
    assert!(
        bodies.into_iter().all(|body| body == b"{\"output\":\"precious\"}"),
        "the same body each time"
    );
}

#[test]
fn r20_a_refused_result_is_replaced_by_a_small_error() {
    let plane = FakeRunPod::start();
    plane.script(Route::Done, [Step::status(400)]);
    let _worker = start(&plane, Mock::default(), settings());
    plane.job("job-1", json!({"return": "refused"}));
    plane.eventually("a second post", |_| plane.results("job-1").len() == 2);
    assert_eq!(
        error_object(&plane.results("job-1")[1])["error_code"],
        "RUNPOD_OUTPUT_REFUSED"
    );
}

#[test]
fn r21_an_oversize_output_is_an_error_that_says_so_and_is_never_posted() {
    let plane = FakeRunPod::start();
    let small = Settings {
        output_limit: 1000,
        sync_output_limit: 3000,
        ..settings()
    };
    let _worker = start(&plane, Mock::default(), small);
    let text = "x".repeat(2000);
    plane.job("run", json!({"return": text}));
    plane.job("sync-1", json!({"return": text}));
    let error = error_object(&plane.result("run"));
    assert_eq!(error["error_code"], "RUNPOD_OUTPUT_TOO_LARGE");
    let message = error["error_message"].as_str().unwrap();
    assert!(
        message.contains("2013") && message.contains("1000"),
        "both sizes: {message}"
    );
    assert_eq!(plane.result("sync-1")["output"], json!(text));
}

#[test]
fn r22_while_the_control_plane_is_away_the_job_stays_reported_and_its_result_arrives_afterwards() {
    let plane = FakeRunPod::start();
    plane.always(Route::Done, Step::Drop);
    let _worker = start(&plane, Mock::default(), settings());
    plane.job("job-1", json!({"return": 1}));
    plane.eventually("tries", |_| plane.of(Route::Done).len() > 3);
    plane.more(Route::Ping, 2);
    assert_eq!(plane.of(Route::Ping).last().unwrap().pinged(), ["job-1"]);
    let before = plane.of(Route::Done).len();
    plane.always(Route::Done, Step::status(200));
    plane.eventually("the result", |_| plane.of(Route::Done).len() > before);
    plane.eventually("a heartbeat without it", |requests| {
        requests
            .iter()
            .rfind(|request| request.route == Route::Ping)
            .unwrap()
            .pinged()
            .is_empty()
    });
}

#[test]
fn r23_a_job_that_is_gone_is_posted_once_and_frees_its_slot() {
    let plane = FakeRunPod::start();
    plane.script(Route::Done, [Step::status(404)]);
    let _worker = start(&plane, Mock::default(), settings());
    plane.job("gone", json!({}));
    plane.job("next", json!({}));
    plane.result("next");
    assert_eq!(plane.results("gone").len(), 1);
}

#[test]
fn r24_each_post_carries_its_own_job_in_its_header() {
    let plane = FakeRunPod::start();
    let two = Settings {
        concurrency: 2,
        ..settings()
    };
    let _worker = start(&plane, Mock::default(), two);
    plane.queue((0..20).map(|number| json!({"id": format!("job-{number}"), "input": {"progress": [number]}})));
    for number in 0..20 {
        plane.result(&format!("job-{number}"));
    }
    for post in plane.of(Route::Done) {
        assert_eq!(post.header("x-request-id"), Some(post.job()));
    }
}

#[test]
fn r25_a_stop_while_the_result_is_on_its_way_ends_the_posting() {
    let plane = FakeRunPod::start();
    plane.always(Route::Done, Step::status(503));
    let mut patient = settings();
    patient.pace.post_retry = (Duration::from_millis(100), Duration::from_millis(100));
    let _worker = start(&plane, Mock::default(), patient);
    plane.job("job-1", json!({}));
    plane.eventually("a try", |_| plane.of(Route::Done).len() == 1);
    plane.stop([json!("job-1")]);
    plane.eventually("the slot to be free", |_| plane.of(Route::Take).len() == 2);
    let tries = plane.of(Route::Done).len();
    plane.more(Route::Ping, 2);
    assert_eq!(plane.of(Route::Done).len(), tries, "none after the stop");
}

#[test]
fn l03_the_key_and_a_jobs_own_credentials_are_in_no_error() {
    let plane = FakeRunPod::start();
    let _worker = start(&plane, Mock::default(), settings());
    plane.queue([
        json!({"id": "a", "input": {"fail": format!("refused {CANARY_KEY} by canary-s3-secret")}, "s3Config": {"accessSecret": "canary-s3-secret"}}),
        json!({"id": "b", "input": {"return": {"error": format!("with {CANARY_KEY}")}}}),
    ]);
    assert!(
        plane.result("a")["error"]
            .as_str()
            .unwrap()
            .contains("refused [redacted] by [redacted]")
    );
    assert_eq!(plane.result("b")["error"], "with [redacted]");
}

#[test]
fn a_failure_always_has_a_text() {
    let outcome = Outcome::of_failure(&Failure::system("X", ""), &identity(), &Redactor::default());
    assert!(outcome.is_failure && !outcome.body["error"].as_str().unwrap().is_empty());
}
