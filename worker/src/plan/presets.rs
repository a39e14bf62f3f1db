//! Public configurations by name, so that a model can be planned before any of it is downloaded. They hold what the models'
//! own `config.json` say, reduced to what this program reads.

use crate::error::{Failure, Result};

/// Name and `config.json` of every preset.
pub const PRESETS: [(&str, &str); 8] = [
    ("qwen3-next-80b-a3b", include_str!("presets/qwen3-next-80b-a3b.json")),
    ("qwen3-30b-a3b", include_str!("presets/qwen3-30b-a3b.json")),
    ("qwen3-32b", include_str!("presets/qwen3-32b.json")),
    ("qwen3-14b", include_str!("presets/qwen3-14b.json")),
    ("qwen3-8b", include_str!("presets/qwen3-8b.json")),
    ("qwen3-4b", include_str!("presets/qwen3-4b.json")),
    ("qwen3-1.7b", include_str!("presets/qwen3-1.7b.json")),
    ("qwen3-0.6b", include_str!("presets/qwen3-0.6b.json")),
];

/// The `config.json` of a preset; case, an organisation in front and `-Instruct` behind do not matter.
///
/// # Errors
/// `PLAN_PRESET_UNKNOWN` with the names that are known.
pub fn preset(name: &str) -> Result<&'static str> {
    let lower = name.to_lowercase();
    let plain = lower.rsplit('/').next().unwrap_or_default();
    let plain = plain.trim_end_matches("-fp8").trim_end_matches("-instruct");
    let found = PRESETS.iter().find(|(own, _)| *own == plain);
    found.map(|(_, config)| *config).ok_or_else(|| {
        let names = PRESETS.map(|(name, _)| name).join(", ");
        Failure::user("PLAN_PRESET_UNKNOWN", format!("There is no preset `{name}`")).hint(format!(
            "Known are {names}; for any other model give its config.json with --config"
        ))
    })
}
