//! A small cloud on this machine: RunPod's public API over a handler, so that clients can be developed and tested against it.
//!
//! By default it behaves as the cloud does: `/run` queues, `/status` reports, results expire, a webhook gets the whole job object.
//! Any RunPod client drives it unchanged when its base address is set (`RUNPOD_ENDPOINT_BASE_URL=http://127.0.0.1:8000/v2` for the
//! Python one). [`Compatibility::Sdk`] gives instead what the development server of RunPod's SDK does.

mod direct;
mod flags;
mod once;
mod record;
mod routes;
mod sdk;
mod store;

use std::future::Future;
use std::net::ToSocketAddrs;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use tokio_util::sync::{CancellationToken, DropGuard};

pub use self::flags::LocalFlags;
pub use self::once::run_once;
use self::store::Store;
use crate::error::{Failure, Result};
use crate::runpod::handler::Handler;
use crate::runpod::redact::Redactor;
use crate::secret::Secret;

/// Whose behaviour is copied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compatibility {
    /// RunPod's cloud.
    #[default]
    Cloud,
    /// The development server of RunPod's SDK: `/run` only stores, `/status` runs the job.
    Sdk,
}

/// How the local API behaves.
#[derive(Clone, Debug)]
pub struct LocalOptions {
    /// Jobs at once.
    pub slots: usize,
    /// Whose behaviour is copied.
    pub compatibility: Compatibility,
    /// Key that clients must send, as a bearer token or bare.
    pub token: Option<Secret>,
    /// The endpoint's id, which [`Compatibility::Sdk`] serves `/{id}/realtime` for.
    pub endpoint: Option<String>,
    /// Removes credentials from errors.
    pub redactor: Redactor,
    /// Pause between tries of a webhook; ten seconds in the cloud.
    pub webhook_pause: Duration,
}

impl Default for LocalOptions {
    fn default() -> Self {
        Self {
            slots: 1,
            compatibility: Compatibility::Cloud,
            token: None,
            endpoint: None,
            redactor: Redactor::default(),
            webhook_pause: Duration::from_secs(10),
        }
    }
}

/// The API with its queue and workers; they end when it is dropped.
pub struct LocalApi {
    router: Router,
    _workers: DropGuard,
}

impl LocalApi {
    /// Starts the workers on the current runtime.
    ///
    /// # Errors
    /// `RUNPOD_CLIENT_UNAVAILABLE` when no client for webhooks can be made.
    pub fn new(handler: Arc<dyn Handler>, options: LocalOptions) -> Result<Self> {
        let stop = CancellationToken::new();
        let router = match options.compatibility {
            Compatibility::Cloud => {
                let store = Arc::new(Store::new(
                    handler,
                    options.redactor,
                    options.slots.max(1),
                    options.webhook_pause,
                )?);
                store.start(&stop);
                routes::router(store, options.token)
            }
            Compatibility::Sdk => sdk::router(handler, options.redactor, options.endpoint.as_deref())?,
        };
        Ok(Self {
            router,
            _workers: stop.drop_guard(),
        })
    }

    /// The routes, to be served or called directly.
    pub fn router(&self) -> Router {
        self.router.clone()
    }

    /// Serves on an open listener until `stop` is ready. Requests that are open then are given a moment, not more: a client may wait
    /// for minutes.
    ///
    /// # Errors
    /// `RUNPOD_LOCAL_API` when the listener fails.
    pub async fn serve(
        self,
        listener: tokio::net::TcpListener,
        stop: impl Future<Output = ()> + Send + 'static,
    ) -> Result<()> {
        let stopped = CancellationToken::new();
        let told = stopped.clone();
        let serving = axum::serve(listener, self.router.clone()).with_graceful_shutdown(async move {
            stop.await;
            told.cancel();
        });
        let patience = async {
            stopped.cancelled().await;
            tokio::time::sleep(Duration::from_secs(1)).await;
        };
        tokio::select! {
            served = serving.into_future() => {
                served.map_err(|error| Failure::system("RUNPOD_LOCAL_API", format!("The local API failed: {error}")))
            }
            () = patience => Ok(()),
        }
    }
}

/// Opens the address; says so when it is open to other machines.
///
/// # Errors
/// `RUNPOD_LOCAL_API`: the name is unknown or the port is taken.
pub async fn listen(host: &str, port: u16) -> Result<tokio::net::TcpListener> {
    let place = format!("{host}:{port}");
    let failure = |error: std::io::Error| {
        Failure::user("RUNPOD_LOCAL_API", format!("The local API cannot listen: {error}"))
            .at(&place)
            .hint("Choose another --rp_api_host or --rp_api_port")
    };
    let addresses: Vec<_> = (host, port).to_socket_addrs().map_err(failure)?.collect();
    if addresses.iter().any(|address| !address.ip().is_loopback()) {
        tracing::warn!("the local API is open to other machines at {place}");
    }
    tokio::net::TcpListener::bind(addresses.as_slice())
        .await
        .map_err(failure)
}
