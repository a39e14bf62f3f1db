//! Which modules a LoRA run adapts: names and presets, resolved against what the model really has.
//!
//! A target is a PEFT name (the last part or parts of a module's path) or a preset:
//!
//! | preset | means |
//! |---|---|
//! | `default` | what every server of this family is known to load: `all-linear` without `in_proj_ba` and `shared_expert_gate` |
//! | `attention` | the projections of the mixers: `q,k,v,o_proj`; in Gated DeltaNet `in_proj_qkvz` and `out_proj` |
//! | `all-linear` | every linear layer but the head, as in PEFT; never routed experts |
//! | `shared-expert` | `shared_expert.{gate,up,down}_proj` |
//! | `experts` | every routed expert: `mlp.experts.gate_up_proj` and `mlp.experts.down_proj` |
//!
//! They combine: `attention,experts`, `attention+experts` and `attention,+experts` are the same. A name means the module
//! it names: `down_proj` is every module of that name and no routed expert. (PEFT 0.21 takes it for the routed experts of a
//! mixture, doubles their rank, and leaves the shared expert without an adapter.)

use crate::error::{Failure, Result};
use crate::model::lora::Module;

/// Names within this Jaro–Winkler similarity are offered as near misses.
const NEAR_MISS: f64 = 0.75;

/// A named choice of modules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Preset {
    /// What every server of the family is known to load.
    Default,
    /// The projections of attention and Gated DeltaNet, the narrow `in_proj_ba` apart.
    Attention,
    /// Every linear layer but the head and the routed experts.
    AllLinear,
    /// The expert that every token visits.
    SharedExpert,
    /// Every routed expert.
    Experts,
}

impl Preset {
    /// All of them, in the order of the documentation.
    pub const ALL: [Self; 5] = [
        Self::Default,
        Self::Attention,
        Self::AllLinear,
        Self::SharedExpert,
        Self::Experts,
    ];

    /// As users write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Default => "default",
            Self::Attention => "attention",
            Self::AllLinear => "all-linear",
            Self::SharedExpert => "shared-expert",
            Self::Experts => "experts",
        }
    }

    fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|preset| preset.name() == text)
    }

    fn includes(self, module: &Module) -> bool {
        let is_narrow = matches!(module.name(), "in_proj_ba" | "shared_expert_gate");
        match self {
            Self::Default => module.experts.is_none() && !is_narrow,
            Self::Attention => matches!(module.holder(), "self_attn" | "linear_attn") && !is_narrow,
            Self::AllLinear => module.experts.is_none(),
            Self::SharedExpert => module.holder() == "shared_expert",
            Self::Experts => module.experts.is_some(),
        }
    }
}

impl Module {
    /// The last part of its path.
    pub fn name(&self) -> &str {
        self.path.rsplit('.').next().unwrap_or(&self.path)
    }

    /// The part before the last.
    fn holder(&self) -> &str {
        self.path.rsplit('.').nth(1).unwrap_or_default()
    }

    /// The shortest usual name that means this module in every layer, and no other kind of module of the same model.
    pub fn target<'a>(&'a self, modules: &[Self]) -> &'a str {
        let parts = match (self.experts, self.holder()) {
            (Some(_), _) => 3,
            (None, "shared_expert") => 2,
            // Beside a shared expert `gate_proj` would mean both.
            (None, "mlp") if modules.iter().any(|other| other.holder() == "shared_expert") => 2,
            (None, _) => 1,
        };
        let mut dots = self.path.rmatch_indices('.').map(|(place, _)| place + 1);
        let start = dots.nth(parts - 1).unwrap_or(0);
        self.path.get(start..).unwrap_or(&self.path)
    }

    /// Whether the path ends with `target`, on a boundary between parts; a routed expert only where the target says `experts`.
    pub(crate) fn is_named(&self, target: &str) -> bool {
        let ends_so = match self.path.strip_suffix(target) {
            Some(rest) => rest.is_empty() || rest.ends_with('.'),
            None => false,
        };
        ends_so && (self.experts.is_none() || names_experts(target))
    }
}

