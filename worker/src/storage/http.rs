//! HTTP clients as storages need them.

use std::time::Duration;

use reqwest::redirect::Policy;
use url::Url;

use super::retry::{Attempt, RetryPolicy};
use crate::error::{Failure, Result};

/// Limits of every exchange with a storage.
#[derive(Clone, Debug)]
pub struct HttpOptions {
    /// Time to open a connection.
    pub connect_timeout: Duration,
    /// Longest silence of the other side while an answer is awaited or read.
    pub idle_timeout: Duration,
    /// Time for one upload request; larger files are sent in several.
    pub upload_timeout: Duration,
    /// What is tried again.
    pub retry: RetryPolicy,
    /// Largest download accepted, in bytes: a guard against an endless answer.
    pub download_limit_bytes: u64,
    /// Files above this many bytes are sent in parts. Supabase advises 6 MB.
    pub multipart_threshold_bytes: u64,
}

impl Default for HttpOptions {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(60),
            upload_timeout: Duration::from_secs(300),
            retry: RetryPolicy::default(),
            download_limit_bytes: 5 << 30,
            multipart_threshold_bytes: 6 << 20,
        }
    }
}

/// Two clients: one counts the silence of the reader's side, which would cut a slow upload, the
/// other the whole request.
#[derive(Clone, Debug)]
pub(crate) struct Clients {
    /// For requests with small bodies and answers of any size.
    pub(crate) download: reqwest::Client,
    /// For requests with large bodies and small answers.
    pub(crate) upload: reqwest::Client,
}

impl Clients {
    /// Clients that never follow a redirect, so that a credential stays with its host.
    pub(crate) fn new(options: &HttpOptions) -> Result<Self> {
        Ok(Self {
            download: build(options, Policy::none(), |builder| {
                builder.read_timeout(options.idle_timeout)
            })?,
            upload: build(options, Policy::none(), |builder| {
                builder.timeout(options.upload_timeout)
            })?,
        })
    }
}

/// One client.
pub(crate) fn build(
    options: &HttpOptions,
    redirects: Policy,
    timeouts: impl FnOnce(reqwest::ClientBuilder) -> reqwest::ClientBuilder,
) -> Result<reqwest::Client> {
    install_crypto_provider();
    let builder = reqwest::Client::builder()
        .user_agent(concat!("brightrun/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(options.connect_timeout)
        .redirect(redirects);
    timeouts(builder).build().map_err(|error| {
        Failure::system(
            "STORAGE_CLIENT_UNAVAILABLE",
            format!("No HTTP client could be made: {}", cause(error)),
        )
        .hint("Check that the machine has root certificates (Debian: package ca-certificates)")
    })
}

/// Makes ring the process's TLS provider; whoever came first stays.
pub fn install_crypto_provider() {
    // An error means that another part of the process has already chosen: equally good.
    let _already_installed = rustls::crypto::ring::default_provider().install_default();
}

/// A failed exchange: the network's fault, worth another attempt.
pub(crate) fn unreachable(error: reqwest::Error, place: String) -> Attempt {
    let what = if error.is_timeout() {
        "did not answer in time"
    } else {
        "cannot be reached"
    };
    let failure = Failure::platform("STORAGE_UNREACHABLE", format!("The storage {what}: {}", cause(error)))
        .at(place)
        .hint("Check the network and the storage's address; the attempt is repeated by itself");
    Attempt::Again(failure, None)
}

/// The innermost cause, without the URL: its query may be a credential.
pub(crate) fn cause(error: reqwest::Error) -> String {
    let error = error.without_url();
    let mut innermost: &dyn std::error::Error = &error;
    while let Some(next) = innermost.source() {
        innermost = next;
    }
    innermost.to_string()
}

/// A URL for people: host and path only.
pub(crate) fn shown(url: &Url) -> String {
    let host = url.host_str().unwrap_or("?");
    let port = url.port().map(|port| format!(":{port}")).unwrap_or_default();
    let query = if url.query().is_some() { "?…" } else { "" };
    format!("{}://{host}{port}{}{query}", url.scheme(), url.path())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::*;

    #[test]
    fn a_shown_url_has_no_user_password_or_query() {
        let url = Url::parse("https://me:fake-password@host.example:8443/a/b?token=fake#x").unwrap();
        assert_eq!(shown(&url), "https://host.example:8443/a/b?…");
    }
}
