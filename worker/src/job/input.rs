//! What a job asks for: the row's two JSON dialects resolved into one [`TrainSpec`].
//!
//! The app writes `hyperparameters` and `gpu_config` with short names (`rank`, `epochs`, `type`, `count`) and reads
//! them with long ones (`lora_rank`, `num_epochs`, `gpu_type`, `num_gpus`). Both are accepted here, and
//! [`Resolved`] carries the union of both, which is written back to the row so that every page of the app finds
//! the names it looks for.

use serde::Deserialize;
use serde_json::{Map, Value, json};
use uuid::Uuid;

use crate::config::Config;
use crate::error::{Failure, Result};
use crate::spec::TrainSpec;

/// The payload of a `train` job, as the trigger on `training_jobs` writes it.
#[derive(Clone, Debug, Deserialize)]
pub struct TrainJob {
    /// The app's row; also the id of the engine's job.
    pub job_id: Uuid,
    /// Whose job it is.
    pub user_id: Uuid,
    /// `fast`, `balanced`, `quality` or `custom`; informative only, the hyperparameters count.
    #[serde(default)]
    pub preset_id: String,
    /// Either dialect, or both.
    #[serde(default)]
    pub hyperparameters: Map<String, Value>,
    /// Either dialect, or both.
    #[serde(default)]
    pub gpu_config: Map<String, Value>,
    /// The dataset as it was when the job was queued.
    pub dataset: DatasetRow,
}

/// A row of `datasets`.
#[derive(Clone, Debug, Deserialize)]
pub struct DatasetRow {
    /// Primary key.
    pub id: Uuid,
    /// Shown to the user.
    #[serde(default)]
    pub name: String,
    /// Bucket of the file.
    pub storage_bucket: String,
    /// Path in the bucket.
    pub storage_path: String,
    /// The client's claim of the size in bytes; 0 or absent when unknown.
    #[serde(default)]
    pub file_size: Option<i64>,
}

/// A job whose settings are complete.
#[derive(Clone, Debug, PartialEq)]
pub struct Resolved {
    /// What will be computed.
    pub spec: TrainSpec,
    /// The base model's name, for rows and adapters.
    pub base_model: String,
    /// GPU type in the app's words.
    pub gpu_type: String,
    /// Number of GPUs the job asked for.
    pub gpu_count: u32,
    /// Dollars per hour of one of them.
    pub price_per_hour: f64,
    /// Union of both dialects, to be written back.
    pub hyperparameters: Value,
    /// Union of both dialects, to be written back.
    pub gpu_config: Value,
    /// What was asked for and will not be done as asked.
    pub warnings: Vec<String>,
}

/// Ranges of the app's own checks; a row that breaks them never trained anywhere.
const LEARNING_RATE: (f64, f64) = (1e-5, 1e-3);
const BATCH_SIZE: (f64, f64) = (1.0, 64.0);
const EPOCHS: (f64, f64) = (1.0, 20.0);
const RANK: (f64, f64) = (4.0, 128.0);
const GPU_COUNT: (f64, f64) = (1.0, 8.0);

impl TrainJob {
    /// Reads a payload.
    ///
    /// # Errors
    /// `JOB_PAYLOAD_INVALID`, blame user: the row cannot be understood.
    pub fn parse(payload: &Value) -> Result<Self> {
        serde_json::from_value(payload.clone()).map_err(|error| {
            Failure::user(
                "JOB_PAYLOAD_INVALID",
                format!("The job's row cannot be understood: {error}"),
            )
            .hint(
                "Insert `training_jobs` rows with `hyperparameters` and `gpu_config` objects and a dataset that exists",
            )
        })
    }

    /// Completes the job's settings from the configuration.
    ///
    /// # Errors
    /// `JOB_CONFIG_INVALID`, blame user, naming every value that is out of range at once.
    pub fn resolve(&self, config: &Config) -> Result<Resolved> {
        let mut reader = Reader { problems: Vec::new() };
        let hyper = &self.hyperparameters;
        let mut spec = config.train.clone();
        if let Some(value) = reader.number(hyper, &["learning_rate"], LEARNING_RATE) {
            spec.learning_rate = value as f32;
        }
        if let Some(value) = reader.integer(hyper, &["batch_size"], BATCH_SIZE) {
            spec.batch_size = value;
        }
        if let Some(value) = reader.integer(hyper, &["epochs", "num_epochs"], EPOCHS) {
            spec.epochs = value;
        }
        if let Some(value) = reader.integer(hyper, &["rank", "lora_rank"], RANK) {
            spec.rank = value;
            spec.alpha = None;
        }
        if let Some(value) = reader.number(hyper, &["alpha", "lora_alpha"], (f64::MIN_POSITIVE, 1024.0)) {
            spec.alpha = Some(value as f32);
        }
        let dropout = reader
            .number(hyper, &["dropout", "lora_dropout"], (0.0, 0.999))
            .unwrap_or(0.0);
        let gpu_type = reader
            .text(&self.gpu_config, &["type", "gpu_type"])
            .unwrap_or_else(|| "A100-80GB".to_owned());
        let gpu_count = reader
            .integer(&self.gpu_config, &["count", "num_gpus"], GPU_COUNT)
            .unwrap_or(1);
        let base_model = reader.base_model(hyper, config);
        reader.finish()?;
        spec.check()?;

        let mut warnings = Vec::new();
        if dropout > 0.0 {
            warnings.push(format!(
                "LoRA dropout {dropout} was asked for; the adapter is trained without dropout, so that runs are exactly repeatable"
            ));
        }
        if gpu_count > 1 {
            warnings.push(format!("{gpu_count} GPUs were asked for; a worker trains on one"));
        }
        let price_per_hour = self.price(config, &gpu_type);
        Ok(Resolved {
            hyperparameters: self.both_hyperparameters(&spec, &base_model, dropout),
            gpu_config: self.both_gpu_configs(&gpu_type, gpu_count, price_per_hour),
            spec,
            base_model,
            gpu_type,
            gpu_count: gpu_count as u32,
            price_per_hour,
            warnings,
        })
    }

