//! Anything that speaks S3: Amazon, Supabase's S3 endpoint, RunPod volumes, MinIO, R2.
//!
//! The client repeats single requests by itself; only a download that breaks off is begun again here.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt};
use object_store::aws::{AmazonS3, AmazonS3Builder};
use object_store::path::Path as Key;
use object_store::signer::{Method, Signer};
use object_store::{
    Attribute, Attributes, BackoffConfig, ClientOptions, GetOptions, ObjectStore, ObjectStoreExt, PutMultipartOptions,
    PutOptions, RetryConfig, WriteMultipart,
};
use tokio::io::AsyncReadExt;

use super::config::S3Config;
use super::http::{HttpOptions, install_crypto_provider, shown};
use super::name::{check_readable, check_writable};
use super::refusal::{Refusal, redacted};
use super::retry::{Attempt, retry};
use super::sink::{self, Expectation, disk_failure};
use super::{Fetched, ObjectEntry, ObjectInfo, Storage, place};
use crate::error::{Failure, Result};
use crate::secret::Secret;

/// S3 accepts at most 10 000 parts of at least 5 MiB: 16 MiB parts reach 156 GiB.
const PART_BYTES: usize = 16 << 20;
/// Parts in flight: bounds the memory of an upload to 64 MiB.
const PARTS_IN_FLIGHT: usize = 4;
const KEY_HINT: &str = "Check S3_ACCESS_KEY_ID, S3_SECRET_ACCESS_KEY, the region and the key's rights on the bucket";

/// An S3 service's buckets.
pub struct S3Storage {
    config: S3Config,
    options: HttpOptions,
    /// One client per S3 bucket, made when it is first used.
    clients: Mutex<HashMap<String, Arc<AmazonS3>>>,
}

impl S3Storage {
    /// A client of the service. Contacts nothing.
    pub fn new(config: S3Config, options: HttpOptions) -> Self {
        Self {
            config,
            options,
            clients: Mutex::default(),
        }
    }

    /// The client and key that a bucket and path of ours mean.
    fn locate(&self, bucket: &str, path: &str) -> Result<(Arc<AmazonS3>, Key)> {
        let Some(only) = &self.config.bucket else {
            return Ok((self.client(bucket)?, key(path)?));
        };
        let prefix = &self.config.prefix;
        let parts = [prefix.as_str(), bucket, path];
        let parts: Vec<&str> = parts.into_iter().filter(|part| !part.is_empty()).collect();
        Ok((self.client(only)?, key(&parts.join("/"))?))
    }

    fn client(&self, bucket: &str) -> Result<Arc<AmazonS3>> {
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = clients.get(bucket) {
            return Ok(client.clone());
        }
        let client = Arc::new(build(&self.config, &self.options, bucket)?);
        clients.insert(bucket.to_owned(), client.clone());
        Ok(client)
    }

    fn attempt(&self, error: &object_store::Error, place: String) -> Attempt {
        self.refusal(error).into_attempt(place, KEY_HINT)
    }

    fn failure(&self, error: &object_store::Error, place: String) -> Failure {
        match self.attempt(error, place) {
            Attempt::Again(failure, _) | Attempt::Stop(failure) => failure,
        }
    }

    /// An error of the client in the terms of an HTTP answer. The client keeps the status of other
    /// answers only in its words, from which it is read back.
    fn refusal(&self, error: &object_store::Error) -> Refusal {
        use object_store::Error::{NotFound, PermissionDenied, Unauthenticated};
        let text = error.to_string();
        let status = match error {
            NotFound { .. } => 404,
            PermissionDenied { .. } => 403,
            Unauthenticated { .. } => 401,
            _ => status_in(&text).unwrap_or(503),
        };
        let hidden = [&self.config.access_key_id, &self.config.secret_access_key];
        let says_bucket = text.contains("NoSuchBucket") || text.contains("BucketNotFound");
        let detail = match status {
            404 if says_bucket => "NoSuchBucket".to_owned(),
            // The client's words name the object, whose path may well hold the word "bucket".
            404 => String::new(),
            _ => redacted(&text, &hidden),
        };
        Refusal {
            status,
            detail,
            retry_after: None,
        }
    }

