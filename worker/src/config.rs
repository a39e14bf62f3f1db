//! Settings of the program, from flags, environment and file.
//!
//! One precedence everywhere: **flags, then environment, then file, then defaults**. The file is
//! TOML, found by `--config`, else `BRIGHTRUN_CONFIG`, else `./brightrun.toml` if it exists. The
//! environment variable of `section.key` is `BRIGHTRUN_SECTION_KEY`, for instance
//! `BRIGHTRUN_TRAIN_RANK=8`. A key that does not exist is refused, with the nearest one that does.
//!
//! Credentials have no place in the file: they come from the environment only (`DATABASE_URL`, and
//! those named in [`crate::storage`]).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{Failure, Result};
use crate::model::load::snapshot::SnapshotSettings;
use crate::model::load::stream::Limits;
use crate::model::{LoadSettings, ModelRoots};
use crate::orchestrator::settings::OrchestratorSettings;
use crate::secret::Secret;
use crate::spec::TrainSpec;

/// All settings, resolved.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The base model.
    pub model: ModelSettings,
    /// The worker process.
    pub worker: WorkerSettings,
    /// Where datasets and adapters live.
    pub storage: StorageSettings,
    /// Defaults of a training run; a job's own values win.
    pub train: TrainSpec,
    /// Price of one GPU hour in dollars by the app's GPU type.
    pub prices: Prices,
    /// Pushing jobs to RunPod.
    pub orchestrator: OrchestratorSettings,
}

/// Which base model is trained.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ModelSettings {
    /// Folder of the checkpoint. A configured folder that is missing is an error, never a download. Without one, `base_model` is
    /// looked for on the volumes and in hub caches.
    pub path: Option<PathBuf>,
    /// Name recorded in jobs and adapters when a job does not name one.
    pub base_model: String,
    /// Names a job may ask for, besides `base_model`. All of them mean the checkpoint at `path`.
    pub aliases: Vec<String>,
    /// Whether quantised weights are kept beside the checkpoint, so that the next start reads a quarter as much.
    pub snapshots: bool,
    /// Folder of the snapshots; `.brightrun` in the checkpoint's own when absent.
    pub snapshot_folder: Option<PathBuf>,
    /// Checkpoints below this many bytes get no snapshot.
    pub snapshot_smallest_bytes: u64,
    /// Most bytes of all snapshots in their folder, the longest unused go first; 0 sets no bound.
    pub snapshot_limit_bytes: u64,
}

/// How the worker process behaves.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WorkerSettings {
    /// Jobs at a time.
    pub slots: usize,
    /// What computes: `auto`, `cpu`, `cuda` or `emulated`.
    pub device: DeviceChoice,
    /// CPU threads of the compute backend; 0 means one per core.
    pub threads: usize,
    /// Folder for checkpoints and downloads. Put it on the network volume, so that another worker can resume.
    pub work_dir: PathBuf,
    /// A job whose worker is silent for this long is given to another one.
    pub lease_seconds: u64,
    /// Seconds between heartbeats.
    pub heartbeat_seconds: u64,
    /// Longest wait between two looks at the queue when no notification arrives.
    pub poll_seconds: u64,
    /// Accept `http://` addresses of this machine as the data set of a whole RunPod job: for tests.
    pub loopback_datasets: bool,
}

/// What computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceChoice {
    /// The first NVIDIA GPU, where there is one and it has every operation; otherwise the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// The first NVIDIA GPU.
    Cuda,
    /// The GPU's kernels on the CPU: for tests, and very slow.
    Emulated,
}

/// Where files live.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StorageSettings {
    /// `local:FOLDER`, `supabase` or `s3`.
    pub location: String,
    /// Bucket of finished adapters.
    pub models_bucket: String,
}

/// Dollars per GPU hour.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Prices(pub BTreeMap<String, f64>);

impl Default for ModelSettings {
    fn default() -> Self {
        Self {
            path: None,
            base_model: "Qwen/Qwen3-Next-80B-A3B-Instruct".to_owned(),
            aliases: Vec::new(),
            snapshots: true,
            snapshot_folder: None,
            snapshot_smallest_bytes: SnapshotSettings::default().smallest_checkpoint,
            snapshot_limit_bytes: 0,
        }
    }
}

