//! Chat templates rendered as transformers renders them.
//!
//! Jinja2 in Python and minijinja differ in small ways that change tokens: how values print, how
//! `tojson` spaces and escapes, which methods strings have. The environment here closes the
//! differences that chat templates meet; the golden tests hold it to the peer's text.

use std::fmt::Write as _;

use chrono::{DateTime, Local};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Rest, Serde, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State, Value};
use serde_json::Value as Json;

use super::python::{self, JsonStyle};
use crate::dataset::Message;
use crate::error::{Failure, Result};

/// What is rendered beside the messages.
#[derive(Clone, Copy, Debug, Default)]
pub struct RenderOptions<'a> {
    /// Whether the header of an assistant message is appended, for the model to answer.
    pub add_generation_prompt: bool,
    /// The `enable_thinking` variable of Qwen3's template; `None` leaves it undefined.
    pub enable_thinking: Option<bool>,
    /// Tool definitions.
    pub tools: Option<&'a Json>,
}

/// A compiled template with its variables.
pub(super) struct Jinja {
    environment: Environment<'static>,
    has_tool_template: bool,
    variables: Vec<(String, Value)>,
}

/// Names of the compiled templates.
const DEFAULT: &str = "default";
const TOOL_USE: &str = "tool_use";

impl Jinja {
    /// Compiles `sources` (name and text; one is named `default`), with `variables` such as `bos_token`.
    pub fn compile(sources: &[(String, String)], variables: Vec<(String, Value)>) -> Result<Self> {
        let mut environment = environment().map_err(|error| invalid_template(&error))?;
        for (name, source) in sources {
            environment
                .add_template_owned(name.clone(), without_generation_tags(source))
                .map_err(|error| invalid_template(&error))?;
        }
        Ok(Self {
            has_tool_template: sources.iter().any(|(name, _)| name == TOOL_USE),
            environment,
            variables,
        })
    }

    /// Renders `messages`.
    pub fn render(&self, messages: &[Message], options: RenderOptions<'_>) -> Result<String> {
        let name = if options.tools.is_some() && self.has_tool_template {
            TOOL_USE
        } else {
            DEFAULT
        };
        let template = self
            .environment
            .get_template(name)
            .map_err(|error| invalid_template(&error))?;
        let mut context: Vec<(String, Value)> = self.variables.clone();
        let mut set = |name: &str, value: Value| context.push((name.to_owned(), value));
        set("messages", Value::from(Serde(messages)));
        set("tools", Value::from(Serde(options.tools)));
        set("documents", Value::from(()));
        set("add_generation_prompt", options.add_generation_prompt.into());
        if let Some(flag) = options.enable_thinking {
            set("enable_thinking", flag.into());
        }
        template
            .render(Value::from_pairs(context))
            .map_err(|error| refused(&error))
    }
}

fn invalid_template(error: &Error) -> Failure {
    Failure::user(
        "TEMPLATE_INVALID",
        format!("The model's chat template cannot be compiled: {}", explain(error)),
    )
    .hint("Check chat_template.jinja or the chat_template of tokenizer_config.json in the model folder")
}

fn refused(error: &Error) -> Failure {
    Failure::user(
        "TEMPLATE_REFUSED",
        format!("The model's chat template refuses the messages: {}", explain(error)),
    )
    .hint("Change the messages to what the template accepts, or use a model with another template")
}

/// The innermost cause, which holds a template's own words.
fn explain(error: &Error) -> String {
    let line = error
        .line()
        .map_or(String::new(), |line| format!(" (template line {line})"));
    let detail = error
        .detail()
        .map_or_else(|| error.kind().to_string(), ToOwned::to_owned);
    format!("{detail}{line}")
}

/// The environment of `transformers.utils.chat_template_utils`: trimmed blocks, loop controls,
/// `raise_exception`, `strftime_now` and its own `tojson`.
fn environment() -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_unknown_method_callback(method);
    environment.set_formatter(|output, state, value| match python::print(value) {
        Some(text) => output.write_str(&text).map_err(Error::from),
        None => minijinja::escape_formatter(output, state, value),
    });
    environment.add_filter("tojson", to_json);
    environment.add_function("raise_exception", raise_exception);
    // One instant for the whole run: a date that changes at midnight must not change the tokens.
    let now = Local::now();
    environment.add_function("strftime_now", move |format: String| strftime(now, &format));
    environment.add_test("sequence", |value: &Value| {
        matches!(
            value.kind(),
            ValueKind::String | ValueKind::Seq | ValueKind::Map | ValueKind::Iterable
        )
    });
    Ok(environment)
}

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

fn strftime(now: DateTime<Local>, format: &str) -> Result<String, Error> {
    let mut text = String::new();
    write!(text, "{}", now.format(format)).map_err(|_| {
        Error::new(
            ErrorKind::InvalidOperation,
            format!("strftime_now does not know the format `{format}`"),
        )
    })?;
    Ok(text)
}

