//! The one outward error type.
//!
//! Every failure a user or an operator may see is a [`Failure`]: what happened, where, what to
//! do about it, and a code that never changes its meaning. [`Blame`] alone decides whether the
//! queue may try again.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Whose fault a failure is; decides retry, alerting and who gets the mail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Blame {
    /// The input is wrong: trying again cannot help.
    User,
    /// This program or its machine failed: another attempt may succeed.
    System,
    /// Something we depend on (database, storage, provider) failed: retry with backoff.
    Platform,
}

impl Blame {
    /// Whether another attempt can change the result.
    pub fn is_retryable(self) -> bool {
        !matches!(self, Self::User)
    }
}

impl fmt::Display for Blame {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::User => "user",
            Self::System => "system",
            Self::Platform => "platform",
        })
    }
}

/// A failure in the form `what. where. what to do. [CODE]`.
///
/// ```
/// use brightrun_worker::error::{Blame, Failure};
/// let failure = Failure::user("DATA_ROLE_UNKNOWN", "Message 3 has role `assistent`.")
///     .at("Dataset line 42, `messages[2].role`")
///     .hint("Use one of system, user, assistant, tool.");
/// assert_eq!(
///     failure.to_string(),
///     "Message 3 has role `assistent`. Dataset line 42, `messages[2].role`. \
///      Use one of system, user, assistant, tool. [DATA_ROLE_UNKNOWN]"
/// );
/// assert!(!failure.blame.is_retryable());
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// `AREA_WHAT`, stable forever.
    pub code: String,
    /// Whose fault it is.
    pub blame: Blame,
    /// What happened, as a sentence.
    pub message: String,
    /// Where: file, line, field. Empty when there is no place.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub place: String,
    /// What to do about it, as a sentence. Empty when nothing can be done.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub hint: String,
}

impl Failure {
    /// A failure with an explicit blame.
    pub fn new(blame: Blame, code: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            code: code.into(),
            blame,
            message: message.into(),
            place: String::new(),
            hint: String::new(),
        }
    }

    /// The user's input is at fault.
    pub fn user(code: impl Into<String>, message: impl Into<String>) -> Self {
        Self::new(Blame::User, code, message)
    }

    /// This program or its machine is at fault.
    pub fn system(code: impl Into<String>, message: impl Into<String>) -> Self {
        Self::new(Blame::System, code, message)
    }

    /// A service this program depends on is at fault.
    pub fn platform(code: impl Into<String>, message: impl Into<String>) -> Self {
        Self::new(Blame::Platform, code, message)
    }

    /// Names the place (file, line, field).
    #[must_use]
    pub fn at(mut self, place: impl Into<String>) -> Self {
        self.place = place.into();
        self
    }

    /// Says what to do.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = hint.into();
        self
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        sentence(formatter, &self.message)?;
        for part in [&self.place, &self.hint] {
            if !part.is_empty() {
                formatter.write_str(" ")?;
                sentence(formatter, part)?;
            }
        }
        write!(formatter, " [{}]", self.code)
    }
}

/// Writes `text` and ends it with a full stop unless it already ends a sentence.
fn sentence(formatter: &mut fmt::Formatter<'_>, text: &str) -> fmt::Result {
    formatter.write_str(text)?;
    if text.ends_with(['.', '?', '!', ':']) {
        return Ok(());
    }
    formatter.write_str(".")
}

impl std::error::Error for Failure {}

/// The result of everything that can fail outwardly.
pub type Result<T, E = Failure> = std::result::Result<T, E>;
