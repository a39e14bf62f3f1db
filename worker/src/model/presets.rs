//! Configurations of released models by name, so that a plan or a synthetic checkpoint needs no download.

use crate::config::nearest;
use crate::error::{Failure, Result};

/// Name and `config.json` of each preset.
pub const PRESETS: [(&str, &str); 3] = [
    ("qwen3-next-80b-a3b", include_str!("presets/qwen3-next-80b-a3b.json")),
    ("qwen3-30b-a3b", include_str!("presets/qwen3-30b-a3b.json")),
    ("qwen3-0.6b", include_str!("presets/qwen3-0.6b.json")),
];

/// The text of a preset's `config.json`.
///
/// # Errors
/// `MODEL_PRESET_UNKNOWN` with the nearest name and all there are.
pub fn preset(name: &str) -> Result<&'static str> {
    let found = PRESETS.iter().find(|(known, _)| known.eq_ignore_ascii_case(name));
    found.map(|(_, text)| *text).ok_or_else(|| {
        let names = PRESETS.map(|(name, _)| name);
        let guess = nearest(name, names.into_iter()).map_or(String::new(), |name| format!("Did you mean `{name}`? "));
        Failure::user(
            "MODEL_PRESET_UNKNOWN",
            format!("`{name}` is neither a file nor a preset"),
        )
        .hint(format!("{guess}The presets are: {}", names.join(", ")))
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::model::ModelConfig;

    /// Parameters in billions as the models' authors publish them.
    #[test]
    fn presets_have_the_published_numbers_of_parameters() {
        for (name, billions) in [
            ("qwen3-next-80b-a3b", 79.7),
            ("qwen3-30b-a3b", 30.5),
            ("Qwen3-0.6B", 0.6),
        ] {
            let config = ModelConfig::parse(preset(name).unwrap()).unwrap();
            let tensors = config.tensors();
            let count: usize = tensors
                .iter()
                .map(|tensor| tensor.shape.iter().product::<usize>())
                .sum();
            let error = count as f64 / 1e9 / billions - 1.0;
            assert!(error.abs() < 0.02, "{name}: {count}");
        }
    }

    #[test]
    fn an_unknown_preset_is_refused_with_the_nearest() {
        let failure = preset("qwen3-next-80b").unwrap_err();
        assert!(failure.hint.contains("`qwen3-next-80b-a3b`?"), "{failure}");
    }
}
