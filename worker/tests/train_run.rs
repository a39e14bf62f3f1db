//! Whole runs: they learn, they repeat, they evaluate, and they refuse what cannot be trained.
#![allow(clippy::unwrap_used)]

mod train_support;

use std::path::Path;

use brightrun_kernels::cpu::Cpu;
use brightrun_kernels::ops::{Device, Precision};
use brightrun_worker::artifact::input::BaseModel;
use brightrun_worker::artifact::{AdapterConfig, AdapterDtype, AdapterLayout, tensors_of, write_adapter};
use brightrun_worker::error::Failure;
use brightrun_worker::model::{Batch, Decoder, Family, LoadOptions, LoraSet, Model};
use brightrun_worker::spec::{BaseDtype, Order, TrainSpec};
use brightrun_worker::train::{
    Control, EncodedExample, EvaluationReport, GenerateSettings, StepReport, TrainEvents, TrainRequest, evaluate,
    generate, run,
};
use train_support::{
    ALL_FAMILIES, REFERENCE, Recorder, VOCABULARY, adapter_bytes, all_targets, examples, lora, model, spec,
    stirred_lora, trained,
};

fn failure_of(model: &Model<Cpu>, spec: &TrainSpec, train: &[EncodedExample]) -> Failure {
    let mut adapter = lora(model, spec);
    let request = TrainRequest {
        model,
        lora: &mut adapter,
        spec,
        train,
        validation: &[],
        checkpoint_dir: None,
        resume: false,
    };
    run(request, &mut Recorder::new(|_| Control::Continue)).unwrap_err()
}

#[test]
fn the_loss_falls_whatever_the_base_is_kept_in() {
    for dtype in [BaseDtype::Nf4, BaseDtype::Bf16, BaseDtype::F32] {
        let model = model(Family::Qwen3, 2, LoadOptions::from(dtype));
        let spec = TrainSpec {
            base_dtype: dtype,
            epochs: 20,
            learning_rate: 1e-2,
            ..spec()
        };
        let (_, reports, summary) = trained(&model, &spec, &examples(6), None, |_| Control::Continue);
        let (first, last) = (summary.first_loss.unwrap(), summary.last_loss.unwrap());
        assert!(last < 0.7 * first, "{dtype:?}: {first} → {last}");
        assert_eq!(reports.len(), 40);
        assert!(
            reports
                .iter()
                .all(|report| report.tokens_per_second.is_finite() && report.eta_seconds >= 0.0)
        );
    }
}

#[test]
fn the_same_seed_gives_the_same_adapter_at_any_number_of_threads() {
    for dtype in [BaseDtype::Nf4, BaseDtype::F32] {
        let with = |threads| {
            let model = model(Family::Qwen3, threads, LoadOptions::from(dtype));
            trained(&model, &spec(), &examples(7), None, |_| Control::Continue).0
        };
        let one = with(1);
        assert_eq!(with(1), one);
        assert_eq!(with(4), one, "{dtype:?}");
    }
}

#[test]
fn another_seed_gives_another_adapter() {
    let model = model(Family::Qwen3, 2, REFERENCE);
    let other = TrainSpec { seed: 43, ..spec() };
    let adapter = |spec| trained(&model, spec, &examples(7), None, |_| Control::Continue).0;
    assert_ne!(adapter(&spec()), adapter(&other));
}

/// The same loss, so far as rounding goes, however the examples of a step are packed.
#[test]
fn packing_changes_no_loss() {
    let model = model(Family::Qwen2, 2, REFERENCE);
    let losses = |micro_batch_tokens| {
        let spec = TrainSpec {
            micro_batch_tokens,
            order: Order::File,
            ..spec()
        };
        let (_, reports, _) = trained(&model, &spec, &examples(7), None, |_| Control::Continue);
        reports.iter().map(|report| report.loss).collect::<Vec<f64>>()
    };
    for (alone, packed) in losses(1).into_iter().zip(losses(10_000)) {
        assert!((alone - packed).abs() <= 1e-5 * alone, "{alone} and {packed}");
    }
}

struct Evaluations {
    seen: Vec<EvaluationReport>,
}

impl TrainEvents for Evaluations {
    fn on_step(&mut self, _: &StepReport) -> Control {
        Control::Continue
    }

    fn on_evaluate(&mut self, report: &EvaluationReport) {
        self.seen.push(report.clone());
    }
}

#[test]
fn evaluations_come_when_due_and_once_at_the_end_and_change_nothing() {
    let model = model(Family::Qwen3, 2, REFERENCE);
    let spec = TrainSpec {
        evaluate_every: 2,
        ..spec()
    };
    let (data, held_out) = (examples(6), &examples(9)[6..]);
    let mut adapter = lora(&model, &spec);
    let mut events = Evaluations { seen: Vec::new() };
    let request = TrainRequest {
        model: &model,
        lora: &mut adapter,
        spec: &spec,
        train: &data,
        validation: held_out,
        checkpoint_dir: None,
        resume: false,
    };
    let summary = run(request, &mut events).unwrap();
    assert_eq!(events.seen.iter().map(|report| report.step).collect::<Vec<_>>(), [2, 4]);
    assert_eq!(
        summary.evaluation.as_ref(),
        events.seen.last().map(|report| &report.evaluation)
    );
    let silent = trained(
        &model,
        &TrainSpec {
            evaluate_every: 0,
            ..spec
        },
        &data,
        None,
        |_| Control::Continue,
    )
    .0;
    assert_eq!(adapter_bytes(&adapter, &model), silent);
}

