//! What is done about a pushed job, from its row and, where that does not say enough, from RunPod's answer.
//!
//! The row decides. RunPod is asked only about jobs that wait: a job that runs has a lease, and one that has ended is over.

use std::time::Duration;

use brightrun_queue::{Blame, Dispatched, JobFailure, JobState};

use crate::runpod::JobStatus;
use crate::runpod::client::RemoteJob;

/// Workers that RunPod has started call themselves so.
const RUNPOD_WORKER: &str = "runpod:";

/// A job that RunPod does not know so soon after it was sent may just not be known everywhere yet.
const GRACE_SECONDS: f64 = 60.0;

/// What the row alone says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FromRow {
    /// Nothing is left to do.
    Over,
    /// Nobody needs the run at RunPod any more.
    CancelAndOver,
    /// A user wants the running job to stop.
    CancelAndWait,
    /// It runs.
    Wait,
    /// It is not known to have been sent.
    Send,
    /// It waits: RunPod says for what.
    Ask,
}

/// Reads the row.
pub fn from_row(dispatched: &Dispatched) -> FromRow {
    let is_sent = dispatched.external_id.is_some();
    let is_ours = dispatched
        .worker
        .as_deref()
        .is_some_and(|worker| worker.starts_with(RUNPOD_WORKER));
    match dispatched.state {
        JobState::Completed | JobState::Failed | JobState::Cancelled if !is_sent => FromRow::Over,
        // A pull worker may have done it while it waited at RunPod. Its own worker posts within moments: that is left alone.
        JobState::Completed => FromRow::Ask,
        JobState::Failed | JobState::Cancelled => FromRow::CancelAndOver,
        JobState::Running if !is_ours && is_sent => FromRow::CancelAndOver,
        JobState::Running if !is_ours => FromRow::Over,
        JobState::Running if dispatched.cancel_requested && is_sent => FromRow::CancelAndWait,
        JobState::Running => FromRow::Wait,
        JobState::Ready | JobState::Scheduled if is_sent => FromRow::Ask,
        // A sender died, or its answer was lost; but an attempt has come and gone since.
        JobState::Ready | JobState::Scheduled if dispatched.was_claimed => FromRow::Over,
        JobState::Ready | JobState::Scheduled => FromRow::Send,
    }
}

/// What RunPod's answer adds.
#[derive(Clone, Debug, PartialEq)]
pub enum FromRunPod {
    /// The run there is over, and the row says what came of it.
    Over,
    /// Nobody needs the run there any more.
    CancelAndOver,
    /// Nothing new.
    Wait,
    /// The run there ended, and no worker had claimed the job.
    Failed(JobFailure),
}

/// Reads RunPod's answer about a job that waits or is completed; `None`: RunPod does not know it.
pub fn from_runpod(dispatched: &Dispatched, remote: Option<&RemoteJob>) -> FromRunPod {
    let is_final = remote.is_none_or(|remote| remote.status.is_final());
    if dispatched.state == JobState::Completed {
        let waits = remote.is_some_and(|remote| remote.status == JobStatus::InQueue);
        return if waits {
            FromRunPod::CancelAndOver
        } else {
            FromRunPod::Over
        };
    }
    if !is_final {
        return FromRunPod::Wait;
    }
    if dispatched.was_claimed {
        return FromRunPod::Over;
    }
    if remote.is_none() && dispatched.sent_seconds.is_some_and(|age| age < GRACE_SECONDS) {
        return FromRunPod::Wait;
    }
    FromRunPod::Failed(lost(remote))
}

/// A run that ended before any worker had claimed its job.
fn lost(remote: Option<&RemoteJob>) -> JobFailure {
    let (code, message) = match remote.map(|remote| &remote.status) {
        None => (
            "RUNPOD_JOB_FORGOTTEN",
            "RunPod does not know the job any more: its time to live may be over",
        ),
        Some(JobStatus::TimedOut) => (
            "RUNPOD_TIMED_OUT",
            "RunPod ended the job: no worker came in time, or none began it",
        ),
        Some(JobStatus::Cancelled) => (
            "RUNPOD_CANCELLED",
            "Somebody cancelled the job at RunPod before a worker had begun it",
        ),
        Some(JobStatus::Completed) => (
            "RUNPOD_COMPLETED_WITHOUT_RESULT",
            "RunPod says completed, but no worker has begun the job",
        ),
        Some(_) => ("RUNPOD_FAILED", "The job failed at RunPod before a worker had begun it"),
    };
    let told = remote
        .and_then(|remote| remote.error.as_ref())
        .map(|error| match error.as_str() {
            Some(text) => text.to_owned(),
            None => error.to_string(),
        });
    let message = match told {
        Some(told) => format!("{message}: {}", told.chars().take(1000).collect::<String>()),
        None => message.to_owned(),
    };
    JobFailure::new(Blame::Platform, code, message)
}

