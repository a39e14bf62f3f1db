//! Random calls against a model of the state machine: the engine agrees with it at every step, and
//! terminal states are never left but by redrive.

use std::time::Duration;

use brightrun_queue::{Blame, CancelReply, Claimed, Error, JobFailure, JobState, Lease, NewJob};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use serde_json::json;

use crate::support::{Database, LONG, database};

const MAX_ATTEMPTS: i32 = 2;

#[derive(Clone, Copy, Debug)]
enum Call {
    Claim,
    /// With the current token, or with the one before it.
    Complete {
        stale: bool,
    },
    Fail {
        stale: bool,
        user: bool,
    },
    Snooze {
        stale: bool,
    },
    Release {
        stale: bool,
    },
    Beat {
        stale: bool,
    },
    Cancel,
    Expire,
    MakeDue,
    Redrive,
}

fn calls() -> impl Strategy<Value = Vec<Call>> {
    let stale = || prop::bool::weighted(0.25);
    let call = prop_oneof![
        6 => Just(Call::Claim),
        2 => stale().prop_map(|stale| Call::Complete { stale }),
        4 => (stale(), prop::bool::weighted(0.3)).prop_map(|(stale, user)| Call::Fail { stale, user }),
        2 => stale().prop_map(|stale| Call::Snooze { stale }),
        2 => stale().prop_map(|stale| Call::Release { stale }),
        2 => stale().prop_map(|stale| Call::Beat { stale }),
        1 => Just(Call::Cancel),
        1 => Just(Call::Expire),
        4 => Just(Call::MakeDue),
        1 => Just(Call::Redrive),
    ];
    prop::collection::vec(call, 1..25)
}

/// What the engine ought to hold about the one job.
#[derive(Debug)]
struct Model {
    state: JobState,
    attempts: i32,
    cancel_requested: bool,
    tokens: Vec<Lease>,
}

impl Model {
    fn current(&self) -> Option<Lease> {
        (self.state == JobState::Running)
            .then(|| self.tokens.last().copied())
            .flatten()
    }

    /// The lease a call uses: the newest known, or an older one.
    fn lease(&self, stale: bool) -> Option<Lease> {
        self.tokens.iter().rev().nth(usize::from(stale)).copied()
    }

    /// The state after an ending by the current token.
    fn ended(&mut self, wanted: JobState, counted: bool) {
        self.state = if self.cancel_requested {
            JobState::Cancelled
        } else {
            wanted
        };
        if !counted && !self.state.is_terminal() {
            self.attempts -= 1;
        }
    }

    fn failed(&mut self, user: bool) {
        let last = user || self.attempts >= MAX_ATTEMPTS;
        self.ended(if last { JobState::Failed } else { JobState::Scheduled }, true);
    }
}

/// Plays one call on both; the engine's answer must be the model's.
async fn play(db: &Database, model: &mut Model, id: uuid::Uuid, call: Call) {
    let before = model.state;
    match call {
        Call::Claim => {
            let claimed = db.queue.claim_job("w", id, LONG).await.unwrap();
            assert_eq!(claimed.is_some(), before == JobState::Ready, "claim in {before}");
            if let Some(Claimed { lease, attempt, .. }) = claimed {
                assert!(model.tokens.last().is_none_or(|last| last.token < lease.token));
                model.tokens.push(lease);
                model.state = JobState::Running;
                model.attempts += 1;
                assert_eq!(attempt, model.attempts);
            }
        }
        Call::Complete { stale } => {
            end(db, model, stale, "complete", |model| {
                model.ended(JobState::Completed, true)
            })
            .await;
        }
        Call::Fail { stale, user } => {
            let how = if user { "fail_user" } else { "fail_system" };
            end(db, model, stale, how, |model| model.failed(user)).await;
        }
        Call::Snooze { stale } => {
            end(db, model, stale, "snooze", |model| {
                model.ended(JobState::Scheduled, false)
            })
            .await
        }
        Call::Release { stale } => end(db, model, stale, "release", |model| model.ended(JobState::Ready, false)).await,
        Call::Beat { stale } => {
            let Some(lease) = model.lease(stale) else { return };
            let reply = db.queue.heartbeat(&[(lease, None)]).await.unwrap().remove(0).1;
            let lost = reply == brightrun_queue::HeartbeatReply::Lost;
            assert_eq!(lost, model.current() != Some(lease), "beat in {before}");
        }
        Call::Cancel => {
            let reply = db.queue.cancel(id, None).await.unwrap();
            let expected = match before {
                JobState::Ready | JobState::Scheduled | JobState::Cancelled => CancelReply::Cancelled,
                JobState::Running => CancelReply::Requested,
                ended => CancelReply::AlreadyEnded(ended),
            };
            assert_eq!(reply, expected);
            match before {
                JobState::Ready | JobState::Scheduled => model.state = JobState::Cancelled,
                JobState::Running => model.cancel_requested = true,
                _ => {}
            }
        }
        Call::Expire => {
            db.client()
                .await
                .batch_execute("update brightrun.lease set expires_at = beat_at")
                .await
                .unwrap();
            let rescued = db.sweep_at("11 minutes").await;
            assert_eq!(rescued.len(), usize::from(before == JobState::Running));
            if before == JobState::Running {
                model.failed(false);
            }
        }
        Call::MakeDue => {
            if before == JobState::Scheduled {
                let sql = "update brightrun.ready set run_at = now(), ready_seq = nextval('brightrun.ready_seq')";
                db.client().await.batch_execute(sql).await.unwrap();
                model.state = JobState::Ready;
            }
        }
        Call::Redrive => {
            assert_eq!(db.queue.redrive(id, None).await.unwrap(), before == JobState::Failed);
            if before == JobState::Failed {
                model.state = JobState::Ready;
                model.attempts = 0;
            }
        }
    }
}

