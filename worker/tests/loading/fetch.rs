//! `brightrun fetch` against a hub of our own that cuts connections, lies, and counts.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{HeaderMap, Request, Response, StatusCode, Uri};
use brightrun_worker::error::Failure;
use brightrun_worker::hub::{Disk, FetchRequest, Fetched, Hub, default_folder, fetch, offline};
use brightrun_worker::secret::Secret;
use brightrun_worker::storage::HttpOptions;
use brightrun_worker::storage::retry::RetryPolicy;
use futures_util::StreamExt;
use serde_json::json;
use sha2::{Digest, Sha256};
use tokio::sync::Notify;

const MODEL: &str = "Org/Model-1B";
const TOKEN: &str = "hub-canary-not-a-real-token";

/// How the hub misbehaves.
#[derive(Clone, Default)]
struct Behaviour {
    /// Bytes after which the first answers for a file break off.
    cut_after: Option<usize>,
    /// How many answers break off.
    cuts: usize,
    /// Lists this hash for the weights.
    wrong_hash: bool,
    /// Asks for this token.
    token: Option<&'static str>,
    /// Ignores `Range`.
    no_ranges: bool,
    /// The first file of the weights stands still after these bytes; the second is missing, said once `arrived` is notified.
    stands_still_after: Option<usize>,
}

struct Shared {
    files: BTreeMap<&'static str, Vec<u8>>,
    behaviour: Mutex<Behaviour>,
    arrived: Notify,
    requests: Mutex<Vec<(String, Option<String>)>>,
}

/// A hub on this machine.
struct FakeHub {
    address: String,
    shared: Arc<Shared>,
}

fn weights() -> Vec<u8> {
    (0..300_000u32).map(|i| (i * 7 % 251) as u8).collect()
}

impl FakeHub {
    async fn start(behaviour: Behaviour) -> Self {
        let shared = Arc::new(Shared {
            files: BTreeMap::from([
                ("config.json", b"{\"model_type\": \"qwen3\"}".to_vec()),
                ("model-00001-of-00002.safetensors", weights()),
                ("model-00002-of-00002.safetensors", b"second".to_vec()),
                ("pytorch_model.bin", b"never wanted".to_vec()),
                ("sub/other.json", b"{}".to_vec()),
            ]),
            behaviour: Mutex::new(behaviour),
            arrived: Notify::new(),
            requests: Mutex::default(),
        });
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let router = Router::new().fallback(answer).with_state(shared.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        Self { address, shared }
    }

    fn hub(&self, token: Option<&str>) -> Hub {
        let options = HttpOptions {
            retry: RetryPolicy {
                attempts: 3,
                first_pause: Duration::from_millis(1),
                longest_pause: Duration::from_millis(1),
            },
            ..HttpOptions::default()
        };
        Hub::new(&self.address, token.map(Secret::new), &options).unwrap()
    }

    /// Asked-for paths with their `Range`, since the last look.
    fn requests(&self) -> Vec<(String, Option<String>)> {
        std::mem::take(&mut self.shared.requests.lock().unwrap())
    }
}

async fn answer(State(shared): State<Arc<Shared>>, uri: Uri, headers: HeaderMap, _: Request<Body>) -> Response<Body> {
    let header = |name: &str| headers.get(name).map(|value| value.to_str().unwrap().to_owned());
    let range = header("range");
    shared
        .requests
        .lock()
        .unwrap()
        .push((uri.path().to_owned(), range.clone()));
    let status = |code| Response::builder().status(code).body(Body::empty()).unwrap();
    let stands_still_after = shared.behaviour.lock().unwrap().stands_still_after;
    if stands_still_after.is_some() && uri.path().ends_with(WANTED[2]) {
        shared.arrived.notified().await;
        return status(StatusCode::NOT_FOUND);
    }
    let mut behaviour = shared.behaviour.lock().unwrap();
    if let Some(token) = behaviour.token
        && header("authorization") != Some(format!("Bearer {token}"))
    {
        return status(StatusCode::UNAUTHORIZED);
    }
    if uri.path() == format!("/api/models/{MODEL}/revision/main") {
        return Response::new(Body::from(listing(&shared, &behaviour)));
    }
    let prefix = format!("/{MODEL}/resolve/c0ffee/");
    let Some(bytes) = uri.path().strip_prefix(&prefix).and_then(|name| shared.files.get(name)) else {
        return status(StatusCode::NOT_FOUND);
    };
    let from = match range.filter(|_| !behaviour.no_ranges) {
        None => 0,
        Some(range) => range
            .strip_prefix("bytes=")
            .unwrap()
            .trim_end_matches('-')
            .parse()
            .unwrap(),
    };
    let mut response = Response::builder().header("content-length", bytes.len() - from);
    if from > 0 {
        let range = format!("bytes {from}-{}/{}", bytes.len() - 1, bytes.len());
        response = response
            .status(StatusCode::PARTIAL_CONTENT)
            .header("content-range", range);
    }
    let rest = bytes[from..].to_vec();
    if let Some(after) = stands_still_after.filter(|after| rest.len() > *after) {
        let part: Result<Bytes, std::io::Error> = Ok(Bytes::copy_from_slice(&rest[..after]));
        let parts = futures_util::stream::iter([part]).chain(futures_util::stream::pending());
        return response.body(Body::from_stream(parts)).unwrap();
    }
    match behaviour
        .cut_after
        .filter(|after| rest.len() > *after && behaviour.cuts > 0)
    {
        None => response.body(Body::from(rest)).unwrap(),
        Some(after) => {
            behaviour.cuts -= 1;
            let part: Result<Bytes, std::io::Error> = Ok(Bytes::copy_from_slice(&rest[..after]));
            let cut = futures_util::stream::once(async {
                // The server sends what it has whenever it must wait; an error at once would take the part with it.
                tokio::task::yield_now().await;
                Err(std::io::Error::other("the connection is cut"))
            });
            let parts = futures_util::stream::iter([part]).chain(cut);
            response.body(Body::from_stream(parts)).unwrap()
        }
    }
}

fn listing(shared: &Shared, behaviour: &Behaviour) -> String {
    let siblings: Vec<_> = shared
        .files
        .iter()
        .map(|(name, bytes)| {
            let mut entry = json!({"rfilename": name, "size": bytes.len()});
            if name.ends_with(".safetensors") {
                let hash = if behaviour.wrong_hash {
                    vec![0; 32]
                } else {
                    Sha256::digest(bytes).to_vec()
                };
                entry["lfs"] = json!({"sha256": hex::encode(hash), "size": bytes.len()});
            }
            entry
        })
        .collect();
    json!({"sha": "c0ffee", "siblings": siblings}).to_string()
}

/// A machine whose mounts and room the test decides.
struct Machine {
    mounted: bool,
    free: u64,
}

impl Disk for Machine {
    fn is_mounted(&self, _: &Path) -> bool {
        self.mounted
    }

