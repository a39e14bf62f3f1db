//! What a finished job tells the platform.
//!
//! The body decides what a client sees: a non-empty `error` *string* means FAILED, anything else COMPLETED. An object in `error`
//! was reported to end as COMPLETED without output, so ours is always text.

use serde_json::{Map, Value, json};

use super::redact::Redactor;
use crate::error::{Failure, Result};

/// Longest text of one field of an error, in bytes; the rest is cut from its middle.
const LONGEST_FIELD: usize = 16 * 1024;

/// Who speaks in error reports.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The worker's id.
    pub worker_id: String,
    /// The machine's name.
    pub hostname: String,
    /// Protocol level of RunPod's SDK that this worker implements.
    pub protocol_version: String,
}

/// A result ready to be posted.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// The JSON body.
    pub body: Value,
    /// Whether the client sees FAILED.
    pub is_failure: bool,
    /// Whether the worker asks to be replaced after this job.
    pub refresh: bool,
}

impl Outcome {
    /// The outcome of a handler.
    pub fn of(result: Result<Value>, identity: &Identity, redactor: &Redactor) -> Self {
        match result {
            Ok(value) => Self::of_value(value, redactor),
            Err(failure) => Self::of_failure(&failure, identity, redactor),
        }
    }

    /// A value: `error` and `refresh_worker` in an object have the meaning that RunPod's SDK gives them.
    fn of_value(value: Value, redactor: &Redactor) -> Self {
        let mut body = Map::new();
        let mut outcome = Self {
            body: Value::Null,
            is_failure: false,
            refresh: false,
        };
        match value {
            Value::Object(mut rest) => {
                outcome.refresh = rest.remove("refresh_worker").is_some_and(|flag| is_truthy(&flag));
                let error = rest.remove("error").filter(is_truthy);
                if !rest.is_empty() {
                    body.insert("output".to_owned(), Value::Object(rest));
                }
                if let Some(error) = error {
                    outcome.is_failure = true;
                    body.insert(
                        "error".to_owned(),
                        Value::String(redactor.clean(&as_text(&error)).into_owned()),
                    );
                }
            }
            other => {
                body.insert("output".to_owned(), other);
            }
        }
        if outcome.refresh {
            body.insert("stopPod".to_owned(), Value::Bool(true));
        }
        outcome.body = Value::Object(body);
        outcome
    }

    /// A failure: its text is one JSON object with the SDK's keys, a stable code and whether another attempt can help.
    pub fn of_failure(failure: &Failure, identity: &Identity, redactor: &Redactor) -> Self {
        let field = |text: &str| clip(&redactor.clean(text), LONGEST_FIELD);
        let text = json!({
            "error_type": format!("{} failure", failure.blame),
            "error_message": field(&failure.to_string()),
            "error_traceback": field(&failure.place),
            "hostname": identity.hostname,
            "worker_id": identity.worker_id,
            "runpod_version": identity.protocol_version,
            "error_code": failure.code,
            "retryable": failure.blame.is_retryable(),
        });
        Self {
            body: json!({"error": text.to_string()}),
            is_failure: true,
            refresh: false,
        }
    }

    /// Asks the platform to replace this worker.
    #[must_use]
    pub fn refreshing(mut self) -> Self {
        self.refresh = true;
        if let Value::Object(body) = &mut self.body {
            body.insert("stopPod".to_owned(), Value::Bool(true));
        }
        self
    }
}

/// As Python sees it: null, false, zero and everything empty are not errors.
fn is_truthy(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(flag) => *flag,
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::String(text) => !text.is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::Object(fields) => !fields.is_empty(),
    }
}

fn as_text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// `text` in at most `limit` bytes and a note: its head and its tail.
pub(crate) fn clip(text: &str, limit: usize) -> String {
    if text.len() <= limit {
        return text.to_owned();
    }
    let (mut head, mut tail) = (limit / 2, text.len() - limit / 2);
    while !text.is_char_boundary(head) {
        head -= 1;
    }
    while !text.is_char_boundary(tail) {
        tail += 1;
    }
    format!("{} … {} bytes cut … {}", &text[..head], tail - head, &text[tail..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clipping_keeps_head_and_tail_and_whole_characters() {
        let clipped = clip(&"ä".repeat(100), 21);
        assert!(
            clipped.starts_with("äääää ") && clipped.ends_with(" äääää"),
            "{clipped}"
        );
        assert_eq!(clip("short", 5), "short");
    }
}
