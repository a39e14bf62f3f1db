//! The commands that others script: their JSON, their exit codes, and that a repeated run gives the same bytes.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use uuid::Uuid;

use crate::world::{World, dataset, model, spoken};

/// Objects of JSON lines.
fn objects(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// A stage with a data set's file.
async fn stage() -> (World, PathBuf) {
    let world = World::new().await;
    let file = world.folder.path().join("data.jsonl");
    fs::write(&file, dataset(8)).unwrap();
    (world, file)
}

/// Runs a command that must succeed; returns its standard output.
fn said(world: &World, line: &str) -> String {
    let arguments: Vec<&str> = line.split(' ').collect();
    let (output, errors, code) = spoken(&world.brightrun(&arguments).output().unwrap());
    assert_eq!(code, 0, "{line}: {errors}");
    output
}

/// Runs a command that must fail; returns its exit code and the code of its failure.
fn failed(world: &World, line: &str) -> (i32, String) {
    let arguments: Vec<&str> = line.split(' ').collect();
    let (output, errors, code) = spoken(&world.brightrun(&arguments).output().unwrap());
    assert_ne!(code, 0, "{line} succeeded: {output}");
    let told = objects(&output)
        .pop()
        .map(|last| last["error"]["code"].as_str().unwrap_or_default().to_owned());
    let told = told.unwrap_or_default();
    assert!(
        errors.contains(&told),
        "standard error says nothing of {told}: {errors}"
    );
    (code, told)
}

fn train_line(out: &str, more: &str) -> String {
    let model = model().display();
    format!(
        "train --model {model} --dataset data.jsonl --out {out} --learning-rate 1e-3 --rank 4 --alpha 8 \
         --targets q_proj,v_proj,down_proj --batch-size 1 --max-length 128 --base-dtype f32 --order file --seed 3 --json {more}"
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn train_speaks_one_object_a_step_and_the_same_seed_gives_the_same_bytes() {
    let (world, _) = stage().await;
    let lines = objects(&said(&world, &train_line("one", "--steps 12")));
    let steps: Vec<&Value> = lines.iter().filter(|line| line.get("step").is_some()).collect();
    assert_eq!(steps.len(), 12);
    for (index, step) in steps.iter().enumerate() {
        assert_eq!(step["step"].as_u64(), Some(index as u64 + 1));
        for name in ["loss", "learning_rate", "gradient_norm", "tokens_per_second"] {
            assert!(step[name].as_f64().unwrap().is_finite(), "{name} of {step}");
        }
    }
    said(&world, &train_line("two", "--steps 12"));
    let weights = |out: &str| fs::read(world.folder.path().join(out).join("adapter_model.safetensors")).unwrap();
    assert!(weights("one") == weights("two"));
    said(
        &world,
        &train_line("three", "--steps 12 --seed 4").replace("--seed 3 ", ""),
    );
    assert!(weights("one") != weights("three"), "the seed changes nothing");
}

#[tokio::test(flavor = "multi_thread")]
async fn eval_with_the_adapter_gives_the_loss_of_its_manifest() {
    let (world, _) = stage().await;
    said(&world, &train_line("out", "--epochs 3"));
    let manifest = fs::read(world.folder.path().join("out/manifest.json")).unwrap();
    let manifest: Value = serde_json::from_slice(&manifest).unwrap();
    let eval = format!("eval --model {} --dataset data.jsonl --json", model().display());
    let examples = manifest["proof"]["examples"].as_u64().unwrap();
    let with = &objects(&said(&world, &format!("{eval} --adapter out --limit {examples}")))[0];
    assert_eq!(
        (with["examples"].as_u64(), &with["supervised_tokens"]),
        (Some(examples), &manifest["proof"]["supervised_tokens"])
    );
    let (measured, proven) = (
        with["loss"].as_f64().unwrap(),
        manifest["proof"]["loss"].as_f64().unwrap(),
    );
    // float32 sums in another grouping of micro-batches.
    assert!((measured - proven).abs() < 1e-5 * proven, "{measured} is not {proven}");
    let without = &objects(&said(&world, &format!("{eval} --limit {examples}")))[0];
    assert!(
        without["loss"].as_f64().unwrap() > measured,
        "the adapter has learnt nothing"
    );
    assert_eq!(objects(&said(&world, &format!("{eval} --limit 2")))[0]["examples"], 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interrupted_train_continues_to_the_same_bytes() {
    let (world, _) = stage().await;
    said(&world, &train_line("whole", "--steps 300"));
    let line = train_line("parts", "--steps 300");
    let arguments: Vec<&str> = line.split(' ').collect();
    let mut process = world.brightrun(&arguments).spawn().unwrap();
    let mut lines = BufReader::new(process.stdout.take().unwrap()).lines();
    for _ in 0..20 {
        lines.next().unwrap().unwrap();
    }
    kill_process(Pid::from_child(&process), Signal::INT).unwrap();
    let rest: Vec<String> = lines.map(Result::unwrap).collect();
    assert_eq!(process.wait().unwrap().code(), Some(3));
    let last: Value = serde_json::from_str(rest.last().unwrap()).unwrap();
    assert_eq!(last["error"]["code"], "TRAIN_INTERRUPTED", "{last}");
    assert!(
        !world.folder.path().join("parts").exists(),
        "half an adapter was written"
    );
    let resumed = objects(&said(&world, &line));
    assert!(resumed[0]["step"].as_u64() > Some(20), "it began anew: {}", resumed[0]);
    let weights = |out: &str| fs::read(world.folder.path().join(out).join("adapter_model.safetensors")).unwrap();
    assert!(weights("whole") == weights("parts"));
    assert!(
        !world.folder.path().join("parts.checkpoints").exists(),
        "finished checkpoints stay"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn generate_is_repeatable_and_knows_the_adapter() {
    let (world, _) = stage().await;
    said(&world, &train_line("out", "--epochs 10"));
    let line = format!(
        "generate --model {} --prompt Hello --max-new-tokens 8 --json",
        model().display()
    );
    let greedy = objects(&said(&world, &line)).remove(0);
    assert!(
        greedy["text"].is_string() && greedy["generated_tokens"].as_u64() <= Some(8),
        "{greedy}"
    );
    assert_eq!(
        greedy["tokens"].as_array().map(|ids| ids.len() as u64),
        greedy["generated_tokens"].as_u64()
    );
    assert_eq!(objects(&said(&world, &line))[0]["tokens"], greedy["tokens"]);
    let adapted = objects(&said(&world, &format!("{line} --adapter out"))).remove(0);
    assert_ne!(adapted["tokens"], greedy["tokens"]);
    let sampled = format!("{line} --temperature 1 --seed 5");
    assert_eq!(
        objects(&said(&world, &sampled))[0]["tokens"],
        objects(&said(&world, &sampled))[0]["tokens"]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn validate_inspect_and_estimate_speak_json() {
    let (world, _) = stage().await;
    let report = &objects(&said(&world, "validate data.jsonl --json"))[0];
    assert_eq!(
        (&report["ready"], &report["report"]["examples"]),
        (&Value::Bool(true), &Value::from(8))
    );
    let shown = &objects(&said(&world, "inspect data.jsonl 2 --json"))[0];
    let tokens = shown["tokens"].as_array().unwrap();
    let learnt: String = tokens
        .iter()
        .filter(|token| token["supervised"] == true)
        .map(|token| token["text"].as_str().unwrap())
        .collect();
    assert_eq!(learnt, "After 1 comes 2. Calmly, one at a time.<|im_end|>");
    assert_eq!(shown["line"], 2);
    let estimate = &objects(&said(
        &world,
        "estimate --dataset data.jsonl --price-per-hour 3.5 --epochs 2 --batch-size 1 --json",
    ))[0];
    let held_out = estimate["held_out"].as_u64().unwrap();
    assert_eq!(estimate["examples"].as_u64().unwrap() + held_out, 8);
    assert_eq!(estimate["steps"].as_u64(), Some(2 * (8 - held_out)));
    for name in ["tokens", "tokens_per_second", "seconds", "cost"] {
        assert!(estimate[name].as_f64().unwrap() > 0.0, "{name} of {estimate}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn doctor_finds_everything_in_place_or_names_what_is_not() {
    let (mut world, _) = stage().await;
    // The free space of the disk is not this test's to know.
    let all_but_disk = |text: &str| -> Vec<String> {
        objects(text)[0]["checks"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|check| check["ok"] == false && check["name"] != "work folder")
            .map(|check| check["name"].as_str().unwrap().to_owned())
            .collect()
    };
    let (output, _, _) = spoken(&world.brightrun(&["doctor", "--json"]).output().unwrap());
    assert!(all_but_disk(&output).is_empty(), "{output}");
    world.config.model.path = Some("no-such-model".into());
    let (output, _, code) = spoken(&world.brightrun(&["doctor", "--json"]).output().unwrap());
    assert_eq!((all_but_disk(&output), code), (vec!["model".to_owned()], 3), "{output}");
}

#[tokio::test(flavor = "multi_thread")]
async fn exit_codes_tell_the_users_fault_from_wrong_usage_and_from_the_machines() {
    let (world, _) = stage().await;
    fs::write(world.folder.path().join("bad.jsonl"), "{\"messages\": []}\n").unwrap();
    fs::write(world.folder.path().join("wrong.toml"), "[train]\nlearning_rat = 1\n").unwrap();
    assert_eq!(
        failed(&world, "eval --model no-such-model --dataset data.jsonl --json"),
        (1, "MODEL_PATH_MISSING".to_owned())
    );
    let (code, told) = failed(&world, "validate bad.jsonl --json");
    assert_eq!((code, told.as_str()), (1, "DATASET_INVALID"));
    assert_eq!(
        failed(&world, "inspect data.jsonl 99 --json"),
        (1, "INSPECT_NO_EXAMPLE".to_owned())
    );
    assert_eq!(
        failed(&world, "validate data.jsonl --json --config wrong.toml"),
        (1, "CONFIG_UNKNOWN_KEY".to_owned())
    );
    assert_eq!(failed(&world, "train --no-such-flag").0, 2);
    let output = world
        .brightrun(&["status", "00000000-0000-0000-0000-000000000000", "--json"])
        .env("DATABASE_URL", "postgresql://nobody@127.0.0.1:1/none")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(3));
}

#[tokio::test(flavor = "multi_thread")]
async fn config_prints_what_it_can_read_back() {
    let (world, _) = stage().await;
    let printed: toml::Table = said(&world, "config").parse().unwrap();
    assert_eq!(printed["model"]["base_model"].as_str(), Some(crate::world::BASE_MODEL));
    let output = world
        .brightrun(&["config"])
        .env("BRIGHTRUN_TRAIN_RANK", "32")
        .output()
        .unwrap();
    let printed: toml::Table = spoken(&output).0.parse().unwrap();
    assert_eq!(printed["train"]["rank"].as_integer(), Some(32));
}

/// What the queue's commands print, with the rights of the caller who submits jobs.
fn spoken_by_owner(world: &World, arguments: &[&str]) -> (Vec<Value>, i32, String) {
    let mut command = world.brightrun(arguments);
    let (output, errors, code) = spoken(&command.env("DATABASE_URL", &world.database.url).output().unwrap());
    (objects(&output), code, errors)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_enqueued_by_command_is_trained_watched_and_found_by_status() {
    let (world, _) = stage().await;
    let user = world.user.to_string();
    let enqueue = [
        "enqueue",
        "--dataset",
        "data.jsonl",
        "--user",
        &user,
        "--rank",
        "4",
        "--epochs",
        "2",
        "--batch-size",
        "2",
        "--json",
    ];
    let (said_of, code, errors) = spoken_by_owner(&world, &enqueue);
    assert_eq!(code, 0, "{errors}");
    let job = said_of[0]["job_id"].as_str().unwrap().to_owned();
    let queued = &objects(&said(&world, &format!("status {job} --json")))[0];
    assert_eq!(queued["state"], "ready", "{queued}");

    let mut watching = world.brightrun(&["watch", &job, "--json"]).spawn().unwrap();
    let mut seen = BufReader::new(watching.stdout.take().unwrap()).lines();
    let first: Value = serde_json::from_str(&seen.next().unwrap().unwrap()).unwrap();
    assert_eq!(first["state"], "ready", "{first}");
    said(&world, "worker --until-idle");
    let seen: Vec<Value> = seen.map(|line| serde_json::from_str(&line.unwrap()).unwrap()).collect();
    assert!(watching.wait().unwrap().success());
    let last = seen.last().unwrap();
    assert_eq!(last["state"], "completed", "{last}");
    let job: Uuid = job.parse().unwrap();
    assert_eq!(
        last["result"]["artifact"]["id"],
        world.database.job(job).await["artifact_id"],
        "{last}"
    );
    let row = world.database.job(job).await;
    assert_eq!(
        (&row["hyperparameters"]["rank"], &row["total_epochs"]),
        (&4.into(), &2.into()),
        "{row:#}"
    );
    assert!(!world.adapter(job).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_cancelled_by_command_ends_and_watch_says_so() {
    let (world, _) = stage().await;
    let job = world.job(4, 1).await.to_string();
    let (replies, code, errors) = spoken_by_owner(&world, &["cancel", &job, "--json"]);
    assert_eq!((code, replies[0]["id"].as_str()), (0, Some(job.as_str())), "{errors}");
    assert_eq!(
        failed(&world, &format!("watch {job} --json")),
        (1, "JOB_CANCELLED".to_owned())
    );
    assert_eq!(world.database.job(job.parse().unwrap()).await["status"], "cancelled");
    let nobody = Uuid::nil();
    for command in ["status", "watch", "cancel"] {
        let (_, code, errors) = spoken_by_owner(&world, &[command, &nobody.to_string(), "--json"]);
        assert!(code == 1 && errors.contains("JOB_NOT_FOUND"), "{command}: {errors}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_workers_login_may_not_submit_for_a_user() {
    let (world, _) = stage().await;
    let user = world.user.to_string();
    assert_eq!(
        failed(&world, &format!("enqueue --dataset data.jsonl --user {user} --json")),
        (1, "ENQUEUE_REFUSED".to_owned())
    );
    assert_eq!(world.database.count("training_jobs", &[]).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn orchestrate_brings_a_confirmed_data_set_to_ready() {
    let world = World::new().await;
    let id = Uuid::new_v4();
    world.upload(id, &dataset(5));
    let insert = "insert into datasets (id, user_id, name, status, storage_path, file_name, file_size)
                  values ($1, $2, 'Kind answers', 'validating', $3, 'data.jsonl', 0)";
    let path = format!("{}/{id}/data.jsonl", world.user);
    world
        .database
        .owner
        .execute(insert, &[&id, &world.user, &path])
        .await
        .unwrap();
    said(&world, "orchestrate --until-idle");
    let row = world
        .database
        .json("select to_jsonb(data) from datasets data where id = $1", &[&id])
        .await;
    assert_eq!(
        (&row["status"], &row["total_training_pairs"]),
        (&"ready".into(), &5.into()),
        "{row:#}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_demo_delivers_an_adapter_and_can_be_repeated() {
    let folder = tempfile::tempdir().unwrap();
    let examples = folder.path().join("few.jsonl");
    fs::write(&examples, dataset(12)).unwrap();
    let mut adapters = Vec::new();
    for _ in 0..2 {
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_brightrun"))
            .args(["demo", "--dir", "demo", "--dataset"])
            .arg(&examples)
            .arg("--json")
            .current_dir(folder.path())
            .env_remove("DATABASE_URL")
            .output()
            .unwrap();
        let (said, errors, code) = spoken(&output);
        assert_eq!(code, 0, "{errors}");
        let told = objects(&said).pop().unwrap();
        let adapter = PathBuf::from(told["adapter"].as_str().unwrap());
        assert!(
            adapter.starts_with(folder.path().canonicalize().unwrap()) || adapter.starts_with(folder.path()),
            "{told}"
        );
        assert!(adapter.join("adapter_config.json").exists());
        adapters.push(fs::read(adapter.join("adapter_model.safetensors")).unwrap());
    }
    assert!(adapters[0] == adapters[1], "the same data and seed gave other bytes");
}
