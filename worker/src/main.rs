//! The program `brightrun`: parses the command line and runs one command.

use std::process::ExitCode;

use brightrun_worker::cli::{self, Cli};
use clap::Parser;

fn main() -> ExitCode {
    cli::run(Cli::parse())
}
