//! The development server of RunPod's SDK, copied: `/run` only stores, `/status` and `/stream` run the stored job and forget it.
//!
//! Two of its defects are not copied: an outcome of the handler never becomes a 500, and stored jobs are limited.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, Path, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{Html, IntoResponse, Json, Redirect, Response};
use axum::routing::{get, post};
use serde_json::{Map, Value, json};
use uuid::Uuid;

use super::direct::{self, Ran};
use crate::error::Result;
use crate::runpod::handler::{Handler, OutputForm};
use crate::runpod::http::Http;
use crate::runpod::job::RunPodJob;
use crate::runpod::redact::Redactor;

/// Jobs that were stored and never asked for; the oldest ids give way.
const MOST_STORED: usize = 10_000;

/// Longest wait for a webhook's answer; it is called once.
const WEBHOOK_TIMEOUT: Duration = Duration::from_secs(10);

struct Server {
    handler: Arc<dyn Handler>,
    redactor: Redactor,
    http: Http,
    stored: Mutex<BTreeMap<String, Asked>>,
}

/// A request body that passed.
struct Asked {
    input: Value,
    webhook: Option<String>,
}

/// The server's routes; with an endpoint's id also `/{id}/realtime`, which answers with a result's bare body.
pub(crate) fn router(handler: Arc<dyn Handler>, redactor: Redactor, endpoint: Option<&str>) -> Result<Router> {
    let server = Server {
        handler,
        redactor,
        http: Http::for_worker(None)?,
        stored: Mutex::default(),
    };
    let mut router = Router::new();
    // A path of the router's own language has braces, an endpoint's id has none.
    if let Some(endpoint) = endpoint.filter(|id| !id.is_empty() && !id.contains(['/', '{', '}', '*', ':'])) {
        router = router.route(&format!("/{endpoint}/realtime"), post(realtime));
    }
    Ok(router
        .route(
            "/",
            get(|| async { Html("<title>Runpod | Development Worker API</title>") }),
        )
        .route("/docs", get(|| async { Redirect::temporary("/") }))
        .route("/openapi.json", get(openapi))
        .route("/run", post(run))
        .route("/runsync", post(runsync))
        .route("/status/{id}", post(status))
        .route("/stream/{id}", post(stream))
        .fallback(|| async { detail(StatusCode::NOT_FOUND, json!("Not Found")) })
        .method_not_allowed_fallback(|| async { detail(StatusCode::METHOD_NOT_ALLOWED, json!("Method Not Allowed")) })
        .layer(DefaultBodyLimit::max(20_000_000))
        .with_state(Arc::new(server)))
}

async fn openapi() -> Json<Value> {
    let call = json!({"post": {"responses": {"200": {"description": "Successful Response"}}}});
    Json(json!({
        "openapi": "3.1.0",
        "info": {"title": "Runpod | Development Worker API", "version": "1.12.0"},
        "paths": {"/run": call, "/runsync": call, "/status/{job_id}": call, "/stream/{job_id}": call},
    }))
}

async fn run(State(server): State<Arc<Server>>, headers: HeaderMap, body: Bytes) -> Response {
    let asked = match read(&headers, &body) {
        Ok(asked) => asked,
        Err(problem) => return detail(StatusCode::UNPROCESSABLE_ENTITY, problem),
    };
    let id = new_id();
    let mut stored = server.stored.lock().unwrap_or_else(PoisonError::into_inner);
    if stored.len() >= MOST_STORED {
        stored.pop_first();
    }
    stored.insert(id.clone(), asked);
    drop(stored);
    Json(json!({"id": id, "status": "IN_PROGRESS"})).into_response()
}

async fn runsync(State(server): State<Arc<Server>>, headers: HeaderMap, body: Bytes) -> Response {
    match read(&headers, &body) {
        Ok(asked) => server.answer(&new_id(), asked).await,
        Err(problem) => detail(StatusCode::UNPROCESSABLE_ENTITY, problem),
    }
}

async fn status(State(server): State<Arc<Server>>, Path(id): Path<String>) -> Response {
    match server.take(&id) {
        Some(asked) => server.answer(&id, asked).await,
        None => failed(&id, json!("Job ID not found")),
    }
}

async fn stream(State(server): State<Arc<Server>>, Path(id): Path<String>) -> Response {
    let Some(asked) = server.take(&id) else {
        return failed(&id, json!("Job ID not found"));
    };
    if !matches!(server.handler.output(), OutputForm::Stream { .. }) {
        return failed(&id, json!("Stream not supported, handler must be a generator."));
    }
    let ran = match server.run(&id, asked.input).await {
        Ok(ran) => ran,
        Err(failure) => return failed(&id, json!(failure.to_string())),
    };
    if let Some(error) = ran.outcome.body.get("error") {
        return failed(&id, error.clone());
    }
    let chunks: Vec<Value> = ran.chunks.into_iter().map(|chunk| json!({"output": chunk})).collect();
    server.call_webhook(asked.webhook, json!(chunks));
    Json(json!({"id": id, "status": "COMPLETED", "stream": chunks})).into_response()
}

