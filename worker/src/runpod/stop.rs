//! The stop channel: a long poll that names jobs to be stopped.

use std::time::Duration;

use serde_json::Value;
use tokio::sync::mpsc::UnboundedSender;

use super::http::{Answer, Http, Silence};
use super::pace::{Pace, at_least};

/// After so many 404s in a row the channel counts as absent.
const ABSENT_AFTER: u32 = 5;

/// Polls for ever and sends the ids on.
pub(crate) async fn listen(http: Http, url: String, pace: Pace, stops: UnboundedSender<Vec<String>>) {
    let mut absent = 0;
    loop {
        let answer = http.get(&url, pace.stop_timeout).await;
        absent = match &answer {
            Ok(Answer { status: 404, .. }) => absent + 1,
            _ => 0,
        };
        if absent == ABSENT_AFTER {
            tracing::warn!("the control plane has no stop channel; it is asked rarely from now on");
        }
        let (ids, wait) = judge(answer, &pace, absent);
        if !ids.is_empty() && stops.send(ids).is_err() {
            return;
        }
        tokio::time::sleep(wait).await;
    }
}

fn judge(answer: Result<Answer, Silence>, pace: &Pace, absent: u32) -> (Vec<String>, Duration) {
    let none = |wait| (Vec::new(), wait);
    match answer {
        Ok(answer) if answer.status == 200 => {
            let ids = read(&answer);
            let wait = if ids.is_empty() {
                pace.stop_pause
            } else {
                Duration::ZERO
            };
            (ids, wait)
        }
        Ok(Answer { status: 204, .. }) => none(pace.stop_pause),
        Ok(Answer {
            status: 429,
            retry_after,
            ..
        }) => none(at_least(retry_after.unwrap_or(pace.stop_busy))),
        Ok(Answer { status: 404, .. }) if absent >= ABSENT_AFTER => none(pace.stop_absent),
        Ok(answer) => {
            tracing::debug!(status = answer.status, "the stop channel is in trouble");
            none(pace.stop_pause)
        }
        Err(Silence::Timeout) => none(Duration::ZERO),
        Err(Silence::Broken(why)) => {
            tracing::debug!(%why, "the stop channel cannot be reached");
            none(pace.stop_pause)
        }
    }
}

/// The ids of an answer; whatever is not what it should be names no job.
fn read(answer: &Answer) -> Vec<String> {
    let body: Option<Value> = serde_json::from_slice(&answer.body).ok();
    let listed = body
        .as_ref()
        .and_then(|body| body.get("jobsToStop"))
        .and_then(Value::as_array);
    let Some(listed) = listed.filter(|_| answer.is_json()) else {
        tracing::warn!("the stop channel answered something that names no jobs");
        return Vec::new();
    };
    let ids: Vec<String> = listed.iter().filter_map(Value::as_str).map(str::to_owned).collect();
    if ids.len() < listed.len() {
        tracing::warn!("the stop channel named jobs by something that is not a string");
    }
    ids
}
