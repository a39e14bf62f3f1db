//! What a service's log says of a load: a line now and then while it runs, and one when it is done.

use std::time::{Duration, Instant};

use super::{LoadProgress, LoadReport, LoadSource, SnapshotOutcome};

/// Time between two lines.
const INTERVAL: Duration = Duration::from_secs(10);

/// Says now and then how far a load is.
#[derive(Debug)]
pub struct LoadLog {
    began: Instant,
    said: Instant,
}

impl Default for LoadLog {
    fn default() -> Self {
        Self::new()
    }
}

impl LoadLog {
    /// A log that begins now.
    pub fn new() -> Self {
        let now = Instant::now();
        Self { began: now, said: now }
    }

    /// What a loader calls.
    pub fn reporter(mut self) -> impl FnMut(LoadProgress) {
        move |progress| {
            if self.said.elapsed() < INTERVAL {
                return;
            }
            self.said = Instant::now();
            let seconds = self.began.elapsed().as_secs_f64();
            tracing::info!(
                bytes = progress.bytes,
                of = progress.bytes_total,
                megabytes_per_second = megabytes_per_second(progress.bytes, seconds),
                source = name(progress.source),
                "the base model is being loaded"
            );
        }
    }
}

/// One line about a finished load.
pub fn say_how_it_went(report: &LoadReport) {
    let snapshot = match &report.snapshot {
        SnapshotOutcome::NotWanted => "none wanted",
        SnapshotOutcome::Used(_) => "used",
        SnapshotOutcome::Written(_) => "written",
        SnapshotOutcome::NotWritten(_) => "not written",
    };
    tracing::info!(
        source = name(report.source),
        bytes = report.bytes,
        seconds = (report.seconds * 10.0).round() / 10.0,
        megabytes_per_second = megabytes_per_second(report.bytes, report.seconds),
        snapshot,
        "the base model is loaded"
    );
}

fn name(source: LoadSource) -> &'static str {
    match source {
        LoadSource::Checkpoint => "checkpoint",
        LoadSource::Snapshot => "snapshot",
    }
}

fn megabytes_per_second(bytes: u64, seconds: f64) -> u64 {
    (bytes as f64 / seconds.max(1e-3) / 1e6).round() as u64
}
