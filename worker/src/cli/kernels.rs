//! `brightrun kernels`: what there is to run on, which kernels there are, and compiling them ahead of time.

use brightrun_kernels::cuda::{self, Cuda, Nvrtc, Presence, Target};
use serde_json::json;

use super::output::{print_json, print_line};
use super::{KernelsBuildArguments, KernelsCommand, OutputArguments};
use crate::error::{Failure, Result};

/// Runs one of the commands.
pub fn kernels(command: &KernelsCommand) -> Result<()> {
    match command {
        KernelsCommand::List(output) => list(*output),
        KernelsCommand::Devices(output) => devices(*output),
        KernelsCommand::Build(arguments) => build(arguments),
    }
}

fn list(output: OutputArguments) -> Result<()> {
    let entries = cuda::entries();
    if output.json {
        let entries: Vec<_> = entries
            .iter()
            .map(|entry| json!({ "source": entry.source, "entry": entry.name, "threads": entry.threads }))
            .collect();
        return print_json(&json!({ "entries": entries }));
    }
    for entry in &entries {
        print_line(&format!(
            "{:<16} {:<44} {:>5} threads",
            entry.source, entry.name, entry.threads
        ))?;
    }
    Ok(())
}

fn devices(output: OutputArguments) -> Result<()> {
    let presence = Cuda::probe();
    if !output.json {
        return print_line(&presence.to_string());
    }
    match presence {
        Presence::Absent(reason) => print_json(&json!({ "devices": [], "reason": reason })),
        Presence::Present { driver, devices } => {
            let devices: Vec<_> = devices
                .iter()
                .map(|device| {
                    json!({
                        "ordinal": device.ordinal, "name": device.name, "target": device.target().to_string(),
                        "total_bytes": device.total_bytes, "multiprocessors": device.multiprocessors,
                    })
                })
                .collect();
            print_json(&json!({ "driver": format!("{}.{}", driver.0, driver.1), "devices": devices }))
        }
    }
}

fn build(arguments: &KernelsBuildArguments) -> Result<()> {
    let compiler = Nvrtc::find()?;
    let targets = match &arguments.arch {
        Some(named) => named.iter().map(|text| target(text)).collect::<Result<Vec<_>>>()?,
        None => compiler.targets()?,
    };
    let mut compiled = 0;
    let mut told = Ok(());
    cuda::build(&compiler, &targets, &arguments.out, |built| {
        compiled += usize::from(!built.was_there);
        if !arguments.output.json && told.is_ok() {
            let word = if built.was_there { "kept" } else { "built" };
            told = print_line(&format!("{word}  {}", built.path.display()));
        }
    })?;
    told?;
    if arguments.output.json {
        let targets: Vec<String> = targets.iter().map(Target::to_string).collect();
        let (major, minor) = compiler.version();
        return print_json(&json!({
            "compiler": format!("NVRTC {major}.{minor}"), "compiled": compiled, "targets": targets, "out": arguments.out,
        }));
    }
    Ok(())
}

fn target(text: &str) -> Result<Target> {
    text.parse()
        .map_err(|problem: String| Failure::user("USAGE_TARGET_UNKNOWN", problem).at("--arch"))
}
