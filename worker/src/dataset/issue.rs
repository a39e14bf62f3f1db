//! The problems a dataset can have: one table of stable codes.

use std::fmt;

use serde::{Deserialize, Serialize, Serializer};

/// What an issue means for its record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// The record cannot be trained on; a dataset with one error is refused.
    Error,
    /// The record is used (or left out on purpose) and its owner should know.
    Warning,
}

/// Declares [`IssueCode`] from one table, so that code, severity and advice cannot drift apart.
macro_rules! issue_codes {
    ($($variant:ident, $code:literal, $severity:ident, $meaning:literal, $hint:literal;)*) => {
        /// A kind of problem; its text form is stable forever.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum IssueCode { $(#[doc = $meaning] $variant,)* }

        impl IssueCode {
            /// Every code, in the order of the table.
            pub const ALL: &[IssueCode] = &[$(IssueCode::$variant,)*];

            /// The stable text form, `DATA_…`.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $code,)* }
            }

            /// Whether the record is lost or merely remarkable.
            pub fn severity(self) -> Severity {
                match self { $(Self::$variant => Severity::$severity,)* }
            }

            /// What it means, in one sentence.
            pub fn meaning(self) -> &'static str {
                match self { $(Self::$variant => $meaning,)* }
            }

            /// What to do about it, when nothing more specific is known.
            pub fn hint(self) -> &'static str {
                match self { $(Self::$variant => $hint,)* }
            }
        }
    };
}

issue_codes! {
    // The file as bytes.
    Empty, "DATA_EMPTY", Error, "The file holds no byte.", "Upload the file again; the upload may have been interrupted.";
    Blank, "DATA_BLANK", Error, "The file holds nothing but white space.", "Upload a file with one JSON object per line.";
    ByteOrderMark, "DATA_BOM", Warning, "The text starts with a UTF-8 byte-order mark.", "It is skipped; save as UTF-8 without BOM to be rid of this note.";
    Utf16, "DATA_UTF16", Error, "The file is encoded in UTF-16.", "Save it as UTF-8.";
    Utf32, "DATA_UTF32", Error, "The file is encoded in UTF-32.", "Save it as UTF-8.";
    Binary, "DATA_BINARY", Error, "The file or line is binary, not text.", "Upload the JSON text itself, unpacked.";
    CarriageReturn, "DATA_CRLF", Warning, "Lines end with CR LF.", "Accepted; use LF line ends to be rid of this note.";
    InvalidUtf8, "DATA_INVALID_UTF8", Error, "A byte sequence is not UTF-8.", "Save the file as UTF-8; the offset says where the first bad byte is.";
    BlankLine, "DATA_BLANK_LINE", Warning, "A line between records is blank.", "It is skipped; remove it to be rid of this note.";
    LineTooLong, "DATA_LINE_TOO_LONG", Error, "A line or record is longer than the limit.", "Split the record, or check that line breaks were not lost.";

    // The file as JSON.
    LastLineTruncated, "DATA_LAST_LINE_TRUNCATED", Error, "The last line stops in the middle of its JSON.", "The file was cut off; export and upload it again.";
    JsonTruncated, "DATA_JSON_TRUNCATED", Error, "JSON ends before it is complete.", "In JSONL every record must be complete on one line; write line breaks inside strings as \\n.";
    JsonInvalid, "DATA_JSON_INVALID", Error, "The text is not JSON.", "Ensure each line is valid JSON";
    JsonControlCharacter, "DATA_JSON_CONTROL_CHARACTER", Error, "A JSON string holds an unescaped control character.", "Escape it, for example a tab as \\t.";
    TrailingData, "DATA_TRAILING_DATA", Error, "More text follows a complete JSON value on its line.", "Put one JSON object on each line.";
    LoneSurrogate, "DATA_LONE_SURROGATE", Error, "An escape such as \\ud800 is half of a surrogate pair.", "Write the whole pair or the character itself; text was probably cut in the middle of an emoji.";
    NumberOutOfRange, "DATA_NUMBER_OUT_OF_RANGE", Error, "A number is too large to represent.", "Use numbers below 1e308, or a string.";
    NestedTooDeep, "DATA_NESTED_TOO_DEEP", Error, "Objects or arrays nest deeper than 120 levels.", "Flatten the record.";
    KeyDuplicate, "DATA_KEY_DUPLICATE", Error, "An object has the same key twice.", "Keep one of them; readers disagree on which one counts.";
    JsonArray, "DATA_JSON_ARRAY", Warning, "The file is one JSON array instead of JSON lines.", "Accepted; JSONL streams better and gives exact line numbers.";

    // Records and their shapes.
    NotObject, "DATA_NOT_OBJECT", Error, "A record is not a JSON object.", "Each record must be an object such as {\"messages\": […]}.";
    ShapeUnknown, "DATA_SHAPE_UNKNOWN", Error, "An object has none of the known shapes.", "Use `messages`, `turns`, `conversations` (lists of role and content), or brightrun-lora-v4 lines with `current_user_input` and `target_response`.";
    ShapeMixed, "DATA_SHAPE_MIXED", Warning, "Records of several shapes share one file.", "All are used; check that the file was not joined from two exports by mistake.";
    TypeWrong, "DATA_TYPE_WRONG", Error, "A field has the wrong JSON type.", "Correct the type of this field.";
    HeaderMisplaced, "DATA_HEADER_MISPLACED", Warning, "A `_meta` header stands after the first line.", "It is skipped; files were probably joined.";
    OnlyHeader, "DATA_ONLY_HEADER", Error, "The file holds a `_meta` header and no record.", "Export the dataset again; none of its entries has a target response.";
    NoExamples, "DATA_NO_EXAMPLES", Error, "No record can be trained on.", "Correct the issues listed; at least one complete example is needed.";

    // Conversations.
    EmptyConversation, "DATA_EMPTY_CONVERSATION", Error, "A conversation has no messages.", "Conversation must have at least one turn";
    RoleMissing, "DATA_ROLE_MISSING", Error, "A message has no role.", "Each turn must have both role and content fields";
    RoleUnknown, "DATA_ROLE_UNKNOWN", Error, "A message has a role that does not exist.", "Use one of system, user, assistant, tool.";
    ContentMissing, "DATA_CONTENT_MISSING", Error, "A message has no content.", "Each turn must have both role and content fields";
    ContentEmpty, "DATA_CONTENT_EMPTY", Error, "A message has empty content.", "Write the text, or remove the message.";
    UserInputMissing, "DATA_USER_INPUT_MISSING", Error, "A line has no `current_user_input`.", "Give the user's message that the target responds to.";
    TargetMissing, "DATA_TARGET_MISSING", Error, "A line has no `target_response`.", "Give the answer to learn.";
    TargetNull, "DATA_TARGET_NULL", Warning, "A line's `target_response` is null: a user turn, which cannot be trained on.", "It is left out; nothing to do if the line is a user turn.";
    TargetEmpty, "DATA_TARGET_EMPTY", Error, "A line's `target_response` is empty.", "Give the answer to learn, or remove the line.";
    NoUser, "DATA_NO_USER", Error, "A conversation has no user message before its answer.", "Add the user message the answer responds to.";
    NoAssistant, "DATA_NO_ASSISTANT", Error, "A conversation has no assistant message, so nothing to learn.", "Add the assistant's answer.";
    LastNotAssistant, "DATA_LAST_NOT_ASSISTANT", Warning, "A conversation does not end with an assistant message.", "The messages after the last answer are left out; add an answer to use them.";
    NotAlternating, "DATA_ROLES_NOT_ALTERNATING", Warning, "Two messages of the same role follow each other, or the assistant speaks first.", "Used as it is; some chat templates refuse it. Join the messages if they belong together.";
    SystemNotFirst, "DATA_SYSTEM_NOT_FIRST", Error, "A system message is not the first message.", "Move it to the front; there can be one.";

    // Text and repetition.
    Duplicate, "DATA_DUPLICATE", Warning, "An example repeats an earlier one word for word.", "Used twice; remove it unless the weight is wanted.";
    SpecialToken, "DATA_SPECIAL_TOKEN", Warning, "Content spells a control token of a chat template.", "It stays plain text and can never act as a control token; remove it unless it is meant.";
    ControlCharacter, "DATA_CONTROL_CHARACTER", Warning, "Content holds a control character.", "Used as it is; remove it unless it is meant.";
    ReplacementCharacter, "DATA_REPLACEMENT_CHARACTER", Warning, "Content holds U+FFFD, the mark of text that was decoded wrongly.", "Export the text again with the right encoding.";
}

