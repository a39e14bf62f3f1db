//! From a checkpoint folder, or from a snapshot of it, to a model in a backend's memory.
//!
//! ```text
//! headers ─▶ plan ─▶ stream (files in order, several threads) ─▶ fill (check, decode, quantise) ─▶ store ─▶ assemble ─▶ model
//!                                                                                                  │  ▲
//!                                                                                        snapshot ◀┘  └─ stream of a snapshot
//! ```
//!
//! Everything that headers can tell is checked before the first weight is read. No byte is read twice. Host memory beyond the
//! model itself is at most [`stream::Limits::in_flight_bytes`] (512 MiB by default), or twice the largest single matrix that is
//! quantised, if that is more.

pub mod assemble;
pub mod fill;
pub mod log;
pub mod plan;
pub mod snapshot;
pub mod store;
pub mod stream;

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use brightrun_kernels::Backend;
use brightrun_kernels::ops::Precision;
use sha2::{Digest, Sha256};

use self::fill::Filler;
use self::plan::{Part, Plan};
use self::snapshot::{SnapshotSettings, SnapshotWriter, Snapshots};
use self::store::Store;
use self::stream::{Limits, Stretch, Wanted};
use crate::error::{Failure, Result};
use crate::model::checkpoint::Checkpoint;
use crate::model::config::ModelConfig;
use crate::model::rope::RopeFrequencies;
use crate::model::tensor_file::{first_non_finite, widen};
use crate::model::transformer::Model;
use crate::spec::BaseDtype;

/// How much of each tensor goes into the model's fingerprint. Headers and lengths are hashed whole; hashing all weights of
/// a large model would take longer than loading it.
const FINGERPRINT_SAMPLE_BYTES: usize = 4096;

/// How the projections are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// NF4 with double quantisation; embedding, head, norms and biases as in the checkpoint.
    Nf4,
    /// Routed experts in NF4 with double quantisation, every other matrix in bf16; norms and biases as in the checkpoint. Almost all
    /// parameters of a model with many experts are in them, and the rest suffers most from four bits.
    Nf4Experts,
    /// bf16, rounded where the checkpoint has more; norms and biases as in the checkpoint.
    Bf16,
    /// As in the checkpoint.
    Stored,
}

impl Encoding {
    /// Its name in files and reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Nf4 => "nf4",
            Self::Nf4Experts => "nf4-experts",
            Self::Bf16 => "bf16",
            Self::Stored => "stored",
        }
    }

    /// Whether a snapshot saves anything: it is smaller than the checkpoint, and quantising is not done again.
    pub fn is_quantised(self) -> bool {
        matches!(self, Self::Nf4 | Self::Nf4Experts)
    }
}

/// How a model is loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadOptions {
    /// How the projections are kept.
    pub encoding: Encoding,
    /// In which precision products are computed.
    pub precision: Precision,
    /// In which precision rotary frequencies are held.
    pub rope_frequencies: RopeFrequencies,
}

impl From<BaseDtype> for LoadOptions {
    fn from(dtype: BaseDtype) -> Self {
        let (encoding, precision) = match dtype {
            BaseDtype::Nf4 => (Encoding::Nf4, Precision::Bf16),
            BaseDtype::Nf4Experts => (Encoding::Nf4Experts, Precision::Bf16),
            BaseDtype::Bf16 => (Encoding::Bf16, Precision::Bf16),
            BaseDtype::F32 => (Encoding::Stored, Precision::F32),
        };
        Self {
            encoding,
            precision,
            rope_frequencies: RopeFrequencies::default(),
        }
    }
}

/// How the files are read, and whether a snapshot is used.
#[derive(Clone, Debug, Default)]
pub struct LoadSettings {
    /// Threads and host memory.
    pub limits: Limits,
    /// Snapshots; `None` neither reads nor writes one.
    pub snapshots: Option<SnapshotSettings>,
}

/// What weights come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoadSource {
    /// The checkpoint's own files.
    Checkpoint,
    /// A snapshot that an earlier start wrote.
    Snapshot,
}

/// What [`Model::load`] reports while it reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadProgress {
    /// Tensors loaded.
    pub tensors: usize,
    /// Tensors to be loaded.
    pub tensors_total: usize,
    /// Bytes read.
    pub bytes: u64,
    /// Bytes to be read.
    pub bytes_total: u64,
    /// Where they come from.
    pub source: LoadSource,
}

