//! Messages and examples: what every shape is turned into.

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// Who speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Instructions; at most one message, the first.
    System,
    /// The person.
    User,
    /// The model.
    Assistant,
    /// The result of a tool the model called.
    Tool,
}

impl Role {
    /// All roles.
    pub const ALL: [Role; 4] = [Self::System, Self::User, Self::Assistant, Self::Tool];

    /// The name templates know.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
            Self::Tool => "tool",
        }
    }

    /// The role of that exact name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|role| role.as_str() == name)
    }

    /// The role somebody probably meant by `name`: another product's word, or a slip of the pen.
    pub fn did_you_mean(name: &str) -> Option<Self> {
        let name = name.trim().to_lowercase();
        match name.as_str() {
            "human" | "client" | "customer" | "person" | "prompter" => return Some(Self::User),
            "gpt" | "bot" | "ai" | "model" | "chatbot" | "agent" | "consultant" => return Some(Self::Assistant),
            "developer" | "instruction" | "instructions" => return Some(Self::System),
            "function" | "observation" | "tool_response" => return Some(Self::Tool),
            _ => {}
        }
        Self::ALL
            .into_iter()
            .map(|role| (strsim::damerau_levenshtein(role.as_str(), &name), role))
            .filter(|(distance, _)| *distance <= 2)
            .min_by_key(|(distance, _)| *distance)
            .map(|(_, role)| role)
    }
}

impl fmt::Display for Role {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.as_str())
    }
}

/// One message of a conversation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// The text, exactly as the file has it.
    pub content: String,
    /// Further fields a chat template may read: [`Message::TEMPLATE_FIELDS`].
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

impl Message {
    /// The fields beside role and content that are handed to chat templates.
    pub const TEMPLATE_FIELDS: [&str; 4] = ["tool_calls", "tool_call_id", "name", "reasoning_content"];

    /// A message of text only.
    pub fn new(role: Role, content: impl Into<String>) -> Self {
        Self {
            role,
            content: content.into(),
            extra: Map::new(),
        }
    }

    /// A system message.
    pub fn system(content: impl Into<String>) -> Self {
        Self::new(Role::System, content)
    }

    /// A user message.
    pub fn user(content: impl Into<String>) -> Self {
        Self::new(Role::User, content)
    }

    /// An assistant message.
    pub fn assistant(content: impl Into<String>) -> Self {
        Self::new(Role::Assistant, content)
    }

    /// Whether the message calls tools, so that its text may be empty.
    pub fn calls_tools(&self) -> bool {
        matches!(self.extra.get("tool_calls"), Some(Value::Array(calls)) if !calls.is_empty())
    }
}

/// One thing to learn: a conversation that ends with an assistant message.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Example {
    /// Physical line in the file, 1-based.
    pub line: u64,
    /// Position among the examples of the file, from 0.
    pub index: u64,
    /// The record's own id, or empty. Not guaranteed unique.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub id: String,
    /// The conversation it belongs to, if the record says so; [`super::split`] keeps these together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub conversation_id: Option<String>,
    /// At least one user message, then others; the last one is the assistant's.
    pub messages: Vec<Message>,
    /// Tool definitions for the template, as the record has them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tools: Option<Value>,
}

impl Example {
    /// A digest of everything the model would see: equal for examples that repeat each other.
    pub fn fingerprint(&self) -> u64 {
        let mut digest = Digest::new();
        if let Some(tools) = &self.tools {
            digest.add(&tools.to_string());
        }
        for message in &self.messages {
            digest.add_message(message);
        }
        digest.value()
    }

    /// Digests of every prefix of the messages that ends with an assistant message, shortest
    /// first. An example whose history nests inside another's shares one of these with it.
    pub(super) fn prefix_fingerprints(&self) -> Vec<u64> {
        let mut digest = Digest::new();
        let mut values = Vec::new();
        for message in &self.messages {
            digest.add_message(message);
            if message.role == Role::Assistant {
                values.push(digest.value());
            }
        }
        values
    }
}

/// SHA-256 over length-prefixed texts, cut to 64 bits: stable on every machine.
struct Digest(sha2::Sha256);

impl Digest {
    fn new() -> Self {
        Self(sha2::Digest::new())
    }

    fn add(&mut self, text: &str) {
        use sha2::Digest as _;
        self.0.update((text.len() as u64).to_le_bytes());
        self.0.update(text.as_bytes());
    }

    fn add_message(&mut self, message: &Message) {
        self.add(message.role.as_str());
        self.add(&message.content);
        for (key, value) in &message.extra {
            self.add(key);
            self.add(&value.to_string());
        }
    }

    fn value(&self) -> u64 {
        use sha2::Digest as _;
        fold(&self.0.clone().finalize())
    }
}

/// The first eight bytes of a digest as a number.
fn fold(digest: &[u8]) -> u64 {
    digest
        .iter()
        .take(8)
        .fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// A stable 64-bit digest of `parts`.
pub(super) fn digest_of(parts: &[&[u8]]) -> u64 {
    use sha2::Digest as _;
    let mut digest = sha2::Sha256::new();
    for part in parts {
        digest.update((part.len() as u64).to_le_bytes());
        digest.update(part);
    }
    fold(&digest.finalize())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mistaken_role_is_guessed_and_nonsense_is_not() {
        assert_eq!(Role::did_you_mean("assistent"), Some(Role::Assistant));
        assert_eq!(Role::did_you_mean("USER"), Some(Role::User));
        assert_eq!(Role::did_you_mean("gpt"), Some(Role::Assistant));
        assert_eq!(Role::did_you_mean("narrator"), None);
    }
}
