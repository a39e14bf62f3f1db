//! Supabase Storage over its REST interface.
//!
//! Requests carry the key twice, as `apikey` and as bearer token, as the app's own client does; both
//! legacy JWT keys and `sb_secret_…` keys are accepted that way. storage-api answers most errors with
//! status 400 and the meant status in the body (`refusal.rs` reads it). Large files go through
//! the resumable protocol (`tus.rs`).

use std::fmt;
use std::path::Path;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::TryStreamExt;
use reqwest::header::{CONTENT_LENGTH, CONTENT_TYPE, ETAG, HeaderMap, HeaderValue};
use reqwest::{Body, Method, RequestBuilder, Response};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio_util::io::ReaderStream;
use url::Url;

use super::http::{Clients, HttpOptions, cause, shown};
use super::name::{check_readable, check_writable};
use super::refusal::{CallError, Refusal};
use super::retry::{Attempt, retry};
use super::sink::{self, Expectation, disk_failure};
use super::{Fetched, ObjectEntry, ObjectInfo, Storage, place};
use crate::error::{Failure, Result};
use crate::secret::Secret;

/// What to do about a refused key.
pub(super) const KEY_HINT: &str = "Check SUPABASE_SERVICE_ROLE_KEY (it must belong to this project, be a service or \
                                   secret key, and not be revoked) and the bucket's policies";
/// Entries asked for per page of a listing.
const PAGE: usize = 1000;

/// A Supabase project's buckets.
#[derive(Clone)]
pub struct SupabaseStorage {
    base: Url,
    key: Secret,
    headers: HeaderMap,
    pub(super) clients: Clients,
    pub(super) options: HttpOptions,
}

impl fmt::Debug for SupabaseStorage {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("SupabaseStorage")
            .field("base", &shown(&self.base))
            .finish_non_exhaustive()
    }
}

/// `GET /object/info/…`.
#[derive(Deserialize)]
struct InfoReply {
    size: Option<u64>,
    etag: Option<String>,
}

/// One row of `POST /object/list/…`. Folders have neither id nor metadata.
#[derive(Deserialize)]
struct ListedObject {
    name: String,
    id: Option<String>,
    metadata: Option<Value>,
}

impl SupabaseStorage {
    /// A client of the project at `url`. Contacts nothing.
    pub fn new(url: &Url, key: Secret, options: HttpOptions) -> Result<Self> {
        let unusable = |problem: &str| {
            Failure::system("STORAGE_CONFIG_INVALID", problem).at("SUPABASE_URL, SUPABASE_SERVICE_ROLE_KEY")
        };
        let sensitive = |value: &str| {
            let mut header = HeaderValue::from_str(value)
                .map_err(|_| unusable("The Supabase key has characters that no key has"))?;
            header.set_sensitive(true);
            Ok::<_, Failure>(header)
        };
        let mut headers = HeaderMap::new();
        headers.insert("apikey", sensitive(key.expose())?);
        headers.insert("authorization", sensitive(&format!("Bearer {}", key.expose()))?);
        let mut base = url.clone();
        base.set_query(None);
        let path = url.path().trim_end_matches('/');
        let path = path.strip_suffix("/storage/v1").unwrap_or(path);
        base.set_path(&format!("{path}/storage/v1/"));
        let is_loopback = matches!(base.host_str(), Some("localhost" | "127.0.0.1" | "[::1]"));
        if base.scheme() == "http" && !is_loopback {
            tracing::warn!(
                host = base.host_str(),
                "the Supabase key travels unencrypted: SUPABASE_URL is http"
            );
        }
        Ok(Self {
            base,
            key,
            headers,
            clients: Clients::new(&options)?,
            options,
        })
    }

