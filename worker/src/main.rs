//! The program `brightrun`: parses the command line and runs one command.

use std::process::ExitCode;

use brightrun_worker::cli;

fn main() -> ExitCode {
    cli::run(cli::parse())
}
