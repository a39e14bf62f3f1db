//! Plans: published numbers of public models, and small models that take exactly what was planned.
#![allow(clippy::unwrap_used)]

mod train_support;

use brightrun_kernels::DType;
use brightrun_kernels::counting::{Counting, Factors, Habits};
use brightrun_kernels::ops::Device;
use brightrun_worker::model::{BackwardSettings, Batch, LoadOptions, LoraGradients, LoraSet, ModelConfig};
use brightrun_worker::plan::{Gpu, Plan, Question, Shape, footprint, plan, preset, skeleton};
use brightrun_worker::spec::{BaseDtype, OptimizerKind, TrainSpec};
use brightrun_worker::train::optimizer::Optimizer;
use train_support::{ALL_FAMILIES, VOCABULARY, lora, model};

fn question(name: &str, spec: TrainSpec) -> Question {
    Question {
        config: ModelConfig::parse(preset(name).unwrap()).unwrap(),
        stored: DType::BF16,
        spec,
        sequence_length: 4096,
        micro_batch: 1,
        gpu: Gpu::named("H200").unwrap(),
        dataset_tokens: None,
        price_per_hour: None,
    }
}

fn planned(name: &str, targets: &str) -> Plan {
    let spec = TrainSpec {
        targets: vec![targets.to_owned()],
        adapter_budget_bytes: u64::MAX,
        ..TrainSpec::default()
    };
    plan(&question(name, spec)).unwrap()
}

/// `number` in units of `unit`, rounded to as many digits as the expected text has.
#[track_caller]
fn check(what: &str, number: f64, unit: f64, expected: &str) {
    let digits = expected.split_once('.').map_or(0, |(_, digits)| digits.len());
    assert_eq!(format!("{:.digits$}", number / unit), expected, "{what}");
}

#[test]
fn the_80b_model_has_its_published_numbers() {
    let plan = planned("Qwen/Qwen3-Next-80B-A3B-Instruct", "attention");
    check("total", plan.total_parameters as f64, 1e9, "79.674");
    check("active", plan.active_parameters as f64, 1e9, "3.87");
    check("without", plan.active_parameters_without_embedding as f64, 1e9, "3.56");
    let group = |name: &str| plan.parameters[name] as f64;
    check("experts", group("routed_experts"), 1e9, "77.309");
    check("delta", group("gated_delta_net"), 1e9, "1.214");
    check("attention", group("attention"), 1e6, "327.2");
    check("routers", group("routers"), 1e6, "50.3");
    check("shared", group("shared_experts"), 1e6, "151.1");
    check("head", group("head"), 1e6, "311.2");
    // NF4 with nested scales, everything narrow and both tables in bf16.
    let weights = plan.weight_bytes.values().sum::<u64>() as f64;
    check("weights", weights, 1e9, "42.1");
    assert!(plan.fits && plan.total_bytes < 50_000_000_000, "{:?}", plan.bytes);
    assert_eq!(plan.bytes.total(), plan.total_bytes);
    let fits = |name: &str| plan.cards.iter().find(|card| card.gpu.name == name).unwrap().fits;
    assert!(fits("H100 SXM") && fits("RTX PRO 6000") && !fits("A100 40GB") && !fits("RTX 4090"));
}

#[test]
fn adapters_have_the_sizes_that_shapes_give() {
    for (name, targets, millions) in [
        ("qwen3-next-80b-a3b", "attention", "15.9"),
        ("qwen3-next-80b-a3b", "attention+in_proj_ba", "17.1"),
        ("qwen3-next-80b-a3b", "attention,in_proj_ba,+shared-expert", "23.0"),
        ("qwen3-next-80b-a3b", "experts", "2214.6"),
        ("qwen3-30b-a3b", "attention", "13.4"),
        ("qwen3-0.6b", "all-linear", "10.1"),
        ("qwen3-1.7b", "all-linear", "17.4"),
        ("qwen3-4b", "all-linear", "33.0"),
        ("qwen3-8b", "all-linear", "43.6"),
        ("qwen3-14b", "all-linear", "64.2"),
        ("qwen3-32b", "all-linear", "134.2"),
    ] {
        check(
            &format!("{name} {targets}"),
            planned(name, targets).lora.parameters as f64,
            1e6,
            millions,
        );
    }
}

#[test]
fn weights_and_arithmetic_agree_with_hand_made_tables() {
    // Gigabytes of NF4 weights, and GFLOP per trained token at 4096: forward, the same again and the way back to the inputs.
    for (name, gigabytes, gflop) in [
        ("qwen3-0.6b", 0.54, 5.7),
        ("qwen3-1.7b", 1.35, 12.4),
        ("qwen3-4b", 2.65, 29.6),
        ("qwen3-8b", 6.07, 50.8),
        ("qwen3-14b", 9.93, 91.5),
        ("qwen3-32b", 19.2, 211.0),
        ("qwen3-30b-a3b", 16.7, 25.5),
        ("qwen3-next-80b-a3b", 42.1, 24.1),
    ] {
        let plan = planned(name, "default");
        let weights = plan.weight_bytes.values().sum::<u64>() as f64 / 1e9;
        assert!((weights / gigabytes - 1.0).abs() < 0.01, "{name}: {weights} GB");
        // The table has no adapters and counts the head once more for its recomputation; small models feel both.
        let counted = plan.flops_per_token / 1e9;
        assert!((counted / gflop - 1.0).abs() < 0.15, "{name}: {counted} GFLOP");
    }
}

