//! Tells the app what became of its jobs: messages of the outbox, each a signed POST.
//!
//! A message is written in the transaction that changes the job's row, so none is told that did not happen. Delivery is at least
//! once: `webhook-id` is the same in every repetition. Headers and signature are those of the Standard Webhooks specification:
//! `webhook-signature` is `v1,` and the base64 of HMAC-SHA256 over `id.timestamp.body`.

use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use brightrun_queue::{OutboxMessage, Queue};
use sha2::{Digest, Sha256};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use url::Url;

use crate::error::{Failure, Result};
use crate::secret::Secret;

/// The outbox's topic.
const TOPIC: &str = "webhook";

/// Messages are written for this long after a reader was last here.
const SUBSCRIPTION: Duration = Duration::from_secs(7 * 24 * 3600);

/// How often the subscription is renewed.
const RENEW_EVERY: Duration = Duration::from_secs(3600);

/// Messages taken at once, and how long they are kept from others.
const TAKEN: usize = 20;
const HOLD: Duration = Duration::from_secs(300);

/// Longest wait for the app's answer.
const TIMEOUT: Duration = Duration::from_secs(15);

/// Tries before a message is kept as dead: with waits up to an hour, most of a day.
const MOST_TRIES: i32 = 30;

/// Block of SHA-256 in bytes, which HMAC pads its key to.
const BLOCK: usize = 64;

/// Sends what the outbox holds for the app.
pub struct Webhooks {
    queue: Queue,
    url: Url,
    secret: Secret,
    client: reqwest::Client,
    poll: Duration,
}

impl Webhooks {
    /// A sender to `url`, which looks for messages every `poll`.
    ///
    /// # Errors
    /// `WEBHOOK_INVALID`: the address is none, or is not encrypted and not on this machine.
    pub fn new(queue: Queue, url: &str, secret: Secret, poll: Duration) -> Result<Self> {
        let refuse = |what: String| {
            Failure::user("WEBHOOK_INVALID", what)
                .at("setting `orchestrator.webhook_url`")
                .hint("Give an https:// address of the app")
        };
        let url = Url::parse(url).map_err(|error| refuse(format!("It is no address: {error}")))?;
        let is_here = matches!(url.host_str(), Some("127.0.0.1" | "localhost" | "[::1]"));
        if url.scheme() != "https" && !(url.scheme() == "http" && is_here) {
            return Err(refuse("The address is not encrypted".to_owned()));
        }
        let client = reqwest::Client::builder()
            .timeout(TIMEOUT)
            .redirect(reqwest::redirect::Policy::none())
            .build()
            .map_err(|error| refuse(format!("No client can be made: {error}")))?;
        Ok(Self {
            queue,
            url,
            secret,
            client,
            poll,
        })
    }

    /// Works until `shutdown`.
    pub async fn run(&self, shutdown: &CancellationToken) {
        tokio::select! {
            () = shutdown.cancelled() => {}
            () = self.keep_sending() => {}
        }
    }

    async fn keep_sending(&self) {
        let mut renew_at = Instant::now();
        loop {
            let passed = async {
                if Instant::now() >= renew_at {
                    self.queue.outbox_subscribe(TOPIC, SUBSCRIPTION).await?;
                    renew_at = Instant::now() + RENEW_EVERY;
                }
                let messages = self.queue.outbox_take(&[TOPIC], TAKEN, HOLD).await?;
                for message in &messages {
                    self.send(message).await?;
                }
                Ok::<usize, brightrun_queue::Error>(messages.len())
            };
            match passed.await {
                Ok(TAKEN) => {}
                Ok(_) => tokio::time::sleep(self.poll).await,
                Err(error) => {
                    tracing::warn!(%error, "webhooks cannot be looked at");
                    tokio::time::sleep(self.poll).await;
                }
            }
        }
    }

    async fn send(&self, message: &OutboxMessage) -> brightrun_queue::Result<()> {
        let (id, body) = (format!("msg_{}", message.id), message.payload.to_string());
        let timestamp = chrono::Utc::now().timestamp();
        let answer = self
            .client
            .post(self.url.clone())
            .header("content-type", "application/json")
            .header("webhook-id", &id)
            .header("webhook-timestamp", timestamp)
            .header("webhook-signature", signature(&self.secret, &id, timestamp, &body))
            .body(body)
            .send()
            .await;
        let trouble = match answer {
            Ok(answer) if answer.status().is_success() => {
                self.queue.outbox_ack(message).await?;
                return Ok(());
            }
            Ok(answer) => format!("status {}", answer.status().as_u16()),
            // The address may hold a token: it is left out.
            Err(error) => error.without_url().to_string(),
        };
        tracing::warn!(id, trouble, attempts = message.attempts, "a webhook was not accepted");
        self.queue
            .outbox_nack(message, &trouble, pause(message.attempts), MOST_TRIES)
            .await
            .map(drop)
    }
}

/// Two seconds, doubled with every try, an hour at most.
fn pause(attempts: i32) -> Duration {
    let doublings = u32::try_from(attempts).unwrap_or(0).min(12);
    Duration::from_secs(2_u64.saturating_pow(doublings).clamp(2, 3600))
}

fn signature(secret: &Secret, id: &str, timestamp: i64, body: &str) -> String {
    let told = format!("{id}.{timestamp}.{body}");
    // As the specification has it: a secret with this prefix is base64.
    let key = secret
        .expose()
        .strip_prefix("whsec_")
        .and_then(|encoded| BASE64_STANDARD.decode(encoded).ok())
        .unwrap_or_else(|| secret.expose().as_bytes().to_vec());
    format!("v1,{}", BASE64_STANDARD.encode(hmac_sha256(&key, told.as_bytes())))
}

/// RFC 2104 over SHA-256.
fn hmac_sha256(key: &[u8], message: &[u8]) -> [u8; 32] {
    let mut block = [0; BLOCK];
    if key.len() > BLOCK {
        block[..32].copy_from_slice(&Sha256::digest(key));
    } else {
        block[..key.len()].copy_from_slice(key);
    }
    let inner = Sha256::new()
        .chain_update(block.map(|byte| byte ^ 0x36))
        .chain_update(message);
    let outer = Sha256::new()
        .chain_update(block.map(|byte| byte ^ 0x5c))
        .chain_update(inner.finalize());
    outer.finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_is_that_of_rfc_4231() {
        let code = |key: &[u8], message: &[u8]| hex::encode(hmac_sha256(key, message));
        assert_eq!(
            code(&[0x0b; 20], b"Hi There"),
            "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7"
        );
        assert_eq!(
            code(&[0xaa; 131], b"Test Using Larger Than Block-Size Key - Hash Key First"),
            "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54"
        );
    }

    #[test]
    fn a_secret_with_the_specifications_prefix_is_base64() {
        let plain = signature(&Secret::new("canary"), "msg_1", 7, "{}");
        let encoded = signature(&Secret::new("whsec_Y2FuYXJ5"), "msg_1", 7, "{}");
        assert_eq!(plain, encoded);
        assert!(plain.starts_with("v1,") && plain != signature(&Secret::new("canary"), "msg_2", 7, "{}"));
    }

    #[test]
    fn pauses_grow_to_an_hour() {
        let seconds: Vec<u64> = [1, 2, 5, 11, 12, 30].map(|attempts| pause(attempts).as_secs()).into();
        assert_eq!(seconds, [2, 4, 32, 2048, 3600, 3600]);
    }
}
