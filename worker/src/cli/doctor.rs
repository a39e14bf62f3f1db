//! `brightrun doctor`: is everything in place here, and if not, what to do.

use serde::Serialize;

use super::device::Chosen;
use super::output::{print_json, print_line};
use super::{OutputArguments, service};
use crate::config::Config;
use crate::error::{Failure, Result};
use crate::job::services::{model_folder, open_storage};
use crate::model::config::ModelConfig;
use crate::template::ChatTemplate;

/// Least free space that a work folder should have.
const LEAST_FREE_BYTES: u64 = 2 << 30;

#[derive(Serialize)]
struct Check {
    name: &'static str,
    ok: bool,
    detail: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    failure: Option<Failure>,
}

impl Check {
    fn new(name: &'static str, result: Result<String>) -> Self {
        match result {
            Ok(detail) => Self {
                name,
                ok: true,
                detail,
                failure: None,
            },
            Err(failure) => Self {
                name,
                ok: false,
                detail: failure.to_string(),
                failure: Some(failure),
            },
        }
    }
}

/// Runs every check and prints what it found. Fails when one of them does.
pub async fn doctor(config: &Config, arguments: OutputArguments) -> Result<()> {
    let checks = vec![
        Check::new("compute", compute(config)),
        Check::new("model", model(config)),
        Check::new("work folder", work_folder(config)),
        Check::new("storage", storage(config).await),
        Check::new("database", database().await),
    ];
    if arguments.json {
        print_json(&serde_json::json!({ "ok": checks.iter().all(|check| check.ok), "checks": checks }))?;
    } else {
        for check in &checks {
            let (word, colour) = if check.ok {
                ("ok  ", anstyle::AnsiColor::Green)
            } else {
                ("FAIL", anstyle::AnsiColor::Red)
            };
            let style = colour.on_default().bold();
            print_line(&format!("{style}{word}{style:#}  {:12} {}", check.name, check.detail))?;
        }
    }
    let failed: Vec<&str> = checks
        .iter()
        .filter(|check| !check.ok)
        .map(|check| check.name)
        .collect();
    if failed.is_empty() {
        return Ok(());
    }
    Err(Failure::system(
        "DOCTOR_FOUND_TROUBLE",
        format!("Not in place: {}", failed.join(", ")),
    ))
}

fn compute(config: &Config) -> Result<String> {
    Ok(Chosen::by(config)?.to_string())
}

fn model(config: &Config) -> Result<String> {
    let folder = model_folder(config)?;
    let model = ModelConfig::load(&folder)?;
    ChatTemplate::load(&folder)?;
    Ok(format!(
        "{} ({} layers, width {})",
        folder.display(),
        model.layers,
        model.hidden
    ))
}

fn work_folder(config: &Config) -> Result<String> {
    let folder = &config.worker.work_dir;
    let trouble = |what: &str, error: &dyn std::fmt::Display| {
        Failure::system("WORK_DIR_UNWRITABLE", format!("The work folder {what}: {error}"))
            .at(folder.display().to_string())
    };
    std::fs::create_dir_all(folder).map_err(|error| trouble("cannot be made", &error))?;
    tempfile::tempfile_in(folder).map_err(|error| trouble("cannot be written", &error))?;
    let space = rustix::fs::statvfs(folder).map_err(|error| trouble("cannot be examined", &error))?;
    let free = space.f_bavail * space.f_frsize;
    if free < LEAST_FREE_BYTES {
        return Err(
            trouble("is nearly full", &format!("{} free", super::output::bytes(free)))
                .hint("Free some space, or set worker.work_dir to another disk"),
        );
    }
    Ok(format!("{} ({} free)", folder.display(), super::output::bytes(free)))
}

async fn storage(config: &Config) -> Result<String> {
    let storage = open_storage(config)?;
    storage.probe(&config.storage.models_bucket, "doctor").await?;
    Ok(storage.describe())
}

async fn database() -> Result<String> {
    let queue = service::connect().await?;
    queue.check_schema().await?;
    Ok(queue.place().to_string())
}
