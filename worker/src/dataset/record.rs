//! Records to examples: every accepted shape, told by its keys.

use serde_json::{Map, Value};

use super::chat;
use super::collect::{Collector, Draft, Findings, Place};
use super::issue::IssueCode;
use super::message::{Message, Role};

type Object = Map<String, Value>;

/// The shape of one record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shape {
    /// `{"_meta": …}`.
    Header,
    /// A line of a brightrun-lora v3, v4 or v5 export, or an entry of `training_pairs`.
    Entry,
    /// An object with a list of role and content under this key.
    Chat(&'static str),
    /// An individual conversation JSON, or a conversation of the full training JSON.
    Conversation,
    /// A full training JSON on one line.
    TrainingFile,
}

/// Keys under which a list of messages is accepted.
const CHAT_KEYS: [&str; 3] = ["messages", "turns", "conversations"];

impl Shape {
    fn of(object: &Object) -> Option<Self> {
        let has = |key: &str| object.contains_key(key);
        if has("target_response") || has("current_user_input") {
            return Some(Self::Entry);
        }
        if has("training_pairs") {
            return Some(Self::Conversation);
        }
        let holds_pairs = |list: &Value| list.get(0).is_some_and(|first| first.get("training_pairs").is_some());
        if has("training_file_metadata") || object.get("conversations").is_some_and(holds_pairs) {
            return Some(Self::TrainingFile);
        }
        let chat = CHAT_KEYS.into_iter().find(|key| has(key)).map(Self::Chat);
        chat.or_else(|| has("_meta").then_some(Self::Header))
    }

    /// The name in the report.
    fn name(self) -> &'static str {
        match self {
            Self::Header => "header",
            Self::Entry => "v4",
            Self::Chat(key) => key,
            Self::Conversation => "conversation",
            Self::TrainingFile => "training_file",
        }
    }
}

/// Whether an element of `conversations` is a message rather than a conversation.
pub(super) fn is_message(value: &Value) -> bool {
    value.as_object().is_some_and(|object| Shape::of(object).is_none())
}

