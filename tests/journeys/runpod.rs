//! The binary as RunPod starts it: a job that is only named, a job that is told whole, and the ways out of both.

use std::process::Child;
use std::sync::Arc;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::database::eventually;
use crate::fake_runpod::{FakeRunPod, Request, Route};
use crate::world::{BASE_MODEL, World, dataset, settings};

/// Ten examples, one held out, 20 epochs of one example a step.
const STEPS: u64 = 180;

/// A worker process that the platform has started; killed with the test.
struct Serverless(Child);

impl Serverless {
    fn start(world: &World, plane: &FakeRunPod, log: &str) -> Self {
        let file = std::fs::File::create(world.folder.path().join(log)).unwrap();
        let mut command = world.brightrun(&["worker"]);
        command.envs(plane.variables()).env("RUNPOD_ENDPOINT_ID", "ep1");
        Self(command.stdout(file).spawn().unwrap())
    }

    /// Without a database.
    fn start_alone(world: &World, plane: &FakeRunPod) -> Self {
        let mut command = world.brightrun(&["worker"]);
        command.envs(plane.variables()).env_remove("DATABASE_URL");
        Self(command.spawn().unwrap())
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.0), signal).unwrap();
    }

    fn leave(mut self) -> Option<i32> {
        self.signal(Signal::TERM);
        self.0.wait().unwrap().code()
    }

    fn exit(mut self) -> Option<i32> {
        self.0.wait().unwrap().code()
    }
}

impl Drop for Serverless {
    fn drop(&mut self) {
        // It may have left already.
        let _gone = self.0.kill();
        let _reaped = self.0.wait();
    }
}

async fn result(plane: &Arc<FakeRunPod>, delivery: &str) -> Value {
    let (plane, delivery) = (Arc::clone(plane), delivery.to_owned());
    tokio::task::spawn_blocking(move || plane.result(&delivery))
        .await
        .unwrap()
}

async fn events(world: &World, job: Uuid, names: &[&str]) -> i64 {
    world
        .database
        .count("brightrun.event where job_id = $1 and event = any($2)", &[&job, &names])
        .await
}

async fn one_of_everything(world: &World, job: Uuid) {
    for table in ["model_artifacts", "cost_records"] {
        let count = world
            .database
            .count(&format!("{table} where job_id = $1"), &[&job])
            .await;
        assert_eq!(count, 1, "{table}");
    }
    assert_eq!(world.leases(job).await, 0);
}