    fn price(&self, config: &Config, gpu_type: &str) -> f64 {
        let own = self.gpu_config.get("cost_per_gpu_hour").and_then(Value::as_f64);
        own.filter(|price| price.is_finite() && (0.0..1000.0).contains(price))
            .unwrap_or_else(|| config.prices.per_hour(gpu_type))
    }

    fn both_hyperparameters(&self, spec: &TrainSpec, base_model: &str, dropout: f64) -> Value {
        let learning_rate = self
            .hyperparameters
            .get("learning_rate")
            .cloned()
            .unwrap_or_else(|| json!(short(spec.learning_rate)));
        let alpha = short(spec.lora_alpha());
        union(
            &self.hyperparameters,
            json!({
                "learning_rate": learning_rate, "batch_size": spec.batch_size,
                "epochs": spec.epochs, "num_epochs": spec.epochs,
                "rank": spec.rank, "lora_rank": spec.rank,
                "alpha": alpha, "lora_alpha": alpha,
                "dropout": dropout, "lora_dropout": dropout,
                "base_model": base_model,
            }),
        )
    }

    fn both_gpu_configs(&self, gpu_type: &str, count: usize, price: f64) -> Value {
        union(
            &self.gpu_config,
            json!({
                "type": gpu_type, "gpu_type": gpu_type, "count": count, "num_gpus": count,
                "cost_per_gpu_hour": price, "gpu_memory_gb": memory_gb(gpu_type),
            }),
        )
    }
}

/// Memory of a GPU type from its name (`A100-80GB` → 80); 0 when the name does not say.
fn memory_gb(gpu_type: &str) -> u32 {
    let said = gpu_type.to_ascii_uppercase();
    let digits = said
        .strip_suffix("GB")
        .and_then(|name| name.rsplit(['-', ' ']).next())
        .and_then(|text| text.parse().ok());
    digits.unwrap_or(match said.as_str() {
        "H100" => 80,
        "H200" => 141,
        _ => 0,
    })
}

/// A float32 as the shortest decimal that means it, so that 0.0002 does not become 0.00019999999494757503.
fn short(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}

/// `given` with the keys of `resolved` laid over it.
fn union(given: &Map<String, Value>, resolved: Value) -> Value {
    let mut all = given.clone();
    if let Value::Object(resolved) = resolved {
        all.extend(resolved);
    }
    Value::Object(all)
}

/// Reads values under any of their names and collects every problem.
struct Reader {
    problems: Vec<String>,
}

impl Reader {
    fn find<'a>(source: &'a Map<String, Value>, names: &[&'static str]) -> Option<(&'static str, &'a Value)> {
        names.iter().find_map(|name| {
            source
                .get(*name)
                .filter(|value| !value.is_null())
                .map(|value| (*name, value))
        })
    }

