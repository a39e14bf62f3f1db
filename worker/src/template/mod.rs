//! Templates and tokens: messages in, token ids and the loss mask out.
//!
//! A [`ChatTemplate`] is the checkpoint's own `tokenizer.json` and chat template, rendered and
//! tokenized to the very ids transformers gives, with one deliberate difference: **what a message
//! says can never become a control token.** Content that spells `<|im_end|>` stays text, here and
//! in prompts; only the template writes control tokens. (transformers turns such content into
//! control tokens, so for such content, and only for it, the ids differ.)
//!
//! | module | what it knows |
//! |---|---|
//! | `files` | which files a checkpoint has, their hashes, which of them go with an adapter |
//! | `jinja` | rendering as transformers renders, over minijinja |
//! | `python` | how Python writes JSON and prints values |
//! | `tokens` | the tokenizer, with control tokens kept apart from text |
//! | `escape` | hiding control-token spellings in content while the template runs |
//! | `encode` | the supervised regions, and trimming of long examples |
//! | `inspect` | tokens and mask for human eyes |

mod encode;
mod escape;
mod files;
mod inspect;
mod jinja;
mod python;
mod tokens;

use std::path::Path;

use serde_json::Value;

pub use encode::{Encoded, LeftOut, LeftOutReason, Outcome};
pub use inspect::{Span, inspect};
pub use jinja::RenderOptions;

use crate::dataset::Message;
use crate::error::{Failure, Result};
use files::ModelFiles;
pub use files::PassedFile;
use jinja::Jinja;
use tokens::{Piece, Tokens};

/// A checkpoint's tokenizer and chat template.
pub struct ChatTemplate {
    files: ModelFiles,
    jinja: Jinja,
    tokens: Tokens,
    /// The control token the template ends an assistant message with.
    end_token: u32,
}

impl ChatTemplate {
    /// Reads the tokenizer and the template of the model in `folder`.
    ///
    /// # Errors
    ///
    /// `TOKENIZER_NOT_FOUND`, `TOKENIZER_INVALID`, `TOKENIZER_UNSUPPORTED`, `TEMPLATE_MISSING`,
    /// `TEMPLATE_INVALID`, or `TEMPLATE_STRUCTURE` when the template ends answers with no control
    /// token, so that a model could not learn to stop.
    pub fn load(folder: &Path) -> Result<Self> {
        let mut files = ModelFiles::read(folder)?;
        let tokens = Tokens::load(&folder.join("tokenizer.json"), &files.tokenizer, files.pipeline)?;
        let variables = files
            .named_tokens
            .iter()
            .map(|(name, value)| (name.clone(), minijinja::Value::from(minijinja::value::Serde(value))));
        let jinja = Jinja::compile(&files.templates, variables.collect())?;
        let end_token = end_token(&jinja, &tokens)?;
        files.end_ids.extend(
            files
                .named_tokens
                .iter()
                .filter(|(name, _)| name == "eos_token")
                .filter_map(|(_, token)| tokens.id_of(token.as_str()?)),
        );
        Ok(Self {
            files,
            jinja,
            tokens,
            end_token,
        })
    }

    /// Renders messages to text, as transformers' `apply_chat_template(tokenize=False)`.
    ///
    /// # Errors
    ///
    /// `TEMPLATE_REFUSED` in the template's own words.
    pub fn render(&self, messages: &[Message], options: RenderOptions<'_>) -> Result<String> {
        self.jinja.render(messages, options)
    }

    /// Renders the prompt that asks for an answer.
    ///
    /// # Errors
    ///
    /// `TEMPLATE_REFUSED` in the template's own words.
    pub fn render_prompt(&self, messages: &[Message], tools: Option<&Value>) -> Result<String> {
        self.render(
            messages,
            RenderOptions {
                add_generation_prompt: true,
                enable_thinking: None,
                tools,
            },
        )
    }

    /// The ids of a text whose control tokens are meant: text of this program or of a template
    /// only, never text from outside. Gives what the tokenizer's own `encode` gives.
    ///
    /// # Errors
    ///
    /// `TOKENIZER_FAILED` when the tokenizer cannot encode the text.
    pub fn encode_trusted(&self, text: &str) -> Result<Vec<i32>> {
        self.encode_pieces(text, &self.tokens.split(text))
    }

    /// The ids of a text in which nothing is a control token.
    ///
    /// # Errors
    ///
    /// `TOKENIZER_FAILED` when the tokenizer cannot encode the text.
    pub fn encode_plain(&self, text: &str) -> Result<Vec<i32>> {
        self.encode_pieces(text, &[Piece::Plain(0..text.len())])
    }

    fn encode_pieces(&self, text: &str, pieces: &[Piece]) -> Result<Vec<i32>> {
        let tokens = self.tokens.encode(text, pieces)?;
        Ok(tokens
            .into_iter()
            .filter_map(|token| i32::try_from(token.id).ok())
            .collect())
    }

    /// The text of `ids`, without control tokens if so asked. Negative ids have no text.
    ///
    /// # Errors
    ///
    /// `TOKENIZER_FAILED` when the tokenizer cannot decode them.
    pub fn decode(&self, ids: &[i32], skip_control_tokens: bool) -> Result<String> {
        let ids: Vec<u32> = ids.iter().filter_map(|id| u32::try_from(*id).ok()).collect();
        self.tokens.decode(&ids, skip_control_tokens)
    }

    /// The ids that end an answer: the template's end token first, then the checkpoint's own.
    pub fn stop_ids(&self) -> Vec<i32> {
        let mut ids = Vec::new();
        for id in std::iter::once(&self.end_token).chain(&self.files.end_ids) {
            if let Ok(id) = i32::try_from(*id)
                && !ids.contains(&id)
            {
                ids.push(id);
            }
        }
        ids
    }

    /// The id the template ends every assistant message with: the last supervised token.
    pub fn end_id(&self) -> u32 {
        self.end_token
    }

    /// Whether `id` is a control token.
    pub fn is_control(&self, id: i32) -> bool {
        u32::try_from(id).is_ok_and(|id| self.tokens.is_control(id))
    }

    /// The id of a control token by its spelling, such as `<|im_end|>`.
    pub fn control_id(&self, spelling: &str) -> Option<u32> {
        self.tokens.control_id(spelling)
    }

    /// Number of token ids, added tokens included. A model's vocabulary may be larger, never smaller.
    pub fn vocabulary_size(&self) -> usize {
        self.tokens.vocabulary_size()
    }

    /// SHA-256 of everything that decides ids: tokenizer, templates, named tokens.
    pub fn hash(&self) -> String {
        self.files.hash()
    }

    /// The files an adapter is delivered with: tokenizer, templates, named tokens.
    pub fn files(&self) -> Vec<PassedFile> {
        self.files.passed_on()
    }
}

/// The first control token the template writes after an assistant message.
fn end_token(jinja: &Jinja, tokens: &Tokens) -> Result<u32> {
    let answer = "An answer.";
    let messages = [Message::user("A question?"), Message::assistant(answer)];
    let text = jinja.render(&messages, RenderOptions::default())?;
    let after = text.rfind(answer).map_or(text.len(), |at| at + answer.len());
    let control = tokens.split(&text).into_iter().find_map(|piece| match piece {
        Piece::Control { id, bytes } if bytes.start >= after => Some(id),
        _ => None,
    });
    control.ok_or_else(|| {
        Failure::user(
            "TEMPLATE_STRUCTURE",
            "The chat template writes no control token after an answer, so a model cannot learn to stop",
        )
        .hint("Use a model whose template ends answers with an end token, as Qwen's do with <|im_end|>")
    })
}
