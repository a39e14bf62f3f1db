//! G01: the files that RunPod's tools read satisfy their formats, and what they set is understood by this program.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use brightrun_worker::config::Config;
use brightrun_worker::runpod::Settings;
use serde_json::Value;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn text(name: &str) -> String {
    std::fs::read_to_string(root().join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

fn json(name: &str) -> Value {
    serde_json::from_str(&text(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// What variables of a deployment mean to this program.
fn check_variables(variables: BTreeMap<String, String>) {
    Config::load(None, variables.clone().into_iter()).unwrap();
    Settings::default().with_variables(&variables).unwrap();
    for (name, value) in variables {
        assert!(
            !brightrun_worker::runpod::redact::names_a_secret(&name) || value.is_empty(),
            "{name} holds a secret"
        );
    }
}

#[test]
fn g01_runpod_toml_has_the_types_that_runpodctl_wants() {
    let project: toml::Table = text("runpod.toml").parse().unwrap();
    let at = |path: &str| {
        let mut keys = path.split('.');
        let first = project.get(keys.next().unwrap());
        keys.fold(first, |value, key| value.and_then(|value| value.get(key)))
    };
    let strings = [
        "name",
        "title",
        "project.uuid",
        "project.name",
        "project.base_image",
        "project.volume_mount_path",
        "project.ports",
        "project.storage_id",
        "template.model_type",
        "template.model_name",
        "runtime.python_version",
        "runtime.handler_path",
        "runtime.requirements_path",
    ];
    for path in strings {
        assert!(at(path).is_some_and(toml::Value::is_str), "{path} is a string");
    }
    let integers = [
        "project.gpu_count",
        "project.container_disk_size_gb",
        "endpoint.active_workers",
        "endpoint.max_workers",
        "endpoint.idle_timeout",
    ];
    for path in integers {
        assert!(at(path).is_some_and(toml::Value::is_integer), "{path} is an integer");
    }
    assert!(at("endpoint.flashboot").is_some_and(toml::Value::is_bool));
    let gpus = at("project.gpu_types").unwrap().as_array().unwrap();
    assert!(!gpus.is_empty() && gpus.iter().all(toml::Value::is_str));
    let name = at("name").unwrap().as_str().unwrap();
    assert!(
        !name.contains(|letter: char| letter.is_whitespace() || "<>:\"/\\|?*".contains(letter)),
        "it is part of paths"
    );
    let uuid = at("project.uuid").unwrap().as_str().unwrap();
    assert!(
        uuid.len() == 8 && uuid.chars().all(|letter| letter.is_ascii_hexdigit()),
        "{uuid}"
    );
    for path in ["runtime.handler_path", "runtime.requirements_path"] {
        let file = at(path).unwrap().as_str().unwrap();
        assert!(root().join(file).is_file(), "{file}");
    }
    let variables = at("project.env_vars").unwrap().as_table().unwrap();
    let variables = variables
        .iter()
        .map(|(name, value)| (name.clone(), value.as_str().unwrap().to_owned()));
    check_variables(variables.collect());
}

#[test]
fn g01_hub_json_has_its_required_fields_and_only_variables_we_read() {
    let hub = json(".runpod/hub.json");
    for field in ["title", "description"] {
        assert!(hub[field].as_str().is_some_and(|text| !text.is_empty()), "{field}");
    }
    assert_eq!(hub["type"], "serverless");
    assert!(["audio", "embedding", "language", "video", "image"].contains(&hub["category"].as_str().unwrap()));
    let config = &hub["config"];
    assert_eq!(config["runsOn"], "GPU");
    assert!(config["containerDiskInGb"].is_u64() && config["gpuCount"].is_u64());
    let pools = [
        "AMPERE_16",
        "AMPERE_24",
        "ADA_24",
        "AMPERE_48",
        "ADA_48_PRO",
        "AMPERE_80",
        "ADA_80_PRO",
        "HOPPER_141",
    ];
    for pool in config["gpuIds"].as_str().unwrap().split(',') {
        assert!(pools.contains(&pool), "{pool}");
    }
    let mut variables = BTreeMap::new();
    for entry in config["env"].as_array().unwrap() {
        let input = &entry["input"];
        let has_value = entry["value"].is_string();
        assert_ne!(has_value, input.is_object(), "a value or an input: {entry}");
        assert!(has_value || ["string", "number", "boolean", "huggingface"].contains(&input["type"].as_str().unwrap()));
        let value = entry["value"]
            .as_str()
            .or(input["default"].as_str())
            .unwrap_or_default();
        variables.insert(entry["key"].as_str().unwrap().to_owned(), value.to_owned());
    }
    check_variables(variables);
}

#[test]
fn g01_tests_json_has_inputs_that_the_platform_does_not_drop() {
    let tests = json(".runpod/tests.json");
    for test in tests["tests"].as_array().unwrap() {
        assert!(
            test["name"].is_string() && test["input"].as_object().is_some_and(|input| !input.is_empty()),
            "{test}"
        );
        assert!(
            test["timeout"]
                .as_u64()
                .is_some_and(|milliseconds| milliseconds >= 1000),
            "milliseconds: {test}"
        );
    }
    assert!(tests["config"]["gpuTypeId"].is_string() && tests["config"]["gpuCount"].is_u64());
    let env = tests["config"]["env"].as_array().unwrap();
    check_variables(
        env.iter()
            .map(|entry| {
                (
                    entry["key"].as_str().unwrap().to_owned(),
                    entry["value"].as_str().unwrap().to_owned(),
                )
            })
            .collect(),
    );
}

#[test]
fn the_image_runs_a_command_that_exists_as_a_user_without_rights() {
    use clap::Parser;
    let file = text("Dockerfile");
    let instruction = |name: &str| {
        file.lines()
            .rev()
            .find_map(|line| line.strip_prefix(name))
            .unwrap_or_else(|| panic!("{name}"))
            .trim()
    };
    let list =
        |text: &str| serde_json::from_str::<Vec<String>>(text).unwrap_or_else(|_| panic!("not the exec form: {text}"));
    let entry = list(instruction("ENTRYPOINT"));
    let command = entry.into_iter().chain(list(instruction("CMD")));
    brightrun_worker::cli::Cli::try_parse_from(command).unwrap();
    let health = instruction("HEALTHCHECK").split_once("CMD").unwrap().1;
    brightrun_worker::cli::Cli::try_parse_from(list(health.trim())).unwrap();
    let user = instruction("USER");
    assert!(
        user.split(':').all(|id| id.parse::<u32>().is_ok_and(|id| id > 0)),
        "{user}"
    );
    // Stages: the compiler of kernels (from a Python package), the build, and what ships.
    let stages: Vec<&str> = file.split("\nFROM ").skip(1).collect();
    assert_eq!(stages.len(), 3);
    let shipped = stages[2].to_ascii_lowercase();
    assert!(shipped.contains("git_revision") && !shipped.contains("pip ") && shipped.contains("brightrun_kernels"));
}
