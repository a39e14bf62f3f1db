//! The projection: what each event of a training job does to the app's rows, whatever the event carries.

#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

#[path = "support/database.rs"]
#[allow(dead_code)]
mod database;

use database::{Database, finished, sqlstate};
use serde_json::{Value, json};
use uuid::Uuid;

/// A training job whose events a test makes up.
struct Job {
    database: Database,
    user: Uuid,
    id: Uuid,
}

impl Job {
    async fn queued() -> Self {
        let database = Database::migrated().await;
        let user = database.user().await;
        let dataset = database.ready_dataset(user).await;
        let id = database.signed_in(user).await.insert_job(dataset).await.unwrap();
        Self { database, user, id }
    }

    async fn running() -> Self {
        let job = Self::queued().await;
        job.event("claimed", json!({})).await;
        job.event("running", json!({ "gpu_type": "H100", "gpu_count": 1 }))
            .await;
        job
    }

    /// Projects an event, as the engine does.
    async fn event(&self, event: &str, detail: Value) {
        self.try_event(event, &detail.to_string()).await.unwrap();
    }

    /// The same with JSON that only Postgres can hold.
    async fn try_event(&self, event: &str, detail: &str) -> Result<(), tokio_postgres::Error> {
        let statement = "select brightrun.project_training_job($1, $2, $3::text::jsonb)";
        self.database
            .owner
            .execute(statement, &[&self.id, &event, &detail])
            .await
            .map(|_| ())
    }

    async fn row(&self) -> Value {
        self.database.job(self.id).await
    }

    async fn set(&self, assignments: &str) {
        let statement = format!("update training_jobs set {assignments} where id = $1");
        self.database.owner.execute(&statement, &[&self.id]).await.unwrap();
    }

    async fn steps(&self) -> Vec<i32> {
        let rows = self
            .database
            .owner
            .query("select step from metrics_points order by timestamp", &[])
            .await
            .unwrap();
        rows.iter().map(|row| row.get(0)).collect()
    }

    async fn costs(&self) -> Value {
        self.database
            .json(
                "select coalesce(jsonb_agg(to_jsonb(c) order by recorded_at), '[]') from cost_records c",
                &[],
            )
            .await
    }

    async fn told(&self) -> Vec<String> {
        self.database
            .notifications(self.user)
            .await
            .iter()
            .map(|told| told["type"].as_str().unwrap().to_owned())
            .collect()
    }

    async fn artifact(&self) -> Value {
        self.database
            .json("select to_jsonb(a) from model_artifacts a", &[])
            .await
    }
}

/// Asserts some columns of a row.
fn assert_columns(row: &Value, expected: &[(&str, Value)]) {
    for (column, value) in expected {
        assert_eq!(&row[*column], value, "{column}");
    }
}

#[tokio::test]
async fn a_claim_shows_the_job_initializing_and_writes_both_dialects() {
    let job = Job::queued().await;
    job.event("claimed", json!({ "attempt": 1, "worker": "w" })).await;
    assert_columns(
        &job.row().await,
        &[
            ("status", json!("initializing")),
            ("current_stage", json!("initializing")),
            (
                "hyperparameters",
                json!({ "learning_rate": 0.00005, "batch_size": 4, "epochs": 3, "num_epochs": 3, "rank": 16, "lora_rank": 16 }),
            ),
            (
                "gpu_config",
                json!({ "type": "A100-80GB", "gpu_type": "A100-80GB", "count": 2, "num_gpus": 2 }),
            ),
            ("started_at", Value::Null),
        ],
    );
}

