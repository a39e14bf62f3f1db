//! The orchestrator's client against a control plane that misbehaves.
#![allow(clippy::unwrap_used, clippy::panic)]

#[path = "../../tests/support/fake_runpod.rs"]
mod fake_runpod;

use std::time::Duration;

use brightrun_worker::error::{Blame, Result};
use brightrun_worker::runpod::{ClientOptions, JobStatus, Policy, RunPodClient};
use brightrun_worker::secret::Secret;
use serde_json::json;

use fake_runpod::{CANARY_KEY, FakeRunPod, Route, Step};

const POLICY: Policy = Policy {
    execution_timeout: Duration::from_secs(4 * 3600),
    ttl: Duration::from_secs(8 * 3600),
    low_priority: false,
};

fn client(plane: &FakeRunPod) -> RunPodClient {
    let options = ClientOptions {
        base: format!("{}/v2/", plane.url()),
        timeout: Duration::from_secs(2),
        retry: (Duration::from_millis(10), Duration::from_millis(50)),
        limit: Duration::from_secs(4),
    };
    RunPodClient::new(&Secret::new(CANARY_KEY), "endpoint-1", options).unwrap()
}

async fn submit(plane: &FakeRunPod) -> Result<String> {
    client(plane)
        .run(&json!({"job_id": "j1"}), POLICY, Some("https://app.example/hook"))
        .await
}

#[tokio::test]
async fn a_submission_carries_policy_webhook_and_bearer_key() {
    let plane = FakeRunPod::start();
    plane.script(Route::Run, [Step::json(json!({"id": "r1-u1", "status": "IN_QUEUE"}))]);
    assert_eq!(submit(&plane).await.unwrap(), "r1-u1");
    let request = &plane.of(Route::Run)[0];
    assert_eq!(
        (request.method.as_str(), request.target.as_str()),
        ("POST", "/v2/endpoint-1/run")
    );
    assert_eq!(
        request.header("authorization"),
        Some(format!("Bearer {CANARY_KEY}").as_str())
    );
    assert_eq!(request.header("content-type"), Some("application/json"));
    assert_eq!(
        request.json(),
        json!({
            "input": {"job_id": "j1"},
            "policy": {"executionTimeout": 14_400_000, "ttl": 28_800_000, "lowPriority": false},
            "webhook": "https://app.example/hook",
        })
    );
}

#[tokio::test]
async fn a_policy_beyond_the_platforms_bounds_is_brought_inside() {
    let plane = FakeRunPod::start();
    plane.script(Route::Run, [Step::json(json!({"id": "r1"}))]);
    let extreme = Policy {
        execution_timeout: Duration::from_secs(1),
        ttl: Duration::MAX,
        low_priority: true,
    };
    client(&plane).run(&json!({"a": 1}), extreme, None).await.unwrap();
    assert_eq!(
        plane.of(Route::Run)[0].json()["policy"],
        json!({"executionTimeout": 5000, "ttl": 604_800_000, "lowPriority": true})
    );
}

#[tokio::test]
async fn a_submission_that_was_refused_is_repeated_and_one_whose_fate_is_unknown_is_not() {
    let plane = FakeRunPod::start();
    let accepted = Step::json(json!({"id": "r1"}));
    plane.script(
        Route::Run,
        [
            Step::status(429).with("Retry-After", "0"),
            Step::status(500),
            Step::status(503),
            accepted,
        ],
    );
    assert_eq!(submit(&plane).await.unwrap(), "r1");
    assert_eq!(plane.of(Route::Run).len(), 4);
    for fate in [
        Step::Drop,
        Step::status(502),
        Step::raw(200, "text/html", "<html>"),
        Step::json(json!({})),
    ] {
        let plane = FakeRunPod::start();
        plane.script(Route::Run, [fate]);
        let failure = submit(&plane).await.unwrap_err();
        assert_eq!(
            (failure.code.as_str(), failure.blame),
            ("RUNPOD_SUBMIT_UNKNOWN", Blame::Platform)
        );
        assert_eq!(plane.of(Route::Run).len(), 1, "{failure}");
    }
}