    async fn put_in_parts(&self, client: &AmazonS3, key: &Key, file: &Path, content_type: &str) -> Result<()> {
        let place = || format!("Object `{key}`");
        let options = PutMultipartOptions {
            attributes: content_type_of(content_type),
            ..Default::default()
        };
        let upload = client.put_multipart_opts(key, options).await;
        let upload = upload.map_err(|error| self.failure(&error, place()))?;
        let mut parts = WriteMultipart::new_with_chunk_size(upload, PART_BYTES);
        let sent: Result<()> = async {
            let mut reader = tokio::fs::File::open(file)
                .await
                .map_err(|error| disk_failure(&error, file))?;
            let mut buffer = vec![0; 1 << 20];
            loop {
                let read = reader
                    .read(&mut buffer)
                    .await
                    .map_err(|error| disk_failure(&error, file))?;
                let Some(chunk) = buffer.get(..read).filter(|chunk| !chunk.is_empty()) else {
                    return Ok(());
                };
                let room = parts.wait_for_capacity(PARTS_IN_FLIGHT).await;
                room.map_err(|error| self.failure(&error, place()))?;
                parts.write(chunk);
            }
        }
        .await;
        if let Err(failure) = sent {
            // Abandoned parts cost the owner money; if this fails too, the bucket's own rule removes them.
            let _abort_is_best_effort = parts.abort().await;
            return Err(failure);
        }
        let finished = parts.finish().await;
        finished.map(drop).map_err(|error| self.failure(&error, place()))
    }

    async fn confirm(&self, bucket: &str, path: &str, bytes: u64) -> Result<ObjectInfo> {
        let info = self.head(bucket, path).await?;
        info.filter(|info| info.bytes == bytes).ok_or_else(|| {
            Failure::platform(
                "STORAGE_SIZE_MISMATCH",
                format!("The storage does not hold the {bytes} bytes sent"),
            )
            .at(place(bucket, path))
            .hint("The upload is repeated with the next attempt")
        })
    }

    async fn get(&self, bucket: &str, path: &str) -> Result<(object_store::GetResult, Expectation)> {
        let (client, key) = self.locate(bucket, path)?;
        let result = client.get_opts(&key, GetOptions::default()).await;
        let result = result.map_err(|error| self.failure(&error, place(bucket, path)))?;
        let expected = Expectation {
            bytes: Some(result.meta.size),
            limit_bytes: self.options.download_limit_bytes,
            place: place(bucket, path),
        };
        Ok((result, expected))
    }
}

#[async_trait]
impl Storage for S3Storage {
    fn describe(&self) -> String {
        let address = self.config.endpoint.as_ref().map_or_else(|| "Amazon".to_owned(), shown);
        match &self.config.bucket {
            Some(bucket) => format!("the S3 bucket `{bucket}` at {address}"),
            None => format!("S3 at {address}"),
        }
    }

    async fn put_file(&self, bucket: &str, path: &str, local_file: &Path, content_type: &str) -> Result<ObjectInfo> {
        check_writable(bucket, path)?;
        let metadata = tokio::fs::metadata(local_file).await;
        let bytes = metadata.map_err(|error| disk_failure(&error, local_file))?.len();
        if bytes <= self.options.multipart_threshold_bytes {
            let content = tokio::fs::read(local_file).await;
            let content = content.map_err(|error| disk_failure(&error, local_file))?;
            return self.put_bytes(bucket, path, content.into(), content_type).await;
        }
        let (client, key) = self.locate(bucket, path)?;
        self.put_in_parts(&client, &key, local_file, content_type).await?;
        self.confirm(bucket, path, bytes).await
    }

