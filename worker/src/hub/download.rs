//! The download itself: what is missing, in several requests at a time, each continued where it broke off.

use std::cell::RefCell;
use std::io::Read;
use std::path::{Path, PathBuf};

use futures_util::StreamExt;
use reqwest::header::{CONTENT_RANGE, RANGE};
use reqwest::{Response, StatusCode, Url};
use serde::Serialize;
use sha2::{Digest, Sha256};
use tokio::fs::{File, OpenOptions};
use tokio::io::AsyncWriteExt;
use tokio_util::sync::CancellationToken;

use super::record::Record;
use super::{Disk, Hub, Remote, RemoteFile, check_mount, refused, unreachable};
use crate::error::{Failure, Result};
use crate::storage::http::shown;
use crate::storage::retry::Attempt;

/// Files at a time.
const AT_ONCE: usize = 4;

/// Room that is left beside the download, in hundredths of it.
const MARGIN_PERCENT: u64 = 2;

/// What shall be fetched, and where to.
#[derive(Clone, Debug)]
pub struct FetchRequest<'a> {
    /// `Organisation/Name`.
    pub model: &'a str,
    /// A branch, a tag or a commit.
    pub revision: &'a str,
    /// The model's folder; made if it is not there.
    pub folder: &'a Path,
    /// Mount points below which nothing is written unless something is mounted there.
    pub volumes: &'a [PathBuf],
    /// Hash files again that are already there.
    pub verify: bool,
}

/// How far a download is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FetchProgress {
    /// Bytes that are there, those of earlier attempts included.
    pub bytes: u64,
    /// Bytes of all files.
    pub bytes_total: u64,
}

/// What is there now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Fetched {
    /// The commit.
    pub revision: String,
    /// Files of the model.
    pub files: usize,
    /// Bytes of all files.
    pub bytes: u64,
    /// Bytes that came over the network this time.
    pub downloaded: u64,
}

struct Meter<'a> {
    progress: &'a mut dyn FnMut(FetchProgress),
    state: FetchProgress,
    downloaded: u64,
}

/// Fetches what is missing of a model.
///
/// # Errors
/// `FETCH_NOT_MOUNTED`, `FETCH_NO_SPACE` before the first byte; `FETCH_HASH`, `FETCH_WRITE`, and those of [`Hub::look`].
pub async fn fetch(
    hub: &Hub,
    request: &FetchRequest<'_>,
    disk: &dyn Disk,
    progress: &mut dyn FnMut(FetchProgress),
) -> Result<Fetched> {
    check_mount(request.folder, request.volumes, disk)?;
    let remote = hub.look(request.model, request.revision).await?;
    std::fs::create_dir_all(request.folder).map_err(|error| write_failure(request.folder, &error))?;
    let missing = missing(&remote, request)?;
    check_room(&missing, request.folder, disk)?;
    Record::new(request.model, &remote)
        .write(request.folder)
        .map_err(|error| write_failure(request.folder, &error))?;
    let total = remote.files.iter().map(|file| file.bytes).sum();
    let here = missing.iter().map(|(file, begun)| file.bytes - begun).sum::<u64>();
    let meter = RefCell::new(Meter {
        progress,
        state: FetchProgress {
            bytes: total - here,
            bytes_total: total,
        },
        downloaded: 0,
    });
    let line = Line {
        hub,
        request,
        revision: &remote.revision,
        meter: &meter,
        stop: CancellationToken::new(),
    };
    let results: Vec<Result<()>> = futures_util::stream::iter(&missing)
        .map(|(file, _)| download_or_stop_all(&line, file))
        .buffer_unordered(AT_ONCE)
        .collect()
        .await;
    results.into_iter().collect::<Result<()>>()?;
    Ok(Fetched {
        revision: remote.revision.clone(),
        files: remote.files.len(),
        bytes: total,
        downloaded: meter.into_inner().downloaded,
    })
}

/// Where the beginnings of a file lie. The hash is part of the name: another revision's beginning is not continued.
fn begun_path(folder: &Path, revision: &str, file: &RemoteFile) -> PathBuf {
    let hash = file.sha256.as_deref().unwrap_or(revision);
    let short: String = hash.chars().take(16).collect();
    folder.join(format!(".{}.{short}.part", file.name))
}

/// Files that are not there, each with the bytes of it that are.
fn missing<'a>(remote: &'a Remote, request: &FetchRequest<'_>) -> Result<Vec<(&'a RemoteFile, u64)>> {
    let earlier = Record::read(request.folder);
    let mut missing = Vec::new();
    for file in &remote.files {
        if !is_there(file, &remote.revision, earlier.as_ref(), request)? {
            let begun = length(&begun_path(request.folder, &remote.revision, file));
            missing.push((file, begun.min(file.bytes)));
        }
    }
    Ok(missing)
}

