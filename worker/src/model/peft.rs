//! PEFT's names and order of an adapter's factors (PEFT 0.19 and later).
//!
//! A linear layer `M` has `M.lora_A.weight` `[R, I]` and `M.lora_B.weight` `[O, R]`. The routed experts of a layer have one
//! pair for each of their two tensors:
//!
//! ```text
//! lora_A  [R·E, I]    expert-major: row e·R + r is row r of expert e
//! lora_B  [O, R·E]    read as (O, R, E): column r·E + e belongs to expert e
//! ```
//!
//! Both hang on the module `experts` that holds the tensors. PEFT wraps it once for each adapted tensor, `gate_up_proj` first,
//! so `down_proj` is always on the outside: `experts.lora_A`. `gate_up_proj` is `experts.base_layer.lora_A` where `down_proj`
//! is adapted too, and `experts.lora_A` where it is not.

//!
//! # A trap that files avoid
//!
//! On a mixture of experts PEFT 0.21 moves every `target_modules` entry that ends in `gate_proj`, `up_proj` or `down_proj` to
//! the routed experts, those of the shared expert too, which then has no adapter when the file is loaded, without an error. An
//! adapted linear layer can also be named as the parameter it holds, `shared_expert.gate_proj.weight` in `target_parameters`;
//! keys, shapes and arithmetic are the same, and PEFT leaves such names alone.

use brightrun_kernels::Shape;

use crate::model::adapter::PeftFactor;
use crate::model::lora::Module;
use crate::model::targets::names_experts;

/// Names that PEFT moves to the routed experts of a mixture.
const MOVED: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];

/// `target_modules` and `target_parameters` for modules of these names, sorted; `is_mixture` where the model has routed experts.
pub(crate) fn targets(names: &[String], is_mixture: bool) -> (Vec<String>, Vec<String>) {
    let (mut parameters, mut modules) = (Vec::new(), Vec::new());
    for name in names {
        let last = name.rsplit('.').next().unwrap_or_default();
        if names_experts(name) {
            parameters.push(name.clone());
        } else if is_mixture && MOVED.contains(&last) {
            parameters.push(format!("{name}.weight"));
        } else {
            modules.push(name.clone());
        }
    }
    for list in [&mut modules, &mut parameters] {
        list.sort();
        list.dedup();
    }
    (modules, parameters)
}

/// The way back: the module that an entry of `target_parameters` means, `None` where it is no module of ours.
pub(crate) fn target_of_parameter(parameter: &str) -> Option<&str> {
    match parameter.strip_suffix(".weight") {
        Some(module) => Some(module),
        None if names_experts(parameter) => Some(parameter),
        None => None,
    }
}

/// How PEFT names and orders the factors of one module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeftLayout {
    /// Names of A and B.
    pub(crate) keys: (String, String),
    rank: usize,
    outputs: usize,
    inputs: usize,
    experts: Option<usize>,
}

impl PeftLayout {
    /// The layout of `module`; `is_adapted` tells of any other module whether it has an adapter too.
    pub(crate) fn new(module: &Module, rank: usize, is_adapted: impl Fn(&str) -> bool) -> Self {
        let holder = match (module.experts, module.path.rsplit_once('.')) {
            (Some(_), Some((holder, "gate_up_proj"))) if is_adapted(&format!("{holder}.down_proj")) => {
                format!("{holder}.base_layer")
            }
            (Some(_), Some((holder, _))) => holder.to_owned(),
            _ => module.path.clone(),
        };
        Self {
            keys: (
                format!("base_model.model.{holder}.lora_A.weight"),
                format!("base_model.model.{holder}.lora_B.weight"),
            ),
            rank,
            outputs: module.outputs,
            inputs: module.inputs,
            experts: module.experts,
        }
    }

    /// Extents of A and B in a backend's memory: `[R, I]` and `[O, R]`, or `[E, R, I]` and `[E, O, R]`.
    pub(crate) fn shapes(&self) -> (Shape, Shape) {
        match self.experts {
            None => ([self.rank, self.inputs].into(), [self.outputs, self.rank].into()),
            Some(experts) => (
                [experts, self.rank, self.inputs].into(),
                [experts, self.outputs, self.rank].into(),
            ),
        }
    }

