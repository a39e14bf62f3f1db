//! The app writes its own tables, unchanged; jobs, cancels and validations follow from that, in the app's own transaction.

#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

#[path = "support/database.rs"]
#[allow(dead_code)]
mod database;

use database::{Database, Run, eventually, finished, sqlstate};
use serde_json::{Value, json};
use uuid::Uuid;

struct Queued {
    database: Database,
    user: Uuid,
    dataset: Uuid,
    job: Uuid,
}

/// A user whose training job waits in the queue.
async fn queued() -> Queued {
    let database = Database::migrated().await;
    let user = database.user().await;
    let dataset = database.ready_dataset(user).await;
    let job = database.signed_in(user).await.insert_job(dataset).await.unwrap();
    Queued {
        database,
        user,
        dataset,
        job,
    }
}

impl Queued {
    async fn cancel(&self) -> u64 {
        self.database
            .signed_in(self.user)
            .await
            .cancel_job(self.job, 0.0)
            .await
            .unwrap()
    }

    async fn state(&self) -> String {
        self.database.engine_state(self.job).await.unwrap()
    }
}

#[tokio::test]
async fn an_inserted_job_is_enqueued_with_a_snapshot_of_what_was_asked() {
    let app = queued().await;
    assert_eq!(app.state().await, "ready");
    let enqueued = app
        .database
        .json("select to_jsonb(job) from brightrun.status($1) job", &[&app.job])
        .await;
    assert_eq!(enqueued["kind"], "train");
    assert_eq!(enqueued["owner"], json!(app.user));
    assert_eq!(
        enqueued["payload"],
        json!({
            "job_id": app.job, "user_id": app.user, "preset_id": "balanced", "total_epochs": 3, "estimated_total_cost": 4.01,
            "hyperparameters": { "learning_rate": 0.00005, "batch_size": 4, "epochs": 3, "rank": 16 },
            "gpu_config": { "type": "A100-80GB", "count": 2 },
            "dataset": {
                "id": app.dataset, "name": "Kind answers", "format": "brightrun_lora_v4", "storage_bucket": "lora-datasets",
                "storage_path": format!("{}/{}/answers.jsonl", app.user, app.dataset), "file_name": "answers.jsonl",
                "file_size": 4711, "total_training_pairs": 14,
            },
        })
    );
}

#[tokio::test]
async fn a_rolled_back_insert_leaves_no_job() {
    let app = queued().await;
    let before = app.database.count("brightrun.job", &[]).await;
    let mut client = app.database.connect().await;
    let transaction = client.transaction().await.unwrap();
    let row = transaction
        .query_one(
            "insert into training_jobs (user_id, dataset_id, preset_id, hyperparameters, gpu_config, total_epochs,
                 estimated_total_cost) values ($1, $2, 'fast', '{}', '{}', 1, 0) returning id",
            &[&app.user, &app.dataset],
        )
        .await
        .unwrap();
    let inside: i64 = transaction
        .query_one("select count(*) from brightrun.job", &[])
        .await
        .unwrap()
        .get(0);
    assert_eq!(inside, before + 1, "it was enqueued in the same transaction");
    transaction.rollback().await.unwrap();
    assert_eq!(app.database.count("brightrun.job", &[]).await, before);
    assert_eq!(app.database.engine_state(row.get(0)).await, None);
}

#[tokio::test]
async fn settings_that_no_worker_could_read_are_refused_at_the_door() {
    let app = queued().await;
    let mut api = app.database.signed_in(app.user).await;
    let deep = format!("{}1{}", "[".repeat(200), "]".repeat(200));
    for odd in [
        "{\"learning_rate\": 1e400}",
        "{\"rank\": [{\"x\": -1e400}]}",
        &format!("{{\"rank\": {deep}}}"),
    ] {
        let insert =
            "insert into training_jobs (user_id, dataset_id, preset_id, hyperparameters, gpu_config, total_epochs,
                          estimated_total_cost) values ($1, $2, 'fast', $3::text::jsonb, '{}', 1, 0)";
        let refused = api.execute(insert, &[&app.user, &app.dataset, &odd]).await.unwrap_err();
        assert_eq!(sqlstate(&refused), "22023");
    }
}

