//! Datasets: bytes in, examples and a report out.
//!
//! One parser serves the validator, the estimator and the trainer, so that they cannot disagree
//! about what a file holds. [`scan`] reads any accepted shape as a stream, in memory bounded by
//! [`ScanOptions::max_record_bytes`], and reports *every* problem with line, path, code and hint:
//! bad input is a normal value here, and only a reader that fails is an error.
//!
//! # Accepted shapes, told by their keys
//!
//! | shape | what it is |
//! |---|---|
//! | `v4` | brightrun-lora lines v3–v5: `system_prompt`, `conversation_history`, `current_user_input`, `target_response` |
//! | `messages`, `turns`, `conversations` | an object with a list of `{role, content}` under that key |
//! | `conversation` | individual conversation JSON: `training_pairs`, one entry a turn |
//! | `training_file` | full training JSON: `conversations` of `training_pairs` |
//!
//! Each may be a line of JSONL (an optional `_meta` header comes first), an element of a JSON
//! array, or a document of its own.
//!
//! # Two traps in every real export
//!
//! The last history message repeats `current_user_input`; it is removed and counted in
//! [`Repairs`]. Stated totals count user turns too; examples are counted here, and the stated
//! number is only shown.
//!
//! # What is promised
//!
//! No record is altered or left out without a trace: an example, a header, a blank line, a
//! skipped user turn, or an entry in [`Report::dropped`]. An error means its record gives no
//! example and the dataset is refused; a warning leaves the dataset usable. [`IssueCode`] is the
//! table of both.

mod chat;
mod collect;
mod document;
mod issue;
mod json;
mod lines;
mod message;
mod pack;
mod record;
mod report;
mod sniff;
mod source;
mod split;
mod text;

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

pub use issue::{Issue, IssueCode, Severity};
pub use message::{Example, Message, Role};
pub use pack::{Packing, pack};
pub use report::{Container, Dropped, Repairs, Report};
pub use split::{Split, split};
pub use text::{find_control_token, snippet};

use crate::error::{Failure, Result};
use collect::{Collector, Place};
use source::Source;

/// Limits of a scan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScanOptions {
    /// Longest line or record read, in bytes; a longer one is reported and skipped.
    pub max_record_bytes: usize,
    /// Issues and dropped records stored in the report; all are counted.
    pub max_issues: usize,
    /// Characters of offending text shown with an issue.
    pub snippet_characters: usize,
}

impl Default for ScanOptions {
    fn default() -> Self {
        Self {
            max_record_bytes: 16 << 20,
            max_issues: 1000,
            snippet_characters: 80,
        }
    }
}

/// Reads a dataset from `source`, hands each example to `sink` in file order, and reports the rest.
///
/// # Errors
///
/// `DATASET_READ_FAILED` when `source` itself fails; whatever the bytes are is the report's business.
pub fn scan(source: impl Read, options: &ScanOptions, sink: &mut dyn FnMut(Example)) -> Result<Report> {
    let mut source = Source::new(source, options.max_record_bytes);
    let mut collector = Collector::new(options, sink);
    let totals = read(&mut source, &mut collector)
        .and_then(|()| source.finish())
        .map_err(|error| read_failed(&error))?;
    collector.report.bytes = totals.bytes;
    collector.report.sha256 = totals.sha256;
    collector.report.lines = totals.lines;
    Ok(collector.finish())
}

/// Reads the dataset file at `path` into memory.
///
/// # Errors
///
/// As [`scan`]; `DATASET_NOT_FOUND` when there is no such file.
pub fn load(path: &Path) -> Result<(Vec<Example>, Report)> {
    let file = File::open(path).map_err(|error| open_failed(path, &error))?;
    let mut examples = Vec::new();
    let report = scan(file, &ScanOptions::default(), &mut |example| examples.push(example))
        .map_err(|failure| failure.at(path.display().to_string()))?;
    Ok((examples, report))
}

/// Reports on the dataset file at `path` without keeping its examples.
///
/// # Errors
///
/// As [`load`].
pub fn check(path: &Path) -> Result<Report> {
    let file = File::open(path).map_err(|error| open_failed(path, &error))?;
    scan(file, &ScanOptions::default(), &mut |_| {}).map_err(|failure| failure.at(path.display().to_string()))
}

/// Looks at the first bytes and reads the rest accordingly.
fn read<R: Read>(source: &mut Source<R>, collector: &mut Collector<'_>) -> io::Result<()> {
    let window = source.window()?;
    if let Some(refusal) = sniff::not_text(window) {
        collector.issue(Issue::new(refusal.code, 1, "", refusal.message).offset(0));
        return Ok(());
    }
    let has_mark = window.starts_with(lines::BYTE_ORDER_MARK);
    let text = window
        .get(if has_mark { lines::BYTE_ORDER_MARK.len() } else { 0 }..)
        .unwrap_or_default();
    let layout = sniff::layout(text);
    if has_mark {
        collector.issue(lines::byte_order_mark(&Place::line(1, 0)));
        source.skip(lines::BYTE_ORDER_MARK.len());
    }
    match layout {
        sniff::Layout::Lines => {
            collector.report.container = Container::Jsonl;
            lines::scan(source, collector)
        }
        sniff::Layout::Document => document::scan(source, collector),
    }
}

fn read_failed(error: &io::Error) -> Failure {
    Failure::platform(
        "DATASET_READ_FAILED",
        format!("The dataset could not be read to its end: {error}"),
    )
    .hint("Try again; if it happens again, check the storage the file is in")
}

fn open_failed(path: &Path, error: &io::Error) -> Failure {
    if error.kind() == io::ErrorKind::NotFound {
        return Failure::user("DATASET_NOT_FOUND", "There is no dataset file")
            .at(path.display().to_string())
            .hint("Check the path");
    }
    Failure::platform(
        "DATASET_READ_FAILED",
        format!("The dataset could not be opened: {error}"),
    )
    .at(path.display().to_string())
    .hint("Check that the file may be read")
}
