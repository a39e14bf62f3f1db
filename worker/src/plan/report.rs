//! A plan as text for people.

use std::fmt::Write;

use super::{Plan, Range};
use crate::cli::output::{bytes, thousands};

/// The plan, line by line.
pub fn text(plan: &Plan) -> String {
    let mut page = String::new();
    // Writing into a string cannot fail.
    let _ = write_page(&mut page, plan);
    page
}

fn write_page(page: &mut String, plan: &Plan) -> std::fmt::Result {
    let settings = &plan.settings;
    writeln!(
        page,
        "model      {}, {} layers, {} parameters, {} active per token",
        plan.model.model_type,
        plan.model.layers,
        billions(plan.total_parameters),
        billions(plan.active_parameters)
    )?;
    for (group, count) in &plan.parameters {
        writeln!(
            page,
            "             {:<16} {:>9}",
            group.replace('_', " "),
            billions(*count)
        )?;
    }
    writeln!(
        page,
        "adapter    rank {}, {} parameters, {}",
        settings.rank,
        thousands(plan.lora.parameters),
        bytes(plan.lora.total_bytes())
    )?;
    for target in &plan.targets {
        let servers: Vec<String> = target
            .servers
            .iter()
            .map(|(server, accepted)| format!("{server} {}", accepted.word()))
            .collect();
        writeln!(
            page,
            "             {:<28} × {:<3} {:>14}   {}",
            target.target,
            target.modules,
            thousands(target.parameters),
            servers.join(", ")
        )?;
    }
    writeln!(
        page,
        "memory     {} of {} on {}: {}",
        bytes(plan.total_bytes),
        bytes(plan.memory_bytes),
        settings.gpu,
        if plan.fits { "fits" } else { "DOES NOT FIT" }
    )?;
    let parts = [
        ("weights", plan.bytes.weights),
        ("lora", plan.bytes.lora),
        ("gradients", plan.bytes.gradients),
        ("optimizer", plan.bytes.optimizer),
        ("checkpoints", plan.bytes.checkpoints),
        ("workspace", plan.bytes.workspace),
        ("reserve", plan.bytes.reserve),
    ];
    for (name, size) in parts {
        writeln!(page, "             {name:<16} {:>9}", bytes(size))?;
    }
    writeln!(
        page,
        "largest    {} sequences of {} tokens, or one of {}",
        plan.largest.micro_batch,
        thousands(settings.sequence_length as u64),
        thousands(plan.largest.sequence_length as u64)
    )?;
    writeln!(
        page,
        "speed      {} tokens/s, {:.1} GFLOP a token",
        span(plan.tokens_per_second, 0),
        plan.flops_per_token / 1e9
    )?;
    if let Some(run) = &plan.run {
        writeln!(
            page,
            "run        {} tokens: {} hours, ${} at ${:.2} an hour ({})",
            thousands(run.tokens),
            span(run.hours, 1),
            span(run.cost, 2),
            run.price_per_hour,
            run.price_source
        )?;
    }
    writeln!(page, "cards      memory, tokens/s, example $ per million tokens")?;
    for card in &plan.cards {
        writeln!(
            page,
            "             {:<14} {:>9}  {:<12} {:>15}  {:>12}",
            card.gpu.name,
            bytes(card.memory_bytes),
            if card.fits { "fits" } else { "does not fit" },
            span(card.tokens_per_second, 0),
            span(card.example_cost_per_million_tokens, 2)
        )?;
    }
    for note in &plan.notes {
        writeln!(page, "note       {note}")?;
    }
    Ok(())
}

/// `79674391296` → `79.674B`, `65536` → `0.066M`.
fn billions(count: u64) -> String {
    match count {
        0..100_000_000 => format!("{:.3}M", count as f64 / 1e6),
        _ => format!("{:.3}B", count as f64 / 1e9),
    }
}

fn span(range: Range, digits: usize) -> String {
    format!("{:.digits$}–{:.digits$}", range.low, range.high)
}