#[tokio::test]
async fn the_long_dialect_gains_the_short_one() {
    let job = Job::queued().await;
    job.set(r#"hyperparameters = '{"num_epochs": 2, "lora_rank": 8, "lora_alpha": 16, "lora_dropout": 0.05, "base_model": "m"}',
               gpu_config = '{"gpu_type": "H100", "num_gpus": 1, "cost_per_gpu_hour": 4.2}'"#).await;
    job.event("claimed", json!({})).await;
    assert_columns(
        &job.row().await,
        &[
            (
                "hyperparameters",
                json!({ "num_epochs": 2, "epochs": 2, "lora_rank": 8, "rank": 8, "lora_alpha": 16, "alpha": 16,
                                    "lora_dropout": 0.05, "dropout": 0.05, "base_model": "m" }),
            ),
            (
                "gpu_config",
                json!({ "gpu_type": "H100", "type": "H100", "num_gpus": 1, "count": 1, "cost_per_gpu_hour": 4.2 }),
            ),
        ],
    );
}

#[tokio::test]
async fn what_was_resolved_replaces_what_was_asked_in_both_dialects() {
    let job = Job::queued().await;
    job.event("claimed", json!({})).await;
    job.event(
        "resolved",
        json!({
        "hyperparameters": { "rank": 32, "alpha": 64 }, "gpu_config": { "type": "H100", "cost_per_gpu_hour": 4.2 },
        "base_model": "Qwen/Qwen3-0.6B", "total_steps": 21, "total_epochs": 3, "estimated_total_cost": 1.5 }),
    )
    .await;
    let row = job.row().await;
    assert_columns(
        &row["hyperparameters"],
        &[
            ("rank", json!(32)),
            ("lora_rank", json!(32)),
            ("lora_alpha", json!(64)),
            ("base_model", json!("Qwen/Qwen3-0.6B")),
        ],
    );
    assert_columns(
        &row["gpu_config"],
        &[
            ("gpu_type", json!("H100")),
            ("type", json!("H100")),
            ("num_gpus", json!(2)),
        ],
    );
    assert_columns(
        &row,
        &[
            ("total_steps", json!(21)),
            ("estimated_total_cost", json!(1.5)),
            ("status", json!("initializing")),
        ],
    );
}

#[tokio::test]
async fn a_submitted_job_waits_for_its_gpu_without_running() {
    let job = Job::queued().await;
    job.event("claimed", json!({})).await;
    job.event("submitted", json!({ "external_job_id": "abc-1" })).await;
    let waiting = [
        ("status", json!("initializing")),
        ("current_stage", json!("queued_on_gpu")),
        ("external_job_id", json!("abc-1")),
    ];
    assert_columns(&job.row().await, &waiting);
    job.event("released", json!({ "reason": "submitted" })).await;
    assert_columns(&job.row().await, &waiting);
    job.event("released", json!({ "reason": "shutdown" })).await;
    assert_columns(
        &job.row().await,
        &[("status", json!("queued")), ("retry_count", json!(0))],
    );
}

#[tokio::test]
async fn a_start_is_announced_once_per_job() {
    let job = Job::running().await;
    assert_columns(
        &job.row().await,
        &[("status", json!("running")), ("current_stage", json!("training"))],
    );
    let started = job.row().await["started_at"].clone();
    job.event("retry", json!({ "code": "GPU_LOST", "message": "m" })).await;
    job.event("resumed", json!({})).await;
    job.event("running", json!({ "stage": "loading_model" })).await;
    assert_columns(
        &job.row().await,
        &[
            ("current_stage", json!("loading_model")),
            ("started_at", started),
            ("retry_count", json!(1)),
        ],
    );
    assert_eq!(
        job.database.notifications(job.user).await,
        [
            json!({ "type": "job_started", "title": "Training Started", "message": "Your training job has started on 1x H100",
                 "priority": "medium", "action_url": format!("/training/jobs/{}", job.id), "metadata": { "job_id": job.id } })
        ]
    );
}

#[tokio::test]
async fn a_step_implies_a_start() {
    let job = Job::queued().await;
    job.event("claimed", json!({})).await;
    job.event("progress", json!({ "progress": 5, "stage": "downloading" }))
        .await;
    assert_columns(
        &job.row().await,
        &[("status", json!("initializing")), ("progress", json!(5.0))],
    );
    job.event("progress", json!({ "progress": 6, "step": 1 })).await;
    assert_columns(&job.row().await, &[("status", json!("running"))]);
    let told = job.database.notifications(job.user).await;
    assert_eq!(told[0]["message"], "Your training job has started on 2x A100-80GB");
}

#[tokio::test]
async fn progress_never_falls_and_is_kept_over_a_retry() {
    let job = Job::running().await;
    for (reported, shown) in [(10.0, 10.0), (55.5, 55.5), (30.0, 55.5), (-3.0, 55.5)] {
        job.event("progress", json!({ "progress": reported })).await;
        assert_eq!(job.row().await["progress"], json!(shown));
    }
    job.event("retry", json!({})).await;
    assert_eq!(job.row().await["progress"], json!(55.5));
    job.event("progress", json!({ "progress": 1000 })).await;
    assert_eq!(job.row().await["progress"], json!(100.0));
}

#[tokio::test]
async fn money_and_progress_stay_finite_under_any_json() {
    let odd = [
        "null",
        "\"NaN\"",
        "1e400",
        "-1e400",
        "1e-400",
        "true",
        "[]",
        "{}",
        "\"Infinity\"",
        "-0.0",
        "99999999999999",
    ];
    for value in odd {
        let job = Job::running().await;
        let keys = [
            "progress",
            "cost",
            "gpu_seconds",
            "epoch",
            "seconds_left",
            "estimated_total_cost",
            "total_steps",
            "total_epochs",
        ];
        let pairs: Vec<String> = keys.iter().map(|key| format!("\"{key}\": {value}")).collect();
        let metrics = format!(
            "{{\"training_loss\": {value}, \"validation_loss\": {value}, \"learning_rate\": {value},
             \"gradient_norm\": {value}, \"throughput\": {value}, \"gpu_utilization\": {value}}}"
        );
        let detail = format!(
            "{{{}, \"step\": 3, \"metrics\": {metrics}, \"stage\": {value},
             \"hyperparameters\": {value}, \"gpu_config\": {{\"cost_per_gpu_hour\": {value}, \"num_gpus\": {value}}},
             \"points\": [{{\"step\": {value}, \"training_loss\": {value}, \"learning_rate\": {value}}}]}}",
            pairs.join(",")
        );
        for event in [
            "resolved",
            "progress",
            "spend",
            "retry",
            "claimed",
            "running",
            "submitted",
            "progress",
            "failed",
        ] {
            job.try_event(event, &detail)
                .await
                .unwrap_or_else(|error| panic!("{event} with {value}: {error:?}"));
            let row = job.row().await;
            for column in ["progress", "current_cost", "estimated_total_cost"] {
                let number = row[column]
                    .as_f64()
                    .unwrap_or_else(|| panic!("{column} of {value} is {}", row[column]));
                assert!(
                    (0.0..=99_999_999.99).contains(&number),
                    "{column} of {value} is {number}"
                );
            }
            for (name, metric) in row["current_metrics"].as_object().unwrap() {
                assert!(
                    metric.as_f64().is_some_and(f64::is_finite),
                    "{name} of {value} is {metric}"
                );
            }
        }
        assert!(
            job.row().await["final_cost"].as_f64().is_some_and(f64::is_finite),
            "final_cost of {value}"
        );
    }
}

#[tokio::test]
async fn a_row_with_null_numbers_is_mended_by_the_next_event() {
    let job = Job::running().await;
    job.set("progress = null, current_cost = null, retry_count = null, current_metrics = null")
        .await;
    job.event("progress", json!({ "metrics": { "training_loss": 2.5 } }))
        .await;
    assert_columns(
        &job.row().await,
        &[
            ("progress", json!(0.0)),
            ("current_cost", json!(0.0)),
            ("current_metrics", json!({ "training_loss": 2.5 })),
        ],
    );
    job.event("retry", json!({})).await;
    assert_eq!(job.row().await["retry_count"], json!(1));
}

#[tokio::test]
async fn metrics_keep_their_last_known_value() {
    let job = Job::running().await;
    job.event(
        "progress",
        json!({ "step": 1, "metrics": { "training_loss": 2.0, "validation_loss": 2.1, "note": "x" } }),
    )
    .await;
    job.event(
        "progress",
        json!({ "step": 2, "metrics": { "training_loss": 1.9, "validation_loss": null } }),
    )
    .await;
    assert_eq!(
        job.row().await["current_metrics"],
        json!({ "training_loss": 1.9, "validation_loss": 2.1 })
    );
}

#[tokio::test]
async fn text_is_cut_to_its_column() {
    let job = Job::running().await;
    job.event(
        "submitted",
        json!({ "external_job_id": "x".repeat(1000), "stage": "y".repeat(1000) }),
    )
    .await;
    let row = job.row().await;
    assert_eq!(row["external_job_id"].as_str().unwrap().len(), 255);
    assert_eq!(row["current_stage"].as_str().unwrap().len(), 50);
}

// --- Points -----------------------------------------------------------------------------------------------------------

/// Projects one progress event per step from `first` to `last`.
async fn train(job: &Job, first: i32, last: i32, every: i32) {
    job.database
        .owner
        .execute(
            "select brightrun.project_training_job($1, 'progress', jsonb_build_object('step', step, 'epoch', 1, 'metrics',
               jsonb_build_object('training_loss', 1 + 1.0 / step, 'learning_rate', 0.0001)))
               from generate_series($2::int, $3::int, $4::int) as step",
            &[&job.id, &first, &last, &every],
        )
        .await
        .unwrap();
}

