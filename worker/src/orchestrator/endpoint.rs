//! One endpoint: its client, and its rest after trouble.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::settings::EndpointSettings;
use crate::error::{Failure, Result};
use crate::runpod::{ClientOptions, RunPodClient};
use crate::secret::Secret;

/// First and longest rest.
const REST: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// An endpoint that jobs are pushed to.
pub(super) struct Endpoint {
    pub settings: EndpointSettings,
    pub client: RunPodClient,
    rest: Mutex<Rest>,
}

/// When calls are worth while again. One answer that says "too much" speaks for all jobs of the endpoint.
#[derive(Default)]
struct Rest {
    until: Option<Instant>,
    last: Duration,
}

impl Endpoint {
    pub fn new(settings: EndpointSettings, key: &Secret, options: ClientOptions) -> Result<Self> {
        Ok(Self {
            client: RunPodClient::new(key, settings.id.clone(), options)?,
            settings,
            rest: Mutex::default(),
        })
    }

    /// Whether the last call went wrong so recently that nothing new should be tried.
    pub fn is_resting(&self) -> bool {
        self.lock().until.is_some_and(|until| Instant::now() < until)
    }

    /// A call went wrong: the endpoint rests, each time twice as long.
    pub fn rest(&self, failure: &Failure) {
        let mut rest = self.lock();
        if rest.until.is_some_and(|until| Instant::now() < until) {
            return;
        }
        rest.last = (rest.last * 2).clamp(REST.0, REST.1);
        rest.until = Some(Instant::now() + rest.last);
        tracing::warn!(endpoint = self.settings.id, %failure, seconds = rest.last.as_secs(), "the endpoint rests");
    }

    /// A call went well.
    pub fn works(&self) {
        *self.lock() = Rest::default();
    }

    /// Cancels a run; false when it is not known whether RunPod has heard it.
    pub async fn cancel(&self, external_id: &str) -> bool {
        if self.is_resting() {
            return false;
        }
        match self.client.cancel(external_id).await {
            Ok(_) => {
                self.works();
                true
            }
            // Some answer 400 to a cancel of what is over.
            Err(failure) if failure.code == "RUNPOD_REQUEST_REFUSED" => true,
            Err(failure) => {
                self.rest(&failure);
                false
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Rest> {
        self.rest.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
