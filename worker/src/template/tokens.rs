//! The checkpoint's tokenizer, split in two: control tokens and text.
//!
//! The library's own `encode` turns any text that spells a control token into that token, also
//! when a user wrote it. Here the library only ever sees text *between* control tokens, with
//! their recognition switched off, and this module alone decides where a control token stands.
//! [`Tokens::load`] proves on probes that both give the same ids for trusted text.

use std::collections::HashSet;
use std::ops::Range;
use std::path::Path;

use tokenizers::normalizers::NFC;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior, Tokenizer};

use super::files::Pipeline;
use crate::error::{Failure, Result};

/// One token and the bytes of the text it stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Token {
    pub id: u32,
    pub bytes: Range<usize>,
}

/// A piece of text: plain, or a control token with the blanks it swallows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Piece {
    Plain(Range<usize>),
    Control { id: u32, bytes: Range<usize> },
}

impl Piece {
    pub fn bytes(&self) -> Range<usize> {
        match self {
            Self::Plain(bytes) | Self::Control { bytes, .. } => bytes.clone(),
        }
    }
}

/// A tokenizer that never finds control tokens in text on its own.
pub(super) struct Tokens {
    tokenizer: Tokenizer,
    controls: Vec<(u32, AddedToken)>,
    control_ids: HashSet<u32>,
}

impl Tokens {
    /// Reads `tokenizer.json`.
    pub fn load(path: &Path, bytes: &[u8], pipeline: Pipeline) -> Result<Self> {
        let invalid = |error: &dyn std::fmt::Display| {
            Failure::user("TOKENIZER_INVALID", format!("The tokenizer cannot be read: {error}"))
                .at(path.display().to_string())
                .hint("Fetch the model's tokenizer.json again")
        };
        let mut tokenizer = Tokenizer::from_bytes(bytes).map_err(|error| invalid(&error))?;
        tokenizer.with_truncation(None).map_err(|error| invalid(&error))?;
        tokenizer.with_padding(None);
        if pipeline == Pipeline::Qwen2 {
            use_qwen2_pipeline(&mut tokenizer).map_err(|error| invalid(&error))?;
        }
        let mut controls: Vec<(u32, AddedToken)> = tokenizer
            .get_added_tokens_decoder()
            .into_iter()
            .filter(|(_, token)| token.special && !token.content.is_empty())
            .collect();
        controls.sort_by_key(|(id, _)| *id);
        let control_ids = controls.iter().map(|(id, _)| *id).collect();
        let mut tokens = Self {
            tokenizer,
            controls,
            control_ids,
        };
        tokens.prove_equal(path)?;
        Ok(tokens)
    }

    /// Compares with the library on probes, then switches its recognition of control tokens off.
    fn prove_equal(&mut self, path: &Path) -> Result<()> {
        let mut probes = vec!["Hello  world\n\n 12 é".to_owned()];
        for (_, control) in &self.controls {
            let word = &control.content;
            probes.push(format!(
                "{word}user\nHello world{word}\n{word} a{word}\n\n b {word}{word}c"
            ));
        }
        let expected: Vec<Vec<u32>> = probes
            .iter()
            .map(|probe| self.library_ids(probe))
            .collect::<Result<_>>()?;
        self.tokenizer.set_encode_special_tokens(true);
        for (probe, expected) in probes.iter().zip(expected) {
            let ids: Vec<u32> = self
                .encode(probe, &self.split(probe))?
                .into_iter()
                .map(|token| token.id)
                .collect();
            if ids != expected {
                return Err(unsupported(
                    path,
                    "text around control tokens does not tokenize piece by piece",
                ));
            }
        }
        for (_, control) in &self.controls {
            let ids = self.library_ids(&control.content)?;
            if ids.iter().any(|id| self.control_ids.contains(id)) {
                return Err(unsupported(
                    path,
                    "its control tokens cannot be told from text that spells them",
                ));
            }
        }
        Ok(())
    }

    fn library_ids(&self, text: &str) -> Result<Vec<u32>> {
        Ok(self
            .tokenizer
            .encode(text, false)
            .map_err(|error| encode_failed(&error))?
            .get_ids()
            .to_vec())
    }

    /// The spellings of all control tokens.
    pub fn control_spellings(&self) -> Vec<String> {
        self.controls.iter().map(|(_, token)| token.content.clone()).collect()
    }

    /// The id of a control token.
    pub fn control_id(&self, spelling: &str) -> Option<u32> {
        self.controls
            .iter()
            .find(|(_, token)| token.content == spelling)
            .map(|(id, _)| *id)
    }

    /// The id of any token by its exact text.
    pub fn id_of(&self, token: &str) -> Option<u32> {
        self.tokenizer.token_to_id(token)
    }

