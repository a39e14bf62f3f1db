//! What a deployment asks of RunPod's management API, from `runpod.toml`: the calls as values, sent by nobody here.
//!
//! Field names are those of the REST API's published description. Secrets appear as RunPod's references
//! (`{{ RUNPOD_SECRET_NAME }}`), which RunPod replaces when a worker starts.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::{Value, json};

use super::redact::names_a_secret;
use crate::error::{Failure, Result};

/// Address of the management API.
pub const MANAGEMENT_API: &str = "https://rest.runpod.io/v1";

/// Variables that a deployment needs and that are secrets.
const SECRETS: [&str; 1] = ["DATABASE_URL"];

/// The endpoint's default limit of one job; every pushed job brings its own. RunPod's API defaults to five minutes.
const EXECUTION_TIMEOUT_MS: u64 = 12 * 3600 * 1000;

/// Scaling up begins when a job has waited this many seconds.
const QUEUE_DELAY_SECONDS: u64 = 4;

/// One call.
#[derive(Clone, Debug, PartialEq)]
pub struct Call {
    /// The method.
    pub method: &'static str,
    /// The address.
    pub url: String,
    /// The body.
    pub body: Value,
}

/// What is asked for besides the file.
#[derive(Clone, Debug)]
pub struct Deployment<'a> {
    /// The image, with its digest.
    pub image: &'a str,
    /// Network volume, by RunPod's id.
    pub volume: Option<&'a str>,
}

/// The parts of `runpod.toml` that matter here; the file has more, for RunPod's own tools.
#[derive(Debug, Deserialize)]
struct File {
    name: String,
    project: Project,
    endpoint: Endpoint,
}

#[derive(Debug, Deserialize)]
struct Project {
    gpu_types: Vec<String>,
    gpu_count: u64,
    volume_mount_path: String,
    container_disk_size_gb: u64,
    #[serde(default)]
    env_vars: BTreeMap<String, String>,
}

#[derive(Debug, Deserialize)]
struct Endpoint {
    active_workers: u64,
    max_workers: u64,
    idle_timeout: u64,
    flashboot: bool,
}

/// The calls that create a template and an endpoint from the text of a `runpod.toml`. The second names the first one's answer.
///
/// # Errors
/// `DEPLOY_FILE_INVALID`: a key is missing or of another type. `DEPLOY_SECRET_IN_FILE`: a variable holds a secret's value.
pub fn calls(file: &str, deployment: &Deployment<'_>) -> Result<Vec<Call>> {
    let file: File = toml::from_str(file).map_err(|error| {
        Failure::user(
            "DEPLOY_FILE_INVALID",
            format!("The project file is not understood: {}", error.message()),
        )
        .at("runpod.toml")
        .hint("Compare it with the one of the repository")
    })?;
    let template = json!({
        "name": file.name,
        "imageName": deployment.image,
        "isServerless": true,
        "containerDiskInGb": file.project.container_disk_size_gb,
        "volumeMountPath": file.project.volume_mount_path,
        "env": environment(file.project.env_vars)?,
    });
    let mut endpoint = json!({
        "name": file.name,
        "templateId": "{the id that the first call answers}",
        "computeType": "GPU",
        "gpuTypeIds": file.project.gpu_types,
        "gpuCount": file.project.gpu_count,
        "workersMin": file.endpoint.active_workers,
        "workersMax": file.endpoint.max_workers,
        "idleTimeout": file.endpoint.idle_timeout,
        "flashboot": file.endpoint.flashboot,
        "executionTimeoutMs": EXECUTION_TIMEOUT_MS,
        "scalerType": "QUEUE_DELAY",
        "scalerValue": QUEUE_DELAY_SECONDS,
    });
    if let Some(volume) = deployment.volume {
        endpoint["networkVolumeId"] = json!(volume);
    }
    let post = |path: &str, body: Value| Call {
        method: "POST",
        url: format!("{MANAGEMENT_API}/{path}"),
        body,
    };
    Ok(vec![post("templates", template), post("endpoints", endpoint)])
}

/// The variables with references in the place of secrets.
fn environment(mut variables: BTreeMap<String, String>) -> Result<BTreeMap<String, String>> {
    let reference = |name: &str| format!("{{{{ RUNPOD_SECRET_{name} }}}}");
    for (name, value) in &variables {
        if names_a_secret(name) && !value.is_empty() && !value.starts_with("{{ RUNPOD_SECRET_") {
            return Err(Failure::user(
                "DEPLOY_SECRET_IN_FILE",
                format!("The variable {name} holds a value, not a reference"),
            )
            .at("runpod.toml, `[project.env_vars]`")
            .hint(format!("Make a RunPod secret of it and write \"{}\"", reference(name))));
        }
    }
    for name in SECRETS {
        variables.entry(name.to_owned()).or_insert_with(|| reference(name));
    }
    Ok(variables)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const OURS: &str = include_str!("../../../runpod.toml");
    const DEPLOYMENT: Deployment<'_> = Deployment {
        image: "docker.io/OWNER/brightrun@sha256:0",
        volume: Some("volume-1"),
    };

    #[test]
    fn the_repositorys_file_becomes_a_template_and_an_endpoint_with_references_for_secrets() {
        let calls = calls(OURS, &DEPLOYMENT).unwrap();
        let urls: Vec<&str> = calls.iter().map(|call| call.url.as_str()).collect();
        assert_eq!(
            urls,
            [
                "https://rest.runpod.io/v1/templates",
                "https://rest.runpod.io/v1/endpoints"
            ]
        );
        let (template, endpoint) = (&calls[0].body, &calls[1].body);
        assert_eq!(template["env"]["DATABASE_URL"], "{{ RUNPOD_SECRET_DATABASE_URL }}");
        assert_eq!(template["env"]["DRAIN_MODE"], "checkpoint");
        assert_eq!(endpoint["executionTimeoutMs"], 43_200_000_u64);
        assert_eq!(
            (&endpoint["networkVolumeId"], &endpoint["workersMin"]),
            (&json!("volume-1"), &json!(0))
        );
    }

    #[test]
    fn a_secrets_value_in_the_file_is_refused_and_not_repeated() {
        let file = OURS.replace(
            "[project.env_vars]",
            "[project.env_vars]\nDATABASE_URL = \"canary-not-a-real-url\"",
        );
        let failure = calls(&file, &DEPLOYMENT).unwrap_err();
        assert_eq!(failure.code, "DEPLOY_SECRET_IN_FILE");
        assert!(!failure.to_string().contains("canary"), "{failure}");
    }

    #[test]
    fn a_file_without_its_keys_is_refused() {
        assert_eq!(
            calls("name = 'x'", &DEPLOYMENT).unwrap_err().code,
            "DEPLOY_FILE_INVALID"
        );
    }
}
