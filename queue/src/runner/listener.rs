//! Wake-ups: a notification is a hint to look now. Whatever it misses, polling finds.

use std::sync::Arc;
use std::time::Duration;

use futures_util::{StreamExt, stream};
use rand::RngExt;
use tokio_postgres::AsyncMessage;
use tokio_util::sync::CancellationToken;

use super::Backoff;
use super::running::RunningJobs;
use crate::error::{Error, Result};
use crate::queue::Queue;
use crate::sql;
use crate::wake::WakeUp;

/// A notification wakes every listening process at once. Where looks came back empty, because others were first, each looks up to
/// this much later.
const SPREAD_MICROSECONDS: u64 = 2_000;

/// Listens until `end`, reconnecting as often as needed. Each (re)connect counts as a wake-up,
/// because of what may have been missed.
pub(crate) async fn run(queue: Queue, ready: Arc<WakeUp>, running: Arc<RunningJobs>, end: CancellationToken) {
    let mut trouble = Backoff::default();
    loop {
        let listened = tokio::select! {
            () = end.cancelled() => return,
            listened = listen(&queue, &ready, &running, &mut trouble) => listened,
        };
        if let Err(error) = listened {
            tracing::debug!(%error, "not listening; polling goes on");
        }
        tokio::select! {
            () = end.cancelled() => return,
            () = tokio::time::sleep(trouble.next()) => {}
        }
    }
}

async fn listen(queue: &Queue, ready: &WakeUp, running: &RunningJobs, trouble: &mut Backoff) -> Result<()> {
    let config = queue.config();
    let told = |error: tokio_postgres::Error| Error::from_driver(&error, queue.place());
    let connector = crate::tls::connector(config.ssl_mode, config.ssl_root.as_ref())?;
    let (client, mut connection) = config.driver.connect(connector).await.map_err(told)?;
    let messages = stream::poll_fn(move |context| connection.poll_message(context));
    tokio::pin!(messages);
    // The request only moves while its connection is polled, which the loop below does.
    let listening = async { client.batch_execute(sql::LISTEN).await.map_err(told) };
    tokio::pin!(listening);
    let mut is_listening = false;
    loop {
        tokio::select! {
            listened = &mut listening, if !is_listening => {
                listened?;
                is_listening = true;
                *trouble = Backoff::default();
                ready.wake();
                running.beat_now.notify_one();
            }
            message = messages.next() => match message {
                Some(Ok(AsyncMessage::Notification(note))) if note.channel() == "brightrun_cancel" => {
                    running.beat_now.notify_one();
                }
                Some(Ok(AsyncMessage::Notification(_))) => {
                    if ready.is_crowded() {
                        let later = rand::rng().random_range(0..SPREAD_MICROSECONDS);
                        tokio::time::sleep(Duration::from_micros(later)).await;
                    }
                    ready.wake();
                }
                Some(Ok(_)) => {}
                Some(Err(error)) => return Err(told(error)),
                None => {
                    return Err(Error::ConnectionLost {
                        place: queue.place().clone(),
                        message: "the listening connection ended".into(),
                    });
                }
            }
        }
    }
}
