//! The command-line flags of RunPod's SDK, as `runpodctl` and people pass them to a handler.

use super::Compatibility;
use crate::error::{Failure, Result};

/// The SDK's flags and one of ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalFlags {
    /// `--rp_serve_api`: serve the local API.
    pub serve: bool,
    /// `--rp_api_host`.
    pub host: String,
    /// `--rp_api_port`.
    pub port: u16,
    /// `--rp_api_concurrency`: jobs at once.
    pub concurrency: usize,
    /// `--rp_log_level`.
    pub log_level: Option<String>,
    /// `--rp_debugger`: accepted, without effect.
    pub debugger: bool,
    /// `--test_input`: a whole job as JSON text.
    pub test_input: Option<String>,
    /// `--rp_api_compat=cloud|sdk`, not a flag of the SDK.
    pub compatibility: Compatibility,
}

impl Default for LocalFlags {
    fn default() -> Self {
        Self {
            serve: false,
            host: "localhost".to_owned(),
            port: 8000,
            concurrency: 1,
            log_level: None,
            debugger: false,
            test_input: None,
            compatibility: Compatibility::Cloud,
        }
    }
}

const FLAGS: [&str; 8] = [
    "--rp_log_level",
    "--rp_debugger",
    "--rp_serve_api",
    "--rp_api_port",
    "--rp_api_concurrency",
    "--rp_api_host",
    "--rp_api_compat",
    "--test_input",
];

impl LocalFlags {
    /// Reads the flags out of a command line and returns what is left for the program. `--flag value`, `--flag=value` and unambiguous
    /// beginnings of a flag's name are understood, as Python's parser does.
    ///
    /// # Errors
    /// `RUNPOD_FLAG_INVALID`: a value is missing or not understood, or a beginning fits several flags.
    pub fn parse(arguments: impl IntoIterator<Item = String>) -> Result<(Self, Vec<String>)> {
        let (mut flags, mut rest) = (Self::default(), Vec::new());
        let mut arguments = arguments.into_iter();
        while let Some(argument) = arguments.next() {
            let (name, inline) = match argument.split_once('=') {
                Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
                None => (argument.clone(), None),
            };
            let Some(flag) = complete(&name)? else {
                rest.push(argument);
                continue;
            };
            match flag {
                "--rp_serve_api" => flags.serve = true,
                "--rp_debugger" => flags.debugger = true,
                _ => {
                    let value = inline
                        .or_else(|| arguments.next())
                        .ok_or_else(|| invalid(flag, "needs a value"))?;
                    flags.set(flag, value)?;
                }
            }
        }
        Ok((flags, rest))
    }

    fn set(&mut self, flag: &str, value: String) -> Result<()> {
        let number = || {
            value
                .parse::<u16>()
                .map_err(|_| invalid(flag, "needs a number up to 65535"))
        };
        match flag {
            "--rp_api_port" => self.port = number()?,
            "--rp_api_concurrency" => self.concurrency = usize::from(number()?).max(1),
            "--rp_api_host" => self.host = value,
            "--test_input" => self.test_input = Some(value),
            "--rp_api_compat" => {
                self.compatibility = match value.as_str() {
                    "cloud" => Compatibility::Cloud,
                    "sdk" => Compatibility::Sdk,
                    _ => return Err(invalid(flag, "is `cloud` or `sdk`")),
                }
            }
            _ => {
                let level = value.to_ascii_uppercase();
                if !["ERROR", "WARN", "INFO", "DEBUG"].contains(&level.as_str()) {
                    return Err(invalid(flag, "is ERROR, WARN, INFO or DEBUG"));
                }
                self.log_level = Some(level);
            }
        }
        Ok(())
    }
}

/// The flag that `name` is or begins; `None` for arguments of the program itself.
fn complete(name: &str) -> Result<Option<&'static str>> {
    if let Some(exact) = FLAGS.iter().find(|flag| **flag == name) {
        return Ok(Some(exact));
    }
    // Below this length a beginning could be meant for the program.
    if !name.starts_with("--rp_") && !name.starts_with("--test_") {
        return Ok(None);
    }
    let mut fitting = FLAGS.iter().filter(|flag| flag.starts_with(name));
    match (fitting.next(), fitting.next()) {
        (Some(flag), None) => Ok(Some(flag)),
        (Some(first), Some(second)) => Err(invalid(name, &format!("could mean {first} or {second}"))),
        _ => Ok(None),
    }
}

fn invalid(flag: &str, why: &str) -> Failure {
    Failure::user("RUNPOD_FLAG_INVALID", format!("{flag} {why}")).at("the command line")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn parse(line: &str) -> Result<(LocalFlags, Vec<String>)> {
        LocalFlags::parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn the_command_of_runpodctl_is_understood_and_other_arguments_are_left() {
        let line = "--rp_serve_api --rp_api_host=0.0.0.0 --rp_api_port=7270 --rp_api_concurrency=1 --model m --json";
        let (flags, rest) = parse(line).unwrap();
        assert_eq!(
            (flags.serve, flags.host.as_str(), flags.port, flags.concurrency),
            (true, "0.0.0.0", 7270, 1)
        );
        assert_eq!(rest, ["--model", "m", "--json"]);
    }

    #[test]
    fn a_beginning_that_fits_one_flag_is_that_flag() {
        assert_eq!(parse("--rp_api_p 9").unwrap().0.port, 9);
        let failure = parse("--rp_api_ 9").unwrap_err();
        assert!(failure.message.contains("could mean"), "{failure}");
    }

    #[test]
    fn a_missing_or_senseless_value_is_an_error() {
        for line in [
            "--rp_api_port",
            "--rp_api_port x",
            "--rp_log_level loud",
            "--rp_api_compat=mine",
        ] {
            assert_eq!(parse(line).unwrap_err().code, "RUNPOD_FLAG_INVALID", "{line}");
        }
        assert_eq!(
            parse("--rp_log_level debug").unwrap().0.log_level.as_deref(),
            Some("DEBUG")
        );
    }
}
