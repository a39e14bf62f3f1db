//! States of a job as the public API names them.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A job's state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum JobStatus {
    /// It waits for a worker.
    InQueue,
    /// A worker has it; `RUNNING` of the documentation's list means the same.
    InProgress,
    /// It ended well, as far as the platform knows: look at the output.
    Completed,
    /// It ended with an error.
    Failed,
    /// A client cancelled it.
    Cancelled,
    /// It waited or ran too long.
    TimedOut,
    /// A state this program does not know. Not final: better to ask again than to miss the end.
    Unknown(String),
}

impl JobStatus {
    /// Whether the state can change no more.
    pub fn is_final(&self) -> bool {
        matches!(self, Self::Completed | Self::Failed | Self::Cancelled | Self::TimedOut)
    }

    /// The API's word.
    pub fn as_str(&self) -> &str {
        match self {
            Self::InQueue => "IN_QUEUE",
            Self::InProgress => "IN_PROGRESS",
            Self::Completed => "COMPLETED",
            Self::Failed => "FAILED",
            Self::Cancelled => "CANCELLED",
            Self::TimedOut => "TIMED_OUT",
            Self::Unknown(word) => word,
        }
    }
}

impl From<&str> for JobStatus {
    fn from(word: &str) -> Self {
        match word {
            "IN_QUEUE" => Self::InQueue,
            "IN_PROGRESS" | "RUNNING" => Self::InProgress,
            "COMPLETED" => Self::Completed,
            "FAILED" => Self::Failed,
            "CANCELLED" => Self::Cancelled,
            "TIMED_OUT" => Self::TimedOut,
            other => Self::Unknown(other.to_owned()),
        }
    }
}

impl std::fmt::Display for JobStatus {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(self.as_str())
    }
}

impl Serialize for JobStatus {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

impl<'de> Deserialize<'de> for JobStatus {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Self::from(String::deserialize(deserializer)?.as_str()))
    }
}
