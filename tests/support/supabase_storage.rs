//! A stand-in for Supabase Storage: the REST interface of storage-api as the app and the worker
//! use it, with faults on demand. `storage_js_check.mjs` drives it with the app's own client.
//!
//! It keeps objects in memory, checks keys, sizes, media types and names as the original does, and
//! answers most errors with status 400 and the meant status in the body, as the original does.

// Each test uses a part of it.
#![allow(dead_code)]
// An error here is a whole answer, and nothing is gained by boxing one.
#![allow(clippy::result_large_err)]

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard};

use axum::Router;
use axum::body::{Body, Bytes, to_bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use futures_util::StreamExt;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use uuid::Uuid;

const PART_BYTES: usize = 6 << 20;

/// What the stand-in does wrong.
#[derive(Clone, Debug)]
pub enum Effect {
    /// Answers this status without doing anything; the second value is `Retry-After`.
    Status(u16, Option<u64>),
    /// Does the work, then answers this status, as a gateway that lost the reply.
    WorkThenStatus(u16),
    /// Answers this status and repeats the request's credentials, as a careless proxy.
    Echo(u16),
    /// Announces the whole object and cuts the connection after so many bytes.
    CutAfter(usize),
    /// Never answers.
    Hang,
    /// Forgets every resumable upload, then works.
    ForgetUploads,
    /// Stores only the first half of what it is given, and says nothing.
    StoreHalf,
}

/// What every request meets while it lasts.
#[derive(Clone, Copy, Debug)]
pub enum Trouble {
    /// Answers this status without doing anything.
    Refuses(u16),
    /// Works after a wait.
    Slow(std::time::Duration),
}

/// A fault and the requests it strikes.
struct Fault {
    method: Method,
    path_part: String,
    effect: Effect,
    /// Requests that are spared first.
    spared: usize,
    times: usize,
}

#[derive(Clone)]
struct Object {
    content: Bytes,
    content_type: String,
    id: String,
}

struct Bucket {
    limit_bytes: usize,
    media_types: Vec<String>,
}

struct Resumable {
    bucket: String,
    path: String,
    content_type: String,
    length: usize,
    content: Vec<u8>,
}

#[derive(Default)]
struct Inner {
    keys: Vec<String>,
    buckets: HashMap<String, Bucket>,
    objects: BTreeMap<(String, String), Object>,
    uploads: HashMap<String, Resumable>,
    tokens: HashMap<String, (String, String)>,
    faults: Vec<Fault>,
    trouble: Option<Trouble>,
    requests: Vec<String>,
}

/// A running stand-in; it stops with the runtime.
#[derive(Clone)]
pub struct SupabaseStandIn {
    /// The project's URL, without `/storage/v1`.
    pub url: String,
    inner: Arc<Mutex<Inner>>,
}

type Answer = Result<Response, Response>;

impl SupabaseStandIn {
    /// Starts on a free port with the app's buckets; `keys` open everything.
    pub async fn start(keys: &[&str]) -> Self {
        let inner = Inner {
            keys: keys.iter().map(ToString::to_string).collect(),
            buckets: ["lora-datasets", "lora-models", "training-files"]
                .map(|name| {
                    (
                        name.to_owned(),
                        Bucket {
                            limit_bytes: 64 << 20,
                            media_types: Vec::new(),
                        },
                    )
                })
                .into(),
            ..Inner::default()
        };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let url = format!("http://{}", listener.local_addr().expect("a bound port"));
        let stand_in = Self {
            url,
            inner: Arc::new(Mutex::new(inner)),
        };
        let router = Router::new().fallback(answer).with_state(stand_in.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        stand_in
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("no test panics while it holds the state")
    }

    /// Makes the next `times` requests with this method and path part go wrong.
    pub fn fail(&self, method: Method, path_part: &str, times: usize, effect: Effect) {
        self.plan(method, path_part, 0, times, effect);
    }

    /// Makes one such request go wrong, after `spared` others.
    pub fn fail_after(&self, method: Method, path_part: &str, spared: usize, effect: Effect) {
        self.plan(method, path_part, spared, 1, effect);
    }

    fn plan(&self, method: Method, path_part: &str, spared: usize, times: usize, effect: Effect) {
        let path_part = path_part.to_owned();
        self.lock().faults.push(Fault {
            method,
            path_part,
            effect,
            spared,
            times,
        });
    }

    /// Sets a bucket's limits.
    pub fn limit(&self, bucket: &str, limit_bytes: usize, media_types: &[&str]) {
        let media_types = media_types.iter().map(ToString::to_string).collect();
        self.lock().buckets.insert(
            bucket.to_owned(),
            Bucket {
                limit_bytes,
                media_types,
            },
        );
    }

    /// Lays an object down without going through the interface.
    pub fn seed(&self, bucket: &str, path: &str, content: &[u8]) {
        self.lock().put(
            bucket,
            path,
            Bytes::copy_from_slice(content),
            "application/octet-stream",
        );
    }

    /// An object's content.
    pub fn object(&self, bucket: &str, path: &str) -> Option<Bytes> {
        let found = self.lock().objects.get(&(bucket.to_owned(), path.to_owned())).cloned();
        found.map(|object| object.content)
    }

    /// Paths of all objects of a bucket.
    pub fn paths(&self, bucket: &str) -> Vec<String> {
        let inner = self.lock();
        let in_bucket = inner.objects.keys().filter(|(name, _)| name == bucket);
        in_bucket.map(|(_, path)| path.clone()).collect()
    }

    /// Puts all requests from now on into trouble, or out of it.
    pub fn trouble(&self, trouble: Option<Trouble>) {
        self.lock().trouble = trouble;
    }

    /// `METHOD /path` of every request so far.
    pub fn requests(&self) -> Vec<String> {
        self.lock().requests.clone()
    }

    /// Ends the validity of every signed URL.
    pub fn expire_signed_urls(&self) {
        self.lock().tokens.clear();
    }
}

/// Handles one request: faults first, then the interface.
async fn answer(State(stand_in): State<SupabaseStandIn>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let path = decoded(parts.uri.path());
    let query = parts.uri.query().unwrap_or_default().to_owned();
    let body = match to_bytes(body, 256 << 20).await {
        Ok(body) => body,
        Err(_) => return refused("400", "Error", "the body was cut"),
    };
    let (effect, trouble) = {
        let mut inner = stand_in.lock();
        inner.requests.push(format!("{} {path}", parts.method));
        (inner.strike(&parts.method, &path), inner.trouble)
    };
    match trouble {
        Some(Trouble::Refuses(status)) => return fault_answer(status, None, "the storage is in trouble"),
        Some(Trouble::Slow(wait)) => tokio::time::sleep(wait).await,
        None => {}
    }
    let call = Call {
        method: parts.method,
        path,
        query,
        headers: parts.headers,
        body,
    };
    match effect {
        Some(Effect::Status(status, retry_after)) => fault_answer(status, retry_after, "a fault was asked for"),
        Some(Effect::Echo(status)) => {
            fault_answer(status, None, &format!("refused {:?}", call.header("authorization")))
        }
        Some(Effect::WorkThenStatus(status)) => {
            stand_in.lock().work(&call);
            fault_answer(status, None, "the reply was lost")
        }
        Some(Effect::CutAfter(bytes)) => {
            let whole = stand_in.lock().work(&call);
            cut(whole, bytes).await
        }
        Some(Effect::Hang) => std::future::pending().await,
        Some(Effect::ForgetUploads) => {
            let mut inner = stand_in.lock();
            inner.uploads.clear();
            inner.work(&call)
        }
        Some(Effect::StoreHalf) => {
            let half = call.body.slice(..call.body.len() / 2);
            stand_in.lock().work(&Call { body: half, ..call })
        }
        None => stand_in.lock().work(&call),
    }
}

struct Call {
    method: Method,
    path: String,
    query: String,
    headers: HeaderMap,
    body: Bytes,
}

impl Call {
    fn header(&self, name: &str) -> &str {
        self.headers
            .get(name)
            .and_then(|value| value.to_str().ok())
            .unwrap_or_default()
    }

    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_default()
    }

    fn upserts(&self) -> bool {
        self.header("x-upsert") == "true"
    }

    fn token(&self) -> &str {
        let pairs = self.query.split('&').filter_map(|pair| pair.split_once('='));
        pairs
            .into_iter()
            .find(|(name, _)| *name == "token")
            .map_or("", |(_, token)| token)
    }
}

impl Inner {
    fn strike(&mut self, method: &Method, path: &str) -> Option<Effect> {
        let strikes = |fault: &Fault| fault.times > 0 && fault.method == *method && path.contains(&fault.path_part);
        let fault = self.faults.iter_mut().find(|fault| strikes(fault))?;
        if fault.spared > 0 {
            fault.spared -= 1;
            return None;
        }
        fault.times -= 1;
        Some(fault.effect.clone())
    }

    fn work(&mut self, call: &Call) -> Response {
        let Some(path) = call.path.strip_prefix("/storage/v1/") else {
            return refused("404", "not_found", "no such route");
        };
        self.route(call, path).unwrap_or_else(|refusal| refusal)
    }

    fn route(&mut self, call: &Call, path: &str) -> Answer {
        let method = call.method.as_str();
        if let Some(rest) = path.strip_prefix("object/upload/sign/") {
            return self.signed_upload(call, rest);
        }
        if let (Some(rest), "GET" | "HEAD") = (path.strip_prefix("object/sign/"), method) {
            let named = split(rest)?;
            if self.tokens.get(call.token()) != Some(&named) {
                return Err(refused("400", "InvalidJWT", "jwt expired"));
            }
            return self.download(call, named);
        }
        self.authorize(call)?;
        if let Some(rest) = path.strip_prefix("upload/resumable") {
            return self.resumable(call, rest.trim_start_matches('/'));
        }
        let Some(path) = path.strip_prefix("object/") else {
            return Err(refused("404", "not_found", "no such route"));
        };
        match (method, path.split_once('/')) {
            ("POST", Some(("sign", rest))) => self.sign(call, rest),
            ("POST", Some(("list", bucket))) => self.list(call, bucket),
            ("POST", None) if path == "move" || path == "copy" => self.relocate(call, path == "move"),
            ("GET" | "HEAD", Some(("info", rest))) => self.info(split(rest.trim_start_matches("authenticated/"))?),
            ("GET" | "HEAD", Some(("authenticated", rest))) => self.download(call, split(rest)?),
            ("GET" | "HEAD", _) => self.download(call, split(path)?),
            ("POST", _) => self.store(call, split(path)?, call.upserts()),
            ("PUT", _) => self.store(call, split(path)?, true),
            ("DELETE", None) => self.remove(call, path),
            _ => Err(refused("404", "not_found", "no such route")),
        }
    }

    /// The gateway wants the key in `apikey`; storage-api wants it as bearer token.
    fn authorize(&self, call: &Call) -> Result<(), Response> {
        let bearer = call.header("authorization").strip_prefix("Bearer ").unwrap_or_default();
        let is_known = self.keys.iter().any(|key| key == bearer);
        if is_known && call.header("apikey") == bearer {
            return Ok(());
        }
        Err(refused("403", "Unauthorized", "Invalid Compact JWS"))
    }

    fn accept(&self, bucket: &str, path: &str, bytes: usize, content_type: &str) -> Result<(), Response> {
        let Some(rules) = self.buckets.get(bucket) else {
            return Err(refused("404", "Bucket not found", "Bucket not found"));
        };
        let is_plain = |letter: char| letter.is_ascii_alphanumeric() || "_/!-.*'() &$@=;:+,?".contains(letter);
        if path.is_empty() || !path.chars().all(is_plain) {
            return Err(refused("400", "InvalidKey", &format!("Invalid key: {path}")));
        }
        if bytes > rules.limit_bytes {
            return Err(refused(
                "413",
                "Payload too large",
                "The object exceeded the maximum allowed size",
            ));
        }
        if !rules.media_types.is_empty() && !rules.media_types.iter().any(|known| known == content_type) {
            let message = format!("mime type {content_type} is not supported");
            return Err(refused("415", "invalid_mime_type", &message));
        }
        Ok(())
    }

    fn put(&mut self, bucket: &str, path: &str, content: Bytes, content_type: &str) -> String {
        let id = Uuid::new_v4().to_string();
        let object = Object {
            content,
            content_type: content_type.to_owned(),
            id: id.clone(),
        };
        self.objects.insert((bucket.to_owned(), path.to_owned()), object);
        id
    }

    fn find(&self, named: &(String, String)) -> Result<&Object, Response> {
        if !self.buckets.contains_key(&named.0) {
            return Err(refused("404", "Bucket not found", "Bucket not found"));
        }
        let missing = || refused("404", "not_found", "Object not found");
        self.objects.get(named).ok_or_else(missing)
    }

    fn store(&mut self, call: &Call, named: (String, String), upserts: bool) -> Answer {
        let (bucket, path) = named;
        let content_type = call.header("content-type").to_owned();
        self.accept(&bucket, &path, call.body.len(), &content_type)?;
        let exists = self.objects.contains_key(&(bucket.clone(), path.clone()));
        if exists && !upserts {
            return Err(refused("409", "Duplicate", "The resource already exists"));
        }
        let id = self.put(&bucket, &path, call.body.clone(), &content_type);
        Ok(reply(json!({ "Id": id, "Key": format!("{bucket}/{path}") })))
    }

    fn download(&self, call: &Call, named: (String, String)) -> Answer {
        let object = self.find(&named)?;
        let (status, content) = match range(call.header("range"), object.content.len()) {
            Some((first, last)) => (StatusCode::PARTIAL_CONTENT, object.content.slice(first..=last)),
            None => (StatusCode::OK, object.content.clone()),
        };
        let headers = [
            (header::CONTENT_TYPE, object.content_type.clone()),
            (header::ETAG, etag(&object.content)),
            (header::CONTENT_LENGTH, content.len().to_string()),
        ];
        let body = if call.method == Method::HEAD {
            Body::empty()
        } else {
            Body::from(content)
        };
        Ok((status, headers, body).into_response())
    }

    fn info(&self, named: (String, String)) -> Answer {
        let object = self.find(&named)?;
        Ok(reply(json!({
            "id": object.id, "name": named.1, "bucket_id": named.0, "version": object.id,
            "size": object.content.len(), "content_type": object.content_type, "cache_control": "no-cache",
            "etag": etag(&object.content), "metadata": {}, "last_modified": NOW, "created_at": NOW,
        })))
    }

    fn list(&self, call: &Call, bucket: &str) -> Answer {
        if !self.buckets.contains_key(bucket) {
            return Err(refused("404", "Bucket not found", "Bucket not found"));
        }
        let options = call.json();
        let text = |name: &str| options.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
        let number = |name: &str| options.get(name).and_then(Value::as_u64).map(|value| value as usize);
        let folder = match text("prefix").trim_matches('/') {
            "" => String::new(),
            folder => format!("{folder}/"),
        };
        let mut rows: BTreeMap<String, Value> = BTreeMap::new();
        for ((_, path), object) in self.objects.iter().filter(|(key, _)| key.0 == bucket) {
            let Some(rest) = path.strip_prefix(&folder) else {
                continue;
            };
            let row = match rest.split_once('/') {
                Some((inner, _)) => (inner.to_owned(), json!({ "name": inner, "id": null, "metadata": null })),
                None => {
                    let metadata = json!({ "size": object.content.len(), "eTag": etag(&object.content) });
                    (
                        rest.to_owned(),
                        json!({ "name": rest, "id": object.id, "metadata": metadata }),
                    )
                }
            };
            rows.entry(row.0).or_insert(row.1);
        }
        let page = rows.into_values().skip(number("offset").unwrap_or(0));
        Ok(reply(page.take(number("limit").unwrap_or(100)).collect()))
    }

    fn remove(&mut self, call: &Call, bucket: &str) -> Answer {
        let named = call.json();
        let prefixes = named
            .get("prefixes")
            .and_then(Value::as_array)
            .cloned()
            .unwrap_or_default();
        let paths = prefixes.iter().filter_map(Value::as_str);
        let removed = paths.filter_map(|path| {
            let object = self.objects.remove(&(bucket.to_owned(), path.to_owned()))?;
            Some(json!({ "name": path, "bucket_id": bucket, "id": object.id }))
        });
        Ok(reply(removed.collect()))
    }

    fn relocate(&mut self, call: &Call, removes: bool) -> Answer {
        let body = call.json();
        let text = |name: &str| body.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
        let bucket = text("bucketId");
        let source = (bucket.clone(), text("sourceKey"));
        let object = self.find(&source)?.clone();
        let target = text("destinationKey");
        self.accept(&bucket, &target, object.content.len(), &object.content_type)?;
        if removes {
            self.objects.remove(&source);
        }
        self.put(&bucket, &target, object.content, &object.content_type);
        Ok(reply(
            json!({ "message": "Successfully moved", "Key": format!("{bucket}/{target}") }),
        ))
    }

    fn sign(&mut self, call: &Call, rest: &str) -> Answer {
        let body = call.json();
        if body.get("expiresIn").and_then(Value::as_u64).unwrap_or(0) == 0 {
            return Err(refused("400", "Error", "body/expiresIn must be >= 1"));
        }
        let Some(paths) = body.get("paths").and_then(Value::as_array) else {
            let named = split(rest)?;
            self.find(&named)?;
            return Ok(reply(json!({ "signedURL": self.token_url("object/sign", named) })));
        };
        let rows = paths.iter().filter_map(Value::as_str).map(|path| {
            let named = (rest.to_owned(), path.to_owned());
            if self.find(&named).is_err() {
                return json!({ "path": path, "signedURL": null, "error": "Either the object does not exist or you do not have access to it" });
            }
            json!({ "path": path, "signedURL": self.token_url("object/sign", named), "error": null })
        });
        Ok(reply(rows.collect()))
    }

    fn token_url(&mut self, area: &str, named: (String, String)) -> String {
        // The original decodes the path before it signs, and leaves encoding to the client.
        let token = Uuid::new_v4().simple().to_string();
        let url = format!("/{area}/{}/{}?token={token}", named.0, named.1);
        self.tokens.insert(token, named);
        url
    }

    fn signed_upload(&mut self, call: &Call, rest: &str) -> Answer {
        let named = split(rest)?;
        if call.method == Method::POST {
            self.authorize(call)?;
            if self.objects.contains_key(&named) && !call.upserts() {
                return Err(refused("409", "Duplicate", "The resource already exists"));
            }
            let url = self.token_url("object/upload/sign", named);
            let token = url.split_once("token=").map(|(_, token)| token.to_owned());
            return Ok(reply(json!({ "url": url, "token": token })));
        }
        if self.tokens.remove(call.token()).as_ref() != Some(&named) {
            return Err(refused("400", "InvalidSignature", "Invalid upload signature"));
        }
        self.store(call, named, true)
    }

    fn resumable(&mut self, call: &Call, id: &str) -> Answer {
        if call.header("tus-resumable") != "1.0.0" {
            return Err(StatusCode::PRECONDITION_FAILED.into_response());
        }
        match call.method.as_str() {
            "POST" => self.create_upload(call),
            "HEAD" => {
                let upload = self
                    .uploads
                    .get(id)
                    .ok_or_else(|| StatusCode::NOT_FOUND.into_response())?;
                Ok((StatusCode::OK, [("upload-offset", upload.content.len().to_string())]).into_response())
            }
            "PATCH" => self.append(call, id),
            _ => Err(StatusCode::METHOD_NOT_ALLOWED.into_response()),
        }
    }

    fn create_upload(&mut self, call: &Call) -> Answer {
        let metadata: HashMap<String, String> = call
            .header("upload-metadata")
            .split(',')
            .filter_map(|pair| pair.trim().split_once(' '))
            .filter_map(|(name, value)| {
                let text = String::from_utf8(STANDARD.decode(value).ok()?).ok()?;
                Some((name.to_owned(), text))
            })
            .collect();
        let get = |name: &str| metadata.get(name).cloned().unwrap_or_default();
        let (bucket, path, content_type) = (get("bucketName"), get("objectName"), get("contentType"));
        let length = call.header("upload-length").parse().unwrap_or(0);
        self.accept(&bucket, &path, length, &content_type)?;
        if self.objects.contains_key(&(bucket.clone(), path.clone())) && !call.upserts() {
            return Err((StatusCode::CONFLICT, "The resource already exists").into_response());
        }
        let id = STANDARD
            .encode(format!("{bucket}/{path}/{}", Uuid::new_v4()))
            .replace(['/', '+'], "_");
        self.uploads.insert(
            id.clone(),
            Resumable {
                bucket,
                path,
                content_type,
                length,
                content: Vec::new(),
            },
        );
        // The hosted service answers with its public address, which need not be the one called.
        let location = format!("https://public.example/storage/v1/upload/resumable/{id}");
        Ok((
            StatusCode::CREATED,
            [("location", location), ("tus-resumable", "1.0.0".to_owned())],
        )
            .into_response())
    }

    fn append(&mut self, call: &Call, id: &str) -> Answer {
        let upload = self
            .uploads
            .get_mut(id)
            .ok_or_else(|| StatusCode::NOT_FOUND.into_response())?;
        if call.header("upload-offset") != upload.content.len().to_string() {
            return Err((StatusCode::CONFLICT, "Upload-Offset conflict").into_response());
        }
        let reached = upload.content.len() + call.body.len();
        let is_last = reached == upload.length;
        if reached > upload.length || (!is_last && call.body.len() != PART_BYTES) {
            return Err((StatusCode::BAD_REQUEST, "a part must have exactly 6 MiB").into_response());
        }
        upload.content.extend_from_slice(&call.body);
        if is_last {
            let whole = self.uploads.remove(id).expect("it was found above");
            self.put(&whole.bucket, &whole.path, whole.content.into(), &whole.content_type);
        }
        Ok((StatusCode::NO_CONTENT, [("upload-offset", reached.to_string())]).into_response())
    }
}

const NOW: &str = "2026-01-01T00:00:00.000Z";

fn reply(value: Value) -> Response {
    (
        StatusCode::OK,
        [(header::CONTENT_TYPE, "application/json")],
        value.to_string(),
    )
        .into_response()
}

/// An error as storage-api sends it: status 400, the meant status in the body.
fn refused(status_code: &str, error: &str, message: &str) -> Response {
    let body = json!({ "statusCode": status_code, "error": error, "message": message });
    (
        StatusCode::BAD_REQUEST,
        [(header::CONTENT_TYPE, "application/json")],
        body.to_string(),
    )
        .into_response()
}

fn fault_answer(status: u16, retry_after: Option<u64>, message: &str) -> Response {
    let status = StatusCode::from_u16(status).expect("a test names a real status");
    let mut response = (status, message.to_owned()).into_response();
    if let Some(seconds) = retry_after {
        response.headers_mut().insert(header::RETRY_AFTER, seconds.into());
    }
    response
}

/// The same headers, and a body that breaks off.
async fn cut(response: Response, bytes: usize) -> Response {
    let (parts, body) = response.into_parts();
    let whole = to_bytes(body, 256 << 20).await.expect("a body in memory");
    let head = whole.slice(..bytes.min(whole.len()));
    // The pause lets the server send what it has before the connection breaks.
    let broken = async {
        tokio::task::yield_now().await;
        Err(std::io::Error::from(std::io::ErrorKind::ConnectionReset))
    };
    let head = futures_util::stream::iter([Ok(head)]);
    let body = head.chain(futures_util::stream::once(broken));
    Response::from_parts(parts, Body::from_stream(body))
}

fn split(rest: &str) -> Result<(String, String), Response> {
    let (bucket, path) = rest
        .split_once('/')
        .ok_or_else(|| refused("404", "not_found", "Object not found"))?;
    Ok((bucket.to_owned(), path.to_owned()))
}

fn etag(content: &[u8]) -> String {
    format!("\"{}\"", &hex::encode(Sha256::digest(content))[..32])
}

fn range(value: &str, length: usize) -> Option<(usize, usize)> {
    let (first, last) = value.strip_prefix("bytes=")?.split_once('-')?;
    let last = last.parse().unwrap_or(usize::MAX).min(length.checked_sub(1)?);
    let first: usize = first.parse().ok()?;
    (first <= last).then_some((first, last))
}

fn decoded(path: &str) -> String {
    let mut bytes = Vec::with_capacity(path.len());
    let mut rest = path.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        let code = (byte == b'%').then(|| after.get(..2)).flatten();
        let value = code.and_then(|code| u8::from_str_radix(std::str::from_utf8(code).ok()?, 16).ok());
        bytes.push(value.unwrap_or(byte));
        rest = if value.is_some() { &after[2..] } else { after };
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