#[tokio::test]
async fn a_row_that_is_not_queued_is_not_enqueued() {
    let app = queued().await;
    let row = app
        .database
        .owner
        .query_one(
            "insert into training_jobs (user_id, dataset_id, preset_id, hyperparameters, gpu_config, total_epochs,
                 estimated_total_cost, status) values ($1, $2, 'fast', '{}', '{}', 1, 0, 'completed') returning id",
            &[&app.user, &app.dataset],
        )
        .await
        .unwrap();
    assert_eq!(app.database.engine_state(row.get(0)).await, None);
}

#[tokio::test]
async fn a_queued_job_is_cancelled_at_once_and_costs_nothing() {
    let app = queued().await;
    assert_eq!(app.cancel().await, 1);
    assert_eq!(app.state().await, "cancelled");
    let row = app.database.job(app.job).await;
    assert_eq!(row["status"], "cancelled");
    assert_eq!(row["final_cost"], json!(0.00));
    assert!(row["completed_at"].is_string());
    assert_eq!(app.database.count("cost_records", &[]).await, 0);
    assert_eq!(
        app.database.notifications(app.user).await,
        Vec::<Value>::new(),
        "the app tells its user itself"
    );
}

#[tokio::test]
async fn an_initializing_job_is_cancelled_and_its_worker_told() {
    let app = queued().await;
    let run = Run::claim(&app.database, "train").await;
    assert_eq!(app.database.job(app.job).await["status"], "initializing");
    assert_eq!(app.cancel().await, 1);
    assert_eq!(run.beat(json!({ "progress": 10 })).await, "cancel");
    assert_eq!(
        run.complete(finished(app.user, Uuid::new_v4())).await.unwrap(),
        "cancelled"
    );
    assert_eq!(app.database.job(app.job).await["status"], "cancelled");
    assert_eq!(app.database.count("model_artifacts", &[]).await, 0);
}

#[tokio::test]
async fn a_running_job_is_cancelled_and_its_spend_recorded_once() {
    let app = queued().await;
    let run = Run::claim(&app.database, "train").await;
    run.report("running", json!({ "gpu_type": "A100-80GB", "gpu_count": 1 }))
        .await;
    assert_eq!(
        run.beat(json!({ "progress": 40, "step": 5, "gpu_seconds": 900, "cost": 0.875 }))
            .await,
        "alive"
    );
    assert_eq!(app.cancel().await, 1);
    assert_eq!(app.database.job(app.job).await["final_cost"], json!(0.88));
    assert_eq!(app.database.count("cost_records", &[]).await, 0, "the GPU still works");

    assert_eq!(
        run.beat(json!({ "progress": 99, "step": 9, "gpu_seconds": 950 })).await,
        "cancel"
    );
    run.report("spend", json!({ "gpu_seconds": 1000, "cost": 1.0 })).await;
    let stopped = json!({ "code": "JOB_CANCELLED", "blame": "user", "message": "Stopped." });
    assert_eq!(run.fail(stopped).await, "cancelled");
    let row = app.database.job(app.job).await;
    assert_eq!(
        (&row["status"], &row["final_cost"], &row["progress"]),
        (&json!("cancelled"), &json!(1.0), &json!(40.0))
    );
    let cost = app.database.json("select to_jsonb(c) from cost_records c", &[]).await;
    assert_eq!(
        (&cost["amount"], &cost["details"]["outcome"]),
        (&json!(1.0), &json!("cancelled"))
    );
    assert_eq!(cost["details"]["duration_hours"], json!(0.2778));
    let told = app.database.notifications(app.user).await;
    assert_eq!(told.len(), 1, "only job_started: {told:?}");
}

#[tokio::test]
async fn an_ended_job_cannot_be_cancelled() {
    let app = queued().await;
    let run = Run::claim(&app.database, "train").await;
    run.complete(finished(app.user, Uuid::new_v4())).await.unwrap();
    let completed = app.database.job(app.job).await;
    assert_eq!(app.cancel().await, 0);
    assert_eq!(app.database.job(app.job).await, completed);

    let app = queued().await;
    let run = Run::claim(&app.database, "train").await;
    run.fail(json!({ "code": "DATA_EMPTY", "blame": "user", "message": "No lines." }))
        .await;
    let failed = app.database.job(app.job).await;
    assert_eq!(failed["status"], "failed");
    assert_eq!(app.cancel().await, 0);
    assert_eq!(app.database.job(app.job).await, failed);
}

