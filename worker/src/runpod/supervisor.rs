//! The loop that holds everything together: takes, jobs, stops, and the way out.

use std::collections::{HashMap, VecDeque};
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use super::handler::{Handler, StopReason, StopSignal};
use super::heartbeat::Heartbeat;
use super::job::{Handed, RunPodJob};
use super::running::{self, Ended, Shared};
use super::stop;
use super::take::Taker;
use super::worker::{DrainMode, Exit};

/// How often the heartbeat thread is looked at.
const WATCH_EVERY: std::time::Duration = std::time::Duration::from_secs(5);

type Take = Pin<Box<dyn Future<Output = (Taker, Handed)> + Send>>;

/// A job that has a slot.
struct Running {
    stop: StopSignal,
    /// When the worker gives up waiting for its end.
    deadline: Option<Instant>,
}

/// Why no more jobs are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Leaving {
    /// Told to, by a signal.
    Draining,
    /// Replaced by the platform, or broken.
    Replaced,
}

pub(crate) struct Supervisor {
    shared: Arc<Shared>,
    handler: Arc<dyn Handler>,
    jobs: Handle,
    heartbeat: Option<Heartbeat>,
    shutdown: mpsc::UnboundedReceiver<()>,
    closing: CancellationToken,
    taker: Option<Taker>,
    concurrency: usize,
    backlog: VecDeque<RunPodJob>,
    running: HashMap<String, Running>,
    tasks: JoinSet<Ended>,
    leaving: Option<Leaving>,
    /// When the open take is closed without an answer.
    take_deadline: Option<Instant>,
    exit_code: u8,
}

impl Supervisor {
    pub fn new(
        shared: Arc<Shared>,
        handler: Arc<dyn Handler>,
        jobs: Handle,
        heartbeat: Option<Heartbeat>,
        shutdown: mpsc::UnboundedReceiver<()>,
    ) -> Self {
        let closing = CancellationToken::new();
        let taker = Taker::new(
            shared.http.clone(),
            shared.routes.clone(),
            shared.settings.pace.clone(),
            shared.in_flight.clone(),
            closing.clone(),
        );
        Self {
            concurrency: shared.settings.concurrency.max(1),
            shared,
            handler,
            jobs,
            heartbeat,
            shutdown,
            closing,
            taker: Some(taker),
            backlog: VecDeque::new(),
            running: HashMap::new(),
            tasks: JoinSet::new(),
            leaving: None,
            take_deadline: None,
            exit_code: 0,
        }
    }

    /// Works until told to leave.
    pub async fn run(mut self) -> Exit {
        let (stops_in, mut stops) = mpsc::unbounded_channel();
        self.listen_for_stops(stops_in);
        let mut watch = tokio::time::interval(WATCH_EVERY);
        let mut take: Option<Take> = None;
        loop {
            self.start_jobs();
            if take.is_none() {
                take = self.ask();
            }
            if self.leaving.is_some() && take.is_none() && self.running.is_empty() {
                return self.exit();
            }
            let (deadline, take_deadline) = (self.deadline(), self.take_deadline);
            tokio::select! {
                (taker, handed) = until_answered(&mut take) => {
                    take = None;
                    self.taker = Some(taker);
                    self.accept(handed);
                }
                Some(ended) = self.tasks.join_next() => match ended {
                    Ok(ended) => self.ended(&ended),
                    // Not the handler, which runs elsewhere, but this crate; the platform replaces the worker.
                    Err(error) => return Exit::new(1, format!("the worker hit a defect of its own: {error}")),
                },
                Some(ids) = stops.recv() => ids.iter().for_each(|id| self.stop(id)),
                Some(()) = self.shutdown.recv() => {
                    if self.leaving == Some(Leaving::Draining) {
                        return self.leave_at_once();
                    }
                    self.drain();
                }
                () = at(take_deadline) => {
                    take = None;
                    self.take_deadline = None;
                }
                () = at(deadline) => return Exit::new(1, "a job did not end in time after it was told to stop"),
                _ = watch.tick() => self.watch_heartbeat(),
            }
        }
    }

    /// Opens the stop channel where there is one; it ends with the runtime.
    fn listen_for_stops(&self, stops: mpsc::UnboundedSender<Vec<String>>) {
        if let Some(url) = self.shared.routes.stop() {
            let (http, pace) = (self.shared.http.clone(), self.shared.settings.pace.clone());
            tokio::spawn(stop::listen(http, url.to_owned(), pace, stops));
        }
    }

    /// Asks for as many jobs as there are free slots, unless some wait already.
    fn ask(&mut self) -> Option<Take> {
        if self.leaving.is_some() || !self.backlog.is_empty() {
            return None;
        }
        self.concurrency = self.handler.concurrency(self.concurrency).max(1);
        let free = self.concurrency.saturating_sub(self.running.len());
        if free == 0 {
            return None;
        }
        Some(Box::pin(self.taker.take()?.next(free)))
    }

