//! Plans: published numbers of public models, and small models that take exactly what was planned.
#![allow(clippy::unwrap_used, clippy::panic)]

mod train_support;

use std::process::Command;

use brightrun_kernels::counting::{Counting, Factors, Habits};
use brightrun_kernels::emu::emulated;
use brightrun_kernels::gpu::SharedRows;
use brightrun_kernels::ops::Device;
use brightrun_kernels::{DType, Error};
use brightrun_worker::model::synthetic::write_checkpoint;
use brightrun_worker::model::{
    BackwardSettings, Batch, Family, LoadOptions, LoraConfig, LoraGradients, LoraSet, Model, ModelConfig,
};
use brightrun_worker::plan::{Gpu, Plan, Question, Shape, footprint, plan, preset, skeleton};
use brightrun_worker::spec::{BaseDtype, OptimizerKind, TrainSpec};
use brightrun_worker::train::optimizer::Optimizer;
use serde_json::{Value, json};
use train_support::{ALL_FAMILIES, VOCABULARY, lora, model, stirred_lora};

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
        targets: targets.split(',').map(str::to_owned).collect(),
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

/// Documents of equal length, all of them learnt.
fn batch(shape: Shape) -> Batch {
    let ids: Vec<i32> = (0..shape.length as i32).map(|id| id % VOCABULARY as i32).collect();
    let learnt = vec![true; shape.length];
    Batch::pack((0..shape.sequences).map(|_| (ids.as_slice(), learnt.as_slice())))
}