/// What became of the snapshot.
#[derive(Clone, Debug, PartialEq)]
pub enum SnapshotOutcome {
    /// None was wanted: the checkpoint is small, or the encoding is not quantised, or snapshots are off.
    NotWanted,
    /// The weights came from this one.
    Used(PathBuf),
    /// This one was written for the next start.
    Written(PathBuf),
    /// None could be written; the model is loaded nevertheless.
    NotWritten(Failure),
}

/// How a load went.
#[derive(Clone, Debug, PartialEq)]
pub struct LoadReport {
    /// Where the weights came from.
    pub source: LoadSource,
    /// Bytes read.
    pub bytes: u64,
    /// Seconds from the first look at the folder to the model; a snapshot's writing is in them.
    pub seconds: f64,
    /// What became of the snapshot.
    pub snapshot: SnapshotOutcome,
}

impl<B: Backend> Model<B> {
    /// Loads a checkpoint folder, without snapshots. `progress` is called after each stretch that was read.
    ///
    /// # Errors
    /// `MODEL_…`: see [`ModelConfig::load`], [`Checkpoint::open`], [`Checkpoint::check`], [`Plan::new`], [`Filler::fill`]; the
    /// backend's own.
    pub fn load(
        device: &B,
        directory: &Path,
        options: LoadOptions,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Self> {
        Self::load_with(device, directory, options, &LoadSettings::default(), progress).map(|(model, _)| model)
    }

    /// Loads a checkpoint folder, or a snapshot of it where a valid one is there; writes a snapshot where one is wanted and
    /// missing. A snapshot that is damaged is reported and made anew; one that cannot be written is reported and done without.
    ///
    /// # Errors
    /// As [`Model::load`]. Never because of a snapshot.
    pub fn load_with(
        device: &B,
        directory: &Path,
        options: LoadOptions,
        settings: &LoadSettings,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<(Self, LoadReport)> {
        let began = Instant::now();
        let config = ModelConfig::load(directory)?;
        let snapshots = match &settings.snapshots {
            Some(wanted) if options.encoding.is_quantised() => Snapshots::of(directory, options.encoding, wanted),
            _ => None,
        };
        let ways = Ways {
            device,
            directory,
            options,
            limits: settings.limits,
        };
        if let Some(snapshots) = &snapshots
            && let Some((model, path, bytes)) = ways.by_snapshot(snapshots, &config, progress)
        {
            let report = LoadReport {
                source: LoadSource::Snapshot,
                bytes,
                seconds: began.elapsed().as_secs_f64(),
                snapshot: SnapshotOutcome::Used(path),
            };
            return Ok((model, report));
        }
        let (model, bytes, snapshot) = ways.by_checkpoint(snapshots.as_ref(), config, progress)?;
        let report = LoadReport {
            source: LoadSource::Checkpoint,
            bytes,
            seconds: began.elapsed().as_secs_f64(),
            snapshot,
        };
        Ok((model, report))
    }
}

/// The two ways to the same model.
struct Ways<'a, B: Backend> {
    device: &'a B,
    directory: &'a Path,
    options: LoadOptions,
    limits: Limits,
}

impl<B: Backend> Ways<'_, B> {
    /// `None` when there is no valid snapshot; a damaged one is reported and removed.
    fn by_snapshot(
        &self,
        snapshots: &Snapshots,
        config: &ModelConfig,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Option<(Model<B>, PathBuf, u64)> {
        let snapshot = snapshots.find()?;
        let path = snapshot.path().to_owned();
        let loaded = snapshot
            .load(self.device, self.limits, progress)
            .and_then(|(store, bytes)| {
                let fingerprint = self.fingerprint(config, snapshot.weights_digest());
                let model = assemble::assembled(self.device, config.clone(), self.options, store, fingerprint)?;
                Ok((model, bytes))
            });
        match loaded {
            Ok((model, bytes)) => Some((model, path, bytes)),
            Err(failure) => {
                tracing::warn!(%failure, "the snapshot cannot be used; the checkpoint is read instead and a new one is made");
                snapshots.discard(&path);
                None
            }
        }
    }

    fn by_checkpoint(
        &self,
        snapshots: Option<&Snapshots>,
        config: ModelConfig,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<(Model<B>, u64, SnapshotOutcome)> {
        let checkpoint = Checkpoint::open(self.directory)?.with_fp8_blocks(config.fp8_block)?;
        let expected = config.tensors_with(checkpoint.expert_storage());
        checkpoint.check(&expected)?;
        report_unused(
            &checkpoint,
            &expected.iter().map(|tensor| tensor.name.as_str()).collect(),
        );
        let plan = Plan::new(&config, &checkpoint, self.options.encoding)?;
        let store = Store::new(plan.slots.clone());
        let mut writer = snapshots.map(|snapshots| snapshots.begin(&plan.slots, plan.weight_bytes()));
        let samples = Samples::new(plan.tensors.len());
        let inputs = checkpoint.inputs()?;
        let mut meter = Meter::new(&plan, progress);
        let scales = read_scales(&plan, &inputs, self.limits, &mut meter)?;
        let filler = Filler {
            device: self.device,
            plan: &plan,
            scales: &scales,
            block: config.fp8_block,
            store: &store,
        };
        let pieces: Vec<Wanted> = plan.parts.iter().map(|part| part.wanted).collect();
        let stretches = stream::merged(&pieces);
        let snapshot = writer.as_ref().and_then(|writer| writer.as_ref().ok());
        let work = |stretch: &Stretch, bytes: &[u8]| {
            for part in &plan.parts[stretch.pieces.clone()] {
                let from = (part.wanted.offset - stretch.place.offset) as usize;
                let bytes = &bytes[from..from + part.wanted.length];
                samples.take(part, bytes);
                filler
                    .fill(part, bytes)
                    .map_err(|failure| placed(failure, &inputs[part.wanted.file]))?;
                if store.part_came(part.slot)
                    && let Some(writer) = snapshot
                {
                    writer.write(self.device, part.slot, &store);
                }
            }
            Ok(())
        };
        stream::stream(&inputs, &stretches, self.limits, &work, &mut |stretch| {
            meter.came(&plan.parts[stretch.pieces.clone()]);
        })?;
        let digest = samples.digest(&plan, &checkpoint);
        let outcome = finished(writer.take(), &digest);
        let fingerprint = self.fingerprint(&config, &digest);
        let model = assemble::assembled(self.device, config, self.options, store, fingerprint)?;
        Ok((model, plan.bytes(), outcome))
    }

    /// Tells a model, so loaded, from every other.
    fn fingerprint(&self, config: &ModelConfig, weights_digest: &str) -> String {
        let (config, options) = (config, self.options);
        hex::encode(Sha256::digest(format!("{config:?} {options:?} {weights_digest}")))
    }
}

/// Makes the written snapshot the current one, or says why there is none.
fn finished(writer: Option<Result<SnapshotWriter>>, weights_digest: &str) -> SnapshotOutcome {
    let written = match writer {
        None => return SnapshotOutcome::NotWanted,
        Some(writer) => writer.and_then(|writer| writer.finish(weights_digest)),
    };
    match written {
        Ok(path) => SnapshotOutcome::Written(path),
        Err(failure) => {
            tracing::warn!(%failure, "no snapshot was written; the next start quantises again");
            SnapshotOutcome::NotWritten(failure)
        }
    }
}

/// A failure of a part, with its file where it names none.
fn placed(failure: Failure, input: &stream::Input) -> Failure {
    match failure.place.is_empty() {
        true => failure.at(input.path.display().to_string()),
        false => failure,
    }
}

/// Reads all scales; they are a few thousandths of an FP8 checkpoint.
fn read_scales(plan: &Plan, inputs: &[stream::Input], limits: Limits, meter: &mut Meter<'_>) -> Result<Vec<Vec<f32>>> {
    let pieces: Vec<Wanted> = plan.scales.iter().map(|scales| scales.wanted).collect();
    let values: Vec<Mutex<Vec<f32>>> = pieces.iter().map(|_| Mutex::default()).collect();
    let work = |stretch: &Stretch, bytes: &[u8]| {
        for place in stretch.pieces.clone() {
            let scales = &plan.scales[place];
            let from = (scales.wanted.offset - stretch.place.offset) as usize;
            let bytes = &bytes[from..from + scales.wanted.length];
            if let Some(element) = first_non_finite(scales.stored, bytes) {
                return Err(Failure::user(
                    "MODEL_NON_FINITE",
                    format!(
                        "Element {element} of the tensor `{}` is infinite or not a number",
                        scales.name
                    ),
                )
                .at(inputs[scales.wanted.file].path.display().to_string())
                .hint("Download the checkpoint again; its weights are damaged"));
            }
            let mut decoded = vec![0.0; bytes.len() / scales.stored.size_bytes()];
            widen(scales.stored, bytes, &mut decoded)?;
            *values[place].lock().unwrap_or_else(PoisonError::into_inner) = decoded;
        }
        Ok(())
    };
    let stretches = stream::merged(&pieces);
    stream::stream(inputs, &stretches, limits, &work, &mut |stretch| {
        meter.read(
            plan.scales[stretch.pieces.clone()]
                .iter()
                .map(|scales| scales.wanted.length),
        );
    })?;
    Ok(values
        .into_iter()
        .map(|values| values.into_inner().unwrap_or_else(PoisonError::into_inner))
        .collect())
}

/// Counts what has been read, for the caller's progress.
struct Meter<'a> {
    progress: &'a mut dyn FnMut(LoadProgress),
    state: LoadProgress,
}

impl<'a> Meter<'a> {
    fn new(plan: &Plan, progress: &'a mut dyn FnMut(LoadProgress)) -> Self {
        Self {
            progress,
            state: LoadProgress {
                tensors: 0,
                tensors_total: plan.tensors.len(),
                bytes: 0,
                bytes_total: plan.bytes(),
                source: LoadSource::Checkpoint,
            },
        }
    }

