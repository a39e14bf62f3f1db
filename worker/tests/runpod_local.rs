//! The local API, driven over HTTP by the client that an orchestrator uses and by raw requests.
#![allow(clippy::unwrap_used, clippy::panic)]

#[path = "../../tests/support/fake_runpod.rs"]
mod fake_runpod;
#[path = "../../tests/support/runpod_worker.rs"]
mod support;

use std::sync::Arc;
use std::time::{Duration, Instant};

use brightrun_worker::runpod::local::{listen, run_once};
use brightrun_worker::runpod::{
    ClientOptions, Compatibility, JobStatus, LocalApi, LocalOptions, OutputForm, Policy, Redactor, RunPodClient,
    RunPodJob, StopReason,
};
use brightrun_worker::secret::Secret;
use serde_json::{Value, json};

use fake_runpod::{CANARY_KEY, FakeRunPod, PATIENCE, Request, Route, Step};
use support::Mock;

/// A served API.
struct Served {
    base: String,
    mock: Arc<Mock>,
    http: reqwest::Client,
    _serving: tokio::task::JoinHandle<()>,
}

impl Served {
    async fn start(mock: Mock, options: LocalOptions) -> Self {
        let mock = Arc::new(mock);
        let api = LocalApi::new(Arc::clone(&mock) as _, options).unwrap();
        let listener = listen("127.0.0.1", 0).await.unwrap();
        let base = format!("http://{}", listener.local_addr().unwrap());
        let serving = tokio::spawn(async move { api.serve(listener, std::future::pending()).await.unwrap() });
        Self {
            base,
            mock,
            http: reqwest::Client::builder().no_proxy().build().unwrap(),
            _serving: serving,
        }
    }

    fn client(&self, key: &str) -> RunPodClient {
        let options = ClientOptions {
            base: format!("{}/v2", self.base),
            ..ClientOptions::default()
        };
        RunPodClient::new(&Secret::new(key), "any-endpoint", options).unwrap()
    }

