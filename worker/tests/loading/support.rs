//! Small checkpoints of every kind, and loading them.

use std::path::{Path, PathBuf};

use brightrun_kernels::cpu::Cpu;
use brightrun_kernels::ops::Precision;
use brightrun_worker::error::Failure;
use brightrun_worker::model::load::snapshot::SnapshotSettings;
use brightrun_worker::model::load::stream::Limits;
use brightrun_worker::model::synthetic::{SyntheticDtype, SyntheticSettings, generate};
use brightrun_worker::model::{
    Batch, Encoding, Family, LoadOptions, LoadReport, LoadSettings, Model, ModelConfig, RopeFrequencies,
};
use tempfile::TempDir;

/// A model with every part: two layers of Gated DeltaNet with experts, in several shards.
pub fn checkpoint(dtype: SyntheticDtype) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), dtype, 3);
    folder
}

pub fn write(folder: &Path, dtype: SyntheticDtype, seed: u64) {
    let settings = SyntheticSettings {
        layers: Some(2),
        dtype,
        shard_bytes: 60_000,
        seed,
    };
    let text = ModelConfig::miniature(Family::Qwen3Next, 64).to_json();
    generate(folder, &text, &settings, &mut |_, _| {}).unwrap();
}

pub fn options(encoding: Encoding) -> LoadOptions {
    LoadOptions {
        encoding,
        precision: Precision::F32,
        rope_frequencies: RopeFrequencies::F32,
    }
}

/// Snapshots of everything, however small.
pub fn snapshots() -> SnapshotSettings {
    SnapshotSettings {
        smallest_checkpoint: 0,
        ..SnapshotSettings::default()
    }
}

pub fn load(
    folder: &Path,
    encoding: Encoding,
    snapshots: Option<SnapshotSettings>,
) -> Result<(Model<Cpu>, LoadReport), Failure> {
    let settings = LoadSettings {
        limits: Limits::default(),
        snapshots,
    };
    let device = Cpu::new(Some(1))?;
    Model::load_with(&device, folder, options(encoding), &settings, &mut |_| {})
}

pub fn failure(folder: &Path) -> Failure {
    load(folder, Encoding::Nf4, None).err().unwrap()
}

/// What the model says, to the last bit.
pub fn logits(model: &Model<Cpu>) -> Vec<f32> {
    model.logits(None, &Batch::prompt(&[1, 2, 3, 5, 8, 13])).unwrap()
}

/// The shards of a checkpoint, sorted.
pub fn shards(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let mut shards: Vec<PathBuf> = entries
        .filter(|path| path.extension().is_some_and(|ending| ending == "safetensors"))
        .collect();
    shards.sort();
    shards
}
