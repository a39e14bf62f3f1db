//! Gathers what a scan finds: issues, counters, examples, within fixed memory.

use std::collections::HashMap;

use serde_json::Value;

use super::ScanOptions;
use super::issue::{Issue, IssueCode, Severity};
use super::message::{Example, Message, Role, digest_of};
use super::report::{Dropped, Report};
use super::text;

/// Records whose digests are remembered to find repetitions, and conversations told apart by id.
/// More are read just the same, only not compared: about 50 MB of tables at most.
const MAX_REMEMBERED: usize = 1 << 20;

/// Records shown in `sample_data`.
const SAMPLE_RECORDS: usize = 3;

/// Longest string of a sample record, in characters: answers of the app's files stay whole.
const SAMPLE_CHARACTERS: usize = 8000;

/// Where a record is.
#[derive(Clone, Debug, Default)]
pub(super) struct Place {
    pub line: u64,
    pub offset: Option<u64>,
    /// Path inside a document; empty in JSONL.
    pub path: String,
}

impl Place {
    /// A record that is a whole line.
    pub fn line(line: u64, offset: u64) -> Self {
        Self {
            line,
            offset: Some(offset),
            path: String::new(),
        }
    }

    /// The path of `field` in this record.
    pub fn field(&self, field: &str) -> String {
        match (self.path.is_empty(), field.is_empty()) {
            (true, _) => field.to_owned(),
            (false, true) => self.path.clone(),
            (false, false) => format!("{}.{field}", self.path),
        }
    }

    /// A record inside this one.
    pub fn inside(&self, field: &str) -> Self {
        Self {
            path: self.field(field),
            ..self.clone()
        }
    }
}

/// The problems of one record, until it is settled whether the record gives an example.
pub(super) struct Findings<'p> {
    place: &'p Place,
    snippet_characters: usize,
    issues: Vec<Issue>,
}

impl<'p> Findings<'p> {
    pub fn new(place: &'p Place, options: &ScanOptions) -> Self {
        Self {
            place,
            snippet_characters: options.snippet_characters,
            issues: Vec::new(),
        }
    }

    /// Notes a problem at `field` of the record.
    pub fn add(&mut self, code: IssueCode, field: &str, message: impl Into<String>) {
        let mut issue = Issue::new(code, self.place.line, self.place.field(field), message);
        issue.byte_offset = self.place.offset;
        self.issues.push(issue);
    }

    /// Notes a problem and shows the offending value.
    pub fn add_with(&mut self, code: IssueCode, field: &str, message: impl Into<String>, shown: &str) {
        self.add(code, field, message);
        let limit = self.snippet_characters;
        if let Some(issue) = self.issues.last_mut() {
            issue.snippet = text::snippet(shown, limit);
        }
    }

    /// Replaces the hint of the last problem.
    pub fn hint(&mut self, hint: impl Into<String>) {
        if let Some(issue) = self.issues.last_mut() {
            issue.hint = hint.into();
        }
    }

    pub fn has_error(&self) -> bool {
        self.first_error().is_some()
    }

    fn first_error(&self) -> Option<IssueCode> {
        self.issues
            .iter()
            .find(|issue| issue.severity == Severity::Error)
            .map(|issue| issue.code)
    }
}

/// An example before it has its place in the dataset.
pub(super) struct Draft {
    pub id: String,
    pub conversation_id: Option<String>,
    pub messages: Vec<Message>,
    pub tools: Option<Value>,
}

/// Gathers everything; see the module.
pub(super) struct Collector<'a> {
    pub options: &'a ScanOptions,
    pub report: Report,
    sink: &'a mut dyn FnMut(Example),
    line_of_example: HashMap<u64, u64>,
    turns_of_conversation: HashMap<u64, u64>,
    first_shape: Option<&'static str>,
}

impl<'a> Collector<'a> {
    pub fn new(options: &'a ScanOptions, sink: &'a mut dyn FnMut(Example)) -> Self {
        Self {
            options,
            report: Report {
                repetition_check_complete: true,
                ..Report::default()
            },
            sink,
            line_of_example: HashMap::new(),
            turns_of_conversation: HashMap::new(),
            first_shape: None,
        }
    }

    /// Counts an issue and keeps it while there is room.
    pub fn issue(&mut self, issue: Issue) {
        match issue.severity {
            Severity::Error => self.report.errors += 1,
            Severity::Warning => self.report.warnings += 1,
        }
        *self.report.issue_totals.entry(issue.code).or_default() += 1;
        if self.report.issues.len() < self.options.max_issues {
            self.report.issues.push(issue);
        }
    }

    /// Records that the record at `place` gives no example.
    pub fn dropped(&mut self, place: &Place, reason: IssueCode) {
        self.report.dropped_records += 1;
        if self.report.dropped.len() < self.options.max_issues {
            self.report.dropped.push(Dropped {
                line: place.line,
                path: place.path.clone(),
                reason,
            });
        }
    }