fn error_of(result: &Value) -> Value {
    let text = result["error"].as_str().unwrap();
    serde_json::from_str(text).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_runpod_names_is_trained_and_a_second_delivery_gets_the_same_answer() {
    let (world, plane) = (World::new().await, Arc::new(FakeRunPod::start()));
    let job = world.job(10, 2).await;
    let worker = Serverless::start(&world, &plane, "worker.log");
    plane.job("first-e1", json!({"job_id": job}));
    let first = result(&plane, "first-e1").await;
    assert_eq!(first["output"]["status"], "success", "{first}");
    assert_eq!(first["output"]["model_metadata"]["base_model"], BASE_MODEL);
    let path = first["output"]["artifacts"]["adapter_model.safetensors"]
        .as_str()
        .unwrap();
    assert!(world.storage_folder().join("lora-models").join(path).exists());
    let row = world.database.job(job).await;
    assert_eq!(row["status"], "completed", "{row:#}");

    plane.job("second-e1", json!({"job_id": job}));
    assert_eq!(result(&plane, "second-e1").await, first);
    assert_eq!(events(&world, job, &["claimed", "resumed"]).await, 1, "it ran once");
    one_of_everything(&world, job).await;
    assert_eq!(worker.leave(), Some(0));
    let log = std::fs::read_to_string(world.folder.path().join("worker.log")).unwrap();
    let lines: Vec<Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let of_job = lines.iter().filter(|line| line["requestId"] == "first-e1");
    assert!(of_job.count() > 4, "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_workers_with_the_same_job_one_trains_and_both_answer() {
    let (world, plane) = (World::new().await, Arc::new(FakeRunPod::start()));
    let job = world.job(10, 20).await;
    let _workers = [
        Serverless::start(&world, &plane, "a.log"),
        Serverless::start(&world, &plane, "b.log"),
    ];
    for delivery in ["a-e1", "b-e1"] {
        plane.job(delivery, json!({"job_id": job}));
    }
    let (a, b) = (result(&plane, "a-e1").await, result(&plane, "b-e1").await);
    assert_eq!(a["output"]["status"], "success", "{a}");
    assert_eq!(a, b);
    assert_eq!(events(&world, job, &["claimed", "resumed"]).await, 1);
    one_of_everything(&world, job).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_gives_the_row_back_unposted_and_the_next_delivery_continues_to_the_same_bytes() {
    let (world, plane) = (World::new().await, Arc::new(FakeRunPod::start()));
    let undisturbed = world.job(10, 20).await;
    world.work_until(undisturbed, "completed").await;
    let job = world.job(10, 20).await;
    let worker = Serverless::start(&world, &plane, "worker.log");
    plane.job("r-e1", json!({"job_id": job}));
    eventually("a checkpoint", || async { world.checkpointed_step(job) >= 20 }).await;
    worker.signal(Signal::TERM);
    assert_eq!(worker.exit(), Some(0));
    let reached = world.checkpointed_step(job);
    assert!((20..STEPS).contains(&reached), "step {reached}");
    assert!(plane.results("r-e1").is_empty(), "an interrupted job posts nothing");
    let row = world.database.job(job).await;
    assert_eq!((&row["status"], &row["retry_count"]), (&json!("queued"), &json!(0)));

    let _next = Serverless::start(&world, &plane, "next.log");
    plane.job("r-e1", json!({"job_id": job}));
    assert_eq!(result(&plane, "r-e1").await["output"]["status"], "success");
    assert!(
        world.adapter(job) == world.adapter(undisturbed),
        "stopped after step {reached}: other bytes"
    );
    one_of_everything(&world, job).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_workers_job_is_continued_by_the_redelivery_once_its_lease_is_over() {
    let (world, plane) = (World::new().await, Arc::new(FakeRunPod::start()));
    let job = world.job(10, 20).await;
    let worker = Serverless::start(&world, &plane, "worker.log");
    plane.job("r-e1", json!({"job_id": job}));
    eventually("a checkpoint", || async { world.checkpointed_step(job) >= 20 }).await;
    worker.signal(Signal::KILL);
    assert_eq!(worker.exit(), None);

    let _next = Serverless::start(&world, &plane, "next.log");
    plane.job("r-e1", json!({"job_id": job}));
    let answer = result(&plane, "r-e1").await;
    assert_eq!(answer["output"]["status"], "success", "{answer}");
    let row = world.database.job(job).await;
    assert_eq!((&row["status"], &row["retry_count"]), (&json!("completed"), &json!(1)));
    one_of_everything(&world, job).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_runpod_stops_posts_nothing_and_counts_as_an_attempt_unless_the_user_cancelled_it() {
    let (world, plane) = (World::new().await, Arc::new(FakeRunPod::start()));
    let worker = Serverless::start(&world, &plane, "worker.log");
    for is_cancelled in [false, true] {
        let job = world.job(10, 20).await;
        let delivery = format!("r-{is_cancelled}-e1");
        plane.job(&delivery, json!({"job_id": job}));
        eventually("a checkpoint", || async { world.checkpointed_step(job) >= 5 }).await;
        if is_cancelled {
            let mut app = world.database.signed_in(world.user).await;
            assert_eq!(app.cancel_job(job, 0.0).await.unwrap(), 1);
        }
        plane.stop([json!(delivery)]);
        eventually("the lease is over", || async { world.leases(job).await == 0 }).await;
        let row = world.database.job(job).await;
        let (status, retries) = if is_cancelled { ("cancelled", 0) } else { ("queued", 1) };
        assert_eq!((&row["status"], &row["retry_count"]), (&json!(status), &json!(retries)));
        if !is_cancelled {
            assert!(plane.results(&delivery).is_empty());
        }
    }
    assert_eq!(worker.leave(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_cannot_be_done_fails_with_an_error_in_words() {
    let (world, plane) = (World::new().await, Arc::new(FakeRunPod::start()));
    let worker = Serverless::start(&world, &plane, "worker.log");
    plane.job("unknown-e1", json!({"job_id": Uuid::new_v4()}));
    assert_eq!(
        error_of(&result(&plane, "unknown-e1").await)["error_code"],
        "JOB_NOT_FOUND"
    );
    plane.job("empty-e1", json!({}));
    let told = error_of(&result(&plane, "empty-e1").await);
    assert_eq!(told["error_code"], "JOB_INPUT_INVALID");
    let message = told["error_message"].as_str().unwrap();
    assert!(
        message.starts_with("Validation error: Missing required field: job_id"),
        "{message}"
    );
    let refused = world.insert(Uuid::new_v4(), settings(1)).await;
    plane.job("missing-e1", json!({"job_id": refused}));
    let told = error_of(&result(&plane, "missing-e1").await);
    assert_eq!(told["error_code"], "STORAGE_OBJECT_MISSING");
    assert_eq!(world.database.job(refused).await["status"], "failed");
    assert_eq!(worker.leave(), Some(0));
}

/// Serves one text on this machine.
async fn serve(text: String) -> String {
    let router = axum::Router::new().route("/answers.jsonl", axum::routing::get(|| async { text }));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, router).await });
    format!("http://{address}/answers.jsonl?token=canary-not-a-real-token")
}

fn whole(url: &str) -> Value {
    json!({
        "job_id": "owner-job-1", "dataset_url": url, "hyperparameters": settings(2),
        "gpu_config": {"gpu_type": "A100-80GB", "num_gpus": 1},
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_whole_job_needs_no_database_and_answers_in_the_words_of_the_app() {
    let (mut world, plane) = (World::new().await, Arc::new(FakeRunPod::start()));
    let url = serve(dataset(10)).await;
    let worker = Serverless::start_alone(&world, &plane);
    plane.job("refused-e1", whole(&url));
    let told = error_of(&result(&plane, "refused-e1").await);
    assert_eq!(
        told["error_code"], "STORAGE_URL_INVALID",
        "unencrypted addresses need the setting: {told}"
    );
    assert_eq!(worker.leave(), Some(0));

    world.config.worker.loopback_datasets = true;
    let worker = Serverless::start_alone(&world, &plane);
    plane.job("whole-e1", whole(&url));
    let answer = result(&plane, "whole-e1").await;
    let output = &answer["output"];
    assert_eq!(
        (&output["status"], &output["progress"]),
        (&json!("success"), &json!(100)),
        "{answer}"
    );
    assert_eq!(
        (&output["job_id"], &output["current_step"]),
        (&json!("owner-job-1"), &json!(18))
    );
    assert_eq!(output["model_metadata"]["lora_rank"], 4);
    assert!(output["model_metadata"]["final_loss"].as_f64().unwrap() > 0.0);
    let adapter = output["model_files"]["adapter_model.safetensors"].as_str().unwrap();
    let file = adapter.strip_prefix("file://").unwrap();
    assert!(std::fs::metadata(file).unwrap().len() > 1000);
    let is_told = |request: &Request| request.is_progress() && request.json()["output"]["progress"].is_number();
    assert!(
        plane.of(Route::Done).iter().any(is_told),
        "progress is told in the poller's words"
    );
    assert!(!plane.trace().contains("canary-not-a-real-token"));
    assert_eq!(worker.leave(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn one_job_from_the_command_line_is_run_and_its_end_is_the_exit_code() {
    let mut world = World::new().await;
    world.config.worker.loopback_datasets = true;
    let job = json!({"input": whole(&serve(dataset(10)).await)}).to_string();
    let mut command = world.brightrun(&["worker", "--test_input", &job]);
    let done = tokio::task::spawn_blocking(move || command.env_remove("DATABASE_URL").output().unwrap());
    let done = done.await.unwrap();
    let (said, log, code) = crate::world::spoken(&done);
    assert_eq!(code, 0, "{log}");
    let told = said.lines().last().unwrap().strip_prefix("Job result: ").unwrap();
    let told: Value = serde_json::from_str(told).unwrap();
    assert_eq!(told["output"]["status"], "success");
    let failed = world
        .brightrun(&["worker", "--test_input={\"input\":{}}"])
        .output()
        .unwrap();
    assert_eq!(failed.status.code(), Some(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_local_api_trains_a_row_by_runsync_and_cancels_by_cancel() {
    use std::io::BufRead;
    let world = World::new().await;
    let mut child = Serverless(world.brightrun(&["worker", "--serve", "--port", "0"]).spawn().unwrap());
    let mut line = String::new();
    std::io::BufReader::new(child.0.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    let base = line.trim().strip_prefix("Serving ").unwrap().to_owned();
    brightrun_worker::storage::http::install_crypto_provider();
    let client = reqwest::Client::new();
    let post = |path: &str, body: Value| client.post(format!("{base}/{path}")).json(&body).send();
    let job = world.job(10, 2).await;
    let answer: Value = post("runsync?wait=60000", json!({"input": {"job_id": job}}))
        .await
        .unwrap()
        .json()
        .await
        .unwrap();
    assert_eq!(
        (&answer["status"], &answer["output"]["status"]),
        (&json!("COMPLETED"), &json!("success")),
        "{answer}"
    );
    one_of_everything(&world, job).await;

    let job = world.job(10, 20).await;
    let answer: Value = post("run", json!({"input": {"job_id": job}}))
        .await
        .unwrap()
        .json()
        .await
        .unwrap();
    let id = answer["id"].as_str().unwrap();
    eventually("a checkpoint", || async { world.checkpointed_step(job) >= 5 }).await;
    let answer: Value = post(&format!("cancel/{id}"), json!({}))
        .await
        .unwrap()
        .json()
        .await
        .unwrap();
    assert_eq!(answer["status"], "CANCELLED");
    eventually("the lease is over", || async { world.leases(job).await == 0 }).await;
    assert_eq!(world.database.job(job).await["status"], "queued");
}