/// Trains one step of a miniature on the CPU backend and compares the peak it reports with the plan.
fn check_peak(family: Family, spec: &TrainSpec, shape: Shape) {
    let options = LoadOptions::from(spec.base_dtype);
    let model = model(family, 2, options);
    let device = model.device();
    let mut lora: LoraSet<_> = lora(&model, spec);
    let mut gradients = LoraGradients::zeros(device, &lora).unwrap();
    let mut optimizer = Optimizer::new(device, spec, &lora).unwrap();
    let batch = batch(shape);
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
    // The pool rounds each tensor up to whole cache lines.
    let moments = optimizer.size_bytes();
    assert!(
        (moments..moments + moments / 20).contains(&planned.bytes.optimizer),
        "{moments}"
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

/// What one micro-batch of a miniature takes on the emulated device beyond its weights, adapter and moments, where weights are
/// shared from so many rows on; and what is planned for it. `None`, told, where there is no compiler.
fn emulated_peak(family: Family, spec: &TrainSpec, shape: Shape, rows: SharedRows) -> Option<[f64; 2]> {
    let device = match emulated(None) {
        Ok(device) => device,
        Err(Error::Unsupported { reason, .. }) => {
            println!("emulated: absent (not tested): {reason}");
            return None;
        }
        Err(error) => panic!("{error}"),
    };
    device.share_from(rows);
    let folder = tempfile::tempdir().unwrap();
    let config = ModelConfig::miniature(family, VOCABULARY);
    write_checkpoint(folder.path(), &config, 11).unwrap();
    let options = LoadOptions::from(spec.base_dtype);
    let model = Model::load(&device, folder.path(), options, &mut |_| {}).unwrap();
    let lora_config = LoraConfig {
        rank: spec.rank,
        alpha: spec.lora_alpha(),
        targets: spec.targets.clone(),
    };
    let lora = LoraSet::initialise(&device, lora_config, model.modules(), spec.seed).unwrap();
    let mut gradients = LoraGradients::zeros(&device, &lora).unwrap();
    let batch = batch(shape);
    let settings = BackwardSettings {
        gradient_scale: 1.0,
        activation_budget_bytes: spec.activation_budget_bytes,
    };
    // Tables of documents stay, so the second micro-batch is like all others.
    model.forward_backward(&lora, &mut gradients, &batch, settings).unwrap();
    let before = device.memory().in_use_bytes;
    device.reset_peak();
    model.forward_backward(&lora, &mut gradients, &batch, settings).unwrap();
    let measured = device.memory().peak_bytes - before;
    let habits = Habits {
        alignment_bytes: 16,
        shares_from: Some(rows),
        ..Habits::gpu()
    };
    let planned = footprint(&config, DType::BF16, spec, habits, shape).unwrap().bytes;
    Some([measured as f64, (planned.checkpoints + planned.workspace) as f64])
}

#[test]
fn a_plan_holds_what_the_gpu_backend_shares() {
    let never = SharedRows {
        linear: usize::MAX,
        experts: usize::MAX,
    };
    let always = SharedRows { linear: 1, experts: 1 };
    for family in ALL_FAMILIES {
        let spec = TrainSpec {
            base_dtype: BaseDtype::Nf4,
            rank: 8,
            targets: train_support::all_targets(family),
            // Layers are computed again, which is where weights are shared.
            activation_budget_bytes: 0,
            ..TrainSpec::default()
        };
        // Few tokens, so that it is the layers and not the loss that take most.
        for (sequences, length) in [(1, 12), (2, 33)] {
            let shape = Shape { sequences, length };
            let [Some([bare, planned_bare]), Some([shared, planned_shared])] =
                [never, always].map(|rows| emulated_peak(family, &spec, shape, rows))
            else {
                return;
            };
            let said =
                format!("{family:?} {shape:?}: bare {bare} of {planned_bare}, shared {shared} of {planned_shared}");
            assert!(shared > 1.2 * bare, "something was shared: {said}");
            // A moment's tensors are added up as if the worst of them met.
            for ratio in [planned_bare / bare, planned_shared / shared] {
                assert!((0.998..1.04).contains(&ratio), "{said}");
            }
        }
    }
}

fn brightrun(arguments: &[&str]) -> (Option<i32>, Value) {
    let output = Command::new(env!("CARGO_BIN_EXE_brightrun"))
        .args(arguments)
        .env_clear()
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let value = serde_json::from_str(&text).unwrap_or(Value::String(text));
    (output.status.code(), value)
}

#[test]
fn the_command_plans_a_bare_configuration() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.json");
    std::fs::write(&path, preset("qwen3-next-80b-a3b").unwrap()).unwrap();
    let path = path.to_str().unwrap();
    let rest = [
        "--gpu",
        "h100",
        "--rank",
        "8",
        "--targets",
        "attention,+shared-expert",
        "--sequence-length",
        "2048",
    ];
    let more = [
        "--micro-batch",
        "2",
        "--dataset-tokens",
        "1000000",
        "--price-per-hour",
        "3",
        "--json",
    ];
    let (code, plan) = brightrun(&[&["plan", "--config", path][..], &rest, &more].concat());
    assert_eq!(code, Some(0), "{plan}");
    assert_eq!(plan["total_parameters"], 79_674_391_296_u64);
    let parts = plan["bytes"]
        .as_object()
        .unwrap()
        .values()
        .map(|value| value.as_u64().unwrap());
    assert_eq!(parts.sum::<u64>(), plan["total_bytes"].as_u64().unwrap());
    assert_eq!((&plan["fits"], &plan["settings"]["rank"]), (&json!(true), &json!(8)));
    assert_eq!(plan["run"]["tokens"], 3_000_000, "three passes");
    let (hours, cost) = (&plan["run"]["hours"]["low"], &plan["run"]["cost"]["low"]);
    assert!((cost.as_f64().unwrap() - 3.0 * hours.as_f64().unwrap()).abs() < 1e-9);
    let target = |name: &str| {
        let mut targets = plan["targets"].as_array().unwrap().iter();
        targets.find(|target| target["target"] == name).unwrap().clone()
    };
    assert_eq!(target("shared_expert.up_proj")["servers"]["vLLM"], "yes");
    assert_eq!(target("in_proj_qkvz")["servers"]["SGLang"], "unproven");
    let (code, text) = brightrun(&["plan", "--config", path, "--gpu", "RTX 4090"]);
    assert!(
        code == Some(0) && text.as_str().unwrap().contains("DOES NOT FIT"),
        "{text}"
    );
}

#[test]
fn the_command_says_what_it_cannot_plan() {
    for (arguments, code) in [
        (&["plan", "--model", "qwen3-8b", "--gpu", "TPU"][..], "GPU_UNKNOWN"),
        (&["plan", "--model", "qwen9"], "PLAN_PRESET_UNKNOWN"),
        (&["plan"], "MODEL_PATH_UNSET"),
        (
            &["plan", "--model", "qwen3-8b", "--targets", "expert"],
            "LORA_TARGET_UNKNOWN",
        ),
        (&["plan", "--model", "qwen3-8b", "--rank", "0"], "SPEC_OUT_OF_RANGE"),
        (
            &["plan", "--model", "qwen3-8b", "--micro-batch", "0"],
            "PLAN_OUT_OF_RANGE",
        ),
        (
            &["plan", "--model", "qwen3-next-80b-a3b", "--targets", "experts"],
            "LORA_TOO_LARGE",
        ),
    ] {
        let (status, answer) = brightrun(&[arguments, &["--json"]].concat());
        assert_eq!(
            (status, &answer["error"]["code"]),
            (Some(1), &json!(code)),
            "{arguments:?}"
        );
    }
}

#[test]
fn an_exported_adapter_is_the_same_in_peft_s_layout_and_by_expert() {
    let family = Family::Qwen3Next;
    let folder = tempfile::tempdir().unwrap();
    let config = ModelConfig::miniature(family, VOCABULARY);
    write_checkpoint(folder.path(), &config, 11).unwrap();
    let options = LoadOptions::from(BaseDtype::F32);
    let model = train_support::load(folder.path(), 2, options);
    let spec = TrainSpec {
        rank: 2,
        targets: vec!["default+experts".to_owned()],
        ..TrainSpec::default()
    };
    let adapter = stirred_lora(&model, &spec);
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    std::fs::create_dir(path("trained")).unwrap();
    train_support::save(&adapter, &model, &folder.path().join("trained"));
    let export = |rest: &[&str], out: &str| {
        let (trained, model, out) = (path("trained"), path(""), path(out));
        let fixed = [
            "export",
            "--adapter",
            &trained,
            "--model",
            &model,
            "--out",
            &out,
            "--json",
        ];
        let (code, answer) = brightrun(&[&fixed[..], rest].concat());
        assert_eq!(code, Some(0), "{answer}");
        answer["tensors"].as_u64().unwrap()
    };
    export(&[], "again");
    let bytes = |name: &str| std::fs::read(folder.path().join(name).join("adapter_model.safetensors")).unwrap();
    assert!(
        bytes("again") == bytes("trained"),
        "the stacked layout is the adapter's own"
    );
    let moe = config.moe.unwrap();
    let experts = 3 * 2 * (moe.experts * config.layers) as u64;
    let stacked = 2 * adapter.pairs().len() as u64;
    assert_eq!(
        export(&["--layout", "per-expert"], "single"),
        stacked - 4 * config.layers as u64 + experts
    );
    let described = std::fs::read_to_string(folder.path().join("single/adapter_config.json")).unwrap();
    let described: Value = serde_json::from_str(&described).unwrap();
    assert_eq!(described["target_parameters"], Value::Null);
    assert!(
        described["target_modules"]
            .as_array()
            .unwrap()
            .contains(&json!("gate_proj"))
    );
    let trained: Value = serde_json::from_slice(&std::fs::read(path("trained/adapter_config.json")).unwrap()).unwrap();
    let parameters = trained["target_parameters"].as_array().unwrap();
    assert!(
        parameters.contains(&json!("shared_expert.up_proj.weight")),
        "{parameters:?}"
    );
    export(&["--bf16"], "half");
    assert!(bytes("half").len() < bytes("trained").len() * 6 / 10);
}
