//! What is decided before a job is pushed: where, for how long, and whether it is affordable.

use std::time::Duration;

use serde_json::Value;

use crate::config::Config;
use crate::error::Failure;
use crate::job::input::TrainJob;
use crate::runpod::Policy;

/// An estimate is wrong by this factor at most before RunPod ends the job.
const HEADROOM: f64 = 3.0;

/// Shortest limit: loading a large model takes its time however small the data set is.
const SHORTEST_HOURS: f64 = 1.0;

/// GPU type of jobs that name none.
const DEFAULT_GPU: &str = "A100-80GB";

/// How a job is pushed.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// Place of the endpoint in the settings.
    pub endpoint: usize,
    /// Limits at RunPod.
    pub policy: Policy,
    /// What it will cost, by its estimate.
    pub dollars: f64,
}

/// What is to be done with a waiting job.
#[derive(Clone, Debug, PartialEq)]
pub enum Decision {
    /// Push it.
    Push(Plan),
    /// It must not run.
    Refuse(Failure),
    /// No endpoint takes this GPU type: it waits for a pull worker.
    Leave(String),
}

/// Decides about a waiting job from its payload.
pub fn decide(payload: &Value, config: &Config) -> Decision {
    let job = match TrainJob::parse(payload) {
        Ok(job) => job,
        Err(failure) => return Decision::Refuse(failure),
    };
    let settings = &config.orchestrator;
    let gpu_type = ["type", "gpu_type"]
        .iter()
        .find_map(|name| job.gpu_config.get(*name)?.as_str())
        .unwrap_or(DEFAULT_GPU);
    let takes = |types: &[String]| types.is_empty() || types.iter().any(|known| known == gpu_type);
    let Some(endpoint) = settings
        .endpoints
        .iter()
        .position(|endpoint| takes(&endpoint.gpu_types))
    else {
        return Decision::Leave(gpu_type.to_owned());
    };
    let per_hour = dollars_per_hour(&job, gpu_type, config);
    let told = positive(payload.get("estimated_total_cost"));
    let hours = match told {
        Some(dollars) if per_hour > 0.0 => dollars / per_hour,
        _ => settings.default_hours,
    };
    let dollars = hours * per_hour;
    if is_over(dollars, settings.max_job_dollars) {
        return Decision::Refuse(too_expensive(dollars, settings.max_job_dollars));
    }
    let mut limit = (hours * HEADROOM).max(SHORTEST_HOURS).min(settings.max_hours);
    if settings.max_job_dollars > 0.0 && per_hour > 0.0 {
        limit = limit.min(settings.max_job_dollars / per_hour);
    }
    Decision::Push(Plan {
        endpoint,
        policy: Policy {
            execution_timeout: of_hours(limit),
            ttl: of_hours(limit + settings.queue_hours),
            low_priority: false,
        },
        dollars,
    })
}

/// Whether `dollars` exceed a ceiling; a ceiling of 0 is none.
pub fn is_over(dollars: f64, ceiling: f64) -> bool {
    ceiling > 0.0 && dollars > ceiling
}

fn dollars_per_hour(job: &TrainJob, gpu_type: &str, config: &Config) -> f64 {
    let own = positive(job.gpu_config.get("cost_per_gpu_hour"));
    let count = ["count", "num_gpus"]
        .iter()
        .find_map(|name| positive(job.gpu_config.get(*name)));
    own.unwrap_or_else(|| config.prices.per_hour(gpu_type)) * count.unwrap_or(1.0)
}

fn positive(value: Option<&Value>) -> Option<f64> {
    value
        .and_then(Value::as_f64)
        .filter(|number| number.is_finite() && *number > 0.0)
}

fn of_hours(hours: f64) -> Duration {
    Duration::try_from_secs_f64(hours * 3600.0).unwrap_or(Duration::MAX)
}

