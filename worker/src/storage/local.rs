//! A folder of this machine as storage: `{root}/{bucket}/{path}`.
//!
//! The demo, the tests and single-machine installations use it. Objects are replaced by rename, so
//! a reader sees the old content or the new, never half of one.

use std::fs;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use bytes::Bytes;
use sha2::{Digest, Sha256};
use url::Url;

use super::name::{check_readable, check_writable};
use super::sink::{disk_failure, temporary_beside};
use super::{Fetched, ObjectEntry, ObjectInfo, Storage, place};
use crate::error::{Failure, Result};
use crate::secret::Secret;

const COPY_BUFFER_BYTES: usize = 256 << 10;

/// Objects as files under one folder.
#[derive(Clone, Debug)]
pub struct LocalStorage {
    root: PathBuf,
}

impl LocalStorage {
    /// Uses `root`, which is made when the first object is stored.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    fn readable(&self, bucket: &str, path: &str) -> Result<PathBuf> {
        check_readable(bucket, path)?;
        Ok(self.root.join(bucket).join(path))
    }

    fn writable(&self, bucket: &str, path: &str) -> Result<PathBuf> {
        check_writable(bucket, path)?;
        Ok(self.root.join(bucket).join(path))
    }
}

#[async_trait]
impl Storage for LocalStorage {
    fn describe(&self) -> String {
        format!("the folder `{}`", self.root.display())
    }

    async fn put_file(&self, bucket: &str, path: &str, local_file: &Path, _content_type: &str) -> Result<ObjectInfo> {
        let target = self.writable(bucket, path)?;
        let source = local_file.to_path_buf();
        let fetched = blocking(move || copy_file(&source, &target, |error| disk_failure(error, &source))).await?;
        Ok(ObjectInfo {
            bytes: fetched.bytes,
            etag: None,
        })
    }

    async fn put_bytes(&self, bucket: &str, path: &str, bytes: Bytes, _content_type: &str) -> Result<ObjectInfo> {
        let target = self.writable(bucket, path)?;
        let fetched = blocking(move || replace(&target, &mut bytes.as_ref())).await?;
        Ok(ObjectInfo {
            bytes: fetched.bytes,
            etag: None,
        })
    }

    async fn get_to_file(&self, bucket: &str, path: &str, target: &Path) -> Result<Fetched> {
        let source = self.readable(bucket, path)?;
        let (target, place) = (target.to_path_buf(), place(bucket, path));
        blocking(move || copy_file(&source, &target, |error| missing_or_disk(error, &source, &place))).await
    }

    async fn get_bytes(&self, bucket: &str, path: &str, limit_bytes: u64) -> Result<Bytes> {
        let source = self.readable(bucket, path)?;
        let place = place(bucket, path);
        blocking(move || {
            let mut content = Vec::new();
            fs::File::open(&source)
                .and_then(|file| file.take(limit_bytes + 1).read_to_end(&mut content))
                .map_err(|error| missing_or_disk(&error, &source, &place))?;
            if content.len() as u64 > limit_bytes {
                let message = format!("The file is larger than the accepted {limit_bytes} bytes");
                return Err(Failure::user("STORAGE_OBJECT_TOO_LARGE", message).at(place));
            }
            Ok(Bytes::from(content))
        })
        .await
    }

    async fn head(&self, bucket: &str, path: &str) -> Result<Option<ObjectInfo>> {
        let file = self.readable(bucket, path)?;
        blocking(move || match fs::metadata(&file) {
            Ok(metadata) if metadata.is_file() => Ok(Some(ObjectInfo {
                bytes: metadata.len(),
                etag: None,
            })),
            Ok(_) => Ok(None),
            Err(error) if is_absent(&error) => Ok(None),
            Err(error) => Err(disk_failure(&error, &file)),
        })
        .await
    }

