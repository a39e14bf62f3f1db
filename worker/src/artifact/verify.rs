//! The saved files, read again, are what the run produced.
//!
//! Nothing in memory is trusted: hashes are recomputed from the disk, the weights are read value by
//! value, and the caller recomputes the loss from the folder alone. Each way in which files can be
//! wrong has its own code.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::adapter_config::AdapterConfig;
use super::manifest::{FileRecord, Manifest, SCHEMA_VERSION};
use super::tensors::{self, Scan};
use super::write::hash_file;
use super::{CONFIG, MANIFEST, WEIGHTS};
use crate::error::{Failure, Result};
use crate::storage::disk_failure;

/// What reloading found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Verification {
    /// The loss recorded before saving.
    pub recorded_loss: f64,
    /// The loss of the reloaded files.
    pub recomputed_loss: f64,
    /// How far apart the two may lie.
    pub tolerance: f64,
    /// Number of files whose hash was checked.
    pub files: usize,
    /// Number of tensors read.
    pub tensors: usize,
    /// Number of values read; all are finite.
    pub parameters: u64,
    /// B tensors that are still zero: modules that learnt nothing. Not all of them are.
    pub untrained: Vec<String>,
}

/// Checks the artifact in `dir`; `recompute` loads the adapter from that folder and returns the mean
/// loss per supervised token on the examples of the manifest's proof.
pub fn verify(dir: &Path, recompute: impl FnOnce(&Path) -> Result<f64>) -> Result<Verification> {
    let manifest = read_manifest(dir)?;
    check_files(dir, &manifest)?;
    let config = read_config(dir, &manifest)?;
    let scan = tensors::scan(&dir.join(WEIGHTS))?;
    check_tensors(&scan, &manifest, &config)?;
    let recomputed_loss = recompute(dir)?;
    check_loss(&manifest, recomputed_loss)?;
    Ok(Verification {
        recorded_loss: manifest.proof.loss,
        recomputed_loss,
        tolerance: manifest.loss_tolerance,
        files: manifest.files.len(),
        tensors: scan.shapes.len(),
        parameters: scan.parameters,
        untrained: scan.zero_b,
    })
}

/// Reads and understands `manifest.json`.
pub(super) fn read_manifest(dir: &Path) -> Result<Manifest> {
    let path = dir.join(MANIFEST);
    let invalid = |why: String| {
        Failure::system(
            "ARTIFACT_MANIFEST_INVALID",
            format!("The artifact's manifest cannot be used: {why}"),
        )
        .at(format!("`{}`", path.display()))
        .hint("Choose the folder that a finished run wrote, or run the job again")
    };
    let text = fs::read(&path).map_err(|error| invalid(error.to_string()))?;
    let manifest: Manifest = serde_json::from_slice(&text).map_err(|error| invalid(error.to_string()))?;
    if manifest.schema_version != SCHEMA_VERSION {
        return Err(invalid(format!(
            "it has version {}, known is {SCHEMA_VERSION}",
            manifest.schema_version
        )));
    }
    let leaves_folder = |name: &String| name.contains(['/', '\\']) || matches!(name.as_str(), "" | "." | "..");
    if let Some(name) = manifest.files.keys().find(|name| leaves_folder(name)) {
        return Err(invalid(format!("{name:?} is not a file name")));
    }
    let missing = [WEIGHTS, CONFIG]
        .into_iter()
        .find(|name| !manifest.files.contains_key(*name));
    match missing {
        Some(name) => Err(invalid(format!("it does not list {name}"))),
        None => Ok(manifest),
    }
}

fn check_files(dir: &Path, manifest: &Manifest) -> Result<()> {
    let entries = fs::read_dir(dir).map_err(|error| disk_failure(&error, dir))?;
    let mut present = BTreeSet::new();
    for entry in entries {
        let entry = entry.map_err(|error| disk_failure(&error, dir))?;
        present.insert(entry.file_name().to_string_lossy().into_owned());
    }
    for (name, record) in &manifest.files {
        check_file(dir, name, record, present.remove(name))?;
    }
    present.remove(MANIFEST);
    match present.first() {
        Some(name) => Err(damaged(
            "ARTIFACT_FILE_UNEXPECTED",
            "A file is not listed in the manifest",
            name,
        )),
        None => Ok(()),
    }
}

