//! The private Postgres: it starts, restarts, and is gone when its owner is.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use brightrun_queue::QueueConfig;
use brightrun_queue::private_server::{Options, PrivateServer, ServerError};

async fn one_plus_one(url: &str) -> Result<i32, String> {
    let place = QueueConfig::new(url).map_err(|error| error.to_string())?.place();
    assert!(!place.host.is_empty());
    let (client, connection) = tokio_postgres::connect(url, tokio_postgres::NoTls)
        .await
        .map_err(|error| error.to_string())?;
    tokio::spawn(connection);
    let row = client
        .query_one("select 1 + 1", &[])
        .await
        .map_err(|error| error.to_string())?;
    Ok(row.get(0))
}

fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !holds() {
        assert!(Instant::now() < deadline, "not within 30 s: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn process_exists(pid: &str) -> bool {
    Path::new("/proc").join(pid).join("stat").exists()
}

fn postmaster_pid(folder: &Path) -> String {
    let text = std::fs::read_to_string(folder.join("data/postmaster.pid")).unwrap();
    text.lines().next().unwrap().to_owned()
}

#[tokio::test]
async fn answers_on_socket_and_loopback_survives_a_crash_and_leaves_nothing() {
    let options = Options {
        loopback: true,
        ..Options::default()
    };
    let mut server = PrivateServer::start(&options).unwrap();
    let folder = server.folder().to_owned();
    let pid = postmaster_pid(&folder);
    let url = server.create_database("app").await.unwrap();
    assert_eq!(
        server.create_database("app").await.unwrap(),
        url,
        "creating again is no error"
    );
    assert_eq!(one_plus_one(&url).await, Ok(2));
    let loopback = server.loopback_url("app").unwrap();
    assert_eq!(one_plus_one(&loopback).await, Ok(2));
    let wrong = loopback.replace("postgres:", "postgres:not-");
    assert!(one_plus_one(&wrong).await.is_err(), "loopback asks for the password");

    server.halt_immediate().unwrap();
    assert!(one_plus_one(&url).await.is_err());
    server.resume().unwrap();
    assert_eq!(one_plus_one(&url).await, Ok(2));

    server.stop().unwrap();
    assert!(!process_exists(&pid));
    assert!(!folder.exists());
}

#[tokio::test]
async fn a_named_folder_is_kept_and_used_again() {
    let parent = tempfile::Builder::new()
        .prefix("brightrun-kept")
        .tempdir_in("/tmp")
        .unwrap();
    std::fs::set_permissions(parent.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let options = Options {
        folder: Some(parent.path().join("cluster")),
        ..Options::default()
    };
    let server = PrivateServer::start(&options).unwrap();
    server.create_database("kept").await.unwrap();
    drop(server);
    let server = PrivateServer::start(&options).unwrap();
    assert_eq!(one_plus_one(&server.url("kept")).await, Ok(2));
}

#[test]
fn a_folder_with_other_files_is_not_touched() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("thesis.txt"), "mine").unwrap();
    let options = Options {
        folder: Some(folder.path().to_owned()),
        ..Options::default()
    };
    let error = PrivateServer::start(&options).unwrap_err();
    assert!(matches!(error, ServerError::FolderInUse { .. }), "{error}");
}

/// Runs as a child of the next test: starts a server, tells where, and waits to be killed.
#[test]
fn child_that_is_to_be_killed() {
    let Ok(report) = std::env::var("BRIGHTRUN_TEST_REPORT") else {
        return;
    };
    let server = PrivateServer::start(&Options::default()).unwrap();
    let told = format!("{}\n{}", server.folder().display(), postmaster_pid(server.folder()));
    std::fs::write(format!("{report}.new"), told).unwrap();
    std::fs::rename(format!("{report}.new"), &report).unwrap();
    loop {
        std::thread::park();
    }
}

#[test]
fn nothing_is_left_when_the_owner_is_killed() {
    let folder = tempfile::tempdir().unwrap();
    let report = folder.path().join("report");
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child_that_is_to_be_killed", "--nocapture"])
        .env("BRIGHTRUN_TEST_REPORT", &report)
        .spawn()
        .unwrap();
    wait_until("the child has a server", || report.exists());
    let text = std::fs::read_to_string(&report).unwrap();
    let (server_folder, pid) = text.split_once('\n').unwrap();
    assert!(process_exists(pid));
    child.kill().unwrap();
    child.wait().unwrap();
    wait_until("the server is gone", || !process_exists(pid));
    wait_until("its folder is gone", || !Path::new(server_folder).exists());
}
