//! What was fetched, kept beside it: a later look needs no network.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{Remote, RemoteFile};
use crate::error::{Failure, Result};

/// Its name in the model's folder.
const NAME: &str = ".brightrun-fetch.json";

/// A file that belongs to the model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecordedFile {
    /// Its name.
    pub name: String,
    /// Its length.
    pub bytes: u64,
    /// SHA-256 in hexadecimal, where the hub knows it.
    pub sha256: Option<String>,
}

/// What a folder was fetched from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// `Organisation/Name`.
    pub model: String,
    /// The commit.
    pub revision: String,
    /// Every file of it.
    pub files: Vec<RecordedFile>,
}

impl Record {
    /// The record of a revision.
    pub fn new(model: &str, remote: &Remote) -> Self {
        let recorded = |file: &RemoteFile| RecordedFile {
            name: file.name.clone(),
            bytes: file.bytes,
            sha256: file.sha256.clone(),
        };
        Self {
            model: model.to_owned(),
            revision: remote.revision.clone(),
            files: remote.files.iter().map(recorded).collect(),
        }
    }

    /// Writes it into a folder, whole or not at all.
    ///
    /// # Errors
    /// The system's own.
    pub fn write(&self, folder: &Path) -> std::io::Result<()> {
        let temporary = folder.join(format!("{NAME}.part"));
        std::fs::write(&temporary, serde_json::to_vec_pretty(self)?)?;
        std::fs::rename(temporary, folder.join(NAME))
    }

    /// Reads it from a folder; `None` when there is none, or none that can be read.
    pub fn read(folder: &Path) -> Option<Self> {
        serde_json::from_slice(&std::fs::read(folder.join(NAME)).ok()?).ok()
    }
}

/// Checks without a network that a folder holds everything that was to be fetched into it.
///
/// # Errors
/// `FETCH_OFFLINE` when nothing was ever fetched there, another model was, or files are missing or have other lengths: all of them
/// named.
pub fn offline(model: &str, folder: &Path) -> Result<Record> {
    let failure = |message: String| {
        Failure::user("FETCH_OFFLINE", message)
            .at(folder.display().to_string())
            .hint("Run the command with a network to fetch what is missing")
    };
    let record = Record::read(folder).ok_or_else(|| failure("Nothing was fetched into this folder yet".to_owned()))?;
    if record.model != model {
        return Err(failure(format!("The folder holds {}, not {model}", record.model)));
    }
    let missing: Vec<&str> = record
        .files
        .iter()
        .filter(|file| std::fs::metadata(folder.join(&file.name)).map(|facts| facts.len()).ok() != Some(file.bytes))
        .map(|file| file.name.as_str())
        .collect();
    match missing.as_slice() {
        [] => Ok(record),
        names => Err(failure(format!(
            "{} of {} files are missing or not complete: {}",
            names.len(),
            record.files.len(),
            names.join(", ")
        ))),
    }
}