fn check_file(dir: &Path, name: &str, record: &FileRecord, is_present: bool) -> Result<()> {
    if !is_present {
        return Err(damaged(
            "ARTIFACT_FILE_MISSING",
            "A file of the artifact is missing",
            name,
        ));
    }
    let path = dir.join(name);
    let (bytes, sha256) = hash_file(&path).map_err(|error| disk_failure(&error, &path))?;
    if bytes != record.bytes {
        let message = format!("The file has {bytes} bytes where the manifest says {}", record.bytes);
        return Err(damaged("ARTIFACT_SIZE_MISMATCH", &message, name));
    }
    if sha256 != record.sha256 {
        let message = "The file's content is not what the manifest's hash says";
        return Err(damaged("ARTIFACT_HASH_MISMATCH", message, name));
    }
    Ok(())
}

fn damaged(code: &str, message: &str, name: &str) -> Failure {
    Failure::system(code, message)
        .at(format!("`{name}`"))
        .hint("Do not use these files; fetch the artifact again or run the job again")
}

fn read_config(dir: &Path, manifest: &Manifest) -> Result<AdapterConfig> {
    let path = dir.join(CONFIG);
    let invalid = |why: &str| {
        Failure::system(
            "ADAPTER_CONFIG_INVALID",
            format!("The adapter's configuration cannot be used: {why}"),
        )
        .at(format!("`{}`", path.display()))
    };
    let text = fs::read(&path).map_err(|error| disk_failure(&error, &path))?;
    let config: AdapterConfig = serde_json::from_slice(&text).map_err(|error| invalid(&error.to_string()))?;
    if config.peft_type != "LORA" || config.use_dora || config.use_rslora || config.bias != "none" {
        return Err(invalid("it describes something other than plain LoRA"));
    }
    if config.base_model_name_or_path != manifest.base.id {
        return Err(invalid("it names another base model than the manifest"));
    }
    if config.r != manifest.spec.rank {
        return Err(invalid("it has another rank than the manifest"));
    }
    Ok(config)
}

fn check_tensors(scan: &Scan, manifest: &Manifest, config: &AdapterConfig) -> Result<()> {
    let expected = &manifest.adapter.tensors;
    for (name, shape) in expected {
        match scan.shapes.get(name) {
            None => return Err(tensors::missing(name)),
            Some(found) if found != shape => {
                return Err(tensors::wrong_shape(name, found, &format!("the manifest's {shape:?}")));
            }
            Some(_) => {}
        }
    }
    if let Some(name) = scan.shapes.keys().find(|name| !expected.contains_key(*name)) {
        return Err(tensors::unexpected(name, "the manifest does not list"));
    }
    tensors::check_layout(config, &scan.shapes)?;
    if scan.zero_b.len() as u64 == scan.b_tensors {
        return Err(
            Failure::system("ADAPTER_UNTRAINED", "Every B is zero: the adapter changes nothing")
                .hint("Check that the learning rate is above 0 and that more than a warm-up step was made"),
        );
    }
    Ok(())
}

fn check_loss(manifest: &Manifest, recomputed: f64) -> Result<()> {
    let recorded = manifest.proof.loss;
    // Written so that a loss that is no number fails.
    if (recomputed - recorded).abs() <= manifest.loss_tolerance {
        return Ok(());
    }
    Err(Failure::system(
        "ARTIFACT_LOSS_MISMATCH",
        format!(
            "The reloaded adapter has a loss of {recomputed:.6} where {recorded:.6} was recorded (tolerance {:e})",
            manifest.loss_tolerance
        ),
    )
    .hint("The saved adapter is not the trained one; run the job again and report this"))
}
