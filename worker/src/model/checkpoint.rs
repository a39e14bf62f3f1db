//! A checkpoint folder: one safetensors file, or shards listed by `model.safetensors.index.json`.
//!
//! Everything that headers can tell is checked when it is opened, so that an incomplete download is refused with the
//! whole list of what is missing, before the first weight is read. Tensors are then read one at a time.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::error::{Failure, Result};
use crate::model::config::ExpectedTensor;
use crate::model::tensor_file::{HostTensor, StoredTensor, TensorFile};

/// How many names a message lists before it only counts.
const NAMES_IN_A_MESSAGE: usize = 8;

/// An opened checkpoint.
#[derive(Debug)]
pub struct Checkpoint {
    directory: PathBuf,
    files: Vec<TensorFile>,
    /// Which file holds a tensor.
    home: BTreeMap<String, usize>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Checkpoint {
    /// Opens a checkpoint folder and checks every header.
    ///
    /// # Errors
    /// `MODEL_FILE_MISSING` with the list of absent files, `MODEL_FILE_DAMAGED`, `MODEL_TENSOR_MISSING` when the index names
    /// a tensor that its file does not hold.
    pub fn open(directory: &Path) -> Result<Self> {
        let index_path = directory.join("model.safetensors.index.json");
        if index_path.is_file() {
            return Self::open_shards(directory, &index_path);
        }
        let single = directory.join("model.safetensors");
        if !single.is_file() {
            return Err(Failure::user(
                "MODEL_FILE_MISSING",
                "The folder holds neither model.safetensors nor model.safetensors.index.json",
            )
            .at(directory.display().to_string())
            .hint("Name a folder that holds a safetensors checkpoint"));
        }
        let file = TensorFile::open(&single)?;
        let home = file.tensors().keys().map(|name| (name.clone(), 0)).collect();
        Ok(Self {
            directory: directory.to_owned(),
            files: vec![file],
            home,
        })
    }

    fn open_shards(directory: &Path, index_path: &Path) -> Result<Self> {
        let index = read_index(index_path)?;
        let names: Vec<&String> = index.weight_map.values().collect::<BTreeSet<_>>().into_iter().collect();
        let absent: Vec<&str> = names
            .iter()
            .filter(|name| !directory.join(name).is_file())
            .map(|name| name.as_str())
            .collect();
        if !absent.is_empty() {
            return Err(Failure::platform(
                "MODEL_FILE_MISSING",
                format!(
                    "{} of {} shards are missing: {}",
                    absent.len(),
                    names.len(),
                    shortened(&absent)
                ),
            )
            .at(directory.display().to_string())
            .hint("Finish the download of this checkpoint"));
        }
        let files = names
            .iter()
            .map(|name| TensorFile::open(&directory.join(name)))
            .collect::<Result<Vec<_>>>()?;
        let mut home = BTreeMap::new();
        for (tensor, file_name) in &index.weight_map {
            let place = names.binary_search(&file_name).unwrap_or_default();
            if !files[place].tensors().contains_key(tensor) {
                return Err(Failure::platform(
                    "MODEL_TENSOR_MISSING",
                    format!("The index says that `{file_name}` holds `{tensor}`, but it does not"),
                )
                .at(index_path.display().to_string())
                .hint("Download the checkpoint again"));
            }
            home.insert(tensor.clone(), place);
        }
        Ok(Self {
            directory: directory.to_owned(),
            files,
            home,
        })
    }

    /// The folder.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// A tensor's dtype and extents, if it is there.
    pub fn tensor(&self, name: &str) -> Option<&StoredTensor> {
        self.files[*self.home.get(name)?].tensors().get(name)
    }

    /// Names of all tensors.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.home.keys().map(String::as_str)
    }

    /// Compares the headers with what a configuration promises.
    ///
    /// # Errors
    /// `MODEL_TENSOR_MISSING` with all absent names; `MODEL_TENSOR_SHAPE` naming tensor, expected and found extents.
    pub fn check(&self, expected: &[ExpectedTensor]) -> Result<()> {
        let missing: Vec<&str> = expected
            .iter()
            .filter(|tensor| self.tensor(&tensor.name).is_none())
            .map(|tensor| tensor.name.as_str())
            .collect();
        if !missing.is_empty() {
            return Err(Failure::user(
                "MODEL_TENSOR_MISSING",
                format!(
                    "{} tensors that config.json asks for are not in the checkpoint: {}",
                    missing.len(),
                    shortened(&missing)
                ),
            )
            .at(self.directory.display().to_string())
            .hint("Check that config.json belongs to these weights and that all shards are there"));
        }
        for tensor in expected {
            let Some(stored) = self.tensor(&tensor.name) else {
                continue;
            };
            if stored.shape != tensor.shape {
                return Err(Failure::user(
                    "MODEL_TENSOR_SHAPE",
                    format!(
                        "By config.json the tensor `{}` has the shape {:?}, but in the checkpoint it is {:?}",
                        tensor.name, tensor.shape, stored.shape
                    ),
                )
                .at(self.directory.display().to_string())
                .hint("Check that config.json belongs to these weights"));
            }
        }
        Ok(())
    }

    /// Reads one tensor and checks that every element is finite.
    ///
    /// # Errors
    /// `MODEL_TENSOR_MISSING`, `MODEL_FILE_DAMAGED`, `MODEL_NON_FINITE` naming tensor and element.
    pub fn read(&self, name: &str) -> Result<HostTensor> {
        let file = self.home.get(name).map(|place| &self.files[*place]).ok_or_else(|| {
            Failure::user("MODEL_TENSOR_MISSING", format!("The checkpoint has no tensor `{name}`"))
                .at(self.directory.display().to_string())
        })?;
        let tensor = file.read(name)?;
        match tensor.first_non_finite() {
            None => Ok(tensor),
            Some(element) => Err(Failure::user(
                "MODEL_NON_FINITE",
                format!("Element {element} of the tensor `{name}` is infinite or not a number"),
            )
            .at(file.path().display().to_string())
            .hint("Download the checkpoint again; its weights are damaged")),
        }
    }

    /// SHA-256 over all headers: names, dtypes, extents and places of every tensor.
    pub fn header_hash(&self) -> [u8; 32] {
        let mut hash = Sha256::new();
        for file in &self.files {
            hash.update(file.header_hash());
        }
        hash.finalize().into()
    }
}

fn read_index(path: &Path) -> Result<Index> {
    let failure = |message: String| {
        Failure::platform("MODEL_FILE_DAMAGED", message)
            .at(path.display().to_string())
            .hint("Download the index again")
    };
    let text = std::fs::read_to_string(path).map_err(|error| failure(format!("The index cannot be read: {error}")))?;
    let index: Index =
        serde_json::from_str(&text).map_err(|error| failure(format!("The index is not valid JSON: {error}")))?;
    // An index is outside data: it must not lead out of its folder.
    match index
        .weight_map
        .values()
        .find(|name| name.contains(['/', '\\']) || name.starts_with('.'))
    {
        Some(name) => Err(failure(format!(
            "The index names `{name}`, which is not a plain file name"
        ))),
        None => Ok(index),
    }
}

/// A list for a message: the first few, and how many more.
fn shortened(names: &[&str]) -> String {
    let shown = names
        .iter()
        .take(NAMES_IN_A_MESSAGE)
        .copied()
        .collect::<Vec<_>>()
        .join(", ");
    match names.len().saturating_sub(NAMES_IN_A_MESSAGE) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}
