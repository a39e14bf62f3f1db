//! What the platform tells a worker: the `RUNPOD_*` variables.

use std::collections::BTreeMap;
use std::time::Duration;

use uuid::Uuid;

use super::redact::Redactor;
use crate::error::{Failure, Result};
use crate::secret::Secret;

/// Heartbeats are never more frequent than this: below it the worker would spin.
const SHORTEST_PING_INTERVAL: Duration = Duration::from_secs(1);

/// The variables of a production worker, read and checked.
///
/// Only the take and the result address are required. Without key, worker id or ping address there are no heartbeats, which
/// [`Environment::notes`] says; the worker works nevertheless, as RunPod's own does.
#[derive(Clone, Debug)]
pub struct Environment {
    /// `RUNPOD_WEBHOOK_GET_JOB`: where jobs are taken.
    pub take: String,
    /// `RUNPOD_WEBHOOK_POST_OUTPUT`: where results and progress go.
    pub done: String,
    /// `RUNPOD_WEBHOOK_POST_STREAM`: where chunks of a streaming handler go.
    pub stream: Option<String>,
    /// `RUNPOD_WEBHOOK_PING`: where heartbeats go.
    pub ping: Option<String>,
    /// `RUNPOD_PING_INTERVAL`, given in milliseconds.
    pub ping_interval: Duration,
    /// `RUNPOD_AI_API_KEY`.
    pub key: Option<Secret>,
    /// `RUNPOD_POD_ID`, or a random one.
    pub worker_id: String,
    /// Whether the platform named the worker; heartbeats of an invented name would help nobody.
    pub worker_is_named: bool,
    /// `RUNPOD_POD_HOSTNAME`.
    pub hostname: String,
    /// `RUNPOD_ENDPOINT_ID`; where set, logs are JSON lines.
    pub endpoint: Option<String>,
    /// `RUNPOD_GPU_TYPE_ID`, sometimes a token of the address templates.
    pub gpu_type_id: Option<String>,
    /// `RUNPOD_LOG_LEVEL`, else `RUNPOD_DEBUG_LEVEL`.
    pub log_level: tracing::level_filters::LevelFilter,
    /// `RUNPOD_SKIP_AUTO_SYSTEM_CHECKS`.
    pub skip_system_checks: bool,
    /// `RUNPOD_SKIP_GPU_CHECK`, for the caller's own GPU check.
    pub skip_gpu_check: bool,
    /// `RUNPOD_MIN_MEMORY_GB`: memory that must be available, in GiB.
    pub min_memory_gb: f64,
    /// `RUNPOD_MIN_DISK_PERCENT`: share of `/` that must be free.
    pub min_disk_percent: f64,
    /// `RUNPOD_NETWORK_CHECK_TIMEOUT`, given in seconds.
    pub network_timeout: Duration,
    /// Removes every credential of the environment from text.
    pub redactor: Redactor,
    /// What an operator should know: ignored values, absent optional variables.
    pub notes: Vec<String>,
}

impl Environment {
    /// Whether this process was started by the platform as a queue worker. An empty variable counts as absent.
    pub fn is_production(variables: &BTreeMap<String, String>) -> bool {
        variables
            .get("RUNPOD_WEBHOOK_GET_JOB")
            .is_some_and(|value| !value.trim().is_empty())
    }

    /// The process's own variables; those that are not text are left out.
    pub fn variables() -> BTreeMap<String, String> {
        std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
            .collect()
    }

    /// Reads the variables.
    ///
    /// # Errors
    /// `RUNPOD_ENVIRONMENT_INCOMPLETE`, naming every missing variable at once.
    pub fn read(variables: &BTreeMap<String, String>) -> Result<Self> {
        let mut reader = Reader {
            variables,
            missing: Vec::new(),
            notes: Vec::new(),
        };
        let key = reader
            .optional("RUNPOD_AI_API_KEY", "no heartbeats are sent")
            .map(Secret::new);
        let named = reader.optional("RUNPOD_POD_ID", "the worker's id is random and no heartbeats are sent");
        let environment = Self {
            take: reader.required("RUNPOD_WEBHOOK_GET_JOB"),
            done: reader.required("RUNPOD_WEBHOOK_POST_OUTPUT"),
            stream: reader.text("RUNPOD_WEBHOOK_POST_STREAM"),
            ping: reader.optional("RUNPOD_WEBHOOK_PING", "no heartbeats are sent"),
            ping_interval: reader.ping_interval(),
            key,
            worker_is_named: named.is_some(),
            worker_id: named.unwrap_or_else(|| Uuid::new_v4().to_string()),
            hostname: reader
                .text("RUNPOD_POD_HOSTNAME")
                .unwrap_or_else(|| "unknown".to_owned()),
            endpoint: reader.text("RUNPOD_ENDPOINT_ID"),
            gpu_type_id: reader.text("RUNPOD_GPU_TYPE_ID"),
            log_level: reader.log_level(),
            skip_system_checks: reader.switch("RUNPOD_SKIP_AUTO_SYSTEM_CHECKS"),
            skip_gpu_check: reader.switch("RUNPOD_SKIP_GPU_CHECK"),
            min_memory_gb: reader.number("RUNPOD_MIN_MEMORY_GB", 4.0),
            min_disk_percent: reader.number("RUNPOD_MIN_DISK_PERCENT", 10.0),
            network_timeout: Duration::from_secs_f64(reader.number("RUNPOD_NETWORK_CHECK_TIMEOUT", 5.0).min(600.0)),
            redactor: Redactor::of_environment(variables.clone()),
            notes: reader.notes,
        };
        if reader.missing.is_empty() {
            return Ok(environment);
        }
        Err(Failure::user(
            "RUNPOD_ENVIRONMENT_INCOMPLETE",
            format!("These variables are not set: {}", reader.missing.join(", ")),
        )
        .at("the environment of the RunPod worker")
        .hint("RunPod sets them on a serverless worker; run `brightrun worker` with a database, or the local API, elsewhere"))
    }
}

