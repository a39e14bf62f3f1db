//! Resumable uploads to Supabase Storage: TUS 1.0.0 in parts of exactly 6 MiB.
//!
//! After an interruption the storage is asked how much it holds, and the upload goes on from there.
//! Only when the upload itself is gone does it start again. Credentials are sent to the configured
//! host alone: of the `Location` that the storage names, only the upload's id is used.

use std::io::SeekFrom;
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use reqwest::header::{CONTENT_TYPE, HeaderMap, LOCATION};
use reqwest::{Method, RequestBuilder};
use tokio::io::{AsyncReadExt, AsyncSeekExt};
use url::Url;

use super::place;
use super::refusal::CallError;
use super::retry::{Attempt, retry};
use super::sink::disk_failure;
use super::supabase::{KEY_HINT, SupabaseStorage};
use crate::error::{Failure, Result};

/// The part size that Supabase requires of every part but the last.
pub(super) const PART_BYTES: u64 = 6 << 20;
const ENDPOINT: &str = "upload/resumable";

impl SupabaseStorage {
    /// Uploads a file of `bytes` bytes in parts.
    pub(super) async fn upload_resumable(
        &self,
        bucket: &str,
        path: &str,
        file: &Path,
        bytes: u64,
        content_type: &str,
    ) -> Result<()> {
        let upload = Upload {
            storage: self,
            place: place(bucket, path),
            bytes,
        };
        let metadata = upload_metadata(bucket, path, content_type);
        let mut url = upload.create(&metadata).await?;
        let mut offset = 0;
        let mut restarts_left = self.options.retry.attempts;
        let mut file = tokio::fs::File::open(file)
            .await
            .map_err(|error| disk_failure(&error, file))?;
        while offset < bytes {
            let part = read_part(&mut file, offset, bytes, &upload.place).await?;
            match upload.send_part(&url, offset, &part).await? {
                Some(next) => offset = next,
                None if restarts_left == 0 => return Err(upload.lost()),
                None => {
                    restarts_left -= 1;
                    url = upload.create(&metadata).await?;
                    offset = 0;
                }
            }
        }
        Ok(())
    }
}

struct Upload<'a> {
    storage: &'a SupabaseStorage,
    place: String,
    bytes: u64,
}