    /// The address of `area` (such as `object/info`), a bucket and a path, each part encoded.
    pub(super) fn url(&self, area: &str, parts: &[&str]) -> Url {
        let mut url = self.base.clone();
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.pop_if_empty().extend(area.split('/'));
            for part in parts {
                segments.extend(part.split('/'));
            }
        }
        url
    }

    /// A request with the credentials.
    pub(super) fn request(&self, client: &reqwest::Client, method: Method, url: Url) -> RequestBuilder {
        client.request(method, url).headers(self.headers.clone())
    }

    /// Sends a request; anything but success is an error.
    pub(super) async fn send(&self, request: RequestBuilder) -> Result<Response, CallError> {
        let response = request.send().await.map_err(CallError::Network)?;
        if response.status().is_success() {
            return Ok(response);
        }
        Err(CallError::Refused(Refusal::read(response, &[&self.key]).await))
    }

    /// Sends a small request until it is answered.
    async fn call(&self, place: &str, build: impl Fn() -> RequestBuilder + Send + Sync) -> Result<Response> {
        retry(&self.options.retry, || async {
            self.send(build())
                .await
                .map_err(|error| error.into_attempt(place.to_owned(), KEY_HINT))
        })
        .await
    }

    async fn upload_file_once(
        &self,
        bucket: &str,
        path: &str,
        file: &Path,
        bytes: u64,
        content_type: &str,
    ) -> Result<(), Attempt> {
        let open = || async {
            let file = tokio::fs::File::open(file)
                .await
                .map_err(|error| disk_failure(&error, file))?;
            Ok::<_, Failure>(Body::wrap_stream(ReaderStream::with_capacity(file, 128 << 10)))
        };
        let posted = self
            .upload_body(Method::POST, bucket, path, open().await?, bytes, content_type)
            .await;
        let done = match posted {
            // Old releases and some policies answer a replacing POST with "Duplicate".
            Err(error) if error.status() == Some(409) => {
                self.upload_body(Method::PUT, bucket, path, open().await?, bytes, content_type)
                    .await
            }
            done => done,
        };
        done.map_err(|error| error.into_attempt(place(bucket, path), KEY_HINT))
    }

    async fn upload_body(
        &self,
        method: Method,
        bucket: &str,
        path: &str,
        body: Body,
        bytes: u64,
        content_type: &str,
    ) -> Result<(), CallError> {
        let request = self
            .request(&self.clients.upload, method, self.url("object", &[bucket, path]))
            .header("x-upsert", "true")
            .header("cache-control", "max-age=0")
            .header(CONTENT_TYPE, content_type)
            .header(CONTENT_LENGTH, bytes)
            .body(body);
        self.send(request).await.map(drop)
    }

    /// Confirms that the storage holds as many bytes as were sent.
    async fn confirm(&self, bucket: &str, path: &str, bytes: u64) -> Result<ObjectInfo> {
        match self.head(bucket, path).await? {
            Some(info) if info.bytes == bytes => Ok(info),
            found => {
                let held = found.map_or_else(|| "nothing".to_owned(), |info| format!("{} bytes", info.bytes));
                Err(Failure::platform(
                    "STORAGE_SIZE_MISMATCH",
                    format!("The storage holds {held} after an upload of {bytes} bytes"),
                )
                .at(place(bucket, path))
                .hint("The upload is repeated with the next attempt"))
            }
        }
    }

    async fn download(&self, bucket: &str, path: &str) -> Result<Response, Attempt> {
        let url = self.url("object/authenticated", &[bucket, path]);
        self.send(self.request(&self.clients.download, Method::GET, url))
            .await
            .map_err(|error| error.into_attempt(place(bucket, path), KEY_HINT))
    }

    async fn head_by_method(&self, bucket: &str, path: &str) -> Result<ObjectInfo> {
        let url = self.url("object/authenticated", &[bucket, path]);
        let place = place(bucket, path);
        let response = self
            .call(&place, || {
                self.request(&self.clients.download, Method::HEAD, url.clone())
            })
            .await?;
        let text = |name| response.headers().get(name).and_then(|value| value.to_str().ok());
        let bytes = text(CONTENT_LENGTH)
            .and_then(|length| length.parse().ok())
            .ok_or_else(|| {
                Failure::platform(
                    "STORAGE_ANSWER_UNREADABLE",
                    "The storage does not say how large the file is",
                )
                .at(place)
            })?;
        Ok(ObjectInfo {
            bytes,
            etag: text(ETAG).map(str::to_owned),
        })
    }

    async fn list_page(&self, bucket: &str, folder: &str, offset: usize) -> Result<Vec<ListedObject>> {
        let body = json!({
            "prefix": folder, "limit": PAGE, "offset": offset,
            "sortBy": {"column": "name", "order": "asc"},
        });
        let url = self.url("object/list", &[bucket]);
        let place = place(bucket, folder);
        let response = self
            .call(&place, || {
                self.request(&self.clients.download, Method::POST, url.clone())
                    .json(&body)
            })
            .await?;
        read_json(response, &place).await
    }
}

#[async_trait]
impl Storage for SupabaseStorage {
    fn describe(&self) -> String {
        format!("Supabase Storage at {}", shown(&self.base))
    }

    async fn put_file(&self, bucket: &str, path: &str, local_file: &Path, content_type: &str) -> Result<ObjectInfo> {
        check_writable(bucket, path)?;
        let metadata = tokio::fs::metadata(local_file)
            .await
            .map_err(|error| disk_failure(&error, local_file))?;
        let bytes = metadata.len();
        if bytes > self.options.multipart_threshold_bytes {
            self.upload_resumable(bucket, path, local_file, bytes, content_type)
                .await?;
        } else {
            retry(&self.options.retry, || {
                self.upload_file_once(bucket, path, local_file, bytes, content_type)
            })
            .await?;
        }
        self.confirm(bucket, path, bytes).await
    }

