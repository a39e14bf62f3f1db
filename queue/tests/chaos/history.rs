//! What happened, as its actors saw it: each call with the moments it was asked and answered, on one clock for all of them.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use uuid::Uuid;

/// What was asked.
#[derive(Clone, Debug, PartialEq)]
pub enum Call {
    /// New jobs of one priority, ready at once unless `delayed`.
    Enqueue {
        jobs: Vec<Uuid>,
        priority: i16,
        delayed: bool,
    },
    /// A claim and the leases it granted.
    Claim {
        granted: Vec<(Uuid, i64)>,
    },
    /// A write under a token; `ending` if it takes the lease with it.
    Write {
        job: Uuid,
        token: i64,
        what: &'static str,
        ending: bool,
    },
    Cancel {
        job: Uuid,
    },
    Redrive {
        job: Uuid,
    },
    /// A sweep, with a moved clock.
    Sweep,
    /// New jobs of the lane.
    Push {
        ids: Vec<i64>,
    },
    /// A batch of the lane.
    Take {
        token: i64,
        ids: Vec<i64>,
    },
    /// The end of one job of a batch.
    Finish {
        token: i64,
        id: i64,
        failed: bool,
    },
}

/// What was answered.
#[derive(Clone, Debug, PartialEq)]
pub enum Answer {
    /// Done; the word the engine said, if any.
    Accepted(String),
    /// Not done, for the caller may not.
    Refused,
    /// Not done; another transaction was in the way.
    Aborted,
    /// The connection broke: done or not.
    Unknown,
}

/// One call. Of two calls, one came surely before the other if its `answered` is less than the other's `asked`.
#[derive(Clone, Debug)]
pub struct Entry {
    pub asked: u64,
    pub answered: u64,
    pub call: Call,
    pub answer: Answer,
}

impl Entry {
    pub fn is_accepted(&self) -> bool {
        matches!(self.answer, Answer::Accepted(_))
    }
}

/// The recorder.
#[derive(Default)]
pub struct History {
    clock: AtomicU64,
    entries: Mutex<Vec<Entry>>,
}

impl History {
    /// A moment, later than all before.
    pub fn now(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::SeqCst)
    }

    pub fn record(&self, asked: u64, call: Call, answer: Answer) {
        // That holds for a call without an answer, too: calls are cut off by the server's end of the connection, and a backend that is
        // gone does nothing any more.
        let answered = self.now();
        let entry = Entry {
            asked,
            answered,
            call,
            answer,
        };
        self.entries.lock().unwrap_or_else(PoisonError::into_inner).push(entry);
    }

    /// How many calls there were.
    pub fn count(&self) -> usize {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    pub fn entries(&self) -> Vec<Entry> {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner).clone();
        entries.sort_by_key(|entry| entry.asked);
        entries
    }
}