impl Collector<'_> {
    /// One record: a line, an element of an array, or a whole document.
    pub fn record(&mut self, place: &Place, value: Value, duplicate_keys: &[String]) {
        let mut findings = Findings::new(place, self.options);
        for path in duplicate_keys {
            findings.add(IssueCode::KeyDuplicate, path, format!("The key `{path}` occurs twice"));
        }
        let Value::Object(object) = &value else {
            findings.add_with(
                IssueCode::NotObject,
                "",
                format!("The record is {}, not an object", kind_of(&value)),
                &value.to_string(),
            );
            return self.settle(place, findings, None);
        };
        let Some(shape) = Shape::of(object) else {
            unknown_shape(&mut findings, object);
            return self.settle(place, findings, None);
        };
        if shape == Shape::Header {
            return self.header(place, object);
        }
        self.shape(place, shape.name());
        self.sample(&value);
        if findings.has_error() {
            return self.settle(place, findings, None);
        }
        match shape {
            Shape::Header => {}
            Shape::Entry => self.entry(place, findings, object, None),
            Shape::Chat(key) => self.chat(place, findings, object, key),
            Shape::Conversation => self.conversation(place, object),
            Shape::TrainingFile => self.training_file(place, object),
        }
    }

    fn header(&mut self, place: &Place, object: &Object) {
        self.report.header_lines += 1;
        let stated = object
            .get("_meta")
            .and_then(|meta| meta.get("total_pairs"))
            .and_then(Value::as_u64);
        self.report.stated_pairs = self.report.stated_pairs.or(stated);
        if place.line > 1 {
            let message = "A `_meta` header stands after the first line";
            self.issue(super::Issue::new(
                IssueCode::HeaderMisplaced,
                place.line,
                place.field("_meta"),
                message,
            ));
        }
    }

    /// All conversations of a full training JSON that was small enough to be read whole.
    fn training_file(&mut self, place: &Place, object: &Object) {
        let Some(conversations) = self.list_of(place, object, "conversations") else {
            return;
        };
        for (index, conversation) in conversations.iter().enumerate() {
            let inside = place.inside(&format!("conversations[{index}]"));
            match conversation {
                Value::Object(fields) if fields.contains_key("training_pairs") => self.conversation(&inside, fields),
                other => self.not_a(&inside, "a conversation with `training_pairs`", other),
            }
        }
    }

    /// All entries of one conversation.
    fn conversation(&mut self, place: &Place, object: &Object) {
        let Some(pairs) = self.list_of(place, object, "training_pairs") else {
            return;
        };
        let owner = conversation_id_of(object);
        for (index, pair) in pairs.iter().enumerate() {
            self.document_entry(
                &place.inside(&format!("training_pairs[{index}]")),
                pair,
                &[],
                owner.as_deref(),
            );
        }
    }

    /// One entry of `training_pairs`; user turns have no target and are skipped by design.
    pub fn document_entry(&mut self, place: &Place, value: &Value, duplicate_keys: &[String], owner: Option<&str>) {
        let Value::Object(object) = value else {
            return self.not_a(place, "a training pair", value);
        };
        if object.get("target_response") == Some(&Value::Null) {
            self.report.user_turns_skipped += 1;
            return;
        }
        let mut findings = Findings::new(place, self.options);
        for path in duplicate_keys {
            findings.add(IssueCode::KeyDuplicate, path, format!("The key `{path}` occurs twice"));
        }
        self.entry(place, findings, object, owner);
    }

    /// The list under `key`, or an issue.
    fn list_of<'v>(&mut self, place: &Place, object: &'v Object, key: &str) -> Option<&'v Vec<Value>> {
        match object.get(key) {
            Some(Value::Array(list)) => Some(list),
            other => {
                self.not_a(&place.inside(key), "a list", other.unwrap_or(&Value::Null));
                None
            }
        }
    }

    fn not_a(&mut self, place: &Place, wanted: &str, found: &Value) {
        let mut findings = Findings::new(place, self.options);
        findings.add(
            IssueCode::TypeWrong,
            "",
            format!("Expected {wanted}, found {}", kind_of(found)),
        );
        self.settle(place, findings, None);
    }

    /// An entry: system prompt, history, user input, target.
    ///
    /// `owner` is the id of the conversation a document puts the entry in; the entry's own id is
    /// not unique there, so the exporter's line id is built from both.
    fn entry(&mut self, place: &Place, mut findings: Findings<'_>, object: &Object, owner: Option<&str>) {
        let mut messages = Vec::new();
        self.system_prompt(&mut findings, object, &mut messages);
        let input = chat::required_text(
            &mut findings,
            object,
            "current_user_input",
            IssueCode::UserInputMissing,
            IssueCode::ContentEmpty,
        );
        self.history(&mut findings, object, input.as_deref(), &mut messages);
        messages.extend(input.map(|text| (Message::user(text), "current_user_input".to_owned())));
        if object.get("target_response") == Some(&Value::Null) {
            findings.add(
                IssueCode::TargetNull,
                "target_response",
                "`target_response` is null: a user turn, which cannot be trained on",
            );
            return self.settle(place, findings, None);
        }
        let target = chat::required_text(
            &mut findings,
            object,
            "target_response",
            IssueCode::TargetMissing,
            IssueCode::TargetEmpty,
        );
        messages.extend(target.map(|text| (Message::assistant(text), "target_response".to_owned())));
        let own_id = identifier(&mut findings, object, "id").unwrap_or_default();
        let own_conversation = identifier(&mut findings, object, "conversation_id");
        let id = owner.map_or(own_id.clone(), |owner| {
            let prefix: String = owner.chars().take(8).collect();
            format!("{own_id}_{prefix}")
        });
        let draft = Draft {
            id,
            conversation_id: owner.map(ToOwned::to_owned).or(own_conversation),
            messages: self.ordered(&mut findings, messages),
            tools: None,
        };
        self.settle(place, findings, Some(draft));
    }

    fn system_prompt(&mut self, findings: &mut Findings<'_>, object: &Object, messages: &mut Vec<(Message, String)>) {
        match object.get("system_prompt") {
            None | Some(Value::Null) => {}
            Some(Value::String(text)) if text.trim().is_empty() => self.report.repairs.blank_system_prompts += 1,
            Some(Value::String(text)) => {
                chat::check_text(findings, "system_prompt", text);
                messages.push((Message::system(text), "system_prompt".to_owned()));
            }
            Some(other) => chat::wrong_type(findings, "system_prompt", "a string", other),
        }
    }

    /// The history without its last message when that repeats the user input: every file of the
    /// app's exporter has this repetition, which would teach the model to expect it.
    fn history(
        &mut self,
        findings: &mut Findings<'_>,
        object: &Object,
        input: Option<&str>,
        messages: &mut Vec<(Message, String)>,
    ) {
        let items = match object.get("conversation_history") {
            None | Some(Value::Null) => return,
            Some(Value::Array(items)) => items,
            Some(other) => return chat::wrong_type(findings, "conversation_history", "a list", other),
        };
        let repeats = |item: &Value| {
            let text = |key| item.get(key).and_then(Value::as_str);
            text("role") == Some(Role::User.as_str()) && input.is_some() && text("content") == input
        };
        let is_repeated = items.last().is_some_and(repeats);
        self.report.repairs.repeated_user_inputs_removed += u64::from(is_repeated);
        let kept = items.len() - usize::from(is_repeated);
        for (index, item) in items.iter().take(kept).enumerate() {
            let path = format!("conversation_history[{index}]");
            if let Some(message) = chat::message(findings, &path, index, item) {
                messages.push((message, path));
            }
        }
    }

    /// A list of messages under `key`.
    fn chat(&mut self, place: &Place, mut findings: Findings<'_>, object: &Object, key: &str) {
        let messages = match object.get(key) {
            Some(Value::Array(items)) => chat::messages(&mut findings, key, items),
            other => {
                let found = kind_of(other.unwrap_or(&Value::Null));
                findings.add(
                    IssueCode::TypeWrong,
                    key,
                    format!("Invalid or missing {key} array: found {found}"),
                );
                findings.hint(format!("Each conversation must have a {key} array"));
                Vec::new()
            }
        };
        let id = identifier(&mut findings, object, "id").unwrap_or_default();
        let conversation_id = identifier(&mut findings, object, "conversation_id");
        let tools = object.get("tools").filter(|tools| !tools.is_null()).cloned();
        if let Some(tools) = tools.as_ref().filter(|tools| !tools.is_array()) {
            chat::wrong_type(&mut findings, "tools", "a list", tools);
        }
        let messages = self.ordered(&mut findings, messages);
        self.settle(
            place,
            findings,
            Some(Draft {
                id,
                conversation_id,
                messages,
                tools,
            }),
        );
    }

    /// Checks who speaks when; leaves out what follows the last answer.
    fn ordered(&mut self, findings: &mut Findings<'_>, mut messages: Vec<(Message, String)>) -> Vec<Message> {
        if !findings.has_error() {
            let left_out = chat::check_order(findings, &messages);
            self.report.repairs.trailing_messages_left_out += left_out as u64;
            messages.truncate(messages.len() - left_out);
        }
        messages.into_iter().map(|(message, _)| message).collect()
    }
}

