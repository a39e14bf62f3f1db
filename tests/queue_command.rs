//! `brightrun queue …`: every command on a real database, with the exit codes and the JSON that operators script.

#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

#[path = "support/database.rs"]
#[allow(dead_code)]
mod database;

use std::process::{Command, Stdio};

use database::{Database, Run, eventually};
use serde_json::{Value, json};
use uuid::Uuid;

/// An app's database, and the program that looks at it with the owner's rights.
struct Stage {
    database: Database,
    user: Uuid,
    dataset: Uuid,
}

impl Stage {
    async fn new() -> Self {
        let database = Database::migrated().await;
        let user = database.user().await;
        let dataset = database.ready_dataset(user).await;
        Self {
            database,
            user,
            dataset,
        }
    }

    async fn job(&self) -> Uuid {
        self.database
            .signed_in(self.user)
            .await
            .insert_job(self.dataset)
            .await
            .unwrap()
    }

    fn command(&self, line: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_brightrun"));
        command
            .arg("queue")
            .args(line.split(' '))
            .env("DATABASE_URL", &self.database.url)
            .env_remove("BRIGHTRUN_CONFIG")
            .env_remove("RUST_LOG")
            .current_dir(std::env::temp_dir())
            .stdin(Stdio::null());
        command
    }

    /// Standard output and exit code.
    fn told(&self, line: &str) -> (String, i32) {
        let output = self.command(line).output().unwrap();
        let code = output.status.code().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(code == 0 || !errors.is_empty(), "{line} failed without a word");
        (String::from_utf8(output.stdout).unwrap(), code)
    }

    /// The JSON of a command that must succeed.
    fn json(&self, line: &str) -> Value {
        let (output, code) = self.told(&format!("{line} --json"));
        assert_eq!(code, 0, "{line}: {output}");
        serde_json::from_str(output.trim()).unwrap()
    }

    /// The code of a failure, and the exit code.
    fn failure(&self, line: &str) -> (String, i32) {
        let (output, code) = self.told(&format!("{line} --json"));
        let told: Value = serde_json::from_str(output.lines().last().unwrap()).unwrap();
        (told["error"]["code"].as_str().unwrap().to_owned(), code)
    }
}

async fn failed(stage: &Stage, code: &str) -> Uuid {
    let job = stage.job().await;
    let run = Run::claim(&stage.database, "train").await;
    run.fail(json!({ "code": code, "blame": "user", "message": "It broke." }))
        .await;
    job
}

#[tokio::test]
async fn stats_top_and_explain_say_what_waits_what_runs_and_why() {
    let stage = Stage::new().await;
    assert_eq!(stage.told("stats"), ("Nothing.\n".to_owned(), 0));
    let running = stage.job().await;
    let _run = Run::claim(&stage.database, "train").await;
    let waiting = stage.job().await;
    let stats = stage.json("stats");
    let line = stats
        .as_array()
        .unwrap()
        .iter()
        .find(|line| line["kind"] == "train")
        .unwrap();
    assert_eq!((&line["ready"], &line["running"]), (&json!(1), &json!(1)));
    assert!(stage.told("stats").0.contains("default/train: 1 ready"));
    assert_eq!(stage.json("top")[0]["job_id"], json!(running));
    assert!(stage.told("top").0.contains("on worker-1"));
    let why = stage.json(&format!("explain {waiting}"));
    assert!(
        why[0]
            .as_str()
            .unwrap()
            .starts_with("0 jobs of its kind are before it, and 1 run"),
        "{why}"
    );
    assert!(
        stage
            .told(&format!("explain {running}"))
            .0
            .starts_with("It runs in attempt 1 of 3")
    );
}

#[tokio::test]
async fn requeue_gives_failed_jobs_another_chance_one_or_many() {
    let stage = Stage::new().await;
    let (one, two, three) = (
        failed(&stage, "DATA_BAD").await,
        failed(&stage, "DATA_BAD").await,
        failed(&stage, "GPU_LOST").await,
    );
    assert_eq!(stage.json(&format!("requeue {one}")), json!({ "requeued": 1 }));
    assert_eq!(
        stage.failure(&format!("requeue {one}")),
        ("JOB_NOT_FAILED".to_owned(), 1)
    );
    assert_eq!(
        stage.failure(&format!("requeue {}", Uuid::nil())),
        ("JOB_MISSING".to_owned(), 1)
    );
    assert_eq!(
        stage.json("requeue --kind train --code DATA_BAD --limit 9"),
        json!({ "requeued": 1 })
    );
    for (job, state) in [(one, "ready"), (two, "ready"), (three, "failed")] {
        assert_eq!(stage.database.engine_state(job).await.as_deref(), Some(state));
    }
    assert_eq!(
        stage.database.job(two).await["status"],
        "queued",
        "the app sees it as well"
    );
    assert_eq!(stage.told("requeue").1, 2, "of what?");
}

