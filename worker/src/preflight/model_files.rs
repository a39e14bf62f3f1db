//! Whether a checkpoint is whole, from its index and the heads of its files: no weight is read.
//!
//! A download that was cut short is the usual reason for a model that fails to load after an hour of waiting for a GPU. Each
//! safetensors file says in its head where its last tensor ends; a shorter file was cut.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{Failure, Result};

const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";

/// Longest head of a safetensors file, as its own library has it.
const LONGEST_HEAD: u64 = 100_000_000;

/// A whole checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModelFiles {
    /// Files of weights.
    pub count: usize,
    /// Their bytes.
    pub bytes: u64,
}

/// Checks that every file of weights is there to its end.
///
/// # Errors
/// `MODEL_INCOMPLETE`, naming every file that is missing or cut.
pub fn check(folder: &Path) -> Result<ModelFiles> {
    let names = names(folder)?;
    let (mut bytes, mut problems) = (0, Vec::new());
    for name in &names {
        match whole_length(&folder.join(name)) {
            Ok(length) => bytes += length,
            Err(problem) => problems.push(format!("{name} {problem}")),
        }
    }
    if problems.is_empty() {
        return Ok(ModelFiles {
            count: names.len(),
            bytes,
        });
    }
    let most = problems.iter().take(5).cloned().collect::<Vec<_>>().join("; ");
    let more = problems.len().saturating_sub(5);
    let more = if more > 0 {
        format!("; and {more} more")
    } else {
        String::new()
    };
    Err(incomplete(folder, format!("{most}{more}")))
}

/// The files the index names, or the one file of a small model.
fn names(folder: &Path) -> Result<BTreeSet<String>> {
    let index = folder.join(INDEX);
    if !index.exists() {
        return Ok([SINGLE.to_owned()].into());
    }
    let text = std::fs::read(&index).map_err(|error| incomplete(folder, format!("{INDEX} cannot be read: {error}")))?;
    let parsed: Value =
        serde_json::from_slice(&text).map_err(|error| incomplete(folder, format!("{INDEX} is not JSON: {error}")))?;
    let files = parsed
        .get("weight_map")
        .and_then(Value::as_object)
        .map(|map| {
            map.values()
                .filter_map(Value::as_str)
                .map(str::to_owned)
                .collect::<BTreeSet<_>>()
        })
        .unwrap_or_default();
    if files.is_empty() {
        return Err(incomplete(folder, format!("{INDEX} names no file")));
    }
    Ok(files)
}

/// The length of a file that ends where its head says; the problem in words otherwise.
fn whole_length(path: &Path) -> std::result::Result<u64, String> {
    let mut file = File::open(path).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => "is missing".to_owned(),
        _ => format!("cannot be opened: {error}"),
    })?;
    let length = file.metadata().map_err(|error| error.to_string())?.len();
    let mut size = [0; 8];
    file.read_exact(&mut size).map_err(|_| "is empty or cut".to_owned())?;
    let head = u64::from_le_bytes(size);
    if head > LONGEST_HEAD {
        return Err("is no safetensors file".to_owned());
    }
    let mut text = vec![0; usize::try_from(head).map_err(|error| error.to_string())?];
    file.read_exact(&mut text)
        .map_err(|_| "is cut in its head".to_owned())?;
    let tensors: Map<String, Value> = serde_json::from_slice(&text).map_err(|_| "is no safetensors file".to_owned())?;
    let end = tensors
        .values()
        .filter_map(|tensor| tensor.pointer("/data_offsets/1")?.as_u64())
        .max()
        .unwrap_or(0);
    let wanted = end.saturating_add(8).saturating_add(head);
    if length < wanted {
        return Err(format!("has {length} of {wanted} bytes"));
    }
    Ok(length)
}

fn incomplete(folder: &Path, what: String) -> Failure {
    Failure::system("MODEL_INCOMPLETE", format!("The checkpoint is not whole: {what}"))
        .at(folder.display().to_string())
        .hint("Download it again, or resume the download; check that the volume has space for all of it")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::json;

    fn write(folder: &Path, name: &str, bytes: usize, cut: usize) {
        let head =
            json!({"w": {"dtype": "U8", "shape": [bytes], "data_offsets": [0, bytes]}, "__metadata__": {"a": "b"}});
        let head = head.to_string();
        let mut file = (head.len() as u64).to_le_bytes().to_vec();
        file.extend(head.as_bytes());
        file.extend(vec![0; bytes]);
        file.truncate(file.len() - cut);
        std::fs::write(folder.join(name), file).unwrap();
    }

    #[test]
    fn a_small_model_is_one_whole_file() {
        let folder = tempfile::tempdir().unwrap();
        let missing = check(folder.path()).unwrap_err();
        assert!(missing.message.contains("model.safetensors is missing"), "{missing}");
        write(folder.path(), SINGLE, 100, 0);
        let found = check(folder.path()).unwrap();
        assert!(found.count == 1 && found.bytes > 100);
        for cut in [1, 100, 101, 150] {
            write(folder.path(), SINGLE, 100, cut);
            assert_eq!(
                check(folder.path()).unwrap_err().code,
                "MODEL_INCOMPLETE",
                "cut by {cut}"
            );
        }
    }

    #[test]
    fn every_missing_or_cut_shard_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let index = json!({"weight_map": {"a": "1.safetensors", "b": "2.safetensors", "c": "3.safetensors"}});
        std::fs::write(folder.path().join(INDEX), index.to_string()).unwrap();
        write(folder.path(), "1.safetensors", 10, 0);
        write(folder.path(), "2.safetensors", 10, 3);
        let failure = check(folder.path()).unwrap_err();
        assert!(failure.message.contains("2.safetensors has"), "{failure}");
        assert!(failure.message.contains("3.safetensors is missing"), "{failure}");
        assert!(!failure.message.contains("1.safetensors"), "{failure}");
    }
}