    fn read(&mut self, lengths: impl Iterator<Item = usize>) {
        self.state.bytes += lengths.map(|length| length as u64).sum::<u64>();
        (self.progress)(self.state);
    }

    /// A tensor counts as loaded with its first part.
    fn came(&mut self, parts: &[Part]) {
        self.state.tensors += parts.iter().filter(|part| part.first == 0).count();
        self.read(parts.iter().map(|part| part.wanted.length));
    }
}

/// The beginning of each tensor, hashed.
struct Samples(Vec<Mutex<[u8; 32]>>);

impl Samples {
    fn new(tensors: usize) -> Self {
        Self((0..tensors).map(|_| Mutex::default()).collect())
    }

    fn take(&self, part: &Part, bytes: &[u8]) {
        if part.first == 0
            && let Some(sample) = self.0.get(part.tensor)
        {
            let beginning = &bytes[..bytes.len().min(FINGERPRINT_SAMPLE_BYTES)];
            *sample.lock().unwrap_or_else(PoisonError::into_inner) = Sha256::digest(beginning).into();
        }
    }

    /// SHA-256 over all headers and all samples, in hexadecimal.
    fn digest(self, plan: &Plan, checkpoint: &Checkpoint) -> String {
        let mut hash = Sha256::new_with_prefix(checkpoint.header_hash());
        for (name, sample) in plan.tensors.iter().zip(self.0) {
            hash.update(name);
            hash.update(sample.into_inner().unwrap_or_else(PoisonError::into_inner));
        }
        hex::encode(hash.finalize())
    }
}

/// Tensors this program has no use for are said, not passed over in silence.
fn report_unused(checkpoint: &Checkpoint, expected: &std::collections::BTreeSet<&str>) {
    let is_unused = |name: &&str| !expected.contains(name) && !expected.contains(name.trim_end_matches("_scale_inv"));
    let (predicting, unused): (Vec<&str>, Vec<&str>) = checkpoint
        .names()
        .filter(is_unused)
        .partition(|name| name.starts_with("mtp."));
    if !predicting.is_empty() {
        tracing::info!(
            count = predicting.len(),
            "the checkpoint's multi-token prediction layers (mtp.*) are not used: training predicts the next token"
        );
    }
    if let Some(first) = unused.first() {
        tracing::warn!(
            count = unused.len(),
            first,
            "the checkpoint holds tensors that this model does not use"
        );
    }
}