/// Whether a file is there and right. Fetched files got their names only when they were; files that came otherwise are hashed, and
/// removed where they are wrong, so that none is ever taken for a fetched one.
fn is_there(file: &RemoteFile, revision: &str, earlier: Option<&Record>, request: &FetchRequest<'_>) -> Result<bool> {
    let path = request.folder.join(&file.name);
    if std::fs::metadata(&path).map(|facts| facts.len()).ok() != Some(file.bytes) {
        return Ok(false);
    }
    let known = earlier.and_then(|record| record.files.iter().find(|known| known.name == file.name));
    let is_right = match &file.sha256 {
        Some(hash) if request.verify || known.and_then(|known| known.sha256.as_ref()) != Some(hash) => {
            file_hash(&path).map_err(|error| write_failure(&path, &error))? == *hash
        }
        Some(_) => true,
        // Without a hash only the same revision says that it is the same file.
        None => earlier.is_some_and(|record| record.revision == revision),
    };
    if !is_right {
        std::fs::remove_file(&path).map_err(|error| write_failure(&path, &error))?;
    }
    Ok(is_right)
}

fn check_room(missing: &[(&RemoteFile, u64)], folder: &Path, disk: &dyn Disk) -> Result<()> {
    let wanted: u64 = missing.iter().map(|(file, begun)| file.bytes - begun).sum();
    let wanted = wanted + wanted / 100 * MARGIN_PERCENT;
    match disk.free_bytes(folder) {
        Some(free) if free < wanted => Err(Failure::user(
            "FETCH_NO_SPACE",
            format!("The download needs {wanted} bytes, but {free} are free there"),
        )
        .at(folder.display().to_string())
        .hint("Free space or enlarge the volume; a snapshot of quantised weights needs about half as much again")),
        _ => Ok(()),
    }
}

/// What the downloads of one command share.
struct Line<'a, 'm> {
    hub: &'a Hub,
    request: &'a FetchRequest<'a>,
    revision: &'a str,
    meter: &'a RefCell<Meter<'m>>,
    /// Cancelled by the first file that fails for good. The others are not dropped in the middle of a write: the runtime would go on
    /// opening and writing their files after the command has answered, into the next one's beginnings. Each stops where it waits for
    /// the hub, with all that came written.
    stop: CancellationToken,
}

impl Line<'_, '_> {
    fn address(&self, file: &RemoteFile) -> Result<Url> {
        self.hub.file_address(self.request.model, self.revision, &file.name)
    }

    fn begun(&self, file: &RemoteFile) -> PathBuf {
        begun_path(self.request.folder, self.revision, file)
    }
}

async fn download_or_stop_all(line: &Line<'_, '_>, file: &RemoteFile) -> Result<()> {
    if line.stop.is_cancelled() {
        return Err(stopped());
    }
    let result = download(line, file).await;
    if result.is_err() {
        line.stop.cancel();
    }
    result
}

/// Downloads one file, continuing after every break as long as each attempt brings something.
async fn download(line: &Line<'_, '_>, file: &RemoteFile) -> Result<()> {
    let begun = line.begun(file);
    let retry = &line.hub.retry;
    let mut failures = 0;
    loop {
        let before = length(&begun);
        let failure = match attempt(line, file, &begun).await {
            Ok(()) => break,
            Err(Attempt::Stop(failure)) => return Err(failure),
            Err(Attempt::Again(failure, _)) => failure,
        };
        failures = if length(&begun) > before { 0 } else { failures + 1 };
        if failures >= retry.attempts {
            return Err(failure);
        }
        tracing::info!(%failure, "the download is continued");
        let pause = tokio::time::sleep(retry.first_pause.min(retry.longest_pause));
        line.stop.run_until_cancelled(pause).await.ok_or_else(stopped)?;
    }
    accept(file, &begun, &line.request.folder.join(&file.name)).await
}

fn length(path: &Path) -> u64 {
    std::fs::metadata(path).map_or(0, |facts| facts.len())
}

