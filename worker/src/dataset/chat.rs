//! Checks of messages: type, role, content, and who speaks when.

use serde_json::{Map, Value};

use super::collect::Findings;
use super::issue::IssueCode;
use super::message::{Message, Role};
use super::record::kind_of;
use super::text;

/// Reads a list of messages; each comes with its path.
pub(super) fn messages(findings: &mut Findings<'_>, key: &str, items: &[Value]) -> Vec<(Message, String)> {
    if items.is_empty() {
        findings.add(IssueCode::EmptyConversation, key, format!("Empty {key} array"));
    }
    let mut list = Vec::new();
    for (index, item) in items.iter().enumerate() {
        let path = format!("{key}[{index}]");
        if let Some(message) = message(findings, &path, index, item) {
            list.push((message, path));
        }
    }
    list
}

/// Reads one message; every problem it has becomes a finding.
pub(super) fn message(findings: &mut Findings<'_>, path: &str, index: usize, value: &Value) -> Option<Message> {
    let Value::Object(object) = value else {
        wrong_type(findings, path, "an object with role and content", value);
        return None;
    };
    let mut extra = Map::new();
    for key in Message::TEMPLATE_FIELDS {
        if let Some(field) = object.get(key).filter(|field| !field.is_null()) {
            extra.insert(key.to_owned(), field.clone());
        }
    }
    let role = role(findings, path, index, object);
    let mut message = Message {
        role: role.unwrap_or(Role::User),
        content: String::new(),
        extra,
    };
    let content = content(findings, path, index, object, message.calls_tools());
    role?;
    message.content = content?;
    Some(message)
}

fn role(findings: &mut Findings<'_>, path: &str, index: usize, object: &Map<String, Value>) -> Option<Role> {
    let field = format!("{path}.role");
    match object.get("role") {
        None => {
            let turn = index + 1;
            findings.add(
                IssueCode::RoleMissing,
                &field,
                format!("Turn {turn} missing role or content: it has no `role`"),
            );
            if object.contains_key("from") {
                findings.hint("Rename `from` to `role` and `value` to `content`, with the roles user and assistant.");
            }
            None
        }
        Some(Value::String(name)) => Role::parse(name).or_else(|| {
            unknown_role(findings, &field, index, name);
            None
        }),
        Some(other) => {
            wrong_type(findings, &field, "a string", other);
            None
        }
    }
}

fn unknown_role(findings: &mut Findings<'_>, field: &str, index: usize, name: &str) {
    let shown = text::snippet(name, 40);
    findings.add_with(
        IssueCode::RoleUnknown,
        field,
        format!("Message {} has role `{shown}`", index + 1),
        name,
    );
    if let Some(role) = Role::did_you_mean(name) {
        findings.hint(format!(
            "Did you mean `{role}`? Use one of system, user, assistant, tool."
        ));
    }
}

fn content(
    findings: &mut Findings<'_>,
    path: &str,
    index: usize,
    object: &Map<String, Value>,
    calls_tools: bool,
) -> Option<String> {
    let field = format!("{path}.content");
    match object.get("content") {
        None | Some(Value::Null) if calls_tools => Some(String::new()),
        None => {
            let turn = index + 1;
            findings.add(
                IssueCode::ContentMissing,
                &field,
                format!("Turn {turn} missing role or content: it has no `content`"),
            );
            let near = object.keys().find(|key| {
                ["text", "value", "message"].contains(&key.as_str()) || strsim::damerau_levenshtein(key, "content") <= 2
            });
            if let Some(near) = near {
                findings.hint(format!("Rename `{near}` to `content`."));
            }
            None
        }
        Some(Value::String(text)) => {
            if text.trim().is_empty() && !calls_tools {
                findings.add(
                    IssueCode::ContentEmpty,
                    &field,
                    format!("Message {} has empty content", index + 1),
                );
            }
            check_text(findings, &field, text);
            Some(text.clone())
        }
        Some(other) => {
            wrong_type(findings, &field, "a string", other);
            if other.is_array() {
                findings.hint("Only text can be trained on; join the text parts into one string.");
            }
            None
        }
    }
}