/// Whether a target means a projection of routed experts: the part before its last is `experts`.
pub(crate) fn names_experts(target: &str) -> bool {
    target.rsplit('.').nth(1) == Some("experts")
}

/// The names that `targets` mean on a model of these modules, presets spelt out, each name once.
///
/// # Errors
/// `LORA_TARGET_UNKNOWN` when a target matches no module, with the nearest names that exist.
pub fn expand(targets: &[String], modules: &[Module]) -> Result<Vec<String>> {
    let mut names: Vec<String> = Vec::new();
    let mut add = |name: &str| {
        if !names.iter().any(|known| known == name) {
            names.push(name.to_owned());
        }
    };
    for target in targets.iter().flat_map(|text| text.split('+')).map(str::trim) {
        if target.is_empty() {
            continue;
        }
        if let Some(preset) = Preset::parse(target) {
            let mut included = modules.iter().filter(|module| preset.includes(module)).peekable();
            if included.peek().is_none() {
                return Err(empty_preset(preset, modules));
            }
            included.for_each(|module| add(module.target(modules)));
        } else if modules.iter().any(|module| module.is_named(target)) {
            add(target);
        } else {
            return Err(unknown(target, modules));
        }
    }
    match names.is_empty() {
        false => Ok(names),
        true => Err(
            Failure::user("LORA_TARGET_UNKNOWN", "The LoRA targets name nothing").hint(format!(
                "Name projections, or one of: {}",
                Preset::ALL.map(Preset::name).join(", ")
            )),
        ),
    }
}

fn empty_preset(preset: Preset, modules: &[Module]) -> Failure {
    let there: Vec<&str> = Preset::ALL
        .into_iter()
        .filter(|other| modules.iter().any(|module| other.includes(module)))
        .map(Preset::name)
        .collect();
    Failure::user(
        "LORA_TARGET_UNKNOWN",
        format!("The LoRA target `{}` matches no module of this model", preset.name()),
    )
    .hint(format!("Of the presets this model has {}", there.join(", ")))
}

fn unknown(target: &str, modules: &[Module]) -> Failure {
    let stacked = match target {
        "gate_proj" | "up_proj" => "gate_up_proj",
        other => other,
    };
    let is_meant = |module: &&Module| module.experts.is_some() && module.name() == stacked;
    if let Some(module) = modules.iter().find(is_meant) {
        return Failure::user(
            "LORA_TARGET_UNKNOWN",
            format!("The LoRA target `{target}` matches no module of this model but its routed experts"),
        )
        .hint(format!(
            "Name `{}` or `experts` if you mean every routed expert, else leave `{target}` out; `default` fits every model",
            module.target(modules)
        ));
    }
    let hint = match near_misses(target, modules).as_slice() {
        [] => format!("This model has {}", names_of(modules).join(", ")),
        near => format!("Did you mean {}?", near.join(" or ")),
    };
    Failure::user(
        "LORA_TARGET_UNKNOWN",
        format!("The LoRA target `{target}` matches no module of this model"),
    )
    .hint(hint)
}

/// The last parts of all paths and the presets, each once, in alphabetical order.
fn names_of(modules: &[Module]) -> Vec<&str> {
    let mut names: Vec<&str> = modules.iter().map(|module| module.target(modules)).collect();
    names.sort_unstable();
    names.dedup();
    names
}

