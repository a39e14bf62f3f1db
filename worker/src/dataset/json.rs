//! JSON values with what `serde_json` alone would hide: duplicate keys, and streamed long lists.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::rc::Rc;

use serde::de::{self, DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use super::issue::IssueCode;
use super::source::{Position, RECORD_TOO_LONG};

/// Levels of nesting that are read; `serde_json` itself stops at 128.
const MAX_DEPTH: usize = 120;

/// The text of the error for deeper nesting.
const TOO_DEEP: &str = "nested too deep";

/// Receives the elements of the lists that are too long to be held.
pub(super) trait Stream {
    /// Whether the list at `path` is handed over element by element.
    fn wants(&self, path: &str) -> bool;
    /// One element of such a list, with the line and the offset it starts at. An error ends the reading.
    fn element(&mut self, element: Element) -> Result<(), String>;
    /// A top-level field that was read whole.
    fn field(&mut self, key: &str, value: &Value);
}

/// One streamed element.
pub(super) struct Element {
    /// Path of the list; empty for a top-level array.
    pub list: String,
    /// Position in the list.
    pub index: usize,
    /// Line the element starts on.
    pub line: u64,
    /// Offset the element starts at.
    pub offset: u64,
    /// The element.
    pub value: Value,
    /// Paths, inside the element, of keys that occur twice.
    pub duplicate_keys: Vec<String>,
}

/// Builds a [`Value`] and notes duplicate keys.
pub(super) struct Builder<'s> {
    path: RefCell<String>,
    depth: Cell<usize>,
    duplicates: RefCell<Vec<String>>,
    stream: Option<(Rc<Position>, RefCell<&'s mut dyn Stream>)>,
}

impl<'s> Builder<'s> {
    /// A builder of whole values.
    pub fn whole() -> Self {
        Self {
            path: RefCell::default(),
            depth: Cell::new(0),
            duplicates: RefCell::default(),
            stream: None,
        }
    }

    /// A builder that hands long lists to `stream` and leaves them empty in the value.
    pub fn streaming(position: Rc<Position>, stream: &'s mut dyn Stream) -> Self {
        Self {
            stream: Some((position, RefCell::new(stream))),
            ..Self::whole()
        }
    }

    /// Reads one value; returns it with the paths of its duplicate keys.
    pub fn build<'de, D: Deserializer<'de>>(&self, deserializer: D) -> Result<(Value, Vec<String>), D::Error> {
        let value = Node(self).deserialize(deserializer)?;
        Ok((value, self.duplicates.take()))
    }

    /// Runs `inside` one level deeper, at the path extended by `segment`.
    fn within<T, E: de::Error>(&self, segment: &str, inside: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
        if self.depth.get() >= MAX_DEPTH {
            return Err(E::custom(TOO_DEEP));
        }
        let length = self.path.borrow().len();
        {
            let mut path = self.path.borrow_mut();
            if !segment.starts_with('[') && !path.is_empty() {
                path.push('.');
            }
            path.push_str(segment);
        }
        self.depth.set(self.depth.get() + 1);
        let result = inside();
        self.depth.set(self.depth.get() - 1);
        self.path.borrow_mut().truncate(length);
        result
    }

    fn is_streamed(&self) -> bool {
        self.stream
            .as_ref()
            .is_some_and(|(_, stream)| stream.borrow().wants(&self.path.borrow()))
    }
}

/// One value inside the builder's.
#[derive(Clone, Copy)]
struct Node<'b, 's>(&'b Builder<'s>);

impl<'de> DeserializeSeed<'de> for Node<'_, '_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Node<'_, '_> {
    type Value = Value;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("any JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Number::from_f64(value).map_or(Value::Null, Value::Number))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::String(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Value, A::Error> {
        if let Some((position, stream)) = self.0.stream.as_ref().filter(|_| self.0.is_streamed()) {
            stream_list(self.0, position, stream, list)?;
            return Ok(Value::Array(Vec::new()));
        }
        let mut items = Vec::new();
        loop {
            let segment = format!("[{}]", items.len());
            match self.0.within(&segment, || list.next_element_seed(self))? {
                Some(item) => items.push(item),
                None => return Ok(Value::Array(items)),
            }
        }
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Value, A::Error> {
        let mut object = Map::new();
        while let Some(key) = fields.next_key::<String>()? {
            let is_top = self.0.path.borrow().is_empty();
            let value = self.0.within(&key, || {
                if object.contains_key(&key) {
                    self.0.duplicates.borrow_mut().push(self.0.path.borrow().clone());
                }
                fields.next_value_seed(self)
            })?;
            if let Some((_, stream)) = self.0.stream.as_ref().filter(|_| is_top) {
                stream.borrow_mut().field(&key, &value);
            }
            object.insert(key, value);
        }
        Ok(Value::Object(object))
    }
}

/// Hands a list over element by element; at most one is in memory.
fn stream_list<'de, A: SeqAccess<'de>>(
    outer: &Builder<'_>,
    position: &Rc<Position>,
    stream: &RefCell<&mut dyn Stream>,
    mut list: A,
) -> Result<(), A::Error> {
    let path = outer.path.borrow().clone();
    for index in 0.. {
        let Some(element) = list.next_element_seed(ElementSeed {
            list: &path,
            index,
            position,
        })?
        else {
            return Ok(());
        };
        stream.borrow_mut().element(element).map_err(de::Error::custom)?;
        position.record_start.set(position.offset.get());
    }
    Ok(())
}

/// Reads one streamed element and notes where it starts.
struct ElementSeed<'p> {
    list: &'p str,
    index: usize,
    position: &'p Position,
}

impl<'de> DeserializeSeed<'de> for ElementSeed<'_> {
    type Value = Element;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Element, D::Error> {
        // The parser has looked at the element's first byte already.
        let (line, offset) = (self.position.line.get(), self.position.offset.get().saturating_sub(1));
        let (value, duplicate_keys) = Builder::whole().build(deserializer)?;
        Ok(Element {
            list: self.list.to_owned(),
            index: self.index,
            line,
            offset,
            value,
            duplicate_keys,
        })
    }
}