impl ModelSettings {
    /// The checkpoint's folder: at `path`, or where `base_model` lies on this machine.
    ///
    /// # Errors
    /// As [`ModelRoots::locate`].
    pub fn locate(&self) -> Result<PathBuf> {
        ModelRoots::of_environment().locate(self.path.as_deref(), &self.base_model)
    }

    /// Whether and where snapshots are kept.
    pub fn snapshot_settings(&self) -> Option<SnapshotSettings> {
        self.snapshots.then(|| SnapshotSettings {
            folder: self.snapshot_folder.clone(),
            smallest_checkpoint: self.snapshot_smallest_bytes,
            largest_folder: (self.snapshot_limit_bytes > 0).then_some(self.snapshot_limit_bytes),
            ..SnapshotSettings::default()
        })
    }

    /// How models are loaded.
    pub fn load_settings(&self) -> LoadSettings {
        LoadSettings {
            limits: Limits::default(),
            snapshots: self.snapshot_settings(),
        }
    }
}

impl Default for WorkerSettings {
    fn default() -> Self {
        Self {
            slots: 1,
            device: DeviceChoice::default(),
            threads: 0,
            work_dir: PathBuf::from(".brightrun/work"),
            lease_seconds: 120,
            heartbeat_seconds: 10,
            poll_seconds: 5,
            loopback_datasets: false,
        }
    }
}

impl Default for StorageSettings {
    fn default() -> Self {
        Self {
            location: "local:.brightrun/storage".to_owned(),
            models_bucket: "lora-models".to_owned(),
        }
    }
}

impl Default for Prices {
    /// The table of the app's estimate API.
    fn default() -> Self {
        Self(
            [
                ("A100-80GB", 3.50),
                ("A100-40GB", 2.80),
                ("H100", 4.20),
                ("V100-32GB", 2.10),
            ]
            .map(|(name, dollars)| (name.to_owned(), dollars))
            .into(),
        )
    }
}

impl Prices {
    /// Dollars per hour of one `gpu_type`; 0 for a type without a price, so that cost stays finite.
    pub fn per_hour(&self, gpu_type: &str) -> f64 {
        self.0
            .get(gpu_type)
            .copied()
            .filter(|price| price.is_finite() && *price >= 0.0)
            .unwrap_or(0.0)
    }
}

impl WorkerSettings {
    /// Threads of the compute backend, `None` for one per core.
    pub fn backend_threads(&self) -> Option<usize> {
        (self.threads > 0).then_some(self.threads)
    }
}

impl Config {
    /// Resolves file and environment; flags are laid over the result by the command line.
    ///
    /// # Errors
    /// `CONFIG_*`: an unreadable file, an unknown key (with a suggestion), a value of the wrong type or out of range.
    pub fn load(file: Option<&Path>, environment: impl Iterator<Item = (String, String)>) -> Result<Self> {
        let known = serde_json::to_value(Self::default()).map_err(unencodable)?;
        let mut settings = known.clone();
        if let Some((path, text)) = read_file(file)? {
            let place = path.display().to_string();
            let value: Value = toml::from_str(&text).map_err(|error| {
                Failure::user(
                    "CONFIG_INVALID",
                    format!("The configuration is not valid TOML: {}", error.message()),
                )
                .at(&place)
            })?;
            overlay(&mut settings, value, &known, "", &place)?;
        }
        for (name, text) in environment {
            if let Some(path) = environment_path(&name, &known)? {
                set(&mut settings, &path, parse_scalar(&text));
            }
        }
        let config: Self = serde_json::from_value(settings).map_err(|error| {
            Failure::user(
                "CONFIG_INVALID",
                format!("The configuration has a value of the wrong type: {error}"),
            )
        })?;
        config.train.check()?;
        config.worker.check()?;
        config.orchestrator.check()?;
        Ok(config)
    }
}

