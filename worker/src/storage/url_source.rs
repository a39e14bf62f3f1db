//! A data set behind an `https://` URL. Its query may be a signature: no message repeats it.

use std::path::Path;
use std::time::Duration;

use futures_util::TryStreamExt;
use reqwest::redirect::Policy;
use url::Url;

use super::Fetched;
use super::http::{self, HttpOptions, cause, shown};
use super::refusal::{CallError, Refusal};
use super::retry::{Attempt, retry};
use super::sink;
use super::supabase::expectation;
use crate::error::{Failure, Result};
use crate::secret::Secret;

/// Redirects followed before giving up; object stores use one or two.
const MAX_REDIRECTS: usize = 5;

/// Whether an unencrypted URL is accepted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PlainHttp {
    /// Only `https://`.
    #[default]
    Refused,
    /// `http://` too: for tests and services on the same machine.
    Allowed,
}

/// Downloads from URLs that a job names.
#[derive(Clone, Debug)]
pub struct UrlSource {
    client: reqwest::Client,
    options: HttpOptions,
    plain_http: PlainHttp,
}

impl UrlSource {
    /// A downloader. It follows a few redirects, never from `https` to `http`.
    pub fn new(options: HttpOptions, plain_http: PlainHttp) -> Result<Self> {
        let redirects = Policy::custom(move |attempt| {
            let is_plain = attempt.url().scheme() != "https";
            if attempt.previous().len() > MAX_REDIRECTS {
                attempt.error("too many redirects")
            } else if is_plain && plain_http == PlainHttp::Refused {
                attempt.error("a redirect to an address without encryption")
            } else {
                attempt.follow()
            }
        });
        let idle_timeout: Duration = options.idle_timeout;
        let client = http::build(&options, redirects, |builder| builder.read_timeout(idle_timeout))?;
        Ok(Self {
            client,
            options,
            plain_http,
        })
    }

    /// Downloads `url` to `target`, which appears only when it is complete.
    pub async fn fetch(&self, url: &Secret, target: &Path) -> Result<Fetched> {
        let url = self.parse(url)?;
        let place = shown(&url);
        retry(&self.options.retry, || async {
            let response = self.client.get(url.clone()).send().await;
            let response = response.map_err(|error| http::unreachable(error, place.clone()))?;
            if !response.status().is_success() {
                return Err(refused(Refusal::read(response, &[]).await, &place));
            }
            let expected = expectation(&response, self.options.download_limit_bytes, place.clone());
            sink::save(Box::pin(response.bytes_stream().map_err(cause)), &expected, target).await
        })
        .await
    }

    fn parse(&self, url: &Secret) -> Result<Url> {
        let is_accepted = |url: &Url| {
            url.has_host()
                && (url.scheme() == "https" || (url.scheme() == "http" && self.plain_http == PlainHttp::Allowed))
        };
        Url::parse(url.expose()).ok().filter(is_accepted).ok_or_else(|| {
            Failure::user("STORAGE_URL_INVALID", "The data set's URL must be a valid HTTPS URL")
                .at("`dataset_url`")
                .hint("Give a signed `https://` URL of the file")
        })
    }
}

/// The URL came with the job, so a refusal is its giver's to mend.
fn refused(refusal: Refusal, place: &str) -> Attempt {
    if !matches!(refusal.status, 400 | 401 | 403 | 410) {
        return CallError::Refused(refusal).into_attempt(place.to_owned(), "");
    }
    let message = format!("The URL refuses access (status {})", refusal.status);
    Attempt::Stop(
        Failure::user("STORAGE_URL_FORBIDDEN", message)
            .at(place)
            .hint("The URL's signature may have expired: make a new one and submit the job again"),
    )
}