#[tokio::test]
async fn a_stranger_cannot_cancel() {
    let app = queued().await;
    let stranger = app.database.user().await;
    assert_eq!(
        app.database
            .signed_in(stranger)
            .await
            .cancel_job(app.job, 0.0)
            .await
            .unwrap(),
        0
    );
    let refused = app
        .database
        .api("anon", None)
        .await
        .cancel_job(app.job, 0.0)
        .await
        .unwrap_err();
    assert_eq!(sqlstate(&refused), "42501");
    assert_eq!(app.state().await, "ready");
}

#[tokio::test]
async fn a_cancel_changes_nothing_but_the_cancel() {
    let app = queued().await;
    let mut api = app.database.signed_in(app.user).await;
    for change in [
        "status = 'completed'",
        "status = 'running'",
        "status = 'queued'",
        "progress = 100",
        "status = 'cancelled', progress = 100",
        "status = 'cancelled', artifact_id = null, hyperparameters = '{}'",
        "status = 'cancelled', retry_count = -1",
        "status = 'cancelled', created_at = now() - interval '1 day'",
        "current_cost = 0, final_cost = 0",
    ] {
        let error = api
            .execute(&format!("update training_jobs set {change} where id = $1"), &[&app.job])
            .await
            .unwrap_err();
        assert_eq!(sqlstate(&error), "42501", "{change}");
    }
    assert_eq!(app.database.job(app.job).await["status"], "queued");
    let lie =
        "update training_jobs set status = 'cancelled', final_cost = 4000, completed_at = '2000-01-01' where id = $1";
    assert_eq!(api.execute(lie, &[&app.job]).await.unwrap(), 1);
    let row = app.database.job(app.job).await;
    assert_eq!(row["final_cost"], json!(0.0), "the server knows what was spent");
    assert!(row["completed_at"].as_str().unwrap() > "2026");
}

#[tokio::test]
async fn a_cancel_that_commits_while_the_worker_completes_wins() {
    let app = queued().await;
    let run = Run::claim(&app.database, "train").await;
    let mut client = app.database.connect().await;
    let transaction = client.transaction().await.unwrap();
    transaction
        .execute(
            "update training_jobs set status = 'cancelled' where id = $1",
            &[&app.job],
        )
        .await
        .unwrap();
    let completing = tokio::spawn(async move { run.complete(finished(app.user, Uuid::new_v4())).await });
    let waiting =
        "pg_stat_activity where datname = current_database() and wait_event_type = 'Lock' and query like '%complete%'";
    eventually("the worker waits for the app's transaction", || async {
        app.database.count(waiting, &[]).await == 1
    })
    .await;
    transaction.commit().await.unwrap();
    assert_eq!(completing.await.unwrap().unwrap(), "cancelled");
    assert_eq!(app.database.job(app.job).await["status"], "cancelled");
    assert_eq!(app.database.count("model_artifacts", &[]).await, 0);
    assert_eq!(app.database.engine_state(app.job).await.as_deref(), Some("cancelled"));
}

#[tokio::test]
async fn a_cancel_that_comes_while_the_completion_commits_changes_nothing() {
    let app = queued().await;
    let run = Run::claim(&app.database, "train").await;
    let artifact = Uuid::new_v4();
    let mut worker = app.database.connect().await;
    let transaction = worker.transaction().await.unwrap();
    let token: i64 = transaction
        .query_one("select token from brightrun.status($1)", &[&run.job])
        .await
        .unwrap()
        .get(0);
    transaction
        .execute(
            "select brightrun.complete($1, $2, $3)",
            &[&run.job, &token, &finished(app.user, artifact)],
        )
        .await
        .unwrap();
    let mut api = app.database.signed_in(app.user).await;
    let job = app.job;
    let cancelling = tokio::spawn(async move { api.cancel_job(job, 0.0).await });
    let waiting = "pg_stat_activity where datname = current_database() and wait_event_type = 'Lock' and query like '%update training_jobs%'";
    eventually("the app waits for the worker's transaction", || async {
        app.database.count(waiting, &[]).await == 1
    })
    .await;
    transaction.commit().await.unwrap();
    assert_eq!(cancelling.await.unwrap().unwrap(), 0);
    let row = app.database.job(app.job).await;
    assert_eq!(
        (&row["status"], &row["artifact_id"]),
        (&json!("completed"), &json!(artifact))
    );
}

