//! Examples to token ids and the loss mask, by structure.
//!
//! The supervised region of an assistant message starts where the prompt that asks for it ends
//! (the template rendered up to the message, with the generation prompt) and ends with the first
//! end token the *template* writes after that: exactly what the model has to produce when served.
//! For Qwen3 this includes the empty `<think>` block its template puts before an answer without
//! reasoning. A token that straddles the start belongs to the prompt.

use std::ops::Range;

use rayon::prelude::*;
use serde::Serialize;
use serde_json::Value;

use super::ChatTemplate;
use super::escape::Escape;
use super::jinja::RenderOptions;
use super::tokens::{Piece, Token};
use crate::dataset::{Example, Message, Role};
use crate::error::{Failure, Result};
use crate::spec::Supervise;

/// An example as the model sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encoded {
    /// Line of the example in its dataset, 1-based.
    pub line: u64,
    /// Position of the example in its dataset.
    pub index: u64,
    /// Token ids, `[T]`.
    pub ids: Vec<i32>,
    /// Whether each token is learnt, `[T]`. The label of position `t` is token `t + 1` where that one is supervised.
    pub supervised: Vec<bool>,
    /// The rendered text.
    pub text: String,
    /// The bytes of `text` each token stands for, `[T]`; tokens that share a character share its bytes.
    pub bytes: Vec<Range<usize>>,
    /// Oldest turns left out so that the example fits.
    pub trimmed_turns: usize,
}

impl Encoded {
    /// How many tokens are learnt.
    pub fn supervised_tokens(&self) -> usize {
        self.supervised.iter().filter(|is_supervised| **is_supervised).count()
    }
}

/// Why an example gives nothing to train on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum LeftOutReason {
    /// The answer alone is longer than the limit.
    AnswerTooLong,
    /// The answer fits, but not with its question and the system prompt.
    TurnTooLong,
}

/// An example that is not used, for the record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LeftOut {
    /// Line of the example in its dataset, 1-based.
    pub line: u64,
    /// Position of the example in its dataset.
    pub index: u64,
    /// Why.
    pub reason: LeftOutReason,
    /// Tokens it needs at least.
    pub tokens: usize,
}

/// What became of an example.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is used, possibly without its oldest turns.
    Used(Encoded),
    /// It does not fit.
    LeftOut(LeftOut),
}

impl ChatTemplate {
    /// Encodes one example to at most `max_length` tokens. The oldest turns go first, the system
    /// prompt, the last question and the answer stay whole.
    ///
    /// # Errors
    ///
    /// `TEMPLATE_REFUSED` in the template's own words, `TEMPLATE_STRUCTURE` when the template
    /// writes messages in a way that hides where an answer starts or ends, `TEMPLATE_ALTERS_CONTENT`
    /// when it leaves out what a message says.
    pub fn encode(&self, example: &Example, supervise: Supervise, max_length: usize) -> Result<Outcome> {
        let place = |failure: Failure| failure.at(format!("Dataset line {}", example.line));
        self.fit(example, supervise, max_length).map_err(place)
    }

    /// Encodes all examples, in parallel; the order is kept.
    ///
    /// # Errors
    ///
    /// The first failure of [`ChatTemplate::encode`], in file order.
    pub fn encode_all(
        &self,
        examples: &[Example],
        supervise: Supervise,
        max_length: usize,
    ) -> Result<(Vec<Encoded>, Vec<LeftOut>)> {
        let outcomes: Vec<Result<Outcome>> = examples
            .par_iter()
            .map(|example| self.encode(example, supervise, max_length))
            .collect();
        let (mut used, mut left_out) = (Vec::new(), Vec::new());
        for outcome in outcomes {
            match outcome? {
                Outcome::Used(encoded) => used.push(encoded),
                Outcome::LeftOut(record) => left_out.push(record),
            }
        }
        Ok((used, left_out))
    }

    /// Finds the fewest turns to leave out. Length falls with every turn left out, so a binary
    /// search over the cuts finds them.
    fn fit(&self, example: &Example, supervise: Supervise, max_length: usize) -> Result<Outcome> {
        let whole = self.encode_from(example, 0, supervise)?;
        if whole.ids.len() <= max_length {
            return Ok(Outcome::Used(whole));
        }
        let cuts = cuts(&example.messages);
        let Some(last) = cuts.len().checked_sub(1) else {
            return Ok(Outcome::LeftOut(left_out(example, &whole, max_length)));
        };
        let attempt = |turn: usize| -> Result<Encoded> {
            let cut = cuts.get(turn).copied().unwrap_or_default();
            Ok(Encoded {
                trimmed_turns: turn + 1,
                ..self.encode_from(example, cut, supervise)?
            })
        };
        let mut best = attempt(last)?;
        if best.ids.len() > max_length {
            return Ok(Outcome::LeftOut(left_out(example, &best, max_length)));
        }
        let (mut low, mut high) = (0, last);
        while low < high {
            let middle = usize::midpoint(low, high);
            let candidate = attempt(middle)?;
            if candidate.ids.len() <= max_length {
                (high, best) = (middle, candidate);
            } else {
                low = middle + 1;
            }
        }
        Ok(Outcome::Used(best))
    }

