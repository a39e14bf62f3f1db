//! Pushing waiting jobs to RunPod endpoints, and keeping their rows true whatever becomes of them there.
//!
//! ```text
//!   waiting row ──▶ plan ──▶ dispatch_begin ──▶ POST /run {"job_id"} ──▶ dispatch_sent
//!                     │         (a place at the endpoint, money set aside, a token)      │
//!                  refuse                                                                ▼
//!   job row ◀── the worker claims it like any other                    looked at every few seconds:
//!                                                                      the row first, RunPod's /status only where it waits
//! ```
//!
//! | file | what it knows |
//! |---|---|
//! | [`settings`] | endpoints, ceilings, intervals |
//! | [`plan`] | endpoint, time limits and price of one job |
//! | [`look`] | what row and RunPod's answer together mean |
//! | `endpoint` | one endpoint's client, and its rest after trouble |
//! | [`metrics`] | what is counted; `/metrics` and `/health` |
//! | [`webhooks`] | the app is told what became of its jobs |
//!
//! # Invariants
//!
//! 1. Nothing is remembered here: a restart at any moment loses nothing, and any number of orchestrators may work at once.
//! 2. A job may reach RunPod twice; the claim lets it run once.
//! 3. A run at RunPod that ends before a worker has claimed the job is a counted attempt; later the engine's lease decides.
//! 4. RunPod's answer never completes a job.

mod endpoint;
pub mod look;
pub mod metrics;
pub mod plan;
pub mod settings;
pub mod webhooks;

use std::sync::Arc;
use std::time::Duration;

use brightrun_queue::{Blame, DispatchEnd, DispatchRequest, DispatchTicket, Dispatched, JobFailure, Queue, WaitingJob};
use futures_util::{StreamExt, stream};
use serde_json::json;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use self::endpoint::Endpoint;
use self::look::{FromRow, FromRunPod};
use self::metrics::Metrics;
use self::plan::{Decision, Plan};
use crate::config::Config;
use crate::error::{Failure, Result};
use crate::runpod::ClientOptions;
use crate::secret::Secret;

/// What is pushed.
const KIND: &str = "train";
const QUEUE: &str = "default";

/// Waiting jobs looked at in one pass: more than all endpoints together take, or one GPU type could hide the others.
const WAITING: usize = 1000;

/// Pushed jobs looked at in one pass.
const LOOKS: usize = 200;

/// Calls to RunPod at once; its own limits begin at 200 for `/run` and 20 for `/cancel`.
const AT_ONCE: usize = 16;

/// How long an orchestrator may take with one dispatch before another one takes it over.
const HOLD: Duration = Duration::from_secs(90);

/// A submission of which it is not known whether it arrived is repeated after this long.
const IN_DOUBT: Duration = Duration::from_secs(15);

/// Pushes jobs and looks after them.
pub struct Orchestrator {
    queue: Queue,
    config: Config,
    endpoints: Vec<Endpoint>,
    metrics: Arc<Metrics>,
    /// A place at an endpoint has become free.
    freed: Notify,
}

impl Orchestrator {
    /// An orchestrator for the configured endpoints.
    ///
    /// # Errors
    /// `RUNPOD_KEY_INVALID`, `RUNPOD_CLIENT_UNAVAILABLE`.
    pub fn new(queue: Queue, config: Config, key: &Secret, metrics: Arc<Metrics>) -> Result<Self> {
        let settings = &config.orchestrator;
        let options = ClientOptions {
            base: settings.api_base.clone(),
            // Long trouble is the endpoint's rest, not a call's: a call that waits holds a dispatch.
            limit: Duration::from_secs(10),
            ..ClientOptions::default()
        };
        let endpoints = settings
            .endpoints
            .iter()
            .map(|settings| Endpoint::new(settings.clone(), key, options.clone()))
            .collect::<Result<Vec<_>>>()?;
        Ok(Self {
            queue,
            config,
            endpoints,
            metrics,
            freed: Notify::new(),
        })
    }

    /// Works until `shutdown`.
    pub async fn run(&self, shutdown: &CancellationToken) {
        tokio::select! {
            () = shutdown.cancelled() => {}
            ((), ()) = async { tokio::join!(self.keep_pushing(), self.keep_looking()) } => {}
        }
    }

    fn poll(&self) -> Duration {
        Duration::from_secs(self.config.orchestrator.poll_seconds)
    }

    async fn keep_pushing(&self) {
        loop {
            match self.push().await {
                Ok(()) => self.metrics.alive(),
                Err(error) => tracing::warn!(%error, hint = error.hint(), "waiting jobs cannot be looked at"),
            }
            tokio::select! {
                () = tokio::time::sleep(self.poll()) => {}
                () = self.freed.notified() => {}
            }
        }
    }

    async fn keep_looking(&self) {
        loop {
            let looked = match self.look().await {
                Ok(looked) => looked,
                Err(error) => {
                    tracing::warn!(%error, hint = error.hint(), "pushed jobs cannot be looked at");
                    0
                }
            };
            if looked < LOOKS {
                tokio::time::sleep(self.poll() / 4).await;
            }
        }
    }

