//! `brightrun synth`: a checkpoint of seeded random numbers.

use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::{Args, ValueEnum};
use serde_json::json;

use super::OutputArguments;
use super::model::byte_bar;
use super::output::{self, print_json, print_line};
use crate::error::{Failure, Result};
use crate::model::presets::preset;
use crate::model::synthetic::{SyntheticDtype, SyntheticSettings, generate};

/// `synth`.
#[derive(Debug, Args)]
pub struct SynthArguments {
    /// A config.json, a folder that holds one, or a preset such as qwen3-next-80b-a3b
    #[arg(value_name = "FILE|PRESET")]
    pub source: String,
    /// Folder for the checkpoint
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Only the first N layers
    #[arg(long, value_name = "N")]
    pub layers: Option<usize>,
    /// What matrices are stored as
    #[arg(long, value_enum, default_value_t = SynthDtype::Bf16)]
    pub dtype: SynthDtype,
    /// Most bytes of a shard: a number, or one with k, M, G
    #[arg(long, value_name = "SIZE", default_value = "4G", value_parser = size)]
    pub shard_size: u64,
    /// Seed of the values
    #[arg(long, default_value_t = 42)]
    pub seed: u64,
    /// Output form.
    #[command(flatten)]
    pub output: OutputArguments,
}

/// `--dtype`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SynthDtype {
    /// bfloat16 throughout
    Bf16,
    /// Projections and experts in FP8 with scales of 128 × 128 blocks
    Fp8,
}

/// `4G`, `500M`, `1000` → bytes, in powers of a thousand.
fn size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches("iB").trim_end_matches('B');
    let (number, factor) = match digits.chars().last() {
        Some('k' | 'K') => (&digits[..digits.len() - 1], 1_000),
        Some('M') => (&digits[..digits.len() - 1], 1_000_000),
        Some('G') => (&digits[..digits.len() - 1], 1_000_000_000),
        _ => (digits, 1),
    };
    let number: u64 = number
        .parse()
        .map_err(|_| format!("`{text}` is no size; write for instance 500M or 4G"))?;
    number
        .checked_mul(factor)
        .ok_or_else(|| format!("`{text}` is too large"))
}

/// The text of a configuration, from a file, a folder or a preset.
fn config_text(named: &str) -> Result<String> {
    let path = match Path::new(named) {
        folder if folder.is_dir() => folder.join("config.json"),
        file => file.to_owned(),
    };
    if !path.is_file() && !named.contains(['/', '.']) || preset(named).is_ok() {
        return preset(named).map(str::to_owned);
    }
    std::fs::read_to_string(&path).map_err(|error| {
        Failure::user(
            "MODEL_CONFIG_MISSING",
            format!("The configuration cannot be read: {error}"),
        )
        .at(path.display().to_string())
        .hint("Give a config.json, a folder that holds one, or a preset")
    })
}

/// `brightrun synth`.
pub fn synth(arguments: &SynthArguments) -> Result<()> {
    let text = config_text(&arguments.source)?;
    let settings = SyntheticSettings {
        layers: arguments.layers,
        dtype: match arguments.dtype {
            SynthDtype::Bf16 => SyntheticDtype::Bf16,
            SynthDtype::Fp8 => SyntheticDtype::Fp8,
        },
        shard_bytes: arguments.shard_size,
        seed: arguments.seed,
    };
    let bar = byte_bar("writing");
    let began = Instant::now();
    let written = generate(&arguments.out, &text, &settings, &mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    let written = written?;
    let seconds = began.elapsed().as_secs_f64();
    if arguments.output.json {
        return print_json(&json!({"out": arguments.out, "written": written, "seconds": seconds}));
    }
    print_line(&format!(
        "{} in {} shards, {} parameters, written to {} in {}",
        output::bytes(written.bytes),
        written.shards,
        output::thousands(written.parameters),
        arguments.out.display(),
        output::duration(seconds)
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        assert_eq!(
            [size("1000"), size("5k"), size("40MB"), size("4G")],
            [Ok(1000), Ok(5000), Ok(40_000_000), Ok(4_000_000_000)]
        );
        for wrong in ["", "G", "4T", "-1", "99999999999999999999", "99999999999G"] {
            assert!(size(wrong).is_err(), "{wrong}");
        }
    }
}
