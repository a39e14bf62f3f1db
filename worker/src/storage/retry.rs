//! What is tried again, and when.

use std::future::Future;
use std::time::Duration;

use crate::error::{Failure, Result};

/// Exponential backoff with jitter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RetryPolicy {
    /// Attempts in all, the first included.
    pub attempts: u32,
    /// The pause after the first failure; it doubles after each further one.
    pub first_pause: Duration,
    /// The longest pause, also where the service asks for a longer one.
    pub longest_pause: Duration,
}

impl Default for RetryPolicy {
    /// Six attempts over half a minute: longer than a gateway's restart, shorter than a lease.
    fn default() -> Self {
        Self {
            attempts: 6,
            first_pause: Duration::from_millis(500),
            longest_pause: Duration::from_secs(10),
        }
    }
}

/// Why one attempt failed.
#[derive(Debug)]
pub(crate) enum Attempt {
    /// Another attempt may succeed, at the earliest after the pause the service asked for.
    Again(Failure, Option<Duration>),
    /// Another attempt cannot succeed.
    Stop(Failure),
}

impl From<Failure> for Attempt {
    /// A failure of this machine is final; only an answer of the other side may be retried.
    fn from(failure: Failure) -> Self {
        Self::Stop(failure)
    }
}

/// Runs `operation` until it succeeds, fails for good, or the attempts are used up.
pub(crate) async fn retry<T, Operation, Running>(policy: &RetryPolicy, mut operation: Operation) -> Result<T>
where
    Operation: FnMut() -> Running,
    Running: Future<Output = Result<T, Attempt>>,
{
    let mut attempt = 1;
    loop {
        let (failure, asked) = match operation().await {
            Ok(value) => return Ok(value),
            Err(Attempt::Stop(failure)) => return Err(failure),
            Err(Attempt::Again(failure, asked)) => (failure, asked),
        };
        if attempt >= policy.attempts {
            return Err(failure);
        }
        let pause = pause(policy, attempt, asked);
        tracing::warn!(code = failure.code, attempt, ?pause, "storage: trying again");
        tokio::time::sleep(pause).await;
        attempt += 1;
    }
}

/// Between half and the whole of the exponential pause, so that many workers spread out.
fn pause(policy: &RetryPolicy, attempt: u32, asked: Option<Duration>) -> Duration {
    let doublings = (attempt - 1).min(16);
    let exponential = policy.first_pause.saturating_mul(1 << doublings);
    let jittered = exponential.mul_f64(0.5 + 0.5 * rand::random::<f64>());
    jittered.max(asked.unwrap_or_default()).min(policy.longest_pause)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::*;

    #[test]
    fn pauses_double_stay_bounded_and_respect_what_the_service_asks() {
        let policy = RetryPolicy {
            attempts: 40,
            first_pause: Duration::from_millis(100),
            longest_pause: Duration::from_secs(1),
        };
        for attempt in 1..40 {
            let pause = pause(&policy, attempt, None);
            let exponential = Duration::from_millis(100) * (1 << (attempt - 1).min(16));
            assert!(pause <= policy.longest_pause && pause >= (exponential / 2).min(policy.longest_pause));
        }
        assert_eq!(
            super::pause(&policy, 1, Some(Duration::from_millis(700))),
            Duration::from_millis(700)
        );
        assert_eq!(
            super::pause(&policy, 1, Some(Duration::from_secs(90))),
            policy.longest_pause
        );
    }
}
