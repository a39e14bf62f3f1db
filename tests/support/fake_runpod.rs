//! A scripted control plane: speaks HTTP/1.1 by hand, so that tests see raw requests and can misbehave in every way a network can.
//!
//! Without a script it behaves well: takes are long polls that hand out queued jobs, results and heartbeats are accepted, the stop channel
//! names queued ids; clients submit, look and cancel over the same jobs. A script for a route answers its next requests instead, in order.
#![allow(dead_code, clippy::unwrap_used, clippy::panic)]

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;

/// How long a condition may take to come true on a slow machine.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// An obviously fake key that must not appear in any log, error or file.
pub const CANARY_KEY: &str = "canary-not-a-real-key-0000";

/// What a request is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Route {
    Take,
    Done,
    Stream,
    Stop,
    Ping,
    Run,
    Status,
    Cancel,
    Other,
}

/// A request as it came.
#[derive(Clone, Debug)]
pub struct Request {
    pub route: Route,
    pub method: String,
    /// Path and query, byte for byte.
    pub target: String,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    /// When it was read. It was sent earlier; how much earlier is the machine's load.
    pub at: Instant,
    /// When its answer began to be sent, or its connection was closed. It was received later: the time from here to the next
    /// request's [`Self::at`] is at least as long as the worker waited, whatever the load.
    pub answered: Option<Instant>,
    /// Whether the answer says that the request was accepted.
    pub accepted: bool,
}

impl Request {
    pub fn header(&self, name: &str) -> Option<&str> {
        let found = self.headers.iter().find(|(known, _)| known.eq_ignore_ascii_case(name));
        found.map(|(_, value)| value.as_str())
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{}: {error}", self.target))
    }

    /// The value of a query parameter as sent.
    pub fn parameter(&self, name: &str) -> Option<&str> {
        let query = self.target.split_once('?')?.1;
        query
            .split('&')
            .find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='))
    }

    /// The job of a result, progress or stream post.
    pub fn job(&self) -> &str {
        self.target.split('?').next().unwrap().rsplit('/').next().unwrap()
    }

    pub fn is_progress(&self) -> bool {
        self.route == Route::Done && self.json().get("status").is_some()
    }

    pub fn is_result(&self) -> bool {
        self.route == Route::Done && self.json().get("status").is_none()
    }

    /// Jobs a heartbeat names.
    pub fn pinged(&self) -> Vec<String> {
        let ids = self.parameter("job_id").unwrap_or_default();
        ids.split("%2C")
            .filter(|id| !id.is_empty())
            .map(str::to_owned)
            .collect()
    }
}

/// A scripted answer.
#[derive(Clone, Debug)]
pub enum Step {
    Answer {
        status: u16,
        headers: Vec<(&'static str, String)>,
        body: Vec<u8>,
        after: Duration,
    },
    /// Read the request, then close the connection.
    Drop,
    /// Close the connection before the body is read.
    DropEarly,
    /// Never answer.
    Hang,
    /// As without a script.
    Behave,
}

impl Step {
    pub fn status(status: u16) -> Self {
        Self::raw(status, "text/plain", Vec::new())
    }

    pub fn json(value: Value) -> Self {
        Self::raw(200, "application/json", value.to_string().into_bytes())
    }

    pub fn raw(status: u16, kind: &str, body: impl Into<Vec<u8>>) -> Self {
        Self::Answer {
            status,
            headers: vec![("Content-Type", kind.to_owned())],
            body: body.into(),
            after: Duration::ZERO,
        }
    }

    pub fn with(mut self, name: &'static str, value: &str) -> Self {
        if let Self::Answer { headers, .. } = &mut self {
            headers.push((name, value.to_owned()));
        }
        self
    }

    pub fn after(mut self, wait: Duration) -> Self {
        if let Self::Answer { after, .. } = &mut self {
            *after = wait;
        }
        self
    }
}

#[derive(Default)]
struct State {
    requests: Vec<Request>,
    scripts: BTreeMap<Route, VecDeque<Step>>,
    /// Answers a route gives for ever once its script is used up.
    habits: BTreeMap<Route, Step>,
    jobs: VecDeque<Value>,
    /// Hand out this many at once, whatever was asked for.
    at_once: Option<usize>,
    stops: Vec<Value>,
    /// What clients submitted, by id: the object that `/status` answers with.
    remote: BTreeMap<String, Value>,
    submitted: usize,
    /// Which worker took a job last, the job itself, and how often it was lost.
    taken: BTreeMap<String, (String, Value, usize)>,
}

impl State {
    /// Gives a submitted job a status, unless it has a final one.
    fn becomes(&mut self, id: &str, status: &str, more: &[(&str, Value)]) {
        let Some(job) = self.remote.get_mut(id) else { return };
        if ["COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"]
            .iter()
            .any(|over| job["status"] == *over)
        {
            return;
        }
        job["status"] = json!(status);
        for (name, value) in more {
            job[*name] = value.clone();
        }
    }

