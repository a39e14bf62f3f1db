//! One engine, one phase, one line of JSON: `queue-bench ENGINE PHASE URL [NUMBER] [WORKERS]`.
//!
//! Engines: `lane` and `runner` are ours, for jobs of milliseconds and for long ones; `graphile-rs` is the graphile_worker crate,
//! once as its documentation sets it up for rate (local queue, batched completion). Phases: `setup`, `enqueue N`, `drain N W`
//! (until the database holds no open job), `latency N`, `steady SECONDS W` (a producer keeps about 20,000 waiting), and for ours
//! `beat N` (N running jobs, beating). The engine `raw` is none: its `latency N` is that of one small commit, the floor of all others.

mod graphile;
mod ours;

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_postgres::{Client, NoTls};

pub type Failure = Box<dyn std::error::Error + Send + Sync>;
pub type Outcome<T = ()> = Result<T, Failure>;

/// What handlers report to: a count, and the time of each entry for whoever listens.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    pub count: Arc<AtomicU64>,
    pub entered: Option<mpsc::UnboundedSender<Instant>>,
}

impl Tally {
    pub fn entered(&self) {
        if let Some(told) = &self.entered {
            let _ = told.send(Instant::now());
        }
        self.count.fetch_add(1, Ordering::Relaxed);
    }
}

/// What each engine can do. A worker runs until its task is dropped.
#[allow(async_fn_in_trait)]
pub trait Engine: Clone + Send + Sync + 'static {
    /// True while a job waits or runs.
    const OPEN: &'static str;
    fn connect(url: &str) -> impl Future<Output = Outcome<Self>> + Send;
    fn setup(&self) -> impl Future<Output = Outcome> + Send;
    fn enqueue(&self, count: usize) -> impl Future<Output = Outcome> + Send;
    fn work(&self, slots: usize, tally: Tally) -> impl Future<Output = Outcome> + Send;
}

#[tokio::main]
async fn main() -> Outcome {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [engine, phase, url, rest @ ..] = arguments.as_slice() else {
        return Err("usage: queue-bench ENGINE PHASE URL [NUMBER] [WORKERS]".into());
    };
    let number = |place: usize| rest.get(place).and_then(|text| text.parse().ok()).unwrap_or(1);
    let told = match engine.as_str() {
        "lane" => phase_of::<ours::Quick>(phase, url, number(0), number(1)).await?,
        "runner" if phase == "beat" => ours::beat(url, number(0)).await?,
        "runner" => phase_of::<ours::Long>(phase, url, number(0), number(1)).await?,
        "raw" => commits(url, number(0)).await?,
        "graphile-rs" => phase_of::<graphile::Graphile>(phase, url, number(0), number(1)).await?,
        other => return Err(format!("no engine {other}").into()),
    };
    println!("{told}");
    // Workers are dropped, not drained: the figures are in.
    std::process::exit(0);
}

async fn phase_of<E: Engine>(phase: &str, url: &str, number: usize, workers: usize) -> Outcome<Value> {
    let engine = E::connect(url).await?;
    match phase {
        "setup" => {
            engine.setup().await?;
            Ok(json!({}))
        }
        "enqueue" => enqueue(&engine, number).await,
        "drain" => drain(&engine, url, number, workers).await,
        "latency" => latency(&engine, number).await,
        "steady" => steady(&engine, number as u64, workers).await,
        other => Err(format!("no phase {other}").into()),
    }
}

async fn enqueue<E: Engine>(engine: &E, count: usize) -> Outcome<Value> {
    let started = Instant::now();
    let mut left = count;
    while left > 0 {
        let now = left.min(1000);
        engine.enqueue(now).await?;
        left -= now;
    }
    Ok(json!({ "jobs": count, "seconds": started.elapsed().as_secs_f64() }))
}

async fn plain(url: &str) -> Outcome<Client> {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
}

async fn drain<E: Engine>(engine: &E, url: &str, count: usize, workers: usize) -> Outcome<Value> {
    let client = plain(url).await?;
    let tally = Tally::default();
    let started = Instant::now();
    let worker = { let (engine, tally) = (engine.clone(), tally.clone()); tokio::spawn(async move { engine.work(workers, tally).await }) };
    while tally.count.load(Ordering::Relaxed) < count as u64 {
        if worker.is_finished() {
            return Err("the worker ended".into());
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    while client.query_one(E::OPEN, &[]).await?.get::<_, bool>(0) && count_is_all(count) {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    Ok(json!({ "jobs": tally.count.load(Ordering::Relaxed), "seconds": started.elapsed().as_secs_f64() }))
}

/// A part of a larger backlog is drained when that many handlers have run; only a whole one leaves the database empty.
fn count_is_all(_count: usize) -> bool {
    std::env::var_os("QUEUE_BENCH_PART").is_none()
}

async fn latency<E: Engine>(engine: &E, count: usize) -> Outcome<Value> {
    let (entered, mut entries) = mpsc::unbounded_channel();
    let tally = Tally { entered: Some(entered), ..Tally::default() };
    let worker = { let engine = engine.clone(); tokio::spawn(async move { engine.work(4, tally).await }) };
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let mut taken = Vec::with_capacity(count);
    for round in 0..count + 5 {
        let asked = Instant::now();
        engine.enqueue(1).await?;
        let entry = entries.recv().await.ok_or("the worker ended")?;
        if round >= 5 {
            taken.push((entry - asked).as_secs_f64() * 1e3);
        }
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
    worker.abort();
    Ok(quantiles(taken))
}

fn quantiles(mut taken: Vec<f64>) -> Value {
    taken.sort_by(f64::total_cmp);
    let at = |share: f64| taken[((taken.len() - 1) as f64 * share).round() as usize];
    json!({ "p50_ms": at(0.5), "p90_ms": at(0.9), "p99_ms": at(0.99), "max_ms": at(1.0) })
}

async fn commits(url: &str, count: usize) -> Outcome<Value> {
    let client = plain(url).await?;
    client.batch_execute("create table one (id bigint)").await?;
    let mut taken = Vec::with_capacity(count);
    for _ in 0..count {
        let asked = Instant::now();
        client.execute("insert into one values (1)", &[]).await?;
        taken.push(asked.elapsed().as_secs_f64() * 1e3);
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
    Ok(quantiles(taken))
}

async fn steady<E: Engine>(engine: &E, seconds: u64, workers: usize) -> Outcome<Value> {
    const BACKLOG: u64 = 20_000;
    let tally = Tally::default();
    let worker = { let (engine, tally) = (engine.clone(), tally.clone()); tokio::spawn(async move { engine.work(workers, tally).await }) };
    let producer = {
        let (engine, count) = (engine.clone(), tally.count.clone());
        tokio::spawn(async move {
            let mut pushed = 0_u64;
            loop {
                if pushed < count.load(Ordering::Relaxed) + BACKLOG {
                    engine.enqueue(500).await?;
                    pushed += 500;
                } else {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            }
            #[allow(unreachable_code)]
            Outcome::Ok(())
        })
    };
    let window = Duration::from_secs(10.min(seconds));
    let (mut rates, mut before) = (Vec::new(), 0);
    for _ in 0..(seconds / window.as_secs()) {
        let started = Instant::now();
        tokio::time::sleep(window).await;
        let now = tally.count.load(Ordering::Relaxed);
        rates.push(((now - before) as f64 / started.elapsed().as_secs_f64()).round());
        before = now;
        if worker.is_finished() || producer.is_finished() {
            return Err("worker or producer ended".into());
        }
    }
    Ok(json!({ "jobs": before, "seconds": seconds, "rates": rates }))
}
