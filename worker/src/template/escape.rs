//! Keeps what messages say apart from what the template says.
//!
//! Before rendering, every spelling of a control token inside a message is replaced by a
//! private-use character that occurs nowhere else; after rendering, every control token left in
//! the text was written by the template, and the characters are turned back into the words they
//! stand for. The template's own logic (does the content start with `<tool_response>`, does it
//! contain `</think>`?) sees ordinary content.

use std::collections::HashSet;

use serde_json::Value;

use super::tokens::Piece;
use crate::dataset::Message;
use crate::error::{Failure, Result};

/// The private-use planes 15 and 16.
const PRIVATE_USE: [std::ops::RangeInclusive<char>; 2] = ['\u{f0000}'..='\u{ffffd}', '\u{100000}'..='\u{10fffd}'];

/// A reversible replacement of control-token spellings.
#[derive(Debug)]
pub(super) struct Escape {
    /// Longest word first, so that the longest match wins.
    table: Vec<Entry>,
}

/// A word and the character that stands for it.
#[derive(Debug)]
struct Entry {
    word: String,
    character: char,
    /// The word is only the beginning of a control token, and matters only where a text ends.
    is_beginning: bool,
}

impl Escape {
    /// A table for `spellings` whose characters occur in none of `messages` or `tools`.
    pub fn new(spellings: &[String], messages: &[Message], tools: Option<&Value>) -> Result<Self> {
        let mut taken = HashSet::new();
        let mut note = |text: &str| taken.extend(text.chars().filter(|c| *c >= '\u{f0000}'));
        for message in messages {
            note(&message.content);
            message.extra.values().for_each(|value| visit_strings(value, &mut note));
        }
        if let Some(tools) = tools {
            visit_strings(tools, &mut note);
        }
        let mut free = PRIVATE_USE.into_iter().flatten().filter(|c| !taken.contains(c));
        let mut table = Vec::new();
        for (word, is_beginning) in words_of(spellings) {
            match free.next() {
                Some(character) => table.push(Entry {
                    word,
                    character,
                    is_beginning,
                }),
                None if is_beginning => {}
                None => return Err(no_room()),
            }
        }
        table.sort_by_key(|entry| std::cmp::Reverse(entry.word.len()));
        Ok(Self { table })
    }

    /// Replaces control tokens in `text`, and at its end the beginning of one, which text that
    /// follows might complete.
    pub fn hide(&self, text: &str) -> String {
        let mut hidden = text.to_owned();
        for entry in self.table.iter().filter(|entry| !entry.is_beginning) {
            if hidden.contains(entry.word.as_str()) {
                hidden = hidden.replace(entry.word.as_str(), entry.character.encode_utf8(&mut [0; 4]));
            }
        }
        let open = self
            .table
            .iter()
            .filter(|entry| entry.is_beginning)
            .find(|entry| hidden.ends_with(&entry.word));
        if let Some(entry) = open {
            hidden.truncate(hidden.len() - entry.word.len());
            hidden.push(entry.character);
        }
        hidden
    }

    /// The messages with every text hidden.
    pub fn hide_messages(&self, messages: &[Message]) -> Vec<Message> {
        messages
            .iter()
            .map(|message| Message {
                role: message.role,
                content: self.hide(&message.content),
                extra: message
                    .extra
                    .iter()
                    .map(|(key, value)| (key.clone(), self.hide_value(value)))
                    .collect(),
            })
            .collect()
    }

    /// A JSON value with every string hidden.
    pub fn hide_value(&self, value: &Value) -> Value {
        match value {
            Value::String(text) => Value::String(self.hide(text)),
            Value::Array(items) => items.iter().map(|item| self.hide_value(item)).collect(),
            Value::Object(fields) => fields
                .iter()
                .map(|(key, field)| (self.hide(key), self.hide_value(field)))
                .collect(),
            other => other.clone(),
        }
    }

    /// Turns hidden text back.
    pub fn reveal(&self, hidden: &str) -> String {
        if hidden.chars().all(|c| c < '\u{f0000}') {
            return hidden.to_owned();
        }
        let mut text = String::with_capacity(hidden.len());
        for character in hidden.chars() {
            match self.table.iter().find(|entry| entry.character == character) {
                Some(entry) => text.push_str(&entry.word),
                None => text.push(character),
            }
        }
        text
    }

    /// Pieces of hidden text as pieces of the revealed text, with that text.
    pub fn reveal_pieces(&self, hidden: &str, pieces: &[Piece]) -> (String, Vec<Piece>) {
        let mut text = String::with_capacity(hidden.len());
        let mut revealed = Vec::with_capacity(pieces.len());
        for piece in pieces {
            let start = text.len();
            text.push_str(&self.reveal(hidden.get(piece.bytes()).unwrap_or_default()));
            let bytes = start..text.len();
            revealed.push(match piece {
                Piece::Plain(_) => Piece::Plain(bytes),
                Piece::Control { id, .. } => Piece::Control { id: *id, bytes },
            });
        }
        (text, revealed)
    }
}

/// Every spelling, then every proper beginning of one; the flag tells the latter.
fn words_of(spellings: &[String]) -> Vec<(String, bool)> {
    let mut words: Vec<(String, bool)> = spellings.iter().map(|word| (word.clone(), false)).collect();
    let mut beginnings: Vec<String> = spellings
        .iter()
        .flat_map(|word| {
            word.char_indices()
                .skip(1)
                .filter_map(|(end, _)| word.get(..end).map(ToOwned::to_owned))
        })
        .filter(|beginning| !spellings.contains(beginning))
        .collect();
    beginnings.sort();
    beginnings.dedup();
    words.extend(beginnings.into_iter().map(|word| (word, true)));
    words
}

fn visit_strings(value: &Value, visit: &mut impl FnMut(&str)) {
    match value {
        Value::String(text) => visit(text),
        Value::Array(items) => items.iter().for_each(|item| visit_strings(item, visit)),
        Value::Object(fields) => {
            for (key, field) in fields {
                visit(key);
                visit_strings(field, visit);
            }
        }
        _ => {}
    }
}

fn no_room() -> Failure {
    Failure::user(
        "TEMPLATE_PRIVATE_USE",
        "The messages use up the private-use characters of Unicode",
    )
    .hint("Remove the characters above U+F0000 from the messages")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::*;

    fn escape(messages: &[Message]) -> Escape {
        let spellings = ["<|im_end|>", "<|im_end|>x", "<|end|>"].map(ToOwned::to_owned);
        Escape::new(&spellings, messages, None).unwrap()
    }

    #[test]
    fn hiding_and_revealing_is_the_identity_and_leaves_no_control_token() {
        let escape = escape(&[]);
        for text in [
            "",
            "plain",
            "a<|im_end|>b",
            "<|im_end|>x<|end|>",
            "tail <|im_",
            "1 <",
            "<|<|end|>im_end|>",
        ] {
            let hidden = escape.hide(text);
            assert_eq!(escape.reveal(&hidden), text);
            assert!(
                !hidden.contains("<|end|>") && !hidden.contains("<|im_end|>"),
                "{hidden}"
            );
            assert!(!format!("{hidden}end|>").contains("<|im_end|>"), "{hidden}");
        }
    }

    #[test]
    fn characters_of_the_messages_are_never_taken_as_placeholders() {
        let messages = [Message::user("\u{f0000}\u{f0001}<|end|>")];
        let escape = escape(&messages);
        let hidden = escape.hide_messages(&messages);
        assert!(hidden[0].content.starts_with("\u{f0000}\u{f0001}"));
        assert_eq!(escape.reveal(&hidden[0].content), messages[0].content);
    }
}