    fn number(&mut self, source: &Map<String, Value>, names: &[&'static str], range: (f64, f64)) -> Option<f64> {
        let (name, value) = Self::find(source, names)?;
        let number = value
            .as_f64()
            .or_else(|| value.as_str().and_then(|text| text.trim().parse().ok()));
        match number {
            Some(number) if (range.0..=range.1).contains(&number) => Some(number),
            Some(_) => {
                self.problems.push(format!(
                    "{name} must be between {} and {}",
                    plain(range.0),
                    plain(range.1)
                ));
                None
            }
            None => {
                self.problems.push(format!("{name} must be a number, but is {value}"));
                None
            }
        }
    }

    fn integer(&mut self, source: &Map<String, Value>, names: &[&'static str], range: (f64, f64)) -> Option<usize> {
        let number = self.number(source, names, range)?;
        if number.fract() != 0.0 {
            self.problems
                .push(format!("{} must be a whole number, but is {number}", names[0]));
            return None;
        }
        Some(number as usize)
    }

    fn text(&mut self, source: &Map<String, Value>, names: &[&'static str]) -> Option<String> {
        let (name, value) = Self::find(source, names)?;
        match value.as_str().map(str::trim).filter(|text| !text.is_empty()) {
            Some(text) => Some(text.to_owned()),
            None => {
                self.problems
                    .push(format!("{name} must be a non-empty text, but is {value}"));
                None
            }
        }
    }

    fn base_model(&mut self, hyperparameters: &Map<String, Value>, config: &Config) -> String {
        let default = &config.model.base_model;
        let Some(wanted) = self.text(hyperparameters, &["base_model"]) else {
            return default.clone();
        };
        if wanted == *default || config.model.aliases.contains(&wanted) {
            return wanted;
        }
        let allowed: Vec<&str> = std::iter::once(default)
            .chain(&config.model.aliases)
            .map(String::as_str)
            .collect();
        self.problems.push(format!(
            "base_model `{wanted}` is not served here; this worker trains {}",
            allowed.join(", ")
        ));
        wanted
    }

    fn finish(self) -> Result<()> {
        if self.problems.is_empty() {
            return Ok(());
        }
        Err(Failure::user(
            "JOB_CONFIG_INVALID",
            format!("Validation error: {}", self.problems.join("; ")),
        )
        .at("`training_jobs.hyperparameters` and `gpu_config`")
        .hint("Correct these values and queue the job again"))
    }
}

/// A number without an exponent, as the app prints its limits.
fn plain(value: f64) -> String {
    if value == f64::MIN_POSITIVE {
        "above 0".to_owned()
    } else {
        format!("{value}")
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn job(hyperparameters: Value, gpu_config: Value) -> TrainJob {
        TrainJob::parse(&json!({
            "job_id": Uuid::nil(), "user_id": Uuid::nil(), "preset_id": "balanced",
            "hyperparameters": hyperparameters, "gpu_config": gpu_config,
            "dataset": {"id": Uuid::nil(), "name": "d", "storage_bucket": "lora-datasets", "storage_path": "a/b/c.jsonl"},
        }))
        .unwrap()
    }

    #[test]
    fn both_dialects_resolve_to_the_same_settings_and_the_union_of_names() {
        let short = job(
            json!({"learning_rate": 5e-5, "batch_size": 4, "epochs": 3, "rank": 16, "alpha": 32, "dropout": 0.1}),
            json!({"type": "A100-80GB", "count": 2}),
        );
        let long = job(
            json!({"learning_rate": 5e-5, "batch_size": 4, "num_epochs": 3, "lora_rank": 16, "lora_alpha": 32, "lora_dropout": 0.1}),
            json!({"gpu_type": "A100-80GB", "num_gpus": 2}),
        );
        let (short, long) = (
            short.resolve(&Config::default()).unwrap(),
            long.resolve(&Config::default()).unwrap(),
        );
        assert_eq!(short, long);
        for name in [
            "epochs",
            "num_epochs",
            "rank",
            "lora_rank",
            "alpha",
            "lora_alpha",
            "dropout",
            "lora_dropout",
            "base_model",
        ] {
            assert!(!short.hyperparameters[name].is_null(), "{name} is missing");
        }
        for name in [
            "type",
            "gpu_type",
            "count",
            "num_gpus",
            "cost_per_gpu_hour",
            "gpu_memory_gb",
        ] {
            assert!(!short.gpu_config[name].is_null(), "{name} is missing");
        }
        assert_eq!(
            (short.price_per_hour, short.gpu_config["gpu_memory_gb"].as_u64()),
            (3.5, Some(80))
        );
        assert_eq!(short.hyperparameters["learning_rate"], json!(5e-5));
        assert_eq!(short.warnings.len(), 2, "dropout and the second GPU are said");
    }

    #[test]
    fn keys_we_do_not_know_survive() {
        let resolved = job(json!({"note": "mine"}), json!({"type": "H100", "count": 1}))
            .resolve(&Config::default())
            .unwrap();
        assert_eq!(resolved.hyperparameters["note"], "mine");
    }

    #[test]
    fn alpha_follows_the_rank_unless_given() {
        let mut config = Config::default();
        config.train.alpha = Some(7.0);
        let resolved = job(json!({"rank": 8}), json!({})).resolve(&config).unwrap();
        assert_eq!(resolved.spec.lora_alpha(), 16.0);
    }

    #[test]
    fn every_bad_value_is_named_at_once() {
        let failure = job(
            json!({"learning_rate": 1, "batch_size": 2.5, "rank": "many"}),
            json!({"type": "", "count": 9}),
        )
        .resolve(&Config::default())
        .unwrap_err();
        assert!(!failure.blame.is_retryable());
        for name in ["learning_rate", "batch_size", "rank", "type", "count"] {
            assert!(failure.message.contains(name), "{failure}");
        }
    }

    #[test]
    fn a_base_model_that_is_not_served_is_refused() {
        let failure = job(json!({"base_model": "someone/else"}), json!({}))
            .resolve(&Config::default())
            .unwrap_err();
        assert!(failure.message.contains("someone/else"), "{failure}");
    }
}
