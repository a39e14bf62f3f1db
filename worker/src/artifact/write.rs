//! The artifact's folder appears complete or not at all.
//!
//! Everything is written into a sibling folder and made durable; then the two change places in one
//! step. An interrupted write leaves at most the sibling, which the next attempt removes.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;
use serde::Serialize;
use sha2::{Digest, Sha256};

use super::adapter_config::AdapterConfig;
use super::input::ArtifactInput;
use super::manifest::{AdapterRecord, FileRecord, Manifest, SCHEMA_VERSION};
use super::model_card::model_card;
use super::tensors::{AdapterDtype, AdapterTensor};
use super::verify::Verification;
use super::{CONFIG, MANIFEST, METRICS, MODEL_CARD, SAMPLES, VALIDATION, WEIGHTS, artifact_id, tensors};
use crate::error::{Failure, Result};
use crate::storage::disk_failure;
use crate::storage::name::sanitized_file_name;
use crate::template::PassedFile;

/// A written artifact.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ArtifactFiles {
    /// The folder.
    pub dir: PathBuf,
    /// Every file in it, sorted by name, the manifest included.
    pub files: Vec<ArtifactFile>,
}

/// One file of an artifact.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ArtifactFile {
    /// Name within the folder.
    pub name: String,
    /// Size in bytes.
    pub bytes: u64,
    /// SHA-256 of the content, lower-case hexadecimal.
    pub sha256: String,
}

impl ArtifactFiles {
    /// Sum of all sizes in bytes.
    pub fn total_bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes).sum()
    }
}

/// Writes the artifact of a run to `dir`, replacing an earlier attempt's.
///
/// Fails before anything is written when the tensors do not fit the configuration (`ADAPTER_…`), and
/// with `STORAGE_DISK_FULL` or `STORAGE_FOLDER_UNWRITABLE` when the disk refuses; `dir` is then as before.
pub fn write(dir: &Path, input: &ArtifactInput<'_>) -> Result<ArtifactFiles> {
    let config = AdapterConfig::new(&input.adapter, &input.base)?;
    let shapes = tensors::shapes_of(&input.tensors)?;
    tensors::check_layout(&config, &shapes)?;
    let copies = copies(&input.copied_files)?;

    let partial = sibling(dir)?;
    remove_folder(&partial)?;
    fs::create_dir_all(&partial).map_err(|error| disk_failure(&error, &partial))?;
    let written = write_into(&partial, input, &config, &shapes, &copies).and_then(|files| {
        swap(&partial, dir)?;
        Ok(ArtifactFiles {
            dir: dir.to_path_buf(),
            files,
        })
    });
    // After a swap this is the earlier attempt; after a failure, the unfinished one.
    let removed = remove_folder(&partial);
    let written = written?;
    removed.map(|()| written)
}

/// Adds the result of [`verify`](super::verify()) to the manifest, in one step.
pub fn record_verification(dir: &Path, verification: &Verification) -> Result<ArtifactFiles> {
    let mut manifest = super::verify::read_manifest(dir)?;
    manifest.verification = Some(verification.clone());
    let temporary = dir.join(format!(".{MANIFEST}.partial"));
    write_file(&temporary, &pretty(&manifest)?)?;
    let target = dir.join(MANIFEST);
    fs::rename(&temporary, &target)
        .and_then(|()| sync_folder(dir))
        .map_err(|error| disk_failure(&error, &target))?;
    let mut names: BTreeSet<String> = manifest.files.into_keys().collect();
    names.insert(MANIFEST.to_owned());
    Ok(ArtifactFiles {
        dir: dir.to_path_buf(),
        files: hash_files(dir, &names)?,
    })
}

