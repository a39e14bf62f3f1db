//! `brightrun doctor`: prints what [`preflight`] found.

use super::output::{print_json, print_line};
use super::{DoctorArguments, service};
use crate::config::Config;
use crate::error::{Failure, Result};
use crate::preflight;

/// Runs the checks and prints what they found. Fails when one of them does.
pub async fn doctor(config: &Config, arguments: DoctorArguments) -> Result<()> {
    let checks = if arguments.live {
        preflight::live(config).await
    } else if arguments.quick {
        preflight::quick(config).await
    } else {
        preflight::full(config, service::connect()).await
    };
    if arguments.output.json {
        print_json(&serde_json::json!({ "ok": checks.iter().all(|check| check.ok), "checks": checks }))?;
    } else {
        for check in &checks {
            let (word, colour) = if check.ok {
                ("ok  ", anstyle::AnsiColor::Green)
            } else {
                ("FAIL", anstyle::AnsiColor::Red)
            };
            let style = colour.on_default().bold();
            print_line(&format!("{style}{word}{style:#}  {:12} {}", check.name, check.detail))?;
        }
    }
    let failed: Vec<&str> = checks
        .iter()
        .filter(|check| !check.ok)
        .map(|check| check.name)
        .collect();
    if failed.is_empty() {
        return Ok(());
    }
    Err(Failure::system(
        "DOCTOR_FOUND_TROUBLE",
        format!("Not in place: {}", failed.join(", ")),
    ))
}
