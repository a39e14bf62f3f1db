//! Log lines as RunPod's console reads them.
//!
//! On an endpoint each line is one JSON object `{"requestId", "message", "level"}`; elsewhere a line is `LEVEL   | job | message`. The
//! job comes from the span that the worker opens around each job, so that code deep inside needs to know nothing about it.

use std::fmt::Write as _;
use std::io::Write as _;

use serde_json::json;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id};
use tracing::{Event, Subscriber};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::Context;
use tracing_subscriber::registry::LookupSpan;

use super::outcome::clip;
use super::redact::Redactor;

/// Longest message in bytes; the platform drops excess output, so a longer one keeps head and tail only.
const LONGEST_MESSAGE: usize = 4096;

/// A layer that writes such lines to `W`, without any of the redactor's credentials.
///
/// Call [`LogLayer::catch_panics`] too, so that a panic's report is such a line and not several of another shape.
pub struct LogLayer<W> {
    writer: W,
    redactor: Redactor,
    is_json: bool,
}

impl<W> LogLayer<W> {
    /// JSON lines where the worker belongs to an endpoint, plain lines elsewhere.
    pub fn new(writer: W, redactor: Redactor, is_json: bool) -> Self {
        Self {
            writer,
            redactor,
            is_json,
        }
    }
}

impl LogLayer<()> {
    /// Sends the reports of panics through the log.
    pub fn catch_panics() {
        std::panic::set_hook(Box::new(|panic| {
            let place = panic.location().map(ToString::to_string).unwrap_or_default();
            let payload = panic.payload();
            let text = payload.downcast_ref::<&str>().copied();
            let text = text
                .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
                .unwrap_or("no message");
            tracing::error!("panic at {place}: {text}");
        }));
    }
}

/// What a span says about its job.
struct JobOfSpan {
    id: String,
    batch: Option<String>,
}

impl<S, W> tracing_subscriber::Layer<S> for LogLayer<W>
where
    S: Subscriber + for<'lookup> LookupSpan<'lookup>,
    W: for<'writer> MakeWriter<'writer> + 'static,
{
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let mut fields = Fields::default();
        attributes.record(&mut fields);
        if let (Some(id), Some(span)) = (fields.request_id, context.span(id)) {
            let batch = fields.batch_id;
            span.extensions_mut().insert(JobOfSpan { id, batch });
        }
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let mut fields = Fields::default();
        event.record(&mut fields);
        let mut message = fields.message;
        for (name, value) in &fields.others {
            // Writing to a string cannot fail.
            let _infallible = write!(message, " {name}={value}");
        }
        let mut job = fields.request_id;
        for span in context.event_scope(event).into_iter().flatten() {
            if let Some(of_span) = span.extensions().get::<JobOfSpan>() {
                job.get_or_insert_with(|| of_span.id.clone());
                if let Some(batch) = &of_span.batch {
                    message = format!("[batchId={batch}] {message}");
                }
                break;
            }
        }
        let message = clip(&self.redactor.clean(&message), LONGEST_MESSAGE);
        let level = event.metadata().level();
        let line = match (self.is_json, job) {
            (true, job) => json!({"requestId": job, "message": message, "level": level.as_str()}).to_string(),
            (false, Some(job)) => format!("{:<7}| {job} | {message}", level.as_str()),
            (false, None) => format!("{:<7}| {message}", level.as_str()),
        };
        // One write per line, so that lines of several threads do not mix. A log that cannot be written is no reason to stop.
        let _nowhere_to_complain = self.writer.make_writer().write_all(format!("{line}\n").as_bytes());
    }
}

#[derive(Default)]
struct Fields {
    message: String,
    request_id: Option<String>,
    batch_id: Option<String>,
    others: Vec<(&'static str, String)>,
}

impl Fields {
    fn put(&mut self, field: &Field, value: String) {
        match field.name() {
            "message" => self.message = value,
            "request_id" => self.request_id = Some(value),
            "batch_id" => self.batch_id = Some(value),
            name => self.others.push((name, value)),
        }
    }
}

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, value.to_owned());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        self.put(field, format!("{value:?}"));
    }
}
