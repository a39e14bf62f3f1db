//! Completions leave together: while one statement is under way, those that arrive gather for the next. Nobody waits for a timer, so
//! a lonely completion is as quick as ever, and a crowd shares commits.

use serde_json::Value;
use tokio::sync::{mpsc, oneshot};

use crate::error::{Error, Result};
use crate::job::{JobState, Lease};
use crate::queue::Queue;

/// Completions in one statement at most.
const TOGETHER: usize = 100;

type Answer = oneshot::Sender<Result<JobState>>;

/// The way to the engine for endings; clones share it. Its task ends with the last clone.
#[derive(Clone)]
pub(super) struct Endings {
    queue: Queue,
    gathered: mpsc::UnboundedSender<(Lease, Value, Answer)>,
}

impl Endings {
    pub(super) fn start(queue: Queue) -> Self {
        let (gathered, mut waiting) = mpsc::unbounded_channel();
        let sender = queue.clone();
        tokio::spawn(async move {
            let mut batch = Vec::new();
            while waiting.recv_many(&mut batch, TOGETHER).await > 0 {
                send(&sender, std::mem::take(&mut batch)).await;
            }
        });
        Self { queue, gathered }
    }

    pub(super) fn queue(&self) -> &Queue {
        &self.queue
    }

    pub(super) async fn complete(&self, lease: &Lease, result: &Value) -> Result<JobState> {
        let (answer, answered) = oneshot::channel();
        if self.gathered.send((*lease, result.clone(), answer)).is_ok()
            && let Ok(told) = answered.await
        {
            return told;
        }
        self.queue.complete(lease, result).await
    }
}

async fn send(queue: &Queue, batch: Vec<(Lease, Value, Answer)>) {
    let (asked, answers): (Vec<_>, Vec<_>) = batch
        .into_iter()
        .map(|(lease, result, answer)| ((lease, result), answer))
        .unzip();
    let told = match asked.as_slice() {
        [(lease, result)] => vec![queue.complete(lease, result).await],
        _ => many(queue, &asked).await,
    };
    for (answer, told) in answers.into_iter().zip(told) {
        // Whoever asked may have been aborted by a shutdown.
        let _ = answer.send(told);
    }
}

/// Refusals without a word of the engine's (a projector's complaint, a lock that was held) are asked for again one by one: those
/// answers carry the reason.
async fn many(queue: &Queue, asked: &[(Lease, Value)]) -> Vec<Result<JobState>> {
    let told = match queue.complete_many(asked).await {
        Ok(told) => told,
        Err(_) => asked
            .iter()
            .map(|_| Err(Error::Collision { message: String::new() }))
            .collect(),
    };
    let mut all = Vec::with_capacity(asked.len());
    for ((lease, result), told) in asked.iter().zip(told) {
        all.push(match told {
            Err(error) if !error.is_lost() => queue.complete(lease, result).await,
            told => told,
        });
    }
    all
}
