//! Everything that exact continuation needs, in one file that is whole or absent.
//!
//! `step-00000120.ckpt` is a safetensors file: for each adapter pair `<path>.{a,b}` the factor and its two moments as the optimizer keeps them, and in
//! the header's metadata the [`TrainState`] and a SHA-256 over state and tensors. It is written under another name,
//! flushed to the disk, and renamed; a file torn by a crash or damaged later fails its hash and is passed over.
//!
//! Seeds, schedule and data cursor need no state of their own: all are pure functions of the settings and the step.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use brightrun_kernels::{Backend, DType, Tensor};
use safetensors::tensor::{Dtype as StoredDtype, TensorView};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::error::{Failure, Result};
use crate::model::LoraSet;
use crate::model::tensor_file::TensorFile;
use crate::spec::TrainSpec;
use crate::train::optimizer::Optimizer;

/// Rises when older files can no longer be read.
const FORMAT: u32 = 1;

/// Checkpoints kept; the older one serves when the newer is damaged.
const KEPT: usize = 2;

/// Key of the header's metadata.
const METADATA_KEY: &str = "brightrun-checkpoint";

/// Settings that may differ between a run and its continuation, since they change no bit of the result.
const FREE_SETTINGS: [&str; 4] = [
    "checkpoint_every",
    "evaluate_every",
    "activation_budget_bytes",
    "adapter_budget_bytes",
];

/// What a run computes: its settings, its model, its data. A checkpoint continues only the run it was made by.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunIdentity {
    /// Settings that change the result, by name, as JSON text: text compares exactly, a number read back may not.
    pub settings: BTreeMap<String, String>,
    /// The model's fingerprint.
    pub model: String,
    /// The training examples' fingerprint.
    pub data: String,
}

/// The numbers of a run that are not tensors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainState {
    format: u32,
    /// Which run.
    pub identity: RunIdentity,
    /// Optimizer steps done; also the data cursor and the schedule's place.
    pub step: usize,
    /// Tokens read so far.
    pub tokens: u64,
    /// Seconds of training so far, over all attempts.
    pub elapsed_seconds: f64,
    /// Loss of the first step.
    pub first_loss: Option<f64>,
    /// Loss of the last step.
    pub last_loss: Option<f64>,
}

/// The header's metadata.
#[derive(Serialize, Deserialize)]
struct Sealed {
    /// The [`TrainState`] as JSON text, so that what is hashed is what is written.
    state: String,
    sha256: String,
}

impl RunIdentity {
    /// The identity of a run.
    ///
    /// # Errors
    /// `INTERNAL_ENCODING` when the settings cannot be encoded.
    pub fn new(spec: &TrainSpec, model: &str, data: String) -> Result<Self> {
        let fields: BTreeMap<String, Value> = serde_json::from_str(&encoded(spec)?).map_err(|error| {
            Failure::system("INTERNAL_ENCODING", format!("The settings cannot be encoded: {error}"))
        })?;
        Ok(Self {
            settings: fields
                .into_iter()
                .filter(|(name, _)| !FREE_SETTINGS.contains(&name.as_str()))
                .map(|(name, value)| (name, value.to_string()))
                .collect(),
            model: model.to_owned(),
            data,
        })
    }

    /// What differs between a checkpoint's run and this one, in words.
    fn differences(&self, checkpoint: &Self) -> Vec<String> {
        let mut list: Vec<String> = self
            .settings
            .iter()
            .filter_map(|(name, now)| match checkpoint.settings.get(name) {
                Some(then) if then == now => None,
                Some(then) => Some(format!("{name} was {then} and is now {now}")),
                None => Some(format!("{name} is new")),
            })
            .collect();
        if self.model != checkpoint.model {
            list.push("the base model is another one".to_owned());
        }
        if self.data != checkpoint.data {
            list.push("the training examples are others".to_owned());
        }
        list
    }
}

impl TrainState {
    /// The state before the first step.
    pub fn new(identity: RunIdentity) -> Self {
        Self {
            format: FORMAT,
            identity,
            step: 0,
            tokens: 0,
            elapsed_seconds: 0.0,
            first_loss: None,
            last_loss: None,
        }
    }
}

/// A folder of checkpoints of one run.
#[derive(Clone, Debug)]
pub struct CheckpointFolder {
    directory: PathBuf,
}

impl CheckpointFolder {
    /// Opens a folder, creating it where there is none.
    ///
    /// # Errors
    /// `STORAGE_DISK_FULL`, `STORAGE_FOLDER_UNWRITABLE`.
    pub fn open(directory: &Path) -> Result<Self> {
        std::fs::create_dir_all(directory).map_err(|error| write_failure(directory, &error))?;
        Ok(Self {
            directory: directory.to_owned(),
        })
    }

