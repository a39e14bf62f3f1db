//! What can go wrong, and how it is made to.

use std::time::Duration;

use rustix::process::Signal;
use serde_json::json;

use super::stage::Stage;
use crate::fake_runpod::{Route, Step};

/// Kinds of faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    WorkerKilled,
    WorkerTerminated,
    OrchestratorKilled,
    PostsReset,
    ControlPlaneDown,
    TooManyRequests,
    DeliveredToTwo,
    DeliveredAgain,
    ConnectionsCut,
    DatabaseRestarted,
    StorageRefuses,
    StorageSlow,
    DiskFull,
    CancelledByUser,
}

impl Kind {
    pub const ALL: [Self; 14] = [
        Self::WorkerKilled,
        Self::WorkerTerminated,
        Self::OrchestratorKilled,
        Self::PostsReset,
        Self::ControlPlaneDown,
        Self::TooManyRequests,
        Self::DeliveredToTwo,
        Self::DeliveredAgain,
        Self::ConnectionsCut,
        Self::DatabaseRestarted,
        Self::StorageRefuses,
        Self::StorageSlow,
        Self::DiskFull,
        Self::CancelledByUser,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::WorkerKilled => "kill -9 of a worker",
            Self::WorkerTerminated => "SIGTERM to a worker",
            Self::OrchestratorKilled => "kill -9 of the orchestrator",
            Self::PostsReset => "connection reset while posting",
            Self::ControlPlaneDown => "control plane down",
            Self::TooManyRequests => "storm of 429",
            Self::DeliveredToTwo => "one job delivered to two workers",
            Self::DeliveredAgain => "a job delivered once more",
            Self::ConnectionsCut => "database connections cut",
            Self::DatabaseRestarted => "database stopped at once and started again",
            Self::StorageRefuses => "storage refuses",
            Self::StorageSlow => "storage slow",
            Self::DiskFull => "disk full",
            Self::CancelledByUser => "cancel by the user",
        }
    }
}

/// Longest time for which storage, disk or database are in trouble.
const TROUBLE: Duration = Duration::from_millis(2500);

/// Share of outages that may be as long as the run allows: one in this many.
const LONG_ONES: usize = 3;

/// What a worker and an orchestrator talk to.
const PLANE: [Route; 7] = [
    Route::Take,
    Route::Done,
    Route::Ping,
    Route::Stop,
    Route::Run,
    Route::Status,
    Route::Cancel,
];

impl Stage {
    /// The faults of this run: each kind once, and as many again at random, in random order.
    pub fn deal(&mut self) -> Vec<Kind> {
        let mut dealt = Kind::ALL.to_vec();
        for _ in 0..Kind::ALL.len() / 2 {
            dealt.push(Kind::ALL[self.random.below(Kind::ALL.len())]);
        }
        for place in (1..dealt.len()).rev() {
            let other = self.random.below(place + 1);
            dealt.swap(place, other);
        }
        dealt
    }

    /// Makes one thing go wrong; false where this system or the moment gives no occasion.
    pub async fn inject(&mut self, kind: Kind) -> bool {
        match kind {
            Kind::WorkerKilled => self.restart_worker(Signal::KILL),
            Kind::WorkerTerminated => self.restart_worker(Signal::TERM),
            Kind::OrchestratorKilled => self.restart_orchestrator(),
            Kind::PostsReset => {
                let resets = (0..4).map(|place| if place % 2 == 0 { Step::Drop } else { Step::DropEarly });
                self.plane.script(Route::Done, resets);
            }
            Kind::ControlPlaneDown => self.take_the_plane_down(),
            Kind::TooManyRequests => {
                for route in PLANE {
                    let answers = vec![Step::status(429).with("Retry-After", "1"); 1 + self.random.below(5)];
                    self.plane.script(route, answers);
                }
            }
            Kind::DeliveredToTwo => {
                let job = self.any_job();
                for _ in 0..2 {
                    self.deliver(job);
                }
            }
            Kind::DeliveredAgain => {
                let job = self.any_job();
                self.deliver(job);
            }
            Kind::ConnectionsCut => {
                let cut = "select count(pg_terminate_backend(pid)) from pg_stat_activity
                            where datname = current_database() and pid <> pg_backend_pid()";
                self.world.database.owner.query_one(cut, &[]).await.unwrap();
            }
            Kind::DatabaseRestarted => {
                let down = self.random.time(TROUBLE);
                self.restart_database(down).await;
            }
            Kind::StorageRefuses => {
                let time = self.random.time(TROUBLE);
                return self.store.refuse(time).await;
            }
            Kind::StorageSlow => {
                let (each, time) = (self.random.time(TROUBLE), self.random.time(TROUBLE * 2));
                return self.store.dawdle(each, time).await;
            }
            Kind::DiskFull => {
                let time = self.random.time(TROUBLE);
                let Some(disk) = &self.disk else { return false };
                disk.fill();
                tokio::time::sleep(time).await;
                disk.free();
            }
            Kind::CancelledByUser => {
                let job = self.any_job();
                let mut app = self.world.database.signed_in(self.world.user).await;
                // A user may cancel what is not over; the policies refuse the rest.
                let is_cancelled = app.cancel_job(job, 0.0).await.unwrap_or(0) == 1;
                if is_cancelled {
                    self.cancelled.push(job);
                }
                return is_cancelled;
            }
        }
        true
    }

    /// Every connection is closed unheard until the time is over, while other things go wrong.
    fn take_the_plane_down(&mut self) {
        let is_long = self.random.below(LONG_ONES) == 0;
        let longest = if is_long {
            self.longest_outage
        } else {
            self.longest_outage.min(Duration::from_secs(10))
        };
        let time = longest.mul_f64(0.4) + self.random.time(longest.mul_f64(0.6));
        for route in PLANE {
            self.plane.always(route, Step::DropEarly);
        }
        self.outage = self.outage.max(time);
        let plane = self.plane.clone();
        self.outages.spawn(async move {
            tokio::time::sleep(time).await;
            for route in PLANE {
                plane.always(route, Step::Behave);
            }
        });
    }

    /// RunPod hands a job out under another name.
    fn deliver(&mut self, job: uuid::Uuid) {
        self.deliveries += 1;
        let id = format!("again-{}-e1", self.deliveries);
        self.plane.job(&id, json!({"job_id": job}));
    }

    fn any_job(&mut self) -> uuid::Uuid {
        self.jobs[self.random.below(self.jobs.len())]
    }
}