#[test]
fn a_total_loss_is_the_mean_over_tokens_not_over_examples() {
    let model = model(Family::Qwen3, 2, REFERENCE);
    let data = examples(5);
    let whole = evaluate(&model, None, &data, 64, &mut || true).unwrap().unwrap();
    let tokens: usize = whole.examples.iter().map(|one| one.supervised_tokens).sum();
    let sum: f64 = whole
        .examples
        .iter()
        .map(|one| one.loss * one.supervised_tokens as f64)
        .sum();
    assert_eq!(tokens, whole.supervised_tokens);
    assert!((whole.loss - sum / tokens as f64).abs() < 1e-12 * whole.loss);
    assert_eq!(
        whole.examples.iter().map(|one| one.line).collect::<Vec<_>>(),
        [1, 2, 3, 4, 5]
    );
    assert_eq!(evaluate(&model, None, &data, 64, &mut || false).unwrap(), None);
}

/// Writes an adapter's files as a run does.
fn save(adapter: &LoraSet<Cpu>, model: &Model<Cpu>, folder: &Path) {
    let base = BaseModel {
        id: "base".to_owned(),
        revision: None,
        config_sha256: String::new(),
        checkpoint_fingerprint: String::new(),
    };
    let config = AdapterConfig::new(&AdapterLayout::of(adapter, AdapterDtype::F32), &base).unwrap();
    let tensors = tensors_of(model.device(), adapter).unwrap();
    write_adapter(folder, &config, &tensors, AdapterDtype::F32).unwrap();
}

#[test]
fn every_familys_adapter_is_loaded_as_it_was_saved_presets_and_all() {
    for family in ALL_FAMILIES {
        let model = model(family, 2, REFERENCE);
        let has_experts = model.modules().iter().any(|module| module.experts.is_some());
        let targets = if has_experts { "all-linear+experts" } else { "default" };
        let spec = TrainSpec {
            targets: vec![targets.to_owned()],
            ..spec()
        };
        let stirred = stirred_lora(&model, &spec);
        assert_eq!(
            stirred.pairs().len(),
            model.modules().len(),
            "{family:?}: everything is adapted"
        );
        let folder = tempfile::tempdir().unwrap();
        save(&stirred, &model, folder.path());
        let loaded = LoraSet::load(model.device(), folder.path(), model.modules()).unwrap();
        assert_eq!(
            adapter_bytes(&loaded, &model),
            adapter_bytes(&stirred, &model),
            "{family:?}"
        );
    }
}

#[test]
fn a_fresh_adapter_changes_nothing_and_a_saved_one_is_loaded_as_it_was() {
    let model = model(Family::Qwen2, 2, REFERENCE);
    let batch = Batch::prompt(&examples(1)[0].ids);
    let fresh = lora(&model, &spec());
    assert_eq!(
        model.logits(Some(&fresh), &batch).unwrap(),
        model.logits(None, &batch).unwrap()
    );
    let stirred = stirred_lora(&model, &spec());
    let folder = tempfile::tempdir().unwrap();
    save(&stirred, &model, folder.path());
    let loaded = LoraSet::load(model.device(), folder.path(), model.modules()).unwrap();
    assert_eq!(adapter_bytes(&loaded, &model), adapter_bytes(&stirred, &model));
    assert_eq!(
        model.logits(Some(&loaded), &batch).unwrap(),
        model.logits(Some(&stirred), &batch).unwrap()
    );
    assert_ne!(
        model.logits(Some(&loaded), &batch).unwrap(),
        model.logits(None, &batch).unwrap()
    );
}

#[test]
fn a_decoder_gives_the_logits_of_the_whole_document_however_it_is_cut() {
    for family in ALL_FAMILIES {
        let spec = TrainSpec {
            targets: all_targets(family),
            ..spec()
        };
        let model = model(family, 2, REFERENCE);
        let lora = stirred_lora(&model, &spec);
        let ids: Vec<i32> = (0..12).map(|step| (step * 5 % VOCABULARY as i32) + 1).collect();
        let whole = model.logits(Some(&lora), &Batch::prompt(&ids)).unwrap();
        for cut in [1, 5, 11] {
            let mut decoder = Decoder::new(&model, Some(&lora), ids.len()).unwrap();
            let mut rows = vec![(cut, decoder.read(&ids[..cut]).unwrap())];
            for end in cut + 1..=ids.len() {
                rows.push((end, decoder.read(&ids[end - 1..end]).unwrap()));
            }
            for (end, logits) in rows {
                let expected = &whole[(end - 1) * VOCABULARY..end * VOCABULARY];
                let worst = logits
                    .iter()
                    .zip(expected)
                    .fold(0.0f32, |worst, (one, other)| worst.max((one - other).abs()));
                assert!(worst < 1e-4, "cut {cut}, position {end}: {worst}");
            }
        }
    }
}