    /// Encodes the example without its non-system messages before `cut`.
    fn encode_from(&self, example: &Example, cut: usize, supervise: Supervise) -> Result<Encoded> {
        let keeps = |(index, message): &(usize, &Message)| *index >= cut || message.role == Role::System;
        let messages: Vec<Message> = example
            .messages
            .iter()
            .enumerate()
            .filter(keeps)
            .map(|(_, message)| message.clone())
            .collect();
        let rendering = Rendering::new(self, &messages, example.tools.as_ref(), None)?;
        let regions = rendering.supervised(self, supervise)?;
        let (text, tokens) = rendering.encode(self)?;
        let supervised = tokens
            .iter()
            .map(|token| regions.iter().any(|region| contains(region, &token.bytes)))
            .collect();
        Ok(Encoded {
            line: example.line,
            index: example.index,
            ids: self.ids_of(&tokens)?,
            supervised,
            text,
            bytes: tokens.into_iter().map(|token| token.bytes).collect(),
            trimmed_turns: 0,
        })
    }

    fn ids_of(&self, tokens: &[Token]) -> Result<Vec<i32>> {
        tokens
            .iter()
            .map(|token| {
                i32::try_from(token.id).map_err(|_| Failure::system("TOKENIZER_FAILED", "A token id exceeds 31 bits"))
            })
            .collect()
    }

    /// The ids of the prompt that asks for an answer to `messages`.
    ///
    /// # Errors
    ///
    /// `TEMPLATE_REFUSED` in the template's own words.
    pub fn encode_prompt(
        &self,
        messages: &[Message],
        tools: Option<&Value>,
        enable_thinking: Option<bool>,
    ) -> Result<Vec<i32>> {
        let options = RenderOptions {
            add_generation_prompt: true,
            enable_thinking,
            tools: None,
        };
        let (_, tokens) = Rendering::new(self, messages, tools, Some(options))?.encode(self)?;
        self.ids_of(&tokens)
    }
}

/// Whether `outer` contains `inner`.
fn contains(outer: &Range<usize>, inner: &Range<usize>) -> bool {
    outer.start <= inner.start && inner.end <= outer.end
}

/// Where the messages may be cut: at each user message that starts a turn, but the first.
fn cuts(messages: &[Message]) -> Vec<usize> {
    let starts = messages.windows(2).enumerate().filter_map(|(index, pair)| match pair {
        [before, message] if message.role == Role::User && before.role != Role::User => Some(index + 1),
        _ => None,
    });
    let first = messages
        .iter()
        .position(|message| message.role != Role::System)
        .unwrap_or(0);
    starts.filter(|start| *start > first).collect()
}

fn left_out(example: &Example, shortest: &Encoded, max_length: usize) -> LeftOut {
    let reason = if shortest.supervised_tokens() > max_length {
        LeftOutReason::AnswerTooLong
    } else {
        LeftOutReason::TurnTooLong
    };
    LeftOut {
        line: example.line,
        index: example.index,
        reason,
        tokens: shortest.ids.len(),
    }
}

/// Messages rendered with their control-token spellings hidden.
struct Rendering {
    escape: Escape,
    messages: Vec<Message>,
    tools: Option<Value>,
    hidden: String,
    pieces: Vec<Piece>,
}

impl Rendering {
    fn new(
        template: &ChatTemplate,
        messages: &[Message],
        tools: Option<&Value>,
        options: Option<RenderOptions<'_>>,
    ) -> Result<Self> {
        let escape = Escape::new(&template.tokens.control_spellings(), messages, tools)?;
        let messages = escape.hide_messages(messages);
        let tools = tools.map(|tools| escape.hide_value(tools));
        let options = RenderOptions {
            tools: tools.as_ref(),
            ..options.unwrap_or_default()
        };
        let hidden = template.jinja.render(&messages, options)?;
        let pieces = template.tokens.split(&hidden);
        Ok(Self {
            escape,
            messages,
            tools,
            hidden,
            pieces,
        })
    }

    /// The text and its tokens.
    fn encode(&self, template: &ChatTemplate) -> Result<(String, Vec<Token>)> {
        let (text, pieces) = self.escape.reveal_pieces(&self.hidden, &self.pieces);
        let tokens = template.tokens.encode(&text, &pieces)?;
        Ok((text, tokens))
    }

