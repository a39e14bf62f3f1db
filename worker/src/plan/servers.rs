//! Which servers load an adapter of which module.
//!
//! The table is what their sources and issue threads say, not what this program has tried; PEFT alone is tried by its tests. It
//! is printed by `brightrun plan` and repeated in `docs/reference/lora-targets.md`, which a test compares.

use serde::Serialize;

use crate::model::config::Family;
use crate::model::lora::Module;

/// A program that serves or loads adapters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Server {
    /// PEFT from 0.19 on, over transformers 5.
    Peft,
    /// vLLM.
    Vllm,
    /// SGLang.
    Sglang,
    /// llama.cpp, after its own conversion.
    LlamaCpp,
}

impl Server {
    /// All of them, in the order of the documentation.
    pub const ALL: [Self; 4] = [Self::Peft, Self::Vllm, Self::Sglang, Self::LlamaCpp];

    /// As people write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Peft => "PEFT",
            Self::Vllm => "vLLM",
            Self::Sglang => "SGLang",
            Self::LlamaCpp => "llama.cpp",
        }
    }
}

/// What a server makes of a module's adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Acceptance {
    /// It loads the adapter as it is written.
    Yes,
    /// It loads the adapter after `brightrun export --layout per-expert`.
    PerExpert,
    /// Nobody has shown that it does, and threads report adapters dropped or misread.
    Unproven,
    /// It does not; serve a merged model instead.
    No,
}

impl Acceptance {
    /// As the documentation writes it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Yes => "yes",
            Self::PerExpert => "per-expert layout",
            Self::Unproven => "unproven",
            Self::No => "no",
        }
    }
}

/// Kinds of modules that servers treat alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `q,k,v,o_proj`.
    Attention,
    /// `gate,up,down_proj` of a dense MLP.
    Mlp,
    /// `in_proj_qkvz` and `out_proj` of Gated DeltaNet.
    Delta,
    /// `in_proj_ba`.
    DeltaGates,
    /// `shared_expert.{gate,up,down}_proj`.
    SharedExpert,
    /// `shared_expert_gate`.
    SharedExpertGate,
    /// `experts.gate_up_proj` and `experts.down_proj`.
    RoutedExperts,
}

impl Kind {
    /// The kind of a module.
    pub fn of(module: &Module) -> Self {
        match module.name() {
            _ if module.experts.is_some() => Self::RoutedExperts,
            "in_proj_ba" => Self::DeltaGates,
            "in_proj_qkvz" | "out_proj" => Self::Delta,
            "shared_expert_gate" => Self::SharedExpertGate,
            "gate_proj" | "up_proj" | "down_proj" if module.path.contains(".shared_expert.") => Self::SharedExpert,
            "gate_proj" | "up_proj" | "down_proj" => Self::Mlp,
            _ => Self::Attention,
        }
    }
}

/// What a server makes of an adapter of this kind of module.
pub fn acceptance(family: Family, kind: Kind, server: Server) -> Acceptance {
    use Acceptance::{No, PerExpert, Unproven, Yes};
    match (server, family, kind) {
        (Server::Peft, ..) => Yes,
        (Server::Vllm, _, Kind::RoutedExperts) => PerExpert,
        (Server::Vllm, ..) => Yes,
        (Server::Sglang | Server::LlamaCpp, Family::Qwen2 | Family::Qwen3, _) => Yes,
        (Server::Sglang, Family::Qwen3Moe, Kind::Attention) => Yes,
        (Server::Sglang, ..) => Unproven,
        (Server::LlamaCpp, Family::Qwen3Moe, Kind::Attention) => Unproven,
        (Server::LlamaCpp, ..) => No,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// The rows of the documentation's table: family, kind, and the name of the targets.
    const ROWS: [(&str, Family, Kind, &str); 11] = [
        ("Qwen2, Qwen3", Family::Qwen3, Kind::Attention, "`q,k,v,o_proj`"),
        ("Qwen2, Qwen3", Family::Qwen2, Kind::Mlp, "`gate,up,down_proj`"),
        ("Qwen3-MoE", Family::Qwen3Moe, Kind::Attention, "`q,k,v,o_proj`"),
        (
            "Qwen3-MoE",
            Family::Qwen3Moe,
            Kind::Mlp,
            "`gate,up,down_proj` of dense layers",
        ),
        (
            "Qwen3-MoE",
            Family::Qwen3Moe,
            Kind::RoutedExperts,
            "`mlp.experts.gate_up_proj`, `mlp.experts.down_proj`",
        ),
        ("Qwen3-Next", Family::Qwen3Next, Kind::Attention, "`q,k,v,o_proj`"),
        (
            "Qwen3-Next",
            Family::Qwen3Next,
            Kind::Delta,
            "`in_proj_qkvz`, `out_proj`",
        ),
        ("Qwen3-Next", Family::Qwen3Next, Kind::DeltaGates, "`in_proj_ba`"),
        (
            "Qwen3-Next",
            Family::Qwen3Next,
            Kind::SharedExpert,
            "`shared_expert.{gate,up,down}_proj`",
        ),
        (
            "Qwen3-Next",
            Family::Qwen3Next,
            Kind::SharedExpertGate,
            "`shared_expert_gate`",
        ),
        (
            "Qwen3-Next",
            Family::Qwen3Next,
            Kind::RoutedExperts,
            "`mlp.experts.gate_up_proj`, `mlp.experts.down_proj`",
        ),
    ];

    #[test]
    fn the_documentation_says_what_the_program_says() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/reference/lora-targets.md");
        let page = std::fs::read_to_string(path).unwrap();
        for (model, family, kind, targets) in ROWS {
            let words = Server::ALL
                .map(|server| acceptance(family, kind, server).word())
                .join(" | ");
            let row = format!("| {model} | {targets} | {words} |");
            assert!(
                page.lines().any(|line| line == row),
                "docs/reference/lora-targets.md lacks\n{row}"
            );
        }
        for preset in crate::model::targets::Preset::ALL {
            assert!(
                page.contains(&format!("| `{}` |", preset.name())),
                "{preset:?} is not described"
            );
        }
    }
}
