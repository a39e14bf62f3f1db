//! What a scan found: counts, statistics, issues, and everything left out.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::{Value, json};

use super::issue::{Issue, IssueCode, Severity};
use crate::error::Failure;

/// How the file as a whole is laid out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Container {
    /// Nothing could be read.
    #[default]
    Unknown,
    /// One JSON value on each line.
    Jsonl,
    /// One JSON array of records.
    JsonArray,
    /// One JSON object, such as the full training JSON.
    JsonDocument,
}

/// Something that was changed on the way from the file to the examples.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Repairs {
    /// Last history messages removed because they repeat `current_user_input`.
    pub repeated_user_inputs_removed: u64,
    /// Messages after the last assistant message left out.
    pub trailing_messages_left_out: u64,
    /// Blank system prompts treated as absent.
    pub blank_system_prompts: u64,
}

/// A record that gave no example.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Dropped {
    /// Physical line, 1-based.
    pub line: u64,
    /// Path inside the document; empty in JSONL.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub path: String,
    /// The code of the first reason.
    pub reason: IssueCode,
}

/// The result of [`super::scan`]. Serialises to JSON; the same bytes give the same report.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Report {
    /// Size of the source in bytes.
    pub bytes: u64,
    /// SHA-256 of the source in lower-case hexadecimal.
    pub sha256: String,
    /// Layout of the file.
    pub container: Container,
    /// How many records have each shape: `v4`, `messages`, `turns`, `conversations`, `conversation`, `training_file`.
    pub shapes: BTreeMap<String, u64>,
    /// Physical lines; a last line without line end counts.
    pub lines: u64,
    /// Lines that hold nothing but white space.
    pub blank_lines: u64,
    /// `_meta` headers.
    pub header_lines: u64,
    /// The pairs a header claims. Files of the app count user turns too: about twice the examples.
    pub stated_pairs: Option<u64>,
    /// Trainable examples.
    pub examples: u64,
    /// Records that gave no example, with errors or not; each is in `dropped` until that list is full.
    pub dropped_records: u64,
    /// Entries of a training document that are user turns, hence have no target: not trainable by design.
    pub user_turns_skipped: u64,
    /// Distinct conversations (by id; an example without id is one of its own).
    pub conversations: u64,
    /// User and assistant messages of the longest example of each conversation, summed.
    pub turns: u64,
    /// Words × 1.3 over all messages of all examples: the app's estimate, not a tokenizer's count.
    pub estimated_tokens: u64,
    /// Messages of all examples, histories included.
    pub messages: u64,
    /// What was changed.
    pub repairs: Repairs,
    /// Number of errors, stored below or not.
    pub errors: u64,
    /// Number of warnings, stored below or not.
    pub warnings: u64,
    /// How many issues of each code.
    pub issue_totals: BTreeMap<IssueCode, u64>,
    /// The first issues, in order of discovery, up to [`super::ScanOptions::max_issues`].
    pub issues: Vec<Issue>,
    /// The first dropped records, up to [`super::ScanOptions::max_issues`].
    pub dropped: Vec<Dropped>,
    /// False when the file has more examples than are compared for duplicates and counted by conversation.
    pub repetition_check_complete: bool,
    /// The first three records, cut where long.
    pub sample_data: Vec<Value>,
}

impl Report {
    /// Whether the dataset may be trained on: at least one example and no error.
    pub fn is_ready(&self) -> bool {
        self.errors == 0 && self.examples > 0
    }

    /// Mean user and assistant messages of a conversation; 0 without any.
    pub fn average_turns_per_conversation(&self) -> f64 {
        ratio(self.turns, self.conversations)
    }

    /// Mean estimated tokens of a message; 0 without any.
    pub fn average_tokens_per_turn(&self) -> f64 {
        ratio(self.estimated_tokens, self.messages)
    }

    /// The `datasets.validation_errors` column: the first ten errors as
    /// `{line, error, suggestion, code, path}`, or null when there is none.
    pub fn validation_errors(&self) -> Value {
        let errors: Vec<Value> = self
            .issues
            .iter()
            .filter(|issue| issue.severity == Severity::Error)
            .take(10)
            .map(|issue| {
                json!({
                    "line": issue.line,
                    "error": issue.message,
                    "suggestion": issue.hint,
                    "code": issue.code,
                    "path": issue.path,
                })
            })
            .collect();
        if errors.is_empty() {
            Value::Null
        } else {
            Value::Array(errors)
        }
    }

    /// The `datasets.error_message` column, in the app's words; `None` when the dataset is ready.
    pub fn error_message(&self) -> Option<String> {
        if self.is_ready() {
            return None;
        }
        if self.issue_totals.contains_key(&IssueCode::Empty) {
            return Some("File is empty".to_owned());
        }
        Some(format!("Found {} validation error(s)", self.errors))
    }

    /// The failure a job ends with when its dataset is not ready.
    pub fn failure(&self) -> Option<Failure> {
        let message = self.error_message()?;
        let first = self.issues.iter().find(|issue| issue.severity == Severity::Error);
        let (place, what) = first.map_or((String::new(), String::new()), |issue| {
            (place_of(issue), format!(": {} [{}]", issue.message, issue.code))
        });
        Some(
            Failure::user("DATASET_INVALID", format!("{message}; the first{what}"))
                .at(place)
                .hint("Correct the issues listed with the dataset and try again"),
        )
    }
}

/// `Dataset line 42, `messages[2].role``.
fn place_of(issue: &Issue) -> String {
    if issue.path.is_empty() {
        return format!("Dataset line {}", issue.line);
    }
    format!("Dataset line {}, `{}`", issue.line, issue.path)
}

/// `part / whole`, 0 for an empty whole: the app formats these numbers and cannot take NaN.
fn ratio(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}