fn assert_spread(steps: &[i32], first: i32, last: i32, widest: i32) {
    assert!(steps.len() <= 100, "{} points", steps.len());
    assert_eq!((steps.first(), steps.last()), (Some(&first), Some(&last)));
    let gap = steps.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap();
    assert!(
        (1..=widest).contains(&gap),
        "the widest gap is {gap} of {widest}: {steps:?}"
    );
    assert!(steps.is_sorted(), "in order of time");
}

#[tokio::test]
async fn a_long_run_leaves_at_most_a_hundred_points_spread_over_it() {
    let job = Job::running().await;
    job.event("resolved", json!({ "total_steps": 1000 })).await;
    train(&job, 1, 1000, 1).await;
    let steps = job.steps().await;
    assert!(steps.len() > 80, "{} points", steps.len());
    assert_spread(&steps, 1, 1000, 11);
}

#[tokio::test]
async fn a_run_longer_than_announced_is_thinned_all_the_same() {
    let job = Job::running().await;
    job.event("resolved", json!({ "total_steps": 12 })).await;
    train(&job, 1, 1000, 1).await;
    assert_spread(&job.steps().await, 1, 1000, 40);
}

#[tokio::test]
async fn sparse_logging_is_not_thinned_by_an_unlucky_rhythm() {
    let job = Job::running().await;
    job.event("resolved", json!({ "total_steps": 500 })).await;
    train(&job, 1, 1, 1).await;
    train(&job, 10, 500, 10).await;
    assert_eq!(job.steps().await.len(), 51);
}

