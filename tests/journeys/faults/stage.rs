//! The stage of a fault run: everything of its own, and processes that can be killed.

use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use brightrun_queue::private_server::{Options, PrivateServer};
use brightrun_worker::orchestrator::settings::EndpointSettings;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tokio::task::JoinSet;
use uuid::Uuid;

use super::disk::SmallDisk;
use super::store::{STORAGE_KEY, Store};
use super::{JOBS, Random};
use crate::database::{Database, SCHEMA};
use crate::fake_runpod::{CANARY_KEY, FakeRunPod};
use crate::supabase_storage::SupabaseStandIn;
use crate::world::{World, dataset, settings};

/// Workers of the endpoint.
const WORKERS: usize = 2;

/// Everything of one run. Fields are dropped in this order: processes, then what they use.
pub struct Stage {
    workers: Vec<Process>,
    orchestrator: Option<Process>,
    pub disk: Option<SmallDisk>,
    pub plane: Arc<FakeRunPod>,
    pub store: Store,
    pub world: World,
    server: PrivateServer,
    pub random: Random,
    pub jobs: Vec<Uuid>,
    pub cancelled: Vec<Uuid>,
    pub deliveries: usize,
    pub longest_outage: Duration,
    /// The longest so far.
    pub outage: Duration,
    pub outages: JoinSet<()>,
    pub replaced: usize,
}

/// Killed with the stage.
struct Process(Child);

impl Process {
    fn end(&mut self, signal: Signal) {
        // It may just have left.
        let _gone = kill_process(Pid::from_child(&self.0), signal);
        self.0.wait().unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _gone = self.0.kill();
        let _reaped = self.0.wait();
    }
}

impl Stage {
    pub async fn new(seed: u64, longest_outage: Duration) -> Self {
        brightrun_worker::storage::http::install_crypto_provider();
        // Durable: what was committed must survive a server that is stopped at once.
        let options = Options {
            durable: true,
            ..Options::default()
        };
        let server = tokio::task::block_in_place(|| PrivateServer::start(&options)).unwrap();
        let database = Database::at(server.create_database("faults").await.unwrap()).await;
        database.owner.batch_execute(SCHEMA).await.unwrap();
        let quick = "update brightrun.job_kind set retry_base = '100 milliseconds', retry_cap = '1 second'";
        database.owner.batch_execute(quick).await.unwrap();
        let (mut world, plane) = (World::at(database).await, Arc::new(FakeRunPod::start()));
        world.config.orchestrator.api_base = plane.api();
        world.config.orchestrator.poll_seconds = 1;
        world.config.orchestrator.endpoints = vec![EndpointSettings {
            id: "ep1".to_owned(),
            gpu_types: Vec::new(),
            max_jobs: 3,
        }];
        let store = if seed.is_multiple_of(2) {
            world.config.storage.location = "supabase".to_owned();
            Store::Http(SupabaseStandIn::start(&[STORAGE_KEY]).await)
        } else {
            Store::Folder(world.storage_folder())
        };
        let mut stage = Self {
            workers: Vec::new(),
            orchestrator: None,
            disk: SmallDisk::mount(&world.config.worker.work_dir),
            plane,
            store,
            world,
            server,
            random: Random(seed),
            jobs: Vec::new(),
            cancelled: Vec::new(),
            deliveries: 0,
            longest_outage,
            outage: Duration::ZERO,
            outages: JoinSet::new(),
            replaced: 0,
        };
        stage.insert_jobs().await;
        stage.workers = (0..WORKERS).map(|place| stage.start_worker(place)).collect();
        stage.orchestrator = Some(stage.start_orchestrator());
        stage
    }

    async fn insert_jobs(&mut self) {
        for _ in 0..JOBS {
            let epochs = 6 + self.random.below(15);
            let job = self.job(epochs).await;
            self.jobs.push(job);
        }
        // Most runs should end well in spite of many counted attempts; some run out of them.
        let attempts = "update brightrun.job set max_attempts = 3 + (abs(hashtext(id::text)) % 12)";
        self.world.database.owner.batch_execute(attempts).await.unwrap();
    }

    async fn job(&self, epochs: usize) -> Uuid {
        let id = Uuid::new_v4();
        let path = format!("{}/{id}/data.jsonl", self.world.user);
        self.store.seed(&path, &dataset(16));
        self.world.insert(id, settings(epochs)).await
    }

