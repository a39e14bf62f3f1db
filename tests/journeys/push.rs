//! Jobs that an orchestrator pushes to RunPod: one control plane for clients and workers, real rows, the real binary.

use std::process::Child;
use std::sync::Arc;

use brightrun_worker::orchestrator::Orchestrator;
use brightrun_worker::orchestrator::metrics::Metrics;
use brightrun_worker::orchestrator::settings::EndpointSettings;
use brightrun_worker::secret::Secret;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::database::eventually;
use crate::fake_runpod::{CANARY_KEY, FakeRunPod, Route, Step};
use crate::world::World;

/// A stage with an endpoint.
struct Cloud {
    world: World,
    plane: Arc<FakeRunPod>,
}

/// An orchestrator of this process; ends with the test.
struct Pushing {
    _over: tokio_util::sync::DropGuard,
    metrics: Arc<Metrics>,
}

/// A worker process of the endpoint.
struct Worker(Child);

impl Drop for Worker {
    fn drop(&mut self) {
        let _gone = self.0.kill();
        let _reaped = self.0.wait();
    }
}

impl Cloud {
    async fn new() -> Self {
        let (mut world, plane) = (World::new().await, Arc::new(FakeRunPod::start()));
        brightrun_worker::storage::http::install_crypto_provider();
        world.config.orchestrator.api_base = plane.api();
        world.config.orchestrator.poll_seconds = 1;
        world.config.orchestrator.endpoints = vec![EndpointSettings {
            id: "ep1".to_owned(),
            gpu_types: vec!["A100-80GB".to_owned()],
            max_jobs: 4,
        }];
        Self { world, plane }
    }

    async fn push(&self) -> Pushing {
        let over = CancellationToken::new();
        let metrics = Arc::new(Metrics::default());
        let key = Secret::new(CANARY_KEY);
        let queue = self.world.queue().await;
        let orchestrator = Orchestrator::new(queue, self.world.config.clone(), &key, metrics.clone()).unwrap();
        let stop = over.clone();
        tokio::spawn(async move { orchestrator.run(&stop).await });
        Pushing {
            _over: over.drop_guard(),
            metrics,
        }
    }

    fn worker(&self, pod: &str) -> Worker {
        let log = std::fs::File::create(self.world.folder.path().join(format!("{pod}.log"))).unwrap();
        let mut command = self.world.brightrun(&["worker"]);
        command
            .envs(self.plane.variables())
            .env("RUNPOD_POD_ID", pod)
            .stdout(log);
        Worker(command.spawn().unwrap())
    }

    fn runs(&self, job: Uuid) -> usize {
        let runs = self.plane.of(Route::Run);
        runs.iter()
            .filter(|request| request.json()["input"]["job_id"] == json!(job))
            .count()
    }

    async fn row(&self, job: Uuid) -> Value {
        self.world.database.job(job).await
    }

    async fn dispatches(&self) -> i64 {
        self.world.database.count("brightrun.dispatch", &[]).await
    }