/// Writes the two files that make an adapter, weights and description, into a folder that exists: what PEFT and servers load,
/// without the papers of a run.
///
/// # Errors
/// `ADAPTER_…` when the tensors do not fit the description, before anything is written; `STORAGE_…`.
pub fn write_adapter(
    dir: &Path,
    config: &AdapterConfig,
    values: &[AdapterTensor<'_>],
    dtype: AdapterDtype,
) -> Result<()> {
    tensors::check_layout(config, &tensors::shapes_of(values)?)?;
    tensors::save(values, dtype, &dir.join(WEIGHTS))?;
    sync_file(&dir.join(WEIGHTS))?;
    write_file(&dir.join(CONFIG), &pretty(config)?)
}

fn write_into(
    dir: &Path,
    input: &ArtifactInput<'_>,
    config: &AdapterConfig,
    shapes: &tensors::Shapes,
    copies: &BTreeMap<String, &PassedFile>,
) -> Result<Vec<ArtifactFile>> {
    write_adapter(dir, config, &input.tensors, input.adapter.dtype)?;
    write_file(&dir.join(METRICS), &lines(input.points)?)?;
    write_file(&dir.join(VALIDATION), &lines(input.issues)?)?;
    write_file(&dir.join(MODEL_CARD), model_card(input, config).as_bytes())?;
    if !input.samples.is_empty() {
        write_file(&dir.join(SAMPLES), &lines(input.samples)?)?;
    }
    for (name, source) in copies {
        copy_unchanged(source, &dir.join(name))?;
    }
    let mut names: BTreeSet<String> = copies.keys().cloned().collect();
    names.extend([WEIGHTS, CONFIG, METRICS, VALIDATION, MODEL_CARD].map(str::to_owned));
    names.extend((!input.samples.is_empty()).then(|| SAMPLES.to_owned()));
    let mut files = hash_files(dir, &names)?;

    write_file(&dir.join(MANIFEST), &pretty(&manifest(input, shapes, &files))?)?;
    files.extend(hash_files(dir, &BTreeSet::from([MANIFEST.to_owned()]))?);
    files.sort_by(|one, other| one.name.cmp(&other.name));
    sync_folder(dir).map_err(|error| disk_failure(&error, dir))?;
    Ok(files)
}

fn manifest(input: &ArtifactInput<'_>, shapes: &tensors::Shapes, files: &[ArtifactFile]) -> Manifest {
    let record = |file: &ArtifactFile| {
        let record = FileRecord {
            bytes: file.bytes,
            sha256: file.sha256.clone(),
        };
        (file.name.clone(), record)
    };
    Manifest {
        schema_version: SCHEMA_VERSION,
        artifact_id: artifact_id(input.job_id),
        job_id: input.job_id,
        created_at: input.created_at,
        program: input.program.clone(),
        base: input.base.clone(),
        spec: input.spec.clone(),
        seed: input.spec.seed,
        adapter: AdapterRecord {
            dtype: input.adapter.dtype,
            parameters: input.tensors.iter().map(|tensor| tensor.data.len() as u64).sum(),
            tensors: shapes.clone(),
        },
        data: input.data.clone(),
        template_sha256: input.template_sha256.clone(),
        metrics: input.metrics.clone(),
        proof: input.proof.clone(),
        loss_tolerance: input.adapter.dtype.loss_tolerance(),
        verification: None,
        warnings: input.warnings.clone(),
        files: files.iter().map(record).collect(),
    }
}

/// The files to copy, by the name they get. A name of the artifact's own, or one twice, is refused.
fn copies(sources: &[PassedFile]) -> Result<BTreeMap<String, &PassedFile>> {
    let mut copies = BTreeMap::new();
    for source in sources {
        let name = source
            .path
            .file_name()
            .map(|name| sanitized_file_name(&name.to_string_lossy()));
        let name = name.unwrap_or_default();
        let is_ours = [WEIGHTS, CONFIG, MANIFEST, METRICS, VALIDATION, MODEL_CARD, SAMPLES].contains(&name.as_str());
        if name.is_empty() || is_ours || copies.insert(name.clone(), source).is_some() {
            return Err(Failure::system(
                "ARTIFACT_NAME_TAKEN",
                format!("The file name `{name}` is already used in the artifact"),
            )
            .at(format!("`{}`", source.path.display())));
        }
    }
    Ok(copies)
}

/// Copies a file that must still be what was used.
fn copy_unchanged(source: &PassedFile, target: &Path) -> Result<()> {
    fs::copy(&source.path, target).map_err(|error| disk_failure(&error, &source.path))?;
    sync_file(target)?;
    let (_, sha256) = hash_file(target).map_err(|error| disk_failure(&error, target))?;
    if sha256 == source.sha256 {
        return Ok(());
    }
    Err(
        Failure::system("TOKENIZER_CHANGED", "A tokenizer file changed while the job ran")
            .at(format!("`{}`", source.path.display()))
            .hint("Do not write into a model folder that is in use"),
    )
}

/// Two-space JSON with a final newline, as Python's tools write it.
fn pretty(value: &impl Serialize) -> Result<Vec<u8>> {
    let mut text = serde_json::to_vec_pretty(value).map_err(unserialisable)?;
    text.push(b'\n');
    Ok(text)
}

/// One JSON value a line. Numbers that are not finite become null, as JSON has no others.
fn lines<Line: Serialize>(values: &[Line]) -> Result<Vec<u8>> {
    let mut text = Vec::new();
    for value in values {
        serde_json::to_writer(&mut text, value).map_err(unserialisable)?;
        text.push(b'\n');
    }
    Ok(text)
}

#[allow(clippy::needless_pass_by_value, reason = "the shape that map_err wants")]
fn unserialisable(error: serde_json::Error) -> Failure {
    Failure::system(
        "ARTIFACT_UNSERIALISABLE",
        format!("A value cannot be written as JSON: {error}"),
    )
}

fn write_file(path: &Path, content: &[u8]) -> Result<()> {
    let written = File::create(path).and_then(|mut file| {
        file.write_all(content)?;
        file.sync_all()
    });
    written.map_err(|error| disk_failure(&error, path))
}

fn sync_file(path: &Path) -> Result<()> {
    let synced = File::open(path).and_then(|file| file.sync_all());
    synced.map_err(|error| disk_failure(&error, path))
}

fn sync_folder(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// Reads the files back from the disk, so that the recorded hashes are those of what is stored.
fn hash_files(dir: &Path, names: &BTreeSet<String>) -> Result<Vec<ArtifactFile>> {
    let hash = |name: &String| {
        let path = dir.join(name);
        let (bytes, sha256) = hash_file(&path).map_err(|error| disk_failure(&error, &path))?;
        Ok(ArtifactFile {
            name: name.clone(),
            bytes,
            sha256,
        })
    };
    names.iter().map(hash).collect()
}

/// Size and SHA-256 of a file.
pub(super) fn hash_file(path: &Path) -> io::Result<(u64, String)> {
    let mut file = File::open(path)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    let mut bytes = 0;
    loop {
        let read = file.read(&mut buffer)?;
        let Some(chunk) = buffer.get(..read).filter(|chunk| !chunk.is_empty()) else {
            return Ok((bytes, hex::encode(hasher.finalize())));
        };
        hasher.update(chunk);
        bytes += read as u64;
    }
}

/// `.{name}.partial` beside `dir`.
fn sibling(dir: &Path) -> Result<PathBuf> {
    let name = dir.file_name().ok_or_else(|| {
        Failure::system("ARTIFACT_FOLDER_INVALID", "The artifact's folder has no name")
            .at(format!("`{}`", dir.display()))
    })?;
    let mut partial = OsString::from(".");
    partial.push(name);
    partial.push(".partial");
    Ok(dir.with_file_name(partial))
}

fn remove_folder(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(disk_failure(&error, dir)),
        _ => Ok(()),
    }
}

/// Puts `partial` in the place of `dir`. An existing `dir` and `partial` change places in one step
/// where the file system can; elsewhere there is a moment without either, never one with a mixture.
fn swap(partial: &Path, dir: &Path) -> Result<()> {
    let swapped = if dir.exists() {
        exchange(partial, dir)
    } else {
        fs::rename(partial, dir)
    };
    let parent = dir
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    swapped
        .and_then(|()| sync_folder(parent))
        .map_err(|error| disk_failure(&error, dir))
}

fn exchange(partial: &Path, dir: &Path) -> io::Result<()> {
    match renameat_with(CWD, partial, CWD, dir, RenameFlags::EXCHANGE) {
        Ok(()) => Ok(()),
        Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => {
            fs::remove_dir_all(dir)?;
            fs::rename(partial, dir)
        }
        Err(error) => Err(error.into()),
    }
}