    /// Whether `id` is a control token.
    pub fn is_control(&self, id: u32) -> bool {
        self.control_ids.contains(&id)
    }

    /// Number of ids, added tokens included.
    pub fn vocabulary_size(&self) -> usize {
        self.tokenizer.get_vocab_size(true)
    }

    /// Splits text at control tokens: leftmost, then longest, as the library does.
    pub fn split(&self, text: &str) -> Vec<Piece> {
        let mut pieces = Vec::new();
        let (mut done, mut from) = (0, 0);
        while let Some((id, token, start)) = self.next_control(text, from) {
            let end = start + token.content.len();
            from = end;
            if token.single_word && !stands_alone(text, start, end) {
                continue;
            }
            let start = if token.lstrip {
                done.max(text.get(..start).map_or(0, |head| head.trim_end().len()))
            } else {
                start
            };
            let tail = text.get(end..).unwrap_or_default();
            let end = if token.rstrip {
                text.len() - tail.trim_start().len()
            } else {
                end
            };
            if done < start {
                pieces.push(Piece::Plain(done..start));
            }
            pieces.push(Piece::Control { id, bytes: start..end });
            (done, from) = (end, end);
        }
        if done < text.len() {
            pieces.push(Piece::Plain(done..text.len()));
        }
        pieces
    }

    fn next_control(&self, text: &str, from: usize) -> Option<(u32, &AddedToken, usize)> {
        let rest = text.get(from..)?;
        self.controls
            .iter()
            .filter_map(|(id, token)| Some((*id, token, from + rest.find(&token.content)?)))
            .min_by_key(|(_, token, start)| (*start, usize::MAX - token.content.len()))
    }

    /// Encodes text already split into pieces; plain pieces can give no control token.
    pub fn encode(&self, text: &str, pieces: &[Piece]) -> Result<Vec<Token>> {
        let mut tokens = Vec::new();
        for piece in pieces {
            match piece {
                Piece::Control { id, bytes } => tokens.push(Token {
                    id: *id,
                    bytes: bytes.clone(),
                }),
                Piece::Plain(bytes) => {
                    let plain = text.get(bytes.clone()).unwrap_or_default();
                    let encoding = self
                        .tokenizer
                        .encode(plain, false)
                        .map_err(|error| encode_failed(&error))?;
                    let places = encoding.get_ids().iter().zip(encoding.get_offsets());
                    tokens.extend(places.map(|(id, (start, end))| Token {
                        id: *id,
                        bytes: bytes.start + start..bytes.start + end,
                    }));
                }
            }
        }
        Ok(tokens)
    }

    /// The text of `ids`.
    pub fn decode(&self, ids: &[u32], skip_control_tokens: bool) -> Result<String> {
        self.tokenizer.decode(ids, skip_control_tokens).map_err(|error| {
            Failure::system(
                "TOKENIZER_FAILED",
                format!("Token ids could not be turned into text: {error}"),
            )
        })
    }
}

/// Qwen2's words: letters with one leading mark, single digits, runs of marks, line breaks apart
/// (transformers, `models/qwen2/tokenization_qwen2.py`).
const QWEN2_WORDS: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

/// Puts Qwen2's normalizer and pre-tokenizer in the place of the file's.
fn use_qwen2_pipeline(tokenizer: &mut Tokenizer) -> tokenizers::Result<()> {
    let words = SplitPattern::Regex(QWEN2_WORDS.to_owned());
    let split = Split::new(words, SplitDelimiterBehavior::Isolated, false)?;
    let bytes = ByteLevel::default().add_prefix_space(false).use_regex(false);
    tokenizer.with_normalizer(Some(NFC))?;
    tokenizer.with_pre_tokenizer(Some(Sequence::new(vec![split.into(), bytes.into()])));
    tokenizer.with_decoder(Some(ByteLevel::default()));
    Ok(())
}

fn stands_alone(text: &str, start: usize, end: usize) -> bool {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let before = text.get(..start).and_then(|head| head.chars().next_back());
    let after = text.get(end..).and_then(|tail| tail.chars().next());
    !before.is_some_and(is_word) && !after.is_some_and(is_word)
}

fn encode_failed(error: &dyn std::fmt::Display) -> Failure {
    Failure::system(
        "TOKENIZER_FAILED",
        format!("The tokenizer could not encode a text: {error}"),
    )
}

fn unsupported(path: &Path, why: &str) -> Failure {
    Failure::user(
        "TOKENIZER_UNSUPPORTED",
        format!("This tokenizer cannot be used safely: {why}"),
    )
    .at(path.display().to_string())
    .hint("Use a model with a byte-level tokenizer, as all Qwen models have")
}
