//! The cloud's calls, each at `/x` and at `/v2/{endpoint}/x`.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, Path, Query, Request as HttpRequest, State};
use axum::http::StatusCode;
use axum::http::header::AUTHORIZATION;
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Json, Response};
use axum::routing::{get, post};
use serde_json::{Value, json};

use super::record::Request;
use super::store::{Retry, Store};
use crate::secret::Secret;

/// The cloud's payload limits in bytes.
const RUN_LIMIT: usize = 10_000_000;
const SYNC_LIMIT: usize = 20_000_000;

/// Bounds and default of `?wait=` in milliseconds.
const WAIT: (u64, u64, u64) = (1_000, 90_000, 300_000);

type Parameters = Path<HashMap<String, String>>;
type Options = Query<HashMap<String, String>>;

/// All routes over a store, behind a token if one is given.
pub(crate) fn router(store: Arc<Store>, token: Option<Secret>) -> Router {
    let calls = Router::new()
        .route("/run", post(run).layer(DefaultBodyLimit::max(RUN_LIMIT)))
        .route("/runsync", post(runsync).layer(DefaultBodyLimit::max(SYNC_LIMIT)))
        .route("/status/{id}", get(status).post(status))
        .route("/status-sync/{id}", get(status_sync).post(status_sync))
        .route("/stream/{id}", get(stream).post(stream))
        .route("/cancel/{id}", post(cancel))
        .route("/retry/{id}", post(retry))
        .route("/purge-queue", post(purge))
        .route("/health", get(health))
        .with_state(store);
    let all = Router::new().merge(calls.clone()).nest("/v2/{endpoint}", calls);
    match token {
        Some(token) => all.layer(middleware::from_fn_with_state(Arc::new(token), authorize)),
        None => all,
    }
}

async fn authorize(State(token): State<Arc<Secret>>, request: HttpRequest, next: Next) -> Response {
    let given = request
        .headers()
        .get(AUTHORIZATION)
        .and_then(|value| value.to_str().ok());
    let given = given.map(|given| given.strip_prefix("Bearer ").unwrap_or(given));
    if given == Some(token.expose()) {
        return next.run(request).await;
    }
    problem(StatusCode::UNAUTHORIZED, "the API key is missing or wrong")
}

async fn run(State(store): State<Arc<Store>>, body: Bytes) -> Response {
    match Request::read(&body) {
        Ok(request) => Json(json!({"id": store.add(request, false), "status": "IN_QUEUE"})).into_response(),
        Err(why) => problem(StatusCode::BAD_REQUEST, &why),
    }
}

async fn runsync(State(store): State<Arc<Store>>, Query(options): Options, body: Bytes) -> Response {
    let request = match Request::read(&body) {
        Ok(request) => request,
        Err(why) => return problem(StatusCode::BAD_REQUEST, &why),
    };
    let id = store.add(request, true);
    found(store.settled(&id, wait(&options)).await.map(Value::Object), &id)
}

async fn status(State(store): State<Arc<Store>>, Path(path): Parameters, Query(options): Options) -> Response {
    let id = id(&path);
    let kept = options
        .get("ttl")
        .and_then(|text| text.parse().ok())
        .map(Duration::from_millis);
    let view = store.with(id, |record| {
        if let Some(kept) = kept {
            record.keep_for(kept);
        }
        Value::Object(record.view())
    });
    found(view, id)
}

async fn status_sync(State(store): State<Arc<Store>>, Path(path): Parameters, Query(options): Options) -> Response {
    let id = id(&path);
    found(store.settled(id, wait(&options)).await.map(Value::Object), id)
}

async fn stream(State(store): State<Arc<Store>>, Path(path): Parameters) -> Response {
    let id = id(&path);
    let view = store.with(id, |record| {
        let chunks: Vec<Value> = record.unread.drain(..).map(|chunk| json!({"output": chunk})).collect();
        json!({"id": record.id, "status": record.status, "stream": chunks})
    });
    found(view, id)
}

async fn cancel(State(store): State<Arc<Store>>, Path(path): Parameters) -> Response {
    let id = id(&path);
    found(store.cancel(id).map(|status| json!({"id": id, "status": status})), id)
}

async fn retry(State(store): State<Arc<Store>>, Path(path): Parameters) -> Response {
    let id = id(&path);
    match store.retry(id) {
        Retry::Queued => Json(json!({"id": id, "status": "IN_QUEUE"})).into_response(),
        Retry::Unknown => found(None, id),
        Retry::NotFailed(status) => problem(
            StatusCode::BAD_REQUEST,
            &format!("only a failed job can be retried, and this one is {status}"),
        ),
    }
}

async fn purge(State(store): State<Arc<Store>>) -> Response {
    Json(json!({"removed": store.purge(), "status": "completed"})).into_response()
}

async fn health(State(store): State<Arc<Store>>) -> Response {
    Json(store.health()).into_response()
}

fn id(path: &HashMap<String, String>) -> &str {
    path.get("id").map(String::as_str).unwrap_or_default()
}

fn wait(options: &HashMap<String, String>) -> Duration {
    let (least, default, most) = WAIT;
    let asked = options
        .get("wait")
        .and_then(|text| text.parse().ok())
        .unwrap_or(default);
    Duration::from_millis(asked.clamp(least, most))
}

fn found(view: Option<Value>, id: &str) -> Response {
    match view {
        Some(view) => Json(view).into_response(),
        None => problem(StatusCode::NOT_FOUND, &format!("there is no job {id}, or not any more")),
    }
}

fn problem(status: StatusCode, why: &str) -> Response {
    (status, Json(json!({"error": why}))).into_response()
}
