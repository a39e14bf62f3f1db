//! The outbox: taken at least once, acknowledged exactly once.

use std::collections::HashSet;
use std::time::Duration;

use serde_json::json;

use crate::support::database;

const HOLD: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread")]
async fn each_message_is_acknowledged_exactly_once_among_many_consumers() {
    let db = database().await;
    for number in 0..100 {
        db.queue
            .outbox_put("webhook", &json!(number), None, None)
            .await
            .unwrap();
    }
    let mut consumers = tokio::task::JoinSet::new();
    for _ in 0..6 {
        let queue = db.queue.clone();
        consumers.spawn(async move {
            let mut mine = Vec::new();
            loop {
                let taken = queue.outbox_take(&["webhook"], 7, HOLD).await.unwrap();
                if taken.is_empty() {
                    return mine;
                }
                for message in taken {
                    assert!(queue.outbox_ack(&message).await.unwrap());
                    assert!(!queue.outbox_ack(&message).await.unwrap(), "once");
                    mine.push(message.payload.as_i64().unwrap());
                }
            }
        });
    }
    let acknowledged: Vec<i64> = consumers.join_all().await.into_iter().flatten().collect();
    assert_eq!(acknowledged.len(), 100);
    assert_eq!(acknowledged.into_iter().collect::<HashSet<_>>().len(), 100);
}

#[tokio::test]
async fn a_consumer_that_died_loses_its_message_to_the_next_whose_acknowledgement_counts() {
    let db = database().await;
    db.queue
        .outbox_put("webhook", &json!("hello"), Some("job 7"), None)
        .await
        .unwrap();
    let dead = db
        .queue
        .outbox_take(&["webhook"], 1, Duration::ZERO)
        .await
        .unwrap()
        .remove(0);
    let next = db.queue.outbox_take(&["webhook"], 1, HOLD).await.unwrap().remove(0);
    assert_eq!(
        (next.id, next.attempts, next.key.as_deref()),
        (dead.id, 2, Some("job 7"))
    );
    assert!(!db.queue.outbox_ack(&dead).await.unwrap());
    assert!(!db.queue.outbox_nack(&dead, "too late", HOLD, 1).await.unwrap());
    assert!(db.queue.outbox_ack(&next).await.unwrap());
}

#[tokio::test]
async fn an_undelivered_message_waits_and_is_dead_after_its_last_attempt() {
    let db = database().await;
    db.queue.outbox_put("webhook", &json!({}), None, None).await.unwrap();
    let first = db.queue.outbox_take(&["webhook"], 1, HOLD).await.unwrap().remove(0);
    assert!(db.queue.outbox_nack(&first, "503", Duration::ZERO, 2).await.unwrap());
    let second = db.queue.outbox_take(&["webhook"], 1, HOLD).await.unwrap().remove(0);
    assert!(db.queue.outbox_nack(&second, "503", Duration::ZERO, 2).await.unwrap());
    assert_eq!(db.queue.outbox_take(&["webhook"], 1, HOLD).await.unwrap(), vec![]);
    let row = db
        .client()
        .await
        .query_one("select last_error, dead_at is not null from brightrun.outbox", &[])
        .await
        .unwrap();
    assert_eq!((row.get::<_, &str>(0), row.get::<_, bool>(1)), ("503", true));
}

#[tokio::test]
async fn delayed_messages_and_other_topics_are_left_alone() {
    let db = database().await;
    db.queue
        .outbox_put("webhook", &json!({}), None, Some(HOLD))
        .await
        .unwrap();
    db.queue.outbox_put("mail", &json!({}), None, None).await.unwrap();
    assert_eq!(db.queue.outbox_take(&["webhook"], 9, HOLD).await.unwrap(), vec![]);
    assert_eq!(
        db.queue.outbox_take(&["mail", "webhook"], 9, HOLD).await.unwrap().len(),
        1
    );
}
