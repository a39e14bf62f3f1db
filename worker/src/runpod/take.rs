//! Asking for jobs: one long poll at a time, paced so that no answer of the control plane makes the worker spin.

use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::heartbeat::InFlight;
use super::http::{Answer, Http, Silence};
use super::job::Handed;
use super::pace::{Backoff, Pace, at_least, jitter};
use super::routes::Routes;

/// The one who asks. It travels through [`Taker::next`], so that a poll is never cancelled to change its parameters: an answer on its
/// way would be lost until redelivery.
pub(crate) struct Taker {
    http: Http,
    routes: Routes,
    pace: Pace,
    in_flight: InFlight,
    /// No new poll begins after this.
    closing: CancellationToken,
    empty: Backoff,
    trouble: Backoff,
    wait: Duration,
    last_trouble: Option<String>,
}

impl Taker {
    pub fn new(http: Http, routes: Routes, pace: Pace, in_flight: InFlight, closing: CancellationToken) -> Self {
        Self {
            http,
            routes,
            pace,
            in_flight,
            closing,
            empty: Backoff::default(),
            trouble: Backoff::default(),
            wait: Duration::ZERO,
            last_trouble: None,
        }
    }

    /// Waits as the last answer asks, then asks once for up to `count` jobs.
    pub async fn next(mut self, count: usize) -> (Self, Handed) {
        tokio::select! {
            () = tokio::time::sleep(std::mem::take(&mut self.wait)) => {}
            () = self.closing.cancelled() => {}
        }
        if self.closing.is_cancelled() {
            return (self, Handed::default());
        }
        let url = self.routes.take(count, !self.in_flight.is_empty());
        let asked = Instant::now();
        let answer = self.http.get(&url, self.pace.take_timeout).await;
        let handed = self.judge(answer, asked.elapsed());
        (self, handed)
    }

    /// Reads an answer and decides how long to wait before the next one.
    fn judge(&mut self, answer: Result<Answer, Silence>, took: Duration) -> Handed {
        let answer = match answer {
            Ok(answer) => answer,
            // The long poll is over; nothing is wrong.
            Err(Silence::Timeout) => return self.nothing(self.pace.long_poll),
            Err(Silence::Broken(why)) => return self.failed(why, self.pace.take_error.1),
        };
        match answer.status {
            200 if answer.body.is_empty() => self.nothing(took),
            200 if !answer.is_json() => {
                self.note(format!("the answer is not JSON but {:?}", answer.content_type));
                self.nothing(took)
            }
            200 => self.handed(&answer, took),
            // 400 is expected around a revived worker.
            204 | 400 => self.nothing(took),
            429 => {
                self.wait = at_least(answer.retry_after.unwrap_or(self.pace.take_busy));
                Handed::default()
            }
            401 | 403 | 404 => self.failed(format!("status {}", answer.status), self.pace.take_denied_max),
            status => self.failed(format!("status {status}"), self.pace.take_error.1),
        }
    }

    fn handed(&mut self, answer: &Answer, took: Duration) -> Handed {
        let handed = Handed::read(&answer.body);
        for why in &handed.rejected {
            tracing::error!(%why, "a job cannot be run and is left alone");
        }
        if handed.jobs.is_empty() {
            self.nothing(took);
        } else {
            self.recovered();
        }
        handed
    }

    fn nothing(&mut self, took: Duration) -> Handed {
        if took >= self.pace.long_poll {
            self.empty.reset();
        } else {
            self.wait = self.empty.next(self.pace.take_empty);
        }
        self.trouble.reset();
        Handed::default()
    }

    fn failed(&mut self, why: String, longest: Duration) -> Handed {
        self.wait = jitter(self.trouble.next((self.pace.take_error.0, longest)));
        self.note(why);
        Handed::default()
    }

    /// Says what is wrong when it changes, not each time.
    fn note(&mut self, why: String) {
        if self.last_trouble.as_ref() != Some(&why) {
            tracing::warn!(%why, "no job could be taken; asking again with growing pauses");
            self.last_trouble = Some(why);
        }
    }

    fn recovered(&mut self) {
        self.empty.reset();
        self.trouble.reset();
        self.last_trouble = None;
    }
}
