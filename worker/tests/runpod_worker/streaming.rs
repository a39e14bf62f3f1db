//! S: streaming.

use brightrun_worker::runpod::OutputForm;
use serde_json::{Value, json};

use crate::fake_runpod::{FakeRunPod, Route, Step};
use crate::support::{Mock, settings, start};

fn streaming(aggregate: bool) -> Mock {
    Mock {
        form: OutputForm::Stream { aggregate },
        ..Mock::default()
    }
}

fn streamed(plane: &FakeRunPod) -> Vec<Value> {
    plane
        .of(Route::Stream)
        .iter()
        .map(|post| post.json()["output"].clone())
        .collect()
}

#[test]
fn s01_chunks_arrive_in_order_and_the_final_post_says_that_it_was_a_stream() {
    let plane = FakeRunPod::start();
    let _worker = start(&plane, streaming(false), settings());
    let chunks: Vec<Value> = (0..200).map(|number| json!({"n": number})).collect();
    plane.job("job-1", json!({"chunks": chunks, "return": null}));
    plane.result("job-1");
    assert_eq!(streamed(&plane), chunks);
    let requests = plane.requests();
    let last_chunk = requests
        .iter()
        .rposition(|request| request.route == Route::Stream)
        .unwrap();
    let result = requests
        .iter()
        .position(|request| request.route == Route::Done)
        .unwrap();
    assert!(last_chunk < result);
    assert_eq!(requests[result].parameter("isStream"), Some("true"));
    assert_eq!(
        requests[last_chunk].target,
        "/v2/ep1/job-stream/pod1/job-1?gpu=SIM+1&isStream=false"
    );
}

#[test]
fn s02_s03_a_chunk_in_trouble_is_tried_again_before_the_next_one() {
    let plane = FakeRunPod::start();
    let ok = || Step::status(200);
    plane.script(
        Route::Stream,
        [ok(), ok(), Step::status(500), Step::status(500), Step::Drop, ok(), ok()],
    );
    let _worker = start(&plane, streaming(false), settings());
    plane.job("job-1", json!({"chunks": [1, 2, 3, 4], "return": null}));
    plane.result("job-1");
    assert_eq!(
        streamed(&plane),
        [json!(1), json!(2), json!(3), json!(3), json!(3), json!(3), json!(4)]
    );
}

#[test]
fn s04_after_an_error_the_final_post_is_the_error() {
    let plane = FakeRunPod::start();
    let _worker = start(&plane, streaming(true), settings());
    plane.job("job-1", json!({"chunks": [1, 2], "fail": "at the third"}));
    let body = plane.result("job-1");
    assert!(body["error"].as_str().unwrap().contains("at the third") && body.get("output").is_none());
    assert_eq!(streamed(&plane), [json!(1), json!(2)]);
    assert_eq!(plane.of(Route::Done)[0].parameter("isStream"), Some("true"));
}

#[test]
fn s04_an_error_is_also_streamed_when_asked_for() {
    let plane = FakeRunPod::start();
    let mut loud = settings();
    loud.stream_errors = true;
    let _worker = start(&plane, streaming(false), loud);
    plane.job("job-1", json!({"fail": "soon"}));
    plane.result("job-1");
    assert!(streamed(&plane)[0]["error"].as_str().unwrap().contains("soon"));
}

#[test]
fn s05_the_final_output_is_the_list_of_chunks_only_where_that_was_asked_for() {
    for (aggregate, output) in [(true, json!([1, 2])), (false, json!([]))] {
        let plane = FakeRunPod::start();
        let _worker = start(&plane, streaming(aggregate), settings());
        plane.job("job-1", json!({"chunks": [1, 2], "return": null}));
        assert_eq!(plane.result("job-1"), json!({"output": output}));
    }
}

#[test]
fn s06_a_chunk_above_the_limit_is_refused_and_never_posted() {
    let plane = FakeRunPod::start();
    let _worker = start(&plane, streaming(false), settings());
    plane.job(
        "job-1",
        json!({"chunks": ["small", "x".repeat(2_000_000)], "return": null}),
    );
    assert!(
        plane.result("job-1")["error"]
            .as_str()
            .unwrap()
            .contains("RUNPOD_CHUNK_TOO_LARGE")
    );
    assert_eq!(streamed(&plane), [json!("small")]);
}