impl Upload<'_> {
    fn request(&self, method: Method, url: Url) -> RequestBuilder {
        self.storage
            .request(&self.storage.clients.upload, method, url)
            .header("tus-resumable", "1.0.0")
    }

    /// Announces the file; the answer is the address of this upload on the configured host.
    async fn create(&self, metadata: &str) -> Result<Url> {
        let endpoint = self.storage.url(ENDPOINT, &[]);
        retry(&self.storage.options.retry, || async {
            let request = self
                .request(Method::POST, endpoint.clone())
                .header("upload-length", self.bytes)
                .header("upload-metadata", metadata)
                .header("x-upsert", "true");
            let response = self.storage.send(request).await.map_err(|error| self.attempt(error))?;
            let id = upload_id(response.headers()).ok_or_else(|| self.unreadable())?;
            Ok(self.storage.url(ENDPOINT, &[&id]))
        })
        .await
    }

    /// Sends one part and returns the offset the storage has reached, or `None` when it no longer
    /// knows the upload. After a failure the storage is asked where it stands.
    async fn send_part(&self, url: &Url, offset: u64, part: &Bytes) -> Result<Option<u64>> {
        let first = std::sync::atomic::AtomicBool::new(true);
        retry(&self.storage.options.retry, || async {
            if !first.swap(false, std::sync::atomic::Ordering::Relaxed) {
                match self.offset(url).await? {
                    Some(reached) if reached == offset => {}
                    reached => return Ok(reached),
                }
            }
            let request = self
                .request(Method::PATCH, url.clone())
                .header("upload-offset", offset)
                .header(CONTENT_TYPE, "application/offset+octet-stream")
                .body(part.clone());
            match self.storage.send(request).await {
                Ok(response) => {
                    let reached = header_number(response.headers()).ok_or_else(|| self.unreadable())?;
                    if reached <= offset || reached > self.bytes {
                        return Err(self.unreadable().into());
                    }
                    Ok(Some(reached))
                }
                Err(error) => match error.status() {
                    Some(404 | 410) => Ok(None),
                    // Another writer, or an offset that moved on while the answer was lost.
                    Some(409 | 423) => Err(Attempt::Again(self.failure(error), None)),
                    _ => Err(self.attempt(error)),
                },
            }
        })
        .await
    }

    async fn offset(&self, url: &Url) -> Result<Option<u64>, Attempt> {
        match self.storage.send(self.request(Method::HEAD, url.clone())).await {
            Ok(response) => match header_number(response.headers()) {
                Some(reached) if reached <= self.bytes => Ok(Some(reached)),
                _ => Err(self.unreadable().into()),
            },
            Err(error) if matches!(error.status(), Some(404 | 410)) => Ok(None),
            Err(error) => Err(self.attempt(error)),
        }
    }

    fn attempt(&self, error: CallError) -> Attempt {
        error.into_attempt(self.place.clone(), KEY_HINT)
    }

    fn failure(&self, error: CallError) -> Failure {
        match self.attempt(error) {
            Attempt::Again(failure, _) | Attempt::Stop(failure) => failure,
        }
    }

    fn unreadable(&self) -> Failure {
        Failure::platform(
            "STORAGE_ANSWER_UNREADABLE",
            "The storage's resumable upload does not follow its protocol",
        )
        .at(self.place.clone())
        .hint("Check that SUPABASE_URL is the project's own address")
    }

    fn lost(&self) -> Failure {
        Failure::platform("STORAGE_UNAVAILABLE", "The storage forgets this upload again and again")
            .at(self.place.clone())
    }
}

/// `key base64(value)` pairs, as the protocol writes them.
fn upload_metadata(bucket: &str, path: &str, content_type: &str) -> String {
    [
        ("bucketName", bucket),
        ("objectName", path),
        ("contentType", content_type),
        ("cacheControl", "0"),
    ]
    .map(|(key, value)| format!("{key} {}", STANDARD.encode(value)))
    .join(",")
}

/// What follows `upload/resumable/` in the `Location`.
fn upload_id(headers: &HeaderMap) -> Option<String> {
    let location = headers.get(LOCATION)?.to_str().ok()?;
    let (_, id) = location.split_once(ENDPOINT)?;
    let id = id.trim_start_matches('/').split(['?', '#']).next()?;
    (!id.is_empty() && id.split('/').all(|part| !matches!(part, "" | "." | ".."))).then(|| id.to_owned())
}

fn header_number(headers: &HeaderMap) -> Option<u64> {
    headers.get("upload-offset")?.to_str().ok()?.parse().ok()
}

async fn read_part(file: &mut tokio::fs::File, offset: u64, bytes: u64, place: &str) -> Result<Bytes> {
    let wanted = (bytes - offset).min(PART_BYTES);
    let mut part = vec![0; wanted as usize];
    let read = async {
        file.seek(SeekFrom::Start(offset)).await?;
        file.read_exact(&mut part).await
    };
    read.await.map_err(|error| {
        Failure::system(
            "STORAGE_FILE_CHANGED",
            format!("The file changed while it was uploaded: {error}"),
        )
        .at(place)
    })?;
    Ok(Bytes::from(part))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::*;

    #[test]
    fn only_the_id_of_a_location_is_used() {
        let id = |location: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(LOCATION, location.parse().unwrap());
            upload_id(&headers)
        };
        assert_eq!(
            id("https://elsewhere.example/storage/v1/upload/resumable/abc=="),
            Some("abc==".to_owned())
        );
        assert_eq!(id("/upload/resumable/a/b?x=1"), Some("a/b".to_owned()));
        for location in [
            "https://elsewhere.example/",
            "/upload/resumable/",
            "/upload/resumable/../../x",
        ] {
            assert_eq!(id(location), None, "{location}");
        }
    }
}
