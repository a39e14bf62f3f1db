//! P: progress updates.

use std::time::Duration;

use serde_json::{Value, json};

use crate::fake_runpod::{FakeRunPod, Request, Route, Step};
use crate::support::{Mock, settings, start};

fn progress(plane: &FakeRunPod) -> Vec<Request> {
    plane.of(Route::Done).into_iter().filter(Request::is_progress).collect()
}

#[test]
fn p01_an_update_is_in_progress_with_its_value_as_output() {
    let plane = FakeRunPod::start();
    let worker = start(&plane, Mock::default(), settings());
    plane.job("job-1", json!({"progress": [{"step": 3}], "wait": true}));
    plane.eventually("an update", |_| !progress(&plane).is_empty());
    let update = &progress(&plane)[0];
    assert_eq!(update.json(), json!({"status": "IN_PROGRESS", "output": {"step": 3}}));
    assert_eq!(update.target, "/v2/ep1/job-done/pod1/job-1?gpu=SIM+1&isStream=false");
    worker.mock.release(1);
    plane.result("job-1");
}

#[test]
fn p02_on_a_slow_network_no_update_comes_after_the_result() {
    let plane = FakeRunPod::start();
    plane.script(
        Route::Done,
        (0..40).map(|_| Step::status(200).after(Duration::from_millis(30))),
    );
    let mut eager = settings();
    eager.pace.progress_every = Duration::ZERO;
    let _worker = start(&plane, Mock::default(), eager);
    for round in 0..20 {
        let id = format!("job-{round}");
        let values: Vec<Value> = (0..round).map(|step| json!({"step": step})).collect();
        plane.job(&id, json!({"progress": values, "return": "end"}));
        plane.result(&id);
    }
    plane.more(Route::Ping, 2);
    for round in 0..20 {
        let id = format!("job-{round}");
        let posts: Vec<Request> = plane
            .of(Route::Done)
            .into_iter()
            .filter(|post| post.job() == id)
            .collect();
        assert!(posts.last().unwrap().is_result(), "{}", plane.trace());
        assert_eq!(posts.iter().filter(|post| post.is_result()).count(), 1);
    }
}

#[test]
fn p02_an_update_that_hangs_delays_the_result_only_for_its_own_time() {
    let plane = FakeRunPod::start();
    plane.script(Route::Done, [Step::Hang]);
    let worker = start(&plane, Mock::default(), settings());
    plane.job("job-1", json!({"progress": [1], "wait": true}));
    plane.eventually("the update that hangs", |_| progress(&plane).len() == 1);
    worker.mock.release(1);
    plane.result("job-1");
    assert_eq!(
        progress(&plane).len(),
        1,
        "it is not tried again once the job has ended"
    );
}

#[test]
fn p03_of_ten_thousand_updates_few_are_sent_and_the_last_one_wins() {
    let plane = FakeRunPod::start();
    let begun = std::time::Instant::now();
    let worker = start(&plane, Mock::default(), settings());
    let values: Vec<Value> = (0..10_000).map(|step| json!(step)).collect();
    plane.job("job-1", json!({"progress": values, "wait": true}));
    plane.eventually("the last value", |_| {
        progress(&plane)
            .last()
            .is_some_and(|update| update.json()["output"] == 9999)
    });
    // On an idle machine they are said within one interval, and three are sent: more only as more time has passed.
    let intervals = begun.elapsed().as_millis() / settings().pace.progress_every.as_millis();
    let sent = progress(&plane).len() as u128;
    assert!(
        sent <= 3.max(intervals + 1),
        "{sent} were sent in {intervals} intervals"
    );
    worker.mock.release(1);
    plane.result("job-1");
}

#[test]
fn p04_updates_that_are_refused_do_not_touch_the_job() {
    let plane = FakeRunPod::start();
    plane.script(Route::Done, [Step::status(500), Step::status(500)]);
    let worker = start(&plane, Mock::default(), settings());
    plane.job("job-1", json!({"progress": [1], "wait": true, "return": "fine"}));
    plane.eventually("two tries", |_| progress(&plane).len() == 2);
    worker.mock.release(1);
    assert_eq!(plane.result("job-1"), json!({"output": "fine"}));
}

#[test]
fn a_value_above_the_limit_is_replaced_by_a_note() {
    let plane = FakeRunPod::start();
    let worker = start(&plane, Mock::default(), settings());
    plane.job("job-1", json!({"progress": ["x".repeat(70_000)], "wait": true}));
    plane.eventually("an update", |_| !progress(&plane).is_empty());
    assert!(progress(&plane)[0].body.len() < 1000);
    worker.mock.release(1);
}