    async fn list(&self, bucket: &str, folder: &str) -> Result<Vec<ObjectEntry>> {
        let folder = self.readable(bucket, folder)?;
        blocking(move || match list_folder(&folder) {
            Err(error) if is_absent(&error) => Ok(Vec::new()),
            listed => listed.map_err(|error| disk_failure(&error, &folder)),
        })
        .await
    }

    async fn delete(&self, bucket: &str, path: &str) -> Result<()> {
        let file = self.writable(bucket, path)?;
        blocking(move || match fs::remove_file(&file) {
            Err(error) if !is_absent(&error) => Err(disk_failure(&error, &file)),
            _ => Ok(()),
        })
        .await
    }

    /// A `file://` URL: on one machine the file itself is the address. It does not expire.
    async fn signed_url(&self, bucket: &str, path: &str, _seconds: u64) -> Result<Secret> {
        let file = self.readable(bucket, path)?;
        let absolute = fs::canonicalize(&file).map_err(|error| missing_or_disk(&error, &file, &place(bucket, path)))?;
        let url = Url::from_file_path(&absolute)
            .map_err(|()| Failure::system("STORAGE_IO", "The file's path cannot be written as a URL"))?;
        Ok(Secret::new(url.as_str()))
    }
}

/// Runs disk work where it may block.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let finished = tokio::task::spawn_blocking(work).await;
    finished.map_err(|error| Failure::system("STORAGE_IO", format!("The disk task did not finish: {error}")))?
}

fn copy_file(source: &Path, target: &Path, unreadable: impl Fn(&io::Error) -> Failure) -> Result<Fetched> {
    let mut file = fs::File::open(source).map_err(|error| unreadable(&error))?;
    // A folder can be opened; only reading it fails, with a message about something else.
    if file.metadata().map_err(|error| unreadable(&error))?.is_dir() {
        return Err(unreadable(&io::Error::from(io::ErrorKind::NotFound)));
    }
    replace(target, &mut file)
}

/// Writes a temporary file beside `target`, makes it durable, and renames it.
fn replace(target: &Path, content: &mut impl Read) -> Result<Fetched> {
    let mut temporary = temporary_beside(target)?;
    let fetched = copy(content, temporary.as_file_mut())
        .and_then(|fetched| temporary.as_file().sync_all().map(|()| fetched))
        .map_err(|error| disk_failure(&error, target))?;
    temporary
        .persist(target)
        .map_err(|error| disk_failure(&error.error, target))?;
    Ok(fetched)
}

fn copy(content: &mut impl Read, writer: &mut impl Write) -> io::Result<Fetched> {
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; COPY_BUFFER_BYTES];
    let mut bytes = 0;
    loop {
        let read = content.read(&mut buffer)?;
        let Some(chunk) = buffer.get(..read).filter(|chunk| !chunk.is_empty()) else {
            break;
        };
        writer.write_all(chunk)?;
        hasher.update(chunk);
        bytes += read as u64;
    }
    Ok(Fetched {
        bytes,
        sha256: hex::encode(hasher.finalize()),
    })
}

fn list_folder(folder: &Path) -> io::Result<Vec<ObjectEntry>> {
    let mut entries = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        if let (true, Ok(name)) = (metadata.is_file(), entry.file_name().into_string()) {
            entries.push(ObjectEntry {
                name,
                bytes: metadata.len(),
            });
        }
    }
    entries.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(entries)
}

fn is_absent(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

fn missing_or_disk(error: &io::Error, file: &Path, place: &str) -> Failure {
    if !is_absent(error) {
        return disk_failure(error, file);
    }
    Failure::user("STORAGE_OBJECT_MISSING", "The file does not exist in the storage")
        .at(place)
        .hint("Upload the file again and check its path")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::*;

    #[test]
    fn a_writer_without_space_is_reported_as_a_full_disk() {
        let mut full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let error = copy(&mut &[7_u8; 1 << 20][..], &mut full).unwrap_err();
        assert_eq!(disk_failure(&error, Path::new("/x")).code, "STORAGE_DISK_FULL");
    }
}