#[tokio::test]
async fn a_status_is_asked_until_it_is_known_and_absence_is_an_answer() {
    let plane = FakeRunPod::start();
    let job = json!({"id": "a/b", "status": "FAILED", "error": "job timed out after 1 retries", "retries": 1, "delayTime": 101050, "executionTime": 42078});
    plane.script(
        Route::Status,
        [Step::Drop, Step::status(502), Step::json(job), Step::status(404)],
    );
    let client = client(&plane);
    let job = client.status("a/b").await.unwrap().unwrap();
    assert_eq!(
        (job.status, job.retries, job.execution_ms),
        (JobStatus::Failed, Some(1), Some(42078.0))
    );
    assert_eq!(
        plane.of(Route::Status)[0].target,
        "/v2/endpoint-1/status/a%2Fb",
        "one path segment"
    );
    assert_eq!(client.status("a/b").await.unwrap(), None);
}

#[tokio::test]
async fn a_state_nobody_knows_is_not_final() {
    let plane = FakeRunPod::start();
    plane.script(
        Route::Status,
        [
            Step::json(json!({"id": "a", "status": "HIBERNATING"})),
            Step::json(json!({"id": "a", "status": "RUNNING"})),
        ],
    );
    let client = client(&plane);
    let status = client.status("a").await.unwrap().unwrap().status;
    assert!(status == JobStatus::Unknown("HIBERNATING".to_owned()) && !status.is_final());
    assert_eq!(client.status("a").await.unwrap().unwrap().status, JobStatus::InProgress);
}

#[tokio::test]
async fn cancel_and_health_are_typed_and_missing_counters_are_zero() {
    let plane = FakeRunPod::start();
    plane.script(Route::Cancel, [Step::json(json!({"id": "a", "status": "CANCELLED"}))]);
    plane.script(
        Route::Other,
        [Step::json(
            json!({"jobs": {"inQueue": 3, "inProgress": 1}, "workers": {"idle": 0, "running": 1, "throttled": 2}}),
        )],
    );
    let client = client(&plane);
    assert_eq!(client.cancel("a").await.unwrap().unwrap().status, JobStatus::Cancelled);
    let health = client.health().await.unwrap();
    assert_eq!(
        (health.jobs.in_queue, health.jobs.failed, health.workers.throttled),
        (3, 0, 2)
    );
    let request = &plane.of(Route::Cancel)[0];
    assert_eq!(
        (request.method.as_str(), request.target.as_str()),
        ("POST", "/v2/endpoint-1/cancel/a")
    );
}

#[tokio::test]
async fn a_platform_that_stays_away_is_an_error_that_can_be_tried_again() {
    let plane = FakeRunPod::start();
    plane.always(Route::Other, Step::status(503));
    let failure = client(&plane).health().await.unwrap_err();
    assert_eq!(
        (failure.code.as_str(), failure.blame),
        ("RUNPOD_UNAVAILABLE", Blame::Platform)
    );
    assert!(plane.of(Route::Other).len() > 3);
}

#[tokio::test]
async fn errors_name_the_call_and_never_the_key() {
    let plane = FakeRunPod::start();
    let echo = format!("bad request with {CANARY_KEY}");
    plane.script(
        Route::Run,
        [Step::status(401), Step::raw(400, "text/plain", echo), Step::status(404)],
    );
    for code in [
        "RUNPOD_KEY_REFUSED",
        "RUNPOD_REQUEST_REFUSED",
        "RUNPOD_ENDPOINT_UNKNOWN",
    ] {
        let failure = submit(&plane).await.unwrap_err();
        assert_eq!(failure.code, code);
        let text = format!("{failure} {failure:?} {:?}", client(&plane));
        assert!(!text.contains("canary") && text.contains("endpoint-1"), "{text}");
    }
}

#[tokio::test]
async fn an_empty_or_huge_input_is_refused_before_it_is_sent() {
    let plane = FakeRunPod::start();
    let client = client(&plane);
    for (input, code) in [
        (json!({}), "RUNPOD_INPUT_EMPTY"),
        (json!({"x": "y".repeat(10_000_000)}), "RUNPOD_INPUT_TOO_LARGE"),
    ] {
        assert_eq!(client.run(&input, POLICY, None).await.unwrap_err().code, code);
    }
    assert!(plane.requests().is_empty());
}
