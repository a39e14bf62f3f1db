//! How commands speak: JSON for scripts, text for people, one exit code per kind of fault.

use std::io::Write;
use std::process::ExitCode;

use serde::Serialize;

use crate::error::{Blame, Failure, Result};

/// Prints one JSON object on a line of its own.
///
/// # Errors
/// `CLI_OUTPUT_FAILED` when standard output is gone (a closed pipe) or `value` cannot be encoded.
pub fn print_json(value: &impl Serialize) -> Result<()> {
    let line = serde_json::to_string(value).map_err(|error| output_failed(&error))?;
    print_line(&line)
}

/// Prints one line of text.
///
/// # Errors
/// `CLI_OUTPUT_FAILED` when standard output is gone.
pub fn print_line(line: &str) -> Result<()> {
    let mut output = anstream::stdout().lock();
    writeln!(output, "{line}")
        .and_then(|()| output.flush())
        .map_err(|error| output_failed(&error))
}

fn output_failed(error: &dyn std::fmt::Display) -> Failure {
    Failure::system(
        "CLI_OUTPUT_FAILED",
        format!("Standard output cannot be written: {error}"),
    )
}

/// Prints a failure on standard error and gives its exit code: 1 for the user's fault, 3 for any other.
pub fn report_failure(failure: &Failure, json: bool) -> ExitCode {
    if json && let Ok(line) = serde_json::to_string(&serde_json::json!({ "error": failure })) {
        // The script that asked for JSON finds the failure where it looks for the result.
        let _ = print_line(&line);
    }
    let mut errors = anstream::stderr().lock();
    let bold = anstyle::AnsiColor::Red.on_default().bold();
    let _ = writeln!(errors, "{bold}error{bold:#}: {failure}");
    match failure.blame {
        Blame::User => ExitCode::from(1),
        Blame::System | Blame::Platform => ExitCode::from(3),
    }
}

/// `1234567` → `1,234,567`.
pub fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// `1536000` → `1.5 MB`, in powers of a thousand.
pub fn bytes(number: u64) -> String {
    let units = ["B", "kB", "MB", "GB", "TB"];
    let mut value = number as f64;
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < units.len() {
        value /= 1000.0;
        unit += 1;
    }
    if unit == 0 {
        format!("{number} B")
    } else {
        format!("{value:.1} {}", units[unit])
    }
}

/// `3725` → `1 h 2 min`.
pub fn duration(seconds: f64) -> String {
    if !seconds.is_finite() || seconds < 0.0 {
        return "unknown".to_owned();
    }
    let whole = seconds.round() as u64;
    match (whole / 3600, whole % 3600 / 60, whole % 60) {
        (0, 0, _) if seconds < 10.0 => format!("{seconds:.1} s"),
        (0, 0, seconds) => format!("{seconds} s"),
        (0, minutes, seconds) => format!("{minutes} min {seconds} s"),
        (hours, minutes, _) => format!("{hours} h {minutes} min"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_as_people_write_them() {
        assert_eq!(
            [thousands(7), thousands(1234), thousands(1_234_567)],
            ["7", "1,234", "1,234,567"]
        );
        assert_eq!(
            [bytes(999), bytes(1500), bytes(2_000_000_000)],
            ["999 B", "1.5 kB", "2.0 GB"]
        );
        assert_eq!(
            [duration(3.21), duration(75.0), duration(3725.0), duration(f64::NAN)],
            ["3.2 s", "1 min 15 s", "1 h 2 min", "unknown"]
        );
    }
}
