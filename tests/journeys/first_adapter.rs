//! Rows inserted with plain SQL come back as a trained, proven, delivered adapter.

use std::collections::BTreeMap;

use brightrun_kernels::cpu::Cpu;
use brightrun_worker::artifact::{Manifest, artifact_id};
use brightrun_worker::model::LoraSet;
use brightrun_worker::recipe::Base;
use brightrun_worker::spec::BaseDtype;
use serde_json::json;
use sha2::{Digest, Sha256};

use crate::world::{BASE_MODEL, World, model};

#[tokio::test(flavor = "multi_thread")]
async fn an_inserted_row_becomes_an_adapter_and_every_row_the_app_reads() {
    let world = World::new().await;
    let job = world.job(8, 4).await;
    let row = world.work_until(job, "completed").await;
    let artifact = artifact_id(job);

    // training_jobs: final, finite, both dialects.
    assert_eq!(row["current_stage"], "completed");
    assert_eq!(row["progress"].as_f64(), Some(100.0));
    assert_eq!(row["artifact_id"], json!(artifact));
    assert_eq!(row["current_step"], row["total_steps"]);
    assert_eq!((&row["current_epoch"], &row["total_epochs"]), (&json!(4), &json!(4)));
    assert!(row["error_message"].is_null() && row["completed_at"].is_string() && row["started_at"].is_string());
    assert!(row["final_cost"].as_f64().unwrap().is_finite());
    let (hyper, gpu) = (&row["hyperparameters"], &row["gpu_config"]);
    for (short, long, value) in [
        ("epochs", "num_epochs", 4),
        ("rank", "lora_rank", 4),
        ("alpha", "lora_alpha", 8),
    ] {
        assert_eq!(
            (hyper[short].as_f64(), hyper[long].as_f64()),
            (Some(value.into()), Some(value.into())),
            "{short}"
        );
    }
    assert_eq!(hyper["base_model"], BASE_MODEL);
    assert_eq!(
        (&gpu["type"], &gpu["gpu_type"]),
        (&json!("A100-80GB"), &json!("A100-80GB"))
    );
    assert_eq!((gpu["count"].as_u64(), gpu["num_gpus"].as_u64()), (Some(2), Some(2)));
    assert_eq!(gpu["cost_per_gpu_hour"].as_f64(), Some(3.5));

    // model_artifacts: stars by the app's rule, its keys, its paths.
    let delivered = world
        .database
        .json(
            "select to_jsonb(made) from model_artifacts made where job_id = $1",
            &[&job],
        )
        .await;
    assert_eq!(delivered["id"], json!(artifact));
    assert_eq!(
        (&delivered["status"], &delivered["version"]),
        (&json!("stored"), &json!("1.0.0"))
    );
    assert!(
        delivered["name"].as_str().unwrap().starts_with("Kind answers - "),
        "{delivered:#}"
    );
    let losses = world
        .database
        .json(
            "select jsonb_agg(jsonb_build_array(training_loss, validation_loss) order by timestamp) from metrics_points where job_id = $1",
            &[&job],
        )
        .await;
    let losses = losses.as_array().unwrap();
    assert!(losses.len() > 1 && losses.len() <= 100);
    let quality = &delivered["quality_metrics"];
    let (first, last) = (
        losses[0][0].as_f64().unwrap(),
        losses.last().unwrap()[0].as_f64().unwrap(),
    );
    let reduction = (first - last) / first * 100.0;
    assert!(reduction > 5.0, "the model has learnt nothing: {first} to {last}");
    assert!((quality["loss_reduction_percent"].as_f64().unwrap() - reduction).abs() < 0.01);
    assert_eq!(quality["final_training_loss"].as_f64(), Some(last));
    let stars = quality["overall_score"].as_u64().unwrap();
    let by_reduction = [(50.0, 5), (30.0, 4), (15.0, 3), (5.0, 2)]
        .iter()
        .find(|(above, _)| reduction > *above)
        .unwrap()
        .1;
    let expected = if quality["convergence_quality"] == "overfit" {
        2.max(by_reduction - 1)
    } else {
        by_reduction
    };
    assert_eq!(stars, expected);
    let summary = &delivered["training_summary"];
    assert_eq!(
        (&summary["epochs_completed"], &summary["total_steps"]),
        (&json!(4), &row["total_steps"])
    );
    assert_eq!(summary["total_cost"].as_f64(), row["final_cost"].as_f64());
    assert!(summary["training_duration_hours"].is_number() && summary["final_loss"].is_number());
    assert_eq!(delivered["configuration"]["hyperparameters"], *hyper);
    assert_eq!(delivered["configuration"]["gpu_config"], *gpu);

    // cost_records and notifications: one of each.
    let costs = world
        .database
        .json(
            "select jsonb_agg(jsonb_build_array(cost_type, amount)) from cost_records where job_id = $1",
            &[&job],
        )
        .await;
    assert_eq!(costs, json!([["training_compute", row["final_cost"]]]));
    let told: Vec<_> = world.database.notifications(world.user).await;
    let types: Vec<_> = told.iter().map(|told| told["type"].as_str().unwrap()).collect();
    assert_eq!(types, ["job_started", "job_completed", "artifact_ready"]);
    assert_eq!(
        told[2]["message"],
        format!("Your trained model is ready. Quality score: {stars}/5 stars")
    );
    assert_eq!(told[2]["action_url"], format!("/models/{artifact}"));

    // Storage: the row's paths are the manifest's files with the manifest's hashes, and nothing else lies beside them.
    let paths: BTreeMap<String, String> = serde_json::from_value(delivered["artifacts"].clone()).unwrap();
    let manifest: Manifest =
        serde_json::from_slice(&std::fs::read(world.delivered(job, "manifest.json")).unwrap()).unwrap();
    for (name, path) in &paths {
        assert_eq!(*path, format!("{}/{artifact}/{name}", world.user));
        let bytes = std::fs::read(world.delivered(job, name)).unwrap();
        if name != "manifest.json" {
            assert_eq!(
                manifest.files[name].sha256,
                hex::encode(Sha256::digest(&bytes)),
                "{name}"
            );
        }
    }
    let expected: Vec<&str> = manifest
        .files
        .keys()
        .map(String::as_str)
        .chain(["manifest.json"])
        .collect();
    assert!(
        expected.iter().all(|name| paths.contains_key(*name)) && paths.len() == expected.len(),
        "{paths:?}"
    );
    assert_eq!(
        std::fs::read_dir(world.delivered(job, "")).unwrap().count(),
        paths.len()
    );

    // The adapter loads, and was proven before the job was called completed.
    let proof = manifest.verification.unwrap();
    assert!((proof.recomputed_loss - manifest.proof.loss).abs() <= manifest.loss_tolerance);
    let base = Base::load(&Cpu::new(Some(1)).unwrap(), model(), BaseDtype::F32, &mut |_| {}).unwrap();
    LoraSet::load(base.model.device(), &world.delivered(job, ""), base.model.modules()).unwrap();
}