    fn free_bytes(&self, _: &Path) -> Option<u64> {
        Some(self.free)
    }
}

const ROOMY: Machine = Machine {
    mounted: true,
    free: 1 << 40,
};

async fn fetched(hub: &Hub, folder: &Path, disk: &Machine, verify: bool) -> Result<Fetched, Failure> {
    let volumes = [folder.parent().unwrap().to_owned()];
    let request = FetchRequest {
        model: MODEL,
        revision: "main",
        folder,
        volumes: &volumes,
        verify,
    };
    let mut last = 0;
    let result = fetch(hub, &request, disk, &mut |progress| {
        assert!(progress.bytes <= progress.bytes_total);
        last = progress.bytes;
    })
    .await?;
    assert!(result.downloaded == 0 || last == result.bytes);
    Ok(result)
}

fn target() -> (tempfile::TempDir, PathBuf) {
    let volume = tempfile::tempdir().unwrap();
    let folder = volume.path().join("model");
    (volume, folder)
}

/// Names in a folder, sorted, the record left out.
fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .filter(|name| name != ".brightrun-fetch.json")
        .collect();
    names.sort();
    names
}

const WANTED: [&str; 3] = [
    "config.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
];

#[tokio::test]
async fn what_training_needs_is_fetched_verified_and_not_fetched_again() {
    let server = FakeHub::start(Behaviour::default()).await;
    let (_volume, folder) = target();
    let first = fetched(&server.hub(None), &folder, &ROOMY, false).await.unwrap();
    assert_eq!((first.revision.as_str(), first.files), ("c0ffee", 3));
    assert_eq!(first.downloaded, first.bytes);
    assert_eq!(names(&folder), WANTED);
    assert_eq!(std::fs::read(folder.join(WANTED[1])).unwrap(), weights());
    server.requests();
    for verify in [false, true] {
        let again = fetched(&server.hub(None), &folder, &ROOMY, verify).await.unwrap();
        assert_eq!((again.downloaded, server.requests().len()), (0, 1), "only the list");
    }
}

