//! A stream becomes a file that is whole or absent, with its SHA-256.

use std::io;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use sha2::{Digest, Sha256};
use tokio::io::{AsyncWrite, AsyncWriteExt};

use super::Fetched;
use super::retry::Attempt;
use crate::error::{Failure, Result};

/// What is known about a download before its first byte.
#[derive(Clone, Debug)]
pub(crate) struct Expectation {
    /// The announced length, if there is one.
    pub(crate) bytes: Option<u64>,
    /// The largest length accepted.
    pub(crate) limit_bytes: u64,
    /// The object, for messages.
    pub(crate) place: String,
}

/// Streams into a temporary file beside `target`, makes it durable and renames it.
pub(crate) async fn save<Chunks>(chunks: Chunks, expected: &Expectation, target: &Path) -> Result<Fetched, Attempt>
where
    Chunks: Stream<Item = Result<Bytes, String>> + Unpin,
{
    let temporary = temporary_beside(target)?;
    let file = temporary.reopen().map_err(|error| disk_failure(&error, target))?;
    let mut writer = tokio::fs::File::from_std(file);
    let fetched = copy(chunks, expected, &mut writer, target).await?;
    writer.sync_all().await.map_err(|error| disk_failure(&error, target))?;
    temporary
        .persist(target)
        .map_err(|error| disk_failure(&error.error, target))?;
    Ok(fetched)
}

/// Collects a stream in memory, within the expectation's limit.
pub(crate) async fn collect<Chunks>(chunks: Chunks, expected: &Expectation) -> Result<Bytes, Attempt>
where
    Chunks: Stream<Item = Result<Bytes, String>> + Unpin,
{
    let mut collected = Vec::new();
    copy(chunks, expected, &mut collected, Path::new("memory")).await?;
    Ok(Bytes::from(collected))
}

async fn copy<Chunks, Writer>(
    mut chunks: Chunks,
    expected: &Expectation,
    writer: &mut Writer,
    target: &Path,
) -> Result<Fetched, Attempt>
where
    Chunks: Stream<Item = Result<Bytes, String>> + Unpin,
    Writer: AsyncWrite + Unpin,
{
    expected.refuse_above_limit(expected.bytes.unwrap_or(0))?;
    let mut hasher = Sha256::new();
    let mut bytes = 0_u64;
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk.map_err(|cause| expected.truncated(bytes, &cause))?;
        bytes += chunk.len() as u64;
        expected.refuse_above_limit(bytes)?;
        hasher.update(&chunk);
        writer
            .write_all(&chunk)
            .await
            .map_err(|error| disk_failure(&error, target))?;
    }
    writer.flush().await.map_err(|error| disk_failure(&error, target))?;
    if expected.bytes.is_some_and(|announced| announced != bytes) {
        return Err(expected.truncated(bytes, "the connection ended"));
    }
    Ok(Fetched {
        bytes,
        sha256: hex::encode(hasher.finalize()),
    })
}

impl Expectation {
    fn refuse_above_limit(&self, bytes: u64) -> Result<()> {
        if bytes <= self.limit_bytes {
            return Ok(());
        }
        Err(Failure::user(
            "STORAGE_OBJECT_TOO_LARGE",
            format!("The file is larger than the accepted {} bytes", self.limit_bytes),
        )
        .at(self.place.clone())
        .hint("Use a smaller file, or raise the download limit"))
    }

    fn truncated(&self, received: u64, cause: &str) -> Attempt {
        let announced = self
            .bytes
            .map_or_else(|| "an unknown number of".to_owned(), |bytes| bytes.to_string());
        let failure = Failure::platform(
            "STORAGE_TRUNCATED",
            format!("The download stopped after {received} of {announced} bytes: {cause}"),
        )
        .at(self.place.clone())
        .hint("The download is repeated by itself; if this stays, upload the file again");
        Attempt::Again(failure, None)
    }
}

/// An unnamed-to-be file in the folder of `target`, so that the final rename is atomic.
pub(crate) fn temporary_beside(target: &Path) -> Result<tempfile::NamedTempFile> {
    let folder = folder_of(target);
    std::fs::create_dir_all(&folder).map_err(|error| disk_failure(&error, &folder))?;
    tempfile::Builder::new()
        .prefix(".brightrun-")
        .tempfile_in(&folder)
        .map_err(|error| disk_failure(&error, &folder))
}

