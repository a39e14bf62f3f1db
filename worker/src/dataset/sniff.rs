//! What a file is, judged by its first bytes.

use serde_json::Value;

use super::issue::IssueCode;

/// The first bytes of formats people upload by mistake.
const MAGIC: [(&[u8], &str); 13] = [
    (b"PK\x03\x04", "a ZIP archive (or an Excel or Word file)"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"PAR1", "a Parquet file"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard archive"),
    (b"BZh", "a bzip2 archive"),
    (b"\xfd7zXZ\x00", "an xz archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive"),
    (b"ARROW1", "an Arrow file"),
    (b"%PDF-", "a PDF document"),
    (b"SQLite format 3\x00", "an SQLite database"),
    (b"\x89PNG", "a PNG image"),
    (b"\x80\x02", "a Python pickle"),
    (b"\x80\x04", "a Python pickle"),
];

/// A reason to read no further.
pub(super) struct NotText {
    pub code: IssueCode,
    pub message: String,
}

/// Whether the window cannot be the start of UTF-8 text.
pub(super) fn not_text(window: &[u8]) -> Option<NotText> {
    let refuse = |code, message: &str| {
        Some(NotText {
            code,
            message: message.to_owned(),
        })
    };
    if window.is_empty() {
        return refuse(IssueCode::Empty, "File is empty");
    }
    if window.starts_with(&[0xff, 0xfe, 0, 0]) || window.starts_with(&[0, 0, 0xfe, 0xff]) {
        return refuse(
            IssueCode::Utf32,
            "The file is encoded in UTF-32 (its byte-order mark says so)",
        );
    }
    if window.starts_with(&[0xff, 0xfe]) || window.starts_with(&[0xfe, 0xff]) {
        return refuse(
            IssueCode::Utf16,
            "The file is encoded in UTF-16 (its byte-order mark says so)",
        );
    }
    if let Some((_, name)) = MAGIC.iter().find(|(magic, _)| window.starts_with(magic)) {
        return Some(NotText {
            code: IssueCode::Binary,
            message: format!("The file is {name}, not JSON text"),
        });
    }
    wide_text_without_mark(window)
}

/// UTF-16 or UTF-32 without a byte-order mark: ASCII text with zero bytes between.
fn wide_text_without_mark(window: &[u8]) -> Option<NotText> {
    let head = window.get(..window.len().min(64))?;
    let zero_share = |step: usize, phase: usize| {
        let column: Vec<&u8> = head.iter().skip(phase).step_by(step).collect();
        !column.is_empty() && column.iter().all(|byte| **byte == 0)
    };
    let (code, name) = if head.len() >= 8 && zero_share(4, 1) && zero_share(4, 2) {
        (IssueCode::Utf32, "UTF-32")
    } else if head.len() >= 4 && (zero_share(2, 0) || zero_share(2, 1)) {
        (IssueCode::Utf16, "UTF-16")
    } else {
        return None;
    };
    let is_all_zero = head.iter().all(|byte| *byte == 0);
    (!is_all_zero).then(|| NotText {
        code,
        message: format!("The file is encoded in {name} without a byte-order mark"),
    })
}

/// How to read on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Layout {
    /// Line by line.
    Lines,
    /// As JSON values that span lines.
    Document,
}

/// Decides between lines and a document, from text whose byte-order mark is gone.
///
/// A first line that is complete JSON means lines, whatever it holds: a document on one line is a
/// record like any other. An array, or an object that is not complete on its first line, means a
/// document, unless the second line is a complete object, in which case the first one is a broken record.
pub(super) fn layout(window: &[u8]) -> Layout {
    let text = window.trim_ascii_start();
    if text.first() == Some(&b'[') {
        return Layout::Document;
    }
    if text.first() != Some(&b'{') {
        return Layout::Lines;
    }
    let mut lines = text.splitn(3, |byte| *byte == b'\n');
    let first = lines.next().unwrap_or_default();
    let Some(second) = lines.next() else {
        return if has_document_key(first) {
            Layout::Document
        } else {
            Layout::Lines
        };
    };
    match serde_json::from_slice::<Value>(first) {
        Err(error) if error.is_eof() && !is_object(second) => Layout::Document,
        _ => Layout::Lines,
    }
}

/// Whether a line is a complete JSON object.
fn is_object(line: &[u8]) -> bool {
    matches!(serde_json::from_slice::<Value>(line), Ok(Value::Object(_)))
}

/// Whether the start of a single long line belongs to one of the app's documents.
fn has_document_key(first: &[u8]) -> bool {
    let head = String::from_utf8_lossy(first.get(..first.len().min(4096)).unwrap_or_default());
    [
        "\"training_file_metadata\"",
        "\"dataset_metadata\"",
        "\"training_pairs\"",
        "\"conversation_metadata\":{\"conversation_id\"",
    ]
    .iter()
    .any(|key| head.contains(key))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_layout_follows_from_the_first_lines() {
        for (text, expected) in [
            ("{\"messages\": []}\n{\"messages\": []}", Layout::Lines),
            ("{\"messages\": [\n{\"messages\": []}", Layout::Lines),
            ("{\n  \"conversations\": [\n", Layout::Document),
            ("{ \"messages\": [\n  {\"role\": \"user\"},\n", Layout::Document),
            ("[{\"messages\": []}]", Layout::Document),
            ("\n\n[\n", Layout::Document),
            (
                "{\"training_file_metadata\":{\"file_name\":\"x\"},\"conver",
                Layout::Document,
            ),
            ("{\"messages\": [{\"role\": \"us", Layout::Lines),
            ("role,content\nuser,hi", Layout::Lines),
        ] {
            assert_eq!(layout(text.as_bytes()), expected, "{text}");
        }
    }
}