/// When a dispatch is looked at next.
pub fn after(poll: Duration, what: FromRow) -> Duration {
    match what {
        // Its heartbeat is the proof that it lives; this only notices its end.
        FromRow::Wait => poll * 3,
        _ => poll,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use brightrun_queue::DispatchTicket;
    use serde_json::{Value, json};
    use uuid::Uuid;

    fn sent(state: JobState) -> Dispatched {
        Dispatched {
            ticket: DispatchTicket {
                job_id: Uuid::nil(),
                token: 1,
            },
            endpoint: "ep1".to_owned(),
            external_id: Some("r-1".to_owned()),
            sent_seconds: Some(100.0),
            state,
            worker: None,
            was_claimed: false,
            cancel_requested: false,
            payload: Value::Null,
        }
    }

    fn remote(status: &str) -> Option<RemoteJob> {
        serde_json::from_value(json!({"id": "r-1", "status": status})).ok()
    }

    fn run_by(worker: &str) -> Dispatched {
        Dispatched {
            worker: Some(worker.to_owned()),
            ..sent(JobState::Running)
        }
    }

    #[test]
    fn the_row_decides_wherever_it_can() {
        assert_eq!(from_row(&sent(JobState::Cancelled)), FromRow::CancelAndOver);
        assert_eq!(from_row(&sent(JobState::Failed)), FromRow::CancelAndOver);
        assert_eq!(from_row(&run_by("runpod:pod1:x")), FromRow::Wait);
        assert_eq!(
            from_row(&run_by("4711-pull")),
            FromRow::CancelAndOver,
            "a pull worker was faster"
        );
        let cancelled = Dispatched {
            cancel_requested: true,
            ..run_by("runpod:pod1:x")
        };
        assert_eq!(from_row(&cancelled), FromRow::CancelAndWait);
        let unsent = Dispatched {
            external_id: None,
            sent_seconds: None,
            ..sent(JobState::Ready)
        };
        assert_eq!(from_row(&unsent), FromRow::Send);
        for state in [JobState::Ready, JobState::Scheduled, JobState::Completed] {
            assert_eq!(from_row(&sent(state)), FromRow::Ask);
        }
    }

    #[test]
    fn a_waiting_job_whose_run_ended_unclaimed_has_failed_once() {
        for (status, code) in [
            ("FAILED", "RUNPOD_FAILED"),
            ("TIMED_OUT", "RUNPOD_TIMED_OUT"),
            ("CANCELLED", "RUNPOD_CANCELLED"),
            ("COMPLETED", "RUNPOD_COMPLETED_WITHOUT_RESULT"),
        ] {
            let said = from_runpod(&sent(JobState::Ready), remote(status).as_ref());
            assert!(
                matches!(said, FromRunPod::Failed(failure) if failure.code == code),
                "{status}"
            );
            let claimed = Dispatched {
                was_claimed: true,
                ..sent(JobState::Scheduled)
            };
            assert_eq!(
                from_runpod(&claimed, remote(status).as_ref()),
                FromRunPod::Over,
                "{status}"
            );
        }
        for status in ["IN_QUEUE", "IN_PROGRESS", "SOMETHING_NEW"] {
            assert_eq!(
                from_runpod(&sent(JobState::Ready), remote(status).as_ref()),
                FromRunPod::Wait
            );
        }
    }

    #[test]
    fn a_forgotten_job_has_failed_but_not_in_its_first_minute() {
        let said = from_runpod(&sent(JobState::Ready), None);
        assert!(matches!(said, FromRunPod::Failed(failure) if failure.code == "RUNPOD_JOB_FORGOTTEN"));
        let fresh = Dispatched {
            sent_seconds: Some(1.0),
            ..sent(JobState::Ready)
        };
        assert_eq!(from_runpod(&fresh, None), FromRunPod::Wait);
    }

    #[test]
    fn a_completed_job_that_still_waits_at_runpod_is_called_off() {
        let done = sent(JobState::Completed);
        assert_eq!(
            from_runpod(&done, remote("IN_QUEUE").as_ref()),
            FromRunPod::CancelAndOver
        );
        assert_eq!(from_runpod(&done, remote("IN_PROGRESS").as_ref()), FromRunPod::Over);
        assert_eq!(from_runpod(&done, None), FromRunPod::Over);
    }
}