impl fmt::Display for IssueCode {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.as_str())
    }
}

impl Serialize for IssueCode {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

/// One problem at one place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Issue {
    /// Physical line, 1-based. In a JSON document: the line its record starts on.
    pub line: u64,
    /// Path inside the record (JSONL) or the document, such as `messages[2].role`; empty for the whole.
    pub path: String,
    /// The kind of problem.
    pub code: IssueCode,
    /// Error or warning.
    pub severity: Severity,
    /// What happened, as a sentence.
    pub message: String,
    /// What to do about it.
    pub hint: String,
    /// Offset in the file, in bytes from 0, where it is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub byte_offset: Option<u64>,
    /// The offending text, shortened and made printable.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub snippet: String,
}

impl Issue {
    /// An issue with the table's severity and hint.
    pub fn new(code: IssueCode, line: u64, path: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            line,
            path: path.into(),
            code,
            severity: code.severity(),
            message: message.into(),
            hint: code.hint().to_owned(),
            byte_offset: None,
            snippet: String::new(),
        }
    }

    /// Replaces the table's hint by a more specific one.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = hint.into();
        self
    }

    /// Adds the offset in the file.
    #[must_use]
    pub fn offset(mut self, byte_offset: u64) -> Self {
        self.byte_offset = Some(byte_offset);
        self
    }

    /// Adds the offending text, cut to `max_characters` and printable.
    #[must_use]
    pub fn snippet(mut self, text: &str, max_characters: usize) -> Self {
        self.snippet = super::text::snippet(text, max_characters);
        self
    }
}