    /// A record that could not be read at all.
    pub fn unreadable(&mut self, place: &Place, issue: Issue) {
        let reason = issue.code;
        self.issue(issue);
        self.dropped(place, reason);
    }

    /// Reports the findings of a record and emits its example, unless an error forbids it.
    pub fn settle(&mut self, place: &Place, mut findings: Findings<'_>, draft: Option<Draft>) {
        let first_error = findings.first_error();
        let any = findings.issues.first().map(|issue| issue.code);
        let example = match (draft, first_error) {
            (Some(draft), None) => Some(self.example(place, &mut findings, draft)),
            _ => None,
        };
        for issue in findings.issues {
            self.issue(issue);
        }
        match example {
            Some(example) => (self.sink)(example),
            None => self.dropped(place, first_error.or(any).unwrap_or(IssueCode::ShapeUnknown)),
        }
    }

    /// Counts an example and looks for an earlier one like it.
    fn example(&mut self, place: &Place, findings: &mut Findings<'_>, draft: Draft) -> Example {
        let example = Example {
            line: place.line,
            index: self.report.examples,
            id: draft.id,
            conversation_id: draft.conversation_id,
            messages: draft.messages,
            tools: draft.tools,
        };
        self.report.examples += 1;
        self.report.messages += example.messages.len() as u64;
        let words: u64 = example
            .messages
            .iter()
            .map(|message| text::count_words(&message.content))
            .sum();
        self.report.estimated_tokens += (words as f64 * 1.3).round() as u64;
        self.count_conversation(&example);
        if let Some(line) = self.earlier_line(&example) {
            findings.add(
                IssueCode::Duplicate,
                "",
                format!("This example repeats the one on line {line} word for word"),
            );
        }
        example
    }

    fn earlier_line(&mut self, example: &Example) -> Option<u64> {
        let fingerprint = example.fingerprint();
        let earlier = self.line_of_example.get(&fingerprint).copied();
        if earlier.is_none() && self.has_room(self.line_of_example.len()) {
            self.line_of_example.insert(fingerprint, example.line);
        }
        earlier
    }

    fn count_conversation(&mut self, example: &Example) {
        let speaks = |message: &&Message| matches!(message.role, Role::User | Role::Assistant);
        let turns = example.messages.iter().filter(speaks).count() as u64;
        let key = example.conversation_id.as_ref().map(|id| digest_of(&[id.as_bytes()]));
        match key {
            Some(key)
                if self.turns_of_conversation.contains_key(&key) || self.has_room(self.turns_of_conversation.len()) =>
            {
                let longest = self.turns_of_conversation.entry(key).or_default();
                *longest = turns.max(*longest);
            }
            _ => {
                self.report.conversations += 1;
                self.report.turns += turns;
            }
        }
    }

    /// Whether a table of this size may grow; if not, says so in the report.
    fn has_room(&mut self, size: usize) -> bool {
        let has_room = size < MAX_REMEMBERED;
        self.report.repetition_check_complete &= has_room;
        has_room
    }

    /// Counts a record's shape; reports the first record whose shape differs from the file's first.
    pub fn shape(&mut self, place: &Place, shape: &'static str) {
        *self.report.shapes.entry(shape.to_owned()).or_default() += 1;
        let first = *self.first_shape.get_or_insert(shape);
        if first != shape && !self.report.issue_totals.contains_key(&IssueCode::ShapeMixed) {
            let message = format!("This record has the shape `{shape}`, earlier ones `{first}`");
            self.issue(Issue::new(
                IssueCode::ShapeMixed,
                place.line,
                place.path.clone(),
                message,
            ));
        }
    }

    /// Keeps one of the first records for the app's preview.
    pub fn sample(&mut self, value: &Value) {
        if self.report.sample_data.len() < SAMPLE_RECORDS {
            self.report.sample_data.push(text::storable(value, SAMPLE_CHARACTERS));
        }
    }

    /// Ends the scan: adds up the conversations and reports a file without examples.
    pub fn finish(mut self) -> Report {
        self.report.conversations += self.turns_of_conversation.len() as u64;
        self.report.turns += self.turns_of_conversation.values().sum::<u64>();
        let is_unread = [IssueCode::Empty, IssueCode::Utf16, IssueCode::Utf32, IssueCode::Binary]
            .iter()
            .any(|code| self.report.issue_totals.contains_key(code));
        if self.report.examples == 0 && !is_unread {
            self.no_examples();
        }
        self.report
    }

    fn no_examples(&mut self) {
        let has_records = self.report.dropped_records + self.report.user_turns_skipped > 0;
        let (code, message) = if has_records {
            (IssueCode::NoExamples, "No record of the file can be trained on")
        } else if self.report.header_lines > 0 {
            (IssueCode::OnlyHeader, "The file holds a `_meta` header and no record")
        } else if self.report.shapes.is_empty() && self.report.blank_lines == self.report.lines {
            (IssueCode::Blank, "The file holds nothing but white space")
        } else {
            (IssueCode::NoExamples, "The file holds no record")
        };
        self.issue(Issue::new(code, 1, "", message));
    }
}
