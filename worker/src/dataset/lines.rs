//! JSONL: one record a line, every line judged by itself.

use std::io::{self, Read};

use super::collect::{Collector, Place};
use super::issue::{Issue, IssueCode};
use super::json::{self, Builder};
use super::source::{Line, Source};

/// The UTF-8 byte-order mark.
pub(super) const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// Reads all lines of `source` into `collector`.
pub(super) fn scan<R: Read>(source: &mut Source<R>, collector: &mut Collector<'_>) -> io::Result<()> {
    let position = source.position();
    let mut reader = LineReader {
        collector,
        has_carriage_returns: false,
        blank_run: None,
    };
    let mut buffer = Vec::new();
    loop {
        let place = Place::line(position.line.get(), position.offset.get());
        match source.next_line(&mut buffer)? {
            None => return Ok(()),
            Some(Line::Whole { ended }) => reader.line(&place, &buffer, ended),
            Some(Line::TooLong { bytes }) => reader.too_long(&place, bytes, &buffer),
        }
    }
}

struct LineReader<'c, 'a> {
    collector: &'c mut Collector<'a>,
    has_carriage_returns: bool,
    /// First line of the run of blank lines just read, and its length.
    blank_run: Option<(u64, u64)>,
}

impl LineReader<'_, '_> {
    fn too_long(&mut self, place: &Place, bytes: u64, head: &[u8]) {
        self.end_blank_run();
        let limit = self.collector.options.max_record_bytes;
        let message = format!("The line has {bytes} bytes; the limit is {limit}");
        let issue = self.issue(place, IssueCode::LineTooLong, message, 0).snippet(
            &String::from_utf8_lossy(head.get(..head.len().min(400)).unwrap_or_default()),
            self.collector.options.snippet_characters,
        );
        self.collector.unreadable(place, issue);
    }

    fn line(&mut self, place: &Place, bytes: &[u8], ended: bool) {
        let bytes = self.without_carriage_return(place, bytes);
        let bytes = self.without_byte_order_mark(place, bytes);
        if bytes.trim_ascii().is_empty() {
            self.collector.report.blank_lines += 1;
            let (first, count) = self.blank_run.unwrap_or((place.line, 0));
            self.blank_run = Some((first, count + 1));
            return;
        }
        self.end_blank_run();
        match self.text(place, bytes, ended) {
            Ok(text) => self.parse(place, text, ended),
            Err(issue) => self.collector.unreadable(place, *issue),
        }
    }

    /// Blank lines at the end of the file are no issue; between records they are.
    fn end_blank_run(&mut self) {
        if let Some((line, count)) = self.blank_run.take() {
            let message = format!("{count} blank line(s) stand between records");
            self.collector
                .issue(Issue::new(IssueCode::BlankLine, line, "", message));
        }
    }

    fn without_carriage_return<'l>(&mut self, place: &Place, bytes: &'l [u8]) -> &'l [u8] {
        let Some(text) = bytes.strip_suffix(b"\r") else {
            return bytes;
        };
        if !self.has_carriage_returns {
            self.has_carriage_returns = true;
            let message = "Lines end with CR LF, as on Windows";
            self.collector
                .issue(Issue::new(IssueCode::CarriageReturn, place.line, "", message));
        }
        text
    }

    fn without_byte_order_mark<'l>(&mut self, place: &Place, bytes: &'l [u8]) -> &'l [u8] {
        let Some(text) = bytes.strip_prefix(BYTE_ORDER_MARK) else {
            return bytes;
        };
        self.collector.issue(byte_order_mark(place));
        text
    }

    fn text<'l>(&self, place: &Place, bytes: &'l [u8], ended: bool) -> Result<&'l str, Box<Issue>> {
        if let Some(at) = bytes.iter().position(|byte| *byte == 0) {
            return Err(Box::new(self.issue(
                place,
                IssueCode::Binary,
                "The line contains NUL bytes: it is binary, not text".to_owned(),
                at,
            )));
        }
        std::str::from_utf8(bytes).map_err(|error| {
            let at = error.valid_up_to();
            if !ended && error.error_len().is_none() {
                return Box::new(self.issue(
                    place,
                    IssueCode::LastLineTruncated,
                    "The last line stops in the middle of a character".to_owned(),
                    at,
                ));
            }
            let message = format!(
                "Byte {} of the line (0x{:02X}) is not UTF-8",
                at + 1,
                bytes.get(at).copied().unwrap_or(0)
            );
            Box::new(self.issue(place, IssueCode::InvalidUtf8, message, at))
        })
    }

    fn parse(&mut self, place: &Place, text: &str, ended: bool) {
        let mut parser = serde_json::Deserializer::from_str(text);
        let parsed = Builder::whole()
            .build(&mut parser)
            .and_then(|built| parser.end().map(|()| built));
        match parsed {
            Ok((value, duplicate_keys)) => self.collector.record(place, value, &duplicate_keys),
            Err(error) => {
                let issue = self.parse_issue(place, text, ended, &error);
                self.collector.unreadable(place, issue);
            }
        }
    }

    fn parse_issue(&self, place: &Place, text: &str, ended: bool, error: &serde_json::Error) -> Issue {
        let column = error.column();
        let code = match json::classify(error) {
            IssueCode::JsonTruncated if !ended => IssueCode::LastLineTruncated,
            code => code,
        };
        let message = match code {
            IssueCode::LastLineTruncated => "The last line stops in the middle of its JSON".to_owned(),
            _ => format!("JSON parse error: {} (column {column})", json::describe(error)),
        };
        let mut issue = self.issue(place, code, message, column.saturating_sub(1));
        let near = around(text, column);
        if let Some(hint) = json_hint(near).filter(|_| code == IssueCode::JsonInvalid) {
            issue = issue.hint(hint);
        }
        issue.snippet(near, self.collector.options.snippet_characters)
    }

    /// An issue at byte `at` of the line.
    fn issue(&self, place: &Place, code: IssueCode, message: String, at: usize) -> Issue {
        Issue::new(code, place.line, "", message).offset(place.offset.unwrap_or(0) + at as u64)
    }
}

/// The note about a byte-order mark.
pub(super) fn byte_order_mark(place: &Place) -> Issue {
    let message = "The text starts with a UTF-8 byte-order mark";
    Issue::new(IssueCode::ByteOrderMark, place.line, "", message).offset(place.offset.unwrap_or(0))
}

/// The text from a little before `column` (1-based, in bytes).
fn around(text: &str, column: usize) -> &str {
    let mut start = column.saturating_sub(20).min(text.len());
    while !text.is_char_boundary(start) {
        start -= 1;
    }
    text.get(start..).unwrap_or_default()
}

/// Advice for the usual ways in which text is nearly JSON.
fn json_hint(near: &str) -> Option<&'static str> {
    let head = near.trim_start();
    if head.contains("NaN") || head.contains("None") || head.contains("True") || head.contains("False") {
        return Some(
            "This looks like Python output; write the file with json.dumps, which gives null, true and false.",
        );
    }
    if near.contains(",}") || near.contains(", }") || near.contains(",]") {
        return Some("Remove the comma before the closing bracket.");
    }
    near.contains('\'')
        .then_some("JSON strings use double quotes; write the file with a JSON library.")
}
