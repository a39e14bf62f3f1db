//! `brightrun snapshot`: the quantised weights that lie beside a checkpoint.

use std::path::PathBuf;

use brightrun_kernels::Backend;
use clap::{Args, Subcommand};
use serde_json::json;

use super::BaseDtypeChoice;
use super::device::on_device;
use super::model::{byte_bar, load_with, model_folder};
use super::output::{self, print_json, print_line};
use crate::config::Config;
use crate::error::{Failure, Result};
use crate::model::load::snapshot::{Listed, Snapshot, SnapshotSettings, folder, listed};
use crate::model::load::stream::Limits;
use crate::model::{LoadSettings, LoadSource, SnapshotOutcome};
use crate::recipe::Base;

/// `snapshot`.
#[derive(Debug, Args)]
pub struct SnapshotArguments {
    /// What to do.
    #[command(subcommand)]
    pub action: SnapshotAction,
    /// Checkpoint [setting: model.path]
    #[arg(long, value_name = "DIR", global = true)]
    pub model: Option<PathBuf>,
    /// Print JSON instead of text
    #[arg(long, global = true)]
    pub json: bool,
}

/// What `snapshot` does.
#[derive(Debug, Subcommand)]
pub enum SnapshotAction {
    /// Load the checkpoint and write its snapshot, or load the snapshot where a valid one is there
    Build {
        /// How the weights are kept
        #[arg(long, value_enum, default_value_t = BaseDtypeChoice::Nf4)]
        base_dtype: BaseDtypeChoice,
        /// Load as if snapshots were off: for comparing
        #[arg(long)]
        without_snapshot: bool,
    },
    /// List snapshots with their size and state
    Ls,
    /// Read every snapshot and compare it with its hashes
    Verify,
    /// Remove a snapshot by its name, or all
    Rm {
        /// Its name, as `ls` shows it
        #[arg(required_unless_present = "all")]
        name: Option<String>,
        /// Every snapshot of this checkpoint's folder, unfinished ones included
        #[arg(long, conflicts_with = "name")]
        all: bool,
    },
}

/// `brightrun snapshot`.
pub fn snapshot(config: &Config, arguments: &SnapshotArguments) -> Result<()> {
    match &arguments.action {
        SnapshotAction::Build {
            base_dtype,
            without_snapshot,
        } => build(config, arguments, *base_dtype, *without_snapshot),
        SnapshotAction::Ls => list(&all(config, arguments)?, arguments.json),
        SnapshotAction::Verify => verify(&all(config, arguments)?, arguments.json),
        SnapshotAction::Rm { name, .. } => remove(&all(config, arguments)?, name.as_deref(), arguments.json),
    }
}

/// Snapshots are asked for here, whatever the settings say of when they are made by themselves.
fn settings(config: &Config) -> SnapshotSettings {
    SnapshotSettings {
        smallest_checkpoint: 0,
        ..config.model.snapshot_settings().unwrap_or_default()
    }
}

fn all(config: &Config, arguments: &SnapshotArguments) -> Result<Vec<Listed>> {
    let model = model_folder(arguments.model.as_ref(), config)?;
    Ok(listed(&folder::folder_of(&model, &settings(config))))
}

fn build(config: &Config, arguments: &SnapshotArguments, dtype: BaseDtypeChoice, without: bool) -> Result<()> {
    let model = model_folder(arguments.model.as_ref(), config)?;
    let load = LoadSettings {
        limits: Limits::default(),
        snapshots: (!without).then(|| settings(config)),
    };
    on_device!(config, |device| {
        let base = load_with(&device, &model, dtype.into(), &load)?;
        built(&base, arguments)
    })
}