    fn start_worker(&self, place: usize) -> Process {
        let mut command = self.world.brightrun(&["worker"]);
        command
            .envs(self.plane.variables())
            .env("RUNPOD_POD_ID", format!("pod{place}"));
        let command = match &self.disk {
            Some(disk) => disk.inside(&command),
            None => command,
        };
        self.start(command, &format!("pod{place}.log"))
    }

    fn start_orchestrator(&self) -> Process {
        let mut command = self.world.brightrun(&["orchestrate"]);
        command.env("RUNPOD_API_KEY", CANARY_KEY);
        self.start(command, "orchestrator.log")
    }

    fn start(&self, mut command: Command, log: &str) -> Process {
        if let Store::Http(server) = &self.store {
            command
                .env("SUPABASE_URL", &server.url)
                .env("SUPABASE_SERVICE_ROLE_KEY", STORAGE_KEY);
        }
        let log = self.world.folder.path().join(log);
        let log = std::fs::File::options().create(true).append(true).open(log).unwrap();
        let both = log.try_clone().unwrap();
        let child = command.stdin(Stdio::null()).stdout(log).stderr(both).spawn().unwrap();
        Process(child)
    }

    /// Ends a worker; RunPod notices, hands its jobs out again, and starts another one.
    pub fn restart_worker(&mut self, signal: Signal) {
        let place = self.random.below(WORKERS);
        self.workers[place].end(signal);
        self.replace(place);
    }

    fn replace(&mut self, place: usize) {
        self.plane.lose(&format!("pod{place}"));
        self.workers[place] = self.start_worker(place);
    }

    /// Replaces workers that have left, as the platform does, and an orchestrator that came up while the database was away.
    pub fn tend(&mut self) {
        let has_left = |process: &mut Process| matches!(process.0.try_wait(), Ok(Some(_)));
        if self.orchestrator.as_mut().is_some_and(has_left) {
            self.orchestrator = Some(self.start_orchestrator());
        }
        for place in 0..WORKERS {
            if has_left(&mut self.workers[place]) {
                self.replaced += 1;
                self.replace(place);
            }
        }
    }

    pub fn restart_orchestrator(&mut self) {
        if let Some(running) = &mut self.orchestrator {
            running.end(Signal::KILL);
        }
        self.orchestrator = Some(self.start_orchestrator());
    }

    /// Stops the server as a power failure would, and starts it again after a while.
    pub async fn restart_database(&mut self, down: Duration) {
        tokio::task::block_in_place(|| self.server.halt_immediate()).unwrap();
        tokio::time::sleep(down).await;
        tokio::task::block_in_place(|| self.server.resume()).unwrap();
        self.world.database.owner = self.world.database.connect().await;
    }

    /// Waits until the control plane is there again, and says how long it was away at most.
    pub async fn recover(&mut self) -> Duration {
        while let Some(over) = self.outages.join_next().await {
            over.unwrap();
            self.tend();
        }
        self.outage
    }

    pub async fn is_over(&self) -> bool {
        let open = "brightrun.job where outcome is null";
        self.world.database.count(open, &[]).await == 0
            && self.world.database.count("brightrun.dispatch", &[]).await == 0
    }

    /// A last job, so that somebody sweeps.
    pub async fn one_more_job(&mut self) {
        let last = self.job(1).await;
        self.jobs.push(last);
        let deadline = tokio::time::Instant::now() + super::PATIENCE;
        while self.world.database.job(last).await["status"] != "completed" {
            assert!(
                tokio::time::Instant::now() < deadline,
                "the last job hangs: {:#}",
                self.open().await
            );
            self.tend();
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// What is known of jobs that have not ended, for a message.
    pub async fn open(&self) -> Value {
        let open = "select coalesce(jsonb_agg(to_jsonb(job) - array['payload'] || jsonb_build_object('dispatch', to_jsonb(dispatch))), '[]')
                      from brightrun.job_status job left join brightrun.dispatch on dispatch.job_id = job.id
                     where job.finished_at is null or dispatch.job_id is not null";
        let tail = |name: &str| {
            let text = std::fs::read_to_string(self.world.folder.path().join(name)).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            lines[lines.len().saturating_sub(25)..].join("\n")
        };
        let logs = ["pod0.log", "pod1.log", "orchestrator.log"].map(tail);
        json!({
            "rows": self.world.database.json(open, &[]).await, "runpod": self.plane.submitted(), "trace": self.plane.trace(),
            "logs": logs,
        })
    }
}