#[tokio::test]
async fn a_cut_connection_is_continued_where_it_broke_off() {
    let server = FakeHub::start(Behaviour {
        cut_after: Some(70_000),
        cuts: 3,
        ..Behaviour::default()
    })
    .await;
    let (_volume, folder) = target();
    let fetched = fetched(&server.hub(None), &folder, &ROOMY, false).await.unwrap();
    assert_eq!(std::fs::read(folder.join(WANTED[1])).unwrap(), weights());
    assert_eq!(fetched.downloaded, fetched.bytes, "no byte came twice");
    let ranges: Vec<_> = server.requests().into_iter().filter_map(|(_, range)| range).collect();
    assert_eq!(ranges, ["bytes=70000-", "bytes=140000-", "bytes=210000-"]);
    assert_eq!(names(&folder), WANTED);
}

#[tokio::test]
async fn a_later_command_continues_what_an_earlier_one_began() {
    let behaviour = Behaviour {
        cut_after: Some(0),
        cuts: 100,
        ..Behaviour::default()
    };
    let server = FakeHub::start(behaviour).await;
    let (_volume, folder) = target();
    let failure = fetched(&server.hub(None), &folder, &ROOMY, false).await.unwrap_err();
    assert_eq!(failure.code, "FETCH_UNREACHABLE");
    assert!(!folder.join(WANTED[1]).exists(), "nothing half has its name");
    let hash = hex::encode(Sha256::digest(weights()));
    let begun = folder.join(format!(".{}.{}.part", WANTED[1], &hash[..16]));
    std::fs::write(&begun, &weights()[..123_456]).unwrap();
    *server.shared.behaviour.lock().unwrap() = Behaviour::default();
    server.requests();
    fetched(&server.hub(None), &folder, &ROOMY, false).await.unwrap();
    let ranges: Vec<_> = server.requests().into_iter().filter_map(|(_, range)| range).collect();
    assert_eq!(ranges, ["bytes=123456-"]);
    assert_eq!(std::fs::read(folder.join(WANTED[1])).unwrap(), weights());
}

#[tokio::test]
async fn a_file_that_fails_stops_the_others_where_they_are() {
    let server = FakeHub::start(Behaviour {
        stands_still_after: Some(100_000),
        ..Behaviour::default()
    })
    .await;
    let (_volume, folder) = target();
    let hub = server.hub(None);
    let request = FetchRequest {
        model: MODEL,
        revision: "main",
        folder: &folder,
        volumes: &[],
        verify: false,
    };
    let config = server.shared.files[WANTED[0]].len();
    let arrived = &server.shared.arrived;
    let failure = fetch(&hub, &request, &ROOMY, &mut |progress| {
        if progress.bytes == (config + 100_000) as u64 {
            arrived.notify_one();
        }
    })
    .await
    .unwrap_err();
    assert!(failure.place.ends_with(WANTED[2]), "{failure:?}");
    *server.shared.behaviour.lock().unwrap() = Behaviour::default();
    server.requests();
    let again = fetched(&hub, &folder, &ROOMY, false).await.unwrap();
    let ranges: Vec<_> = server.requests().into_iter().filter_map(|(_, range)| range).collect();
    assert_eq!(
        ranges,
        ["bytes=100000-"],
        "what had come was kept, and nothing was written after the answer"
    );
    assert_eq!(again.downloaded, again.bytes - (config + 100_000) as u64);
    assert_eq!(std::fs::read(folder.join(WANTED[1])).unwrap(), weights());
}

#[tokio::test]
async fn a_hub_that_does_not_continue_is_read_from_the_beginning() {
    let server = FakeHub::start(Behaviour {
        cut_after: Some(70_000),
        cuts: 1,
        no_ranges: true,
        ..Behaviour::default()
    })
    .await;
    let (_volume, folder) = target();
    fetched(&server.hub(None), &folder, &ROOMY, false).await.unwrap();
    assert_eq!(std::fs::read(folder.join(WANTED[1])).unwrap(), weights());
}

#[tokio::test]
async fn a_file_whose_hash_is_wrong_is_not_accepted_and_not_kept() {
    let server = FakeHub::start(Behaviour {
        wrong_hash: true,
        ..Behaviour::default()
    })
    .await;
    let (_volume, folder) = target();
    let failure = fetched(&server.hub(None), &folder, &ROOMY, false).await.unwrap_err();
    assert_eq!(failure.code, "FETCH_HASH");
    assert!(
        names(&folder).iter().all(|name| !name.starts_with("model-")),
        "{:?}",
        names(&folder)
    );
}

