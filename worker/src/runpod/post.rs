//! Results on their way: posted until acknowledged, replaced when refused, never lost to one dropped connection.

use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use super::http::{Answer, Http, Silence};
use super::pace::{Backoff, Pace, at_least, jitter};

/// How a post ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Delivery {
    /// The control plane has it.
    Acknowledged,
    /// The control plane does not know the job any more: cancelled, expired, or given to somebody else.
    Gone,
    /// The body itself was refused, with this status.
    Refused(u16),
    /// Not in the time there was; why, in words.
    GivenUp(String),
}

/// What one answer means.
enum Verdict {
    Final(Delivery),
    Again(Duration, String),
}

/// Posts `body` until an answer decides, at most for [`Pace::post_limit`].
pub(crate) async fn deliver(http: &Http, pace: &Pace, url: &str, job: &str, body: Bytes) -> Delivery {
    let started = Instant::now();
    let mut backoff = Backoff::default();
    loop {
        let answer = http.post_job(url, job, body.clone(), timeout(body.len())).await;
        let (wait, why) = match judge(answer, pace, &mut backoff) {
            Verdict::Final(delivery) => return delivery,
            Verdict::Again(wait, why) => (wait, why),
        };
        if started.elapsed() + wait > pace.post_limit {
            return Delivery::GivenUp(why);
        }
        tracing::warn!(%why, "a post of this job was not accepted; it is tried again in {wait:?}");
        tokio::time::sleep(wait).await;
    }
}

fn judge(answer: Result<Answer, Silence>, pace: &Pace, backoff: &mut Backoff) -> Verdict {
    let mut again = |why: String, named: Option<Duration>| {
        let wait = jitter(backoff.next(pace.post_retry));
        Verdict::Again(named.map_or(wait, at_least), why)
    };
    let answer = match answer {
        Ok(answer) => answer,
        Err(silence) => return again(silence.to_string(), None),
    };
    match answer.status {
        200..=299 => Verdict::Final(Delivery::Acknowledged),
        404 | 410 => Verdict::Final(Delivery::Gone),
        401 | 403 => Verdict::Again(pace.post_denied, format!("status {}", answer.status)),
        408 | 425 | 429 | 500..=599 | 300..=399 => again(format!("status {}", answer.status), answer.retry_after),
        status => Verdict::Final(Delivery::Refused(status)),
    }
}

/// A minute, and the time the body takes at 1 MB/s.
fn timeout(bytes: usize) -> Duration {
    Duration::from_secs((60 + bytes as u64 / 1_000_000).min(600))
}