    /// One pass over the waiting jobs.
    async fn push(&self) -> brightrun_queue::Result<()> {
        let waiting = self.queue.dispatch_waiting(QUEUE, KIND, WAITING).await?;
        self.metrics.waiting(waiting.len());
        let mut is_full = vec![false; self.endpoints.len()];
        let mut sends = Vec::new();
        for job in waiting {
            if is_full.iter().all(|is_full| *is_full) {
                break;
            }
            let Some(plan) = self.plan(&job).await? else { continue };
            let Some(endpoint) = self.endpoints.get(plan.endpoint) else {
                continue;
            };
            if is_full.get(plan.endpoint).copied().unwrap_or(true) || endpoint.is_resting() {
                continue;
            }
            match self.begin(&job, &plan, endpoint).await? {
                Some(ticket) => sends.push((ticket, plan)),
                None => {
                    if let Some(full) = is_full.get_mut(plan.endpoint) {
                        *full = self.is_full(&job);
                    }
                }
            }
            if sends.len() >= AT_ONCE {
                self.send_all(std::mem::take(&mut sends)).await;
            }
        }
        self.send_all(sends).await;
        Ok(())
    }

    /// A place was refused: by the endpoint's limit, unless it was the owner's money, which says nothing of other jobs.
    fn is_full(&self, job: &WaitingJob) -> bool {
        job.owner.is_none() || self.config.orchestrator.max_user_dollars <= 0.0
    }

    async fn plan(&self, job: &WaitingJob) -> brightrun_queue::Result<Option<Plan>> {
        match plan::decide(&job.payload, &self.config) {
            Decision::Push(plan) => {
                let ceiling = self.config.orchestrator.max_user_dollars;
                if let (Some(owner), true) = (job.owner, ceiling > 0.0) {
                    let spent = self.queue.dispatch_spend(owner).await?.spent;
                    if plan::is_over(spent + plan.dollars, ceiling) {
                        self.refuse(job.job_id, &plan::month_used_up(spent, plan.dollars, ceiling))
                            .await?;
                        return Ok(None);
                    }
                }
                Ok(Some(plan))
            }
            Decision::Refuse(failure) => {
                self.refuse(job.job_id, &failure).await?;
                Ok(None)
            }
            Decision::Leave(gpu_type) => {
                tracing::debug!(job_id = %job.job_id, gpu_type, "no endpoint takes this job; it waits for a pull worker");
                Ok(None)
            }
        }
    }

    async fn refuse(&self, job_id: Uuid, failure: &Failure) -> brightrun_queue::Result<()> {
        tracing::warn!(%job_id, %failure, "the job is refused");
        let told = JobFailure {
            detail: json!({"place": failure.place, "hint": failure.hint}),
            ..JobFailure::new(Blame::User, failure.code.as_str(), failure.message.as_str())
        };
        self.queue.dispatch_refuse(job_id, &told).await?;
        self.metrics.refused();
        Ok(())
    }

    async fn begin(
        &self,
        job: &WaitingJob,
        plan: &Plan,
        endpoint: &Endpoint,
    ) -> brightrun_queue::Result<Option<DispatchTicket>> {
        let ceiling = self.config.orchestrator.max_user_dollars;
        self.queue
            .dispatch_begin(
                job.job_id,
                &DispatchRequest {
                    endpoint: &endpoint.settings.id,
                    most: endpoint.settings.max_jobs,
                    reserved: plan.dollars,
                    owner_most: (ceiling > 0.0).then_some(ceiling),
                    hold: HOLD,
                },
            )
            .await
    }

    async fn send_all(&self, sends: Vec<(DispatchTicket, Plan)>) {
        stream::iter(sends)
            .for_each_concurrent(AT_ONCE, |(ticket, plan)| async move {
                if let Some(endpoint) = self.endpoints.get(plan.endpoint)
                    && let Err(error) = self.send(ticket, &plan, endpoint).await
                {
                    // The hold ends by itself, and the job is sent again.
                    tracing::warn!(job_id = %ticket.job_id, %error, "a submission could not be noted");
                }
            })
            .await;
    }

    /// Submits one job. What cannot be noted afterwards is submitted again once the hold is over.
    async fn send(&self, ticket: DispatchTicket, plan: &Plan, endpoint: &Endpoint) -> brightrun_queue::Result<()> {
        let job_id = ticket.job_id;
        match endpoint.client.run(&json!({"job_id": job_id}), plan.policy, None).await {
            Ok(external_id) => {
                endpoint.works();
                self.metrics.sent();
                tracing::info!(%job_id, external_id, endpoint = endpoint.settings.id, "pushed");
                if !self.queue.dispatch_sent(ticket, &external_id, self.poll()).await? {
                    tracing::info!(%job_id, external_id, "another orchestrator has pushed the job meanwhile");
                    endpoint.cancel(&external_id).await;
                }
            }
            Err(failure) if failure.code == "RUNPOD_SUBMIT_UNKNOWN" => {
                tracing::warn!(%job_id, %failure, "it will be submitted again");
                self.metrics.trouble();
                self.queue.dispatch_again(ticket, IN_DOUBT).await?;
            }
            Err(failure) => {
                endpoint.rest(&failure);
                self.metrics.trouble();
                self.queue.dispatch_over(ticket).await?;
            }
        }
        Ok(())
    }

