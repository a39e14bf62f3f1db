//! `brightrun queue …`: the queue as its operator sees it. Everything is done by the queue crate; this file only says it.

use std::time::Duration;

use brightrun_queue::{JobState, Queue};
use clap::{Args, Subcommand};
use serde::Serialize;
use serde_json::json;
use uuid::Uuid;

use super::output::{print_json, print_line};
use super::queue_limits::{self, Limits};
use super::service::connect;
use crate::error::{Failure, Result};

/// Time between looks of `drain`.
const LOOK: Duration = Duration::from_secs(1);

/// `queue`.
#[derive(Debug, Args)]
pub struct QueueArguments {
    /// What to do.
    #[command(subcommand)]
    pub action: Action,
    /// Print JSON instead of text
    #[arg(long, global = true)]
    pub json: bool,
}

/// What can be done.
#[derive(Debug, Subcommand)]
pub enum Action {
    /// What waits and what runs, by queue and kind
    Stats,
    /// The runs that have gone on longest
    Top {
        /// At most so many
        #[arg(long, default_value_t = 20)]
        limit: usize,
    },
    /// Why a job is not running
    Explain {
        /// Which job
        job: Uuid,
    },
    /// Give failed jobs a fresh set of attempts: one by its id, or many by kind
    Requeue {
        /// Which job
        #[arg(required_unless_present = "kind", conflicts_with = "kind")]
        job: Option<Uuid>,
        /// All failed jobs of a kind
        #[arg(long)]
        kind: Option<String>,
        /// Only those with this error code
        #[arg(long, requires = "kind")]
        code: Option<String>,
        /// At most so many
        #[arg(long, default_value_t = 100)]
        limit: usize,
    },
    /// Stop claims from a queue; what runs goes on
    Pause(Place),
    /// Let claims from a queue go on
    Resume(Place),
    /// Pause a queue and wait until nothing of it runs
    Drain(Place),
    /// Forget jobs that ended long ago, and their idempotency keys
    Prune {
        /// Days since their end
        #[arg(long, default_value_t = 90)]
        days: u32,
    },
    /// Whether the engine in the database is in good order, and what to be woken for
    Doctor,
    /// Everything measurable in the words of Prometheus
    Metrics,
    /// Cancel jobs of a kind that wait or run
    Cancel {
        /// Which kind
        #[arg(long)]
        kind: String,
        /// Only those of this owner
        #[arg(long)]
        owner: Option<Uuid>,
        /// Why, for those who ask
        #[arg(long)]
        reason: Option<String>,
        /// At most so many
        #[arg(long, default_value_t = 100)]
        limit: usize,
    },
    /// How many may run, how many may start, what they may cost
    #[command(flatten)]
    Limits(Limits),
}

/// A queue by name.
#[derive(Debug, Args)]
pub struct Place {
    /// Which queue
    #[arg(default_value = "default")]
    pub queue: String,
    /// Why, for those who ask
    #[arg(long)]
    pub reason: Option<String>,
}

