//! The tokenizer and template files of a checkpoint, as they are used and as they are passed on.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use crate::error::{Failure, Result};

/// Files that belong to an adapter's tokenizer; those a checkpoint has are copied.
const PASSED_ON: [&str; 9] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
];

/// Special tokens a template may name.
const NAMED_TOKENS: [&str; 7] = [
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
];

/// Model types whose tokenizer transformers takes to be Qwen2's when the checkpoint names no class.
const QWEN_TYPES: [&str; 5] = ["qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next"];

/// How text is cut into words before the merges apply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pipeline {
    /// As `tokenizer.json` says.
    AsWritten,
    /// As Qwen2's tokenizer does, whatever `tokenizer.json` says.
    Qwen2,
}

impl Pipeline {
    /// The choice of transformers 5 (`AutoTokenizer`): its `Qwen2Tokenizer` takes vocabulary and
    /// merges from `tokenizer.json` and brings the rest itself. It is used when the checkpoint
    /// names that class, when a Qwen model names none, and always for the model type `qwen2`.
    /// Servers built on transformers do the same, so training must.
    fn of(model: &Map<String, Value>, tokenizer: &Map<String, Value>) -> Self {
        let text = |map: &'_ Map<String, Value>, key: &str| map.get(key).and_then(Value::as_str).map(ToOwned::to_owned);
        let model_type = text(model, "model_type").unwrap_or_default();
        let class = text(tokenizer, "tokenizer_class").or_else(|| text(model, "tokenizer_class"));
        let is_qwen = match class.as_deref().map(|class| class.trim_end_matches("Fast")) {
            Some("Qwen2Tokenizer") => true,
            Some(_) => model_type == "qwen2",
            None => QWEN_TYPES.contains(&model_type.as_str()),
        };
        if is_qwen { Self::Qwen2 } else { Self::AsWritten }
    }
}

/// A file that an adapter is delivered with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PassedFile {
    /// Where it lies.
    pub path: PathBuf,
    /// SHA-256 of the bytes that were used, lower-case hexadecimal: a copy must have it.
    pub sha256: String,
}

/// What was read from a model folder.
pub(super) struct ModelFiles {
    folder: PathBuf,
    /// Name and SHA-256 of each file that is passed on.
    hashes: Vec<(String, String)>,
    /// The bytes of `tokenizer.json`.
    pub tokenizer: Vec<u8>,
    /// Named templates; one is called `default`.
    pub templates: Vec<(String, String)>,
    /// `bos_token` and the like, with `additional_special_tokens`.
    pub named_tokens: Vec<(String, Value)>,
    /// How text is cut into words before the merges apply.
    pub pipeline: Pipeline,
    /// Ids named as end of sequence by `generation_config.json` or `config.json`.
    pub end_ids: Vec<u32>,
}

impl ModelFiles {
    /// Reads the files of `folder`.
    pub fn read(folder: &Path) -> Result<Self> {
        let mut hashes = Vec::new();
        for name in PASSED_ON {
            if let Some(bytes) = read_optional(&folder.join(name))? {
                hashes.push((name.to_owned(), hash_of(&bytes)));
            }
        }
        let path = folder.join("tokenizer.json");
        let tokenizer = read_optional(&path)?.ok_or_else(|| {
            Failure::user("TOKENIZER_NOT_FOUND", "The model folder has no tokenizer.json")
                .at(path.display().to_string())
                .hint("Fetch the model again with its tokenizer files")
        })?;
        let config = read_object(&folder.join("tokenizer_config.json"))?;
        let special = read_object(&folder.join("special_tokens_map.json"))?;
        let model = read_object(&folder.join("config.json"))?;
        Ok(Self {
            templates: templates(folder, &config)?,
            named_tokens: named_tokens(&config, &special),
            end_ids: end_ids(folder)?,
            pipeline: Pipeline::of(&model, &config),
            folder: folder.to_owned(),
            hashes,
            tokenizer,
        })
    }

    /// SHA-256 over the tokenizer, its pipeline, the templates and the named tokens: equal hashes give equal ids.
    pub fn hash(&self) -> String {
        let mut digest = Sha256::new();
        let mut add = |part: &[u8]| {
            digest.update((part.len() as u64).to_le_bytes());
            digest.update(part);
        };
        add(&self.tokenizer);
        add(format!("{:?}", self.pipeline).as_bytes());
        for (name, source) in &self.templates {
            add(name.as_bytes());
            add(source.as_bytes());
        }
        for (name, token) in &self.named_tokens {
            add(name.as_bytes());
            add(token.to_string().as_bytes());
        }
        hex::encode(digest.finalize())
    }