#[tokio::test]
async fn cancels_and_heartbeats_never_deadlock() {
    let app = queued().await;
    let mut runs = Vec::new();
    let mut jobs = vec![app.job];
    for _ in 1..16 {
        jobs.push(
            app.database
                .signed_in(app.user)
                .await
                .insert_job(app.dataset)
                .await
                .unwrap(),
        );
    }
    for _ in &jobs {
        runs.push(Run::claim(&app.database, "train").await);
    }
    let beating = runs.into_iter().map(|run| {
        tokio::spawn(async move {
            let mut step = 0;
            loop {
                step += 1;
                let reply = run
                    .beat(json!({ "step": step, "progress": 1, "metrics": { "training_loss": 1.0 } }))
                    .await;
                if reply == "cancel" {
                    let stopped = json!({ "code": "JOB_CANCELLED", "blame": "user", "message": "Stopped." });
                    return run.fail(stopped).await;
                }
                tokio::task::yield_now().await;
            }
        })
    });
    let beating: Vec<_> = beating.collect();
    for job in &jobs {
        assert_eq!(
            app.database
                .signed_in(app.user)
                .await
                .cancel_job(*job, 0.0)
                .await
                .unwrap(),
            1
        );
    }
    for ended in beating {
        assert_eq!(ended.await.unwrap(), "cancelled");
    }
    assert_eq!(
        app.database
            .count("training_jobs where status = 'cancelled'", &[])
            .await,
        16
    );
    let deadlocks = app
        .database
        .count(
            "pg_stat_database where datname = current_database() and deadlocks > 0",
            &[],
        )
        .await;
    assert_eq!(deadlocks, 0);
}

#[tokio::test]
async fn an_operators_cancel_reaches_the_row_and_the_user() {
    let app = queued().await;
    app.database
        .owner
        .execute("select brightrun.cancel($1, 'maintenance')", &[&app.job])
        .await
        .unwrap();
    assert_eq!(app.database.job(app.job).await["status"], "cancelled");
    let told = app.database.notifications(app.user).await;
    assert_eq!(
        told,
        [
            json!({ "type": "job_cancelled", "title": "Job Cancelled", "message": "Your training job was cancelled",
                 "priority": "medium", "action_url": format!("/training/jobs/{}", app.job), "metadata": { "job_id": app.job } })
        ]
    );
}

#[tokio::test]
async fn a_deleted_job_row_stops_its_engine_job() {
    let app = queued().await;
    app.database
        .owner
        .execute("delete from training_jobs where id = $1", &[&app.job])
        .await
        .unwrap();
    assert_eq!(app.state().await, "cancelled");

    let app = queued().await;
    let run = Run::claim(&app.database, "train").await;
    app.database
        .owner
        .execute("delete from training_jobs where id = $1", &[&app.job])
        .await
        .unwrap();
    assert_eq!(run.beat(json!({ "progress": 3 })).await, "cancel");
    assert_eq!(run.release("shutdown").await, "cancelled");
}