/// Runs `brightrun queue …`.
///
/// # Errors
/// Those of the database; `QUEUE_UNHEALTHY` when the doctor finds something.
pub async fn run(arguments: &QueueArguments) -> Result<()> {
    let queue = connect().await?;
    let told = Told(arguments.json);
    match &arguments.action {
        Action::Stats => {
            let lines = queue.stats().await?;
            told.list(&lines, |kind| {
                let oldest = kind
                    .oldest_ready_seconds
                    .map(|age| format!(", the oldest for {age:.0} s"))
                    .unwrap_or_default();
                format!(
                    "{}/{}: {} ready{oldest}, {} scheduled, {} running, {} expired",
                    kind.queue, kind.kind, kind.ready, kind.scheduled, kind.running, kind.expired
                )
            })
        }
        Action::Top { limit } => told.list(&queue.top(*limit).await?, |job| {
            format!(
                "{} {} on {}: {:.0} s, heard of {:.0} s ago, attempt {}",
                job.job_id, job.kind, job.worker, job.running_seconds, job.beat_seconds, job.attempt
            )
        }),
        Action::Explain { job } => told.list(&queue.explain(*job).await?, Clone::clone),
        Action::Requeue { job, kind, code, limit } => {
            let count = requeue(&queue, *job, kind.as_deref(), code.as_deref(), *limit).await?;
            told.one(&json!({ "requeued": count }), &format!("{count} jobs wait again."))
        }
        Action::Pause(place) => {
            let running = queue.pause(&place.queue, place.reason.as_deref()).await?;
            told.one(
                &json!({ "running": running }),
                &format!("`{}` is paused; {running} jobs of it run.", place.queue),
            )
        }
        Action::Resume(place) => {
            let resumed = queue.resume(&place.queue).await?;
            let word = if resumed { "goes on" } else { "was not paused" };
            told.one(&json!({ "resumed": resumed }), &format!("`{}` {word}.", place.queue))
        }
        Action::Drain(place) => {
            while queue.pause(&place.queue, place.reason.as_deref()).await? > 0 {
                tokio::time::sleep(LOOK).await;
            }
            told.one(
                &json!({ "running": 0 }),
                &format!("`{}` is paused and nothing of it runs.", place.queue),
            )
        }
        Action::Prune { days } => {
            let forgotten = prune(&queue, *days).await?;
            told.one(
                &json!({ "pruned": forgotten }),
                &format!("{forgotten} jobs are forgotten."),
            )
        }
        Action::Doctor => doctor(&queue, told).await,
        Action::Metrics => print_line(queue.metrics().await?.trim_end()),
        Action::Cancel {
            kind,
            owner,
            reason,
            limit,
        } => {
            let count = queue.cancel_many(kind, *owner, reason.as_deref(), *limit).await?;
            told.one(
                &json!({ "cancelled": count }),
                &format!("{count} jobs are cancelled, or will be when their workers hear of it."),
            )
        }
        Action::Limits(limits) => queue_limits::run(&queue, limits, told).await,
    }
}

async fn requeue(
    queue: &Queue,
    job: Option<Uuid>,
    kind: Option<&str>,
    code: Option<&str>,
    limit: usize,
) -> Result<i32> {
    let (Some(job), None) = (job, kind) else {
        return Ok(queue.redrive_many(kind.unwrap_or_default(), code, limit).await?);
    };
    if queue.redrive(job, Some("requeued by hand")).await? {
        return Ok(1);
    }
    Err(match queue.status(job).await?.map(|status| status.state) {
        None => Failure::user("JOB_MISSING", format!("There is no job {job}.")),
        Some(JobState::Failed) => {
            Failure::platform("QUEUE_COLLISION", format!("Job {job} is just changing; try again."))
        }
        Some(state) => Failure::user(
            "JOB_NOT_FAILED",
            format!("Job {job} is {state}; only failed jobs are requeued."),
        ),
    })
}

async fn prune(queue: &Queue, days: u32) -> Result<i64> {
    const BITE: usize = 1000;
    let retention = Duration::from_secs(u64::from(days) * 86_400);
    let mut forgotten = 0;
    loop {
        let bite = queue.prune(retention, BITE).await?;
        forgotten += i64::from(bite);
        if (bite as usize) < BITE {
            return Ok(forgotten);
        }
    }
}

async fn doctor(queue: &Queue, told: Told) -> Result<()> {
    let (findings, alarms) = (queue.doctor().await?, queue.alarms().await?);
    let bad = findings.iter().filter(|finding| finding.ok == Some(false)).count() + alarms.len();
    if told.0 {
        print_json(&json!({ "findings": findings, "alarms": alarms }))?;
    } else {
        for finding in &findings {
            let message = finding.message.as_deref().unwrap_or("not known yet");
            match finding.ok {
                Some(false) => print_line(&format!("BAD  {}: {message}. {}", finding.item, finding.hint))?,
                _ => print_line(&format!("ok   {}: {message}", finding.item))?,
            }
        }
        for alarm in &alarms {
            print_line(&format!("BAD  {}: {}. {}", alarm.alarm, alarm.message, alarm.hint))?;
        }
    }
    if bad == 0 {
        return Ok(());
    }
    Err(Failure::system(
        "QUEUE_UNHEALTHY",
        format!("{bad} things about the queue want attention."),
    ))
}

/// Says it as JSON or as text.
#[derive(Clone, Copy)]
pub(super) struct Told(bool);

impl Told {
    pub(super) fn one(self, json: &serde_json::Value, text: &str) -> Result<()> {
        if self.0 { print_json(json) } else { print_line(text) }
    }

    fn list<T: Serialize>(self, lines: &[T], text: impl Fn(&T) -> String) -> Result<()> {
        if self.0 {
            return print_json(&lines);
        }
        if lines.is_empty() {
            return print_line("Nothing.");
        }
        lines.iter().try_for_each(|line| print_line(&text(line)))
    }
}
