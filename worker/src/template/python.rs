//! Values written as Python writes them: chat templates were made for Jinja2 in Python.

use minijinja::Value;
use minijinja::value::ValueKind;
use serde_json::Value as Json;

/// How `json.dumps` was asked to write.
#[derive(Clone, Debug)]
pub(super) struct JsonStyle {
    pub ensure_ascii: bool,
    pub indent: Option<usize>,
    pub item_separator: String,
    pub key_separator: String,
    pub sort_keys: bool,
}

impl JsonStyle {
    /// The defaults of the `tojson` filter in transformers.
    pub fn new(indent: Option<usize>) -> Self {
        Self {
            ensure_ascii: false,
            indent,
            item_separator: if indent.is_some() { "," } else { ", " }.to_owned(),
            key_separator: ": ".to_owned(),
            sort_keys: false,
        }
    }

    /// `value` as `json.dumps` writes it.
    pub fn write(&self, value: &Json) -> String {
        let mut out = String::new();
        self.value(&mut out, value, 0);
        out
    }

    fn value(&self, out: &mut String, value: &Json, depth: usize) {
        match value {
            Json::Null => out.push_str("null"),
            Json::Bool(flag) => out.push_str(if *flag { "true" } else { "false" }),
            Json::Number(number) if number.is_f64() => out.push_str(&float(number.as_f64().unwrap_or(f64::NAN))),
            Json::Number(number) => out.push_str(&number.to_string()),
            Json::String(text) => self.string(out, text),
            Json::Array(items) => {
                let write = |out: &mut String, item: &Json| self.value(out, item, depth + 1);
                self.block(out, ['[', ']'], depth, items.iter(), write);
            }
            Json::Object(fields) => {
                let mut fields: Vec<_> = fields.iter().collect();
                if self.sort_keys {
                    fields.sort_by_key(|(key, _)| *key);
                }
                let write = |out: &mut String, (key, field): (&String, &Json)| {
                    self.string(out, key);
                    out.push_str(&self.key_separator);
                    self.value(out, field, depth + 1);
                };
                self.block(out, ['{', '}'], depth, fields.into_iter(), write);
            }
        }
    }

    /// Items between brackets, on lines of their own when indenting.
    fn block<T>(
        &self,
        out: &mut String,
        [open, close]: [char; 2],
        depth: usize,
        items: impl ExactSizeIterator<Item = T>,
        write: impl Fn(&mut String, T),
    ) {
        let is_empty = items.len() == 0;
        out.push(open);
        for (index, item) in items.enumerate() {
            if index > 0 {
                out.push_str(&self.item_separator);
            }
            self.line_break(out, depth + 1);
            write(out, item);
        }
        if !is_empty {
            self.line_break(out, depth);
        }
        out.push(close);
    }

    fn line_break(&self, out: &mut String, depth: usize) {
        if let Some(width) = self.indent {
            out.push('\n');
            out.push_str(&" ".repeat(width * depth));
        }
    }

    fn string(&self, out: &mut String, text: &str) {
        out.push('"');
        for character in text.chars() {
            match character {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                c if c < ' ' || (self.ensure_ascii && !c.is_ascii()) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        out.push_str(&format!("\\u{unit:04x}"));
                    }
                }
                c => out.push(c),
            }
        }
        out.push('"');
    }
}

/// `repr(float)`: the shortest digits that read back, with an exponent below 1e-4 and from 1e16.
pub(super) fn float(value: f64) -> String {
    if value.is_nan() {
        return "NaN".to_owned();
    }
    if value.is_infinite() {
        return if value > 0.0 { "Infinity" } else { "-Infinity" }.to_owned();
    }
    let scientific = format!("{value:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if value == 0.0 || (-4..16).contains(&exponent) {
        return plain_decimal(value);
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{digits}e{sign}{:02}", exponent.abs())
}

/// A number without exponent and with at least one decimal.
fn plain_decimal(value: f64) -> String {
    let text = format!("{value}");
    if text.contains('.') { text } else { format!("{text}.0") }
}

/// What `{{ value }}` prints in Python: `True`, `None`, and containers by `repr`.
pub(super) fn print(value: &Value) -> Option<String> {
    match value.kind() {
        ValueKind::Bool | ValueKind::None | ValueKind::Seq | ValueKind::Map => Some(repr(value)),
        ValueKind::Number if !value.is_integer() => f64::try_from(value.clone()).ok().map(float),
        _ => None,
    }
}

/// `repr(value)`.
fn repr(value: &Value) -> String {
    let items = || value.try_iter().into_iter().flatten();
    match value.kind() {
        ValueKind::Bool => if value.is_true() { "True" } else { "False" }.to_owned(),
        ValueKind::None | ValueKind::Undefined => "None".to_owned(),
        ValueKind::String => repr_string(value.as_str().unwrap_or_default()),
        ValueKind::Seq => format!("[{}]", items().map(|item| repr(&item)).collect::<Vec<_>>().join(", ")),
        ValueKind::Map => {
            let field = |key: Value| {
                let item = value.get_item(&key).unwrap_or_default();
                format!("{}: {}", repr(&key), repr(&item))
            };
            format!("{{{}}}", items().map(field).collect::<Vec<_>>().join(", "))
        }
        _ => print(value).unwrap_or_else(|| value.to_string()),
    }
}

/// `repr(str)`: single quotes unless only they occur in the text.
fn repr_string(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') {
        '"'
    } else {
        '\''
    };
    let mut out = String::from(quote);
    for character in text.chars() {
        match character {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == quote => out.extend(['\\', c]),
            c if c.is_control() => out.push_str(&format!("\\x{:02x}", u32::from(c))),
            c => out.push(c),
        }
    }
    out.push(quote);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn json_is_written_as_python_writes_it() {
        let value = json!({"b": [1, 2.0, true, null], "a": "é<\"\n\u{1}", "e": {}, "l": []});
        let plain = JsonStyle::new(None);
        assert_eq!(
            plain.write(&value),
            "{\"b\": [1, 2.0, true, null], \"a\": \"é<\\\"\\n\\u0001\", \"e\": {}, \"l\": []}"
        );
        let styled = JsonStyle {
            ensure_ascii: true,
            sort_keys: true,
            ..JsonStyle::new(Some(2))
        };
        assert_eq!(
            styled.write(&json!({"b": [1], "a": "é🏔"})),
            "{\n  \"a\": \"\\u00e9\\ud83c\\udfd4\",\n  \"b\": [\n    1\n  ]\n}"
        );
    }

    #[test]
    fn floats_are_written_as_python_writes_them() {
        for (value, text) in [
            (1.0, "1.0"),
            (0.1, "0.1"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e300, "1.5e+300"),
            (1e-4, "0.0001"),
            (1e-5, "1e-05"),
            (-2.5, "-2.5"),
            (0.0, "0.0"),
            (-0.0, "-0.0"),
        ] {
            assert_eq!(float(value), text);
        }
    }

    #[test]
    fn printed_values_look_like_pythons() {
        let value = Value::from(minijinja::value::Serde(json!({"a": [true, null, "it's", 1.0, 2]})));
        assert_eq!(print(&value).as_deref(), Some("{'a': [True, None, \"it's\", 1.0, 2]}"));
        assert_eq!(print(&Value::from("text")), None);
    }
}