#[tokio::test]
async fn a_short_run_keeps_every_step_and_a_repeated_one_adds_nothing() {
    let job = Job::running().await;
    train(&job, 1, 14, 1).await;
    train(&job, 1, 14, 1).await;
    assert_eq!(job.steps().await, (1..=14).collect::<Vec<_>>());
    let batch: Vec<Value> = (10..=20)
        .map(|step| json!({ "step": step, "epoch": 1, "training_loss": 1.0, "learning_rate": 0.0 }))
        .collect();
    job.event("progress", json!({ "step": 20, "points": batch })).await;
    job.event("progress", json!({ "step": 20, "points": batch })).await;
    assert_eq!(job.steps().await, (1..=20).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_point_is_clamped_to_what_its_columns_hold() {
    let job = Job::running().await;
    job.event(
        "progress",
        json!({ "step": 1, "epoch": 1, "metrics": { "training_loss": 1e9, "validation_loss": 123456.0,
        "learning_rate": 0.0, "gradient_norm": 1e300, "throughput": 1e300, "gpu_utilization": 250 } }),
    )
    .await;
    job.event(
        "progress",
        json!({ "step": 2, "metrics": { "training_loss": null, "learning_rate": 0.1 } }),
    )
    .await;
    let points = job
        .database
        .json(
            "select jsonb_agg(to_jsonb(p) - array['id', 'job_id', 'timestamp']) from metrics_points p",
            &[],
        )
        .await;
    assert_eq!(
        points,
        json!([{ "epoch": 1, "step": 1, "training_loss": 9999.0, "validation_loss": 9999.0, "learning_rate": 1e-10,
                               "gradient_norm": 9999.0, "throughput": 99_999_999.0, "gpu_utilization": 100.0 }])
    );
}

// --- Endings ----------------------------------------------------------------------------------------------------------

#[tokio::test]
async fn a_completion_writes_artifact_cost_and_both_notifications() {
    let job = Job::running().await;
    for (step, loss) in [(1, 2.0), (12, 0.9)] {
        job.event(
            "progress",
            json!({ "step": step, "epoch": 3, "metrics": { "training_loss": loss, "learning_rate": 0.0001 } }),
        )
        .await;
    }
    let artifact = Uuid::new_v4();
    job.event("completed", finished(job.user, artifact)).await;

    let made = job.artifact().await;
    let today = job
        .database
        .json(
            "select to_jsonb(to_char(now() at time zone 'utc', 'FMMM/FMDD/YYYY'))",
            &[],
        )
        .await;
    assert_columns(
        &made,
        &[
            ("id", json!(artifact)),
            ("user_id", json!(job.user)),
            ("job_id", json!(job.id)),
            ("version", json!("1.0.0")),
            ("status", json!("stored")),
            ("name", json!(format!("Kind answers - {}", today.as_str().unwrap()))),
            (
                "quality_metrics",
                json!({ "overall_score": 5, "convergence_quality": "excellent", "final_training_loss": 0.9,
            "final_validation_loss": null, "loss_reduction_percent": 55.0, "perplexity": null }),
            ),
            (
                "training_summary",
                json!({ "epochs_completed": 3, "total_steps": 12, "final_loss": 0.9,
            "training_duration_hours": 1.0, "total_cost": 7.0 }),
            ),
            (
                "artifacts",
                finished(job.user, artifact)["artifact"]["artifacts"].clone(),
            ),
        ],
    );
    assert_columns(&made["configuration"], &[("preset_id", json!("balanced"))]);
    assert_columns(
        &made["configuration"]["hyperparameters"],
        &[("rank", json!(16)), ("lora_rank", json!(16))],
    );

    let cost = &job.costs().await[0];
    assert_columns(
        cost,
        &[
            ("cost_type", json!("training_compute")),
            ("amount", json!(7.0)),
            ("job_id", json!(job.id)),
        ],
    );
    assert_columns(
        &cost["details"],
        &[
            ("gpu_type", json!("A100-80GB")),
            ("gpu_count", json!(2)),
            ("duration_hours", json!(1.0)),
        ],
    );
    assert_eq!(
        job.database.notifications(job.user).await[1..],
        [
            json!({ "type": "job_completed", "title": "Training Complete",
                    "message": "Your training job finished successfully. Cost: $7.00", "priority": "high",
                    "action_url": format!("/training/jobs/{}", job.id), "metadata": { "job_id": job.id, "final_cost": 7.0 } }),
            json!({ "type": "artifact_ready", "title": "Model Ready for Download",
                    "message": "Your trained model is ready. Quality score: 5/5 stars", "priority": "high",
                    "action_url": format!("/models/{artifact}"), "metadata": { "artifact_id": artifact, "job_id": job.id } }),
        ]
    );
    assert_columns(
        &job.row().await,
        &[
            ("status", json!("completed")),
            ("progress", json!(100.0)),
            ("artifact_id", json!(artifact)),
        ],
    );
}

#[tokio::test]
async fn stars_follow_the_fall_of_the_loss() {
    // first loss, last loss, last held-out loss → quality, score
    for (first, last, held_out, quality, score) in [
        (2.0, 0.9, None, "excellent", 5),
        (2.0, 1.0, None, "good", 4),
        (2.0, 1.3, Some(1.4), "good", 4),
        (2.0, 1.6, None, "fair", 3),
        (2.0, 1.8, None, "poor", 2),
        (2.0, 1.95, None, "poor", 1),
        (2.0, 2.5, None, "poor", 1),
        (2.0, 0.5, Some(1.2), "overfit", 4),
        (2.0, 1.95, Some(3.0), "overfit", 2),
        (2.0, 1.0, Some(1.5), "good", 4),
    ] {
        let job = Job::running().await;
        job.event("progress", json!({ "step": 1, "metrics": { "training_loss": first } }))
            .await;
        job.event(
            "progress",
            json!({ "step": 2, "metrics": { "training_loss": last, "validation_loss": held_out } }),
        )
        .await;
        let mut result = finished(job.user, Uuid::new_v4());
        result["points"] = json!([]);
        job.event("completed", result).await;
        let found = job.artifact().await["quality_metrics"].clone();
        assert_eq!(
            (&found["convergence_quality"], &found["overall_score"]),
            (&json!(quality), &json!(score)),
            "{first} {last} {held_out:?}"
        );
        let perplexity = held_out.map(f64::exp);
        assert_eq!(found["perplexity"].is_null(), perplexity.is_none());
        assert!((found["perplexity"].as_f64().unwrap_or(0.0) - perplexity.unwrap_or(0.0)).abs() < 1e-3);
    }
}

#[tokio::test]
async fn a_run_without_points_gets_three_stars() {
    let job = Job::running().await;
    let mut result = finished(job.user, Uuid::new_v4());
    result["metrics"] = json!({});
    job.event("completed", result).await;
    assert_columns(
        &job.artifact().await["quality_metrics"],
        &[("overall_score", json!(3)), ("convergence_quality", json!("unknown"))],
    );
}

#[tokio::test]
async fn what_the_worker_adds_to_the_artifact_rides_along_but_never_replaces_the_contract() {
    let job = Job::running().await;
    job.database
        .owner
        .execute("update datasets set name = repeat('n', 200)", &[])
        .await
        .unwrap();
    let mut result = finished(job.user, Uuid::new_v4());
    result["artifact"]["quality_metrics"] = json!({ "overall_score": 99, "best_step": 8 });
    result["artifact"]["training_summary"] = json!({ "tokens_trained": 61000, "total_cost": null });
    result["artifact"]["configuration"] = json!({ "seed": 7 });
    job.event("completed", result).await;
    let made = job.artifact().await;
    assert_columns(
        &made["quality_metrics"],
        &[("overall_score", json!(1)), ("best_step", json!(8))],
    );
    assert_columns(
        &made["training_summary"],
        &[("tokens_trained", json!(61000)), ("total_cost", json!(7.0))],
    );
    assert_columns(
        &made["configuration"],
        &[("seed", json!(7)), ("preset_id", json!("balanced"))],
    );
    assert!(made["name"].as_str().unwrap().len() <= 200);
}

#[tokio::test]
async fn a_failure_says_what_where_and_what_to_do() {
    let failure = json!({ "code": "DATA_EMPTY", "blame": "user", "message": "No line can be trained on",
                          "detail": { "place": "answers.jsonl", "hint": "Use one of the documented shapes.", "stack": "trace" } });
    let text = "No line can be trained on. answers.jsonl. Use one of the documented shapes. [DATA_EMPTY]";
    for (job, sentence, records) in [
        (Job::queued().await, "Your training job failed to start: ", 0),
        (Job::running().await, "Your training job failed: ", 1),
    ] {
        job.event("failed", failure.clone()).await;
        assert_columns(
            &job.row().await,
            &[
                ("status", json!("failed")),
                ("error_message", json!(text)),
                ("error_stack", json!("trace")),
                ("final_cost", json!(0.0)),
            ],
        );
        let told = job.database.notifications(job.user).await;
        let told = told.last().unwrap();
        assert_columns(
            told,
            &[
                ("type", json!("job_failed")),
                ("title", json!("Training Failed")),
                ("message", json!(format!("{sentence}{text}"))),
                ("priority", json!("high")),
                ("action_url", json!(format!("/training/jobs/{}", job.id))),
                ("metadata", json!({ "job_id": job.id })),
            ],
        );
        assert_eq!(
            job.costs().await.as_array().unwrap().len(),
            records,
            "only GPU time costs"
        );
    }
}

#[tokio::test]
async fn an_empty_failure_still_reads_as_one() {
    let job = Job::queued().await;
    job.event("failed", json!({})).await;
    assert_eq!(
        job.row().await["error_message"],
        "The job failed for an unknown reason."
    );
}

#[tokio::test]
async fn spend_adds_up_over_attempts_and_is_recorded_once() {
    let job = Job::running().await;
    job.event("progress", json!({ "gpu_seconds": 600, "cost": 1.25 })).await;
    job.event("progress", json!({ "gpu_seconds": 500, "cost": 1.0 })).await;
    assert_eq!(
        job.row().await["current_cost"],
        json!(1.25),
        "a late report takes nothing back"
    );
    job.event("retry", json!({})).await;
    job.event("resumed", json!({})).await;
    job.event("progress", json!({ "gpu_seconds": 60, "cost": 0.1 })).await;
    assert_eq!(job.row().await["current_cost"], json!(1.35));
    job.event(
        "failed",
        json!({ "code": "GPU_OUT_OF_MEMORY", "message": "m", "detail": { "gpu_seconds": 120, "cost": 0.2 } }),
    )
    .await;
    job.event(
        "failed",
        json!({ "code": "GPU_OUT_OF_MEMORY", "message": "m", "cost": 9.0 }),
    )
    .await;
    job.event("cancelled", json!({ "cost": 9.0 })).await;
    let costs = job.costs().await;
    assert_eq!(costs.as_array().unwrap().len(), 1);
    assert_columns(&costs[0], &[("amount", json!(1.45))]);
    assert_columns(
        &costs[0]["details"],
        &[("outcome", json!("failed")), ("duration_hours", json!(0.2))],
    );
    assert_eq!(job.row().await["final_cost"], json!(1.45));
}

#[tokio::test]
async fn cost_follows_from_gpu_time_where_nobody_states_it() {
    let job = Job::running().await;
    job.event(
        "resolved",
        json!({ "gpu_config": { "cost_per_gpu_hour": 3.5, "num_gpus": 2 } }),
    )
    .await;
    job.event("progress", json!({ "gpu_seconds": 1800 })).await;
    assert_eq!(job.row().await["current_cost"], json!(3.5));
}

#[tokio::test]
async fn nothing_moves_a_job_out_of_a_terminal_state() {
    let endings = [
        ("completed", None),
        ("failed", Some(json!({ "code": "X", "message": "m", "cost": 1.0 }))),
        ("cancelled", Some(json!({ "cost": 1.0 }))),
    ];
    for (ending, detail) in endings {
        let job = Job::running().await;
        let detail = detail.unwrap_or_else(|| finished(job.user, Uuid::new_v4()));
        job.event(ending, detail).await;
        let before = job.row().await;
        let told = job.told().await;
        let costs = job.costs().await;
        let late = json!({ "progress": 99, "step": 99, "epoch": 9, "stage": "late", "external_job_id": "late", "base_model": "late",
                           "metrics": { "training_loss": 1 }, "artifact": finished(job.user, Uuid::new_v4())["artifact"] });
        for event in [
            "claimed",
            "resumed",
            "resolved",
            "submitted",
            "running",
            "progress",
            "spend",
            "retry",
            "snoozed",
            "released",
            "completed",
            "failed",
            "cancelled",
            "no such event",
        ] {
            job.event(event, late.clone()).await;
            let mut after = job.row().await;
            after["updated_at"] = before["updated_at"].clone();
            assert_eq!(after, before, "{event} after {ending}");
        }
        assert_eq!(job.told().await, told, "after {ending}");
        assert_eq!(job.costs().await, costs, "after {ending}");
    }
}

#[tokio::test]
async fn an_artifact_must_lie_in_its_owners_folder() {
    let job = Job::running().await;
    let (artifact, stranger) = (Uuid::new_v4(), Uuid::new_v4());
    for path in [
        format!("{stranger}/{artifact}/adapter_model.safetensors"),
        format!("{}/{stranger}/adapter_model.safetensors", job.user),
        format!("{}/{artifact}/../x/adapter_model.safetensors", job.user),
        format!("adapters/{}.tar.gz", job.id),
    ] {
        let detail = json!({ "artifact": { "id": artifact, "artifacts": { "adapter_model.safetensors": path } } });
        let refused = job.try_event("completed", &detail.to_string()).await.unwrap_err();
        assert_eq!(sqlstate(&refused), "23514", "{path}");
    }
    assert_columns(&job.row().await, &[("status", json!("running"))]);
    assert!(job.costs().await.as_array().unwrap().is_empty());
}

#[tokio::test]
async fn odd_calls_are_ignored() {
    let job = Job::queued().await;
    let before = job.row().await;
    for (event, detail) in [
        ("enqueued", "{}"),
        ("no such event", "{}"),
        ("resolved", "null"),
        ("resolved", "[1]"),
        ("resolved", "\"x\""),
    ] {
        job.try_event(event, detail).await.unwrap();
    }
    let mut after = job.row().await;
    after["updated_at"] = before["updated_at"].clone();
    after["hyperparameters"] = before["hyperparameters"].clone();
    after["gpu_config"] = before["gpu_config"].clone();
    assert_eq!(after, before);
    let nobody = Uuid::new_v4();
    job.database
        .owner
        .execute(
            "select brightrun.project_training_job($1, 'completed', '{}')",
            &[&nobody],
        )
        .await
        .unwrap();
}
