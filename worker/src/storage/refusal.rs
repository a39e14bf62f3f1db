//! What an HTTP answer other than success means, and to whom.

use std::time::Duration;

use reqwest::header::RETRY_AFTER;
use serde::Deserialize;

use super::http;
use super::retry::Attempt;
use crate::error::{Blame, Failure};
use crate::secret::Secret;

/// Longest part of a service's own words that is passed on.
const MAX_DETAIL_CHARS: usize = 300;

/// Why a call brought no success.
#[derive(Debug)]
pub(crate) enum CallError {
    /// No answer.
    Network(reqwest::Error),
    /// An answer that says no.
    Refused(Refusal),
}

impl CallError {
    /// Decides between another attempt and a final failure.
    pub(crate) fn into_attempt(self, place: String, credential_hint: &str) -> Attempt {
        match self {
            Self::Network(error) => http::unreachable(error, place),
            Self::Refused(refusal) => refusal.into_attempt(place, credential_hint),
        }
    }

    /// The refusal's status, if there was an answer.
    pub(crate) fn status(&self) -> Option<u16> {
        match self {
            Self::Network(_) => None,
            Self::Refused(refusal) => Some(refusal.status),
        }
    }
}

/// An answer that says no.
#[derive(Clone, Debug, Default)]
pub(crate) struct Refusal {
    /// The status that is meant: storage-api often sends 400 with the true one in the body.
    pub(crate) status: u16,
    /// The service's own words, with credentials removed.
    pub(crate) detail: String,
    /// How long the service asks to be left alone.
    pub(crate) retry_after: Option<Duration>,
}

/// The error body of storage-api.
#[derive(Default, Deserialize)]
#[serde(default)]
struct ErrorBody {
    #[serde(rename = "statusCode")]
    status_code: serde_json::Value,
    error: String,
    message: String,
}

impl Refusal {
    /// Reads the answer; `hidden` are credentials that a careless proxy might echo.
    pub(crate) async fn read(response: reqwest::Response, hidden: &[&Secret]) -> Self {
        let status = response.status().as_u16();
        let retry_after = response
            .headers()
            .get(RETRY_AFTER)
            .and_then(|value| value.to_str().ok()?.trim().parse().ok())
            .map(Duration::from_secs);
        let text = response.text().await.unwrap_or_default();
        Self::parse(status, &text, retry_after, hidden)
    }

    fn parse(status: u16, text: &str, retry_after: Option<Duration>, hidden: &[&Secret]) -> Self {
        let body: Option<ErrorBody> = serde_json::from_str(text).ok();
        let meant = body.as_ref().and_then(|body| match &body.status_code {
            serde_json::Value::String(code) => code.parse().ok(),
            serde_json::Value::Number(code) => code.as_u64()?.try_into().ok(),
            _ => None,
        });
        let detail = body.map_or_else(|| text.to_owned(), |body| join(&body.error, &body.message));
        Self {
            status: meant.filter(|code| (400..600).contains(code)).unwrap_or(status),
            detail: redacted(&detail, hidden),
            retry_after,
        }
    }

    /// Decides between another attempt and a final failure.
    pub(crate) fn into_attempt(self, place: String, credential_hint: &str) -> Attempt {
        let failure = self.failure(place, credential_hint);
        if self.is_temporary() {
            Attempt::Again(failure, self.retry_after)
        } else {
            Attempt::Stop(failure)
        }
    }

    /// Busy, locked, or broken on the other side.
    fn is_temporary(&self) -> bool {
        matches!(self.status, 408 | 423 | 425 | 429 | 500..)
    }

    fn failure(&self, place: String, credential_hint: &str) -> Failure {
        use Blame::{Platform, System, User};
        let (blame, code, what, hint) = match self.status {
            _ if self.is_temporary() => (
                Platform,
                "STORAGE_UNAVAILABLE",
                "The storage is busy or broken",
                "The attempt is repeated by itself; if this stays, look at the storage's status page",
            ),
            401 | 403 => (
                System,
                "STORAGE_FORBIDDEN",
                "The storage refused access",
                credential_hint,
            ),
            400 if self.speaks_of(&["jwt", "jws", "signature", "authorization"]) => (
                System,
                "STORAGE_FORBIDDEN",
                "The storage refused access",
                credential_hint,
            ),
            404 if self.speaks_of(&["bucket"]) => (
                System,
                "STORAGE_BUCKET_MISSING",
                "The bucket does not exist",
                "Create the bucket, or name an existing one",
            ),
            404 => (
                User,
                "STORAGE_OBJECT_MISSING",
                "The file does not exist in the storage",
                "Upload the file again and check its path",
            ),
            413 => (
                System,
                "STORAGE_TOO_LARGE",
                "The file is larger than the storage accepts",
                "Raise the bucket's and the project's file size limit, or choose a smaller LoRA rank",
            ),
            415 | 400 | 422 if self.status == 415 || self.speaks_of(&["mime"]) => (
                System,
                "STORAGE_TYPE_REFUSED",
                "The bucket refuses this media type",
                "Allow application/octet-stream in the bucket's settings",
            ),
            400 if self.speaks_of(&["invalidkey", "invalid key"]) => (
                User,
                "STORAGE_NAME_INVALID",
                "The storage refuses this object name",
                "Use plain letters, digits, `-`, `_` and `.`",
            ),
            _ => (
                System,
                "STORAGE_REFUSED",
                "The storage refused the request",
                "Read its answer above",
            ),
        };
        let message = format!("{what} (status {}{})", self.status, self.detail_part());
        Failure::new(blame, code, message).at(place).hint(hint)
    }