    async fn put_bytes(&self, bucket: &str, path: &str, bytes: Bytes, content_type: &str) -> Result<ObjectInfo> {
        check_writable(bucket, path)?;
        let length = bytes.len() as u64;
        retry(&self.options.retry, || async {
            let post = self.upload_body(Method::POST, bucket, path, bytes.clone().into(), length, content_type);
            let done = match post.await {
                Err(error) if error.status() == Some(409) => {
                    let put = self.upload_body(Method::PUT, bucket, path, bytes.clone().into(), length, content_type);
                    put.await
                }
                done => done,
            };
            done.map_err(|error| error.into_attempt(place(bucket, path), KEY_HINT))
        })
        .await?;
        self.confirm(bucket, path, length).await
    }

    async fn get_to_file(&self, bucket: &str, path: &str, target: &Path) -> Result<Fetched> {
        check_readable(bucket, path)?;
        retry(&self.options.retry, || async {
            let response = self.download(bucket, path).await?;
            let expected = expectation(&response, self.options.download_limit_bytes, place(bucket, path));
            sink::save(Box::pin(response.bytes_stream().map_err(cause)), &expected, target).await
        })
        .await
    }

    async fn get_bytes(&self, bucket: &str, path: &str, limit_bytes: u64) -> Result<Bytes> {
        check_readable(bucket, path)?;
        retry(&self.options.retry, || async {
            let response = self.download(bucket, path).await?;
            let expected = expectation(&response, limit_bytes, place(bucket, path));
            sink::collect(Box::pin(response.bytes_stream().map_err(cause)), &expected).await
        })
        .await
    }

    async fn head(&self, bucket: &str, path: &str) -> Result<Option<ObjectInfo>> {
        check_readable(bucket, path)?;
        let url = self.url("object/info", &[bucket, path]);
        let place = place(bucket, path);
        let answer = self
            .call(&place, || {
                self.request(&self.clients.download, Method::GET, url.clone())
            })
            .await;
        let info: InfoReply = match answer {
            Ok(response) => read_json(response, &place).await?,
            Err(failure) if failure.code == "STORAGE_OBJECT_MISSING" => return Ok(None),
            Err(failure) => return Err(failure),
        };
        match info.size {
            Some(bytes) => Ok(Some(ObjectInfo { bytes, etag: info.etag })),
            // Releases before 2025 leave the size out.
            None => self.head_by_method(bucket, path).await.map(Some),
        }
    }

    async fn list(&self, bucket: &str, folder: &str) -> Result<Vec<ObjectEntry>> {
        check_readable(bucket, folder)?;
        let mut entries = Vec::new();
        let mut offset = 0;
        loop {
            let page = self.list_page(bucket, folder, offset).await?;
            offset += page.len();
            let is_last = page.len() < PAGE;
            entries.extend(page.into_iter().filter(|object| object.id.is_some()).map(|object| {
                let size = object
                    .metadata
                    .as_ref()
                    .and_then(|metadata| metadata.get("size")?.as_u64());
                ObjectEntry {
                    name: object.name,
                    bytes: size.unwrap_or(0),
                }
            }));
            if is_last {
                return Ok(entries);
            }
        }
    }

    async fn delete(&self, bucket: &str, path: &str) -> Result<()> {
        check_writable(bucket, path)?;
        let url = self.url("object", &[bucket]);
        let body = json!({ "prefixes": [path] });
        let place = place(bucket, path);
        self.call(&place, || {
            self.request(&self.clients.download, Method::DELETE, url.clone())
                .json(&body)
        })
        .await
        .map(drop)
    }

    async fn signed_url(&self, bucket: &str, path: &str, seconds: u64) -> Result<Secret> {
        check_readable(bucket, path)?;
        let url = self.url("object/sign", &[bucket, path]);
        let body = json!({ "expiresIn": seconds.max(1) });
        let place = place(bucket, path);
        let response = self
            .call(&place, || {
                self.request(&self.clients.download, Method::POST, url.clone())
                    .json(&body)
            })
            .await?;
        let reply: Value = read_json(response, &place).await?;
        // Of the signed path only the token is used: it comes back unencoded, and a path of the
        // answer's choosing could lead to another host.
        let signed = reply.get("signedURL").and_then(Value::as_str);
        let (_, token) = signed
            .and_then(|signed| signed.rsplit_once("?token="))
            .ok_or_else(|| unreadable(&place))?;
        let mut signed = self.url("object/sign", &[bucket, path]);
        signed.query_pairs_mut().append_pair("token", token);
        Ok(Secret::new(signed.as_str()))
    }
}

pub(super) fn expectation(response: &Response, limit_bytes: u64, place: String) -> Expectation {
    Expectation {
        bytes: response.content_length(),
        limit_bytes,
        place,
    }
}

async fn read_json<T: serde::de::DeserializeOwned>(response: Response, place: &str) -> Result<T> {
    response.json().await.map_err(|_| unreadable(place))
}

fn unreadable(place: &str) -> Failure {
    Failure::platform(
        "STORAGE_ANSWER_UNREADABLE",
        "The storage answered with something other than its interface promises",
    )
    .at(place)
    .hint("Check that SUPABASE_URL is the project's own address")
}
