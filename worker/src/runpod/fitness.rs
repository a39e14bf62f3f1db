//! Checks before the first job: a worker that cannot work says so and leaves, instead of failing jobs.

use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use super::environment::Environment;
use super::http::Http;
use super::outcome::clip;
use super::routes::Routes;

/// The unhealthy report may not keep a broken worker alive.
const REPORT_TIMEOUT: Duration = Duration::from_secs(2);

/// Longest reason in the report.
const LONGEST_REASON: usize = 200;

type Verdict = Pin<Box<dyn Future<Output = Result<(), String>> + Send>>;

/// One check.
pub(crate) struct Check {
    name: String,
    run: Box<dyn FnOnce() -> Verdict + Send>,
}

impl Check {
    /// A check that is run once; its error says what is wrong in words.
    pub fn new<F>(name: impl Into<String>, run: impl FnOnce() -> F + Send + 'static) -> Self
    where
        F: Future<Output = Result<(), String>> + Send + 'static,
    {
        Self {
            name: name.into(),
            run: Box::new(move || Box::pin(run())),
        }
    }
}

/// The checks every worker makes: memory, disk, and whether the control plane's host can be reached.
pub(crate) fn built_in(environment: &Environment, routes: &Routes) -> Vec<Check> {
    let (memory, disk) = (environment.min_memory_gb, environment.min_disk_percent);
    let (host, limit) = (routes.control_plane(), environment.network_timeout);
    vec![
        Check::new("memory", move || async move { check_memory(memory) }),
        Check::new("disk", move || async move { check_disk(disk) }),
        Check::new("network", move || check_network(host, limit)),
    ]
}

/// Runs the checks in order.
///
/// # Errors
/// Name and reason of the first one that fails.
pub(crate) async fn run_all(checks: Vec<Check>) -> Result<(), (String, String)> {
    for check in checks {
        let started = std::time::Instant::now();
        (check.run)().await.map_err(|why| (check.name.clone(), why))?;
        tracing::debug!(check = check.name, "passed in {:?}", started.elapsed());
    }
    Ok(())
}

/// Tells the platform that this worker is unfit. Errors are ignored: the worker leaves either way.
pub(crate) async fn report(http: &Http, routes: &Routes, check: &str, reason: &str) {
    let reason = clip(reason, LONGEST_REASON);
    if let Some(url) = routes.unhealthy(check, &reason) {
        let _leaving_either_way = http.get(&url, REPORT_TIMEOUT).await;
    }
}

fn check_memory(min_gb: f64) -> Result<(), String> {
    let available = crate::host::available_memory()? as f64 / f64::from(1 << 30);
    if available >= min_gb {
        return Ok(());
    }
    Err(format!(
        "{available:.1} GiB of memory are available; {min_gb} are needed (RUNPOD_MIN_MEMORY_GB)"
    ))
}

fn check_disk(min_percent: f64) -> Result<(), String> {
    let disk = rustix::fs::statvfs("/").map_err(|error| format!("the disk cannot be looked at: {error}"))?;
    let free = disk.f_bavail as f64 / (disk.f_blocks as f64).max(1.0) * 100.0;
    if free >= min_percent {
        return Ok(());
    }
    Err(format!(
        "{free:.1} % of / are free; {min_percent} are needed (RUNPOD_MIN_DISK_PERCENT)"
    ))
}

async fn check_network(host: Option<(String, u16)>, limit: Duration) -> Result<(), String> {
    let (host, port) = host.ok_or("RUNPOD_WEBHOOK_GET_JOB is not an address")?;
    match tokio::time::timeout(limit, tokio::net::TcpStream::connect((host.as_str(), port))).await {
        Ok(Ok(_connected)) => Ok(()),
        Ok(Err(error)) => Err(format!("{host}:{port} cannot be reached: {error}")),
        Err(_) => Err(format!("{host}:{port} does not answer within {limit:?}")),
    }
}