    async fn put_bytes(&self, bucket: &str, path: &str, bytes: Bytes, content_type: &str) -> Result<ObjectInfo> {
        check_writable(bucket, path)?;
        let (client, key) = self.locate(bucket, path)?;
        let length = bytes.len() as u64;
        let options = PutOptions {
            attributes: content_type_of(content_type),
            ..Default::default()
        };
        let put = client.put_opts(&key, bytes.into(), options).await;
        put.map_err(|error| self.failure(&error, place(bucket, path)))?;
        self.confirm(bucket, path, length).await
    }

    async fn get_to_file(&self, bucket: &str, path: &str, target: &Path) -> Result<Fetched> {
        check_readable(bucket, path)?;
        retry(&self.options.retry, || async {
            let (result, expected) = self.get(bucket, path).await?;
            sink::save(chunks(result), &expected, target).await
        })
        .await
    }

    async fn get_bytes(&self, bucket: &str, path: &str, limit_bytes: u64) -> Result<Bytes> {
        check_readable(bucket, path)?;
        retry(&self.options.retry, || async {
            let (result, expected) = self.get(bucket, path).await?;
            sink::collect(
                chunks(result),
                &Expectation {
                    limit_bytes,
                    ..expected
                },
            )
            .await
        })
        .await
    }

    async fn head(&self, bucket: &str, path: &str) -> Result<Option<ObjectInfo>> {
        check_readable(bucket, path)?;
        let (client, key) = self.locate(bucket, path)?;
        match client.head(&key).await {
            Ok(meta) => Ok(Some(ObjectInfo {
                bytes: meta.size,
                etag: meta.e_tag,
            })),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(self.failure(&error, place(bucket, path))),
        }
    }

    async fn list(&self, bucket: &str, folder: &str) -> Result<Vec<ObjectEntry>> {
        check_readable(bucket, folder)?;
        let (client, key) = self.locate(bucket, folder)?;
        let listed = client.list_with_delimiter(Some(&key)).await;
        let listed = listed.map_err(|error| self.failure(&error, place(bucket, folder)))?;
        let mut entries: Vec<ObjectEntry> = listed
            .objects
            .into_iter()
            .filter_map(|object| {
                let name = object.location.filename()?.to_owned();
                Some(ObjectEntry {
                    name,
                    bytes: object.size,
                })
            })
            .collect();
        entries.sort_by(|one, other| one.name.cmp(&other.name));
        Ok(entries)
    }

    async fn delete(&self, bucket: &str, path: &str) -> Result<()> {
        check_writable(bucket, path)?;
        let (client, key) = self.locate(bucket, path)?;
        match client.delete(&key).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(self.failure(&error, place(bucket, path))),
        }
    }

    async fn signed_url(&self, bucket: &str, path: &str, seconds: u64) -> Result<Secret> {
        check_readable(bucket, path)?;
        let (client, key) = self.locate(bucket, path)?;
        // Signature version 4 ends after a week.
        let lifetime = Duration::from_secs(seconds.clamp(1, 7 * 24 * 3600));
        let url = client.signed_url(Method::GET, &key, lifetime).await;
        url.map(|url| Secret::new(url.as_str()))
            .map_err(|error| self.failure(&error, place(bucket, path)))
    }
}

fn build(config: &S3Config, options: &HttpOptions, bucket: &str) -> Result<AmazonS3> {
    install_crypto_provider();
    let is_plain = config
        .endpoint
        .as_ref()
        .is_some_and(|endpoint| endpoint.scheme() == "http");
    let client = ClientOptions::new()
        .with_connect_timeout(options.connect_timeout)
        // No limit on a whole request, since one download may be large; only on silence.
        .with_timeout_disabled()
        .with_read_timeout(options.upload_timeout)
        .with_allow_http(is_plain);
    let mut builder = AmazonS3Builder::new()
        .with_bucket_name(bucket)
        .with_region(&config.region)
        .with_access_key_id(config.access_key_id.expose())
        .with_secret_access_key(config.secret_access_key.expose())
        .with_virtual_hosted_style_request(false)
        .with_retry(retry_config(options))
        .with_client_options(client);
    if let Some(endpoint) = &config.endpoint {
        builder = builder.with_endpoint(endpoint.as_str().trim_end_matches('/'));
    }
    if let Some(token) = &config.session_token {
        builder = builder.with_token(token.expose());
    }
    builder.build().map_err(|error| {
        let text = redacted(&error.to_string(), &[&config.access_key_id, &config.secret_access_key]);
        Failure::system(
            "STORAGE_CONFIG_INVALID",
            format!("The S3 settings cannot be used: {text}"),
        )
    })
}

