//! The storage of a run: files in a folder, or objects over HTTP, with its troubles.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::supabase_storage::{SupabaseStandIn, Trouble};

/// Opens the stand-in; obviously no key.
pub const STORAGE_KEY: &str = "canary-not-a-storage-key";

const MODELS: &str = "lora-models";

/// Where data sets lie and artifacts go.
pub enum Store {
    /// Folders.
    Folder(PathBuf),
    /// HTTP.
    Http(SupabaseStandIn),
}

impl Store {
    /// Puts a data set down.
    pub fn seed(&self, path: &str, text: &str) {
        match self {
            Self::Folder(root) => {
                let file = root.join("lora-datasets").join(path);
                std::fs::create_dir_all(file.parent().unwrap()).unwrap();
                std::fs::write(file, text).unwrap();
            }
            Self::Http(server) => server.seed("lora-datasets", path, text.as_bytes()),
        }
    }

    /// Paths of everything in the bucket of models.
    pub fn models(&self) -> Vec<String> {
        match self {
            Self::Folder(root) => {
                let (bucket, mut found) = (root.join(MODELS), Vec::new());
                files_below(&bucket, &bucket, &mut found);
                found
            }
            Self::Http(server) => server.paths(MODELS),
        }
    }

    /// The bytes of a model's file.
    pub fn model(&self, path: &str) -> Option<Vec<u8>> {
        match self {
            Self::Folder(root) => std::fs::read(root.join(MODELS).join(path)).ok(),
            Self::Http(server) => server.object(MODELS, path).map(|bytes| bytes.to_vec()),
        }
    }

    /// Refuses everything for a while; false where there is nothing yet that could.
    pub async fn refuse(&self, time: Duration) -> bool {
        match self {
            Self::Folder(root) => {
                // A file where the bucket's folder should be: every write fails.
                let (bucket, aside) = (root.join(MODELS), root.join("aside"));
                if std::fs::rename(&bucket, &aside).is_err() {
                    return false;
                }
                // A writer may be faster than this file, and have made a folder: that is part of the trouble.
                let _it_may_be_a_folder = std::fs::write(&bucket, b"");
                tokio::time::sleep(time).await;
                let _it_may_be_a_folder = std::fs::remove_file(&bucket);
                if bucket.is_dir() {
                    merge(&aside, &bucket);
                } else {
                    std::fs::rename(&aside, &bucket).unwrap();
                }
                true
            }
            Self::Http(server) => {
                server.trouble(Some(Trouble::Refuses(503)));
                tokio::time::sleep(time).await;
                server.trouble(None);
                true
            }
        }
    }

    /// Answers late for a while; false for a folder, which cannot.
    pub async fn dawdle(&self, answers_after: Duration, time: Duration) -> bool {
        let Self::Http(server) = self else { return false };
        server.trouble(Some(Trouble::Slow(answers_after)));
        tokio::time::sleep(time).await;
        server.trouble(None);
        true
    }
}

fn files_below(folder: &Path, root: &Path, found: &mut Vec<String>) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            files_below(&entry.path(), root, found);
        } else {
            let path = entry.path();
            found.push(path.strip_prefix(root).unwrap().display().to_string());
        }
    }
}

/// Moves what is in one folder into another.
fn merge(from: &Path, into: &Path) {
    for entry in std::fs::read_dir(from).unwrap().flatten() {
        let to = into.join(entry.file_name());
        if to.is_dir() {
            merge(&entry.path(), &to);
        } else {
            std::fs::rename(entry.path(), to).unwrap();
        }
    }
    std::fs::remove_dir_all(from).unwrap();
}