#[test]
fn rank_16_on_all_routed_experts_is_refused_with_what_to_lower() {
    let spec = TrainSpec {
        targets: vec!["default+experts".to_owned()],
        ..TrainSpec::default()
    };
    let failure = plan(&question("qwen3-next-80b-a3b", spec.clone())).unwrap_err();
    assert_eq!(failure.code, "LORA_TOO_LARGE");
    for part in ["2236 million", "35.8 GB", "8.6 GB"] {
        assert!(failure.message.contains(part), "{part}: {failure}");
    }
    for part in ["rank to 3", "adamw-8bit", "experts", "adapter_budget_bytes"] {
        assert!(failure.hint.contains(part), "{part}: {failure}");
    }
    let modest = TrainSpec {
        rank: 4,
        optimizer: OptimizerKind::Adamw8bit,
        ..spec
    };
    let plan = plan(&question("qwen3-next-80b-a3b", modest)).unwrap();
    assert!(plan.fits && plan.lora.total_bytes() < 6_000_000_000, "{:?}", plan.lora);
    assert_eq!(plan.bytes.optimizer.abs_diff(plan.lora.optimizer_bytes) / 1_000_000, 0);
}

#[test]
fn the_largest_micro_batch_fits_and_one_more_does_not() {
    let spec = TrainSpec {
        activation_budget_bytes: 0,
        ..TrainSpec::default()
    };
    for (name, card) in [("qwen3-8b", "RTX 4090"), ("qwen3-next-80b-a3b", "A100 SXM")] {
        let mut question = question(name, spec.clone());
        question.gpu = Gpu::named(card).unwrap();
        question.sequence_length = 1000;
        let largest = plan(&question).unwrap().largest;
        assert!(
            largest.micro_batch > 0 && largest.sequence_length >= 1000,
            "{largest:?}"
        );
        for (extra, fits) in [(0, true), (1, false)] {
            question.micro_batch = largest.micro_batch + extra;
            assert_eq!(plan(&question).unwrap().fits, fits, "{name}: {largest:?} + {extra}");
        }
    }
}

#[test]
fn a_model_without_weights_is_laid_out_as_a_loaded_one() {
    for family in ALL_FAMILIES {
        for dtype in [BaseDtype::Nf4, BaseDtype::Bf16, BaseDtype::F32] {
            let options = LoadOptions::from(dtype);
            let loaded = model(family, 1, options);
            let device = Counting::new(Habits::cpu(Factors::Exact));
            let config = ModelConfig::miniature(family, VOCABULARY);
            let empty = skeleton(&device, config, options, DType::BF16, 1).unwrap();
            assert_eq!(empty.weight_bytes(), loaded.weight_bytes(), "{family:?} {dtype:?}");
            assert_eq!(empty.modules(), loaded.modules(), "{family:?} {dtype:?}");
        }
    }
}

/// Trains one step of a miniature on the CPU backend and compares the peak it reports with the plan.
fn check_peak(family: brightrun_worker::model::Family, spec: &TrainSpec, shape: Shape) {
    let options = LoadOptions::from(spec.base_dtype);
    let model = model(family, 2, options);
    let device = model.device();
    let mut lora: LoraSet<_> = lora(&model, spec);
    let mut gradients = LoraGradients::zeros(device, &lora).unwrap();
    let mut optimizer = Optimizer::new(device, spec, &lora).unwrap();
    let ids: Vec<i32> = (0..shape.length as i32).map(|id| id % VOCABULARY as i32).collect();
    let learnt = vec![true; shape.length];
    let batch = Batch::pack((0..shape.sequences).map(|_| (ids.as_slice(), learnt.as_slice())));
    let settings = BackwardSettings {
        gradient_scale: 1.0,
        activation_budget_bytes: spec.activation_budget_bytes,
    };
    device.reset_peak();
    model.forward_backward(&lora, &mut gradients, &batch, settings).unwrap();
    optimizer.apply(device, &mut lora, &gradients, (1, 1e-4, 1.0)).unwrap();
    let measured = device.memory().peak_bytes as f64;
    let habits = Habits::cpu(device.factors(model.precision()));
    let config = ModelConfig::miniature(family, VOCABULARY);
    let planned = footprint(&config, DType::BF16, spec, habits, shape).unwrap();
    let total = planned.bytes.total() as f64;
    assert!(
        (total / measured - 1.0).abs() < 0.005,
        "{family:?} {:?} {shape:?}: planned {:?}, measured {measured}",
        spec.base_dtype,
        planned.bytes
    );
    assert_eq!(
        planned.bytes.optimizer / 1000,
        optimizer.size_bytes().next_multiple_of(64) / 1000
    );
}

#[test]
fn small_models_of_every_family_take_what_was_planned() {
    for family in ALL_FAMILIES {
        let everything = train_support::all_targets(family);
        for (targets, dtype, budget, optimizer) in [
            (vec!["default".to_owned()], BaseDtype::F32, 0, OptimizerKind::Adamw),
            (everything.clone(), BaseDtype::Nf4, 0, OptimizerKind::Adamw8bit),
            (everything, BaseDtype::Bf16, u64::MAX, OptimizerKind::Adamw),
            (vec!["q_proj".to_owned()], BaseDtype::Nf4, 300_000, OptimizerKind::Adamw),
        ] {
            let spec = TrainSpec {
                base_dtype: dtype,
                rank: 8,
                targets,
                activation_budget_bytes: budget,
                optimizer,
                ..TrainSpec::default()
            };
            for (sequences, length) in [(1, 300), (3, 65), (7, 16)] {
                check_peak(family, &spec, Shape { sequences, length });
            }
        }
    }
}
