//! Models from a Hugging Face hub to a folder: room and mount checked first, resumed, verified.
//!
//! The `hf-hub` crate was looked at and not taken: it neither verifies what it downloads nor asks for room, and it brings a second
//! HTTP stack. Two requests are needed: the list of a revision's files with sizes and SHA-256, and the files themselves.
//!
//! A file appears under its name only when its length and, where the hub knows it (for all large files), its SHA-256 are right. What was
//! begun lies in `.NAME.HASH.part` and is continued. The revision is resolved once, so that all files are of one commit. The token
//! is sent to the hub alone; a redirect to another host does not carry it.

mod disk;
mod download;
mod record;

use std::path::{Path, PathBuf};

use reqwest::StatusCode;
use reqwest::redirect::Policy;
use serde::Deserialize;
use url::Url;

pub use self::disk::{Disk, System};
pub use self::download::{FetchProgress, FetchRequest, Fetched, fetch};
pub use self::record::{Record, RecordedFile, offline};
use crate::error::{Failure, Result};
use crate::secret::Secret;
use crate::storage::HttpOptions;
use crate::storage::http::{self, cause, shown};
use crate::storage::retry::{Attempt, RetryPolicy, retry};

/// The public hub.
pub const PUBLIC: &str = "https://huggingface.co";

/// Redirects followed: the hub uses one or two.
const MAX_REDIRECTS: usize = 5;

/// Endings of files that training needs; other weights (`.bin`, `.gguf`) and pictures are left where they are.
const WANTED_ENDINGS: [&str; 6] = [".safetensors", ".json", ".jinja", ".txt", ".model", ".tiktoken"];

/// A hub.
#[derive(Clone, Debug)]
pub struct Hub {
    client: reqwest::Client,
    endpoint: Url,
    token: Option<Secret>,
    retry: RetryPolicy,
}

/// A file of a revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteFile {
    /// Its name: a plain one.
    pub name: String,
    /// Its length.
    pub bytes: u64,
    /// SHA-256 in hexadecimal, which the hub knows of large files.
    pub sha256: Option<String>,
}

/// A revision of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Remote {
    /// The commit.
    pub revision: String,
    /// The files that training needs.
    pub files: Vec<RemoteFile>,
}

#[derive(Deserialize)]
struct Answer {
    sha: String,
    #[serde(default)]
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    lfs: Option<Large>,
}

#[derive(Deserialize)]
struct Large {
    sha256: Option<String>,
    size: Option<u64>,
}

impl Hub {
    /// A hub at an address; the token comes from the environment only.
    ///
    /// # Errors
    /// `FETCH_ENDPOINT_INVALID`.
    pub fn new(endpoint: &str, token: Option<Secret>, options: &HttpOptions) -> Result<Self> {
        let invalid = || {
            Failure::user("FETCH_ENDPOINT_INVALID", "The hub's address is not a valid URL")
                .hint(format!("Unset HF_ENDPOINT, or set it to an address such as {PUBLIC}"))
        };
        let endpoint = Url::parse(endpoint).ok().filter(Url::has_host).ok_or_else(invalid)?;
        let plain_is_allowed = endpoint.scheme() == "http";
        let redirects = Policy::custom(move |attempt| {
            if attempt.previous().len() > MAX_REDIRECTS {
                attempt.error("too many redirects")
            } else if attempt.url().scheme() != "https" && !plain_is_allowed {
                attempt.error("a redirect to an address without encryption")
            } else {
                attempt.follow()
            }
        });
        let idle = options.idle_timeout;
        Ok(Self {
            client: http::build(options, redirects, |builder| builder.read_timeout(idle))?,
            endpoint,
            token,
            retry: options.retry.clone(),
        })
    }

    /// The hub of the environment: `HF_ENDPOINT`, and the token of `HF_TOKEN`.
    ///
    /// # Errors
    /// As [`Hub::new`].
    pub fn from_variables(variable: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let given = |name: &str| variable(name).filter(|value| !value.is_empty());
        let token = given("HF_TOKEN").or_else(|| given("HUGGING_FACE_HUB_TOKEN"));
        let endpoint = given("HF_ENDPOINT").unwrap_or_else(|| PUBLIC.to_owned());
        Self::new(&endpoint, token.map(Secret::new), &HttpOptions::default())
    }

    fn address(&self, path: &str) -> Result<Url> {
        self.endpoint.join(path).map_err(|_| {
            Failure::user("FETCH_NAME_INVALID", format!("`{path}` cannot be part of an address"))
                .hint("Give the model as Organisation/Name")
        })
    }

    fn request(&self, url: Url) -> reqwest::RequestBuilder {
        let request = self.client.get(url);
        match &self.token {
            Some(token) => request.bearer_auth(token.expose()),
            None => request,
        }
    }

    /// What a revision consists of. `model` is `Organisation/Name`, `revision` a branch, a tag or a commit.
    ///
    /// # Errors
    /// `FETCH_NAME_INVALID`; `FETCH_UNAUTHORISED`, `FETCH_NOT_FOUND`, `FETCH_UNREACHABLE`, `FETCH_REFUSED`; `FETCH_LISTING` when the
    /// answer is not a list of files.
    pub async fn look(&self, model: &str, revision: &str) -> Result<Remote> {
        check_name(model, revision)?;
        let url = self.address(&format!("/api/models/{model}/revision/{revision}?blobs=true"))?;
        let place = shown(&url);
        let answer: Answer = retry(&self.retry, || async {
            let response = self.request(url.clone()).send().await;
            let response = response.map_err(|error| unreachable(error, &place))?;
            if response.status() != StatusCode::OK {
                return Err(refused(response.status(), &place, self.token.is_some()));
            }
            response.json().await.map_err(|error| unreachable(error, &place))
        })
        .await?;
        let revision = answer.sha.clone();
        if revision.is_empty() || !revision.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
            return Err(unlisted("the hub names no commit", &place));
        }
        let files = wanted_files(answer, &place)?;
        Ok(Remote { revision, files })
    }

    fn file_address(&self, model: &str, revision: &str, name: &str) -> Result<Url> {
        self.address(&format!("/{model}/resolve/{revision}/{name}"))
    }
}