#[tokio::test]
async fn a_whole_run_leaves_the_rows_the_app_shows() {
    let app = queued().await;
    let run = Run::claim(&app.database, "train").await;
    run.report(
        "resolved",
        json!({ "base_model": "Qwen/Qwen3-0.6B", "total_steps": 12,
        "gpu_config": { "cost_per_gpu_hour": 3.5, "gpu_memory_gb": 80, "num_gpus": 2 } }),
    )
    .await;
    run.report("running", json!({ "stage": "loading_model" })).await;
    for step in 1..=12 {
        let loss = 2.0 - 0.1 * f64::from(step);
        run.beat(json!({ "progress": step * 8, "stage": "training", "epoch": (step + 3) / 4, "step": step,
            "gpu_seconds": step * 300, "metrics": { "training_loss": loss, "learning_rate": 0.00005, "throughput": 1800.5 } })).await;
    }
    let artifact = Uuid::new_v4();
    assert_eq!(run.complete(finished(app.user, artifact)).await.unwrap(), "completed");

    let row = app.database.job(app.job).await;
    for (key, expected) in [
        ("status", json!("completed")),
        ("current_stage", json!("completed")),
        ("progress", json!(100.0)),
        ("current_epoch", json!(3)),
        ("current_step", json!(12)),
        ("total_steps", json!(12)),
        ("final_cost", json!(7.0)),
        ("current_cost", json!(7.0)),
        ("artifact_id", json!(artifact)),
        ("error_message", Value::Null),
        ("retry_count", json!(0)),
    ] {
        assert_eq!(row[key], expected, "{key}");
    }
    assert_eq!(
        row["hyperparameters"],
        json!({ "learning_rate": 0.00005, "batch_size": 4, "epochs": 3, "num_epochs": 3, "rank": 16, "lora_rank": 16,
                "base_model": "Qwen/Qwen3-0.6B" })
    );
    assert_eq!(
        row["gpu_config"],
        json!({ "type": "A100-80GB", "gpu_type": "A100-80GB", "count": 2, "num_gpus": 2, "cost_per_gpu_hour": 3.5,
                "gpu_memory_gb": 80 })
    );
    assert_eq!(
        row["current_metrics"],
        json!({ "training_loss": 0.9, "learning_rate": 0.00005, "throughput": 1800.5 })
    );
    assert_eq!(
        app.database
            .count("metrics_points where job_id = $1", &[&app.job])
            .await,
        12
    );
    let events: Vec<String> = app
        .database
        .signed_in(app.user)
        .await
        .query("select event from training_job_events($1)", &[&app.job])
        .await
        .unwrap()
        .iter()
        .map(|row| row.get(0))
        .collect();
    assert_eq!(events.first().map(String::as_str), Some("enqueued"));
    assert_eq!(events.last().map(String::as_str), Some("completed"));
}

#[tokio::test]
async fn a_completion_without_its_files_is_refused_and_leaves_the_job_running() {
    let app = queued().await;
    let run = Run::claim(&app.database, "train").await;
    let elsewhere = finished(Uuid::new_v4(), Uuid::new_v4());
    for result in [
        json!({}),
        json!({ "artifact": { "id": Uuid::new_v4(), "artifacts": {} } }),
        elsewhere,
    ] {
        let refused = run.complete(result).await.unwrap_err();
        assert_eq!(sqlstate(&refused), "23514");
    }
    assert_eq!(app.state().await, "running");
    assert_eq!(app.database.count("model_artifacts", &[]).await, 0);
}

#[tokio::test]
async fn a_failed_attempt_waits_again_and_is_counted_but_an_interrupted_one_is_not() {
    let app = queued().await;
    let run = Run::claim(&app.database, "train").await;
    assert_eq!(run.release("shutdown").await, "ready");
    let row = app.database.job(app.job).await;
    assert_eq!(
        (&row["status"], &row["current_stage"], &row["retry_count"]),
        (&json!("queued"), &json!("queued"), &json!(0))
    );

    let run = Run::claim(&app.database, "train").await;
    run.fail(json!({ "code": "GPU_LOST", "blame": "platform", "message": "The GPU is gone." }))
        .await;
    let row = app.database.job(app.job).await;
    assert_eq!((&row["status"], &row["retry_count"]), (&json!("queued"), &json!(1)));
    assert_eq!(app.database.notifications(app.user).await, Vec::<Value>::new());
}

#[tokio::test]
async fn a_failed_job_can_be_redriven_and_is_billed_on_one_record() {
    let app = queued().await;
    let run = Run::claim(&app.database, "train").await;
    run.report("running", json!({})).await;
    run.fail(
        json!({ "code": "BASE_MODEL_UNKNOWN", "blame": "user", "message": "No such model", "detail": { "cost": 0.5 } }),
    )
    .await;
    app.database
        .owner
        .execute("select brightrun.redrive($1)", &[&app.job])
        .await
        .unwrap();
    let row = app.database.job(app.job).await;
    assert_eq!(
        (&row["status"], &row["error_message"], &row["final_cost"]),
        (&json!("queued"), &Value::Null, &Value::Null)
    );

    let run = Run::claim(&app.database, "train").await;
    run.complete(finished(app.user, Uuid::new_v4())).await.unwrap();
    let amounts = app
        .database
        .json("select jsonb_agg(amount) from cost_records", &[])
        .await;
    assert_eq!(amounts, json!([7.5]), "both attempts, one record");
    assert_eq!(app.database.job(app.job).await["final_cost"], json!(7.5));
}

// --- Datasets ---------------------------------------------------------------------------------------------------------