    /// Extents of A and B in PEFT's files.
    pub(crate) fn stored_shapes(&self) -> ([usize; 2], [usize; 2]) {
        let inner = self.rank * self.experts.unwrap_or(1);
        ([inner, self.inputs], [self.outputs, inner])
    }

    /// B from PEFT's order to ours. A is the same in both.
    pub(crate) fn b_from_peft(&self, stored: Vec<f32>) -> Vec<f32> {
        self.reordered(stored, |own, peft| (own, peft))
    }

    fn b_to_peft(&self, own: Vec<f32>) -> Vec<f32> {
        self.reordered(own, |own, peft| (peft, own))
    }

    /// Both factors, or their gradients, from our order to PEFT's.
    pub fn to_peft(&self, a: Vec<f32>, b: Vec<f32>) -> [PeftFactor; 2] {
        let (shape_a, shape_b) = self.stored_shapes();
        [
            PeftFactor {
                key: self.keys.0.clone(),
                shape: shape_a,
                values: a,
            },
            PeftFactor {
                key: self.keys.1.clone(),
                shape: shape_b,
                values: self.b_to_peft(b),
            },
        ]
    }

    /// `places(own, peft)` gives target and source of one value, from its places in the two orders.
    fn reordered(&self, values: Vec<f32>, places: impl Fn(usize, usize) -> (usize, usize)) -> Vec<f32> {
        let Some(experts) = self.experts else { return values };
        let (rank, outputs) = (self.rank, self.outputs);
        let mut result = vec![0.0; values.len()];
        for expert in 0..experts {
            for output in 0..outputs {
                for row in 0..rank {
                    let own = (expert * outputs + output) * rank + row;
                    let (target, source) = places(own, (output * rank + row) * experts + expert);
                    result[target] = values[source];
                }
            }
        }
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn module(path: &str, experts: Option<usize>) -> Module {
        Module {
            path: path.to_owned(),
            outputs: 3,
            inputs: 5,
            experts,
        }
    }

    #[test]
    fn what_peft_would_move_to_the_routed_experts_is_named_as_a_parameter() {
        let names = ["q_proj", "shared_expert.up_proj", "mlp.experts.down_proj"].map(str::to_owned);
        let (modules, parameters) = targets(&names, true);
        assert_eq!(modules, ["q_proj"]);
        assert_eq!(parameters, ["mlp.experts.down_proj", "shared_expert.up_proj.weight"]);
        let mut back: Vec<_> = parameters.iter().filter_map(|name| target_of_parameter(name)).collect();
        back.extend(modules.iter().map(String::as_str));
        back.sort_unstable();
        assert_eq!(back, ["mlp.experts.down_proj", "q_proj", "shared_expert.up_proj"]);
        assert_eq!(target_of_parameter("mlp.router"), None);
        let (modules, _) = targets(&["up_proj".to_owned()], false);
        assert_eq!(modules, ["up_proj"], "a dense model's names stay as users write them");
    }

    #[test]
    fn down_proj_is_the_outer_wrapper_and_gate_up_proj_the_inner_one_only_beside_it() {
        let key = |path, other| PeftLayout::new(&module(path, Some(2)), 4, |_| other).keys.0;
        assert_eq!(
            key("m.experts.down_proj", true),
            "base_model.model.m.experts.lora_A.weight"
        );
        assert_eq!(
            key("m.experts.gate_up_proj", true),
            "base_model.model.m.experts.base_layer.lora_A.weight"
        );
        assert_eq!(
            key("m.experts.gate_up_proj", false),
            "base_model.model.m.experts.lora_A.weight"
        );
    }

    #[test]
    fn the_expert_index_is_the_fastest_of_b_and_comes_back() {
        let layout = PeftLayout::new(&module("m.experts.down_proj", Some(2)), 4, |_| false);
        let stored: Vec<f32> = (0..3 * 4 * 2).map(|value| value as f32).collect();
        let own = layout.b_from_peft(stored.clone());
        // Expert 1, output 2, row 3 lies in row 2 at column 3·E + 1.
        assert_eq!(own[(3 + 2) * 4 + 3], (2 * 8 + 3 * 2 + 1) as f32);
        assert_eq!(layout.b_to_peft(own), stored);
    }
}
