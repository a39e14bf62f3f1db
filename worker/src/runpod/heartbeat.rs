//! The heartbeat: a thread of its own with a runtime and an HTTP client of its own.
//!
//! A job that does not appear in heartbeats for about 45 s is given to another worker, so nothing that training does may delay them.
//! The thread shares only the set of job ids. It dies with the process: a worker that was killed is silent at once.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use super::http::Http;
use super::routes::Routes;
use crate::error::{Failure, Result};

/// Tries of one heartbeat.
const TRIES: u32 = 4;

/// Intervals of silence after which the thread is taken for dead.
const STALLED_INTERVALS: u32 = 3;

/// The jobs this worker answers for: from the moment a take answer is read until the final post is acknowledged or given up.
#[derive(Clone, Debug, Default)]
pub(crate) struct InFlight {
    jobs: Arc<Mutex<BTreeSet<String>>>,
}

impl InFlight {
    /// Adds a job; false when it is there already.
    pub fn add(&self, job: &str) -> bool {
        self.lock().insert(job.to_owned())
    }

    /// Takes a job out.
    pub fn remove(&self, job: &str) {
        self.lock().remove(job);
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    /// All of them.
    pub fn all(&self) -> Vec<String> {
        self.lock().iter().cloned().collect()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeSet<String>> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the thread needs.
#[derive(Clone)]
struct Beat {
    routes: Routes,
    http: Http,
    jobs: InFlight,
    interval: Duration,
    started: Instant,
    /// Milliseconds from `started` to the last sign of life.
    last: Arc<AtomicU64>,
}

/// The running thread. Dropping it ends the heartbeats.
pub(crate) struct Heartbeat {
    beat: Beat,
    stop: CancellationToken,
    thread: Option<JoinHandle<()>>,
}

impl Heartbeat {
    /// Starts the thread.
    ///
    /// # Errors
    /// `RUNPOD_HEARTBEAT_UNAVAILABLE` when the system gives no thread.
    pub fn start(routes: Routes, http: Http, jobs: InFlight, interval: Duration) -> Result<Self> {
        let beat = Beat {
            routes,
            http,
            jobs,
            interval,
            started: Instant::now(),
            last: Arc::default(),
        };
        let stop = CancellationToken::new();
        let thread = Some(beat.clone().spawn(stop.clone())?);
        Ok(Self { beat, stop, thread })
    }

    /// Replaces a thread that has shown no life for [`STALLED_INTERVALS`]; says whether it had to.
    pub fn revive(&mut self, now: Instant) -> Result<bool> {
        let last = self.beat.started + Duration::from_millis(self.beat.last.load(Ordering::Relaxed));
        if now.saturating_duration_since(last) <= self.beat.interval * STALLED_INTERVALS {
            return Ok(false);
        }
        tracing::error!("the heartbeat thread has stalled and is replaced");
        self.stop.cancel();
        self.stop = CancellationToken::new();
        self.beat.alive();
        // The old thread is not waited for: it may never come back.
        self.thread = Some(self.beat.clone().spawn(self.stop.clone())?);
        Ok(true)
    }
}

impl Drop for Heartbeat {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Some(thread) = self.thread.take() {
            // A panic of the thread was reported by the panic hook.
            let _already_reported = thread.join();
        }
    }
}

impl Beat {
    fn spawn(self, stop: CancellationToken) -> Result<JoinHandle<()>> {
        let unavailable = |error: std::io::Error| {
            Failure::system(
                "RUNPOD_HEARTBEAT_UNAVAILABLE",
                format!("No heartbeat thread could be started: {error}"),
            )
        };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(unavailable)?;
        std::thread::Builder::new()
            .name("heartbeat".to_owned())
            .spawn(move || {
                runtime.block_on(self.run(stop));
                runtime.shutdown_background();
            })
            .map_err(unavailable)
    }

    async fn run(self, stop: CancellationToken) {
        let mut ticks = tokio::time::interval(self.interval);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let forever = async {
            loop {
                ticks.tick().await;
                self.once().await;
            }
        };
        tokio::select! {
            () = forever => {}
            () = stop.cancelled() => {}
        }
    }

    /// One heartbeat, tried again while the control plane is in trouble. The jobs are read for each try.
    async fn once(&self) {
        for attempt in 0..TRIES {
            // Nothing before the first repetition, then a fifth and two fifths of the interval: 0, 2 and 4 s by default.
            tokio::time::sleep(self.interval * attempt.saturating_sub(1) / 5).await;
            self.alive();
            let Some(url) = self.routes.ping(&self.jobs.all()) else {
                return;
            };
            let answer = self.http.get(&url, self.interval * 2).await;
            self.alive();
            match answer {
                Ok(answer) if !matches!(answer.status, 429 | 500 | 502 | 503 | 504) => return,
                Ok(answer) => tracing::debug!(status = answer.status, "a heartbeat was refused"),
                Err(silence) => tracing::debug!(%silence, "a heartbeat was not answered"),
            }
        }
        tracing::warn!("a heartbeat could not be delivered in {TRIES} tries");
    }

    fn alive(&self) {
        let now = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last.store(now, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::runpod::environment::Environment;
    use std::collections::BTreeMap;

    #[test]
    fn a_thread_that_shows_no_life_for_three_intervals_is_replaced_once() {
        let variables = BTreeMap::from(
            [
                ("RUNPOD_WEBHOOK_GET_JOB", "http://127.0.0.1:9/job-take/$ID"),
                ("RUNPOD_WEBHOOK_POST_OUTPUT", "http://127.0.0.1:9/job-done"),
            ]
            .map(|(name, value)| (name.to_owned(), value.to_owned())),
        );
        // No address for heartbeats: the thread only ticks.
        let routes = Routes::new(&Environment::read(&variables).unwrap(), "1.12.0");
        let interval = Duration::from_secs(3600);
        let mut heartbeat =
            Heartbeat::start(routes, Http::for_worker(None).unwrap(), InFlight::default(), interval).unwrap();
        let stop_of_the_first = heartbeat.stop.clone();
        assert!(!heartbeat.revive(Instant::now()).unwrap());
        assert!(heartbeat.revive(Instant::now() + interval * 4).unwrap());
        assert!(stop_of_the_first.is_cancelled() && !heartbeat.stop.is_cancelled());
        assert!(!heartbeat.revive(Instant::now()).unwrap());
    }
}