    /// The supervised regions, in bytes of the revealed text.
    fn supervised(&self, template: &ChatTemplate, supervise: Supervise) -> Result<Vec<Range<usize>>> {
        self.check_content()?;
        let is_answer = |(_, message): &(usize, &Message)| message.role == Role::Assistant;
        let mut answers: Vec<usize> = self
            .messages
            .iter()
            .enumerate()
            .filter(is_answer)
            .map(|(index, _)| index)
            .collect();
        if supervise == Supervise::FinalAnswer {
            answers = answers.split_off(answers.len().saturating_sub(1));
        }
        let mut regions: Vec<Range<usize>> = Vec::with_capacity(answers.len());
        for index in answers {
            let region = self.region(template, index)?;
            if regions.last().is_some_and(|before| before.end > region.start) {
                return Err(structure("two answers share an end token"));
            }
            regions.push(region);
        }
        let reveal = |at: usize| self.escape.reveal(self.hidden.get(..at).unwrap_or_default()).len();
        Ok(regions
            .into_iter()
            .map(|region| reveal(region.start)..reveal(region.end))
            .collect())
    }

    /// Where answer `index` stands in the hidden text, with its end token.
    fn region(&self, template: &ChatTemplate, index: usize) -> Result<Range<usize>> {
        let start = self.start_of(template, index)?;
        let end = self.pieces.iter().find_map(|piece| match piece {
            Piece::Control { id, bytes } if *id == template.end_token && bytes.start >= start => Some(bytes.end),
            _ => None,
        });
        let end = end.ok_or_else(|| structure("no end token follows an answer"))?;
        let answer = self.hidden.get(start..end).unwrap_or_default();
        let content = self.messages.get(index).map_or("", |message| core_of(message));
        if !answer.contains(content) {
            return Err(altered(index));
        }
        Ok(start..end)
    }

    /// Where the model starts to write answer `index`: after the prompt that asks for it.
    ///
    /// Templates may render a message differently once others follow (Qwen3 gives only the last
    /// of two neighbouring answers a `<think>` block). Then the prompt is not the beginning of
    /// the whole, and the header that the generation prompt adds tells the answers apart.
    fn start_of(&self, template: &ChatTemplate, index: usize) -> Result<usize> {
        let before = self.messages.get(..index).unwrap_or_default();
        let options = |add_generation_prompt| RenderOptions {
            add_generation_prompt,
            enable_thinking: None,
            tools: self.tools.as_ref(),
        };
        let prompt = template.jinja.render(before, options(true))?;
        if self.hidden.starts_with(&prompt) {
            return Ok(prompt.len());
        }
        let without_header = template.jinja.render(before, options(false))?;
        let header = prompt.strip_prefix(&without_header).unwrap_or_default();
        let starts = self.ends_of(header);
        let is_answer = |message: &&Message| message.role == Role::Assistant;
        if starts.len() != self.messages.iter().filter(is_answer).count() {
            return Err(structure(
                "the prompt that asks for an answer is not in the conversation",
            ));
        }
        let ordinal = before.iter().filter(is_answer).count();
        starts
            .get(ordinal)
            .copied()
            .ok_or_else(|| structure("an answer has no header"))
    }

    /// Where each `header` ends that starts with a control token of the template's.
    fn ends_of(&self, header: &str) -> Vec<usize> {
        let controls = self
            .pieces
            .iter()
            .filter(|piece| matches!(piece, Piece::Control { .. }));
        let starts = controls.map(|piece| piece.bytes().start);
        let is_header = |start: &usize| {
            !header.is_empty() && self.hidden.get(*start..).is_some_and(|rest| rest.starts_with(header))
        };
        starts.filter(is_header).map(|start| start + header.len()).collect()
    }

    /// Every message must be in the text, in order.
    fn check_content(&self) -> Result<()> {
        let mut rest = self.hidden.as_str();
        for (index, message) in self.messages.iter().enumerate() {
            let content = core_of(message);
            let at = rest.find(content).ok_or_else(|| altered(index))?;
            rest = rest.get(at + content.len()..).unwrap_or_default();
        }
        Ok(())
    }
}

/// What every template must keep of a message: its text without surrounding blanks and without
/// reasoning, which Qwen3 leaves out of earlier turns.
fn core_of(message: &Message) -> &str {
    let visible = message.content.rsplit("</think>").next();
    visible
        .filter(|_| message.role == Role::Assistant)
        .unwrap_or(&message.content)
        .trim()
}

fn structure(why: &str) -> Failure {
    Failure::user(
        "TEMPLATE_STRUCTURE",
        format!("The chat template does not show where answers stand: {why}"),
    )
    .hint("Use a model whose template writes every message the same way, as Qwen's do")
}

fn altered(index: usize) -> Failure {
    Failure::user(
        "TEMPLATE_ALTERS_CONTENT",
        format!(
            "The chat template changes or leaves out the content of message {}",
            index + 1
        ),
    )
    .hint("Use a model whose template keeps messages as they are, or remove the message")
}