/// An ending by the current token changes the model; by any other it is refused, or, from the token
/// that made the last change, told again what that was.
async fn end(db: &Database, model: &mut Model, stale: bool, how: &str, change: impl FnOnce(&mut Model)) {
    let Some(lease) = model.lease(stale) else { return };
    let failure = |blame| JobFailure::new(blame, "TEST", "broke");
    let answer = match how {
        "complete" => db.queue.complete(&lease, &json!({})).await,
        "fail_user" => db.queue.fail(&lease, &failure(Blame::User), None).await,
        "fail_system" => {
            db.queue
                .fail(&lease, &failure(Blame::System), Some(Duration::from_secs(3600)))
                .await
        }
        "snooze" => db.queue.snooze(&lease, Duration::from_secs(3600), None).await,
        _ => db.queue.release(&lease, None).await,
    };
    if model.current() == Some(lease) {
        change(model);
        assert_eq!(answer.unwrap(), model.state, "{how}");
    } else {
        match answer {
            Ok(state) => assert_eq!(
                (state, Some(lease)),
                (model.state, model.lease(false)),
                "{how} repeated"
            ),
            Err(Error::LeaseLost { .. }) => assert!(!model.state.is_terminal()),
            Err(Error::JobFinished { .. }) => assert!(model.state.is_terminal()),
            Err(other) => panic!("{how}: {other}"),
        }
    }
}

#[test]
fn random_calls_agree_with_the_model_and_terminal_states_are_never_left() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    let db = runtime.block_on(async {
        let db = database().await;
        db.sweep_at("0").await;
        db
    });
    let mut runner = TestRunner::new(Config {
        cases: 60,
        failure_persistence: None,
        ..Config::default()
    });
    let result = runner.run(&calls(), |calls| {
        runtime.block_on(async {
            let job = NewJob {
                max_attempts: MAX_ATTEMPTS,
                ..NewJob::new("work", json!({}))
            };
            let id = db.queue.enqueue(&job).await.unwrap();
            let mut model = Model {
                state: JobState::Ready,
                attempts: 0,
                cancel_requested: false,
                tokens: Vec::new(),
            };
            for call in calls {
                let before = model.state;
                play(&db, &mut model, id, call).await;
                let status = db.queue.status(id).await.unwrap().unwrap();
                assert_eq!(
                    (status.state, status.attempt),
                    (model.state, model.attempts),
                    "after {call:?} in {before}"
                );
                if before.is_terminal() && !(before == JobState::Failed && matches!(call, Call::Redrive)) {
                    assert_eq!(status.state, before, "{call:?} left a terminal state");
                }
            }
            db.assert_whole().await;
            // The next case sweeps too: leave nothing running.
            db.client()
                .await
                .batch_execute("delete from brightrun.lease; delete from brightrun.ready; delete from brightrun.job")
                .await
                .unwrap();
        });
        Ok(())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
}