fn folder_of(target: &Path) -> PathBuf {
    match target.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
        _ => PathBuf::from("."),
    }
}

/// What a disk's refusal means to the operator.
pub(crate) fn disk_failure(error: &io::Error, path: &Path) -> Failure {
    let place = format!("`{}`", path.display());
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
            Failure::system("STORAGE_DISK_FULL", format!("The disk is full: {error}"))
                .at(place)
                .hint("Free some space or choose another folder")
        }
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => Failure::system(
            "STORAGE_FOLDER_UNWRITABLE",
            format!("The folder cannot be written or read: {error}"),
        )
        .at(place)
        .hint("Give this process's user access to the folder, or choose another one"),
        io::ErrorKind::NotADirectory | io::ErrorKind::AlreadyExists | io::ErrorKind::IsADirectory => Failure::system(
            "STORAGE_FOLDER_UNWRITABLE",
            format!("A file lies where a folder is needed, or the reverse: {error}"),
        )
        .at(place)
        .hint("Choose another folder"),
        _ => Failure::system("STORAGE_IO", format!("The disk reported an error: {error}")).at(place),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use futures_util::stream;

    use super::*;

    fn expecting(bytes: Option<u64>) -> Expectation {
        Expectation {
            bytes,
            limit_bytes: 100,
            place: "Bucket `b`, object `o`".to_owned(),
        }
    }

    fn chunks(parts: &[&'static str]) -> impl Stream<Item = Result<Bytes, String>> + Unpin {
        let parts: Vec<_> = parts
            .iter()
            .map(|part| Ok(Bytes::from_static(part.as_bytes())))
            .collect();
        stream::iter(parts)
    }

    fn failure_of<T>(result: Result<T, Attempt>) -> (Failure, bool) {
        match result {
            Ok(_) => panic!("this must fail"),
            Err(Attempt::Again(failure, _)) => (failure, true),
            Err(Attempt::Stop(failure)) => (failure, false),
        }
    }

    #[tokio::test]
    async fn a_short_stream_is_truncated_worth_another_attempt_and_leaves_no_file() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("sub/data.jsonl");
        let (failure, again) = failure_of(save(chunks(&["abc", "de"]), &expecting(Some(9)), &target).await);
        assert_eq!((failure.code.as_str(), again), ("STORAGE_TRUNCATED", true));
        assert!(failure.message.contains("5 of 9 bytes"), "{failure}");
        assert_eq!(std::fs::read_dir(folder.path().join("sub")).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn an_endless_stream_is_refused_without_another_attempt() {
        let endless = stream::repeat_with(|| Ok(Bytes::from_static(&[7; 64])));
        let (failure, again) = failure_of(collect(endless, &expecting(None)).await);
        assert_eq!((failure.code.as_str(), again), ("STORAGE_OBJECT_TOO_LARGE", false));
    }

    #[tokio::test]
    async fn a_full_disk_is_named() {
        // The kernel's own full device: every write to it fails for want of space.
        let mut full = tokio::fs::OpenOptions::new()
            .write(true)
            .open("/dev/full")
            .await
            .unwrap();
        let (failure, again) =
            failure_of(copy(chunks(&["abc"]), &expecting(None), &mut full, Path::new("/somewhere/x")).await);
        assert_eq!((failure.code.as_str(), again), ("STORAGE_DISK_FULL", false));
        assert!(failure.to_string().contains("/somewhere/x"), "{failure}");
    }

    #[tokio::test]
    async fn a_complete_stream_has_its_size_and_hash() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("data");
        let Ok(fetched) = save(chunks(&["a", "bc"]), &expecting(Some(3)), &target).await else {
            panic!("a complete stream is saved");
        };
        assert_eq!(std::fs::read(&target).unwrap(), b"abc");
        // SHA-256 of "abc": FIPS 180-2, appendix B.1.
        assert_eq!(
            (fetched.bytes, fetched.sha256.as_str()),
            (3, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
        );
    }
}
