//! Wake-ups on both sides: when to send a hint that something is ready, and what to make of one that arrives.
//!
//! Transactions that notify commit one at a time on the whole server, so a process sends at most one hint per [`WINDOW`]. The first
//! one of a quiet time travels inside the enqueuing statement, which spares a round trip; those after it share one that leaves when
//! the window closes.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

/// Hints within this time share one. Far below what a person or a long job notices, far above what a commit takes.
const WINDOW: Duration = Duration::from_millis(5);

/// How a hint is to be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hint {
    /// With the statement itself.
    Now,
    /// By whoever was told this, when the window closes.
    Later,
    /// Somebody else was told [`Hint::Later`] already.
    Shared,
}

/// The sender's side: at most two hints per window.
#[derive(Default)]
pub(crate) struct WakeWindow {
    state: Mutex<Window>,
}

#[derive(Default)]
struct Window {
    opened: Option<Instant>,
    later_promised: bool,
}

impl WakeWindow {
    pub(crate) fn next(&self) -> Hint {
        let mut window = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if window.later_promised {
            return Hint::Shared;
        }
        if window.opened.is_some_and(|opened| opened.elapsed() < WINDOW) {
            window.later_promised = true;
            return Hint::Later;
        }
        window.opened = Some(Instant::now());
        Hint::Now
    }

    /// Waits out the window and opens the next. Its hint is to be sent afterwards: what becomes ready from then on gets its own.
    pub(crate) async fn closed(&self) {
        tokio::time::sleep(WINDOW).await;
        let mut window = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        window.opened = Some(Instant::now());
        window.later_promised = false;
    }
}

/// What made a worker look for work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Look {
    /// A hint.
    Woken,
    /// The clock, or a slot that became free.
    Polled,
}

/// The receiver's side.
#[derive(Default)]
pub(crate) struct WakeUp {
    notify: Notify,
    crowded: AtomicBool,
}

impl WakeUp {
    pub(crate) fn wake(&self) {
        self.notify.notify_one();
    }

    pub(crate) async fn woken(&self) {
        self.notify.notified().await;
    }

    /// Notes whether a look found work. One that a hint asked for and that came too late means that others listen as well.
    pub(crate) fn found(&self, look: Look, some: bool) {
        if look == Look::Woken {
            self.crowded.store(!some, Ordering::Relaxed);
        }
    }

    pub(crate) fn is_crowded(&self) -> bool {
        self.crowded.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_burst_of_hints_is_one_at_its_head_and_one_at_its_end() {
        let window = WakeWindow::default();
        let told: Vec<Hint> = (0..4).map(|_| window.next()).collect();
        assert_eq!(told, [Hint::Now, Hint::Later, Hint::Shared, Hint::Shared]);
        window.closed().await;
        assert_eq!(
            window.next(),
            Hint::Later,
            "what comes after the last hint gets another one"
        );
    }

    #[test]
    fn only_a_hint_that_found_nothing_makes_it_crowded() {
        let wake = WakeUp::default();
        wake.found(Look::Polled, false);
        assert!(!wake.is_crowded());
        wake.found(Look::Woken, false);
        assert!(wake.is_crowded());
        wake.found(Look::Woken, true);
        assert!(!wake.is_crowded());
    }
}
