//! Measuring, all at once or as asked.
//!
//! Asked a line at a time, and answered by one JSON line each:
//!
//! ```text
//! describe             {"device": …}
//! list                 {"cases": [{"name": …, "goal": …, "work": …, "bytes": …, "flops": …, "beside": name or null}]}
//! prepare NAME         {"ready": NAME, "calls": calls between two marks, "working_bytes": …} or {"absent": reason}
//! measure COUNT NAME   {"milliseconds": [of one call, …]}: of a case that is prepared; several may be, to be measured in turns
//! check NAME           {"check": {"largest": …, "mean": …} or {"absent": reason}}: against float32, on the same operands
//! codes ELEMENTS       {"codes": …, "absmax": …}: sha256 of what `nf4_sample` is quantised to, flat scales
//! drop                 {"dropped": true}: the operands of all cases are gone
//! ```

use std::collections::BTreeMap;
use std::io::{BufRead, Write};

use brightrun_kernels::ops::Precision;
use brightrun_kernels::{DType, Nf4Scales, Result};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::clock::Clock;
use crate::prepare::Body;
use crate::work::Case;

/// Milliseconds between two marks at least: a hundred times what a mark costs.
const SPAN: f64 = 1.0;
const MOST_CALLS: usize = 200;
/// Measurements of a case when nobody asks.
const COUNT: usize = 20;

struct Prepared<'a, B> {
    backend: &'a B,
    body: Body<'a>,
    calls: usize,
    /// The most bytes that a call had beside its operands and results.
    working_bytes: u64,
}

impl<'a, B: Clock> Prepared<'a, B> {
    /// Sets a case up and runs it until its time is known.
    fn new(backend: &'a B, case: &Case) -> std::result::Result<Self, String> {
        let body = crate::prepare::prepare(backend, case.work, Precision::Bf16, case.turns());
        let mut body = body.map_err(|error| error.to_string())?;
        let mut failure = None;
        let mut once = || failure = body(None).err().or(failure.take());
        let before = backend.memory().in_use_bytes;
        backend.reset_peak();
        // The first call compiles and loads, the second finds every block in the pool.
        once();
        once();
        backend.read_back();
        let working_bytes = backend.memory().peak_bytes.saturating_sub(before);
        let single = backend.milliseconds(&mut once);
        match failure {
            Some(error) => Err(error.to_string()),
            None => Ok(Self {
                backend,
                body,
                calls: ((SPAN / single.max(1e-4)).ceil() as usize).clamp(1, MOST_CALLS),
                working_bytes,
            }),
        }
    }

    fn measure(&mut self, count: usize) -> Vec<f64> {
        let calls = self.calls;
        let measurements = (0..count).map(|_| {
            let span = self.backend.milliseconds(&mut || {
                for _ in 0..calls {
                    (self.body)(None).unwrap();
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
        let one = self.zeros(DType::F32, [1]).unwrap();
        self.read_f32(&one).unwrap();
    }
}

/// Answers until there are no more questions.
pub fn serve<B: Clock>(backend: &B, cases: &[Case], input: impl BufRead, mut output: impl Write) {
    let mut prepared: BTreeMap<String, Prepared<'_, B>> = BTreeMap::new();
    let named = |name: &str| cases.iter().find(|case| case.name == name);
    for line in input.lines().map_while(std::result::Result::ok) {
        let (word, rest) = line.trim().split_once(' ').unwrap_or((line.trim(), ""));
        let answer = match word {
            "describe" => backend.describe(),
            "list" => json!({ "cases": cases.iter().map(Case::describe).collect::<Vec<_>>() }),
            "prepare" => {
                prepared.remove(rest);
                let found = named(rest).ok_or_else(|| format!("no case {rest}"));
                match found.and_then(|case| Prepared::new(backend, case)) {
                    Ok(ready) => {
                        let answer =
                            json!({ "ready": rest, "calls": ready.calls, "working_bytes": ready.working_bytes });
                        prepared.insert(rest.to_owned(), ready);
                        answer
                    }
                    Err(reason) => json!({ "absent": reason }),
                }
            }
            "measure" => {
                let (count, name) = rest.split_once(' ').unwrap_or((rest, ""));
                match prepared.get_mut(name) {
                    Some(ready) => json!({ "milliseconds": ready.measure(count.parse().unwrap_or(1)) }),
                    None => json!({ "absent": format!("{name} is not prepared") }),
                }
            }
            "check" => json!({ "check": named(rest).map(|case| judged(backend, case)) }),
            "codes" => digests(backend, rest.parse().unwrap_or(0))
                .unwrap_or_else(|error| json!({ "absent": error.to_string() })),
            "drop" => {
                prepared.clear();
                json!({ "dropped": true })
            }
            other => json!({ "absent": format!("no such request: {other}") }),
        };
        if writeln!(output, "{answer}").and_then(|()| output.flush()).is_err() {
            return;
        }
    }
}

/// A case's numerics, or why there are none.
fn judged<B: Clock>(backend: &B, case: &Case) -> Value {
    let found = crate::check::check(backend, case.work);
    found.unwrap_or_else(|error| json!({ "absent": error.to_string() }))
}

/// Numbers that another program can make exactly: element `i` is `(i · 2654435761 mod 2³²) / 2³² − ½` in float32, rounded to bf16.
pub fn nf4_sample(elements: usize) -> Vec<f32> {
    let element = |i: usize| (i as u32).wrapping_mul(2_654_435_761) as f32 / 4_294_967_296.0 - 0.5;
    (0..elements)
        .map(|i| half::bf16::from_f32(element(i)).to_f32())
        .collect()
}

/// What the sample is quantised to. Scales are flat: a nested one begins with a mean whose last bits are the adder's own.
fn digests<B: Clock>(backend: &B, elements: usize) -> Result<Value> {
    let shape = [elements / 64, 64];
    let exact = backend.upload_f32(shape, &nf4_sample(shape[0] * shape[1]))?;
    let mut source = backend.alloc(DType::BF16, shape)?;
    backend.copy(&exact, &mut source)?;
    let weight = backend.quantize_nf4(&source, false)?;
    let digest = |bytes: &[u8]| {
        Sha256::digest(bytes)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect::<String>()
    };
    let codes = digest(&backend.read(&weight.codes)?);
    match &weight.scales {
        Nf4Scales::Flat(absmax) => Ok(json!({ "codes": codes, "absmax": digest(&backend.read(absmax)?) })),
        Nf4Scales::Nested { .. } => Ok(json!({ "absent": "the scales are nested" })),
    }
}

/// Measures every case whose name has `filter`.
pub fn once<B: Clock>(backend: &B, cases: &[Case], filter: &str) {
    println!("{}", backend.describe());
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
                line["working_bytes"] = ready.working_bytes.into();
                line["tflops"] = (case.flops / median / 1e9).into();
                line["gigabytes_per_second"] = (case.bytes / median / 1e6).into();
            }
        }
        println!("{line}");
    }
}