    async fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        self.send(self.http.post(format!("{}{path}", self.base)).json(body))
            .await
    }

    async fn get(&self, path: &str) -> (u16, Value) {
        self.send(self.http.get(format!("{}{path}", self.base))).await
    }

    async fn send(&self, request: reqwest::RequestBuilder) -> (u16, Value) {
        let response = request.send().await.unwrap();
        let status = response.status().as_u16();
        let text = response.text().await.unwrap();
        (status, serde_json::from_str(&text).unwrap_or(Value::String(text)))
    }

    async fn run(&self, body: &Value) -> String {
        let (status, answer) = self.post("/run", body).await;
        assert_eq!((status, &answer["status"]), (200, &json!("IN_QUEUE")), "{answer}");
        answer["id"].as_str().unwrap().to_owned()
    }

    /// Asks for the status until it fits.
    async fn until(&self, id: &str, status: &str) -> Value {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let (_, answer) = self.get(&format!("/status/{id}")).await;
            if answer["status"] == status {
                return answer;
            }
            assert!(Instant::now() < deadline, "not {status}: {answer}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

fn policy() -> Policy {
    Policy {
        execution_timeout: Duration::from_secs(3600),
        ttl: Duration::from_secs(7200),
        low_priority: false,
    }
}

fn options() -> LocalOptions {
    LocalOptions {
        webhook_pause: Duration::from_millis(10),
        ..LocalOptions::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a03_a_job_goes_through_its_states_as_in_the_cloud() {
    let served = Served::start(Mock::default(), options()).await;
    let client = served.client("any");
    let id = client
        .run(
            &json!({"progress": [{"step": 1}], "wait": 1, "return": {"loss": 0.5}}),
            policy(),
            None,
        )
        .await
        .unwrap();
    let queued = client.run(&json!({"return": 2}), policy(), None).await.unwrap();
    served.until(&id, "IN_PROGRESS").await;
    let deadline = Instant::now() + PATIENCE;
    while client.status(&id).await.unwrap().unwrap().output != Some(json!({"step": 1})) {
        assert!(Instant::now() < deadline, "no progress in the output");
    }
    assert_eq!(
        client.status(&queued).await.unwrap().unwrap().status,
        JobStatus::InQueue
    );
    let health = client.health().await.unwrap();
    assert_eq!(
        (
            health.jobs.in_progress,
            health.jobs.in_queue,
            health.workers.running,
            health.workers.idle
        ),
        (1, 1, 1, 0)
    );
    served.mock.release(1);
    served.until(&queued, "COMPLETED").await;
    let job = client.status(&id).await.unwrap().unwrap();
    assert_eq!(
        (job.status, job.output),
        (JobStatus::Completed, Some(json!({"loss": 0.5})))
    );
    assert!(job.delay_ms.is_some() && job.execution_ms.is_some() && job.worker_id.is_some());
    assert_eq!(client.health().await.unwrap().jobs.completed, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a03_a_job_is_cancelled_at_every_stage_and_a_final_state_stays() {
    let served = Served::start(Mock::default(), options()).await;
    let client = served.client("any");
    let running = served.run(&json!({"input": {"wait": 1}})).await;
    let waiting = served.run(&json!({"input": {}})).await;
    served.until(&running, "IN_PROGRESS").await;
    for id in [&waiting, &running] {
        assert_eq!(client.cancel(id).await.unwrap().unwrap().status, JobStatus::Cancelled);
    }
    let done = served.run(&json!({"input": {"return": 1}})).await;
    served.until(&done, "COMPLETED").await;
    assert_eq!(*served.mock.stopped_with.lock().unwrap(), [StopReason::Cancelled]);
    assert_eq!(served.mock.runs(), 2, "the waiting one never ran");
    assert_eq!(
        client.cancel(&done).await.unwrap().unwrap().status,
        JobStatus::Completed
    );
    assert_eq!(
        client.status(&running).await.unwrap().unwrap().status,
        JobStatus::Cancelled
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a03_failed_jobs_can_be_retried_and_waiting_ones_purged() {
    let served = Served::start(Mock::default(), options()).await;
    let failed = served.run(&json!({"input": {"fail": "first"}})).await;
    let view = served.until(&failed, "FAILED").await;
    assert!(view["error"].as_str().unwrap().contains("TEST_FAILED"), "{view}");
    let (status, answer) = served.post(&format!("/v2/ep/retry/{failed}"), &json!({})).await;
    assert_eq!((status, answer), (200, json!({"id": failed, "status": "IN_QUEUE"})));
    let again = served.until(&failed, "FAILED").await;
    assert_eq!((again["retries"].clone(), served.mock.runs()), (json!(1), 2));
    let running = served.run(&json!({"input": {"wait": 1}})).await;
    served.until(&running, "IN_PROGRESS").await;
    assert_eq!(
        served.post(&format!("/retry/{running}"), &json!({})).await.0,
        400,
        "only failed ones"
    );
    served.run(&json!({"input": {}})).await;
    served.run(&json!({"input": {}})).await;
    let purged = served.post("/v2/ep/purge-queue", &json!({})).await;
    assert_eq!(purged, (200, json!({"removed": 2, "status": "completed"})));
    served.mock.release(1);
    served.until(&running, "COMPLETED").await;
    assert_eq!(served.get("/v2/ep/health").await.1["jobs"]["retried"], 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a03_a_stream_is_read_piece_by_piece_by_get_and_post() {
    let mock = Mock {
        form: OutputForm::Stream { aggregate: true },
        ..Mock::default()
    };
    let served = Served::start(mock, options()).await;
    let id = served
        .run(&json!({"input": {"chunks": [1, 2], "wait": 1, "return": null}}))
        .await;
    let mut seen = Vec::new();
    let deadline = Instant::now() + PATIENCE;
    while seen.len() < 2 {
        let (_, answer) = served.get(&format!("/v2/ep/stream/{id}")).await;
        seen.extend(answer["stream"].as_array().unwrap().clone());
        assert!(Instant::now() < deadline);
    }
    assert_eq!(seen, [json!({"output": 1}), json!({"output": 2})]);
    served.mock.release(1);
    assert_eq!(served.until(&id, "COMPLETED").await["output"], json!([1, 2]));
    let (_, rest) = served.post(&format!("/stream/{id}"), &json!({})).await;
    assert_eq!(rest, json!({"id": id, "status": "COMPLETED", "stream": []}));
}

#[tokio::test(flavor = "multi_thread")]
async fn a03_runsync_answers_with_the_result_or_with_the_state_when_the_wait_ends() {
    let served = Served::start(Mock::default(), options()).await;
    let (_, done) = served
        .post("/v2/ep/runsync", &json!({"input": {"return": "now"}}))
        .await;
    assert_eq!((&done["status"], &done["output"]), (&json!("COMPLETED"), &json!("now")));
    assert!(done["id"].as_str().unwrap().starts_with("sync-"));
    let (_, open) = served
        .post("/v2/ep/runsync?wait=1000", &json!({"input": {"wait": 1}}))
        .await;
    assert_eq!(open["status"], "IN_PROGRESS");
    served.mock.release(1);
    let id = open["id"].as_str().unwrap();
    let (_, settled) = served.get(&format!("/v2/ep/status-sync/{id}?wait=30000")).await;
    assert_eq!(settled["status"], "COMPLETED");
}

#[tokio::test(flavor = "multi_thread")]
async fn a04_no_outcome_of_a_handler_is_a_server_error_and_any_input_is_taken() {
    let served = Served::start(Mock::default(), options()).await;
    for (input, status) in [
        (json!({"return": {}}), "COMPLETED"),
        (json!({"return": null}), "COMPLETED"),
        (json!({"return": {"error": ""}}), "COMPLETED"),
        (json!({"return": {"error": {"code": 1}}}), "FAILED"),
        (json!({"fail": "x"}), "FAILED"),
        (json!({"panic": "x"}), "FAILED"),
        (json!([1, 2]), "COMPLETED"),
        (json!("text"), "COMPLETED"),
        (json!(null), "COMPLETED"),
    ] {
        let (code, answer) = served.post("/runsync", &json!({"input": input})).await;
        assert_eq!(
            (code, answer["status"].as_str()),
            (200, Some(status)),
            "{input}: {answer}"
        );
        assert!(status != "FAILED" || answer["error"].as_str().is_some_and(|error| !error.is_empty()));
    }
    for body in [json!([]), json!({}), json!({"input": {}, "policy": {"ttl": 1}})] {
        assert_eq!(served.post("/run", &body).await.0, 400, "{body}");
    }
    let too_large = json!({"input": "x".repeat(10_100_000)});
    assert_eq!(served.post("/run", &too_large).await.0, 413);
    assert_eq!(served.post("/runsync", &too_large).await.0, 200, "its limit is higher");
}

#[tokio::test(flavor = "multi_thread")]
async fn a05_the_webhook_gets_the_whole_job_on_success_and_failure_with_three_tries() {
    let plane = FakeRunPod::start();
    let served = Served::start(Mock::default(), options()).await;
    let url = format!("{}/hook", plane.url());
    plane.script(Route::Other, [Step::status(500), Step::Drop, Step::status(200)]);
    let calls = |requests: &[Request]| requests.iter().filter(|request| request.route == Route::Other).count();
    served.run(&json!({"input": {"return": 1}, "webhook": url})).await;
    plane.eventually("three tries", |requests| calls(requests) == 3);
    served.run(&json!({"input": {"fail": "no"}, "webhook": url})).await;
    plane.eventually("the second job's", |requests| calls(requests) == 4);
    let bodies: Vec<Value> = plane.of(Route::Other).iter().map(Request::json).collect();
    assert_eq!((&bodies[0], &bodies[1]), (&bodies[1], &bodies[2]), "the same each time");
    for key in [
        "delayTime",
        "executionTime",
        "id",
        "input",
        "output",
        "status",
        "webhook",
    ] {
        assert!(bodies[0].get(key).is_some(), "{key}: {}", bodies[0]);
    }
    assert_eq!(
        (&bodies[3]["status"], bodies[3]["error"].is_string()),
        (&json!("FAILED"), true)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a06_an_unknown_or_expired_job_is_not_found() {
    let served = Served::start(Mock::default(), options()).await;
    let client = served.client("any");
    for call in ["status", "stream", "status-sync"] {
        assert_eq!(
            served.get(&format!("/v2/ep/{call}/nobody?wait=1000")).await.0,
            404,
            "{call}"
        );
    }
    assert_eq!(
        (
            client.status("nobody").await.unwrap(),
            client.cancel("nobody").await.unwrap()
        ),
        (None, None)
    );
    let id = served.run(&json!({"input": {"return": 1}})).await;
    served.until(&id, "COMPLETED").await;
    served.get(&format!("/status/{id}?ttl=1")).await;
    let deadline = Instant::now() + PATIENCE;
    while served.get(&format!("/status/{id}")).await.0 != 404 {
        assert!(Instant::now() < deadline, "it does not expire");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_exceeds_its_execution_timeout_is_stopped_and_timed_out() {
    let served = Served::start(Mock::default(), options()).await;
    let id = served
        .run(&json!({"input": {"wait": 1}, "policy": {"executionTimeout": 5000}}))
        .await;
    served.until(&id, "TIMED_OUT").await;
    let deadline = Instant::now() + PATIENCE;
    while served.mock.stopped_with.lock().unwrap().is_empty() {
        assert!(Instant::now() < deadline, "the handler is not told");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_asked_for_bare_or_as_a_bearer() {
    let guarded = LocalOptions {
        token: Some(Secret::new(CANARY_KEY)),
        ..options()
    };
    let served = Served::start(Mock::default(), guarded).await;
    assert_eq!(served.get("/v2/ep/health").await.0, 401);
    served.client(CANARY_KEY).health().await.unwrap();
    let bare = served
        .http
        .get(format!("{}/health", served.base))
        .header("authorization", CANARY_KEY);
    assert_eq!(served.send(bare).await.0, 200);
    let failure = served.client("wrong-key-canary").health().await.unwrap_err();
    assert!(
        failure.code == "RUNPOD_KEY_REFUSED" && !failure.to_string().contains("canary"),
        "{failure}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a02_compat_sdk_runs_on_status_and_forgets() {
    let sdk = LocalOptions {
        compatibility: Compatibility::Sdk,
        ..options()
    };
    let served = Served::start(Mock::default(), sdk).await;
    let (_, run) = served.post("/run", &json!({"input": {"return": 7}})).await;
    let id = run["id"].as_str().unwrap().to_owned();
    assert!(id.starts_with("test-") && run["status"] == "IN_PROGRESS", "{run}");
    assert_eq!(served.mock.runs(), 0, "only stored");
    let (_, status) = served.post(&format!("/status/{id}"), &json!({})).await;
    assert_eq!(status, json!({"id": id, "status": "COMPLETED", "output": 7}));
    let (code, gone) = served.post(&format!("/status/{id}"), &json!({})).await;
    assert_eq!(
        (code, gone),
        (200, json!({"id": id, "status": "FAILED", "error": "Job ID not found"}))
    );
    let (_, stream) = served.post("/run", &json!({"input": {}})).await;
    let (_, stream) = served
        .post(&format!("/stream/{}", stream["id"].as_str().unwrap()), &json!({}))
        .await;
    assert_eq!(stream["error"], "Stream not supported, handler must be a generator.");
    assert_eq!(served.get("/run").await, (405, json!({"detail": "Method Not Allowed"})));
    assert_eq!(
        served.post("/cancel/x", &json!({})).await,
        (404, json!({"detail": "Not Found"}))
    );
    let kind = |answer: &(u16, Value)| {
        (
            answer.0,
            answer.1["detail"][0]["type"].as_str().map(str::to_owned),
            answer.1["detail"][0]["loc"].clone(),
        )
    };
    let missing = served.post("/runsync", &json!({})).await;
    assert_eq!(
        kind(&missing),
        (422, Some("missing".to_owned()), json!(["body", "input"]))
    );
    let list = served.post("/runsync", &json!({"input": [1]})).await;
    assert_eq!(
        kind(&list),
        (422, Some("dict_type".to_owned()), json!(["body", "input"]))
    );
    let bare = served
        .send(
            served
                .http
                .post(format!("{}/runsync", served.base))
                .body("{\"input\":{}}"),
        )
        .await;
    assert_eq!(kind(&bare), (422, Some("dataclass_type".to_owned()), json!(["body"])));
    assert_eq!(
        served.post("/runsync", &json!({"input": {"return": {}}})).await.0,
        200,
        "an SDK defect that is not copied"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a02_compat_sdk_streams_all_at_once_and_posts_the_bare_result() {
    let plane = FakeRunPod::start();
    let sdk = LocalOptions {
        compatibility: Compatibility::Sdk,
        ..options()
    };
    let mock = Mock {
        form: OutputForm::Stream { aggregate: false },
        ..Mock::default()
    };
    let served = Served::start(mock, sdk).await;
    let body = json!({"input": {"chunks": [1, 2], "return": null}, "webhook": format!("{}/hook", plane.url())});
    let (_, run) = served.post("/run", &body).await;
    let (_, stream) = served
        .post(&format!("/stream/{}", run["id"].as_str().unwrap()), &json!({}))
        .await;
    assert_eq!(stream["stream"], json!([{"output": 1}, {"output": 2}]));
    plane.eventually("the webhook", |_| !plane.of(Route::Other).is_empty());
    assert_eq!(plane.of(Route::Other)[0].json(), json!([{"output": 1}, {"output": 2}]));
    served.post("/runsync", &body).await;
    plane.eventually("the second webhook", |_| plane.of(Route::Other).len() == 2);
    assert_eq!(plane.of(Route::Other)[1].json(), json!({"output": [1, 2]}));
}

#[tokio::test(flavor = "multi_thread")]
async fn a02_compat_sdk_has_the_development_servers_pages_and_nothing_of_the_cloud() {
    let sdk = LocalOptions {
        compatibility: Compatibility::Sdk,
        endpoint: Some("ep1".to_owned()),
        ..options()
    };
    let served = Served::start(Mock::default(), sdk).await;
    let page = served.http.get(format!("{}/", served.base)).send().await.unwrap();
    let kind = page.headers()["content-type"].to_str().unwrap().to_owned();
    assert!(page.status() == 200 && kind.starts_with("text/html"), "{kind}");
    let still = reqwest::Client::builder()
        .no_proxy()
        .redirect(reqwest::redirect::Policy::none())
        .build()
        .unwrap();
    let docs = still.get(format!("{}/docs", served.base)).send().await.unwrap();
    assert_eq!(
        (docs.status().as_u16(), &docs.headers()["location"]),
        (307, &"/".parse().unwrap())
    );
    let (_, described) = served.get("/openapi.json").await;
    assert_eq!(described["info"]["title"], "Runpod | Development Worker API");
    for path in ["/cancel/x", "/retry/x", "/purge-queue", "/other/realtime"] {
        assert_eq!(served.post(path, &json!({})).await.0, 404, "{path}");
    }
    assert_eq!(served.get("/health").await, (404, json!({"detail": "Not Found"})));
    for path in ["/run", "/runsync", "/status/x", "/stream/x", "/ep1/realtime"] {
        assert_eq!(served.get(path).await.0, 405, "{path}");
    }
    for path in ["/status/nope", "/stream/nope"] {
        let (code, answer) = served.post(path, &json!({})).await;
        assert_eq!((code, &answer["error"]), (200, &json!("Job ID not found")), "{path}");
    }
    let realtime = served
        .post("/ep1/realtime", &json!({"id": "r", "input": {"return": [1]}}))
        .await;
    assert_eq!(realtime, (200, json!({"output": [1]})));
    let (code, failed) = served
        .post("/ep1/realtime", &json!({"id": "r", "input": {"fail": "no"}}))
        .await;
    assert!(
        code == 200 && failed["error"].is_string() && failed.get("output").is_none(),
        "{failed}"
    );
    assert_eq!(served.post("/ep1/realtime", &json!({"input": 1})).await.0, 422);
}

#[tokio::test(flavor = "multi_thread")]
async fn a02_compat_sdk_answers_every_outcome_and_survives_a_webhook_that_fails() {
    let plane = FakeRunPod::start();
    plane.script(Route::Other, [Step::status(500)]);
    let sdk = LocalOptions {
        compatibility: Compatibility::Sdk,
        ..options()
    };
    let served = Served::start(Mock::default(), sdk).await;
    let body = json!({"input": {"return": null}, "webhook": format!("{}/hook", plane.url())});
    let (code, answer) = served.post("/runsync", &body).await;
    assert_eq!((code, &answer["status"]), (200, &json!("COMPLETED")));
    assert!(
        answer.get("output").is_none(),
        "a null output leaves the key out: {answer}"
    );
    plane.eventually("the webhook", |_| !plane.of(Route::Other).is_empty());
    for input in [
        json!({"fail": "x"}),
        json!({"panic": "x"}),
        json!({"return": {"error": "m"}}),
    ] {
        let (code, answer) = served
            .post(
                "/runsync",
                &json!({"input": input, "webhook": format!("{}/hook", plane.url())}),
            )
            .await;
        assert_eq!((code, &answer["status"]), (200, &json!("FAILED")), "{input}");
        assert!(
            answer["error"].is_string() && answer.get("output").is_none(),
            "{answer}"
        );
    }
    served.post("/runsync", &body).await;
    plane.eventually("a webhook after a success", |_| plane.of(Route::Other).len() >= 2);
    assert_eq!(plane.of(Route::Other).len(), 2, "once each, and not for failures");
    for wrong in ["{", "[]", "7"] {
        let request = served.http.post(format!("{}/run", served.base)).body(wrong);
        let (code, answer) = served.send(request.header("content-type", "application/json")).await;
        assert!(
            code == 422 && answer["detail"][0]["type"].is_string(),
            "{wrong}: {answer}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a01_one_local_job_has_the_exit_code_of_its_outcome() {
    let folder = tempfile::tempdir().unwrap();
    let once = async |input: Option<&str>, form| {
        let mut out = Vec::new();
        let mock = Arc::new(Mock {
            form,
            ..Mock::default()
        });
        let code = run_once(mock, input, folder.path(), &Redactor::default(), &mut out).await;
        (code.map_err(|failure| failure.code), String::from_utf8(out).unwrap())
    };
    let value = OutputForm::Value;
    let absent = once(None, value).await;
    assert_eq!(absent.0, Err("RUNPOD_TEST_INPUT".to_owned()));
    for bad in ["{", "[]", "{}", r#"{"input": null}"#] {
        assert!(once(Some(bad), value).await.0.is_err(), "{bad}");
    }
    assert_eq!(
        once(Some(r#"{"input": {"return": {"a": 1}}}"#), value).await,
        (Ok(0), "Job result: {\"output\":{\"a\":1}}\n".to_owned())
    );
    assert_eq!(
        once(Some(r#"{"input": {}}"#), value).await.0,
        Ok(0),
        "an empty input is one"
    );
    let (code, text) = once(Some(r#"{"input": {"fail": "x"}}"#), value).await;
    assert!(code == Ok(1) && text.contains("TEST_FAILED"), "{text}");
    std::fs::write(
        folder.path().join("test_input.json"),
        r#"{"input": {"chunks": [1], "return": null}}"#,
    )
    .unwrap();
    let stream = once(None, OutputForm::Stream { aggregate: true }).await;
    assert_eq!(
        stream,
        (Ok(0), "Job chunk: 1\nJob result: {\"output\":[1]}\n".to_owned())
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handler_can_be_called_without_any_platform() {
    use brightrun_worker::runpod::{Handler, JobContext};
    let output = Mock::default()
        .run(
            RunPodJob::new("x", json!({"progress": [1], "return": 3})),
            JobContext::detached(),
        )
        .await;
    assert_eq!(output.unwrap(), json!(3));
}
