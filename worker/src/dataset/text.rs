//! What content may hide: control tokens, control characters, decoding damage.

/// Spellings of control tokens that do not have the form `<|name|>`.
const OTHER_CONTROL_TOKENS: [&str; 12] = [
    "<s>",
    "</s>",
    "<bos>",
    "<eos>",
    "<pad>",
    "<unk>",
    "[INST]",
    "[/INST]",
    "<<SYS>>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<｜",
];

/// Longest name looked for inside `<|…|>`.
const MAX_CONTROL_NAME: usize = 40;

/// The first spelling of a chat template's control token in `content`, whatever the model.
///
/// The tokenizer's own list is not known here; `template` makes sure that no content becomes a
/// control token of the tokenizer in use, whether or not this function knows its spelling.
pub fn find_control_token(content: &str) -> Option<&str> {
    let bars = content
        .match_indices("<|")
        .find_map(|(start, _)| bar_token_at(content, start));
    bars.or_else(|| {
        OTHER_CONTROL_TOKENS.iter().find_map(|token| {
            let start = content.find(token)?;
            content.get(start..start + token.len())
        })
    })
}

/// `<|name|>` at `start`, if there is one.
fn bar_token_at(content: &str, start: usize) -> Option<&str> {
    let rest = content.get(start..)?;
    let close = rest
        .char_indices()
        .skip(2)
        .take(MAX_CONTROL_NAME + 1)
        .find(|(_, c)| *c == '|')?
        .0;
    let name = rest.get(2..close)?;
    let is_name = !name.is_empty() && name.chars().all(|c| c.is_alphanumeric() || c == '_' || c == '-');
    (is_name && rest.get(close..)?.starts_with("|>")).then(|| rest.get(..close + 2))?
}

/// The first C0 or C1 control character other than tab, line feed and carriage return.
pub fn find_control_character(content: &str) -> Option<char> {
    content
        .chars()
        .find(|c| c.is_control() && !matches!(c, '\t' | '\n' | '\r'))
}

/// `text` cut to `max_characters`, control characters shown as `·`, so that it prints on one line
/// and can be stored in any database.
pub fn snippet(text: &str, max_characters: usize) -> String {
    let mut shown: String = text
        .chars()
        .take(max_characters)
        .map(|c| if c.is_control() { '·' } else { c })
        .collect();
    if text.chars().nth(max_characters).is_some() {
        shown.push('…');
    }
    shown
}

/// Words as the app counts them: pieces between single spaces.
pub fn count_words(content: &str) -> u64 {
    content.split(' ').count() as u64
}

/// A value fit for a JSONB column: no NUL (Postgres refuses it), long strings cut.
pub fn storable(value: &serde_json::Value, max_characters: usize) -> serde_json::Value {
    use serde_json::Value;
    match value {
        Value::String(text) => {
            let mut cut: String = text.chars().take(max_characters).collect();
            if cut.len() < text.len() {
                cut.push('…');
            }
            Value::String(cut.replace('\0', "\u{fffd}"))
        }
        Value::Array(items) => items.iter().map(|item| storable(item, max_characters)).collect(),
        Value::Object(fields) => fields
            .iter()
            .map(|(key, field)| (key.replace('\0', "\u{fffd}"), storable(field, max_characters)))
            .collect(),
        other => other.clone(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::*;

    #[test]
    fn control_tokens_are_found_and_ordinary_bars_are_not() {
        assert_eq!(find_control_token("a <|im_end|> b"), Some("<|im_end|>"));
        assert_eq!(
            find_control_token("x <| y |> then <|endoftext|>"),
            Some("<|endoftext|>")
        );
        assert_eq!(find_control_token("say </s> now"), Some("</s>"));
        for ordinary in ["if a <| b", "<||>", "<|a b|>", "f <|> g", "1 < 2 | 3 > 2", ""] {
            assert_eq!(find_control_token(ordinary), None, "{ordinary}");
        }
    }

    #[test]
    fn snippets_are_short_and_printable() {
        assert_eq!(snippet("a\nb\u{0}c", 10), "a·b·c");
        assert_eq!(snippet("ééééé", 3), "ééé…");
    }
}