    /// The files that belong to an adapter: tokenizer, templates, named tokens.
    pub fn passed_on(&self) -> Vec<PassedFile> {
        let file = |(name, sha256): &(String, String)| PassedFile {
            path: self.folder.join(name),
            sha256: sha256.clone(),
        };
        self.hashes.iter().map(file).collect()
    }
}

fn hash_of(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

fn read_optional(path: &Path) -> Result<Option<Vec<u8>>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(
            Failure::system("MODEL_FILE_UNREADABLE", format!("A model file cannot be read: {error}"))
                .at(path.display().to_string()),
        ),
    }
}

/// A JSON object, empty where there is no file.
fn read_object(path: &Path) -> Result<Map<String, Value>> {
    let Some(bytes) = read_optional(path)? else {
        return Ok(Map::new());
    };
    serde_json::from_slice(&bytes).map_err(|error| {
        Failure::user(
            "MODEL_FILE_INVALID",
            format!("A model file is not a JSON object: {error}"),
        )
        .at(path.display().to_string())
        .hint("Fetch the model's files again")
    })
}

/// The templates, from the first of `chat_template.jinja`, `chat_template.json` and
/// `tokenizer_config.json` that has any, as transformers looks for them.
fn templates(folder: &Path, config: &Map<String, Value>) -> Result<Vec<(String, String)>> {
    if let Some(bytes) = read_optional(&folder.join("chat_template.jinja"))? {
        return Ok(vec![(
            "default".to_owned(),
            String::from_utf8_lossy(&bytes).into_owned(),
        )]);
    }
    let separate = read_object(&folder.join("chat_template.json"))?;
    let found = separate
        .get("chat_template")
        .or_else(|| config.get("chat_template"))
        .map_or_else(Vec::new, named_templates);
    if found.iter().any(|(name, _)| name == "default") {
        return Ok(found);
    }
    Err(Failure::user(
        "TEMPLATE_MISSING",
        "The model has no chat template: it is probably a base model, not an instruct model",
    )
    .at(folder.display().to_string())
    .hint("Use the instruct variant of the model, or put a chat_template.jinja into its folder"))
}

/// One template, or a list of `{name, template}`.
fn named_templates(value: &Value) -> Vec<(String, String)> {
    if let Some(source) = value.as_str() {
        return vec![("default".to_owned(), source.to_owned())];
    }
    let text = |entry: &Value, key: &str| entry.get(key).and_then(Value::as_str).map(ToOwned::to_owned);
    let entries = value.as_array().into_iter().flatten();
    entries
        .filter_map(|entry| Some((text(entry, "name")?, text(entry, "template")?)))
        .collect()
}

/// Tokens by name; a token is a string or an object with its `content`.
fn named_tokens(config: &Map<String, Value>, special: &Map<String, Value>) -> Vec<(String, Value)> {
    let text = |value: &Value| {
        value
            .as_str()
            .or_else(|| value.get("content").and_then(Value::as_str))
            .map(|text| Value::String(text.to_owned()))
    };
    let look_up = |name: &str| {
        [config, special]
            .into_iter()
            .find_map(|map| map.get(name).filter(|value| !value.is_null()))
    };
    let mut named: Vec<(String, Value)> = NAMED_TOKENS
        .iter()
        .filter_map(|name| Some(((*name).to_owned(), text(look_up(name)?)?)))
        .collect();
    if let Some(Value::Array(list)) = look_up("additional_special_tokens") {
        named.push((
            "additional_special_tokens".to_owned(),
            list.iter().filter_map(text).collect(),
        ));
    }
    named
}

/// `eos_token_id`, a number or a list, of `generation_config.json` and `config.json`.
fn end_ids(folder: &Path) -> Result<Vec<u32>> {
    let mut ids = Vec::new();
    for name in ["generation_config.json", "config.json"] {
        let config = read_object(&folder.join(name))?;
        let value = config.get("eos_token_id").cloned().unwrap_or_default();
        let list = value.as_array().cloned().unwrap_or_else(|| vec![value]);
        ids.extend(
            list.iter()
                .filter_map(Value::as_u64)
                .filter_map(|id| u32::try_from(id).ok()),
        );
    }
    Ok(ids)
}