fn near_misses<'a>(target: &str, modules: &'a [Module]) -> Vec<&'a str> {
    let last = |name: &str| name.rsplit('.').next().unwrap_or_default().to_owned();
    let wanted = last(target);
    let candidates = names_of(modules).into_iter().chain(Preset::ALL.map(Preset::name));
    let mut near: Vec<(f64, &str)> = candidates
        .map(|name| (strsim::jaro_winkler(&wanted, &last(name)), name))
        .filter(|(similarity, _)| *similarity >= NEAR_MISS)
        .collect();
    near.sort_by(|left, right| right.0.total_cmp(&left.0));
    near.into_iter().map(|(_, name)| name).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn module(name: &str, experts: Option<usize>) -> Module {
        Module {
            path: format!("model.layers.0.{name}"),
            outputs: 4,
            inputs: 4,
            experts,
        }
    }

    fn dense() -> Vec<Module> {
        ["self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj"]
            .map(|name| module(name, None))
            .to_vec()
    }

    fn next() -> Vec<Module> {
        let mut modules: Vec<Module> = [
            "linear_attn.in_proj_qkvz",
            "linear_attn.in_proj_ba",
            "linear_attn.out_proj",
            "self_attn.q_proj",
            "mlp.shared_expert.down_proj",
            "mlp.shared_expert_gate",
        ]
        .map(|name| module(name, None))
        .to_vec();
        modules.push(module("mlp.experts.gate_up_proj", Some(8)));
        modules.push(module("mlp.experts.down_proj", Some(8)));
        modules
    }

    fn expanded(targets: &[&str], modules: &[Module]) -> Result<Vec<String>> {
        let targets: Vec<String> = targets.iter().map(ToString::to_string).collect();
        expand(&targets, modules)
    }

    #[track_caller]
    fn check(targets: &[&str], modules: &[Module], names: &[&str]) {
        assert_eq!(expanded(targets, modules).unwrap(), names);
    }

    #[test]
    fn the_default_leaves_out_what_servers_stumble_over() {
        let safe = ["in_proj_qkvz", "out_proj", "q_proj", "shared_expert.down_proj"];
        check(&["default"], &next(), &safe);
        check(&["default"], &dense(), &["q_proj", "k_proj", "up_proj"]);
    }

    #[test]
    fn presets_mean_what_they_say_and_combine() {
        let attention = ["in_proj_qkvz", "out_proj", "q_proj"];
        check(&["attention"], &next(), &attention);
        let routed = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"];
        check(&["experts"], &next(), &routed);
        let both: Vec<&str> = attention.into_iter().chain(routed).collect();
        for spelling in [
            &["attention+experts"][..],
            &["attention", "+experts"],
            &["attention", "experts"],
        ] {
            check(spelling, &next(), &both);
        }
        assert_eq!(expanded(&["all-linear"], &next()).unwrap().len(), 6);
        check(
            &["shared-expert", "q_proj"],
            &next(),
            &["shared_expert.down_proj", "q_proj"],
        );
    }

    #[test]
    fn a_preset_without_modules_says_which_have_some() {
        let failure = expanded(&["experts"], &dense()).unwrap_err();
        assert_eq!(failure.code, "LORA_TARGET_UNKNOWN");
        assert!(failure.hint.contains("default, attention, all-linear"), "{failure}");
    }

    #[test]
    fn a_target_that_matches_nothing_names_what_was_probably_meant() {
        for (target, hint) in [
            ("upproj", "up_proj"),
            ("atention", "attention"),
            ("xyz", "k_proj, q_proj, up_proj"),
        ] {
            let failure = expanded(&["q_proj", target], &dense()).unwrap_err();
            assert_eq!(failure.code, "LORA_TARGET_UNKNOWN");
            assert!(
                failure.message.contains(target) && failure.hint.contains(hint),
                "{failure}"
            );
        }
        assert!(expanded(&["proj"], &dense()).is_err(), "a part of a name is no name");
        assert!(expanded(&["+", " "], &dense()).is_err(), "nothing is no target");
    }

    #[test]
    fn routed_experts_are_adapted_only_by_names_that_say_so() {
        let named = |target: &str| next().iter().filter(|module| module.is_named(target)).count();
        assert_eq!((named("down_proj"), named("experts.down_proj")), (1, 1));
        let down = module("mlp.experts.down_proj", Some(8));
        assert!(!down.is_named("down_proj") && down.is_named("mlp.experts.down_proj"));
        for target in ["gate_proj", "up_proj"] {
            let failure = expanded(&[target], &next()).unwrap_err();
            assert!(failure.hint.contains("mlp.experts.gate_up_proj"), "{failure}");
        }
    }

    #[test]
    fn a_modules_own_target_means_it_and_no_other_kind() {
        let mut modules = next();
        modules.push(module("mlp.down_proj", None));
        for module in &modules {
            let target = module.target(&modules);
            let named: Vec<_> = modules.iter().filter(|other| other.is_named(target)).collect();
            assert_eq!(named, [module], "{target}");
        }
    }
}
