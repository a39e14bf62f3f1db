//! The files in the bucket: each confirmed, nothing else beside them.

use std::collections::{BTreeMap, BTreeSet};

use uuid::Uuid;

use super::{ArtifactFile, ArtifactFiles, BUCKET, MANIFEST, object_path};
use crate::error::{Failure, Result};
use crate::storage::{OCTET_STREAM, ObjectEntry, Storage};

/// Where an artifact goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Destination {
    /// The bucket of finished adapters.
    pub bucket: String,
    /// The owner: the first folder, by which the bucket's policies decide who may read.
    pub user_id: Uuid,
    /// The artifact: the second folder.
    pub artifact_id: Uuid,
    /// The bucket's limit on one file, in bytes.
    pub file_limit_bytes: u64,
}

impl Destination {
    /// The app's bucket with its limit of 5 GB.
    pub fn new(user_id: Uuid, artifact_id: Uuid) -> Self {
        Self {
            bucket: BUCKET.to_owned(),
            user_id,
            artifact_id,
            file_limit_bytes: 5_000_000_000,
        }
    }

    fn folder(&self) -> String {
        format!("{}/{}", self.user_id, self.artifact_id)
    }

    /// Refuses a file above the bucket's limit: `ARTIFACT_TOO_LARGE`. Callable before training, with
    /// the size the adapter will have.
    pub fn check_size(&self, name: &str, bytes: u64) -> Result<()> {
        if bytes <= self.file_limit_bytes {
            return Ok(());
        }
        Err(Failure::user(
            "ARTIFACT_TOO_LARGE",
            format!(
                "The file has {bytes} bytes; the bucket `{}` takes {}",
                self.bucket, self.file_limit_bytes
            ),
        )
        .at(format!("`{name}`"))
        .hint("Choose a smaller rank or fewer targets, or raise the bucket's limit"))
    }
}

/// How far an upload is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UploadProgress {
    /// Files stored.
    pub files: usize,
    /// Files in all.
    pub total_files: usize,
    /// Bytes stored.
    pub bytes: u64,
    /// Bytes in all.
    pub total_bytes: u64,
}

/// Stores every file, confirms each by reading its size back, and removes whatever an earlier attempt
/// left in the artifact's folder. Returns file name → object path, as the app's row wants it.
///
/// The manifest goes last: where it lies, the other files lie too. It is safe to call again.
pub async fn upload(
    storage: &dyn Storage,
    destination: &Destination,
    artifact: &ArtifactFiles,
    mut on_progress: impl FnMut(UploadProgress) + Send,
) -> Result<BTreeMap<String, String>> {
    for file in &artifact.files {
        destination.check_size(&file.name, file.bytes)?;
    }
    let mut progress = UploadProgress {
        files: 0,
        total_files: artifact.files.len(),
        bytes: 0,
        total_bytes: artifact.total_bytes(),
    };
    let mut paths = BTreeMap::new();
    let (last, first): (Vec<_>, Vec<_>) = artifact.files.iter().partition(|file| file.name == MANIFEST);
    for file in first.into_iter().chain(last) {
        let path = object_path(destination.user_id, destination.artifact_id, &file.name);
        let local = artifact.dir.join(&file.name);
        let stored = storage
            .put_file(&destination.bucket, &path, &local, OCTET_STREAM)
            .await?;
        if stored.bytes != file.bytes {
            return Err(incomplete(file, Some(stored.bytes)));
        }
        paths.insert(file.name.clone(), path);
        progress.files += 1;
        progress.bytes += file.bytes;
        on_progress(progress);
    }
    let present = storage.list(&destination.bucket, &destination.folder()).await?;
    confirm(artifact, &present)?;
    remove_orphans(storage, destination, &paths, &present).await?;
    Ok(paths)
}

fn confirm(artifact: &ArtifactFiles, present: &[ObjectEntry]) -> Result<()> {
    let sizes: BTreeMap<&str, u64> = present.iter().map(|entry| (entry.name.as_str(), entry.bytes)).collect();
    for file in &artifact.files {
        let stored = sizes.get(file.name.as_str()).copied();
        if stored != Some(file.bytes) {
            return Err(incomplete(file, stored));
        }
    }
    Ok(())
}

async fn remove_orphans(
    storage: &dyn Storage,
    destination: &Destination,
    paths: &BTreeMap<String, String>,
    present: &[ObjectEntry],
) -> Result<()> {
    let wanted: BTreeSet<&str> = paths.keys().map(String::as_str).collect();
    for entry in present.iter().filter(|entry| !wanted.contains(entry.name.as_str())) {
        let path = object_path(destination.user_id, destination.artifact_id, &entry.name);
        tracing::info!(path, "removing a file that an earlier attempt left");
        storage.delete(&destination.bucket, &path).await?;
    }
    Ok(())
}

fn incomplete(file: &ArtifactFile, stored: Option<u64>) -> Failure {
    let stored = stored.map_or_else(|| "nothing".to_owned(), |bytes| format!("{bytes} bytes"));
    Failure::platform(
        "ARTIFACT_UPLOAD_INCOMPLETE",
        format!("The storage holds {stored} where {} bytes were sent", file.bytes),
    )
    .at(format!("`{}`", file.name))
    .hint("The upload is repeated with the next attempt")
}