    fn submit(&mut self, request: &Request) -> Value {
        self.submitted += 1;
        let id = format!("remote-{}-u1", self.submitted);
        self.jobs.push_back(json!({"id": id, "input": request.json()["input"]}));
        self.remote.insert(id.clone(), json!({"id": id, "status": "IN_QUEUE"}));
        json!({"id": id, "status": "IN_QUEUE"})
    }

    fn take(&mut self, worker: &str, job: &Value) {
        let id = job["id"].as_str().unwrap_or_default().to_owned();
        self.becomes(&id, "IN_PROGRESS", &[]);
        let lost = self.taken.get(&id).map_or(0, |(_, _, lost)| *lost);
        self.taken.insert(id, (worker.to_owned(), job.clone(), lost));
    }

    /// A worker is silent: its jobs are handed out once more, or have failed.
    fn lose(&mut self, worker: &str) {
        let ids: Vec<String> = self.taken.keys().cloned().collect();
        for id in ids {
            let Some((_, job, lost)) = self.taken.get_mut(&id).filter(|(taker, ..)| taker == worker) else {
                continue;
            };
            *lost += 1;
            let (job, lost) = (job.clone(), *lost);
            let is_open = self
                .remote
                .get(&id)
                .is_some_and(|remote| remote["status"] == "IN_PROGRESS");
            if is_open && lost == 1 {
                self.becomes(&id, "IN_QUEUE", &[]);
                self.jobs.push_back(job);
            } else if is_open {
                self.becomes(&id, "FAILED", &[("error", json!("job timed out after 1 retries"))]);
            }
        }
    }