    async fn submitted(&self, job: Uuid) -> String {
        eventually("the job is submitted", || async {
            self.row(job).await["external_job_id"].is_string()
        })
        .await;
        self.row(job).await["external_job_id"].as_str().unwrap().to_owned()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_is_pushed_trained_by_the_endpoints_worker_and_forgotten_at_runpod() {
    let cloud = Cloud::new().await;
    let job = cloud.world.job(10, 2).await;
    let pushing = cloud.push().await;
    cloud.submitted(job).await;
    assert_eq!(cloud.row(job).await["current_stage"], "queued_on_gpu");
    let _worker = cloud.worker("pod1");
    cloud.world.becomes(job, "completed").await;
    eventually("no dispatch is left", || async { cloud.dispatches().await == 0 }).await;
    let run = cloud.plane.of(Route::Run).remove(0);
    assert_eq!(
        run.json()["input"],
        json!({"job_id": job}),
        "a reference and nothing else"
    );
    assert!(run.json()["policy"]["executionTimeout"].as_u64().unwrap() >= 3_600_000);
    assert_eq!(cloud.runs(job), 1);
    assert!(cloud.plane.of(Route::Cancel).is_empty(), "{}", cloud.plane.trace());
    assert!(pushing.metrics.text().contains("brightrun_push_sent_total 1\n"));
}

#[tokio::test(flavor = "multi_thread")]
async fn two_orchestrators_push_each_job_once_and_no_more_than_the_endpoint_takes() {
    let cloud = Cloud::new().await;
    let mut jobs = Vec::new();
    for _ in 0..12 {
        jobs.push(cloud.world.job(10, 1).await);
    }
    let _pushing = [cloud.push().await, cloud.push().await];
    cloud.plane.eventually("four runs", |requests| {
        requests.iter().filter(|request| request.route == Route::Run).count() == 4
    });
    // Looks at RunPod are made by both, several times, before anything may go on.
    let plane = cloud.plane.clone();
    tokio::task::spawn_blocking(move || plane.more(Route::Status, 12))
        .await
        .unwrap();
    assert_eq!((cloud.plane.of(Route::Run).len(), cloud.dispatches().await), (4, 4));
    let _workers = [cloud.worker("pod1"), cloud.worker("pod2")];
    for job in &jobs {
        cloud.world.becomes(*job, "completed").await;
        assert_eq!(cloud.runs(*job), 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_ends_before_a_worker_came_is_an_attempt_and_the_last_one_fails_the_job() {
    let cloud = Cloud::new().await;
    let kind = "update brightrun.job_kind set retry_base = '10 milliseconds', retry_cap = '10 milliseconds'";
    cloud.world.database.owner.batch_execute(kind).await.unwrap();
    let job = cloud.world.job(10, 1).await;
    let pushing = cloud.push().await;
    let mut known = String::new();
    for (attempt, status) in ["FAILED", "TIMED_OUT", "CANCELLED"].into_iter().enumerate() {
        eventually("a new run", || async {
            cloud.row(job).await["external_job_id"]
                .as_str()
                .is_some_and(|id| id != known)
        })
        .await;
        known = cloud.submitted(job).await;
        assert_eq!(cloud.row(job).await["retry_count"], json!(attempt));
        cloud.plane.end(&known, status);
    }
    let row = cloud.world.becomes(job, "failed").await;
    assert!(
        row["error_message"].as_str().unwrap().contains("[RUNPOD_CANCELLED]"),
        "{row:#}"
    );
    assert_eq!(cloud.runs(job), 3);
    assert!(pushing.metrics.text().contains("brightrun_push_lost_total 3\n"));
    eventually("no dispatch is left", || async { cloud.dispatches().await == 0 }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_in_the_app_reaches_runpod_whether_the_job_waits_or_runs() {
    let cloud = Cloud::new().await;
    let mut app = cloud.world.database.signed_in(cloud.world.user).await;
    let _pushing = cloud.push().await;
    let waiting = cloud.world.job(10, 20).await;
    let remote = cloud.submitted(waiting).await;
    app.cancel_job(waiting, 0.0).await.unwrap();
    let is_cancelled = |id: &str| {
        let jobs = cloud.plane.submitted();
        jobs.iter().any(|job| job["id"] == id && job["status"] == "CANCELLED")
    };
    eventually("the waiting run is cancelled", || async { is_cancelled(&remote) }).await;

    let _worker = cloud.worker("pod1");
    let running = cloud.world.job(10, 20).await;
    eventually("a checkpoint", || async { cloud.world.checkpointed_step(running) >= 5 }).await;
    app.cancel_job(running, 0.0).await.unwrap();
    eventually("the job is over", || async {
        cloud.world.leases(running).await == 0 && cloud.dispatches().await == 0
    })
    .await;
    for job in [waiting, running] {
        assert_eq!(cloud.row(job).await["status"], "cancelled");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_storm_of_429_and_an_answer_that_got_lost_delay_a_job_and_nothing_else() {
    let cloud = Cloud::new().await;
    cloud.plane.script(
        Route::Run,
        [
            Step::status(429).with("Retry-After", "1"),
            Step::status(500),
            Step::status(503),
        ],
    );
    let job = cloud.world.job(10, 1).await;
    let _pushing = cloud.push().await;
    cloud.submitted(job).await;
    let _worker = cloud.worker("pod1");
    cloud.world.becomes(job, "completed").await;
    assert_eq!(cloud.row(job).await["retry_count"], 0);
    assert_eq!(
        cloud
            .world
            .database
            .count("cost_records where job_id = $1", &[&job])
            .await,
        1
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_orchestrator_that_died_between_submitting_and_noting_it_is_replaced() {
    let cloud = Cloud::new().await;
    let job = cloud.world.job(10, 1).await;
    // What a dead one leaves behind: a place taken, nothing noted, its hold over.
    let dead = "insert into brightrun.dispatch (job_id, endpoint, reserved, claims, created_at, due_at)
                values ($1, 'ep1', 0, 0, now(), now())";
    cloud.world.database.owner.execute(dead, &[&job]).await.unwrap();
    cloud.plane.job("remote-of-the-dead-e1", json!({"job_id": job}));
    let _pushing = cloud.push().await;
    cloud.submitted(job).await;
    let _workers = [cloud.worker("pod1"), cloud.worker("pod2")];
    cloud.world.becomes(job, "completed").await;
    let claims = "brightrun.event where job_id = $1 and event in ('claimed', 'resumed')";
    assert_eq!(
        cloud.world.database.count(claims, &[&job]).await,
        1,
        "two runs outside, one inside"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_worker_that_is_faster_calls_the_run_at_runpod_off() {
    let cloud = Cloud::new().await;
    let _pushing = cloud.push().await;
    let job = cloud.world.job(10, 20).await;
    let remote = cloud.submitted(job).await;
    let puller = cloud.world.worker().await;
    eventually("the run is called off", || async {
        let jobs = cloud.plane.submitted();
        jobs.iter()
            .any(|job| job["id"] == json!(remote) && job["status"] == "CANCELLED")
    })
    .await;
    cloud.world.becomes(job, "completed").await;
    puller.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_costs_too_much_is_refused_with_the_reason_and_a_month_is_not_overdrawn() {
    let mut cloud = Cloud::new().await;
    cloud.world.config.orchestrator.max_job_dollars = 30.0;
    cloud.world.config.orchestrator.max_user_dollars = 50.0;
    let priced = |dollars: f64| {
        let database = &cloud.world.database;
        let world = &cloud.world;
        async move {
            let job = world.job(10, 1).await;
            let set =
                "update brightrun.job set payload = jsonb_set(payload, '{estimated_total_cost}', to_jsonb($2::float8))
                       where id = $1";
            database.owner.execute(set, &[&job, &dollars]).await.unwrap();
            job
        }
    };
    let expensive = priced(31.0).await;
    let first = priced(28.0).await;
    let second = priced(28.0).await;
    let _pushing = cloud.push().await;
    let row = cloud.world.becomes(expensive, "failed").await;
    assert!(
        row["error_message"].as_str().unwrap().contains("[JOB_TOO_EXPENSIVE]"),
        "{row:#}"
    );
    cloud.submitted(first).await;
    let plane = cloud.plane.clone();
    tokio::task::spawn_blocking(move || plane.more(Route::Status, 3))
        .await
        .unwrap();
    assert_eq!(
        cloud.runs(second),
        0,
        "what is set aside for the first leaves too little for the second"
    );
    let spent = "insert into cost_records (user_id, job_id, cost_type, amount, details, billing_period)
                 values ($1, $2, 'training_compute', 40, '{}', (now() at time zone 'utc')::date)";
    cloud
        .world
        .database
        .owner
        .execute(spent, &[&cloud.world.user, &first])
        .await
        .unwrap();
    let row = cloud.world.becomes(second, "failed").await;
    assert!(
        row["error_message"].as_str().unwrap().contains("[USER_SPEND_LIMIT]"),
        "{row:#}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_pushes_serves_its_numbers_and_says_what_is_missing() {
    use std::io::BufRead;
    let mut cloud = Cloud::new().await;
    cloud.world.config.orchestrator.listen = "127.0.0.1:0".to_owned();
    let refused = cloud
        .world
        .brightrun(&["orchestrate"])
        .env_remove("RUNPOD_API_KEY")
        .output()
        .unwrap();
    assert!(String::from_utf8_lossy(&refused.stderr).contains("RUNPOD_API_KEY"));
    let job = cloud.world.job(10, 1).await;
    let mut command = cloud.world.brightrun(&["orchestrate"]);
    let mut child = Worker(command.env("RUNPOD_API_KEY", CANARY_KEY).spawn().unwrap());
    let mut line = String::new();
    std::io::BufReader::new(child.0.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    let base = line
        .trim()
        .strip_prefix("Serving ")
        .unwrap()
        .split("/metrics")
        .next()
        .unwrap()
        .to_owned();
    cloud.submitted(job).await;
    let client = reqwest::Client::new();
    let health: Value = client
        .get(format!("{base}/health"))
        .send()
        .await
        .unwrap()
        .json()
        .await
        .unwrap();
    assert_eq!(health["ok"], true, "{health}");
    let text = client
        .get(format!("{base}/metrics"))
        .send()
        .await
        .unwrap()
        .text()
        .await
        .unwrap();
    assert!(
        text.contains("brightrun_jobs{queue=\"default\",kind=\"train\",state=\"ready\"} 1"),
        "{text}"
    );
    assert!(text.contains("brightrun_push_sent_total 1") && !text.contains(CANARY_KEY));
}