    /// Takes in what was handed out: every job is in the heartbeats from here on.
    fn accept(&mut self, handed: Handed) {
        for job in handed.jobs {
            if self.leaving == Some(Leaving::Replaced)
                || (self.leaving.is_some() && self.shared.settings.drain == DrainMode::Checkpoint)
            {
                tracing::warn!(
                    request_id = job.id,
                    "handed out while leaving: not reported, so that it is handed out again soon"
                );
                continue;
            }
            if !self.shared.in_flight.add(&job.id) {
                tracing::warn!(request_id = job.id, "handed out twice: it is running here already");
                continue;
            }
            self.backlog.push_back(job);
        }
    }

    fn start_jobs(&mut self) {
        while self.running.len() < self.concurrency {
            let Some(job) = self.backlog.pop_front() else { break };
            let stop = StopSignal::default();
            let span = match &job.batch_id {
                Some(batch) => tracing::info_span!("job", request_id = job.id, batch_id = batch),
                None => tracing::info_span!("job", request_id = job.id),
            };
            let running = Running {
                stop: stop.clone(),
                deadline: None,
            };
            self.running.insert(job.id.clone(), running);
            let work = running::run(
                Arc::clone(&self.shared),
                Arc::clone(&self.handler),
                self.jobs.clone(),
                job,
                stop,
            );
            self.tasks.spawn(work.instrument(span));
            tracing::debug!(
                "Jobs in queue: {}. Jobs in progress: {}.",
                self.backlog.len(),
                self.running.len()
            );
        }
    }

    fn ended(&mut self, ended: &Ended) {
        self.running.remove(&ended.job);
        self.shared.in_flight.remove(&ended.job);
        let broken = ended.panicked && self.shared.settings.leave_after_panic;
        if broken {
            self.exit_code = 1;
        }
        if (ended.refresh || broken) && self.leaving.is_none() {
            tracing::info!("this worker is to be replaced; no more jobs are taken");
            self.leave(Leaving::Replaced);
        }
    }

    fn stop(&mut self, id: &str) {
        let waiting = self.backlog.len();
        self.backlog.retain(|job| job.id != id);
        if self.backlog.len() < waiting {
            self.shared.in_flight.remove(id);
            tracing::info!(request_id = id, "stopped before it had started");
        }
        if let Some(running) = self.running.get_mut(id) {
            tracing::info!(request_id = id, "told to stop");
            running.stop.give(StopReason::Cancelled);
            running
                .deadline
                .get_or_insert(Instant::now() + self.shared.settings.pace.stop_limit);
        }
    }

    fn drain(&mut self) {
        tracing::info!("told to leave; no more jobs are taken");
        self.leave(Leaving::Draining);
        if self.shared.settings.drain == DrainMode::Finish {
            return;
        }
        for job in self.backlog.drain(..) {
            tracing::warn!(request_id = job.id, "not started: it will be handed out again");
            self.shared.in_flight.remove(&job.id);
        }
        let limit = Instant::now() + self.shared.settings.drain_limit;
        for running in self.running.values_mut() {
            running.stop.give(StopReason::Draining);
            running.deadline = Some(running.deadline.map_or(limit, |deadline| deadline.min(limit)));
        }
    }

    fn leave(&mut self, how: Leaving) {
        self.leaving = Some(how);
        self.closing.cancel();
        self.take_deadline = Some(Instant::now() + self.shared.settings.pace.drain_take);
    }

    fn leave_at_once(&self) -> Exit {
        if self.running.is_empty() && self.backlog.is_empty() {
            return self.exit();
        }
        Exit::new(1, "told to leave twice: running jobs are abandoned")
    }

    fn exit(&self) -> Exit {
        let reason = match self.leaving {
            Some(Leaving::Replaced) => "this worker is replaced",
            _ => "told to leave; nothing is left to do",
        };
        Exit::new(self.exit_code, reason)
    }

    fn deadline(&self) -> Option<Instant> {
        self.running.values().filter_map(|running| running.deadline).min()
    }

    fn watch_heartbeat(&mut self) {
        let revived = self
            .heartbeat
            .as_mut()
            .map(|heartbeat| heartbeat.revive(std::time::Instant::now()));
        if let Some(Err(failure)) = revived {
            tracing::error!(%failure, "the heartbeat cannot be replaced");
        }
    }
}

async fn until_answered(take: &mut Option<Take>) -> (Taker, Handed) {
    match take {
        Some(take) => take.await,
        None => std::future::pending().await,
    }
}

async fn at(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}
