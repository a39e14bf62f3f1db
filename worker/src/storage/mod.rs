//! Where files live: a local folder, Supabase Storage, or anything that speaks S3.
//!
//! # Map
//!
//! | file | what it knows |
//! |---|---|
//! | `config.rs` | environment → [`StorageConfig`]; every missing variable is named at once |
//! | `name.rs` | which bucket and object names are accepted |
//! | `local.rs`, `supabase.rs` (+ `tus.rs`), `s3.rs` | the three homes of files |
//! | `url_source.rs` | a data set behind an `https://` URL: read only |
//! | `sink.rs` | a stream → a file that is whole or absent, with its SHA-256 |
//! | `refusal.rs`, `retry.rs`, `http.rs` | HTTP answers → blame; what is tried again; clients |
//!
//! # Rules
//!
//! * An object is named by a bucket and a path such as `{user_id}/{artifact_id}/README.md`.
//! * Writing replaces: a second attempt of the same job lands on the same names.
//! * Nothing large is held in memory, and a local file appears only when it is complete.
//! * A missing object is the user's fault, a refused key the configuration's, a broken
//!   connection the platform's. The four ways a download can disappoint have four codes:
//!   `STORAGE_OBJECT_MISSING`, `STORAGE_FORBIDDEN`, `STORAGE_OBJECT_EMPTY`, `STORAGE_TRUNCATED`.
//! * No key, no signed URL and no query string reaches a message.

use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::error::{Failure, Result};
use crate::secret::Secret;

pub mod config;
pub mod http;
pub mod local;
pub mod name;
mod refusal;
pub mod retry;
pub mod s3;
mod sink;
pub mod supabase;
mod tus;
pub mod url_source;

pub use config::StorageConfig;
pub use http::HttpOptions;
pub(crate) use sink::disk_failure;
pub use url_source::UrlSource;

/// The media type of every file this program stores: the only one that the models bucket of
/// the app accepts for all of them.
pub const OCTET_STREAM: &str = "application/octet-stream";

/// What a storage reports about an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectInfo {
    /// Size in bytes.
    pub bytes: u64,
    /// The storage's own version mark, if it has one. Not a content hash.
    pub etag: Option<String>,
}

/// One object of a folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectEntry {
    /// Name within the folder.
    pub name: String,
    /// Size in bytes.
    pub bytes: u64,
}

/// What arrived on disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fetched {
    /// Size in bytes.
    pub bytes: u64,
    /// SHA-256 of the content, lower-case hexadecimal.
    pub sha256: String,
}

impl Fetched {
    /// Refuses a file without content: `STORAGE_OBJECT_EMPTY`, the user's fault.
    pub fn not_empty(self, place: &str) -> Result<Self> {
        if self.bytes > 0 {
            return Ok(self);
        }
        Err(Failure::user("STORAGE_OBJECT_EMPTY", "The file is empty (0 bytes)")
            .at(place)
            .hint("Upload the file again and check that it has content"))
    }
}

/// A home for files. Every method names objects by bucket and path and is safe to repeat.
#[async_trait]
pub trait Storage: Send + Sync {
    /// What this is, for people: kind and address, never a credential.
    fn describe(&self) -> String;

    /// Stores a local file, replacing any object of that name, and confirms its size.
    async fn put_file(&self, bucket: &str, path: &str, local_file: &Path, content_type: &str) -> Result<ObjectInfo>;

    /// Stores bytes, replacing any object of that name.
    async fn put_bytes(&self, bucket: &str, path: &str, bytes: Bytes, content_type: &str) -> Result<ObjectInfo>;

    /// Downloads an object to `target`, which appears only when it is complete.
    async fn get_to_file(&self, bucket: &str, path: &str, target: &Path) -> Result<Fetched>;

    /// Reads an object of at most `limit_bytes` into memory.
    async fn get_bytes(&self, bucket: &str, path: &str, limit_bytes: u64) -> Result<Bytes>;

    /// Size and mark of an object, or `None` when there is none of that name.
    async fn head(&self, bucket: &str, path: &str) -> Result<Option<ObjectInfo>>;

    /// The objects directly inside a folder, by name; a missing folder is an empty one.
    async fn list(&self, bucket: &str, folder: &str) -> Result<Vec<ObjectEntry>>;

    /// Deletes an object. Deleting what is not there succeeds.
    async fn delete(&self, bucket: &str, path: &str) -> Result<()>;

    /// A URL that reads the object without a credential for `seconds`. It is itself a secret.
    async fn signed_url(&self, bucket: &str, path: &str, seconds: u64) -> Result<Secret>;

    /// Rehearses delivery before hours of training depend on it: writes, reads back and deletes
    /// a small object in `folder`.
    async fn probe(&self, bucket: &str, folder: &str) -> Result<()> {
        let path = format!("{}/probe-{}.bin", folder.trim_end_matches('/'), Uuid::new_v4());
        let content = Bytes::from(format!("brightrun storage rehearsal {}", Uuid::new_v4()));
        let limit_bytes = content.len() as u64;
        self.put_bytes(bucket, &path, content.clone(), OCTET_STREAM).await?;
        let read_back = self.get_bytes(bucket, &path, limit_bytes).await;
        // The probe is removed whatever was read.
        let removed = self.delete(bucket, &path).await;
        if read_back? != content {
            return Err(Failure::platform(
                "STORAGE_PROBE_MISMATCH",
                "The storage returned other bytes than were written a moment before",
            )
            .at(place(bucket, &path)));
        }
        removed
    }
}

/// Opens the storage that the configuration names. Contacts nothing: [`Storage::probe`] does.
pub fn open(config: &StorageConfig, options: &HttpOptions) -> Result<Arc<dyn Storage>> {
    Ok(match config {
        StorageConfig::Local { root } => Arc::new(local::LocalStorage::new(root)),
        StorageConfig::Supabase { url, key } => {
            Arc::new(supabase::SupabaseStorage::new(url, key.clone(), options.clone())?)
        }
        StorageConfig::S3(s3) => Arc::new(s3::S3Storage::new(s3.clone(), options.clone())),
    })
}

/// The place of an object in a message.
pub(crate) fn place(bucket: &str, path: &str) -> String {
    format!("Bucket `{bucket}`, object `{path}`")
}
