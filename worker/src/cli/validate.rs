//! `brightrun validate`: every problem of a dataset file, at once.

use std::fs::File;

use serde_json::json;

use super::ValidateArguments;
use super::output::{print_json, print_line, thousands};
use crate::dataset::{self, Issue, Report, ScanOptions, Severity};
use crate::error::{Failure, Result};

/// Scans the file and prints its report. A dataset that is not ready is the user's fault: exit code 1.
pub fn validate(arguments: &ValidateArguments) -> Result<()> {
    let file = File::open(&arguments.file).map_err(|error| {
        Failure::user(
            "DATASET_NOT_FOUND",
            format!("The dataset file cannot be opened: {error}"),
        )
        .at(arguments.file.display().to_string())
    })?;
    let options = ScanOptions {
        max_issues: arguments.max_issues,
        ..ScanOptions::default()
    };
    let report = dataset::scan(file, &options, &mut |_| {})?;
    if arguments.output.json {
        print_json(&json!({ "ready": report.is_ready(), "error_message": report.error_message(), "report": report }))?;
    } else {
        print_report(&report)?;
    }
    report.failure().map_or(Ok(()), Err)
}

fn print_report(report: &Report) -> Result<()> {
    for issue in &report.issues {
        print_issue(issue)?;
    }
    let hidden = (report.errors + report.warnings).saturating_sub(report.issues.len() as u64);
    if hidden > 0 {
        print_line(&format!("… and {} more (see --max-issues)", thousands(hidden)))?;
    }
    let shapes: Vec<String> = report
        .shapes
        .iter()
        .map(|(shape, count)| format!("{count} × {shape}"))
        .collect();
    print_line(&format!("format        {}", shapes.join(", ")))?;
    print_line(&format!("examples      {}", thousands(report.examples)))?;
    print_line(&format!("conversations {}", thousands(report.conversations)))?;
    print_line(&format!("tokens        about {}", thousands(report.estimated_tokens)))?;
    print_line(&format!("dropped       {}", thousands(report.dropped_records)))?;
    print_line(&format!("errors        {}", thousands(report.errors)))?;
    print_line(&format!("warnings      {}", thousands(report.warnings)))?;
    print_line(&format!(
        "sha256        {} ({} bytes)",
        report.sha256,
        thousands(report.bytes)
    ))?;
    print_line(if report.is_ready() {
        "This dataset is ready to train."
    } else {
        "This dataset is not ready."
    })
}

fn print_issue(issue: &Issue) -> Result<()> {
    let (word, colour) = match issue.severity {
        Severity::Error => ("error", anstyle::AnsiColor::Red),
        _ => ("warning", anstyle::AnsiColor::Yellow),
    };
    let style = colour.on_default().bold();
    let path = if issue.path.is_empty() {
        String::new()
    } else {
        format!(", `{}`", issue.path)
    };
    print_line(&format!(
        "line {}{path}: {style}{word}{style:#}: {} [{}]",
        issue.line, issue.message, issue.code
    ))?;
    if !issue.hint.is_empty() {
        print_line(&format!("  hint: {}", issue.hint))?;
    }
    Ok(())
}