    /// Writes a checkpoint, and removes all but the newest ones. Gives its path.
    ///
    /// # Errors
    /// `STORAGE_DISK_FULL`, `STORAGE_FOLDER_UNWRITABLE`; the backend's own. What was there before is then still there.
    pub fn save<B: Backend>(
        &self,
        device: &B,
        state: &TrainState,
        lora: &LoraSet<B>,
        optimizer: &Optimizer<B>,
    ) -> Result<PathBuf> {
        let mut tensors = Vec::new();
        for_each(lora, optimizer, |name, tensor| {
            tensors.push((name, tensor.dtype(), tensor.shape(), device.read(tensor)?));
            Ok(())
        })?;
        let state_text = encoded(state)?;
        let sealed = Sealed {
            sha256: seal(
                &state_text,
                tensors
                    .iter()
                    .map(|(name, _, _, bytes)| (name.as_str(), bytes.as_slice())),
            ),
            state: state_text,
        };
        let metadata = HashMap::from([(METADATA_KEY.to_owned(), encoded(&sealed)?)]);
        let views = tensors
            .iter()
            .map(|(name, dtype, shape, bytes)| {
                let view = TensorView::new(stored(*dtype), shape.extents().to_vec(), bytes)?;
                Ok((name, view))
            })
            .collect::<Result<Vec<_>, safetensors::SafeTensorError>>();
        let file = views
            .and_then(|views| safetensors::serialize(views, Some(metadata)))
            .map_err(|error| {
                Failure::system(
                    "INTERNAL_ENCODING",
                    format!("The checkpoint cannot be encoded: {error}"),
                )
            })?;
        let path = self.directory.join(format!("step-{:08}.ckpt", state.step));
        self.write(&path, &file)?;
        self.remove_old();
        Ok(path)
    }

    fn write(&self, path: &Path, contents: &[u8]) -> Result<()> {
        let failed = |error: std::io::Error| write_failure(path, &error);
        let mut temporary = tempfile::Builder::new()
            .prefix(".writing-")
            .tempfile_in(&self.directory)
            .map_err(failed)?;
        temporary.write_all(contents).map_err(failed)?;
        temporary.as_file().sync_all().map_err(failed)?;
        temporary.persist(path).map_err(|error| failed(error.error))?;
        // The rename is on the disk only when the folder is.
        File::open(&self.directory)
            .and_then(|folder| folder.sync_all())
            .map_err(failed)
    }

    /// The newest checkpoint that is whole, restored into `lora` and `optimizer`; `None` when there is none.
    ///
    /// # Errors
    /// `CHECKPOINT_MISMATCH` naming what differs, when it was made by another run; the backend's own.
    pub fn restore<B: Backend>(
        &self,
        device: &B,
        identity: &RunIdentity,
        lora: &mut LoraSet<B>,
        optimizer: &mut Optimizer<B>,
    ) -> Result<Option<TrainState>> {
        for path in self.newest_first() {
            match read(&path) {
                Ok((state, tensors)) => {
                    check_identity(&path, identity, &state)?;
                    fill(device, &path, tensors, lora, optimizer)?;
                    return Ok(Some(state));
                }
                Err(failure) => {
                    tracing::warn!(path = %path.display(), %failure, "a damaged checkpoint is passed over");
                }
            }
        }
        Ok(None)
    }

    /// Removes all checkpoints, those of an earlier run.
    pub fn clear(&self) {
        remove(&self.newest_first());
    }

    fn remove_old(&self) {
        remove(self.newest_first().get(KEPT..).unwrap_or_default());
    }

    /// Paths of all checkpoints, whole or not.
    fn newest_first(&self) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(&self.directory).into_iter().flatten().flatten();
        let mut steps: Vec<(u64, PathBuf)> = entries
            .filter_map(|entry| {
                let name = entry.file_name().into_string().ok()?;
                let step = name.strip_prefix("step-")?.strip_suffix(".ckpt")?.parse().ok()?;
                Some((step, entry.path()))
            })
            .collect();
        steps.sort_unstable_by(|left, right| right.cmp(left));
        steps.into_iter().map(|(_, path)| path).collect()
    }
}

/// Removing is housekeeping: a file that stays is said, and harms nothing.
fn remove(paths: &[PathBuf]) {
    for path in paths {
        if let Err(error) = std::fs::remove_file(path) {
            tracing::warn!(path = %path.display(), %error, "an old checkpoint cannot be removed");
        }
    }
}

type HostTensors = BTreeMap<String, Vec<u8>>;

