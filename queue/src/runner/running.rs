//! The table of running jobs: what the heartbeat, the listener and the drain share.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::Value;
use tokio::sync::Notify;

use super::context::StopSignal;
use crate::job::Lease;

/// One running job.
#[derive(Clone)]
pub(super) struct Running {
    pub(super) lease: Lease,
    pub(super) stop: StopSignal,
    /// Not sent yet.
    progress: Arc<Mutex<Option<Value>>>,
    /// Sent or not: an ending repeats it, for a beat that carries it may still be under way.
    latest: Arc<Mutex<Option<Value>>>,
}

impl Running {
    pub(super) fn new(lease: Lease) -> Self {
        Self {
            lease,
            stop: StopSignal::default(),
            progress: Arc::default(),
            latest: Arc::default(),
        }
    }

    /// The newest progress replaces one that was not sent yet: only the latest matters.
    pub(super) fn set_progress(&self, progress: Value) {
        *lock(&self.latest) = Some(progress.clone());
        *lock(&self.progress) = Some(progress);
    }

    pub(super) fn latest_progress(&self) -> Option<Value> {
        lock(&self.latest).clone()
    }

    pub(super) fn take_progress(&self) -> Option<Value> {
        lock(&self.progress).take()
    }

    /// Progress whose beat failed goes back, unless there is newer.
    pub(super) fn put_back_progress(&self, progress: Option<Value>) {
        let mut slot = lock(&self.progress);
        if slot.is_none() {
            *slot = progress;
        }
    }
}

/// All running jobs of a runner, by token.
#[derive(Default)]
pub(crate) struct RunningJobs {
    jobs: Mutex<HashMap<i64, Running>>,
    /// Asks for a heartbeat now.
    pub(super) beat_now: Notify,
}

impl RunningJobs {
    pub(super) fn add(&self, job: Running) {
        lock(&self.jobs).insert(job.lease.token, job);
    }

    pub(super) fn remove(&self, token: i64) {
        lock(&self.jobs).remove(&token);
    }

    pub(super) fn tokens(&self) -> Vec<i64> {
        lock(&self.jobs).keys().copied().collect()
    }

    pub(super) fn all(&self) -> Vec<Running> {
        lock(&self.jobs).values().cloned().collect()
    }

    pub(super) fn get(&self, token: i64) -> Option<Running> {
        lock(&self.jobs).get(&token).cloned()
    }
}

/// No code panics while holding these locks; were it to, the plain data inside is still whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
