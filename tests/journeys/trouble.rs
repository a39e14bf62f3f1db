//! Everything around a job that can be broken, and what its owner is then told.

use std::fs;

use brightrun_queue::private_server::{Options, PrivateServer};
use serde_json::json;
use uuid::Uuid;

use crate::database::{Database, eventually};
use crate::world::{World, dataset, settings, spoken};

/// An obviously fake password that must appear nowhere.
const CANARY: &str = "canary-not-a-password-52b1";

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_data_set_fails_the_job_at_once_and_leaves_its_issues() {
    let world = World::new().await;
    let id = Uuid::new_v4();
    let mut text = dataset(3);
    for line in 0..14 {
        text.push_str(&format!(
            "{{\"messages\": [{{\"role\": \"assistent\", \"content\": \"{line}\"}}]}}\n"
        ));
    }
    world.upload(id, &text);
    let job = world.insert(id, settings(1)).await;
    let row = world.work_until(job, "failed").await;
    assert!(
        row["error_message"].as_str().unwrap().ends_with("[DATASET_INVALID]"),
        "{row:#}"
    );
    let status = world.queue().await.status(job).await.unwrap().unwrap();
    assert_eq!(
        (status.attempt, &status.error.unwrap()["blame"]),
        (1, &json!("user")),
        "it is not tried again"
    );
    let issues = world
        .database
        .json("select jsonb_agg(to_jsonb(issue) order by ordinal) from brightrun.dataset_issue issue where dataset_id = $1", &[&id])
        .await;
    let errors: Vec<_> = issues
        .as_array()
        .unwrap()
        .iter()
        .filter(|issue| issue["severity"] == "error")
        .collect();
    assert!(errors.len() >= 14, "{issues:#}");
    for issue in &errors {
        assert!(
            issue["line"].as_u64().unwrap() > 3 && issue["code"].as_str().unwrap().starts_with("DATA_"),
            "{issue:#}"
        );
    }
    let shown = world.dataset_of(job).await["validation_errors"].clone();
    assert_eq!(shown.as_array().unwrap().len(), 10);
    assert_eq!(
        (&shown[0]["line"], &shown[0]["error"]),
        (&errors[0]["line"], &errors[0]["message"])
    );
    assert_eq!(
        world.database.count("cost_records where job_id = $1", &[&job]).await,
        0,
        "no compute was used"
    );
    let told = world.database.notifications(world.user).await;
    assert_eq!(
        told.iter()
            .map(|told| told["type"].as_str().unwrap())
            .collect::<Vec<_>>(),
        ["job_failed"]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_data_set_without_a_file_or_with_an_empty_one_is_the_users_to_mend() {
    let world = World::new().await;
    let missing = world.insert(Uuid::new_v4(), settings(1)).await;
    let id = Uuid::new_v4();
    world.upload(id, "");
    let empty = world.insert(id, settings(1)).await;
    world.work().await;
    for (job, code) in [(missing, "STORAGE_OBJECT_MISSING"), (empty, "STORAGE_OBJECT_EMPTY")] {
        let row = world.database.job(job).await;
        assert_eq!(row["status"], "failed", "{row:#}");
        assert!(
            row["error_message"].as_str().unwrap().ends_with(&format!("[{code}]")),
            "{row:#}"
        );
        let status = world.queue().await.status(job).await.unwrap().unwrap();
        assert_eq!((status.attempt, &status.error.unwrap()["blame"]), (1, &json!("user")));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_storage_that_cannot_be_written_is_found_before_training_and_tried_again() {
    let world = World::new().await;
    let job = world.job(4, 1).await;
    // A file where the bucket's folder should be: refused to root, too.
    fs::write(world.storage_folder().join("lora-models"), "in the way").unwrap();
    let worker = world.worker().await;
    eventually("the attempt fails", || async {
        world
            .database
            .count("brightrun.event where job_id = $1 and event = 'retry'", &[&job])
            .await
            > 0
    })
    .await;
    let row = world.database.job(job).await;
    assert!(
        row["current_step"].as_u64().unwrap_or(0) == 0 && row["started_at"].is_null(),
        "{row:#}"
    );
    fs::remove_file(world.storage_folder().join("lora-models")).unwrap();
    world.becomes(job, "completed").await;
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_without_its_model_says_so_and_takes_no_job() {
    let mut world = World::new().await;
    let job = world.job(4, 1).await;
    world.config.model.path = Some(world.folder.path().join("no-such-model"));
    let (_, errors, code) = spoken(&world.brightrun(&["worker", "--until-idle"]).output().unwrap());
    assert_eq!(code, 3, "{errors}");
    assert!(
        errors.contains("MODEL_PATH_MISSING") && errors.contains("no-such-model"),
        "{errors}"
    );
    assert_eq!(world.database.job(job).await["status"], "queued");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_database_password_is_named_and_not_shown() {
    let server = PrivateServer::start(&Options {
        loopback: true,
        ..Options::default()
    })
    .unwrap();
    let right = server.loopback_url("postgres").unwrap();
    let at = right.rfind('@').unwrap();
    let wrong = format!("postgresql://postgres:{CANARY}{}", &right[at..]);
    let world = World::new().await;
    let output = world
        .brightrun(&["worker", "--until-idle"])
        .env("DATABASE_URL", wrong)
        .output()
        .unwrap();
    let (said, errors, code) = spoken(&output);
    assert_ne!(code, 0);
    assert!(errors.contains("password") && errors.contains("127.0.0.1"), "{errors}");
    assert!(!errors.contains(CANARY) && !said.contains(CANARY), "{errors}");
    server.stop().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_is_down_is_named_with_its_address() {
    let world = World::new().await;
    let nobody = format!("postgresql://postgres:{CANARY}@127.0.0.1:1/postgres");
    let output = world
        .brightrun(&["status", &Uuid::nil().to_string()])
        .env("DATABASE_URL", nobody)
        .output()
        .unwrap();
    let (said, errors, code) = spoken(&output);
    assert_eq!(code, 3, "{errors}");
    assert!(errors.contains("127.0.0.1") && errors.contains("QUEUE_"), "{errors}");
    assert!(!errors.contains(CANARY) && !said.contains(CANARY), "{errors}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_completes_although_the_database_crashed_in_its_middle() {
    let mut server = PrivateServer::start(&Options::default()).unwrap();
    let url = server.create_database("journey").await.unwrap();
    let before = Database::at(url.clone()).await;
    before.owner.batch_execute(crate::database::SCHEMA).await.unwrap();
    let world = World::at(before).await;
    let job = world.job(10, 20).await;
    let worker = world.worker().await;
    eventually("a checkpoint", || async { world.checkpointed_step(job) > 5 }).await;
    server.restart_immediate().unwrap();
    assert!(world.checkpointed_step(job) < 180, "the run ended before the crash");
    let after = Database::at(url).await;
    eventually("the job completes", || async {
        after.job(job).await["status"] == "completed"
    })
    .await;
    worker.stop().await;
    assert_eq!(after.count("model_artifacts where job_id = $1", &[&job]).await, 1);
    assert_eq!(after.count("cost_records where job_id = $1", &[&job]).await, 1);
    drop((world, after));
    server.stop().unwrap();
}