/// A dataset that the app has just created, as `POST /api/datasets` does, and its user.
async fn uploading() -> (Database, Uuid, Uuid) {
    let database = Database::migrated().await;
    let user = database.user().await;
    let dataset = Uuid::new_v4();
    database
        .signed_in(user)
        .await
        .execute(
            "insert into datasets (id, user_id, name, format, status, storage_bucket, storage_path, file_name, file_size)
             values ($1, $2, 'Kind answers', 'brightrun_lora_v4', 'uploading', 'lora-datasets', $3, 'a.jsonl', 4711)",
            &[&dataset, &user, &format!("{user}/{dataset}/a.jsonl")],
        )
        .await
        .unwrap();
    (database, user, dataset)
}

/// Confirms an upload as `POST /api/datasets/{id}/confirm` does.
async fn confirm(database: &Database, user: Uuid, dataset: Uuid) {
    let confirmed = "update datasets set status = 'validating' where id = $1";
    assert_eq!(
        database
            .signed_in(user)
            .await
            .execute(confirmed, &[&dataset])
            .await
            .unwrap(),
        1
    );
}

async fn dataset_row(database: &Database, dataset: Uuid) -> Value {
    database
        .json("select to_jsonb(d) from datasets d where id = $1", &[&dataset])
        .await
}

#[tokio::test]
async fn a_confirmed_upload_is_validated_once() {
    let (database, user, dataset) = uploading().await;
    assert_eq!(database.count("brightrun.job", &[]).await, 0);
    confirm(&database, user, dataset).await;
    confirm(&database, user, dataset).await;
    assert_eq!(database.count("brightrun.job", &[]).await, 1);
    let payload = database
        .json("select payload from brightrun.jobs('validate_dataset')", &[])
        .await;
    assert_eq!(payload["dataset"]["id"], json!(dataset));
    assert_eq!(payload["dataset"]["storage_bucket"], "lora-datasets");
    assert_eq!(payload["user_id"], json!(user));
}

#[tokio::test]
async fn a_valid_dataset_becomes_ready() {
    let (database, user, dataset) = uploading().await;
    confirm(&database, user, dataset).await;
    let run = Run::claim(&database, "validate_dataset").await;
    let result = json!({
        "valid": true, "sample_data": [1, 2, 3, 4],
        "statistics": { "total_training_pairs": 40, "total_validation_pairs": 4, "total_tokens": 61000,
                        "avg_turns_per_conversation": 3.67, "avg_tokens_per_turn": 1386.4 },
        "issues": [{ "severity": "warning", "line": 7, "code": "DATA_DUPLICATE", "message": "Same as line 3." }],
    });
    assert_eq!(run.complete(result).await.unwrap(), "completed");
    let row = dataset_row(&database, dataset).await;
    for (key, expected) in [
        ("status", json!("ready")),
        ("training_ready", json!(true)),
        ("validation_errors", Value::Null),
        ("error_message", Value::Null),
        ("total_training_pairs", json!(40)),
        ("total_validation_pairs", json!(4)),
        ("total_tokens", json!(61000)),
        ("avg_turns_per_conversation", json!(3.67)),
        ("sample_data", json!([1, 2, 3])),
    ] {
        assert_eq!(row[key], expected, "{key}");
    }
    assert!(row["validated_at"].is_string());
    assert_eq!(
        database.notifications(user).await,
        [json!({ "type": "dataset_ready", "title": "Dataset Ready",
                 "message": "Your dataset \"Kind answers\" is ready for training", "priority": "medium",
                 "action_url": format!("/datasets/{dataset}"), "metadata": { "dataset_id": dataset } })]
    );
    assert_eq!(
        database.count("brightrun.dataset_issue", &[]).await,
        1,
        "warnings are kept, too"
    );
}