/// A text field that must be there and not be blank.
pub(super) fn required_text(
    findings: &mut Findings<'_>,
    object: &Map<String, Value>,
    key: &str,
    missing: IssueCode,
    empty: IssueCode,
) -> Option<String> {
    match object.get(key) {
        Some(Value::String(text)) => {
            if text.trim().is_empty() {
                findings.add(empty, key, format!("`{key}` is empty"));
            }
            check_text(findings, key, text);
            Some(text.clone())
        }
        None | Some(Value::Null) => {
            findings.add(missing, key, format!("The line has no `{key}`"));
            None
        }
        Some(other) => {
            wrong_type(findings, key, "a string", other);
            None
        }
    }
}

/// Looks for what text may hide.
pub(super) fn check_text(findings: &mut Findings<'_>, path: &str, content: &str) {
    if let Some(token) = text::find_control_token(content) {
        findings.add_with(
            IssueCode::SpecialToken,
            path,
            format!("The text contains the control token `{token}`"),
            token,
        );
    }
    if let Some(character) = text::find_control_character(content) {
        let code = u32::from(character);
        findings.add(
            IssueCode::ControlCharacter,
            path,
            format!("The text contains the control character U+{code:04X}"),
        );
    }
    if content.contains('\u{fffd}') {
        findings.add(
            IssueCode::ReplacementCharacter,
            path,
            "The text contains U+FFFD, left by a wrong decoding",
        );
    }
}

/// Reports a value of the wrong type.
pub(super) fn wrong_type(findings: &mut Findings<'_>, path: &str, wanted: &str, found: &Value) {
    let message = format!("`{path}` is {}, not {wanted}", kind_of(found));
    findings.add_with(IssueCode::TypeWrong, path, message, &found.to_string());
}

/// Checks who speaks when; returns how many messages after the last answer are left out.
pub(super) fn check_order(findings: &mut Findings<'_>, messages: &[(Message, String)]) -> usize {
    for (message, path) in messages.iter().skip(1) {
        if message.role == Role::System {
            findings.add(
                IssueCode::SystemNotFirst,
                &format!("{path}.role"),
                "A system message is not the first message",
            );
        }
    }
    let Some(last_answer) = messages
        .iter()
        .rposition(|(message, _)| message.role == Role::Assistant)
    else {
        findings.add(
            IssueCode::NoAssistant,
            "",
            "The conversation has no assistant message, so nothing to learn",
        );
        return 0;
    };
    let (used, rest) = messages.split_at(last_answer + 1);
    if !used.iter().any(|(message, _)| message.role == Role::User) {
        findings.add(
            IssueCode::NoUser,
            "",
            "The conversation has no user message before its answer",
        );
        return rest.len();
    }
    if let Some((_, path)) = rest.first() {
        let message = format!(
            "{} message(s) follow the last assistant message and are left out",
            rest.len()
        );
        findings.add(IssueCode::LastNotAssistant, path, message);
    }
    check_alternation(findings, used);
    rest.len()
}

/// Reports the first message that does not follow from the one before it.
fn check_alternation(findings: &mut Findings<'_>, messages: &[(Message, String)]) {
    let mut previous = None;
    for (message, path) in messages.iter().filter(|(message, _)| message.role != Role::System) {
        let is_odd = match (previous, message.role) {
            (None, Role::Assistant | Role::Tool) => true,
            (Some(before), now) => before == now && now != Role::Tool,
            _ => false,
        };
        if is_odd {
            let message = match previous {
                None => format!("The conversation starts with a message of the {}", message.role),
                Some(before) => format!("Two messages of the {before} follow each other"),
            };
            return findings.add(IssueCode::NotAlternating, path, message);
        }
        previous = Some(message.role);
    }
}