/// Which issue a parse error is.
///
/// `serde_json` has no public error kinds beyond [`serde_json::error::Category`]; the texts
/// looked for here are pinned by the fixture tests.
pub(super) fn classify(error: &serde_json::Error) -> IssueCode {
    let text = error.to_string();
    let says = |part: &str| text.contains(part);
    if says(RECORD_TOO_LONG) {
        IssueCode::LineTooLong
    } else if says(TOO_DEEP) || says("recursion limit exceeded") {
        IssueCode::NestedTooDeep
    } else if error.is_eof() {
        IssueCode::JsonTruncated
    } else if says("surrogate") || says("unexpected end of hex escape") {
        IssueCode::LoneSurrogate
    } else if says("number out of range") {
        IssueCode::NumberOutOfRange
    } else if says("control character") {
        IssueCode::JsonControlCharacter
    } else if says("trailing characters") {
        IssueCode::TrailingData
    } else {
        IssueCode::JsonInvalid
    }
}

/// The parser's words without its own position, which is relative to the line.
pub(super) fn describe(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let words = text.split(" at line ").next().unwrap_or(&text);
    // What the parser says of a word that starts like `null`, `true` or `false`.
    words.replace("expected ident", "expected value")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::*;

    #[test]
    fn duplicate_keys_are_named_by_path() {
        let text = r#"{"a": 1, "b": [{"c": 1, "c": 2}], "a": 3}"#;
        let mut parser = serde_json::Deserializer::from_str(text);
        let (value, duplicates) = Builder::whole().build(&mut parser).unwrap();
        assert_eq!(duplicates, ["b[0].c", "a"]);
        assert_eq!(value["a"], 3);
    }

    #[test]
    fn every_kind_of_parse_error_is_told_apart() {
        for (text, code) in [
            (r#"{"a": "#, IssueCode::JsonTruncated),
            (r#"{"a": "x"#, IssueCode::JsonTruncated),
            (r#"{"a": "\ud800"}"#, IssueCode::LoneSurrogate),
            (r#"{"a": "\ud83dx"}"#, IssueCode::LoneSurrogate),
            (r#"{"a": "\ude00"}"#, IssueCode::LoneSurrogate),
            (r#"{"a": "\ud83d\u0041"}"#, IssueCode::LoneSurrogate),
            (r#"{"a": 1e999}"#, IssueCode::NumberOutOfRange),
            ("{\"a\": \"\t\"}", IssueCode::JsonControlCharacter),
            ("{'a': 1}", IssueCode::JsonInvalid),
            (r#"{"a": 1,}"#, IssueCode::JsonInvalid),
        ] {
            let error = Builder::whole()
                .build(&mut serde_json::Deserializer::from_str(text))
                .unwrap_err();
            assert_eq!(classify(&error), code, "{text}: {error}");
        }
        let deep = "[".repeat(500);
        let error = Builder::whole()
            .build(&mut serde_json::Deserializer::from_str(&deep))
            .unwrap_err();
        assert_eq!(classify(&error), IssueCode::NestedTooDeep);
    }
}
