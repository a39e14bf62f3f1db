//! Our two profiles.

use std::time::{Duration, Instant};

use brightrun_queue::{
    BatchJob, Ending, Handler, JobContext, JobFailure, Lane, LaneConfig, LaneHandler, LaneRunner, NewJob, Queue, QueueConfig, Runner,
    RunnerConfig,
};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::{Engine, Outcome, Tally};

async fn queue(url: &str) -> Outcome<Queue> {
    Ok(Queue::connect(&QueueConfig::new(url)?.pool_size(8)).await?)
}

/// The engine's section of the schema works alone.
async fn migrate(queue: &Queue) -> Outcome {
    let file = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../../schema.sql"))?;
    let section = file.split("-- >>> engine").nth(1).and_then(|rest| rest.split("-- <<< engine").next());
    Ok(queue.migrate(section.ok_or("schema.sql has no engine section")?).await?)
}

/// Jobs of milliseconds.
#[derive(Clone)]
pub struct Quick(Lane);

#[async_trait::async_trait]
impl LaneHandler for Tally {
    async fn run(&self, _: &BatchJob) -> Result<(), JobFailure> {
        self.entered();
        Ok(())
    }
}

impl Engine for Quick {
    const OPEN: &'static str = "select exists (select from brightrun.brief) or exists (select from brightrun.brief_batch)";

    async fn connect(url: &str) -> Outcome<Self> {
        Ok(Self(queue(url).await?.lane("bench")))
    }

    async fn setup(&self) -> Outcome {
        migrate(self.0.queue()).await
    }

    async fn enqueue(&self, count: usize) -> Outcome {
        self.0.push_many(&vec![json!({}); count], None).await?;
        Ok(())
    }

    async fn work(&self, slots: usize, tally: Tally) -> Outcome {
        let config = LaneConfig { slots, ..LaneConfig::default() };
        LaneRunner::new(self.0.clone(), config, tally).run(CancellationToken::new()).await?;
        Ok(())
    }
}

/// Long jobs: a lease row, three history rows and a status each.
#[derive(Clone)]
pub struct Long(Queue);

#[async_trait::async_trait]
impl Handler for Tally {
    async fn run(&self, _: JobContext) -> Ending {
        self.entered();
        Ending::Complete(json!({}))
    }
}

impl Engine for Long {
    const OPEN: &'static str = "select exists (select from brightrun.ready) or exists (select from brightrun.lease)";

    async fn connect(url: &str) -> Outcome<Self> {
        Ok(Self(queue(url).await?))
    }

    async fn setup(&self) -> Outcome {
        migrate(&self.0).await
    }

    async fn enqueue(&self, count: usize) -> Outcome {
        let job = NewJob::new("bench", json!({}));
        if count == 1 {
            self.0.enqueue(&job).await?;
        } else {
            self.0.enqueue_many(&job, &vec![json!({}); count]).await?;
        }
        Ok(())
    }

    async fn work(&self, slots: usize, tally: Tally) -> Outcome {
        let config = RunnerConfig { slots, prefetch: 500, ..RunnerConfig::default() };
        Runner::new(self.0.clone(), config).handler("bench", tally).run(CancellationToken::new()).await?;
        Ok(())
    }
}

struct Hold;

#[async_trait::async_trait]
impl Handler for Hold {
    async fn run(&self, context: JobContext) -> Ending {
        for step in 0_u64.. {
            context.progress(json!({ "step": step }));
            tokio::select! {
                _ = context.stop().stopped() => break,
                () = tokio::time::sleep(Duration::from_secs(1)) => {}
            }
        }
        Ending::Release("the measurement is over".into())
    }
}

/// `count` running jobs in one process, each with new progress every second and a beat every ten. What it costs is measured from
/// outside, between `beating` and the end.
pub async fn beat(url: &str, count: usize) -> Outcome<Value> {
    let queue = queue(url).await?;
    queue.enqueue_many(&NewJob::new("held", json!({})), &vec![json!({}); count]).await?;
    let config = RunnerConfig { slots: count, ..RunnerConfig::default() };
    let runner = Runner::new(queue.clone(), config).handler("held", Hold);
    tokio::spawn(runner.run(CancellationToken::new()));
    while queue.stats().await?.iter().map(|kind| kind.running).sum::<i64>() < count as i64 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    tokio::time::sleep(Duration::from_secs(5)).await;
    println!("beating");
    let started = Instant::now();
    tokio::time::sleep(Duration::from_secs(40)).await;
    Ok(json!({ "running": count, "seconds": started.elapsed().as_secs_f64() }))
}