fn built<B: Backend>(base: &Base<B>, arguments: &SnapshotArguments) -> Result<()> {
    let report = &base.report;
    if let SnapshotOutcome::NotWritten(failure) = &report.snapshot {
        return Err(failure.clone());
    }
    let weights: u64 = base.model.weight_bytes().values().sum();
    if arguments.json {
        return print_json(&json!({
            "source": match report.source { LoadSource::Checkpoint => "checkpoint", LoadSource::Snapshot => "snapshot" },
            "snapshot": match &report.snapshot {
                SnapshotOutcome::Written(path) | SnapshotOutcome::Used(path) => Some(path),
                _ => None,
            },
            "bytes_read": report.bytes, "seconds": report.seconds, "weight_bytes": weights,
            "weights": base.model.weight_bytes(), "fingerprint": base.model.fingerprint(),
            "peak_resident_bytes": peak_resident_bytes(),
        }));
    }
    let what = match &report.snapshot {
        SnapshotOutcome::Written(path) => format!("snapshot written to {}", path.display()),
        SnapshotOutcome::Used(path) => format!("from the snapshot {}", path.display()),
        _ => "no snapshot".to_owned(),
    };
    print_line(&format!(
        "{} read in {} ({}/s), {} of weights; {what}",
        output::bytes(report.bytes),
        output::duration(report.seconds),
        output::bytes((report.bytes as f64 / report.seconds.max(1e-3)) as u64),
        output::bytes(weights)
    ))
}

/// The most memory this process ever had, where the system tells.
fn peak_resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kibibytes: u64 = line.trim().trim_end_matches("kB").trim().parse().ok()?;
    Some(1024 * kibibytes)
}

fn list(snapshots: &[Listed], json: bool) -> Result<()> {
    if json {
        return print_json(&json!({ "snapshots": snapshots }));
    }
    if snapshots.is_empty() {
        return print_line("No snapshots");
    }
    for snapshot in snapshots {
        print_line(&format!(
            "{:<10} {:>9}  unused for {:<12} {}",
            snapshot.state,
            output::bytes(snapshot.bytes),
            output::duration(snapshot.unused_seconds as f64),
            snapshot.name
        ))?;
    }
    Ok(())
}

fn verify(snapshots: &[Listed], json: bool) -> Result<()> {
    let mut verified = Vec::new();
    for snapshot in snapshots.iter().filter(|snapshot| snapshot.state != "unfinished") {
        let bar = byte_bar("verifying");
        let checked = Snapshot::open(&snapshot.path).and_then(|opened| {
            opened.verify(Limits::default(), &mut |progress| {
                bar.set_length(progress.bytes_total);
                bar.set_position(progress.bytes);
            })
        });
        bar.finish_and_clear();
        checked?;
        verified.push(&snapshot.name);
        if !json {
            print_line(&format!("{} is whole", snapshot.name))?;
        }
    }
    match json {
        true => print_json(&json!({ "verified": verified })),
        false => Ok(()),
    }
}

fn remove(snapshots: &[Listed], name: Option<&str>, json: bool) -> Result<()> {
    let chosen: Vec<&Listed> = snapshots
        .iter()
        .filter(|snapshot| name.is_none_or(|name| snapshot.name == name))
        .collect();
    if let (Some(name), true) = (name, chosen.is_empty()) {
        return Err(
            Failure::user("SNAPSHOT_UNKNOWN", format!("There is no snapshot `{name}`"))
                .hint("`brightrun snapshot ls` lists them"),
        );
    }
    let mut bytes = 0;
    for snapshot in &chosen {
        std::fs::remove_file(&snapshot.path).map_err(|error| {
            Failure::system(
                "SNAPSHOT_NOT_REMOVED",
                format!("The snapshot cannot be removed: {error}"),
            )
            .at(snapshot.path.display().to_string())
        })?;
        bytes += snapshot.bytes;
    }
    let names: Vec<&str> = chosen.iter().map(|snapshot| snapshot.name.as_str()).collect();
    match json {
        true => print_json(&json!({ "removed": names, "bytes": bytes })),
        false => print_line(&format!(
            "{} snapshots removed, {} freed",
            names.len(),
            output::bytes(bytes)
        )),
    }
}
