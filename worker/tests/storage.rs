//! The storages keep one contract: a folder, the Supabase stand-in and a real S3 server.

#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::http::Method;
use brightrun_worker::error::{Blame, Failure};
use brightrun_worker::secret::Secret;
use brightrun_worker::storage::config::S3Config;
use brightrun_worker::storage::retry::RetryPolicy;
use brightrun_worker::storage::url_source::PlainHttp;
use brightrun_worker::storage::{HttpOptions, OCTET_STREAM, ObjectEntry, Storage, StorageConfig, UrlSource, open};
use sha2::{Digest, Sha256};
use tempfile::TempDir;
use url::Url;

#[path = "../../tests/support/s3_server.rs"]
mod s3_server;
#[path = "../../tests/support/supabase_storage.rs"]
mod supabase_storage;

use supabase_storage::{Effect, SupabaseStandIn};

const LEGACY_KEY: &str = "fake-legacy-jwt-canary";
const SECRET_KEY: &str = "sb_secret_fake-canary";
const S3_ID: &str = "fake-id-canary";
const S3_KEY: &str = "fake-secret-canary";
const BUCKET: &str = "lora-models";

fn options() -> HttpOptions {
    HttpOptions {
        idle_timeout: Duration::from_secs(20),
        retry: RetryPolicy {
            attempts: 4,
            first_pause: Duration::from_millis(1),
            longest_pause: Duration::from_millis(20),
        },
        ..HttpOptions::default()
    }
}

fn connect(url: &str, key: &str, options: &HttpOptions) -> Arc<dyn Storage> {
    let config = StorageConfig::Supabase {
        url: Url::parse(url).unwrap(),
        key: Secret::new(key),
    };
    open(&config, options).unwrap()
}

async fn supabase_with(key: &str, options: &HttpOptions) -> (SupabaseStandIn, Arc<dyn Storage>) {
    let server = SupabaseStandIn::start(&[LEGACY_KEY, SECRET_KEY]).await;
    let storage = connect(&server.url, key, options);
    (server, storage)
}

async fn supabase() -> (SupabaseStandIn, Arc<dyn Storage>) {
    supabase_with(SECRET_KEY, &options()).await
}

fn s3_config(endpoint: &str) -> S3Config {
    S3Config {
        endpoint: Some(Url::parse(endpoint).unwrap()),
        region: "us-east-1".to_owned(),
        access_key_id: Secret::new(S3_ID),
        secret_access_key: Secret::new(S3_KEY),
        session_token: None,
        bucket: None,
        prefix: String::new(),
    }
}

async fn s3(root: &Path) -> (String, Arc<dyn Storage>) {
    std::fs::create_dir_all(root.join(BUCKET)).unwrap();
    let endpoint = s3_server::start(root, S3_ID, S3_KEY).await;
    let storage = open(&StorageConfig::S3(s3_config(&endpoint)), &options()).unwrap();
    (endpoint, storage)
}

fn local(root: &Path) -> Arc<dyn Storage> {
    open(
        &StorageConfig::Local {
            root: root.to_path_buf(),
        },
        &options(),
    )
    .unwrap()
}

/// Bytes that differ everywhere, so that a swapped or repeated part shows.
fn content(bytes: usize) -> Vec<u8> {
    let mut state = 1_u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 56) as u8
    };
    (0..bytes).map(|_| next()).collect()
}

