//! The engine on a newer PostgreSQL than the one at hand: `scripts/fetch-test-assets` brings its programs, and this test binary runs
//! itself again on that server. `BRIGHTRUN_POSTGRES_BIN` runs everything on any server.

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use brightrun_queue::private_server::testing::fresh_database;

use crate::support::connect;

/// Set for the second run: the major version that the server there must have.
const EXPECTED: &str = "BRIGHTRUN_TEST_EXPECT_MAJOR";

/// What is run again: the model of the state machine, and whatever is most likely to depend on the server.
const AGAIN: [&str; 11] = [
    "state_machine::",
    "features::",
    "budgets::",
    "rates::",
    "machines::",
    "outside::",
    "access::",
    "invariants::",
    "fencing::",
    "lane::",
    "newest::the_whole_schema",
];

/// The fetched programs.
fn programs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../.brightrun/postgres")
}

/// The programs where any user may run them: the server's own is not the one that owns this folder.
fn reachable(programs: &Path, copies: &Path) -> PathBuf {
    let is_open = |path: &Path| {
        path.metadata()
            .is_ok_and(|found| found.permissions().mode() & 0o005 == 0o005)
    };
    let programs = programs.canonicalize().unwrap();
    if programs.ancestors().all(is_open) {
        return programs;
    }
    std::fs::set_permissions(copies, PermissionsExt::from_mode(0o755)).unwrap();
    let copied = Command::new("cp")
        .arg("-a")
        .arg(&programs)
        .arg(copies)
        .status()
        .unwrap();
    assert!(copied.success());
    copies.join(programs.file_name().unwrap())
}

fn major(programs: &Path) -> u32 {
    let output = Command::new(programs.join("bin/postgres"))
        .arg("--version")
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let version = text.split_whitespace().last().unwrap();
    version.split('.').next().unwrap().parse().unwrap()
}

#[test]
fn what_holds_here_holds_on_the_newest_server() {
    if std::env::var_os(EXPECTED).is_some() {
        return; // This is the second run.
    }
    if !programs().join("bin/postgres").exists() {
        // Past the capture of a test's output: what was not tried is to be seen.
        let told = "not run: the engine on the newest PostgreSQL (scripts/fetch-test-assets did not bring it)\n";
        std::io::stderr().write_all(told.as_bytes()).unwrap();
        return;
    }
    let copies = tempfile::tempdir().unwrap();
    let programs = reachable(&programs(), copies.path());
    let major = major(&programs);
    assert!(major >= 18, "the fetched server is of version {major}");
    let output = Command::new(std::env::current_exe().unwrap())
        .args(AGAIN)
        .args(["--test-threads", "2"])
        .env("BRIGHTRUN_POSTGRES_BIN", &programs)
        .env(EXPECTED, major.to_string())
        .env_remove("BRIGHTRUN_TEST_DATABASE_URL")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "PostgreSQL {major}:\n{said}");
    let passed = said.split("test result: ok. ").nth(1).unwrap();
    let passed: u32 = passed.split(' ').next().unwrap().parse().unwrap();
    assert!(passed > 50, "only {passed} tests were run again:\n{said}");
}

/// All of the file, twice: the app's tables, the projection and the dispatch as well; and a job on its way through them.
#[tokio::test]
async fn the_whole_schema_takes_a_job_from_the_apps_row_to_its_end() {
    let url = fresh_database("whole").await.unwrap();
    let client = connect(&url).await;
    if let Ok(expected) = std::env::var(EXPECTED) {
        let major: i32 = client
            .query_one("select current_setting('server_version_num')::integer / 10000", &[])
            .await
            .unwrap()
            .get(0);
        assert_eq!(major.to_string(), expected, "the server is the one that was named");
    }
    for _ in 0..2 {
        client
            .batch_execute(include_str!("../../../schema.sql"))
            .await
            .unwrap_or_else(|error| panic!("{error:?}"));
    }
    client
        .batch_execute(
            "insert into auth.users (id) values ('00000000-0000-4000-8000-000000000001');
             insert into datasets (id, user_id, name, status, training_ready, storage_path, file_name, file_size)
               values ('00000000-0000-4000-8000-000000000002', '00000000-0000-4000-8000-000000000001', 'd', 'ready', true, 'p', 'f', 1);
             insert into training_jobs (user_id, dataset_id, preset_id, hyperparameters, gpu_config, total_epochs, estimated_total_cost)
               values ('00000000-0000-4000-8000-000000000001', '00000000-0000-4000-8000-000000000002', 'fast', '{}', '{}', 1, 0);
             select brightrun.fail(job_id, token, '{\"code\": \"DATA_EMPTY\", \"blame\": \"user\", \"message\": \"No lines.\"}')
               from brightrun.claim('w', '{train}');",
        )
        .await
        .unwrap();
    let status: String = client
        .query_one("select status from training_jobs", &[])
        .await
        .unwrap()
        .get(0);
    assert_eq!(status, "failed");
}