impl WorkerSettings {
    fn check(&self) -> Result<()> {
        if self.slots == 0 || self.heartbeat_seconds == 0 || self.poll_seconds == 0 {
            return Err(Failure::user(
                "CONFIG_OUT_OF_RANGE",
                "worker.slots, worker.heartbeat_seconds and worker.poll_seconds must be at least 1",
            ));
        }
        if self.lease_seconds < 3 * self.heartbeat_seconds {
            return Err(Failure::user(
                "CONFIG_OUT_OF_RANGE",
                "worker.lease_seconds must be at least three times worker.heartbeat_seconds, or a late heartbeat loses the job",
            ));
        }
        Ok(())
    }
}

/// The database's address, from `DATABASE_URL` (or its documented aliases).
///
/// # Errors
/// `CONFIG_MISSING` when none is set.
pub fn database_url() -> Result<Secret> {
    ["DATABASE_URL", "SUPABASE_DB_URL", "POSTGRES_URL"]
        .iter()
        .find_map(|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
        .map(Secret::new)
        .ok_or_else(|| {
            Failure::user("CONFIG_MISSING", "No database is configured")
                .at("environment variable `DATABASE_URL`")
                .hint("Set it to postgres://user:password@host:5432/database")
        })
}

fn unencodable(error: serde_json::Error) -> Failure {
    Failure::system(
        "CONFIG_INTERNAL",
        format!("The default configuration cannot be encoded: {error}"),
    )
}

fn read_file(explicit: Option<&Path>) -> Result<Option<(PathBuf, String)>> {
    let named = explicit
        .map(Path::to_path_buf)
        .or_else(|| std::env::var_os("BRIGHTRUN_CONFIG").map(PathBuf::from));
    let path = match named {
        Some(path) => path,
        None if Path::new("brightrun.toml").exists() => PathBuf::from("brightrun.toml"),
        None => return Ok(None),
    };
    match std::fs::read_to_string(&path) {
        Ok(text) => Ok(Some((path, text))),
        Err(error) => Err(Failure::user(
            "CONFIG_UNREADABLE",
            format!("The configuration file cannot be read: {error}"),
        )
        .at(path.display().to_string())),
    }
}

/// Keys below these are data, not settings.
const OPEN_MAPS: [&str; 1] = ["prices"];

fn overlay(target: &mut Value, source: Value, known: &Value, path: &str, place: &str) -> Result<()> {
    let (Value::Object(source), Value::Object(known)) = (source, known) else {
        return Err(Failure::user("CONFIG_INVALID", format!("`{path}` must be a table")).at(place));
    };
    for (key, value) in source {
        let inner = if path.is_empty() {
            key.clone()
        } else {
            format!("{path}.{key}")
        };
        let Some(known_value) = known.get(&key) else {
            return Err(unknown_key(&inner, &key, known.keys().map(String::as_str), place));
        };
        let slot = &mut target[&key];
        if OPEN_MAPS.contains(&inner.as_str()) {
            let (Value::Object(slot), Value::Object(value)) = (slot, value) else {
                return Err(Failure::user("CONFIG_INVALID", format!("`{inner}` must be a table")).at(place));
            };
            slot.extend(value);
        } else if known_value.is_object() {
            overlay(slot, value, known_value, &inner, place)?;
        } else {
            *slot = value;
        }
    }
    Ok(())
}

fn unknown_key<'a>(path: &str, key: &str, known: impl Iterator<Item = &'a str>, place: &str) -> Failure {
    let failure = Failure::user("CONFIG_UNKNOWN_KEY", format!("There is no setting `{path}`")).at(place);
    match nearest(key, known) {
        Some(near) => failure.hint(format!("Did you mean `{near}`?")),
        None => failure.hint("`brightrun config` prints every setting with its value"),
    }
}

/// The candidate most like `word`, if any is like it at all.
pub fn nearest<'a>(word: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    candidates
        .map(|candidate| (strsim::jaro_winkler(word, candidate), candidate))
        .filter(|(likeness, _)| *likeness > 0.75)
        .max_by(|left, right| left.0.total_cmp(&right.0))
        .map(|(_, candidate)| candidate)
}

