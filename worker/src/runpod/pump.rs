//! One channel outward per job: chunks in order, progress in between, and nothing after it has ended.
//!
//! Progress travels to the same address as the result. A late one would put a finished job back to IN_PROGRESS for ever, so the result
//! is posted only after [`run`] has returned, and [`run`] never leaves a request of its own behind.

use bytes::Bytes;
use serde_json::{Value, json};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::handler::{Outgoing, StopReason, StopSignal};
use super::http::Http;
use super::pace::Pace;
use super::post::{Delivery, deliver};
use super::routes::Routes;

/// Tries of one progress update; the next one replaces it anyway.
const PROGRESS_TRIES: usize = 2;

/// Where one job's messages go.
pub(crate) struct Channel<'a> {
    pub http: &'a Http,
    pub routes: &'a Routes,
    pub pace: &'a Pace,
    pub job: &'a str,
    /// Keep the chunks for the final output.
    pub aggregate: bool,
}

/// Sends what the job says until `ended` fires; then the remaining chunks, and no more progress. Returns the chunks if they are aggregated.
pub(crate) async fn run(
    channel: Channel<'_>,
    outgoing: Outgoing,
    ended: CancellationToken,
    stop: StopSignal,
) -> Vec<Value> {
    let Outgoing {
        latest,
        chunks: mut arriving,
    } = outgoing;
    let mut chunks = Vec::new();
    let mut next_progress = Instant::now();
    loop {
        let progress = async {
            tokio::time::sleep_until(next_progress).await;
            latest.next().await
        };
        tokio::select! {
            biased;
            () = cancelled(&stop) => return chunks,
            () = ended.cancelled() => break,
            value = progress => {
                channel.send_progress(value, &ended).await;
                next_progress = Instant::now() + channel.pace.progress_every;
            }
            Some(chunk) = arriving.recv() => channel.send_chunk(chunk, &mut chunks, &stop).await,
        }
    }
    // The job is over: what it streamed still belongs to its output, progress does not.
    while let Ok(chunk) = arriving.try_recv() {
        channel.send_chunk(chunk, &mut chunks, &stop).await;
    }
    chunks
}

async fn cancelled(stop: &StopSignal) {
    if stop.wait().await != StopReason::Cancelled {
        std::future::pending::<()>().await;
    }
}

impl Channel<'_> {
    async fn send_progress(&self, value: Value, ended: &CancellationToken) {
        let url = self.routes.done(self.job, false);
        let body = Bytes::from(json!({"status": "IN_PROGRESS", "output": value}).to_string());
        for _ in 0..PROGRESS_TRIES {
            match self
                .http
                .post_job(&url, self.job, body.clone(), self.pace.progress_timeout)
                .await
            {
                Ok(answer) if answer.status < 300 => return,
                Ok(answer) => tracing::debug!(status = answer.status, "a progress update was refused"),
                Err(silence) => tracing::debug!(%silence, "a progress update was not answered"),
            }
            if ended.is_cancelled() {
                return;
            }
        }
    }

    async fn send_chunk(&self, chunk: Value, chunks: &mut Vec<Value>, stop: &StopSignal) {
        if let Some(url) = self.routes.stream(self.job) {
            let body = Bytes::from(json!({"output": chunk}).to_string());
            let delivery = tokio::select! {
                () = cancelled(stop) => return,
                delivery = deliver(self.http, self.pace, &url, self.job, body) => delivery,
            };
            if delivery != Delivery::Acknowledged {
                tracing::error!(?delivery, "a chunk of the stream is lost");
            }
        } else {
            tracing::debug!("RUNPOD_WEBHOOK_POST_STREAM is not set: a chunk is not streamed");
        }
        if self.aggregate {
            chunks.push(chunk);
        }
    }
}