    fn cancel(&mut self, id: &str) {
        let waited = self.jobs.len();
        self.jobs.retain(|job| job["id"] != id);
        if self.jobs.len() == waited {
            self.stops.push(json!(id));
        }
        self.becomes(id, "CANCELLED", &[]);
    }
}

/// The control plane. Its own runtime keeps it going when a test blocks; dropping it closes every connection.
pub struct FakeRunPod {
    state: Arc<Mutex<State>>,
    changed: Arc<Notify>,
    address: std::net::SocketAddr,
    runtime: Option<tokio::runtime::Runtime>,
}

impl Drop for FakeRunPod {
    fn drop(&mut self) {
        // Not waited for, so that a test may be a task of another runtime.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl FakeRunPod {
    pub fn start() -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let inside = runtime.enter();
        let listener = TcpListener::from_std(listener).unwrap();
        drop(inside);
        let (state, changed) = (Arc::<Mutex<State>>::default(), Arc::<Notify>::default());
        runtime.spawn(accept(listener, Arc::clone(&state), Arc::clone(&changed)));
        Self {
            state,
            changed,
            address,
            runtime: Some(runtime),
        }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The variables the platform would set.
    pub fn variables(&self) -> BTreeMap<String, String> {
        let base = format!("{}/v2/ep1", self.url());
        [
            ("RUNPOD_WEBHOOK_GET_JOB", format!("{base}/job-take/$ID?gpu=SIM+1")),
            (
                "RUNPOD_WEBHOOK_POST_OUTPUT",
                format!("{base}/job-done/$RUNPOD_POD_ID/$ID?gpu=SIM+1"),
            ),
            (
                "RUNPOD_WEBHOOK_POST_STREAM",
                format!("{base}/job-stream/$RUNPOD_POD_ID/$ID?gpu=SIM+1"),
            ),
            ("RUNPOD_WEBHOOK_PING", format!("{base}/ping/$RUNPOD_POD_ID?gpu=SIM+1")),
            ("RUNPOD_PING_INTERVAL", "1000".to_owned()),
            ("RUNPOD_AI_API_KEY", CANARY_KEY.to_owned()),
            ("RUNPOD_POD_ID", "pod1".to_owned()),
            ("RUNPOD_POD_HOSTNAME", "pod1-host".to_owned()),
            ("RUNPOD_SKIP_AUTO_SYSTEM_CHECKS", "true".to_owned()),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into()
    }

    /// Answers the next requests of a route.
    pub fn script(&self, route: Route, steps: impl IntoIterator<Item = Step>) {
        self.state
            .lock()
            .unwrap()
            .scripts
            .entry(route)
            .or_default()
            .extend(steps);
        self.changed.notify_waiters();
    }

    /// Answers all requests of a route that have no script.
    pub fn always(&self, route: Route, step: Step) {
        self.state.lock().unwrap().habits.insert(route, step);
    }

    pub fn queue(&self, jobs: impl IntoIterator<Item = Value>) {
        self.state.lock().unwrap().jobs.extend(jobs);
        self.changed.notify_waiters();
    }

    /// Queues a job with this id and input.
    pub fn job(&self, id: &str, input: Value) {
        self.queue([json!({"id": id, "input": input})]);
    }

    pub fn hand_out_at_once(&self, count: usize) {
        self.state.lock().unwrap().at_once = Some(count);
    }

    /// Names jobs on the stop channel.
    pub fn stop(&self, ids: impl IntoIterator<Item = Value>) {
        self.state.lock().unwrap().stops.extend(ids);
        self.changed.notify_waiters();
    }

    /// The base address of the public API.
    pub fn api(&self) -> String {
        format!("{}/v2", self.url())
    }

    /// Jobs that clients have submitted, oldest first: id, status and input.
    pub fn submitted(&self) -> Vec<Value> {
        let state = self.state.lock().unwrap();
        state.remote.values().cloned().collect()
    }

    /// The next waiting job, as a worker gets it.
    pub fn take(&self) -> Option<Value> {
        let mut state = self.state.lock().unwrap();
        let job = state.jobs.pop_front()?;
        state.take("", &job);
        Some(job)
    }

    /// Notices that a worker is silent, as the platform does after some missed heartbeats.
    pub fn lose(&self, worker: &str) {
        self.state.lock().unwrap().lose(worker);
        self.changed.notify_waiters();
    }

    /// Ends a submitted job as the platform may; no worker gets it any more.
    pub fn end(&self, id: &str, status: &str) {
        let mut state = self.state.lock().unwrap();
        state.jobs.retain(|job| job["id"] != id);
        state.becomes(id, status, &[]);
    }

    /// Forgets a submitted job, as the platform does when its time to live is over.
    pub fn forget(&self, id: &str) {
        let mut state = self.state.lock().unwrap();
        state.jobs.retain(|job| job["id"] != id);
        state.remote.remove(id);
    }

    pub fn requests(&self) -> Vec<Request> {
        self.state.lock().unwrap().requests.clone()
    }

    pub fn of(&self, route: Route) -> Vec<Request> {
        let mut requests = self.requests();
        requests.retain(|request| request.route == route);
        requests
    }

    /// Bodies of the result posts of a job.
    pub fn results(&self, job: &str) -> Vec<Value> {
        let requests = self.of(Route::Done);
        let of_job = requests
            .iter()
            .filter(|request| request.job() == job && request.is_result());
        of_job.map(Request::json).collect()
    }

    /// Waits until `condition` holds.
    pub fn eventually(&self, what: &str, condition: impl Fn(&[Request]) -> bool) {
        self.patiently(what, PATIENCE, condition);
    }

    /// The same with another limit.
    pub fn patiently(&self, what: &str, patience: Duration, condition: impl Fn(&[Request]) -> bool) {
        let deadline = Instant::now() + patience;
        loop {
            let requests = self.requests();
            if condition(&requests) {
                return;
            }
            assert!(Instant::now() < deadline, "not in time: {what}\n{}", self.trace());
            // Looking at many is work that the processes under test need the machine for.
            std::thread::sleep(Duration::from_millis(5 + requests.len() as u64 / 200));
        }
    }

    /// Waits for the first result of a job.
    pub fn result(&self, job: &str) -> Value {
        self.eventually(&format!("a result of {job}"), |requests| {
            requests
                .iter()
                .any(|request| request.route == Route::Done && request.job() == job && request.is_result())
        });
        self.results(job).swap_remove(0)
    }

    /// How long the worker waited at least between the answer to each request of a route and the next one.
    pub fn waits(&self, route: Route) -> Vec<Duration> {
        let requests = self.of(route);
        let pairs = requests.windows(2);
        pairs
            .map(|pair| {
                let answered = pair[0].answered.expect("the next one follows an answer");
                pair[1].at.saturating_duration_since(answered)
            })
            .collect()
    }

    /// Waits for the first request of a route.
    pub fn some(&self, route: Route) {
        self.eventually(&format!("a {route:?}"), |requests| {
            requests.iter().any(|request| request.route == route)
        });
    }

    /// Waits for `count` more requests of a route: the way to let things happen without a clock.
    pub fn more(&self, route: Route, count: usize) {
        let before = self.of(route).len();
        self.eventually(&format!("{count} more {route:?}"), |requests| {
            requests.iter().filter(|request| request.route == route).count() >= before + count
        });
    }

    /// The last requests, for a message.
    pub fn trace(&self) -> String {
        let requests = self.requests();
        let skipped = requests.len().saturating_sub(60);
        let lines = requests.into_iter().skip(skipped).map(|request| {
            let body = String::from_utf8_lossy(&request.body[..request.body.len().min(200)]).into_owned();
            format!("{} {} {body}\n", request.method, request.target)
        });
        lines.collect()
    }
}

async fn accept(listener: TcpListener, state: Arc<Mutex<State>>, changed: Arc<Notify>) {
    while let Ok((stream, _)) = listener.accept().await {
        let (state, changed) = (Arc::clone(&state), Arc::clone(&changed));
        tokio::spawn(async move {
            // A connection that breaks is the other side's business.
            let _broken = serve(stream, &state, &changed).await;
        });
    }
}

async fn serve(mut stream: TcpStream, state: &Mutex<State>, changed: &Notify) -> std::io::Result<()> {
    let mut buffer = Vec::new();
    while let Some(mut request) = read_head(&mut stream, &mut buffer).await? {
        let step = next_step(state, request.route);
        if matches!(step, Step::DropEarly) {
            request.answered = Some(Instant::now());
            state.lock().unwrap().requests.push(request);
            return Ok(());
        }
        read_body(&mut stream, &mut buffer, &mut request).await?;
        request.accepted = match &step {
            Step::Answer { status, .. } => *status < 300,
            other => matches!(other, Step::Behave),
        };
        let place = {
            let mut state = state.lock().unwrap();
            state.requests.push(request.clone());
            state.requests.len() - 1
        };
        let answering = || state.lock().unwrap().requests[place].answered = Some(Instant::now());
        let answer = match step {
            // A poll whose worker has left must not be handed a job.
            Step::Behave => tokio::select! {
                biased;
                () = closed(&stream) => return Ok(()),
                step = behave(state, changed, &request) => step,
            },
            other => other,
        };
        match answer {
            Step::Answer {
                status,
                headers,
                body,
                after,
            } => {
                tokio::time::sleep(after).await;
                let mut head = format!("HTTP/1.1 {status} Scripted\r\nContent-Length: {}\r\n", body.len());
                for (name, value) in headers {
                    head.push_str(&format!("{name}: {value}\r\n"));
                }
                head.push_str("\r\n");
                answering();
                stream.write_all(head.as_bytes()).await?;
                if status != 204 {
                    stream.write_all(&body).await?;
                }
            }
            Step::Hang => std::future::pending::<()>().await,
            _ => {
                answering();
                return Ok(());
            }
        }
    }
    Ok(())
}

fn next_step(state: &Mutex<State>, route: Route) -> Step {
    let mut state = state.lock().unwrap();
    let scripted = state.scripts.get_mut(&route).and_then(VecDeque::pop_front);
    scripted
        .or_else(|| state.habits.get(&route).cloned())
        .unwrap_or(Step::Behave)
}

/// Waits until the other side has closed the connection.
async fn closed(stream: &TcpStream) {
    if !matches!(stream.peek(&mut [0]).await, Ok(0) | Err(_)) {
        std::future::pending::<()>().await;
    }
}

/// What a control plane in good health answers.
async fn behave(state: &Mutex<State>, changed: &Notify, request: &Request) -> Step {
    loop {
        let change = changed.notified();
        tokio::pin!(change);
        change.as_mut().enable();
        {
            let mut state = state.lock().unwrap();
            match request.route {
                Route::Take if !state.jobs.is_empty() => {
                    let asked = request
                        .parameter("batch_size")
                        .map_or(1, |count| count.parse().unwrap());
                    let count = state.at_once.unwrap_or(asked).min(state.jobs.len());
                    let mut jobs: Vec<Value> = state.jobs.drain(..count).collect();
                    let worker = request.job().to_owned();
                    for job in &jobs {
                        state.take(&worker, job);
                    }
                    let is_single = count == 1 && asked == 1;
                    return Step::json(if is_single {
                        jobs.swap_remove(0)
                    } else {
                        Value::Array(jobs)
                    });
                }
                Route::Stop if !state.stops.is_empty() => {
                    let ids: Vec<Value> = state.stops.drain(..).collect();
                    return Step::json(json!({"jobsToStop": ids}));
                }
                // A script that arrives while the poll is open answers it.
                Route::Take | Route::Stop => {
                    if let Some(step) = state.scripts.get_mut(&request.route).and_then(VecDeque::pop_front) {
                        return step;
                    }
                }
                Route::Done => {
                    let body = request.json();
                    let part = |name: &str| body.get(name).map(|value| (name.to_owned(), value.clone()));
                    let parts: Vec<_> = ["output", "error"].into_iter().filter_map(part).collect();
                    let parts: Vec<_> = parts
                        .iter()
                        .map(|(name, value)| (name.as_str(), value.clone()))
                        .collect();
                    let status = match (request.is_progress(), body.get("error").is_some()) {
                        (true, _) => "IN_PROGRESS",
                        (false, true) => "FAILED",
                        (false, false) => "COMPLETED",
                    };
                    state.becomes(request.job(), status, &parts);
                    return Step::status(200);
                }
                Route::Run => {
                    let answer = state.submit(request);
                    changed.notify_waiters();
                    return Step::json(answer);
                }
                Route::Status => {
                    return match state.remote.get(request.job()) {
                        Some(job) => Step::json(job.clone()),
                        None => Step::status(404),
                    };
                }
                Route::Cancel => {
                    state.cancel(request.job());
                    changed.notify_waiters();
                    return match state.remote.get(request.job()) {
                        Some(job) => Step::json(job.clone()),
                        None => Step::status(404),
                    };
                }
                _ => return Step::status(200),
            }
        }
        change.await;
    }
}

async fn fill(stream: &mut TcpStream, buffer: &mut Vec<u8>) -> std::io::Result<bool> {
    Ok(stream.read_buf(buffer).await? > 0)
}

async fn read_head(stream: &mut TcpStream, buffer: &mut Vec<u8>) -> std::io::Result<Option<Request>> {
    let end = loop {
        if let Some(end) = buffer.windows(4).position(|window| window == b"\r\n\r\n") {
            break end;
        }
        if !fill(stream, buffer).await? {
            return Ok(None);
        }
    };
    let head = String::from_utf8(buffer.drain(..end + 4).collect()).unwrap();
    let mut lines = head.lines();
    let mut first = lines.next().unwrap().split(' ').map(str::to_owned);
    let (method, target) = (first.next().unwrap(), first.next().unwrap());
    let headers = lines
        .filter_map(|line| line.split_once(": "))
        .map(|(name, value)| (name.to_owned(), value.to_owned()));
    let routes = [
        ("/job-take", Route::Take),
        ("/job-done", Route::Done),
        ("/job-stream", Route::Stream),
        ("/job-stop", Route::Stop),
        ("/ping", Route::Ping),
        ("/status/", Route::Status),
        ("/cancel/", Route::Cancel),
        ("/run", Route::Run),
    ];
    let route = routes.into_iter().find(|(part, _)| target.contains(part));
    Ok(Some(Request {
        route: route.map_or(Route::Other, |(_, route)| route),
        headers: headers.collect(),
        method,
        target,
        body: Vec::new(),
        at: Instant::now(),
        answered: None,
        accepted: false,
    }))
}

async fn read_body(stream: &mut TcpStream, buffer: &mut Vec<u8>, request: &mut Request) -> std::io::Result<()> {
    let length = request.header("content-length").map_or(0, |text| text.parse().unwrap());
    while buffer.len() < length {
        if !fill(stream, buffer).await? {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
    }
    request.body = buffer.drain(..length).collect();
    Ok(())
}
