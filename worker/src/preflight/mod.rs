//! Is everything in place here, and if not, what to do: found out in seconds, before a job depends on it.
//!
//! `brightrun doctor` runs every check, `brightrun doctor --quick` those that ask nobody outside this machine; a worker that RunPod
//! has started runs the quick ones before its first job and reports itself unfit when one fails.
//!
//! | check | what can be wrong |
//! |---|---|
//! | volume | the work folder is on a RunPod volume's path, and nothing is mounted there |
//! | work folder | it cannot be written, or is nearly full |
//! | model | a folder, a shard or a shard's end is missing ([`model_files`]) |
//! | gpu | RunPod says there is one and none is to be seen |
//! | template | the tokenizer or the chat template is not understood |
//! | compute | the backend cannot start |
//! | storage | a small object cannot be written, read back and deleted |
//! | database | it cannot be reached, or its schema is another version |
//! | clock | this machine's clock is far from the database's: signatures of storage would be refused |

pub mod model_files;

use std::future::Future;
use std::path::Path;
use std::time::{Duration, Instant};

use brightrun_queue::Queue;
use chrono::Utc;
use serde::Serialize;

use crate::cli::device::Chosen;
use crate::config::Config;
use crate::error::{Failure, Result};
use crate::job::services::{model_folder, open_storage};
use crate::model::config::ModelConfig;
use crate::template::ChatTemplate;

/// Least free space that a work folder should have, in bytes.
const LEAST_FREE: u64 = 2 << 30;

/// Storage signatures tolerate some minutes; this much says that a clock is not kept at all.
const MOST_SKEW_SECONDS: i64 = 60;

/// No check may take longer.
const PATIENCE: Duration = Duration::from_secs(20);

/// Where RunPod mounts network volumes: on serverless workers and on pods.
const VOLUMES: [&str; 2] = ["/runpod-volume", "/workspace"];

/// One finding.
#[derive(Debug, Serialize)]
pub struct Check {
    /// What was looked at.
    pub name: &'static str,
    /// Whether it is in place.
    pub ok: bool,
    /// What was found, or what is wrong and what to do.
    pub detail: String,
    /// How long it took.
    pub seconds: f64,
    /// What is wrong, for programs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failure: Option<Failure>,
}

impl Check {
    async fn of(name: &'static str, found: impl Future<Output = Result<String>>) -> Self {
        let started = Instant::now();
        let found = tokio::time::timeout(PATIENCE, found).await.unwrap_or_else(|_| {
            Err(
                Failure::platform("PREFLIGHT_TIMEOUT", format!("There is no answer within {PATIENCE:?}"))
                    .hint("Check the address and the network between"),
            )
        });
        let (ok, detail, failure) = match found {
            Ok(detail) => (true, detail, None),
            Err(failure) => (false, failure.to_string(), Some(failure)),
        };
        Self {
            name,
            ok,
            detail,
            seconds: started.elapsed().as_secs_f64(),
            failure,
        }
    }
}

/// What this machine alone can tell.
pub async fn quick(config: &Config) -> Vec<Check> {
    vec![
        Check::of("volume", async { volume(&config.worker.work_dir, &mounts()) }).await,
        Check::of("work folder", async { work_folder(&config.worker.work_dir) }).await,
        Check::of("model", async { model(config) }).await,
        Check::of("gpu", async { gpu(Path::new("/proc/driver/nvidia")) }).await,
    ]
}

/// Everything: also what needs a moment of computing, the storage and the database.
pub async fn full(config: &Config, connect: impl Future<Output = Result<Queue>>) -> Vec<Check> {
    let mut checks = quick(config).await;
    // Without a model one complaint is enough.
    if checks.iter().any(|check| check.name == "model" && check.ok) {
        checks.push(Check::of("template", async { template(config) }).await);
    }
    checks.push(Check::of("compute", async { compute(config) }).await);
    checks.push(Check::of("storage", storage(config)).await);
    let mut queue = None;
    let database = async {
        let connected = connect.await?;
        connected.check_schema().await?;
        let place = connected.place().to_string();
        queue = Some(connected);
        Ok(place)
    };
    checks.push(Check::of("database", database).await);
    if let Some(queue) = queue {
        checks.push(Check::of("clock", clock(&queue)).await);
    }
    checks
}

/// A folder below the path of a RunPod volume must lie on one: without it, files fill the container's small disk and are gone
/// with it.
fn volume(folder: &Path, mounts: &[String]) -> Result<String> {
    let Some(root) = VOLUMES.iter().find(|root| folder.starts_with(root)) else {
        return Ok("the work folder is not on a RunPod volume's path".to_owned());
    };
    if mounts.iter().any(|mount| mount == root) {
        return Ok(format!("{root} is mounted"));
    }
    Err(Failure::system(
        "VOLUME_NOT_MOUNTED",
        "The work folder is on the path of a RunPod network volume, but no volume is mounted there",
    )
    .at(format!("{} under {root}", folder.display()))
    .hint("Attach the network volume to the endpoint, in a data center where its workers run; it is at /runpod-volume on a serverless worker and at /workspace on a pod"))
}

/// Mount points, from the kernel's table.
fn mounts() -> Vec<String> {
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    table
        .lines()
        .filter_map(|line| line.split(' ').nth(4).map(str::to_owned))
        .collect()
}