fn read(path: &Path) -> Result<(TrainState, HostTensors)> {
    let damaged = |message: &str| Failure::system("CHECKPOINT_DAMAGED", message).at(path.display().to_string());
    let file = TensorFile::open(path)?;
    let metadata = file
        .metadata()
        .get(METADATA_KEY)
        .ok_or_else(|| damaged("It is not a checkpoint"))?;
    let sealed: Sealed = serde_json::from_str(metadata).map_err(|_| damaged("Its state cannot be read"))?;
    let mut tensors = HostTensors::new();
    for name in file.tensors().keys() {
        tensors.insert(name.clone(), file.read(name)?.bytes);
    }
    let names = tensors.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice()));
    if seal(&sealed.state, names) != sealed.sha256 {
        return Err(damaged("Its contents do not match its hash"));
    }
    match serde_json::from_str::<TrainState>(&sealed.state) {
        Ok(state) if state.format == FORMAT => Ok((state, tensors)),
        _ => Err(damaged("It was written by another version")),
    }
}

fn check_identity(path: &Path, identity: &RunIdentity, state: &TrainState) -> Result<()> {
    let differences = identity.differences(&state.identity);
    if differences.is_empty() {
        return Ok(());
    }
    Err(Failure::user(
        "CHECKPOINT_MISMATCH",
        format!("The checkpoint belongs to another run: {}", differences.join("; ")),
    )
    .at(path.display().to_string())
    .hint("Resume with the settings, model and data of that run, or start anew in an empty folder"))
}

fn fill<B: Backend>(
    device: &B,
    path: &Path,
    mut tensors: HostTensors,
    lora: &mut LoraSet<B>,
    optimizer: &mut Optimizer<B>,
) -> Result<()> {
    for_each_mut(lora, optimizer, |name, tensor| {
        let bytes = tensors.remove(&name).ok_or_else(|| {
            Failure::system("CHECKPOINT_DAMAGED", format!("The checkpoint has no tensor `{name}`"))
                .at(path.display().to_string())
        })?;
        Ok(device.write(tensor, &bytes)?)
    })
}

/// SHA-256 over the state and all tensors in the order of their names.
fn seal<'a>(state: &str, tensors: impl Iterator<Item = (&'a str, &'a [u8])>) -> String {
    let mut hash = Sha256::new().chain_update(state);
    let mut sorted: Vec<_> = tensors.collect();
    sorted.sort_unstable_by_key(|(name, _)| *name);
    for (name, bytes) in sorted {
        hash.update(name);
        hash.update((bytes.len() as u64).to_le_bytes());
        hash.update(bytes);
    }
    hex::encode(hash.finalize())
}

fn encoded(value: &impl Serialize) -> Result<String> {
    serde_json::to_string(value).map_err(|error| {
        Failure::system(
            "INTERNAL_ENCODING",
            format!("The run's state cannot be encoded: {error}"),
        )
    })
}

/// Visits every tensor of a run under its name.
fn for_each<B: Backend>(
    lora: &LoraSet<B>,
    optimizer: &Optimizer<B>,
    mut visit: impl FnMut(String, &Tensor<B>) -> Result<()>,
) -> Result<()> {
    for (pair, [a, b]) in lora.pairs().iter().zip(optimizer.moments()) {
        for (part, factor, moments) in [("a", &pair.a, a), ("b", &pair.b, b)] {
            visit(format!("{}.{part}", pair.path), factor)?;
            for (name, tensor) in moments.tensors() {
                visit(format!("{}.{part}.{name}", pair.path), tensor)?;
            }
        }
    }
    Ok(())
}

/// As [`for_each`], to be written.
fn for_each_mut<B: Backend>(
    lora: &mut LoraSet<B>,
    optimizer: &mut Optimizer<B>,
    mut visit: impl FnMut(String, &mut Tensor<B>) -> Result<()>,
) -> Result<()> {
    for (pair, [a, b]) in lora.pairs_mut().iter_mut().zip(optimizer.moments_mut()) {
        for (part, factor, moments) in [("a", &mut pair.a, a), ("b", &mut pair.b, b)] {
            visit(format!("{}.{part}", pair.path), factor)?;
            for (name, tensor) in moments.tensors_mut() {
                visit(format!("{}.{part}.{name}", pair.path), tensor)?;
            }
        }
    }
    Ok(())
}

/// Factors, moments and scales are f32, codes of 8-bit moments bytes.
fn stored(dtype: DType) -> StoredDtype {
    match dtype {
        DType::U8 => StoredDtype::U8,
        _ => StoredDtype::F32,
    }
}

fn write_failure(path: &Path, error: &std::io::Error) -> Failure {
    crate::storage::disk_failure(error, path)
}