/// `BRIGHTRUN_SECTION_KEY` → `[section, key]`; `None` for variables that belong to something else.
fn environment_path(name: &str, known: &Value) -> Result<Option<Vec<String>>> {
    let Some(rest) = name.strip_prefix("BRIGHTRUN_") else {
        return Ok(None);
    };
    let rest = rest.to_ascii_lowercase();
    let Value::Object(sections) = known else {
        return Ok(None);
    };
    for (section, keys) in sections {
        let (Some(key), Value::Object(keys)) = (rest.strip_prefix(&format!("{section}_")), keys) else {
            continue;
        };
        if OPEN_MAPS.contains(&section.as_str()) {
            continue;
        }
        if keys.contains_key(key) {
            return Ok(Some(vec![section.clone(), key.to_owned()]));
        }
        return Err(unknown_key(
            &format!("{section}.{key}"),
            key,
            keys.keys().map(String::as_str),
            &format!("environment variable `{name}`"),
        ));
    }
    Ok(None)
}

/// An environment variable's text as JSON where it is a number, a boolean or a list, else as a string.
fn parse_scalar(text: &str) -> Value {
    match serde_json::from_str::<Value>(text) {
        Ok(value) if !value.is_object() => value,
        _ => Value::String(text.to_owned()),
    }
}

fn set(target: &mut Value, path: &[String], value: Value) {
    let mut slot = target;
    for key in path {
        slot = &mut slot[key.as_str()];
    }
    *slot = match (&*slot, value) {
        (Value::Array(_), Value::String(list)) => list.split(',').map(|item| Value::from(item.trim())).collect(),
        (_, value) => value,
    };
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn load(text: &str, environment: &[(&str, &str)]) -> Result<Config> {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("brightrun.toml");
        std::fs::write(&file, text).unwrap();
        let environment = environment
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        Config::load(Some(&file), environment)
    }

    #[test]
    fn environment_wins_over_file_and_file_over_defaults() {
        let config = load(
            "[train]\nrank = 8\nepochs = 7\n[prices]\nL40S = 1.9",
            &[("BRIGHTRUN_TRAIN_RANK", "32")],
        )
        .unwrap();
        assert_eq!((config.train.rank, config.train.epochs), (32, 7));
        assert_eq!(config.train.batch_size, TrainSpec::default().batch_size);
        assert_eq!(
            (config.prices.per_hour("L40S"), config.prices.per_hour("H100")),
            (1.9, 4.2)
        );
    }

    #[test]
    fn a_list_may_be_written_with_commas_in_the_environment() {
        let config = load("", &[("BRIGHTRUN_TRAIN_TARGETS", "q_proj, v_proj")]).unwrap();
        assert_eq!(config.train.targets, ["q_proj", "v_proj"]);
    }

    #[test]
    fn an_unknown_key_is_refused_with_the_nearest_one() {
        for failure in [
            load("[train]\nlearning_rat = 1", &[]).unwrap_err(),
            load("", &[("BRIGHTRUN_TRAIN_LEARNING_RAT", "1")]).unwrap_err(),
        ] {
            assert_eq!(failure.code, "CONFIG_UNKNOWN_KEY");
            assert!(failure.hint.contains("`learning_rate`"), "{failure}");
        }
    }

    #[test]
    fn variables_of_other_purposes_are_left_alone() {
        assert!(load("", &[("BRIGHTRUN_GOLDEN_DIR", "/x"), ("HOME", "/y")]).is_ok());
    }

    #[test]
    fn a_type_without_a_price_costs_nothing_rather_than_nan() {
        assert_eq!(Prices::default().per_hour("abacus"), 0.0);
    }

    #[test]
    fn a_lease_shorter_than_three_heartbeats_is_refused() {
        let failure = load("[worker]\nlease_seconds = 10\nheartbeat_seconds = 5", &[]).unwrap_err();
        assert_eq!(failure.code, "CONFIG_OUT_OF_RANGE");
    }
}
