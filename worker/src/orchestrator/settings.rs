//! What an operator may set.

use serde::{Deserialize, Serialize};

use crate::error::{Failure, Result};
use crate::runpod::client::PUBLIC_API;

/// How jobs are pushed to RunPod, and what the orchestrator shows. The API key comes from `RUNPOD_API_KEY`, never from here.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct OrchestratorSettings {
    /// Address of RunPod's public API, without an endpoint.
    pub api_base: String,
    /// Most dollars one job may cost by its estimate; it is refused above, and stopped by RunPod at that cost. 0: no ceiling.
    pub max_job_dollars: f64,
    /// Most dollars of one user in a month (UTC). 0: no ceiling.
    pub max_user_dollars: f64,
    /// Hours assumed for a job that brings no estimate.
    pub default_hours: f64,
    /// Longest time on a worker, in hours; RunPod allows 168.
    pub max_hours: f64,
    /// Longest wait at RunPod for a worker, in hours.
    pub queue_hours: f64,
    /// Seconds between two looks at waiting and at pushed jobs.
    pub poll_seconds: u64,
    /// Address of `/health` and `/metrics`, such as `127.0.0.1:9187`; empty: neither.
    pub listen: String,
    /// Address of the app that is told what becomes of its jobs, signed with `BRIGHTRUN_WEBHOOK_SECRET`; empty: none.
    pub webhook_url: String,
    /// Endpoints that jobs are pushed to; none: every job waits for a pull worker.
    pub endpoints: Vec<EndpointSettings>,
}

/// One RunPod endpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EndpointSettings {
    /// RunPod's id of it.
    pub id: String,
    /// GPU types, in the app's words, whose jobs it takes; empty: all.
    #[serde(default)]
    pub gpu_types: Vec<String>,
    /// Most jobs there at once, waiting ones included.
    #[serde(default = "one_worker_and_a_queue")]
    pub max_jobs: usize,
}

fn one_worker_and_a_queue() -> usize {
    4
}

impl Default for OrchestratorSettings {
    fn default() -> Self {
        Self {
            api_base: PUBLIC_API.to_owned(),
            max_job_dollars: 0.0,
            max_user_dollars: 0.0,
            default_hours: 4.0,
            max_hours: 12.0,
            queue_hours: 24.0,
            poll_seconds: 5,
            listen: String::new(),
            webhook_url: String::new(),
            endpoints: Vec::new(),
        }
    }
}

impl OrchestratorSettings {
    /// Refuses values that make no sense.
    ///
    /// # Errors
    /// `CONFIG_OUT_OF_RANGE`, blame user.
    pub fn check(&self) -> Result<()> {
        let refuse = |what: &str| Err(Failure::user("CONFIG_OUT_OF_RANGE", what).at("section `orchestrator`"));
        let is_positive = |number: f64| number.is_finite() && number > 0.0;
        if ![self.default_hours, self.max_hours, self.queue_hours]
            .into_iter()
            .all(is_positive)
        {
            return refuse("default_hours, max_hours and queue_hours must be above 0");
        }
        if ![self.max_job_dollars, self.max_user_dollars]
            .into_iter()
            .all(|dollars| dollars.is_finite() && dollars >= 0.0)
        {
            return refuse("max_job_dollars and max_user_dollars must be 0 or more");
        }
        if self.poll_seconds == 0 {
            return refuse("poll_seconds must be at least 1");
        }
        if self
            .endpoints
            .iter()
            .any(|endpoint| endpoint.id.trim().is_empty() || endpoint.max_jobs == 0)
        {
            return refuse("every endpoint needs an id, and max_jobs of at least 1");
        }
        Ok(())
    }

    /// These settings with the variables of the earlier edge functions laid under them: where no endpoint is set,
    /// `GPU_CLUSTER_API_URL` (`https://…/v2/ENDPOINT`) names the one.
    ///
    /// # Errors
    /// `CONFIG_INVALID` when the variable is no such address.
    pub fn with_aliases(mut self, variable: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let Some(url) = variable("GPU_CLUSTER_API_URL").filter(|_| self.endpoints.is_empty()) else {
            return Ok(self);
        };
        let split = url.trim().trim_end_matches('/').rsplit_once('/');
        let Some((base, id)) = split.filter(|(base, id)| base.contains("://") && !id.is_empty()) else {
            return Err(
                Failure::user("CONFIG_INVALID", "GPU_CLUSTER_API_URL is not an endpoint's address")
                    .hint("Give https://api.runpod.ai/v2/ENDPOINT, or set orchestrator.endpoints"),
            );
        };
        self.api_base = base.to_owned();
        self.endpoints.push(EndpointSettings {
            id: id.to_owned(),
            gpu_types: Vec::new(),
            max_jobs: one_worker_and_a_queue(),
        });
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_variable_of_the_edge_functions_names_an_endpoint_only_where_none_is_set() {
        let variable = |name: &str| (name == "GPU_CLUSTER_API_URL").then(|| "https://gpu.example/v2/ep9/".to_owned());
        let settings = OrchestratorSettings::default().with_aliases(variable).unwrap();
        assert_eq!(settings.api_base, "https://gpu.example/v2");
        assert_eq!(settings.endpoints[0].id, "ep9");
        let again = settings
            .clone()
            .with_aliases(|_| Some("https://other.example/v2/x".to_owned()))
            .unwrap();
        assert_eq!(again, settings);
        assert!(
            OrchestratorSettings::default()
                .with_aliases(|_| Some("nonsense".to_owned()))
                .is_err()
        );
    }
}
