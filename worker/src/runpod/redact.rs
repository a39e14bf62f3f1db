//! Keeps credentials out of log lines and error strings.

use std::borrow::Cow;
use std::sync::Arc;

/// Shorter values are left alone: replacing every `true` or `8080` would make logs unreadable and protects nothing.
const SHORTEST_SECRET: usize = 6;

/// What stands where a credential was.
const REPLACEMENT: &str = "[redacted]";

/// Replaces known credentials in text. Cheap to clone.
#[derive(Clone, Default)]
pub struct Redactor {
    /// Longest first, so that a secret that contains another is replaced whole.
    secrets: Arc<[String]>,
}

impl Redactor {
    /// A redactor for these values.
    pub fn new(secrets: impl IntoIterator<Item = String>) -> Self {
        let mut secrets: Vec<String> = secrets
            .into_iter()
            .filter(|secret| secret.len() >= SHORTEST_SECRET)
            .collect();
        secrets.sort_by(|left, right| right.len().cmp(&left.len()).then_with(|| left.cmp(right)));
        secrets.dedup();
        Self {
            secrets: secrets.into(),
        }
    }

    /// The values of all variables whose names say that they hold a credential.
    pub fn of_environment(variables: impl IntoIterator<Item = (String, String)>) -> Self {
        Self::new(
            variables
                .into_iter()
                .filter(|(name, _)| names_a_secret(name))
                .map(|(_, value)| value),
        )
    }

    /// This redactor and some more values.
    #[must_use]
    pub fn with(&self, more: impl IntoIterator<Item = String>) -> Self {
        Self::new(self.secrets.iter().cloned().chain(more))
    }

    /// `text` without any of the credentials.
    pub fn clean<'text>(&self, text: &'text str) -> Cow<'text, str> {
        let mut clean = Cow::Borrowed(text);
        for secret in self.secrets.iter() {
            if clean.contains(secret.as_str()) {
                clean = Cow::Owned(clean.replace(secret.as_str(), REPLACEMENT));
            }
        }
        clean
    }
}

impl std::fmt::Debug for Redactor {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "Redactor({} values)", self.secrets.len())
    }
}

/// Whether a variable or field of this name holds a credential.
pub fn names_a_secret(name: &str) -> bool {
    let name = name.to_ascii_uppercase();
    [
        "KEY",
        "SECRET",
        "TOKEN",
        "PASSWORD",
        "DATABASE_URL",
        "API_ID",
        "DB_URL",
        "POSTGRES_URL",
    ]
    .iter()
    .any(|word| name.contains(word))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_inside_another_one_leaves_no_rest() {
        let redactor = Redactor::new(["canary".to_owned(), "canary-not-real-2".to_owned()]);
        assert_eq!(
            redactor.clean("a canary-not-real-2 b canary"),
            "a [redacted] b [redacted]"
        );
    }

    #[test]
    fn only_variables_with_telling_names_are_secrets() {
        let variables = [("RUNPOD_AI_API_KEY", "canary-key"), ("RUNPOD_POD_ID", "pod-0001")];
        let redactor = Redactor::of_environment(variables.map(|(name, value)| (name.to_owned(), value.to_owned())));
        assert_eq!(redactor.clean("canary-key on pod-0001"), "[redacted] on pod-0001");
    }
}
