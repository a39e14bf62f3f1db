//! JSON documents that span lines: arrays of records and the app's training files, streamed.

use std::io::{self, Read};

use serde_json::Value;

use super::collect::{Collector, Place};
use super::issue::{Issue, IssueCode};
use super::json::{self, Builder, Element, Stream};
use super::record::{conversation_id_of, is_message};
use super::report::Container;
use super::source::{RECORD_TOO_LONG, Source};

/// Reads all JSON values of `source` into `collector`; usually there is one.
pub(super) fn scan<R: Read>(source: &mut Source<R>, collector: &mut Collector<'_>) -> io::Result<()> {
    let position = source.position();
    while let Some(first) = source.skip_whitespace()? {
        let place = Place::line(position.line.get(), position.offset.get());
        position.record_start.set(position.offset.get());
        if collector.report.container == Container::Unknown {
            begin(collector, &place, first);
        }
        let mut stream = DocumentStream::new(collector);
        let builder = Builder::streaming(source.position(), &mut stream);
        let built = builder.build(&mut serde_json::Deserializer::from_reader(&mut *source));
        drop(builder);
        match built {
            Ok((value, duplicate_keys)) => stream.finish(&place, value, &duplicate_keys),
            Err(error) => return unreadable(source, collector, &place, error),
        }
    }
    Ok(())
}

/// Notes the layout of the file.
fn begin(collector: &mut Collector<'_>, place: &Place, first: u8) {
    collector.report.container = Container::JsonDocument;
    if first == b'[' {
        collector.report.container = Container::JsonArray;
        let message = "The file is one JSON array instead of JSON lines";
        collector.issue(Issue::new(IssueCode::JsonArray, place.line, "", message));
    }
}

/// Reports what ended the reading: nothing after it can be trusted.
fn unreadable<R: Read>(
    source: &Source<R>,
    collector: &mut Collector<'_>,
    place: &Place,
    error: serde_json::Error,
) -> io::Result<()> {
    let code = json::classify(&error);
    if error.is_io() && code != IssueCode::LineTooLong {
        return Err(error.into());
    }
    let position = source.position();
    let line = position.line.get();
    let (code, offset, message) = match (code, source.invalid_utf8()) {
        (IssueCode::JsonInvalid, Some(offset)) => (
            IssueCode::InvalidUtf8,
            offset,
            "A byte of the document is not UTF-8".to_owned(),
        ),
        (IssueCode::JsonTruncated, _) => (
            code,
            position.offset.get(),
            format!("The JSON that starts on line {} ends before it is complete", place.line),
        ),
        _ => (
            code,
            position.offset.get(),
            format!("JSON parse error: {}", json::describe(&error)),
        ),
    };
    let advice = match code {
        IssueCode::JsonTruncated => IssueCode::LastLineTruncated.hint(),
        _ => code.hint(),
    };
    let hint = format!("{advice} Nothing after this place was read.");
    let at = Place { line, ..place.clone() };
    collector.unreadable(&at, Issue::new(code, line, "", message).offset(offset).hint(hint));
    Ok(())
}

/// Takes the long lists of one document apart as they are read.
struct DocumentStream<'c, 'a> {
    collector: &'c mut Collector<'a>,
    /// Whether any element was handed over: then the document itself is no record.
    is_streamed: bool,
    /// The conversation that an individual conversation JSON describes.
    conversation_id: Option<String>,
    /// Messages of a document that is a single conversation: `{"conversations": [{role, content}]}`.
    messages: Vec<Value>,
    messages_offset: u64,
}

impl<'c, 'a> DocumentStream<'c, 'a> {
    fn new(collector: &'c mut Collector<'a>) -> Self {
        Self {
            collector,
            is_streamed: false,
            conversation_id: None,
            messages: Vec::new(),
            messages_offset: 0,
        }
    }

    /// Ends a document whose lists were handed over, or records it whole.
    fn finish(self, place: &Place, mut value: Value, duplicate_keys: &[String]) {
        if self.is_streamed {
            for path in duplicate_keys {
                let message = format!("The key `{path}` occurs twice");
                self.collector
                    .issue(Issue::new(IssueCode::KeyDuplicate, place.line, path.clone(), message));
            }
            return;
        }
        if !self.messages.is_empty()
            && let Some(object) = value.as_object_mut()
        {
            object.insert("conversations".to_owned(), Value::Array(self.messages));
        }
        if value.as_array().is_none() {
            self.collector.record(place, value, duplicate_keys);
        }
    }

    /// Keeps a message of a single conversation.
    fn keep(&mut self, element: Element) -> Result<(), String> {
        if self.messages.is_empty() {
            self.messages_offset = element.offset;
        }
        self.messages.push(element.value);
        let size = element.offset - self.messages_offset;
        if size > self.collector.options.max_record_bytes as u64 {
            return Err(RECORD_TOO_LONG.to_owned());
        }
        Ok(())
    }
}

impl Stream for DocumentStream<'_, '_> {
    fn wants(&self, path: &str) -> bool {
        matches!(path, "" | "conversations" | "training_pairs")
    }

    fn element(&mut self, element: Element) -> Result<(), String> {
        if element.list == "conversations" && is_message(&element.value) {
            return self.keep(element);
        }
        self.is_streamed = true;
        let place = Place {
            line: element.line,
            offset: Some(element.offset),
            path: format!("{}[{}]", element.list, element.index),
        };
        if element.list == "training_pairs" {
            self.collector
                .document_pair(&place, &element, self.conversation_id.as_deref());
        } else {
            self.collector.record(&place, element.value, &element.duplicate_keys);
        }
        Ok(())
    }

    fn field(&mut self, key: &str, value: &Value) {
        let is_about_the_conversation = ["conversation_metadata", "dataset_metadata", "conversation_id"].contains(&key);
        if is_about_the_conversation && self.conversation_id.is_none() {
            let object = [(key.to_owned(), value.clone())].into_iter().collect();
            self.conversation_id = conversation_id_of(&object);
        }
    }
}

impl Collector<'_> {
    /// An entry of a streamed individual conversation.
    fn document_pair(&mut self, place: &Place, element: &Element, owner: Option<&str>) {
        if element.index == 0 {
            self.shape(place, "conversation");
        }
        self.sample(&element.value);
        self.document_entry(place, &element.value, &element.duplicate_keys, owner);
    }
}
