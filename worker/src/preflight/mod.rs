//! Is everything in place here, and if not, what to do: found out in seconds, before a job depends on it.
//!
//! `brightrun doctor` runs every check, `brightrun doctor --quick` those that ask nobody outside this machine, `brightrun doctor
//! --live` those that are no burden every few minutes. A worker that RunPod has started runs the quick ones before its first job and
//! reports itself unfit when one fails; database and clock it looks at beside its first take, and says what is wrong. The
//! storage is rehearsed at the beginning of each job, too.
//!
//! | check | what can be wrong |
//! |---|---|
//! | volume | the work folder is on a RunPod volume's path, and nothing is mounted there |
//! | work folder | it cannot be written, or is nearly full |
//! | model | a folder, a shard or a shard's end is missing ([`model_files`]) |
//! | gpu | one was promised and none can be used; it is smaller than its pool; the driver or the card is too old |
//! | memory | the model does not fit the GPU with these settings |
//! | kernels | there is no code for the GPU that its driver can load |
//! | template | the tokenizer or the chat template is not understood |
//! | compute | the backend cannot start |
//! | storage | a small object cannot be written, read back and deleted |
//! | database | it cannot be reached, or its schema is another version |
//! | clock | this machine's clock is far from the database's: signatures of storage would be refused |

mod gpu;
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

/// What a health check may ask every few minutes while a job runs: no model is read and no driver called.
pub async fn live(config: &Config) -> Vec<Check> {
    vec![
        Check::of("volume", async { volume(&config.worker.work_dir, &mounts()) }).await,
        Check::of("work folder", async { work_folder(&config.worker.work_dir) }).await,
    ]
}

/// What this machine alone can tell.
pub async fn quick(config: &Config) -> Vec<Check> {
    let mut checks = live(config).await;
    checks.push(Check::of("model", async { model(config) }).await);
    let has_model = checks.iter().all(|check| check.name != "model" || check.ok);
    let mut gpus = None;
    let check = async {
        let found = gpus_of_machine(config).await?;
        gpus.insert(found).check()
    };
    checks.push(Check::of("gpu", check).await);
    let Some(gpus) = gpus else { return checks };
    // Without a model one complaint is enough.
    if has_model {
        checks.push(Check::of("memory", async { gpus.check_memory(config) }).await);
    }
    checks.push(Check::of("kernels", async { gpus.check_kernels() }).await);
    checks
}

/// On a thread of its own: a broken driver may never come back.
async fn gpus_of_machine(config: &Config) -> Result<gpu::Gpus> {
    let config = config.clone();
    let asked = tokio::task::spawn_blocking(move || gpu::Gpus::of_machine(&config));
    asked
        .await
        .map_err(|error| Failure::system("INTERNAL_PANIC", format!("The driver could not be asked: {error}")))
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
    checks.extend(database(connect).await);
    checks
}

/// Whether the database answers, is of this program's version, and agrees about the time.
pub async fn database(connect: impl Future<Output = Result<Queue>>) -> Vec<Check> {
    let mut queue = None;
    let database = async {
        let connected = connect.await?;
        connected.check_schema().await?;
        let place = connected.place().to_string();
        queue = Some(connected);
        Ok(place)
    };
    let mut checks = vec![Check::of("database", database).await];
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
    fn a_file_in_the_place_of_the_work_folder_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert_eq!(work_folder(file.path()).unwrap_err().code, "WORK_DIR_UNWRITABLE");
    }
}
