//! What is trained on: token ids, and which of them are learnt.

use brightrun_kernels::Backend;
use sha2::{Digest, Sha256};

use crate::error::{Failure, Result};
use crate::model::Model;

/// One example: a document of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EncodedExample {
    /// Token ids.
    pub ids: Vec<i32>,
    /// For each token, whether the model shall learn to produce it.
    pub supervised: Vec<bool>,
    /// Its 1-based line in the dataset, for messages.
    pub line: u64,
}

impl EncodedExample {
    /// Tokens with a loss: all that are learnt, but the first, which nothing predicts.
    pub fn supervised_tokens(&self) -> usize {
        self.supervised.iter().skip(1).filter(|learnt| **learnt).count()
    }

    fn problem(&self, vocabulary: usize, max_positions: usize) -> Option<String> {
        if self.ids.len() != self.supervised.len() {
            return Some("has a mask of another length than its tokens".to_owned());
        }
        if self.supervised_tokens() == 0 {
            return Some("has no token to learn".to_owned());
        }
        if self.ids.len() > max_positions {
            let length = self.ids.len();
            return Some(format!(
                "has {length} tokens, but the model was made for {max_positions}"
            ));
        }
        let outside = self
            .ids
            .iter()
            .find(|id| usize::try_from(**id).map_or(true, |id| id >= vocabulary));
        outside.map(|id| format!("has the token {id}, but the model knows {vocabulary} tokens"))
    }
}

/// Refuses examples that cannot be trained, naming the first one's line.
///
/// # Errors
/// `TRAIN_EXAMPLE`.
pub fn check_examples<B: Backend>(model: &Model<B>, examples: &[EncodedExample]) -> Result<()> {
    let config = model.config();
    for example in examples {
        if let Some(problem) = example.problem(config.vocabulary, config.max_positions) {
            return Err(Failure::user("TRAIN_EXAMPLE", format!("An example {problem}"))
                .at(format!("Dataset line {}", example.line))
                .hint("Check that the tokenizer belongs to the model, or remove the line"));
        }
    }
    Ok(())
}

/// SHA-256 over all tokens, masks and lines, in order, in hexadecimal.
pub fn fingerprint<'a>(examples: impl IntoIterator<Item = &'a EncodedExample>) -> String {
    let mut hash = Sha256::new();
    for example in examples {
        hash.update(example.line.to_le_bytes());
        hash.update((example.ids.len() as u64).to_le_bytes());
        for (id, learnt) in example.ids.iter().zip(&example.supervised) {
            hash.update(id.to_le_bytes());
            hash.update([u8::from(*learnt)]);
        }
    }
    hex::encode(hash.finalize())
}
