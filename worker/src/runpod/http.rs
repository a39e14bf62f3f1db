//! The wire: requests with the headers RunPod's worker sends, answers with everything a decision needs.

use std::io::Read;
use std::time::Duration;

use bytes::Bytes;
use reqwest::header::{
    ACCEPT, ACCEPT_ENCODING, AUTHORIZATION, CONTENT_ENCODING, CONTENT_TYPE, HeaderMap, HeaderValue, RETRY_AFTER,
};
use reqwest::redirect::Policy;

use crate::error::{Failure, Result};
use crate::secret::Secret;

/// Most bytes an answer may have once unpacked. A `/runsync` input may be 20 MB; several may come in one batch.
const LARGEST_ANSWER: u64 = 256 << 20;

/// Redirects a poll follows; posts follow none, since a result must not wander to another host.
const MOST_REDIRECTS: usize = 5;

/// How this program introduces itself.
pub(crate) const USER_AGENT: &str = concat!("brightrun/", env!("CARGO_PKG_VERSION"), " (rust; linux)");

/// An HTTP answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub status: u16,
    pub content_type: String,
    pub retry_after: Option<Duration>,
    pub body: Bytes,
}

impl Answer {
    /// Whether the body says that it is JSON; parameters such as a charset are allowed.
    pub fn is_json(&self) -> bool {
        let kind = self.content_type.split(';').next().unwrap_or_default();
        kind.trim().eq_ignore_ascii_case("application/json")
    }
}

/// No answer came.
#[derive(Debug)]
pub(crate) enum Silence {
    /// The time was over.
    Timeout,
    /// The connection failed; in words, without the address.
    Broken(String),
}

impl std::fmt::Display for Silence {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Timeout => formatter.write_str("no answer in time"),
            Self::Broken(why) => formatter.write_str(why),
        }
    }
}

/// Clients for polls and for posts with the worker's key. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Http {
    polls: reqwest::Client,
    posts: reqwest::Client,
    authorization: Option<HeaderValue>,
}

impl Http {
    /// Clients that send `key` raw, without `Bearer`, as the control plane wants it from workers.
    pub fn for_worker(key: Option<&Secret>) -> Result<Self> {
        Self::new(key.map(|key| key.expose().to_owned()))
    }

    /// Clients that send `key` as a bearer token, as the public API wants it.
    pub fn for_client(key: &Secret) -> Result<Self> {
        Self::new(Some(format!("Bearer {}", key.expose())))
    }

    fn new(authorization: Option<String>) -> Result<Self> {
        // An error means that another part of the process has chosen a TLS provider: equally good.
        let _already_installed = rustls::crypto::ring::default_provider().install_default();
        let client = |redirects| {
            reqwest::Client::builder()
                .user_agent(USER_AGENT)
                .http1_only()
                .no_proxy()
                .connect_timeout(Duration::from_secs(10))
                // A worker that was frozen wakes up with dead sockets: keep few and not for long.
                .pool_idle_timeout(Duration::from_secs(30))
                .redirect(redirects)
                .build()
                .map_err(|error| {
                    Failure::system(
                        "RUNPOD_CLIENT_UNAVAILABLE",
                        format!("No HTTP client could be made: {}", cause(error)),
                    )
                    .hint("Check that the machine has root certificates (Debian: package ca-certificates)")
                })
        };
        let authorization = authorization.map(|value| {
            HeaderValue::from_str(&value).map(|mut value| {
                value.set_sensitive(true);
                value
            })
        });
        Ok(Self {
            polls: client(Policy::limited(MOST_REDIRECTS))?,
            posts: client(Policy::none())?,
            authorization: authorization.transpose().map_err(|_| {
                Failure::user("RUNPOD_KEY_INVALID", "The API key has characters that cannot be sent")
                    .at("environment variable `RUNPOD_AI_API_KEY` or `RUNPOD_API_KEY`")
                    .hint("Copy the key again; it has neither blanks nor line breaks")
            })?,
        })
    }

    /// One GET.
    pub async fn get(&self, url: &str, timeout: Duration) -> Result<Answer, Silence> {
        let mut headers = self.headers();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        receive(self.polls.get(url).headers(headers).timeout(timeout)).await
    }

    /// One POST of a worker: JSON text under the form content type, which is what the control plane is sent by RunPod's own worker.
    pub async fn post_job(&self, url: &str, job: &str, body: Bytes, timeout: Duration) -> Result<Answer, Silence> {
        let mut headers = self.headers();
        headers.insert(
            CONTENT_TYPE,
            HeaderValue::from_static("application/x-www-form-urlencoded"),
        );
        headers.insert("charset", HeaderValue::from_static("utf-8"));
        if let Ok(id) = HeaderValue::from_str(job) {
            headers.insert("x-request-id", id);
        }
        receive(self.posts.post(url).headers(headers).body(body).timeout(timeout)).await
    }

    /// One POST of JSON.
    pub async fn post_json(&self, url: &str, body: Bytes, timeout: Duration) -> Result<Answer, Silence> {
        let mut headers = self.headers();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        receive(self.posts.post(url).headers(headers).body(body).timeout(timeout)).await
    }

    fn headers(&self) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(ACCEPT, HeaderValue::from_static("*/*"));
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("gzip, deflate"));
        if let Some(authorization) = &self.authorization {
            headers.insert(AUTHORIZATION, authorization.clone());
        }
        headers
    }
}

async fn receive(request: reqwest::RequestBuilder) -> Result<Answer, Silence> {
    let response = request.send().await.map_err(silence)?;
    let header = |name| response.headers().get(name).and_then(|value| value.to_str().ok());
    let mut answer = Answer {
        status: response.status().as_u16(),
        content_type: header(CONTENT_TYPE).unwrap_or_default().to_owned(),
        retry_after: header(RETRY_AFTER)
            .and_then(|value| value.trim().parse().ok())
            .map(Duration::from_secs),
        body: Bytes::new(),
    };
    let encoding = header(CONTENT_ENCODING).unwrap_or_default().to_ascii_lowercase();
    let body = response.bytes().await.map_err(silence)?;
    answer.body =
        unpack(&encoding, body).map_err(|error| Silence::Broken(format!("the answer cannot be unpacked: {error}")))?;
    Ok(answer)
}

/// The body without its content encoding. Done here and not by the HTTP client, whose switch would hold for every client of the program.
fn unpack(encoding: &str, body: Bytes) -> std::io::Result<Bytes> {
    let mut plain = Vec::new();
    match encoding {
        "gzip" | "x-gzip" => flate2::read::MultiGzDecoder::new(&body[..])
            .take(LARGEST_ANSWER)
            .read_to_end(&mut plain)?,
        "deflate" => flate2::read::ZlibDecoder::new(&body[..])
            .take(LARGEST_ANSWER)
            .read_to_end(&mut plain)?,
        _ => return Ok(body),
    };
    Ok(plain.into())
}

fn silence(error: reqwest::Error) -> Silence {
    if error.is_timeout() {
        return Silence::Timeout;
    }
    Silence::Broken(cause(error))
}

/// The innermost cause, without the URL.
fn cause(error: reqwest::Error) -> String {
    let error = error.without_url();
    let mut innermost: &dyn std::error::Error = &error;
    while let Some(next) = innermost.source() {
        innermost = next;
    }
    innermost.to_string()
}