/// The files that training needs. A name is outside data: only plain ones are taken.
fn wanted_files(answer: Answer, place: &str) -> Result<Vec<RemoteFile>> {
    let is_wanted = |name: &str| {
        !name.contains(['/', '\\']) && !name.starts_with('.') && WANTED_ENDINGS.iter().any(|end| name.ends_with(end))
    };
    let mut files = Vec::new();
    for sibling in answer
        .siblings
        .into_iter()
        .filter(|sibling| is_wanted(&sibling.rfilename))
    {
        let large = sibling.lfs.as_ref();
        let bytes = large.and_then(|large| large.size).or(sibling.size);
        let sha256 = sibling
            .lfs
            .and_then(|large| large.sha256)
            .map(|hash| hash.to_lowercase());
        let is_hash = |hash: &String| hash.len() == 64 && hash.bytes().all(|byte| byte.is_ascii_hexdigit());
        if sha256.as_ref().is_some_and(|hash| !is_hash(hash)) {
            return Err(unlisted(&format!("`{}` has no valid hash", sibling.rfilename), place));
        }
        files.push(RemoteFile {
            bytes: bytes.ok_or_else(|| unlisted(&format!("`{}` has no length", sibling.rfilename), place))?,
            name: sibling.rfilename,
            sha256,
        });
    }
    files.sort_by(|left, right| left.name.cmp(&right.name));
    if !files.iter().any(|file| file.name.ends_with(".safetensors")) {
        return Err(unlisted("the revision has no safetensors weights", place));
    }
    Ok(files)
}

fn unlisted(what: &str, place: &str) -> Failure {
    Failure::user("FETCH_LISTING", format!("The model cannot be fetched: {what}"))
        .at(place)
        .hint("Check the model's name and revision on the hub")
}

/// Names become parts of addresses and folders.
fn check_name(model: &str, revision: &str) -> Result<()> {
    let is_plain = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.'))
    };
    let parts: Vec<&str> = model.split('/').collect();
    if parts.len() == 2 && parts.iter().all(|part| is_plain(part)) && is_plain(revision) {
        return Ok(());
    }
    Err(Failure::user(
        "FETCH_NAME_INVALID",
        format!("`{model}` at `{revision}` is no name of a model and a revision"),
    )
    .hint("Give the model as Organisation/Name, the revision as a branch, a tag or a commit"))
}

/// A failed exchange: worth another attempt.
fn unreachable(error: reqwest::Error, place: &str) -> Attempt {
    let failure = Failure::platform(
        "FETCH_UNREACHABLE",
        format!("The hub cannot be reached: {}", cause(error)),
    )
    .at(place)
    .hint("Check the network; run the same command again to continue");
    Attempt::Again(failure, None)
}

/// What a status other than success means.
fn refused(status: StatusCode, place: &str, has_token: bool) -> Attempt {
    let token_hint = match has_token {
        true => "The token of HF_TOKEN does not open this model: accept its licence on the hub, or use another token",
        false => "Set HF_TOKEN to a token that may read this model",
    };
    match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Attempt::Stop(
            Failure::user(
                "FETCH_UNAUTHORISED",
                format!("The hub refuses access (status {})", status.as_u16()),
            )
            .at(place)
            .hint(token_hint),
        ),
        StatusCode::NOT_FOUND => Attempt::Stop(
            Failure::user("FETCH_NOT_FOUND", "The hub has no such model, revision or file")
                .at(place)
                .hint("Check the name; a private model without a token looks missing too"),
        ),
        status => {
            let failure = Failure::platform(
                "FETCH_REFUSED",
                format!("The hub answered with status {}", status.as_u16()),
            )
            .at(place)
            .hint("Run the same command again later to continue");
            match status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS {
                true => Attempt::Again(failure, None),
                false => Attempt::Stop(failure),
            }
        }
    }
}

/// Where a model is put when nothing else is said: on the first volume that is mounted.
///
/// # Errors
/// `FETCH_NOT_MOUNTED` when none is: a download into the container's own disk fills it and is lost with it.
pub fn default_folder(model: &str, volumes: &[PathBuf], disk: &dyn Disk) -> Result<PathBuf> {
    let mounted = volumes.iter().find(|volume| disk.is_mounted(volume));
    match mounted {
        Some(volume) => Ok(volume.join("models").join(model)),
        None => {
            let names: Vec<String> = volumes.iter().map(|volume| volume.display().to_string()).collect();
            Err(Failure::user(
                "FETCH_NOT_MOUNTED",
                format!("No volume is mounted at {}", names.join(" or ")),
            )
            .hint("Attach the network volume, or name a folder with `--to`"))
        }
    }
}

/// Refuses a folder below a volume's mount point that is not mounted.
fn check_mount(folder: &Path, volumes: &[PathBuf], disk: &dyn Disk) -> Result<()> {
    match volumes.iter().find(|volume| folder.starts_with(volume)) {
        Some(volume) if !disk.is_mounted(volume) => Err(Failure::user(
            "FETCH_NOT_MOUNTED",
            format!("No volume is mounted at {}", volume.display()),
        )
        .at(folder.display().to_string())
        .hint("Attach the network volume: without it the download would fill the container's own disk and be lost with it")),
        _ => Ok(()),
    }
}
