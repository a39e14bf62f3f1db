//! Measuring, all at once or as asked.
//!
//! Asked on standard input, a line each, and answered by one JSON line each:
//!
//! ```text
//! describe          {"device": …}
//! list              {"cases": [{"name": …, "goal": …, "bytes": …, "flops": …, …}]}
//! prepare NAME      {"ready": NAME, "calls": calls between two marks} or {"absent": reason}
//! measure COUNT     {"milliseconds": [of one call, …]}
//! check NAME        {"check": {"largest": …, "mean": …} or null}: against float32, on the same operands
//! drop              {"dropped": true}: the case's operands are gone
//! ```

use std::io::BufRead;

use serde_json::{Value, json};

use crate::cases::{Body, Case};
use crate::clock::Clock;

/// Milliseconds between two marks at least: a hundred times what a mark costs.
const SPAN: f64 = 1.0;
const MOST_CALLS: usize = 200;
/// Measurements of a case when nobody asks.
const COUNT: usize = 20;

struct Prepared<'a, B> {
    backend: &'a B,
    body: Body<'a>,
    calls: usize,
}

impl<'a, B: Clock> Prepared<'a, B> {
    /// Sets a case up and runs it until its time is known.
    fn new(backend: &'a B, case: &Case) -> Result<Self, String> {
        let mut body = crate::cases::prepare(backend, case).map_err(|error| error.to_string())?;
        let mut failure = None;
        let mut once = || failure = body().err().or(failure.take());
        // The first call compiles and loads, the second finds every block in the pool.
        once();
        once();
        backend.read_back();
        let single = backend.milliseconds(&mut once);
        match failure {
            Some(error) => Err(error.to_string()),
            None => Ok(Self {
                backend,
                body,
                calls: ((SPAN / single.max(1e-4)).ceil() as usize).clamp(1, MOST_CALLS),
            }),
        }
    }

    fn measure(&mut self, count: usize) -> Vec<f64> {
        let calls = self.calls;
        let measurements = (0..count).map(|_| {
            let span = self.backend.milliseconds(&mut || {
                for _ in 0..calls {
                    (self.body)().unwrap();
                }
            });
            span / calls as f64
        });
        measurements.collect()
    }
}

/// Waiting, where a queue may be ahead.
trait ReadBack {
    fn read_back(&self);
}

impl<B: Clock> ReadBack for B {
    fn read_back(&self) {
        let one = self.zeros(brightrun_kernels::DType::F32, [1]).unwrap();
        self.read_f32(&one).unwrap();
    }
}

fn say(value: &Value) {
    println!("{value}");
}

/// Answers until standard input ends.
pub fn serve<B: Clock>(backend: &B, cases: &[Case]) {
    let mut prepared: Option<Prepared<'_, B>> = None;
    for line in std::io::stdin().lock().lines().map_while(Result::ok) {
        let (word, rest) = line.trim().split_once(' ').unwrap_or((line.trim(), ""));
        match word {
            "describe" => say(&backend.describe()),
            "list" => say(&json!({ "cases": cases.iter().map(Case::describe).collect::<Vec<_>>() })),
            "prepare" => {
                prepared = None;
                let found = cases
                    .iter()
                    .find(|case| case.name == rest)
                    .ok_or_else(|| format!("no case {rest}"));
                match found.and_then(|case| Prepared::new(backend, case)) {
                    Ok(ready) => {
                        say(&json!({ "ready": rest, "calls": ready.calls }));
                        prepared = Some(ready);
                    }
                    Err(reason) => say(&json!({ "absent": reason })),
                }
            }
            "measure" => match &mut prepared {
                Some(ready) => say(&json!({ "milliseconds": ready.measure(rest.parse().unwrap_or(1)) })),
                None => say(&json!({ "absent": "nothing is prepared" })),
            },
            "check" => {
                let found = cases.iter().find(|case| case.name == rest);
                say(&json!({ "check": found.map(|case| judged(backend, case)) }));
            }
            "drop" => {
                prepared = None;
                say(&json!({ "dropped": true }));
            }
            other => say(&json!({ "absent": format!("no such request: {other}") })),
        }
    }
}

/// A case's numerics, or why there are none.
fn judged<B: Clock>(backend: &B, case: &Case) -> Value {
    let found = crate::check::check(backend, case.work);
    found.unwrap_or_else(|error| json!({ "absent": error.to_string() }))
}

/// Measures every case whose name has `filter`.
pub fn once<B: Clock>(backend: &B, cases: &[Case], filter: &str) {
    say(&backend.describe());
    for case in cases.iter().filter(|case| case.name.contains(filter)) {
        let mut line = case.describe();
        line["check"] = judged(backend, case);
        match Prepared::new(backend, case) {
            Err(reason) => line["absent"] = reason.into(),
            Ok(mut ready) => {
                let mut times = ready.measure(COUNT);
                times.sort_by(f64::total_cmp);
                let at = |share: f64| times[((times.len() - 1) as f64 * share).round() as usize];
                let median = at(0.5);
                line["milliseconds"] = json!({ "median": median, "p10": at(0.1), "p90": at(0.9) });
                line["calls"] = ready.calls.into();
                line["tflops"] = (case.flops / median / 1e9).into();
                line["gigabytes_per_second"] = (case.bytes / median / 1e6).into();
            }
        }
        say(&line);
    }
}
