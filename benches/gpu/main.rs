//! The kernels on a GPU, at the shapes of the model they are for; measured beside peers by `peers.py`.
//!
//! ```text
//! gpu                      measures every case once and prints one JSON line for each
//! gpu FILTER               only those whose name has FILTER
//! gpu --serve              does what its standard input asks, one line each (see `serve.rs`): how `peers.py` drives it
//! gpu --device cpu --shrink 64 …   the same on another backend with smaller shapes, to try the bench itself
//! ```
//!
//! A case's times are of the device's own clock, between marks in its queue, over as many calls as take about a millisecond;
//! a call takes other operands than the last one where all together would fit into the device's cache. What each op writes is compared
//! with float32 on the same operands (see `check.rs`); the conformance suite judges all ops at many shapes, on the same device, with
//! the same kernels. Routed rows follow a histogram that is stored (`routing.json`).

#![allow(clippy::unwrap_used, clippy::panic)]

mod cases;
mod check;
mod clock;
mod operands;
mod prepare;
mod routing;
mod serve;
mod work;

use brightrun_kernels::cpu::Cpu;
use brightrun_kernels::cuda;
use brightrun_kernels::emu;

use self::clock::Clock;

struct Arguments {
    device: String,
    shrink: usize,
    serve: bool,
    filter: String,
}

fn arguments() -> Arguments {
    let mut read = Arguments {
        device: "cuda".to_owned(),
        shrink: 1,
        serve: false,
        filter: String::new(),
    };
    // Cargo itself adds --bench.
    let mut words = std::env::args().skip(1).filter(|word| word != "--bench");
    while let Some(word) = words.next() {
        match word.as_str() {
            "--device" => read.device = words.next().unwrap(),
            "--shrink" => read.shrink = words.next().unwrap().parse().unwrap(),
            "--serve" => read.serve = true,
            filter => filter.clone_into(&mut read.filter),
        }
    }
    read
}

fn run<B: Clock>(backend: &B, arguments: &Arguments) {
    let cases = cases::all(arguments.shrink);
    if arguments.serve {
        serve::serve(backend, &cases, std::io::stdin().lock(), std::io::stdout().lock());
    } else {
        serve::once(backend, &cases, &arguments.filter);
    }
}

fn main() {
    let arguments = arguments();
    match arguments.device.as_str() {
        "cpu" => run(&Cpu::new(None).unwrap(), &arguments),
        "emulated" => run(&emu::emulated(None).unwrap(), &arguments),
        "cuda" => match cuda::cuda(0) {
            Ok(device) => run(&device, &arguments),
            Err(error) => println!("{}", serde_json::json!({ "absent": error.to_string() })),
        },
        other => panic!("no device is called {other}"),
    }
}
