//! Jobs as the platform hands them out, read leniently.

use serde_json::{Map, Value};

use crate::secret::Secret;

/// One job.
///
/// `Debug` shows the id only: inputs may hold data sets and tokens, and nothing here is ever logged whole.
#[derive(Clone)]
pub struct RunPodJob {
    /// Opaque; not always a UUID.
    pub id: String,
    /// What the client sent. The platform drops an empty object, so an absent or null input is `{}` here.
    pub input: Value,
    /// Called by the platform, not by a worker; for information.
    pub webhook: Option<String>,
    /// The client's bucket credentials as JSON text.
    pub s3_config: Option<Secret>,
    /// The batch this job belongs to.
    pub batch_id: Option<String>,
    /// Every other field.
    pub more: Map<String, Value>,
}

impl RunPodJob {
    /// A job of this id and input.
    pub fn new(id: impl Into<String>, input: Value) -> Self {
        Self {
            id: id.into(),
            input,
            webhook: None,
            s3_config: None,
            batch_id: None,
            more: Map::new(),
        }
    }

    /// Reads one job.
    ///
    /// # Errors
    /// Says in words why it is not one; names fields, never values.
    pub fn read(value: Value) -> Result<Self, String> {
        let Value::Object(mut fields) = value else {
            return Err("it is not a JSON object".to_owned());
        };
        let id = match fields.remove("id") {
            Some(Value::String(id)) if !id.is_empty() => id,
            _ => {
                let names: Vec<&str> = fields.keys().map(String::as_str).collect();
                return Err(format!(
                    "its `id` is not a non-empty string (other fields: {})",
                    names.join(", ")
                ));
            }
        };
        let input = fields.remove("input").filter(|input| !input.is_null());
        let s3_config = fields.remove("s3Config").filter(|config| !config.is_null());
        Ok(Self {
            id,
            input: input.unwrap_or_else(|| Value::Object(Map::new())),
            webhook: text(fields.remove("webhook")),
            s3_config: s3_config.map(|config| Secret::new(config.to_string())),
            batch_id: text(fields.remove("batchId")),
            more: fields,
        })
    }

    /// Credentials that came with the job, for redaction.
    pub(crate) fn secrets(&self) -> Vec<String> {
        let parsed = self
            .s3_config
            .as_ref()
            .map(|config| serde_json::from_str(config.expose()));
        match parsed {
            Some(Ok(Value::Object(config))) => config
                .into_iter()
                .filter(|(name, _)| name.starts_with("access"))
                .filter_map(|(_, value)| text(Some(value)))
                .collect(),
            _ => Vec::new(),
        }
    }
}

impl std::fmt::Debug for RunPodJob {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "RunPodJob({})", self.id)
    }
}

fn text(value: Option<Value>) -> Option<String> {
    match value {
        Some(Value::String(text)) if !text.is_empty() => Some(text),
        _ => None,
    }
}

/// What the body of a take answer held.
#[derive(Debug, Default)]
pub struct Handed {
    /// Jobs that can run.
    pub jobs: Vec<RunPodJob>,
    /// Why others cannot.
    pub rejected: Vec<String>,
}

impl Handed {
    /// Reads the body of a 200 answer: an object is one job, an array several, anything else none.
    pub fn read(body: &[u8]) -> Self {
        let elements = match serde_json::from_slice(body) {
            Ok(Value::Array(elements)) => elements,
            Ok(object @ Value::Object(_)) => vec![object],
            Ok(_) | Err(_) => Vec::new(),
        };
        let mut handed = Self::default();
        for element in elements {
            match RunPodJob::read(element) {
                Ok(job) => handed.jobs.push(job),
                Err(why) => handed.rejected.push(why),
            }
        }
        handed
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    #[test]
    fn s3_credentials_are_not_printed_but_known_to_the_redactor() {
        let job = RunPodJob::read(json!({"id": "a", "s3Config": {"accessSecret": "canary-secret", "bucketName": "b"}}))
            .unwrap();
        assert!(!format!("{job:?}").contains("canary"));
        assert_eq!(job.secrets(), ["canary-secret"]);
    }

    proptest! {
        #[test]
        fn z02_no_take_answer_crashes_the_reader(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Handed::read(&bytes);
        }

        #[test]
        fn z02_no_damaged_job_crashes_the_reader(at in 0_usize..90, byte in any::<u8>()) {
            let mut body = br#"[{"id":"job-1","input":{"a":[1,2.5e3,null]},"s3Config":{"accessId":"x"},"batchId":"b"}]"#.to_vec();
            let at = at.min(body.len() - 1);
            body[at] = byte;
            let _ = Handed::read(&body);
        }
    }
}