#[tokio::test]
async fn a_damaged_file_of_the_right_length_is_found_by_its_hash_and_replaced() {
    let server = FakeHub::start(Behaviour::default()).await;
    let (_volume, folder) = target();
    fetched(&server.hub(None), &folder, &ROOMY, false).await.unwrap();
    let path = folder.join(WANTED[1]);
    std::fs::write(&path, vec![1; weights().len()]).unwrap();
    fetched(&server.hub(None), &folder, &ROOMY, true).await.unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), weights());
    // A file that somebody else put there is not believed either.
    std::fs::remove_file(folder.join(".brightrun-fetch.json")).unwrap();
    std::fs::write(&path, vec![2; weights().len()]).unwrap();
    fetched(&server.hub(None), &folder, &ROOMY, false).await.unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), weights());
}

#[tokio::test]
async fn without_room_or_without_the_volume_nothing_is_written() {
    let server = FakeHub::start(Behaviour::default()).await;
    let (_volume, folder) = target();
    let full = Machine {
        mounted: true,
        free: 300_000,
    };
    let failure = fetched(&server.hub(None), &folder, &full, false).await.unwrap_err();
    assert_eq!(failure.code, "FETCH_NO_SPACE");
    assert_eq!(names(&folder), Vec::<String>::new());
    server.requests();
    let (_volume, folder) = target();
    let bare = Machine {
        mounted: false,
        ..ROOMY
    };
    let failure = fetched(&server.hub(None), &folder, &bare, false).await.unwrap_err();
    assert_eq!((failure.code.as_str(), folder.exists()), ("FETCH_NOT_MOUNTED", false));
    assert!(server.requests().is_empty());
    let volumes = [PathBuf::from("/runpod-volume"), PathBuf::from("/workspace")];
    assert_eq!(
        default_folder(MODEL, &volumes, &bare).unwrap_err().code,
        "FETCH_NOT_MOUNTED"
    );
    assert_eq!(
        default_folder(MODEL, &volumes, &ROOMY).unwrap(),
        Path::new("/runpod-volume/models/Org/Model-1B")
    );
}

#[tokio::test]
async fn a_closed_model_needs_the_token_and_no_message_shows_it() {
    let server = FakeHub::start(Behaviour {
        token: Some(TOKEN),
        ..Behaviour::default()
    })
    .await;
    let (_volume, folder) = target();
    let failure = fetched(&server.hub(None), &folder, &ROOMY, false).await.unwrap_err();
    assert_eq!(failure.code, "FETCH_UNAUTHORISED");
    assert!(failure.hint.contains("HF_TOKEN"), "{failure}");
    let wrong = fetched(&server.hub(Some("another-canary-token")), &folder, &ROOMY, false)
        .await
        .unwrap_err();
    assert!(!wrong.to_string().contains("canary"), "{wrong}");
    let hub = server.hub(Some(TOKEN));
    assert!(!format!("{hub:?}").contains("canary"));
    fetched(&hub, &folder, &ROOMY, false).await.unwrap();
    for name in names(&folder) {
        assert!(
            !std::fs::read_to_string(folder.join(name))
                .unwrap_or_default()
                .contains("canary")
        );
    }
}

#[tokio::test]
async fn a_model_that_is_not_there_and_a_name_that_is_none_are_refused() {
    let server = FakeHub::start(Behaviour::default()).await;
    let hub = server.hub(None);
    assert_eq!(hub.look("Org/Other", "main").await.unwrap_err().code, "FETCH_NOT_FOUND");
    for (model, revision) in [
        ("Model", "main"),
        ("../x", "main"),
        ("a/b/c", "main"),
        (MODEL, "../main"),
        (MODEL, ""),
    ] {
        assert_eq!(hub.look(model, revision).await.unwrap_err().code, "FETCH_NAME_INVALID");
    }
}

#[tokio::test]
async fn offline_says_what_is_there_and_what_is_missing_without_a_network() {
    let (_volume, folder) = target();
    assert_eq!(offline(MODEL, &folder).unwrap_err().code, "FETCH_OFFLINE");
    let server = FakeHub::start(Behaviour::default()).await;
    fetched(&server.hub(None), &folder, &ROOMY, false).await.unwrap();
    server.requests();
    assert_eq!(offline(MODEL, &folder).unwrap().revision, "c0ffee");
    std::fs::remove_file(folder.join(WANTED[2])).unwrap();
    let failure = offline(MODEL, &folder).unwrap_err();
    assert!(
        failure.code == "FETCH_OFFLINE" && failure.message.contains(WANTED[2]),
        "{failure}"
    );
    assert_eq!(offline("Org/Other", &folder).unwrap_err().code, "FETCH_OFFLINE");
    assert!(server.requests().is_empty());
}