#[tokio::test]
async fn a_paused_queue_is_drained_when_its_last_run_has_ended() {
    let stage = Stage::new().await;
    stage.job().await;
    let run = Run::claim(&stage.database, "train").await;
    stage.job().await;
    assert_eq!(stage.json("pause --reason deploy"), json!({ "running": 1 }));
    let paused = "brightrun.queue_setting where paused and reason = 'deploy'";
    assert_eq!(stage.database.count(paused, &[]).await, 1);
    let mut draining = stage.command("drain --json").stdout(Stdio::piped()).spawn().unwrap();
    // It waits as long as something runs: it has looked when the reason of the pause is its own.
    eventually("drain has looked", || async {
        stage
            .database
            .count("brightrun.queue_setting where paused and reason is null", &[])
            .await
            == 1
    })
    .await;
    assert!(draining.try_wait().unwrap().is_none());
    run.release("deploy").await;
    let output = draining.wait_with_output().unwrap();
    assert!(output.status.success());
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "{\"running\":0}");
    let claim = "brightrun.claim('w', '{train}', 9)";
    assert_eq!(stage.database.count(claim, &[]).await, 0);
    assert_eq!(stage.json("resume"), json!({ "resumed": true }));
    assert_eq!(stage.json("resume"), json!({ "resumed": false }));
    assert_eq!(stage.database.count(claim, &[]).await, 2);
}

#[tokio::test]
async fn prune_forgets_what_ended_long_ago() {
    let stage = Stage::new().await;
    let old = failed(&stage, "OLD").await;
    let young = failed(&stage, "YOUNG").await;
    let aged = "update brightrun.job set created_at = created_at - interval '40 days', started_at = started_at - interval '40 days',
                finished_at = finished_at - interval '40 days' where id = $1";
    let guarded = "alter table brightrun.job disable trigger job_terminal_is_final";
    stage.database.owner.batch_execute(guarded).await.unwrap();
    stage.database.owner.execute(aged, &[&old]).await.unwrap();
    assert_eq!(stage.json("prune --days 41"), json!({ "pruned": 0 }));
    assert_eq!(stage.json("prune --days 30"), json!({ "pruned": 1 }));
    assert_eq!(stage.database.engine_state(old).await, None);
    assert!(stage.database.engine_state(young).await.is_some());
}

#[tokio::test]
async fn the_doctor_ends_well_on_a_healthy_queue_and_with_three_on_a_sick_one() {
    let stage = Stage::new().await;
    let (output, code) = stage.told("doctor");
    assert_eq!(code, 0, "{output}");
    assert!(output.contains("ok   one_baton"), "{output}");
    let job = stage.job().await;
    let lost = "delete from brightrun.ready where job_id = $1";
    stage.database.owner.execute(lost, &[&job]).await.unwrap();
    let (output, code) = stage.told("doctor");
    assert_eq!(code, 3);
    assert!(
        output.contains("BAD  one_baton: 1 jobs are not in exactly one place"),
        "{output}"
    );
    assert_eq!(stage.failure("doctor"), ("QUEUE_UNHEALTHY".to_owned(), 3));
}

/// The families that the runbook lists.
#[tokio::test]
async fn metrics_have_the_families_of_the_runbook() {
    let stage = Stage::new().await;
    failed(&stage, "GPU_LOST").await;
    stage.job().await;
    let _run = Run::claim(&stage.database, "train").await;
    stage.job().await;
    stage
        .database
        .owner
        .batch_execute("select brightrun.rescue_expired(); select brightrun.pause('other'); select brightrun.outbox_put('webhook', '{}')")
        .await
        .unwrap();
    let (output, code) = stage.told("metrics");
    assert_eq!(code, 0);
    let runbook = include_str!("../docs/guides/runbook.md");
    let section = runbook
        .split("## Metrics")
        .nth(1)
        .unwrap()
        .split("\n## ")
        .next()
        .unwrap();
    let listed: Vec<&str> = section
        .split('`')
        .skip(1)
        .step_by(2)
        .filter(|word| word.starts_with("brightrun_queue_"))
        .collect();
    let families: Vec<&str> = output
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next())
        .collect();
    assert!(families.len() >= 10, "{output}");
    for family in &families {
        assert!(listed.contains(family), "{family} is not in the runbook");
    }
    for family in listed {
        let is_there = families.contains(&family) || family == "brightrun_queue_lane_jobs";
        assert!(is_there, "{family} of the runbook is not exposed:\n{output}");
    }
}

#[tokio::test]
async fn limits_rates_budgets_and_cancels_by_the_kind_are_commands() {
    let stage = Stage::new().await;
    let user = stage.user;
    for _ in 0..3 {
        stage.job().await;
    }
    stage.json("rate --queue default --starts 1 --seconds 3600");
    let claim = "brightrun.claim('w', '{train}', 9)";
    assert_eq!(stage.database.count(claim, &[]).await, 1);
    stage.json("rate --queue default");
    assert_eq!(
        stage.failure("rate --starts 1"),
        ("QUEUE_LIMIT_OF_NOBODY".to_owned(), 1)
    );
    stage.json(&format!("limit --owner {user} --at-most 2"));
    let rule = "brightrun.limit_rule where scope = 'owner' and at_most = 2";
    assert_eq!(stage.database.count(rule, &[]).await, 1);

    assert_eq!(stage.json(&format!("budget {user}")), json!({ "budget": null }));
    let set = stage.json(&format!("budget {user} --amount 150 --period day"));
    assert_eq!(
        (&set["budget"]["budget"], &set["budget"]["period"]),
        (&json!(150.0), &json!("day"))
    );
    assert!(
        stage
            .told(&format!("budget {user}"))
            .0
            .starts_with("0.00 of 150.00 are spent since ")
    );
    assert_eq!(
        stage.json(&format!("budget {user} --unlimited")),
        json!({ "budget": null })
    );

    assert_eq!(
        stage.json(&format!("cancel --kind train --owner {}", Uuid::nil())),
        json!({ "cancelled": 0 })
    );
    assert_eq!(
        stage.json(&format!("cancel --kind train --owner {user} --limit 9")),
        json!({ "cancelled": 3 })
    );
}