struct Reader<'a> {
    variables: &'a BTreeMap<String, String>,
    missing: Vec<&'static str>,
    notes: Vec<String>,
}

impl Reader<'_> {
    fn text(&self, name: &str) -> Option<String> {
        self.variables
            .get(name)
            .map(|value| value.trim())
            .filter(|value| !value.is_empty())
            .map(str::to_owned)
    }

    fn required(&mut self, name: &'static str) -> String {
        self.text(name).unwrap_or_else(|| {
            self.missing.push(name);
            String::new()
        })
    }

    fn optional(&mut self, name: &str, consequence: &str) -> Option<String> {
        let value = self.text(name);
        if value.is_none() {
            self.notes.push(format!("{name} is not set: {consequence}"));
        }
        value
    }

    fn number(&mut self, name: &str, default: f64) -> f64 {
        let Some(text) = self.text(name) else { return default };
        match text.parse::<f64>() {
            Ok(number) if number.is_finite() && number >= 0.0 => number,
            _ => {
                self.notes.push(format!("{name} is not a number: {default} is used"));
                default
            }
        }
    }

    fn ping_interval(&mut self) -> Duration {
        let interval = Duration::from_secs_f64(self.number("RUNPOD_PING_INTERVAL", 10_000.0).min(3.6e6) / 1000.0);
        if interval < SHORTEST_PING_INTERVAL {
            self.notes
                .push("RUNPOD_PING_INTERVAL is below 1000 ms: 1000 is used".to_owned());
        }
        interval.max(SHORTEST_PING_INTERVAL)
    }

    fn switch(&self, name: &str) -> bool {
        self.text(name)
            .is_some_and(|value| value.eq_ignore_ascii_case("true") || value == "1")
    }

    fn log_level(&mut self) -> tracing::level_filters::LevelFilter {
        use tracing::level_filters::LevelFilter;
        let Some(text) = self
            .text("RUNPOD_LOG_LEVEL")
            .or_else(|| self.text("RUNPOD_DEBUG_LEVEL"))
        else {
            return LevelFilter::INFO;
        };
        match text.to_ascii_uppercase().as_str() {
            "NOTSET" | "0" => LevelFilter::OFF,
            "TRACE" | "1" => LevelFilter::TRACE,
            "DEBUG" | "2" => LevelFilter::DEBUG,
            "INFO" | "3" => LevelFilter::INFO,
            "WARN" | "WARNING" | "4" => LevelFilter::WARN,
            "ERROR" | "5" => LevelFilter::ERROR,
            _ => {
                self.notes
                    .push("the log level is not one of ERROR, WARN, INFO, DEBUG, TRACE: INFO is used".to_owned());
                LevelFilter::INFO
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn variables(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect()
    }

    fn complete(more: &[(&str, &str)]) -> Environment {
        let mut all = variables(&[
            ("RUNPOD_WEBHOOK_GET_JOB", "http://h/job-take/$ID?a=b"),
            ("RUNPOD_WEBHOOK_POST_OUTPUT", "http://h/d"),
        ]);
        all.extend(variables(more));
        Environment::read(&all).unwrap()
    }

    #[test]
    fn every_missing_variable_is_named_at_once_and_an_empty_one_is_missing() {
        let failure = Environment::read(&variables(&[("RUNPOD_WEBHOOK_GET_JOB", " ")])).unwrap_err();
        assert!(
            failure
                .message
                .contains("RUNPOD_WEBHOOK_GET_JOB, RUNPOD_WEBHOOK_POST_OUTPUT"),
            "{failure}"
        );
        assert!(!Environment::is_production(&variables(&[(
            "RUNPOD_WEBHOOK_GET_JOB",
            ""
        )])));
    }

    #[test]
    fn h07_a_senseless_ping_interval_is_clamped_or_defaulted() {
        for (given, seconds) in [("500", 1), ("0", 1), ("abc", 10), ("-5", 10), ("2500", 2), ("NaN", 10)] {
            let environment = complete(&[("RUNPOD_PING_INTERVAL", given)]);
            assert_eq!(environment.ping_interval.as_secs(), seconds, "{given}");
        }
    }

    #[test]
    fn log_levels_are_names_in_any_case_or_digits_and_nonsense_means_info() {
        use tracing::level_filters::LevelFilter;
        for (given, level) in [
            ("debug", LevelFilter::DEBUG),
            ("1", LevelFilter::TRACE),
            ("loud", LevelFilter::INFO),
        ] {
            assert_eq!(complete(&[("RUNPOD_DEBUG_LEVEL", given)]).log_level, level);
        }
        let both = complete(&[("RUNPOD_DEBUG_LEVEL", "DEBUG"), ("RUNPOD_LOG_LEVEL", "ERROR")]);
        assert_eq!(both.log_level, LevelFilter::ERROR, "the second variable wins");
    }

    #[test]
    fn the_key_is_neither_printed_nor_left_in_text() {
        let environment = complete(&[("RUNPOD_AI_API_KEY", "canary-not-a-real-key")]);
        assert!(!format!("{environment:?}").contains("canary"));
        assert_eq!(environment.redactor.clean("x canary-not-a-real-key"), "x [redacted]");
    }
}