#[tokio::test]
async fn a_bad_dataset_shows_its_first_ten_errors_and_keeps_all() {
    let (database, user, dataset) = uploading().await;
    confirm(&database, user, dataset).await;
    let run = Run::claim(&database, "validate_dataset").await;
    let issues: Vec<Value> = (1..=25)
        .map(|line| {
            json!({ "line": line, "path": "messages[1].role", "code": "DATA_ROLE_UNKNOWN",
                            "message": format!("Role {line}."), "hint": "Use user." })
        })
        .collect();
    run.complete(json!({ "valid": false, "issues": issues })).await.unwrap();
    let row = dataset_row(&database, dataset).await;
    assert_eq!(
        (&row["status"], &row["training_ready"]),
        (&json!("error"), &json!(false))
    );
    assert_eq!(row["error_message"], "Found 25 validation error(s)");
    assert_eq!(row["validation_errors"].as_array().unwrap().len(), 10);
    assert_eq!(
        row["validation_errors"][0],
        json!({ "line": 1, "error": "Role 1.", "suggestion": "Use user.", "code": "DATA_ROLE_UNKNOWN", "path": "messages[1].role" })
    );
    let mut api = database.signed_in(user).await;
    let seen = api
        .query(
            "select line, code from dataset_issues where dataset_id = $1 order by ordinal",
            &[&dataset],
        )
        .await
        .unwrap();
    assert_eq!(seen.len(), 25);
    assert_eq!(
        database.notifications(user).await,
        Vec::<Value>::new(),
        "the app does not tell of a bad dataset"
    );

    // Uploaded again and valid this time: nothing of the old report stays.
    confirm(&database, user, dataset).await;
    let run = Run::claim(&database, "validate_dataset").await;
    run.complete(json!({ "valid": true })).await.unwrap();
    let row = dataset_row(&database, dataset).await;
    assert_eq!(
        (&row["status"], &row["validation_errors"], &row["error_message"]),
        (&json!("ready"), &Value::Null, &Value::Null)
    );
    assert_eq!(database.count("brightrun.dataset_issue", &[]).await, 0);
}

#[tokio::test]
async fn a_report_too_long_for_one_message_comes_in_parts() {
    let (database, user, dataset) = uploading().await;
    confirm(&database, user, dataset).await;
    let part = |count: usize| json!({ "issues": vec![json!({ "line": 1, "code": "DATA_X", "message": "m" }); count] });
    let run = Run::claim(&database, "validate_dataset").await;
    run.report("issues", part(7)).await;
    run.release("shutdown").await;
    let run = Run::claim(&database, "validate_dataset").await;
    assert_eq!(
        database.count("brightrun.dataset_issue", &[]).await,
        0,
        "a new attempt reports anew"
    );
    run.report("issues", part(6000)).await;
    run.report("issues", part(6000)).await;
    let mut result = part(2);
    result["error_count"] = json!(12002);
    run.complete(result).await.unwrap();
    assert_eq!(database.count("brightrun.dataset_issue", &[]).await, 10_000);
    let row = dataset_row(&database, dataset).await;
    assert_eq!(
        row["error_message"], "Found 12002 validation error(s)",
        "what is not kept is still counted"
    );
}

#[tokio::test]
async fn the_latest_upload_is_the_one_that_counts() {
    let (database, user, dataset) = uploading().await;
    confirm(&database, user, dataset).await;
    let first = Run::claim(&database, "validate_dataset").await;
    let again = "update datasets set status = 'uploading' where id = $1";
    database
        .signed_in(user)
        .await
        .execute(again, &[&dataset])
        .await
        .unwrap();
    confirm(&database, user, dataset).await;
    assert_eq!(first.beat(json!({})).await, "cancel");
    assert_eq!(first.complete(json!({ "valid": true })).await.unwrap(), "cancelled");
    assert_eq!(
        dataset_row(&database, dataset).await["status"],
        "validating",
        "the second validation decides"
    );
    let second = Run::claim(&database, "validate_dataset").await;
    second
        .complete(json!({ "valid": false, "error_message": "File is empty" }))
        .await
        .unwrap();
    assert_eq!(dataset_row(&database, dataset).await["error_message"], "File is empty");
}

#[tokio::test]
async fn a_dataset_that_cannot_be_read_says_why() {
    let (database, user, dataset) = uploading().await;
    confirm(&database, user, dataset).await;
    let run = Run::claim(&database, "validate_dataset").await;
    run.fail(
        json!({ "code": "STORAGE_NOT_FOUND", "blame": "user", "message": "Failed to download file: File not found",
                     "detail": { "hint": "Upload it again." } }),
    )
    .await;
    let row = dataset_row(&database, dataset).await;
    assert_eq!(row["status"], "error");
    assert_eq!(
        row["error_message"],
        "Failed to download file: File not found. Upload it again. [STORAGE_NOT_FOUND]"
    );
}