fn sha256(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

fn file_with(folder: &TempDir, bytes: &[u8]) -> PathBuf {
    let file = folder.path().join(format!("source-{}", bytes.len()));
    std::fs::write(&file, bytes).unwrap();
    file
}

#[track_caller]
fn check_failure(failure: &Failure, code: &str, blame: Blame) {
    assert_eq!((failure.code.as_str(), failure.blame), (code, blame), "{failure}");
    let everything = format!("{failure} {failure:?} {}", serde_json::to_string(failure).unwrap());
    assert!(!everything.contains("canary"), "a credential leaked: {everything}");
}

/// What every storage promises.
async fn check_contract(storage: &dyn Storage, large_bytes: usize) {
    check_whole_files(storage, large_bytes).await;
    check_replacing_and_listing(storage).await;
    check_absence(storage).await;
    check_refusals(storage).await;
}

async fn check_whole_files(storage: &dyn Storage, large_bytes: usize) {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("back/again.bin");
    for bytes in [0, 1, 70_000, large_bytes] {
        let source = content(bytes);
        let file = file_with(&folder, &source);
        let path = format!("user/artifact/file (1)+{bytes}.bin");
        let put = storage.put_file(BUCKET, &path, &file, OCTET_STREAM).await.unwrap();
        assert_eq!(put.bytes, bytes as u64);
        let fetched = storage.get_to_file(BUCKET, &path, &target).await.unwrap();
        assert_eq!((fetched.bytes, &fetched.sha256), (bytes as u64, &sha256(&source)));
        assert!(std::fs::read(&target).unwrap() == source);
        let head = storage.head(BUCKET, &path).await.unwrap();
        assert_eq!(head.unwrap().bytes, bytes as u64);
        assert_eq!(fetched.not_empty("there").is_ok(), bytes > 0);
        storage.delete(BUCKET, &path).await.unwrap();
    }
}

async fn check_replacing_and_listing(storage: &dyn Storage) {
    let path = "user/artifact/a.json";
    for text in ["first, longer", "second"] {
        storage
            .put_bytes(BUCKET, path, text.into(), OCTET_STREAM)
            .await
            .unwrap();
        let read = storage.get_bytes(BUCKET, path, 100).await.unwrap();
        assert_eq!(read, text, "writing replaces");
    }
    let too_large = storage.get_bytes(BUCKET, path, 3).await.unwrap_err();
    check_failure(&too_large, "STORAGE_OBJECT_TOO_LARGE", Blame::User);
    let inner = "user/artifact/inner/b.json";
    storage
        .put_bytes(BUCKET, inner, "x".into(), OCTET_STREAM)
        .await
        .unwrap();
    let listed = storage.list(BUCKET, "user/artifact").await.unwrap();
    let only = ObjectEntry {
        name: "a.json".to_owned(),
        bytes: 6,
    };
    assert_eq!(listed, [only], "a folder's own objects only");
    let url = storage.signed_url(BUCKET, path, 60).await.unwrap();
    assert_eq!(read_url(&url).await, b"second");
    storage.delete(BUCKET, path).await.unwrap();
}

async fn check_absence(storage: &dyn Storage) {
    let path = "user/artifact/absent.json";
    storage
        .delete(BUCKET, path)
        .await
        .expect("deleting what is not there succeeds");
    assert_eq!(storage.head(BUCKET, path).await.unwrap(), None);
    assert_eq!(storage.list(BUCKET, "user/nothing").await.unwrap(), []);
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("x");
    let missing = storage.get_to_file(BUCKET, path, &target).await.unwrap_err();
    check_failure(&missing, "STORAGE_OBJECT_MISSING", Blame::User);
    assert!(missing.place.contains(path), "{missing}");
    storage.probe(BUCKET, "user/probes").await.unwrap();
    assert_eq!(
        storage.list(BUCKET, "user/probes").await.unwrap(),
        [],
        "a probe leaves nothing"
    );
}

async fn check_refusals(storage: &dyn Storage) {
    for path in ["../x", "a/../../x", "/x", ""] {
        let refused = storage.put_bytes(BUCKET, path, "x".into(), OCTET_STREAM).await;
        check_failure(&refused.unwrap_err(), "STORAGE_NAME_INVALID", Blame::User);
        let refused = storage.get_to_file(BUCKET, path, Path::new("/nonexistent/x")).await;
        check_failure(&refused.unwrap_err(), "STORAGE_NAME_INVALID", Blame::User);
    }
    let absent = Path::new("/nonexistent/file");
    let unreadable = storage.put_file(BUCKET, "a/b", absent, OCTET_STREAM).await.unwrap_err();
    check_failure(&unreadable, "STORAGE_IO", Blame::System);
    assert!(unreadable.place.contains("/nonexistent/file"), "{unreadable}");
}

async fn read_url(url: &Secret) -> Vec<u8> {
    if url.expose().starts_with("file:") {
        return std::fs::read(Url::parse(url.expose()).unwrap().to_file_path().unwrap()).unwrap();
    }
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("x");
    let source = UrlSource::new(options(), PlainHttp::Allowed).unwrap();
    source.fetch(url, &target).await.unwrap();
    std::fs::read(target).unwrap()
}

#[tokio::test]
async fn a_folder_keeps_the_contract() {
    let root = tempfile::tempdir().unwrap();
    check_contract(&*local(&root.path().join("made/on/demand")), 3 << 20).await;
}

#[tokio::test]
async fn supabase_keeps_the_contract_with_either_kind_of_key() {
    for key in [LEGACY_KEY, SECRET_KEY] {
        let (server, storage) = supabase_with(key, &options()).await;
        // Two whole parts and a rest.
        check_contract(&*storage, (13 << 20) + 5).await;
        let requests = server.requests();
        let parts = requests.iter().filter(|line| line.starts_with("PATCH")).count();
        assert_eq!(parts, 3, "a large file goes in parts of 6 MiB");
    }
}

#[tokio::test]
async fn s3_keeps_the_contract() {
    let root = tempfile::tempdir().unwrap();
    let (_, storage) = s3(root.path()).await;
    // Above the part size of 16 MiB, so that a real multipart upload happens.
    check_contract(&*storage, (33 << 20) + 5).await;
}

#[tokio::test]
async fn one_s3_bucket_can_hold_all_of_ours_under_a_prefix() {
    let root = tempfile::tempdir().unwrap();
    let (endpoint, _) = s3(root.path()).await;
    std::fs::create_dir_all(root.path().join("everything")).unwrap();
    let config = S3Config {
        bucket: Some("everything".to_owned()),
        prefix: "some/where".to_owned(),
        ..s3_config(&endpoint)
    };
    let storage = open(&StorageConfig::S3(config), &options()).unwrap();
    check_contract(&*storage, 100_000).await;
    storage
        .put_bytes(BUCKET, "u/a/x", "x".into(), OCTET_STREAM)
        .await
        .unwrap();
    assert!(root.path().join("everything/some/where/lora-models/u/a/x").exists());
}

#[tokio::test]
async fn a_wrong_key_is_the_configurations_fault() {
    let (server, _) = supabase().await;
    let storage = connect(&server.url, "fake-wrong-canary", &options());
    let failure = storage.probe(BUCKET, "user").await.unwrap_err();
    check_failure(&failure, "STORAGE_FORBIDDEN", Blame::System);
    assert!(failure.hint.contains("SUPABASE_SERVICE_ROLE_KEY"), "{failure}");
    assert_eq!(server.requests().len(), 1, "a refused key is not tried again");

    let root = tempfile::tempdir().unwrap();
    let (endpoint, _) = s3(root.path()).await;
    let wrong = S3Config {
        secret_access_key: Secret::new("fake-wrong-canary"),
        ..s3_config(&endpoint)
    };
    let storage = open(&StorageConfig::S3(wrong), &options()).unwrap();
    let failure = storage.probe(BUCKET, "user").await.unwrap_err();
    check_failure(&failure, "STORAGE_FORBIDDEN", Blame::System);
}

#[tokio::test]
async fn a_missing_bucket_is_the_configurations_fault() {
    let (_, storage) = supabase().await;
    let put = storage
        .put_bytes("no-such-bucket", "a/b", "x".into(), OCTET_STREAM)
        .await;
    check_failure(&put.unwrap_err(), "STORAGE_BUCKET_MISSING", Blame::System);
    let read = storage.get_bytes("no-such-bucket", "a/b", 9).await;
    check_failure(&read.unwrap_err(), "STORAGE_BUCKET_MISSING", Blame::System);
}

#[tokio::test]
async fn a_service_that_recovers_is_not_noticed() {
    let (server, storage) = supabase().await;
    let data = content(50_000);
    server.seed(BUCKET, "u/data.jsonl", &data);
    server.fail(Method::GET, "object/authenticated", 1, Effect::Status(500, None));
    server.fail(Method::GET, "object/authenticated", 1, Effect::Status(429, Some(0)));
    server.fail(Method::GET, "object/authenticated", 1, Effect::CutAfter(20_000));
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("x");
    let fetched = storage.get_to_file(BUCKET, "u/data.jsonl", &target).await.unwrap();
    assert_eq!(fetched.sha256, sha256(&data));

    server.fail(Method::POST, "u/up.bin", 2, Effect::Status(503, None));
    let file = file_with(&folder, &data);
    storage.put_file(BUCKET, "u/up.bin", &file, OCTET_STREAM).await.unwrap();
    assert!(server.object(BUCKET, "u/up.bin").unwrap() == data);
}

#[tokio::test]
async fn a_service_that_stays_broken_is_the_platforms_fault() {
    let (server, storage) = supabase().await;
    server.seed(BUCKET, "u/data", b"content");
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("x");
    let cases = [
        (Effect::Status(502, None), "STORAGE_UNAVAILABLE"),
        (Effect::Echo(500), "STORAGE_UNAVAILABLE"),
        (Effect::CutAfter(3), "STORAGE_TRUNCATED"),
    ];
    for (effect, code) in cases {
        server.fail(Method::GET, "object/authenticated", 4, effect);
        let failure = storage.get_to_file(BUCKET, "u/data", &target).await.unwrap_err();
        check_failure(&failure, code, Blame::Platform);
        assert!(!target.exists(), "half a file must not appear");
    }
    server.fail(Method::GET, "object/authenticated", 1, Effect::Echo(403));
    let failure = storage.get_to_file(BUCKET, "u/data", &target).await.unwrap_err();
    check_failure(&failure, "STORAGE_FORBIDDEN", Blame::System);
}

#[tokio::test]
async fn a_service_that_never_answers_or_is_not_there_is_unreachable() {
    let impatient = HttpOptions {
        idle_timeout: Duration::from_millis(50),
        ..options()
    };
    let (server, storage) = supabase_with(SECRET_KEY, &impatient).await;
    server.fail(Method::GET, "object/authenticated", 4, Effect::Hang);
    let folder = tempfile::tempdir().unwrap();
    let silent = storage.get_to_file(BUCKET, "u/data", &folder.path().join("x")).await;
    check_failure(&silent.unwrap_err(), "STORAGE_UNREACHABLE", Blame::Platform);

    let free = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let nobody = connect(&format!("http://{free}"), SECRET_KEY, &options());
    let failure = nobody.probe(BUCKET, "u").await.unwrap_err();
    check_failure(&failure, "STORAGE_UNREACHABLE", Blame::Platform);
}

#[tokio::test]
async fn a_resumable_upload_survives_faults_at_every_step() {
    let source = content((13 << 20) + 5);
    let folder = tempfile::tempdir().unwrap();
    let file = file_with(&folder, &source);
    let steps = [
        (Method::POST, Effect::Status(500, None)),
        (Method::PATCH, Effect::Status(503, None)),
        (Method::PATCH, Effect::WorkThenStatus(502)),
        (Method::PATCH, Effect::Status(409, None)),
        (Method::PATCH, Effect::ForgetUploads),
        (Method::HEAD, Effect::Status(500, None)),
    ];
    for (method, effect) in steps {
        let (server, storage) = supabase().await;
        if method == Method::HEAD {
            server.fail(Method::PATCH, "upload/resumable", 1, Effect::Status(500, None));
        }
        server.fail(method.clone(), "upload/resumable", 1, effect.clone());
        let put = storage.put_file(BUCKET, "u/a/large.bin", &file, OCTET_STREAM).await;
        assert_eq!(
            put.map(|info| info.bytes),
            Ok(source.len() as u64),
            "{method} {effect:?}"
        );
        assert!(
            server.object(BUCKET, "u/a/large.bin").unwrap() == source,
            "{method} {effect:?}"
        );
    }
}

#[tokio::test]
async fn a_resumable_upload_whose_last_answer_is_lost_is_complete() {
    let source = content((7 << 20) + 5);
    let folder = tempfile::tempdir().unwrap();
    let file = file_with(&folder, &source);
    let (server, storage) = supabase().await;
    // The upload is finished and forgotten; the answer to its last part is lost.
    server.fail_after(Method::PATCH, "upload/resumable", 1, Effect::WorkThenStatus(502));
    let put = storage.put_file(BUCKET, "u/a/large.bin", &file, OCTET_STREAM).await;
    assert_eq!(put.map(|info| info.bytes), Ok(source.len() as u64));
    assert!(server.object(BUCKET, "u/a/large.bin").unwrap() == source);
}

#[tokio::test]
async fn limits_of_a_bucket_are_named() {
    let (server, storage) = supabase().await;
    server.limit(BUCKET, 1000, &[]);
    let folder = tempfile::tempdir().unwrap();
    for bytes in [1001, (6 << 20) + 1] {
        let file = file_with(&folder, &content(bytes));
        let failure = storage.put_file(BUCKET, "u/x", &file, OCTET_STREAM).await.unwrap_err();
        check_failure(&failure, "STORAGE_TOO_LARGE", Blame::System);
    }
    server.limit(BUCKET, 1000, &["application/json"]);
    let failure = storage
        .put_bytes(BUCKET, "u/x", "x".into(), OCTET_STREAM)
        .await
        .unwrap_err();
    check_failure(&failure, "STORAGE_TYPE_REFUSED", Blame::System);
}

#[tokio::test]
async fn an_upload_that_arrives_incomplete_is_not_believed() {
    let (server, storage) = supabase().await;
    server.fail(Method::POST, "u/x", 1, Effect::StoreHalf);
    let put = storage.put_bytes(BUCKET, "u/x", "123456".into(), OCTET_STREAM).await;
    let failure = put.unwrap_err();
    check_failure(&failure, "STORAGE_SIZE_MISMATCH", Blame::Platform);
    assert!(failure.message.contains("3 bytes"), "{failure}");
}

#[tokio::test]
async fn a_duplicate_answer_to_a_replacing_post_becomes_a_put() {
    let (server, storage) = supabase().await;
    server.fail(Method::POST, "u/x", 1, Effect::Status(409, None));
    storage
        .put_bytes(BUCKET, "u/x", "new".into(), OCTET_STREAM)
        .await
        .unwrap();
    assert!(server.requests().iter().any(|line| line.starts_with("PUT ")));
    assert_eq!(server.object(BUCKET, "u/x").unwrap(), "new");
}

#[tokio::test]
async fn a_signed_url_is_read_and_its_expiry_is_its_givers_to_mend() {
    let (server, storage) = supabase().await;
    server.seed("lora-datasets", "u/d/données 100% ?#1.jsonl", b"{}");
    let url = storage
        .signed_url("lora-datasets", "u/d/données 100% ?#1.jsonl", 60)
        .await
        .unwrap();
    assert_eq!(read_url(&url).await, b"{}");
    server.expire_signed_urls();
    let folder = tempfile::tempdir().unwrap();
    let source = UrlSource::new(options(), PlainHttp::Allowed).unwrap();
    let token = url.expose().split_once("token=").unwrap().1.to_owned();
    let failure = source.fetch(&url, &folder.path().join("x")).await.unwrap_err();
    check_failure(&failure, "STORAGE_URL_FORBIDDEN", Blame::User);
    assert!(!format!("{failure:?}").contains(&token), "{failure}");
}

#[tokio::test]
async fn a_url_without_encryption_is_refused_and_not_repeated() {
    let source = UrlSource::new(options(), PlainHttp::Refused).unwrap();
    for url in [
        "http://h.example/x?token=fake-canary",
        "fake-canary",
        "file:///etc/passwd#canary",
    ] {
        let fetched = source.fetch(&Secret::new(url), Path::new("/nonexistent/x")).await;
        check_failure(&fetched.unwrap_err(), "STORAGE_URL_INVALID", Blame::User);
    }
}

#[tokio::test]
async fn a_folder_that_cannot_be_one_is_named() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("file"), "in the way").unwrap();
    let failure = local(&folder.path().join("file")).probe(BUCKET, "u").await.unwrap_err();
    check_failure(&failure, "STORAGE_FOLDER_UNWRITABLE", Blame::System);
    // Not even root may make folders in the kernel's process table.
    let failure = local(Path::new("/proc/1/files")).probe(BUCKET, "u").await.unwrap_err();
    assert_eq!(failure.blame, Blame::System);
    assert!(failure.place.contains("/proc/1/files"), "{failure}");
}

#[test]
fn nothing_prints_a_credential() {
    let supabase = StorageConfig::Supabase {
        url: Url::parse("https://p.example").unwrap(),
        key: Secret::new(SECRET_KEY),
    };
    for config in [StorageConfig::S3(s3_config("http://127.0.0.1:1")), supabase] {
        let storage = open(&config, &options()).unwrap();
        assert!(!format!("{config:?} {}", storage.describe()).contains("canary"));
    }
}
