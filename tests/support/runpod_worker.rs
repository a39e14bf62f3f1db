//! A worker under test: in a thread of this process, with short waiting times and a handler that does what its input says.
#![allow(dead_code, clippy::unwrap_used, clippy::panic)]

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use async_trait::async_trait;
use brightrun_worker::error::{Failure, Result};
use brightrun_worker::runpod::{
    Claim, DrainMode, Environment, Exit, Handler, JobContext, OutputForm, Pace, RunPodJob, Settings, Shutdown,
    StopReason, Worker,
};
use serde_json::{Value, json};
use tokio::sync::Semaphore;

use crate::fake_runpod::FakeRunPod;

/// Waiting times that keep their proportions but let a test end soon.
pub fn quick() -> Pace {
    let ms = Duration::from_millis;
    Pace {
        take_error: (ms(50), ms(400)),
        take_denied_max: ms(800),
        take_busy: ms(400),
        post_retry: (ms(20), ms(200)),
        post_denied: ms(200),
        post_limit: Duration::from_secs(20),
        progress_every: ms(200),
        progress_timeout: ms(500),
        stop_pause: ms(20),
        stop_busy: ms(400),
        stop_absent: Duration::from_secs(60),
        stop_limit: Duration::from_secs(20),
        claim_again: ms(20),
        ..Pace::default()
    }
}

/// Settings with such times. SIGTERM is for the whole process and so for tests that have one to themselves.
pub fn settings() -> Settings {
    Settings {
        pace: quick(),
        handle_signals: false,
        drain: DrainMode::Finish,
        ..Settings::default()
    }
}

/// Does what a job's input says:
///
/// | key | what happens |
/// |---|---|
/// | `return` | the value is the output |
/// | `fail` | a failure with this message |
/// | `panic` | a panic with this message |
/// | `wait` | waits for [`Mock::release`], or for the stop signal |
/// | `block` | blocks its thread until released, looking at the stop signal now and then |
/// | `stubborn` | as `block`, but never looks at the signal |
/// | `progress` | reports these values first |
/// | `chunks` | streams these values first |
#[derive(Default)]
pub struct Mock {
    pub runs: AtomicUsize,
    pub most_at_once: AtomicUsize,
    pub at_once: AtomicUsize,
    pub stopped_with: Mutex<Vec<StopReason>>,
    pub gate: Gate,
    pub form: OutputForm,
    /// Answers to `claim`, in order; `Run` after the last.
    pub claims: Mutex<Vec<Claim>>,
    pub concurrency: Option<usize>,
}

/// Holds jobs back until the test lets them go.
pub struct Gate {
    permits: Semaphore,
}

impl Default for Gate {
    fn default() -> Self {
        Self {
            permits: Semaphore::new(0),
        }
    }
}

impl Gate {
    async fn pass(&self) {
        self.permits.acquire().await.unwrap().forget();
    }

    fn try_pass(&self) -> bool {
        self.permits.try_acquire().map(|permit| permit.forget()).is_ok()
    }
}

impl Mock {
    /// Lets `count` waiting jobs go on.
    pub fn release(&self, count: usize) {
        self.gate.permits.add_permits(count);
    }

    pub fn runs(&self) -> usize {
        self.runs.load(Ordering::SeqCst)
    }

    fn stopped(&self, reason: StopReason) -> Failure {
        self.stopped_with.lock().unwrap().push(reason);
        Failure::platform("TEST_STOPPED", "stopped")
    }

    async fn work(&self, input: &Value, context: &JobContext) -> Result<Value> {
        for value in input["progress"].as_array().into_iter().flatten() {
            context.progress(value.clone());
        }
        for value in input["chunks"].as_array().into_iter().flatten() {
            context.stream(value.clone()).await?;
        }
        if input.get("wait").is_some() {
            tokio::select! {
                () = self.gate.pass() => {}
                reason = context.stopped().wait() => return Err(self.stopped(reason)),
            }
        }
        while input.get("block").is_some() && !self.gate.try_pass() {
            if let Some(reason) = context.stopped().reason() {
                return Err(self.stopped(reason));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        while input.get("stubborn").is_some() && !self.gate.try_pass() {
            std::thread::sleep(Duration::from_millis(2));
        }
        if let Some(message) = input["panic"].as_str() {
            panic!("{message}");
        }
        match input["fail"].as_str() {
            Some(message) => Err(Failure::user("TEST_FAILED", message).at("the test's handler")),
            None => Ok(input.get("return").cloned().unwrap_or_else(|| json!({"echo": input}))),
        }
    }
}

#[async_trait]
impl Handler for Mock {
    async fn run(&self, job: RunPodJob, context: JobContext) -> Result<Value> {
        self.runs.fetch_add(1, Ordering::SeqCst);
        let now = self.at_once.fetch_add(1, Ordering::SeqCst) + 1;
        self.most_at_once.fetch_max(now, Ordering::SeqCst);
        let result = self.work(&job.input, &context).await;
        self.at_once.fetch_sub(1, Ordering::SeqCst);
        result
    }

    async fn claim(&self, _job: &RunPodJob) -> Result<Claim> {
        let mut claims = self.claims.lock().unwrap();
        Ok(if claims.is_empty() {
            Claim::Run
        } else {
            claims.remove(0)
        })
    }

    fn output(&self) -> OutputForm {
        self.form
    }

    fn concurrency(&self, current: usize) -> usize {
        self.concurrency.unwrap_or(current)
    }
}

/// A worker at work. Dropping it makes it leave.
pub struct Running {
    shutdown: Shutdown,
    thread: Option<JoinHandle<Exit>>,
    pub mock: Arc<Mock>,
    jobs: Option<tokio::runtime::Runtime>,
}

/// Starts a worker against the control plane.
pub fn start(plane: &FakeRunPod, mock: Mock, settings: Settings) -> Running {
    let environment = Environment::read(&plane.variables()).unwrap();
    start_worker(Worker::new(environment, settings), mock)
}

/// Starts this worker.
pub fn start_worker(worker: Worker, mock: Mock) -> Running {
    let jobs = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    let (handle, mock, shutdown) = (jobs.handle().clone(), Arc::new(mock), worker.shutdown());
    let handler = Arc::clone(&mock);
    Running {
        shutdown,
        thread: Some(std::thread::spawn(move || worker.run(handler, handle))),
        mock,
        jobs: Some(jobs),
    }
}

impl Running {
    /// Tells the worker to leave.
    pub fn leave(&self) {
        self.shutdown.request();
    }

    /// Waits for the worker's end.
    pub fn exit(mut self) -> Exit {
        self.thread.take().unwrap().join().unwrap()
    }

    pub fn is_over(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Handlers that listen to nothing else are let go; the second request means: at once, whatever is running.
        self.mock.release(1000);
        self.shutdown.request();
        self.shutdown.request();
        if let Some(jobs) = self.jobs.take() {
            jobs.shutdown_background();
        }
        if let Some(thread) = self.thread.take() {
            let _the_test_has_its_own_verdict = thread.join();
        }
    }
}
