//! What a client of the endpoint may send.

use serde_json::{Map, Value, json};
use url::Url;
use uuid::Uuid;

use crate::artifact::ID_NAMESPACE;
use crate::error::{Failure, Result};
use crate::job::input::TrainJob;
use crate::secret::Secret;

/// One input.
#[derive(Debug)]
pub enum Request {
    /// A job of the database, by its id.
    Reference(Uuid),
    /// A job that is described whole.
    Whole(Box<WholeJob>),
}

/// A job that exists nowhere but in its input: `{job_id, dataset_url, hyperparameters, gpu_config}`, either dialect.
#[derive(Debug)]
pub struct WholeJob {
    /// The job's name as its client knows it; not always a UUID.
    pub job_id: String,
    /// Where the data set is. Its query may be a signature.
    pub dataset_url: Secret,
    /// The same job as a row would have told it. Its `dataset` names no bucket.
    pub train: TrainJob,
}

/// Required hyperparameters with their names in the other dialect.
const HYPERPARAMETERS: [(&str, &str); 4] = [
    ("learning_rate", "learning_rate"),
    ("batch_size", "batch_size"),
    ("epochs", "num_epochs"),
    ("rank", "lora_rank"),
];

/// Required parts of `gpu_config`, likewise.
const GPU: [(&str, &str); 2] = [("type", "gpu_type"), ("count", "num_gpus")];

impl Request {
    /// Reads an input. `{job_id}` alone is a reference where there is a database.
    ///
    /// # Errors
    /// `JOB_INPUT_INVALID`, blame user, with everything that is missing at once. Ranges are checked when the job is resolved.
    pub fn read(input: &Value, has_database: bool) -> Result<Self> {
        let nothing = Map::new();
        let fields = input.as_object().unwrap_or(&nothing);
        let job_id = text(fields, "job_id");
        let is_reference =
            has_database && !fields.contains_key("dataset_url") && !fields.contains_key("hyperparameters");
        if let (true, Some(id)) = (is_reference, &job_id) {
            return Uuid::try_parse(id)
                .map(Self::Reference)
                .map_err(|_| invalid(&["job_id must be the id of a row of training_jobs".to_owned()]));
        }
        let mut problems = missing(fields);
        let dataset_url = text(fields, "dataset_url");
        if dataset_url.as_deref().is_some_and(|url| !is_web_address(url)) {
            problems.push("dataset_url must be a valid HTTPS URL".to_owned());
        }
        let (Some(job_id), Some(dataset_url), true) = (job_id, dataset_url, problems.is_empty()) else {
            return Err(invalid(&problems));
        };
        let train = train_job(fields, &job_id, &dataset_url)?;
        Ok(Self::Whole(Box::new(WholeJob {
            job_id,
            dataset_url: Secret::new(dataset_url),
            train,
        })))
    }
}

/// The refusals of the earlier worker, in its words; its clients show them.
fn missing(fields: &Map<String, Value>) -> Vec<String> {
    let mut problems = Vec::new();
    for name in ["job_id", "dataset_url", "hyperparameters", "gpu_config"] {
        let is_there = match name {
            "job_id" | "dataset_url" => text(fields, name).is_some(),
            _ => fields.get(name).is_some_and(Value::is_object),
        };
        if !is_there {
            problems.push(format!("Missing required field: {name}"));
        }
    }
    let lacks = |object: &str, names: (&str, &str)| match fields.get(object).and_then(Value::as_object) {
        Some(object) => [names.0, names.1]
            .iter()
            .all(|name| object.get(*name).is_none_or(Value::is_null)),
        None => false,
    };
    for names in HYPERPARAMETERS {
        if lacks("hyperparameters", names) {
            problems.push(format!("Missing hyperparameter: {}", names.0));
        }
    }
    for names in GPU {
        if lacks("gpu_config", names) {
            problems.push(format!("Missing gpu_config.{}", names.0));
        }
    }
    problems
}

/// `https`, or `http` for a service on the same machine, which [`WholeJob`]'s fetcher refuses unless a setting allows it.
fn is_web_address(text: &str) -> bool {
    Url::parse(text).is_ok_and(|url| url.has_host() && (url.scheme() == "https" || is_loopback(&url)))
}

/// Whether an address is `http` on this machine.
pub(super) fn is_loopback(url: &Url) -> bool {
    let is_this_machine = match url.host() {
        Some(url::Host::Ipv4(address)) => address.is_loopback(),
        Some(url::Host::Ipv6(address)) => address.is_loopback(),
        Some(url::Host::Domain(name)) => name == "localhost",
        None => false,
    };
    url.scheme() == "http" && is_this_machine
}

