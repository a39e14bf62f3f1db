//! The app hears what became of its jobs, each step at least once, signed, and only what happened.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::http::{HeaderMap, StatusCode};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use brightrun_worker::orchestrator::webhooks::Webhooks;
use brightrun_worker::secret::Secret;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::database::eventually;
use crate::world::World;

/// What an app got: headers and body.
type Heard = Arc<Mutex<Vec<(HeaderMap, Value)>>>;

/// An app that refuses its first call.
async fn app(heard: Heard) -> String {
    let router = axum::Router::new().route(
        "/hook",
        axum::routing::post(move |headers: HeaderMap, body: String| async move {
            let mut heard = heard.lock().unwrap();
            heard.push((headers, serde_json::from_str(&body).unwrap()));
            if heard.len() == 1 {
                StatusCode::BAD_GATEWAY
            } else {
                StatusCode::NO_CONTENT
            }
        }),
    );
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, router).await });
    format!("http://{address}/hook")
}

#[tokio::test(flavor = "multi_thread")]
async fn the_app_hears_of_each_step_signed_and_again_until_it_listens() {
    let world = World::new().await;
    brightrun_worker::storage::http::install_crypto_provider();
    let unheard = world.job(10, 1).await;
    world.work_until(unheard, "completed").await;
    assert_eq!(
        world.database.count("brightrun.outbox", &[]).await,
        0,
        "nothing is written for nobody"
    );

    let heard = Heard::default();
    let url = app(heard.clone()).await;
    let secret = Secret::new("canary-not-a-real-secret");
    let webhooks = Webhooks::new(world.queue().await, &url, secret, Duration::from_millis(20)).unwrap();
    let over = CancellationToken::new();
    let stop = over.clone();
    tokio::spawn(async move { webhooks.run(&stop).await });
    eventually("the topic is wanted", || async {
        world.database.count("brightrun.outbox_topic", &[]).await == 1
    })
    .await;
    let job = world.job(10, 1).await;
    world.work_until(job, "completed").await;
    eventually("everything is heard", || async {
        world.database.count("brightrun.outbox", &[]).await == 0
    })
    .await;
    over.cancel();

    let heard = heard.lock().unwrap();
    let accepted: Vec<&Value> = heard.iter().skip(1).map(|(_, body)| &body["type"]).collect();
    assert!(accepted.contains(&&json!("training_job.running")) && accepted.contains(&&json!("training_job.completed")));
    let of_id = |place: usize| heard[place].0["webhook-id"].clone();
    assert!(
        (1..heard.len()).any(|place| of_id(place) == of_id(0)),
        "what was refused comes again under its name"
    );
    assert!(heard.iter().all(|(_, body)| body["data"]["job_id"] == json!(job)));
    for (headers, _) in heard.iter() {
        let code = headers["webhook-signature"]
            .to_str()
            .unwrap()
            .strip_prefix("v1,")
            .unwrap();
        assert_eq!(BASE64_STANDARD.decode(code).unwrap().len(), 32);
    }
}
