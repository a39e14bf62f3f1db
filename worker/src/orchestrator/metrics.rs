//! What the orchestrator counts, as Prometheus reads it, and whether it is healthy.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use brightrun_queue::Queue;
use serde_json::json;
use tokio_util::sync::CancellationToken;

use crate::error::{Failure, Result};

/// A pass over the waiting jobs is overdue after this long.
const OVERDUE: Duration = Duration::from_secs(120);

/// Longest wait for the database's answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// Counters. Cheap to update from anywhere.
#[derive(Debug, Default)]
pub struct Metrics {
    sent: AtomicU64,
    lost: AtomicU64,
    refused: AtomicU64,
    trouble: AtomicU64,
    waiting: AtomicU64,
    last_pass: Mutex<Option<Instant>>,
}

impl Metrics {
    /// A job was submitted.
    pub fn sent(&self) {
        self.sent.fetch_add(1, Ordering::Relaxed);
    }

    /// A run at RunPod ended before a worker had claimed its job.
    pub fn lost(&self) {
        self.lost.fetch_add(1, Ordering::Relaxed);
    }

    /// A job was refused for what it would cost.
    pub fn refused(&self) {
        self.refused.fetch_add(1, Ordering::Relaxed);
    }

    /// A call to RunPod went wrong.
    pub fn trouble(&self) {
        self.trouble.fetch_add(1, Ordering::Relaxed);
    }

    /// So many jobs wait to be pushed.
    pub fn waiting(&self, jobs: usize) {
        self.waiting.store(jobs as u64, Ordering::Relaxed);
    }

    /// A pass over the waiting jobs has come to its end.
    pub fn alive(&self) {
        *self.last_pass.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    fn since_last_pass(&self) -> Option<Duration> {
        let last = self.last_pass.lock().unwrap_or_else(PoisonError::into_inner);
        last.map(|at| at.elapsed())
    }

    /// The counters in Prometheus' text format.
    pub fn text(&self) -> String {
        let mut text = String::new();
        let counters = [
            ("brightrun_push_sent_total", "Jobs submitted to RunPod.", &self.sent),
            (
                "brightrun_push_lost_total",
                "Runs at RunPod that ended before a worker had claimed the job.",
                &self.lost,
            ),
            (
                "brightrun_push_refused_total",
                "Jobs refused for what they would cost.",
                &self.refused,
            ),
            (
                "brightrun_push_trouble_total",
                "Calls to RunPod that went wrong.",
                &self.trouble,
            ),
        ];
        for (name, help, counter) in counters {
            let value = counter.load(Ordering::Relaxed);
            // Writing to a string cannot fail.
            let _infallible = write!(text, "# HELP {name} {help}\n# TYPE {name} counter\n{name} {value}\n");
        }
        let waiting = self.waiting.load(Ordering::Relaxed);
        let _infallible = write!(
            text,
            "# HELP brightrun_push_waiting Waiting jobs that are not pushed, at the last pass.\n\
             # TYPE brightrun_push_waiting gauge\nbrightrun_push_waiting {waiting}\n"
        );
        text
    }
}

#[derive(Clone)]
struct Shared {
    queue: Queue,
    metrics: Arc<Metrics>,
    /// Whether passes are made at all.
    pushes: bool,
}

/// Serves `/metrics` and `/health` until `shutdown`.
///
/// # Errors
/// `ORCHESTRATOR_LISTEN`: the address cannot be listened on.
pub async fn serve(
    address: &str,
    queue: Queue,
    metrics: Arc<Metrics>,
    pushes: bool,
    shutdown: CancellationToken,
) -> Result<std::net::SocketAddr> {
    let refuse = |error: std::io::Error| {
        Failure::user(
            "ORCHESTRATOR_LISTEN",
            format!("The orchestrator cannot listen: {error}"),
        )
        .at(format!("setting `orchestrator.listen` = {address}"))
        .hint("Give an address and a free port, such as 127.0.0.1:9187")
    };
    let listener = tokio::net::TcpListener::bind(address).await.map_err(refuse)?;
    let local = listener.local_addr().map_err(refuse)?;
    let shared = Shared { queue, metrics, pushes };
    let router = Router::new()
        .route("/metrics", get(text))
        .route("/health", get(health))
        .with_state(shared);
    tokio::spawn(async move {
        let stop = async move { shutdown.cancelled().await };
        if let Err(error) = axum::serve(listener, router).with_graceful_shutdown(stop).await {
            tracing::error!(%error, "metrics and health are not served any more");
        }
    });
    Ok(local)
}

async fn text(State(shared): State<Shared>) -> impl IntoResponse {
    let mut text = shared.metrics.text();
    let stats = tokio::time::timeout(PATIENCE, shared.queue.stats()).await;
    let is_up = matches!(&stats, Ok(Ok(_)));
    let _infallible = write!(
        text,
        "# HELP brightrun_database_up Whether the database answers.\n# TYPE brightrun_database_up gauge\n\
         brightrun_database_up {}\n# HELP brightrun_jobs Jobs by kind and state.\n# TYPE brightrun_jobs gauge\n",
        u8::from(is_up)
    );
    let mut oldest = String::from(
        "# HELP brightrun_oldest_ready_seconds How long the longest waiting job could have run already.\n\
         # TYPE brightrun_oldest_ready_seconds gauge\n",
    );
    for kind in stats.ok().and_then(std::result::Result::ok).unwrap_or_default() {
        let labels = format!("queue=\"{}\",kind=\"{}\"", escaped(&kind.queue), escaped(&kind.kind));
        for (state, count) in [
            ("ready", kind.ready),
            ("scheduled", kind.scheduled),
            ("running", kind.running),
            ("expired", kind.expired),
        ] {
            let _infallible = writeln!(text, "brightrun_jobs{{{labels},state=\"{state}\"}} {count}");
        }
        let seconds = kind.oldest_ready_seconds.unwrap_or(0.0);
        let _infallible = writeln!(oldest, "brightrun_oldest_ready_seconds{{{labels}}} {seconds}");
    }
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text + &oldest)
}

fn escaped(label: &str) -> String {
    label.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

async fn health(State(shared): State<Shared>) -> impl IntoResponse {
    let database = tokio::time::timeout(PATIENCE, shared.queue.check_schema()).await;
    let trouble = match database {
        Ok(Ok(())) => None,
        Ok(Err(error)) => Some(error.to_string()),
        Err(_) => Some(format!("the database does not answer within {PATIENCE:?}")),
    };
    let age = shared.metrics.since_last_pass();
    let is_overdue = shared.pushes && age.is_none_or(|age| age > OVERDUE);
    let is_healthy = trouble.is_none() && !is_overdue;
    let body = json!({
        "ok": is_healthy,
        "database": trouble.unwrap_or_else(|| "ok".to_owned()),
        "seconds_since_last_pass": age.map(|age| age.as_secs_f64()),
    });
    let status = if is_healthy {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    (status, axum::Json(body))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_of_the_text_is_a_comment_or_a_name_and_a_number() {
        let metrics = Metrics::default();
        metrics.sent();
        metrics.sent();
        metrics.waiting(7);
        let text = metrics.text();
        assert!(text.contains("\nbrightrun_push_sent_total 2\n") && text.contains("\nbrightrun_push_waiting 7\n"));
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let number = line.split_once(' ').map(|(_, number)| number.parse::<f64>().is_ok());
            assert_eq!(number, Some(true), "{line}");
        }
    }

    #[test]
    fn a_label_cannot_leave_its_quotes() {
        assert_eq!(escaped("a\"b\\c\nd"), "a\\\"b\\\\c\\nd");
    }
}