    /// One pass over the pushed jobs that are due; says how many there were.
    async fn look(&self) -> brightrun_queue::Result<usize> {
        let due = self.queue.dispatch_take(LOOKS, HOLD).await?;
        let looked = due.len();
        stream::iter(due)
            .for_each_concurrent(AT_ONCE, |dispatched| async move {
                if let Err(error) = self.look_at(&dispatched).await {
                    tracing::warn!(job_id = %dispatched.ticket.job_id, %error, "a pushed job could not be looked at");
                }
            })
            .await;
        Ok(looked)
    }

    async fn look_at(&self, dispatched: &Dispatched) -> brightrun_queue::Result<()> {
        let ticket = dispatched.ticket;
        let endpoint = self
            .endpoints
            .iter()
            .find(|endpoint| endpoint.settings.id == dispatched.endpoint);
        let Some(endpoint) = endpoint else {
            // Another orchestrator may be set up for it.
            return self.again(ticket, self.poll() * 12).await;
        };
        let what = look::from_row(dispatched);
        let external_id = dispatched.external_id.as_deref().unwrap_or_default();
        match what {
            FromRow::Over => self.over(ticket).await,
            FromRow::CancelAndOver => self.cancel_and_over(ticket, endpoint, external_id).await,
            FromRow::CancelAndWait => {
                endpoint.cancel(external_id).await;
                self.again(ticket, self.poll()).await
            }
            FromRow::Wait => self.again(ticket, look::after(self.poll(), what)).await,
            FromRow::Send => match plan::decide(&dispatched.payload, &self.config) {
                Decision::Push(plan) if !endpoint.is_resting() => self.send(ticket, &plan, endpoint).await,
                // Resting, or the settings have changed: the next pass over the waiting jobs decides anew.
                _ => self.over(ticket).await,
            },
            FromRow::Ask => self.ask(dispatched, endpoint, external_id).await,
        }
    }

    async fn ask(
        &self,
        dispatched: &Dispatched,
        endpoint: &Endpoint,
        external_id: &str,
    ) -> brightrun_queue::Result<()> {
        let ticket = dispatched.ticket;
        if endpoint.is_resting() {
            return self.again(ticket, self.poll()).await;
        }
        let remote = match endpoint.client.status(external_id).await {
            Ok(remote) => remote,
            Err(failure) => {
                endpoint.rest(&failure);
                self.metrics.trouble();
                return self.again(ticket, self.poll()).await;
            }
        };
        endpoint.works();
        match look::from_runpod(dispatched, remote.as_ref()) {
            FromRunPod::Over => self.over(ticket).await,
            FromRunPod::CancelAndOver => self.cancel_and_over(ticket, endpoint, external_id).await,
            FromRunPod::Wait => self.again(ticket, self.poll()).await,
            FromRunPod::Failed(failure) => self.lose(ticket, &failure).await,
        }
    }

    /// The run at RunPod is over, and when this dispatch was taken no worker had claimed the job. One may have come since.
    async fn lose(&self, ticket: DispatchTicket, failure: &JobFailure) -> brightrun_queue::Result<()> {
        match self.queue.dispatch_failed(ticket, failure).await? {
            DispatchEnd::Ended(state) => {
                let (job_id, code, message) = (ticket.job_id, &failure.code, &failure.message);
                tracing::warn!(%job_id, code, message, %state, "lost at RunPod");
                self.metrics.lost();
                self.freed.notify_one();
                Ok(())
            }
            DispatchEnd::Claimed => {
                self.freed.notify_one();
                Ok(())
            }
            DispatchEnd::NotNow => self.again(ticket, self.poll()).await,
        }
    }

    async fn cancel_and_over(
        &self,
        ticket: DispatchTicket,
        endpoint: &Endpoint,
        external_id: &str,
    ) -> brightrun_queue::Result<()> {
        if !external_id.is_empty() && !endpoint.cancel(external_id).await {
            return self.again(ticket, self.poll()).await;
        }
        self.over(ticket).await
    }

    async fn over(&self, ticket: DispatchTicket) -> brightrun_queue::Result<()> {
        self.queue.dispatch_over(ticket).await?;
        self.freed.notify_one();
        Ok(())
    }

    async fn again(&self, ticket: DispatchTicket, after: Duration) -> brightrun_queue::Result<()> {
        self.queue.dispatch_again(ticket, after).await.map(drop)
    }
}
