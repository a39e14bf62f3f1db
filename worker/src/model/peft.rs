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
    /// Path of the module that holds the routed experts.
    holder: Option<String>,
    /// Whether this is the tensor of gate and up together.
    is_gate_up: bool,
}

impl PeftLayout {
    /// The layout of `module`; `is_adapted` tells of any other module whether it has an adapter too.
    pub(crate) fn new(module: &Module, rank: usize, is_adapted: impl Fn(&str) -> bool) -> Self {
        let stacked = module.path.rsplit_once('.').filter(|_| module.experts.is_some());
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
            holder: stacked.map(|(holder, _)| holder.to_owned()),
            is_gate_up: stacked.is_some_and(|(_, name)| name == "gate_up_proj"),
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

    /// Both factors in the layout of one adapter for each expert and projection, `experts.3.gate_proj.lora_A.weight` and so on:
    /// what vLLM loads. `gate_proj` and `up_proj` of an expert get the same A and the halves of their common B, so each
    /// product `B·A` is its part of the stacked one. Modules that are no routed experts stay as PEFT has them.
    pub fn to_per_expert(&self, a: Vec<f32>, b: Vec<f32>) -> Vec<PeftFactor> {
        let (Some(experts), Some(holder)) = (self.experts, &self.holder) else {
            return self.to_peft(a, b).into();
        };
        let (rank, inputs, outputs) = (self.rank, self.inputs, self.outputs);
        let parts: &[&str] = match self.is_gate_up {
            true => &["gate_proj", "up_proj"],
            false => &["down_proj"],
        };
        let rows = outputs / parts.len();
        let mut factors = Vec::new();
        for expert in 0..experts {
            for (place, part) in parts.iter().enumerate() {
                let key = |half: &str| format!("base_model.model.{holder}.{expert}.{part}.lora_{half}.weight");
                factors.push(PeftFactor {
                    key: key("A"),
                    shape: [rank, inputs],
                    values: a[expert * rank * inputs..][..rank * inputs].to_vec(),
                });
                factors.push(PeftFactor {
                    key: key("B"),
                    shape: [rows, rank],
                    values: b[(expert * outputs + place * rows) * rank..][..rows * rank].to_vec(),
                });
            }
        }
        factors
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
    #![allow(clippy::unwrap_used)]
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

    /// `B·A`, row by row, of factors with `rank` rows and columns.
    fn delta(a: &[f32], b: &[f32], rank: usize) -> Vec<f64> {
        let inputs = a.len() / rank;
        let row = |b: &[f32]| -> Vec<f64> {
            let sum = |i: usize| (0..rank).map(|r| f64::from(b[r]) * f64::from(a[r * inputs + i])).sum();
            (0..inputs).map(sum).collect()
        };
        b.chunks(rank).flat_map(row).collect()
    }

    /// What PEFT computes from its stacked tensors for one expert: A viewed as `[E, r, I]`, B as `[O, r, E]`.
    fn stacked_delta(factors: &[PeftFactor; 2], (experts, rank): (usize, usize), expert: usize) -> Vec<f64> {
        let [a, b] = factors;
        let inputs = a.shape[1];
        let own_a = &a.values[expert * rank * inputs..][..rank * inputs];
        let own_b: Vec<f32> = (0..b.shape[0] * rank)
            .map(|place| b.values[place * experts + expert])
            .collect();
        delta(own_a, &own_b, rank)
    }

    #[test]
    fn per_expert_factors_multiply_to_the_stacked_ones() {
        let (experts, rank) = (3, 2);
        for (name, parts) in [
            ("gate_up_proj", &["gate_proj", "up_proj"][..]),
            ("down_proj", &["down_proj"]),
        ] {
            let module = Module {
                path: format!("model.layers.1.mlp.experts.{name}"),
                outputs: 6,
                inputs: 5,
                experts: Some(experts),
            };
            let layout = PeftLayout::new(&module, rank, |_| true);
            let a: Vec<f32> = (0..experts * rank * 5).map(|i| (i as f32 * 0.7).sin()).collect();
            let b: Vec<f32> = (0..experts * rank * 6).map(|i| (i as f32 * 0.3).cos()).collect();
            let stacked = layout.to_peft(a.clone(), b.clone());
            let single = layout.to_per_expert(a, b);
            assert_eq!(single.len(), 2 * parts.len() * experts);
            for expert in 0..experts {
                let of_part = |part: &&str| {
                    let prefix = format!("base_model.model.model.layers.1.mlp.experts.{expert}.{part}.lora_");
                    let find = |half: &str| single.iter().find(|it| it.key == format!("{prefix}{half}.weight"));
                    let (a, b) = find("A").zip(find("B")).unwrap();
                    assert_eq!((a.shape, b.shape), ([rank, 5], [6 / parts.len(), rank]));
                    delta(&a.values, &b.values, rank)
                };
                let joined: Vec<f64> = parts.iter().flat_map(of_part).collect();
                assert_eq!(
                    joined,
                    stacked_delta(&stacked, (experts, rank), expert),
                    "{name} {expert}"
                );
            }
        }
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