    fn detail_part(&self) -> String {
        if self.detail.is_empty() {
            String::new()
        } else {
            format!(": {}", self.detail)
        }
    }

    fn speaks_of(&self, words: &[&str]) -> bool {
        let detail = self.detail.to_lowercase();
        words.iter().any(|word| detail.contains(word))
    }
}

fn join(error: &str, message: &str) -> String {
    match (error.is_empty(), message.is_empty()) {
        (true, _) => message.to_owned(),
        (_, true) => error.to_owned(),
        _ if error == message => message.to_owned(),
        _ => format!("{error}: {message}"),
    }
}

/// Text of another service made fit for a message: one line, short, without credentials and
/// without the queries of URLs.
pub(crate) fn redacted(text: &str, hidden: &[&Secret]) -> String {
    let mut text = text.split_whitespace().map(without_query).collect::<Vec<_>>().join(" ");
    for secret in hidden
        .iter()
        .map(|secret| secret.expose())
        .filter(|secret| !secret.is_empty())
    {
        text = text.replace(secret, "…");
    }
    match text.char_indices().nth(MAX_DETAIL_CHARS) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

fn without_query(word: &str) -> String {
    match word.split_once('?') {
        Some((address, query)) if address.contains("//") || query.contains('=') => format!("{address}?…"),
        _ => word.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::*;

    #[track_caller]
    fn check(status: u16, body: &str, code: &str, blame: Blame, again: bool) {
        let attempt = Refusal::parse(status, body, None, &[]).into_attempt("here".to_owned(), "Check the key");
        let (failure, is_again) = match attempt {
            Attempt::Again(failure, _) => (failure, true),
            Attempt::Stop(failure) => (failure, false),
        };
        assert_eq!(
            (failure.code.as_str(), failure.blame, is_again),
            (code, blame, again),
            "{failure}"
        );
    }

    #[test]
    fn every_answer_has_its_code_blame_and_patience() {
        use Blame::{Platform, System, User};
        check(404, "", "STORAGE_OBJECT_MISSING", User, false);
        check(
            400,
            r#"{"statusCode":"404","error":"not_found","message":"Object not found"}"#,
            "STORAGE_OBJECT_MISSING",
            User,
            false,
        );
        check(
            400,
            r#"{"statusCode":"404","error":"Bucket not found","message":"Bucket not found"}"#,
            "STORAGE_BUCKET_MISSING",
            System,
            false,
        );
        check(401, "", "STORAGE_FORBIDDEN", System, false);
        check(
            400,
            r#"{"statusCode":"403","error":"Unauthorized","message":"new row violates row-level security policy"}"#,
            "STORAGE_FORBIDDEN",
            System,
            false,
        );
        check(
            400,
            r#"{"error":"Invalid JWT","message":"jwt expired"}"#,
            "STORAGE_FORBIDDEN",
            System,
            false,
        );
        check(
            400,
            r#"{"statusCode":413,"error":"Payload too large","message":"The object exceeded the maximum allowed size"}"#,
            "STORAGE_TOO_LARGE",
            System,
            false,
        );
        check(
            400,
            r#"{"statusCode":"415","error":"invalid_mime_type","message":"mime type image/png is not supported"}"#,
            "STORAGE_TYPE_REFUSED",
            System,
            false,
        );
        check(
            400,
            r#"{"statusCode":"400","error":"InvalidKey","message":"Invalid key: ü"}"#,
            "STORAGE_NAME_INVALID",
            User,
            false,
        );
        check(418, "", "STORAGE_REFUSED", System, false);
        for status in [408, 423, 429, 500, 502, 503, 504, 522, 544] {
            check(status, "<html>oops</html>", "STORAGE_UNAVAILABLE", Platform, true);
        }
        // A status of nought in the body, as some releases send it, does not hide the real one.
        check(
            500,
            r#"{"statusCode":0,"message":"x"}"#,
            "STORAGE_UNAVAILABLE",
            Platform,
            true,
        );
    }

    #[test]
    fn an_echoed_credential_and_a_signed_query_are_removed() {
        let key = Secret::new("fake-key-canary");
        let text = "bad\nBearer fake-key-canary at https://h.example/o?token=fake-token-canary now";
        assert_eq!(redacted(text, &[&key]), "bad Bearer … at https://h.example/o?… now");
        assert!(redacted(&"é".repeat(1000), &[]).chars().count() <= MAX_DETAIL_CHARS + 1);
    }
}