#[test]
fn a_learnt_rule_is_generated() {
    let model = model(Family::Qwen3, 2, REFERENCE);
    let spec = TrainSpec {
        epochs: 60,
        learning_rate: 1e-2,
        rank: 16,
        ..spec()
    };
    let mut adapter = lora(&model, &spec);
    let data = examples(3);
    let request = TrainRequest {
        model: &model,
        lora: &mut adapter,
        spec: &spec,
        train: &data,
        validation: &[],
        checkpoint_dir: None,
        resume: false,
    };
    run(request, &mut Recorder::new(|_| Control::Continue)).unwrap();
    let ids = &data[0].ids;
    let (prompt, rest) = ids.split_at(ids.len() / 2);
    let settings = GenerateSettings {
        max_new_tokens: rest.len(),
        ..GenerateSettings::default()
    };
    assert_eq!(
        generate(&model, Some(&adapter), prompt, &settings, &mut |_| true).unwrap(),
        rest
    );
    let stopping = GenerateSettings {
        stop_ids: vec![rest[1]],
        ..settings.clone()
    };
    assert_eq!(
        generate(&model, Some(&adapter), prompt, &stopping, &mut |_| true).unwrap(),
        rest[..1]
    );
    assert_ne!(generate(&model, None, prompt, &settings, &mut |_| true).unwrap(), rest);
}

#[test]
fn sampling_repeats_with_its_seed() {
    let model = model(Family::Qwen3, 2, REFERENCE);
    let draw = |seed| {
        let settings = GenerateSettings {
            max_new_tokens: 12,
            temperature: 1.5,
            top_p: 0.9,
            seed,
            stop_ids: Vec::new(),
        };
        generate(&model, None, &[1, 2, 3], &settings, &mut |_| true).unwrap()
    };
    assert_eq!(draw(1), draw(1));
    assert_ne!(draw(1), draw(2));
}

#[test]
fn examples_that_cannot_be_trained_are_named_by_line() {
    let model = model(Family::Qwen3, 1, REFERENCE);
    let good = examples(2);
    let with = |change: fn(&mut EncodedExample)| {
        let mut list = good.clone();
        change(&mut list[1]);
        failure_of(&model, &spec(), &list)
    };
    for (failure, word) in [
        (with(|example| example.supervised.fill(false)), "no token to learn"),
        (with(|example| example.ids[0] = VOCABULARY as i32), "96 tokens"),
        (with(|example| example.ids[0] = -1), "-1"),
        (with(|example| example.supervised.truncate(1)), "mask"),
        (
            with(|example| {
                example.ids = vec![1; 5000];
                example.supervised = vec![true; 5000];
            }),
            "4096",
        ),
    ] {
        assert_eq!(failure.code, "TRAIN_EXAMPLE");
        assert!(
            failure.message.contains(word) && failure.place.contains("line 2"),
            "{failure}"
        );
    }
    assert_eq!(failure_of(&model, &spec(), &[]).code, "TRAIN_EMPTY");
}

#[test]
fn a_loss_that_is_not_finite_stops_the_run_with_step_and_lines() {
    let model = model(Family::Qwen3, 2, REFERENCE);
    let spec = spec();
    let mut adapter = lora(&model, &spec);
    let first = &mut adapter.pairs_mut()[0].a;
    let poison = vec![f32::NAN; first.shape().elements()];
    model.device().write(first, bytemuck::cast_slice(&poison)).unwrap();
    let data = examples(3);
    let request = TrainRequest {
        model: &model,
        lora: &mut adapter,
        spec: &spec,
        train: &data,
        validation: &[],
        checkpoint_dir: None,
        resume: false,
    };
    let mut events = Recorder::new(|_| Control::Continue);
    let failure = run(request, &mut events).unwrap_err();
    assert_eq!(failure.code, "TRAIN_NON_FINITE");
    assert!(
        failure.message.contains("step 1") && failure.place.contains("1, 2, 3"),
        "{failure}"
    );
    assert!(events.steps.is_empty());
}

#[test]
fn weights_take_the_memory_that_their_encoding_says() {
    let bytes = |dtype| model(Family::Qwen3, 1, LoadOptions::from(dtype)).weight_bytes().clone();
    let (nf4, bf16) = (bytes(BaseDtype::Nf4), bytes(BaseDtype::Bf16));
    let projections = bf16["bf16"] - nf4["bf16"];
    // Half a byte a value and one byte for each 64, against two bytes a value; nested absmax and code map are per matrix.
    let per_value = nf4["nf4-nested"] as f64 / (projections as f64 / 2.0);
    assert!((0.5..0.75).contains(&per_value), "{per_value}");
    assert_eq!(LoadOptions::from(BaseDtype::F32).precision, Precision::F32);
}
