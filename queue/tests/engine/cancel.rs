//! Cancel: immediate where nothing runs, delivered where something does, and never overwritten.

use std::time::Duration;

use brightrun_queue::{Blame, CancelReply, HeartbeatReply, JobFailure, JobState, Lease, NewJob, Queue, Result};
use serde_json::json;
use uuid::Uuid;

use crate::support::{LONG, database, request};

/// The ways a worker can end a run, by number.
async fn end(queue: &Queue, lease: &Lease, way: usize) -> Result<JobState> {
    let failure = |blame| JobFailure::new(blame, "TEST", "broke");
    match way {
        0 => queue.complete(lease, &json!({"done": true})).await,
        1 => queue.fail(lease, &failure(Blame::User), None).await,
        2 => queue.fail(lease, &failure(Blame::System), None).await,
        3 => queue.snooze(lease, Duration::from_secs(60), None).await,
        _ => queue.release(lease, None).await,
    }
}
const WAYS: usize = 5;

#[tokio::test]
async fn waiting_jobs_are_cancelled_at_once() {
    let db = database().await;
    let ready = db.enqueue("work").await;
    let later = NewJob {
        delay: Some(Duration::from_secs(60)),
        ..NewJob::new("work", json!({}))
    };
    let scheduled = db.queue.enqueue(&later).await.unwrap();
    for id in [ready, scheduled] {
        assert_eq!(
            db.queue.cancel(id, Some("changed my mind")).await.unwrap(),
            CancelReply::Cancelled
        );
        let status = db.queue.status(id).await.unwrap().unwrap();
        assert_eq!(status.state, JobState::Cancelled);
        assert_eq!(status.cancel_reason.as_deref(), Some("changed my mind"));
        assert!(status.finished_at.is_some());
        assert_eq!(
            db.queue.cancel(id, None).await.unwrap(),
            CancelReply::Cancelled,
            "again is the same"
        );
        assert_eq!(db.event_names(id).await, ["enqueued", "cancelled"]);
    }
    assert_eq!(db.claim("w", "work", 10).await, vec![]);
}

#[tokio::test]
async fn a_running_job_hears_of_it_and_ends_as_cancelled_whatever_it_reports() {
    for way in 0..WAYS {
        let db = database().await;
        let lease = db.running("work").await;
        assert_eq!(
            db.queue.cancel(lease.job_id, Some("stop")).await.unwrap(),
            CancelReply::Requested
        );
        assert_eq!(
            db.state(lease.job_id).await,
            "running",
            "its worker has not stopped yet"
        );
        let replies = db.queue.heartbeat(&[(lease, None)]).await.unwrap();
        assert_eq!(
            replies[0].1,
            HeartbeatReply::CancelRequested {
                reason: Some("stop".into())
            }
        );
        db.queue.report(&lease, "stopping", &json!({})).await.unwrap();
        assert_eq!(
            end(&db.queue, &lease, way).await.unwrap(),
            JobState::Cancelled,
            "way {way}"
        );
        let status = db.queue.status(lease.job_id).await.unwrap().unwrap();
        assert_eq!(
            (status.state, status.result, status.error),
            (JobState::Cancelled, None, None)
        );
        assert_eq!(db.queue.claim_job("w", lease.job_id, LONG).await.unwrap(), None);
        db.assert_whole().await;
    }
}

#[tokio::test]
async fn a_cancelled_job_whose_worker_died_is_cancelled_not_retried() {
    let db = database().await;
    let lease = db.running("work").await;
    db.queue.cancel(lease.job_id, None).await.unwrap();
    db.sweep_at("0").await;
    assert_eq!(db.sweep_at("1 hour").await, [(lease.job_id, "cancelled".to_owned())]);
}

#[tokio::test]
async fn an_ended_job_stays_as_it_is() {
    let db = database().await;
    let lease = db.running("work").await;
    db.queue.complete(&lease, &json!({})).await.unwrap();
    let reply = db.queue.cancel(lease.job_id, None).await.unwrap();
    assert_eq!(reply, CancelReply::AlreadyEnded(JobState::Completed));
    assert_eq!(db.state(lease.job_id).await, "completed");
    assert_eq!(
        db.queue.cancel(Uuid::new_v4(), None).await.unwrap(),
        CancelReply::Missing
    );
}

/// Whoever is first wins, and both are told the truth: if the cancel was accepted before the end, the
/// job is cancelled; if it came too late, it says how the job had ended.
#[tokio::test(flavor = "multi_thread")]
async fn racing_with_every_ending_the_two_answers_always_agree() {
    let db = database().await;
    for projected in [false, true] {
        let kind = if projected { "projected" } else { "plain" };
        if projected {
            db.with_projector(kind).await;
        }
        for round in 0..60 {
            let lease = db.running(kind).await;
            let (cancelling, ending) = (db.queue.clone(), db.queue.clone());
            let cancel = tokio::spawn(async move { cancelling.cancel(lease.job_id, None).await.unwrap() });
            let end = tokio::spawn(async move { end(&ending, &lease, round % WAYS).await.unwrap() });
            let (cancel, end) = (cancel.await.unwrap(), end.await.unwrap());
            let state = db.queue.status(lease.job_id).await.unwrap().unwrap().state;
            match cancel {
                CancelReply::Requested => assert_eq!((end, state), (JobState::Cancelled, JobState::Cancelled)),
                // It had fallen back to waiting and was cancelled there, or the ending was first told so.
                CancelReply::Cancelled => assert_eq!(state, JobState::Cancelled),
                CancelReply::AlreadyEnded(told) => assert_eq!((told, end), (state, state)),
                CancelReply::Missing => panic!("the job is there"),
            }
            if projected {
                let told = db.told_names(lease.job_id).await;
                assert_eq!(told.last().map(String::as_str), Some(state.name()), "{told:?}");
            }
        }
    }
    db.assert_whole().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn racing_with_claims_each_job_is_either_cancelled_or_told_to_stop() {
    let db = database().await;
    let mut ids = Vec::new();
    for _ in 0..150 {
        ids.push(db.enqueue("work").await);
    }
    let claiming = db.queue.clone();
    let claimer = tokio::spawn(async move {
        let mut leases = Vec::new();
        loop {
            let claimed = claiming.claim(&request("w", &["work"], 5)).await.unwrap();
            if claimed.is_empty() {
                return leases;
            }
            leases.extend(claimed.into_iter().map(|job| job.lease));
        }
    });
    let mut requested = 0;
    for id in &ids {
        match db.queue.cancel(*id, None).await.unwrap() {
            CancelReply::Requested => requested += 1,
            CancelReply::Cancelled => {}
            other => panic!("{other:?}"),
        }
    }
    let leases = claimer.await.unwrap();
    assert!(
        leases.len() <= requested,
        "a lease granted means the cancel goes through its worker"
    );
    for lease in leases {
        assert_eq!(
            db.queue.complete(&lease, &json!({})).await.unwrap(),
            JobState::Cancelled
        );
    }
    for id in ids {
        assert_eq!(db.state(id).await, "cancelled");
    }
    db.assert_whole().await;
}