/// One request for what is missing of a file.
async fn attempt(line: &Line<'_, '_>, file: &RemoteFile, begun: &Path) -> Result<(), Attempt> {
    let Line { hub, meter, stop, .. } = line;
    let url = line.address(file)?;
    let place = shown(&url);
    let mut done = length(begun);
    if done > file.bytes {
        std::fs::remove_file(begun).map_err(|error| write_failure(begun, &error))?;
        done = 0;
    }
    if done == file.bytes && done > 0 {
        return Ok(());
    }
    let mut call = hub.request(url);
    if done > 0 {
        call = call.header(RANGE, format!("bytes={done}-"));
    }
    let response = match stop.run_until_cancelled(call.send()).await {
        None => return Err(Attempt::Stop(stopped())),
        Some(response) => response.map_err(|error| unreachable(error, &place))?,
    };
    let continues = response
        .headers()
        .get(CONTENT_RANGE)
        .and_then(|range| range.to_str().ok())
        .is_some_and(|range| range.starts_with(&format!("bytes {done}-")));
    match response.status() {
        StatusCode::OK => {
            // The whole file again: the other side does not continue.
            meter.borrow_mut().state.bytes -= done;
            done = 0;
        }
        StatusCode::PARTIAL_CONTENT if continues => {}
        StatusCode::PARTIAL_CONTENT => {
            return Err(Attempt::Stop(
                Failure::platform("FETCH_REFUSED", "The hub answered with another part than was asked for").at(place),
            ));
        }
        status => return Err(refused(status, &place, hub.token.is_some())),
    }
    let write = |error: std::io::Error| Attempt::Stop(write_failure(begun, &error));
    let mut target = OpenOptions::new()
        .create(true)
        .write(true)
        .append(done > 0)
        .truncate(done == 0)
        .open(begun)
        .await
        .map_err(write)?;
    let received = receive(line, file, &mut target, response, done).await;
    // Whatever ended it, what came is in the file when this returns.
    target.flush().await.map_err(write)?;
    let done = received?;
    target.sync_all().await.map_err(write)?;
    if done == file.bytes {
        return Ok(());
    }
    Err(Attempt::Again(
        Failure::platform(
            "FETCH_UNREACHABLE",
            format!(
                "The download of {} broke off at byte {done} of {}",
                file.name, file.bytes
            ),
        )
        .at(place)
        .hint("Run the same command again to continue"),
        None,
    ))
}

/// Appends an answer to the file's beginning of `done` bytes; its length afterwards.
async fn receive(
    line: &Line<'_, '_>,
    file: &RemoteFile,
    target: &mut File,
    response: Response,
    mut done: u64,
) -> Result<u64, Attempt> {
    let place = shown(&line.address(file)?);
    let mut body = response.bytes_stream();
    loop {
        let chunk = match line.stop.run_until_cancelled(body.next()).await {
            None => return Err(Attempt::Stop(stopped())),
            Some(None) => return Ok(done),
            Some(Some(chunk)) => chunk.map_err(|error| unreachable(error, &place))?,
        };
        done += chunk.len() as u64;
        if done > file.bytes {
            return Err(Attempt::Stop(wrong(file, "it is longer than the hub's list says")));
        }
        let written = target.write_all(&chunk).await;
        written.map_err(|error| Attempt::Stop(write_failure(&line.begun(file), &error)))?;
        let mut meter = line.meter.borrow_mut();
        meter.state.bytes += chunk.len() as u64;
        meter.downloaded += chunk.len() as u64;
        let state = meter.state;
        (meter.progress)(state);
    }
}

/// What a file says whose download another one's failure ended; never the first failure of a command.
fn stopped() -> Failure {
    Failure::platform("FETCH_UNREACHABLE", "The download ended because another file's failed")
        .hint("Run the same command again to continue")
}

/// Gives a file its name, if it is right.
async fn accept(file: &RemoteFile, begun: &Path, target: &Path) -> Result<()> {
    if let Some(expected) = file.sha256.clone() {
        let path = begun.to_owned();
        let hash = tokio::task::spawn_blocking(move || file_hash(&path))
            .await
            .map_err(|error| Failure::system("INTERNAL_INTERRUPTED", format!("A thread was interrupted: {error}")))?
            .map_err(|error| write_failure(begun, &error))?;
        if hash != expected {
            // Continuing it would give the same wrong file for ever.
            std::fs::remove_file(begun).map_err(|error| write_failure(begun, &error))?;
            return Err(wrong(file, "its SHA-256 is not the one that the hub lists"));
        }
    }
    if file.bytes == 0 {
        std::fs::write(begun, []).map_err(|error| write_failure(begun, &error))?;
    }
    std::fs::rename(begun, target).map_err(|error| write_failure(target, &error))
}

fn file_hash(path: &Path) -> std::io::Result<String> {
    let mut file = std::fs::File::open(path)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 4 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hex::encode(hash.finalize())),
            count => hash.update(&buffer[..count]),
        }
    }
}

fn wrong(file: &RemoteFile, what: &str) -> Failure {
    Failure::platform("FETCH_HASH", format!("{} was not accepted: {what}", file.name))
        .hint("Run the command again; if it happens again, the hub's copy is damaged")
}

fn write_failure(path: &Path, error: &std::io::Error) -> Failure {
    Failure::system("FETCH_WRITE", format!("The download cannot be kept: {error}"))
        .at(path.display().to_string())
        .hint("Check that the folder can be written and the disk has room; run the same command again to continue")
}