fn too_expensive(dollars: f64, ceiling: f64) -> Failure {
    Failure::user(
        "JOB_TOO_EXPENSIVE",
        format!("The job would cost about ${dollars:.2}; one job may cost ${ceiling:.2}"),
    )
    .hint("Train fewer epochs or on fewer examples, choose a cheaper GPU, or ask the operator for a higher limit")
}

/// A user whose month is used up.
pub fn month_used_up(spent: f64, dollars: f64, ceiling: f64) -> Failure {
    Failure::user(
        "USER_SPEND_LIMIT",
        format!("The job would cost about ${dollars:.2}; ${spent:.2} of this month's ${ceiling:.2} are spent"),
    )
    .hint("Queue it again next month, train less, or ask the operator for a higher limit")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::*;
    use crate::orchestrator::settings::EndpointSettings;
    use serde_json::json;
    use uuid::Uuid;

    fn payload(gpu: Value, estimate: Value) -> Value {
        json!({
            "job_id": Uuid::nil(), "user_id": Uuid::nil(), "gpu_config": gpu, "estimated_total_cost": estimate,
            "dataset": {"id": Uuid::nil(), "storage_bucket": "b", "storage_path": "p"},
        })
    }

    fn config() -> Config {
        let mut config = Config::default();
        let endpoint = |id: &str, types: &[&str]| EndpointSettings {
            id: id.to_owned(),
            gpu_types: types.iter().map(|name| (*name).to_owned()).collect(),
            max_jobs: 2,
        };
        config.orchestrator.endpoints = vec![
            endpoint("large", &["H100"]),
            endpoint("usual", &["A100-80GB", "A100-40GB"]),
        ];
        config
    }

    fn plan(gpu: Value, estimate: Value, config: &Config) -> Plan {
        match decide(&payload(gpu, estimate), config) {
            Decision::Push(plan) => plan,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_endpoint_follows_from_the_gpu_type_in_either_dialect() {
        let config = config();
        assert_eq!(plan(json!({"type": "H100", "count": 1}), json!(1), &config).endpoint, 0);
        assert_eq!(plan(json!({"gpu_type": "A100-40GB"}), json!(1), &config).endpoint, 1);
        assert_eq!(plan(json!({}), json!(1), &config).endpoint, 1);
        let left = decide(&payload(json!({"type": "V100-32GB"}), json!(1)), &config);
        assert_eq!(left, Decision::Leave("V100-32GB".to_owned()));
    }

    #[test]
    fn the_limit_is_thrice_the_estimate_within_bounds_and_a_wait_comes_on_top() {
        let config = config();
        // $28 at 2 × $3.50 are 4 hours.
        let usual = plan(json!({"type": "A100-80GB", "count": 2}), json!(28), &config);
        assert_eq!(
            (usual.dollars, usual.policy.execution_timeout.as_secs()),
            (28.0, 12 * 3600)
        );
        assert_eq!(usual.policy.ttl.as_secs(), 36 * 3600);
        let short = plan(json!({"type": "A100-80GB"}), json!(0.01), &config);
        assert_eq!(short.policy.execution_timeout.as_secs(), 3600);
        let unknown = plan(json!({"type": "A100-80GB"}), Value::Null, &config);
        assert_eq!(unknown.dollars, 14.0, "four hours are assumed");
    }

    #[test]
    fn a_ceiling_refuses_what_is_above_and_ends_at_runpod_what_turns_out_above() {
        let mut config = config();
        config.orchestrator.max_job_dollars = 7.0;
        let refused = decide(&payload(json!({"type": "A100-80GB"}), json!(7.01)), &config);
        assert!(matches!(refused, Decision::Refuse(failure) if failure.code == "JOB_TOO_EXPENSIVE"));
        let allowed = plan(json!({"type": "A100-80GB"}), json!(7.0), &config);
        assert_eq!(
            allowed.policy.execution_timeout.as_secs(),
            2 * 3600,
            "two hours cost seven dollars"
        );
    }
}