/// `tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
fn to_json(value: &Value, positional: Rest<Value>, options: Kwargs) -> Result<Value, Error> {
    let json =
        serde_json::to_value(value).map_err(|error| Error::new(ErrorKind::BadSerialization, error.to_string()))?;
    let mut style = JsonStyle::new(options.get::<Option<usize>>("indent")?);
    let ensure_ascii = options.get::<Option<bool>>("ensure_ascii")?;
    style.ensure_ascii = ensure_ascii.unwrap_or_else(|| positional.first().is_some_and(Value::is_true));
    style.sort_keys = options.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    if let Some(separators) = options.get::<Option<Vec<String>>>("separators")?
        && let [item, key] = separators.as_slice()
    {
        style.item_separator.clone_from(item);
        style.key_separator.clone_from(key);
    }
    options.assert_all_used()?;
    Ok(Value::from(style.write(&json)))
}

/// Methods of Python's strings beyond those minijinja knows, which come last.
fn method(state: &mut State<'_, '_>, value: &Value, name: &str, arguments: &[Value]) -> Result<Value, Error> {
    if let (Some(text), [first]) = (value.as_str(), arguments)
        && let Some(separator) = first.as_str()
    {
        let three = |parts: [&str; 3]| Value::from(parts.map(Value::from).to_vec());
        match name {
            "removeprefix" => return Ok(text.strip_prefix(separator).unwrap_or(text).into()),
            "removesuffix" => return Ok(text.strip_suffix(separator).unwrap_or(text).into()),
            "partition" => {
                let split = text.split_once(separator);
                return Ok(split.map_or_else(|| three([text, "", ""]), |(head, tail)| three([head, separator, tail])));
            }
            "rpartition" => {
                let split = text.rsplit_once(separator);
                return Ok(split.map_or_else(|| three(["", "", text]), |(head, tail)| three([head, separator, tail])));
            }
            _ => {}
        }
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, name, arguments)
}

/// Replaces `{% generation %}` blocks, which mark the assistant's text for other trainers, by
/// blocks that always render; white-space control is kept.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(open) = rest.find("{%") {
        let (before, tag) = rest.split_at(open);
        out.push_str(before);
        let Some(close) = tag.find("%}") else {
            rest = tag;
            break;
        };
        let (whole, after) = tag.split_at(close + 2);
        let inside = whole.get(2..close).unwrap_or_default();
        let word = inside.trim_matches(|c: char| c == '-' || c == '+' || c.is_whitespace());
        match word {
            "generation" => out.push_str(&whole.replace(word, "if true")),
            "endgeneration" => out.push_str(&whole.replace(word, "endif")),
            _ => out.push_str(whole),
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::*;

    fn render(source: &str) -> Result<String> {
        let sources = [(DEFAULT.to_owned(), source.to_owned())];
        let messages = [Message::user("hi"), Message::assistant("yo")];
        Jinja::compile(&sources, vec![("eos_token".to_owned(), "</s>".into())])?
            .render(&messages, RenderOptions::default())
    }

    #[test]
    fn what_chat_templates_use_is_understood() {
        for (source, expected) in [
            (
                "{% for m in messages %}\n  {% if loop.first %}\n{{ m.role }}\n  {% endif %}\n{% endfor %}\n",
                "user\n",
            ),
            (
                "{% for m in messages %}{% if m.role == 'user' %}{% continue %}{% endif %}{{ m['content'] }}{% endfor %}",
                "yo",
            ),
            (
                "{% for m in messages %}{%- generation -%} {{ m.content }} {%- endgeneration -%} {% endfor %}",
                "hiyo",
            ),
            ("{{ messages[-1].content + eos_token }}", "yo</s>"),
            (
                "{{ {'a': [1, 2.5], 'b': 'ü<>&\\''} | tojson }}",
                "{\"a\": [1, 2.5], \"b\": \"ü<>&'\"}",
            ),
            ("{{ [1] | tojson(indent=4) }}", "[\n    1\n]"),
            ("{{ [1, {'a': 2}] | tojson(separators=(',', ':')) }}", "[1,{\"a\":2}]"),
            (
                "{{ 'a-b-c'.partition('-')[2] }}{{ 'x.y'.removesuffix('.y') }}{{ 'a b'.split()[1] }}",
                "b-cxb",
            ),
            (
                "{{ true }} {{ none }} {{ tools is none }} {{ ['a'] }} {{ 'x' is sequence }}",
                "True None True ['a'] True",
            ),
            (
                "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
                "2",
            ),
            (
                "{% if enable_thinking is defined and enable_thinking is false %}x{% endif %}{{ missing }}",
                "",
            ),
            ("{{ strftime_now('%Y') | length }}", "4"),
            (
                "{{ messages[::-1][0].content.strip('o') }}{{ '\\n\\na'.lstrip('\\n') }}",
                "ya",
            ),
            ("{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f(1) }}", "[1]"),
        ] {
            assert_eq!(render(source).unwrap(), expected, "{source}");
        }
    }

    #[test]
    fn a_template_that_refuses_says_why() {
        let failure = render("{{ raise_exception('roles must alternate') }}").unwrap_err();
        assert_eq!(failure.code, "TEMPLATE_REFUSED");
        assert!(failure.message.contains("roles must alternate"), "{failure}");
        assert_eq!(render("{% if %}").unwrap_err().code, "TEMPLATE_INVALID");
        assert_eq!(render("{{ strftime_now('%!') }}").unwrap_err().code, "TEMPLATE_REFUSED");
    }
}