fn train_job(fields: &Map<String, Value>, job_id: &str, dataset_url: &str) -> Result<TrainJob> {
    let id = Uuid::try_parse(job_id).unwrap_or_else(|_| Uuid::new_v5(&ID_NAMESPACE, job_id.as_bytes()));
    let file = Url::parse(dataset_url)
        .ok()
        .and_then(|url| url.path_segments()?.next_back().map(str::to_owned))
        .filter(|name| !name.is_empty());
    let user = text(fields, "user_id").and_then(|user| Uuid::try_parse(&user).ok());
    TrainJob::parse(&json!({
        "job_id": id,
        "user_id": user.unwrap_or(Uuid::nil()),
        "preset_id": text(fields, "preset_id").unwrap_or_else(|| "custom".to_owned()),
        "hyperparameters": fields.get("hyperparameters"),
        "gpu_config": fields.get("gpu_config"),
        "dataset": {
            "id": Uuid::new_v5(&ID_NAMESPACE, dataset_url.split('?').next().unwrap_or_default().as_bytes()),
            "name": text(fields, "dataset_name").or(file).unwrap_or_else(|| "data set".to_owned()),
            "storage_bucket": "", "storage_path": "",
        },
    }))
}

fn text(fields: &Map<String, Value>, name: &str) -> Option<String> {
    let text = fields.get(name)?.as_str()?.trim();
    (!text.is_empty()).then(|| text.to_owned())
}

fn invalid(problems: &[String]) -> Failure {
    Failure::user(
        "JOB_INPUT_INVALID",
        format!("Validation error: {}", problems.join("; ")),
    )
    .at("the job's `input`")
    .hint("Send {job_id, dataset_url, hyperparameters, gpu_config}, or the id of a queued row as {job_id}")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::*;
    use crate::config::Config;

    fn whole() -> Value {
        json!({
            "job_id": "owner-job-1", "dataset_url": "https://files.example/data/answers.jsonl?token=canary",
            "hyperparameters": {"learning_rate": 5e-5, "batch_size": 4, "epochs": 3, "rank": 16},
            "gpu_config": {"type": "A100-80GB", "count": 1},
        })
    }

    fn refusal(input: &Value) -> String {
        Request::read(input, false).unwrap_err().message
    }

    #[test]
    fn an_id_alone_is_a_reference_only_where_there_is_a_database() {
        let input = json!({"job_id": Uuid::nil()});
        assert!(matches!(Request::read(&input, true).unwrap(), Request::Reference(id) if id.is_nil()));
        assert_eq!(
            refusal(&input),
            "Validation error: Missing required field: dataset_url; Missing required field: hyperparameters; \
             Missing required field: gpu_config"
        );
    }

    #[test]
    fn every_missing_part_is_named_in_the_words_clients_know() {
        assert!(refusal(&json!({})).starts_with("Validation error: Missing required field: job_id; "));
        assert!(refusal(&json!(7)).contains("Missing required field: job_id"));
        let mut input = whole();
        input["hyperparameters"] = json!({"rank": 8});
        input["gpu_config"] = json!({});
        assert_eq!(
            refusal(&input),
            "Validation error: Missing hyperparameter: learning_rate; Missing hyperparameter: batch_size; \
             Missing hyperparameter: epochs; Missing gpu_config.type; Missing gpu_config.count"
        );
    }

    #[test]
    fn only_encrypted_addresses_and_this_machine_are_web_addresses() {
        for wrong in ["http://files.example/a", "ftp://x/a", "a.jsonl", "https:///a b"] {
            let mut input = whole();
            input["dataset_url"] = json!(wrong);
            let told = refusal(&input);
            assert_eq!(
                told, "Validation error: dataset_url must be a valid HTTPS URL",
                "{wrong}"
            );
        }
    }

    #[test]
    fn both_dialects_are_one_job_and_a_name_that_is_no_uuid_always_becomes_the_same_one() {
        let mut long = whole();
        long["hyperparameters"] = json!({"learning_rate": 5e-5, "batch_size": 4, "num_epochs": 3, "lora_rank": 16});
        long["gpu_config"] = json!({"gpu_type": "A100-80GB", "num_gpus": 1});
        let read = |input: &Value| match Request::read(input, true).unwrap() {
            Request::Whole(job) => job,
            Request::Reference(_) => panic!("not a reference"),
        };
        let (short, long) = (read(&whole()), read(&long));
        let config = Config::default();
        assert_eq!(
            short.train.resolve(&config).unwrap(),
            long.train.resolve(&config).unwrap()
        );
        assert_eq!(short.train.job_id, long.train.job_id);
        assert_eq!(
            (short.train.dataset.name.as_str(), short.train.user_id),
            ("answers.jsonl", Uuid::nil())
        );
        assert!(!format!("{short:?}").contains("canary"), "the address is a secret");
    }

    #[test]
    fn ranges_are_refused_in_the_words_clients_know() {
        let mut input = whole();
        input["hyperparameters"] = json!({"learning_rate": 1, "batch_size": 0, "epochs": 99, "rank": 2});
        input["gpu_config"] = json!({"type": "H100", "count": 9});
        let Request::Whole(job) = Request::read(&input, false).unwrap() else {
            panic!("not whole")
        };
        assert_eq!(
            job.train.resolve(&Config::default()).unwrap_err().message,
            "Validation error: learning_rate must be between 0.00001 and 0.001; batch_size must be between 1 and 64; \
             epochs must be between 1 and 20; rank must be between 4 and 128; count must be between 1 and 8"
        );
    }
}
