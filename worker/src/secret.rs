//! A string that cannot be printed, formatted or serialised.

use std::str::FromStr;

/// A credential. It has no `Display` and no `Serialize`; `Debug` shows only that it is there.
///
/// The memory is not wiped: the aim is that a secret never reaches a row, a log line, an error
/// or a file by accident, which the type system can guarantee; a memory dump it cannot.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Wraps a credential.
    pub fn new(value: impl Into<String>) -> Self {
        Self(value.into())
    }

    /// The credential itself. Call this only where it is handed to the service it opens.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Secret(…)")
    }
}

impl FromStr for Secret {
    type Err = std::convert::Infallible;
    fn from_str(value: &str) -> Result<Self, Self::Err> {
        Ok(Self::new(value))
    }
}