fn work_folder(folder: &Path) -> Result<String> {
    let trouble = |what: &str, error: &dyn std::fmt::Display| {
        Failure::system("WORK_DIR_UNWRITABLE", format!("The work folder {what}: {error}"))
            .at(folder.display().to_string())
            .hint("Give worker.work_dir a folder that this user may write; in the image that is user 10001")
    };
    std::fs::create_dir_all(folder).map_err(|error| trouble("cannot be made", &error))?;
    tempfile::tempfile_in(folder).map_err(|error| trouble("cannot be written", &error))?;
    let space = rustix::fs::statvfs(folder).map_err(|error| trouble("cannot be examined", &error))?;
    let free = space.f_bavail * space.f_frsize;
    let shown = crate::cli::output::bytes(free);
    if free < LEAST_FREE {
        return Err(trouble("is nearly full", &format!("{shown} free"))
            .hint("Free some space, or set worker.work_dir to another disk"));
    }
    Ok(format!("{} ({shown} free)", folder.display()))
}

fn model(config: &Config) -> Result<String> {
    let folder = model_folder(config)?;
    let model = ModelConfig::load(&folder)?;
    let tokenizer = folder.join("tokenizer.json");
    if !tokenizer.is_file() {
        return Err(Failure::system(
            "MODEL_INCOMPLETE",
            "The checkpoint is not whole: tokenizer.json is missing",
        )
        .at(folder.display().to_string())
        .hint("Download the tokenizer's files, too"));
    }
    let files = model_files::check(&folder)?;
    Ok(format!(
        "{} ({} layers, width {}, {} in {} files)",
        folder.display(),
        model.layers,
        model.hidden,
        crate::cli::output::bytes(files.bytes),
        files.count,
    ))
}

/// Reads the tokenizer and the chat template whole, which takes a moment for a large vocabulary.
fn template(config: &Config) -> Result<String> {
    ChatTemplate::load(&model_folder(config)?)?;
    Ok("tokenizer and chat template are understood".to_owned())
}

/// The driver's own table; no library is loaded for it.
fn gpu(driver: &Path) -> Result<String> {
    let expected = std::env::var("RUNPOD_GPU_COUNT")
        .ok()
        .and_then(|count| count.parse::<usize>().ok());
    let version = std::fs::read_to_string(driver.join("version")).unwrap_or_default();
    let entries = std::fs::read_dir(driver.join("gpus")).into_iter().flatten().flatten();
    let names: Vec<String> = entries
        .filter_map(|entry| {
            let information = std::fs::read_to_string(entry.path().join("information")).ok()?;
            let name = information.lines().find_map(|line| line.strip_prefix("Model:"))?;
            Some(name.trim().to_owned())
        })
        .collect();
    if names.is_empty() {
        return match expected {
            Some(1..) => Err(
                Failure::system("GPU_MISSING", "RunPod gave this worker a GPU, but no driver shows one")
                    .at(driver.display().to_string())
                    .hint("Run the image with NVIDIA's container runtime; on RunPod, have the worker replaced"),
            ),
            _ => Ok("none; the CPU computes".to_owned()),
        };
    }
    let version = version.lines().next().unwrap_or("unknown driver").trim().to_owned();
    Ok(format!("{} ({version})", names.join(", ")))
}

fn compute(config: &Config) -> Result<String> {
    Ok(Chosen::by(config)?.to_string())
}

async fn storage(config: &Config) -> Result<String> {
    let storage = open_storage(config)?;
    storage.probe(&config.storage.models_bucket, "doctor").await?;
    Ok(format!("{}: written, read back, deleted", storage.describe()))
}

async fn clock(queue: &Queue) -> Result<String> {
    let asked = Utc::now();
    let theirs = queue.now().await?;
    // The answer was made between asking and hearing.
    let ours = asked + (Utc::now() - asked) / 2;
    skew((theirs - ours).num_milliseconds())
}

fn skew(milliseconds: i64) -> Result<String> {
    let seconds = milliseconds as f64 / 1000.0;
    if milliseconds.abs() <= MOST_SKEW_SECONDS * 1000 {
        return Ok(format!("{seconds:+.3} s from the database's"));
    }
    Err(Failure::system(
        "CLOCK_SKEWED",
        format!("This machine's clock is {seconds:+.0} s from the database's"),
    )
    .hint("Set the clock (NTP); storage refuses signatures made minutes away from its own time"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_volumes_path_without_a_mount_is_refused_and_other_paths_are_not() {
        let mounted = ["/".to_owned(), "/runpod-volume".to_owned()];
        assert!(volume(Path::new("/runpod-volume/brightrun"), &mounted).is_ok());
        assert!(volume(Path::new("/home/x/work"), &mounted[..1]).is_ok());
        let failure = volume(Path::new("/workspace/brightrun"), &mounted).unwrap_err();
        assert_eq!(failure.code, "VOLUME_NOT_MOUNTED");
        assert!(mounts().iter().any(|mount| mount == "/"));
    }

    #[test]
    fn a_clock_a_minute_off_is_refused_in_either_direction() {
        assert!(skew(59_000).is_ok() && skew(-59_000).is_ok());
        for off in [61_000, -61_000] {
            assert_eq!(skew(off).unwrap_err().code, "CLOCK_SKEWED");
        }
    }

    #[test]
    fn gpus_are_read_from_the_drivers_table() {
        let driver = tempfile::tempdir().unwrap();
        assert_eq!(gpu(driver.path()).unwrap(), "none; the CPU computes");
        let one = driver.path().join("gpus/0000:01:00.0");
        std::fs::create_dir_all(&one).unwrap();
        std::fs::write(one.join("information"), "Model: \t\t NVIDIA H100 80GB HBM3\nIRQ: 1\n").unwrap();
        std::fs::write(driver.path().join("version"), "NVRM version: 570.1\nGCC\n").unwrap();
        assert_eq!(
            gpu(driver.path()).unwrap(),
            "NVIDIA H100 80GB HBM3 (NVRM version: 570.1)"
        );
    }

    #[test]
    fn a_file_in_the_place_of_the_work_folder_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert_eq!(work_folder(file.path()).unwrap_err().code, "WORK_DIR_UNWRITABLE");
    }
}