/// The id of the conversation an object describes, wherever the app writes it.
pub(super) fn conversation_id_of(object: &Object) -> Option<String> {
    ["conversation_metadata", "dataset_metadata"]
        .iter()
        .filter_map(|key| object.get(*key))
        .find_map(|metadata| metadata.get("conversation_id"))
        .or_else(|| object.get("conversation_id"))
        .and_then(Value::as_str)
        .map(ToOwned::to_owned)
}

/// An id: a string, or a number written out.
fn identifier(findings: &mut Findings<'_>, object: &Object, key: &str) -> Option<String> {
    match object.get(key) {
        None | Some(Value::Null) => None,
        Some(Value::String(text)) => Some(text.clone()),
        Some(Value::Number(number)) => Some(number.to_string()),
        Some(other) => {
            chat::wrong_type(findings, key, "a string", other);
            None
        }
    }
}

/// Says which keys were found and which were probably meant.
fn unknown_shape(findings: &mut Findings<'_>, object: &Object) {
    let keys: Vec<&str> = object.keys().map(String::as_str).take(8).collect();
    findings.add(
        IssueCode::ShapeUnknown,
        "",
        format!("The object has none of the known shapes; its keys are {keys:?}"),
    );
    let known = [
        "messages",
        "turns",
        "conversations",
        "target_response",
        "current_user_input",
        "training_pairs",
    ];
    let near = object.keys().find_map(|key| {
        let meant = known
            .iter()
            .find(|name| strsim::damerau_levenshtein(name, &key.to_lowercase()) <= 2)?;
        Some((key, meant))
    });
    if let Some((key, meant)) = near {
        findings.hint(format!("Did you mean `{meant}` instead of `{key}`?"));
    } else if object.contains_key("prompt") || object.contains_key("instruction") {
        findings.hint("Turn each pair into {\"messages\": [{\"role\": \"user\", \"content\": …}, {\"role\": \"assistant\", \"content\": …}]}.");
    } else if object.contains_key("role") {
        findings
            .hint("This is a single message; put the messages of a conversation into one record {\"messages\": […]}.");
    }
}

/// A JSON type in words.
pub(super) fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