/// Runs `{"id", "input"}` at once; any input is taken.
async fn realtime(State(server): State<Arc<Server>>, body: Bytes) -> Response {
    let value: Value = match serde_json::from_slice(&body) {
        Ok(value) => value,
        Err(_) => {
            let problem = unprocessable("json_invalid", &["body"], "JSON decode error", &json!({}));
            return detail(StatusCode::UNPROCESSABLE_ENTITY, problem);
        }
    };
    let (id, input) = (value.get("id").and_then(Value::as_str), value.get("input"));
    let (Some(id), Some(input)) = (id, input) else {
        let missing = if id.is_none() { "id" } else { "input" };
        let problem = unprocessable("missing", &["body", missing], "Field required", &value);
        return detail(StatusCode::UNPROCESSABLE_ENTITY, problem);
    };
    match server.run(id, input.clone()).await {
        Ok(ran) => Json(ran.outcome.body).into_response(),
        Err(failure) => Json(json!({"error": failure.to_string()})).into_response(),
    }
}

impl Server {
    fn take(&self, id: &str) -> Option<Asked> {
        self.stored.lock().unwrap_or_else(PoisonError::into_inner).remove(id)
    }

    async fn answer(&self, id: &str, asked: Asked) -> Response {
        let body = match self.run(id, asked.input).await {
            Ok(ran) => ran.outcome.body,
            Err(failure) => return failed(id, json!(failure.to_string())),
        };
        if let Some(error) = body.get("error") {
            return failed(id, error.clone());
        }
        let mut answer = Map::from_iter([("id".to_owned(), json!(id)), ("status".to_owned(), json!("COMPLETED"))]);
        if let Some(output) = body.get("output").filter(|output| !output.is_null()) {
            answer.insert("output".to_owned(), output.clone());
        }
        self.call_webhook(asked.webhook, body);
        Json(Value::Object(answer)).into_response()
    }

    async fn run(&self, id: &str, input: Value) -> Result<Ran> {
        let form = match self.handler.output() {
            OutputForm::Value => OutputForm::Value,
            // The development server always gathers the chunks.
            OutputForm::Stream { .. } => OutputForm::Stream { aggregate: true },
        };
        direct::run(
            Arc::clone(&self.handler),
            RunPodJob::new(id, input),
            form,
            &self.redactor,
            |_| Ok(()),
        )
        .await
    }

    fn call_webhook(&self, webhook: Option<String>, body: Value) {
        let Some(url) = webhook else { return };
        let http = self.http.clone();
        tokio::spawn(async move {
            // What follows the question mark may be a token.
            let place = url.split('?').next().unwrap_or_default();
            match http
                .post_json(&url, Bytes::from(body.to_string()), WEBHOOK_TIMEOUT)
                .await
            {
                Ok(answer) if answer.status < 300 => {}
                Ok(answer) => tracing::warn!("WEBHOOK | Request to {place} failed: status {}", answer.status),
                Err(silence) => tracing::warn!("WEBHOOK | Request to {place} failed: {silence}"),
            }
        });
    }
}

fn new_id() -> String {
    format!("test-{}", Uuid::new_v4())
}

fn failed(id: &str, error: Value) -> Response {
    Json(json!({"id": id, "status": "FAILED", "error": error})).into_response()
}

fn detail(status: StatusCode, detail: Value) -> Response {
    (status, Json(json!({"detail": detail}))).into_response()
}

/// One problem of a request, in the words of the server's framework.
fn unprocessable(kind: &str, place: &[&str], message: &str, input: &Value) -> Value {
    json!([{"type": kind, "loc": place, "msg": message, "input": input}])
}

/// Reads a request body; the error is what is wrong with it.
fn read(headers: &HeaderMap, body: &[u8]) -> std::result::Result<Asked, Value> {
    let kind = headers
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    if body.is_empty() {
        return Err(unprocessable("missing", &["body"], "Field required", &Value::Null));
    }
    if !kind.starts_with("application/json") {
        let text = json!(String::from_utf8_lossy(body));
        return Err(unprocessable(
            "dataclass_type",
            &["body"],
            "Input should be a dictionary or an instance of DefaultRequest",
            &text,
        ));
    }
    let value: Value = serde_json::from_slice(body)
        .map_err(|_| unprocessable("json_invalid", &["body"], "JSON decode error", &json!({})))?;
    let Value::Object(fields) = &value else {
        return Err(unprocessable(
            "dataclass_type",
            &["body"],
            "Input should be a dictionary or an instance of DefaultRequest",
            &value,
        ));
    };
    let Some(input) = fields.get("input") else {
        return Err(unprocessable("missing", &["body", "input"], "Field required", &value));
    };
    if !input.is_object() {
        return Err(unprocessable(
            "dict_type",
            &["body", "input"],
            "Input should be a valid dictionary",
            input,
        ));
    }
    Ok(Asked {
        input: input.clone(),
        webhook: fields.get("webhook").and_then(Value::as_str).map(str::to_owned),
    })
}
