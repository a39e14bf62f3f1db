//! Every waiting time of the worker in one place.

use std::time::Duration;

use rand::RngExt;

/// Waiting times. The defaults are those of production; tests shorten them.
#[derive(Clone, Debug)]
pub struct Pace {
    /// A take that is still unanswered is asked again.
    pub take_timeout: Duration,
    /// An empty answer that took at least this long was a true long poll: ask again at once.
    pub long_poll: Duration,
    /// First and longest wait after empty answers that came at once.
    pub take_empty: (Duration, Duration),
    /// First and longest wait after errors of the take.
    pub take_error: (Duration, Duration),
    /// Longest wait after 401, 403 and 404, which do not heal quickly.
    pub take_denied_max: Duration,
    /// Wait after a 429 that names no time.
    pub take_busy: Duration,
    /// First and longest wait between tries of a result.
    pub post_retry: (Duration, Duration),
    /// Wait after 401 and 403 to a result: the key may be rotating.
    pub post_denied: Duration,
    /// A result is given up after this long; it stays on disk.
    pub post_limit: Duration,
    /// Shortest time between two progress updates of a job.
    pub progress_every: Duration,
    /// A progress update is given up after this long.
    pub progress_timeout: Duration,
    /// A stop poll that is still unanswered is asked again.
    pub stop_timeout: Duration,
    /// Wait after an empty stop answer or an error of the stop channel.
    pub stop_pause: Duration,
    /// Wait after a 429 of the stop channel.
    pub stop_busy: Duration,
    /// Wait between polls of a stop channel that seems not to exist.
    pub stop_absent: Duration,
    /// A stopped job that has not ended after this long makes the worker leave: the platform replaces it.
    pub stop_limit: Duration,
    /// How long the open take may still bring a job when the worker is told to leave.
    pub drain_take: Duration,
    /// Wait before asking again for a job that another worker has.
    pub claim_again: Duration,
    /// A job that another worker has for this long is refused here.
    pub claim_limit: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            take_timeout: Duration::from_secs(90),
            long_poll: Duration::from_secs(1),
            take_empty: (Duration::from_millis(50), Duration::from_secs(1)),
            take_error: (Duration::from_millis(500), Duration::from_secs(10)),
            take_denied_max: Duration::from_secs(30),
            take_busy: Duration::from_secs(5),
            post_retry: (Duration::from_secs(1), Duration::from_secs(30)),
            post_denied: Duration::from_secs(30),
            post_limit: Duration::from_secs(600),
            progress_every: Duration::from_secs(1),
            progress_timeout: Duration::from_secs(5),
            stop_timeout: Duration::from_secs(90),
            stop_pause: Duration::from_secs(1),
            stop_busy: Duration::from_secs(5),
            stop_absent: Duration::from_secs(60),
            stop_limit: Duration::from_secs(60),
            drain_take: Duration::from_secs(1),
            claim_again: Duration::from_secs(5),
            claim_limit: Duration::from_secs(600),
        }
    }
}

/// Doubles from a first wait to a longest one.
#[derive(Debug, Default)]
pub(crate) struct Backoff {
    tries: u32,
}

impl Backoff {
    /// The next wait.
    pub fn next(&mut self, (first, longest): (Duration, Duration)) -> Duration {
        let wait = first.saturating_mul(1 << self.tries.min(20)).min(longest);
        self.tries = self.tries.saturating_add(1);
        wait
    }

    /// Starts again from the first wait.
    pub fn reset(&mut self) {
        self.tries = 0;
    }
}

/// Between half of `wait` and all of it, so that many workers do not come back at the same moment.
pub(crate) fn jitter(wait: Duration) -> Duration {
    wait.mul_f64(rand::rng().random_range(0.5..=1.0))
}

/// Between `wait` and a fifth more: for a time that the other side named.
pub(crate) fn at_least(wait: Duration) -> Duration {
    wait.mul_f64(rand::rng().random_range(1.0..=1.2))
}
