//! A data set that the app confirms is examined: ready with its numbers, or refused with every reason.

use serde_json::{Value, json};
use uuid::Uuid;

use crate::world::{World, dataset};

/// Uploads a file and does what the app's confirm does; returns the row after validation.
async fn validated(world: &World, text: &str) -> (Uuid, Value) {
    let id = Uuid::new_v4();
    world.upload(id, text);
    let path = format!("{}/{id}/data.jsonl", world.user);
    let insert = "insert into datasets (id, user_id, name, status, storage_path, file_name, file_size)
                  values ($1, $2, 'Kind answers', 'uploading', $3, 'data.jsonl', 0)";
    world
        .database
        .owner
        .execute(insert, &[&id, &world.user, &path])
        .await
        .unwrap();
    let mut app = world.database.signed_in(world.user).await;
    assert_eq!(
        app.execute("update datasets set status = 'validating' where id = $1", &[&id])
            .await
            .unwrap(),
        1
    );
    world.validate_all().await;
    let row = world
        .database
        .json("select to_jsonb(data) from datasets data where id = $1", &[&id])
        .await;
    (id, row)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_good_data_set_becomes_ready_with_its_numbers_and_a_notification() {
    let world = World::new().await;
    let (id, row) = validated(&world, &dataset(7)).await;
    assert_eq!(
        (&row["status"], &row["training_ready"]),
        (&json!("ready"), &json!(true)),
        "{row:#}"
    );
    assert_eq!(row["total_training_pairs"], 7);
    assert_eq!(row["avg_turns_per_conversation"].as_f64(), Some(2.0));
    assert!(
        row["total_tokens"].as_u64() > Some(7) && row["avg_tokens_per_turn"].as_f64() > Some(1.0),
        "{row:#}"
    );
    assert_eq!(row["sample_data"].as_array().map(Vec::len), Some(3));
    assert!(row["validation_errors"].is_null() && row["error_message"].is_null() && row["validated_at"].is_string());
    let told = world.database.notifications(world.user).await;
    assert_eq!(told.len(), 1);
    assert_eq!(
        (&told[0]["type"], &told[0]["action_url"]),
        (&json!("dataset_ready"), &json!(format!("/datasets/{id}")))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_data_set_becomes_error_and_its_owner_can_read_every_issue() {
    let world = World::new().await;
    // Issues whose places alone are more than one report may carry.
    let mut text = dataset(2);
    for _ in 0..700 {
        text.push_str(&format!("{{\"{}\": 1}}\n", "unknown".repeat(300)));
    }
    let (id, row) = validated(&world, &text).await;
    assert_eq!(
        (&row["status"], &row["training_ready"]),
        (&json!("error"), &json!(false)),
        "{row:#}"
    );
    assert_eq!(row["validation_errors"].as_array().map(Vec::len), Some(10));
    assert!(row["error_message"].as_str().unwrap().contains("700"), "{row:#}");
    let mut app = world.database.signed_in(world.user).await;
    let lines = app
        .query(
            "select distinct line from dataset_issues where dataset_id = $1 and severity = 'error'",
            &[&id],
        )
        .await
        .unwrap();
    assert_eq!(lines.len(), 700);
    let mut other = world.database.signed_in(Uuid::new_v4()).await;
    assert!(
        other
            .query("select * from dataset_issues where dataset_id = $1", &[&id])
            .await
            .unwrap()
            .is_empty()
    );
    assert!(world.database.notifications(world.user).await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mended_data_set_is_validated_again_and_its_old_issues_go() {
    let world = World::new().await;
    let (id, row) = validated(&world, "not json\n").await;
    assert_eq!(row["status"], "error");
    world.upload(id, &dataset(3));
    let mut app = world.database.signed_in(world.user).await;
    app.execute("update datasets set status = 'validating' where id = $1", &[&id])
        .await
        .unwrap();
    world.validate_all().await;
    let row = world
        .database
        .json("select to_jsonb(data) from datasets data where id = $1", &[&id])
        .await;
    assert_eq!(
        (row["status"].as_str(), row["validation_errors"].is_null()),
        (Some("ready"), true),
        "{row:#}"
    );
    assert_eq!(
        world
            .database
            .count("brightrun.dataset_issue where dataset_id = $1", &[&id])
            .await,
        0
    );
}