fn retry_config(options: &HttpOptions) -> RetryConfig {
    RetryConfig {
        backoff: BackoffConfig {
            init_backoff: options.retry.first_pause,
            max_backoff: options.retry.longest_pause,
            base: 2.0,
        },
        max_retries: options.retry.attempts.saturating_sub(1) as usize,
        retry_timeout: Duration::from_secs(180),
    }
}

fn key(path: &str) -> Result<Key> {
    Key::parse(path).map_err(|_| {
        Failure::user("STORAGE_NAME_INVALID", "The storage path cannot be used as an S3 key").at(format!("{path:?}"))
    })
}

fn content_type_of(content_type: &str) -> Attributes {
    Attributes::from_iter([(Attribute::ContentType, content_type.to_owned())])
}

fn chunks(result: object_store::GetResult) -> impl futures_util::Stream<Item = Result<Bytes, String>> + Unpin + Send {
    result
        .into_stream()
        .map_err(|error| redacted(&error.to_string(), &[]))
        .boxed()
}

fn status_in(text: &str) -> Option<u16> {
    let (_, rest) = text.split_once("status code: ")?;
    rest.get(..3)?.parse().ok()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use url::Url;

    use super::*;

    fn storage() -> S3Storage {
        let config = S3Config {
            endpoint: Some(Url::parse("http://127.0.0.1:1").unwrap()),
            region: "us-east-1".to_owned(),
            access_key_id: Secret::new("fake-id-canary"),
            secret_access_key: Secret::new("fake-secret-canary"),
            session_token: None,
            bucket: None,
            prefix: String::new(),
        };
        S3Storage::new(config, HttpOptions::default())
    }

    #[track_caller]
    fn check(error: &object_store::Error, code: &str, again: bool) {
        let (failure, is_again) = match storage().attempt(error, "here".to_owned()) {
            Attempt::Again(failure, _) => (failure, true),
            Attempt::Stop(failure) => (failure, false),
        };
        assert_eq!((failure.code.as_str(), is_again), (code, again), "{failure}");
        assert!(!failure.to_string().contains("canary"), "{failure}");
    }

    #[test]
    fn the_clients_errors_have_the_codes_of_the_answers_behind_them() {
        use object_store::Error::{Generic, NotFound};
        let path = "a-bucket-list/x".to_owned();
        let absent = |words: &str| NotFound {
            path: path.clone(),
            source: words.into(),
        };
        check(
            &absent("status code: 404 Not Found: <Code>NoSuchBucket</Code>"),
            "STORAGE_BUCKET_MISSING",
            false,
        );
        check(
            &absent("status code: 404 Not Found: <Code>NoSuchKey</Code>"),
            "STORAGE_OBJECT_MISSING",
            false,
        );
        let generic = |words: &str| Generic {
            store: "S3",
            source: words.into(),
        };
        check(
            &generic("Server returned non-2xx status code: 413 Payload Too Large: "),
            "STORAGE_TOO_LARGE",
            false,
        );
        check(
            &generic("Server returned non-2xx status code: 503 : SlowDown"),
            "STORAGE_UNAVAILABLE",
            true,
        );
        check(
            &generic("fake-id-canary: connection refused"),
            "STORAGE_UNAVAILABLE",
            true,
        );
    }
}
