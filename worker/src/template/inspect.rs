//! An encoded example for human eyes.

use serde::Serialize;

use super::encode::Encoded;

/// One token with the text it adds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Span {
    /// The text this token adds; empty for the later tokens of a character that several tokens make up.
    pub text: String,
    /// The token id.
    pub id: i32,
    /// Whether the token is learnt.
    pub supervised: bool,
}

/// The tokens of an example; their texts joined are the rendered text.
pub fn inspect(encoded: &Encoded) -> Vec<Span> {
    let mut shown = 0;
    let tokens = encoded.ids.iter().zip(&encoded.supervised).zip(&encoded.bytes);
    tokens
        .map(|((id, supervised), bytes)| {
            let text = encoded
                .text
                .get(shown..bytes.end.max(shown))
                .unwrap_or_default()
                .to_owned();
            shown = shown.max(bytes.end);
            Span {
                text,
                id: *id,
                supervised: *supervised,
            }
        })
        .collect()
}
