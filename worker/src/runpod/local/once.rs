//! One local job: `--test_input`, or the file `test_input.json`.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use serde_json::Value;

use super::direct;
use crate::error::{Failure, Result};
use crate::runpod::handler::Handler;
use crate::runpod::job::RunPodJob;
use crate::runpod::redact::Redactor;

/// The file that is read without `--test_input`.
const FILE: &str = "test_input.json";

/// Runs one job and writes its chunks and its result, each a line of JSON. Returns the program's exit code: 0 when the job ended well.
///
/// # Errors
/// `RUNPOD_TEST_INPUT`: there is none, or it is not a job. The SDK ends with 1 there too.
pub async fn run_once(
    handler: Arc<dyn Handler>,
    test_input: Option<&str>,
    folder: &Path,
    redactor: &Redactor,
    out: &mut (dyn Write + Send),
) -> Result<u8> {
    let job = read(test_input, folder)?;
    let form = handler.output();
    let ran = direct::run(handler, job, form, redactor, |chunk| {
        say(out, &format!("Job chunk: {chunk}"))
    })
    .await?;
    say(out, &format!("Job result: {}", ran.outcome.body))?;
    Ok(u8::from(ran.outcome.is_failure))
}

fn read(test_input: Option<&str>, folder: &Path) -> Result<RunPodJob> {
    let wrong = |why: String| {
        Failure::user("RUNPOD_TEST_INPUT", why)
            .at(if test_input.is_some() { "--test_input" } else { FILE })
            .hint("Give a whole job, for instance {\"input\": {\"job_id\": \"…\"}}")
    };
    let text = match test_input {
        Some(text) => text.to_owned(),
        None => std::fs::read_to_string(folder.join(FILE))
            .map_err(|error| wrong(format!("There is no test input: {error}")))?,
    };
    let mut job: Value =
        serde_json::from_str(&text).map_err(|error| wrong(format!("The test input is not JSON: {error}")))?;
    if job.get("input").is_none_or(Value::is_null) {
        return Err(wrong("Job has no input parameter. Unable to run".to_owned()));
    }
    if let Value::Object(fields) = &mut job {
        fields
            .entry("id")
            .or_insert_with(|| Value::String("local_test".to_owned()));
    }
    RunPodJob::read(job).map_err(|why| wrong(format!("The test input is not a job: {why}")))
}

fn say(out: &mut (dyn Write + Send), line: &str) -> Result<()> {
    writeln!(out, "{line}")
        .map_err(|error| Failure::system("RUNPOD_TEST_OUTPUT", format!("The result cannot be written: {error}")))
}
