//! An interrupted run that is continued gives the bytes of an uninterrupted one.
#![allow(clippy::unwrap_used)]

mod train_support;

use std::path::Path;

use brightrun_kernels::cpu::Cpu;
use brightrun_worker::error::Failure;
use brightrun_worker::model::random::CounterRandom;
use brightrun_worker::model::{Family, Model};
use brightrun_worker::spec::{OptimizerKind, TrainSpec};
use brightrun_worker::train::{Control, Outcome, StepReport, StopReason, TrainEvents, TrainRequest, run};
use train_support::{REFERENCE, Recorder, examples, lora, model, spec, trained};

fn checkpointing(every: usize) -> TrainSpec {
    TrainSpec {
        checkpoint_every: every,
        ..spec()
    }
}

fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

fn checkpoints(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn resume_failure(model: &Model<Cpu>, spec: &TrainSpec, lines: usize, folder: &Path) -> Failure {
    let mut adapter = lora(model, spec);
    let request = TrainRequest {
        model,
        lora: &mut adapter,
        spec,
        train: &examples(lines),
        validation: &[],
        checkpoint_dir: Some(folder),
        resume: true,
    };
    run(request, &mut Recorder::new(|_| Control::Continue)).unwrap_err()
}

#[test]
fn a_run_with_8_bit_moments_continues_to_the_same_bytes() {
    let model = model(Family::Qwen3Moe, 2, REFERENCE);
    let data = examples(10);
    let spec = TrainSpec {
        // Wide enough that factors have 4096 values and more, from where on moments are kept in 8 bits.
        rank: 64,
        targets: vec!["attention+experts".to_owned()],
        optimizer: OptimizerKind::Adamw8bit,
        ..checkpointing(2)
    };
    let exact = TrainSpec {
        optimizer: OptimizerKind::Adamw,
        ..spec.clone()
    };
    let (whole, reports, summary) = trained(&model, &spec, &data, None, |_| Control::Continue);
    let (_, exact_reports, exact_summary) = trained(&model, &exact, &data, None, |_| Control::Continue);
    assert!(3 * summary.optimizer_bytes < exact_summary.optimizer_bytes);
    let (last, exact_last) = (summary.last_loss.unwrap(), exact_summary.last_loss.unwrap());
    let fallen = exact_reports[0].loss - exact_last;
    assert!(
        fallen > 0.0 && (last - exact_last).abs() < 0.1 * fallen,
        "{last} and {exact_last} after {fallen}"
    );
    let folder = tempfile::tempdir().unwrap();
    trained(
        &model,
        &spec,
        &data,
        Some((folder.path(), false)),
        |report| match report.step {
            5 => Control::Stop(StopReason::Shutdown),
            _ => Control::Continue,
        },
    );
    let (resumed, later, _) = trained(&model, &spec, &data, Some((folder.path(), true)), |_| Control::Continue);
    assert_eq!(later.len(), reports.len() - 5);
    assert!(resumed == whole, "the bytes differ");
    assert_eq!(
        resume_failure(&model, &exact, 10, folder.path()).code,
        "CHECKPOINT_MISMATCH"
    );
}

/// A kill leaves the folder as it was at that moment: the test copies it after some step, and continues from the copy.
#[test]
fn a_run_killed_after_any_step_continues_to_the_same_bytes() {
    let model = model(Family::Qwen3, 2, REFERENCE);
    let data = examples(10);
    let spec = checkpointing(3);
    let (whole, reports, _) = trained(&model, &spec, &data, None, |_| Control::Continue);
    let total = reports.len();
    assert_eq!(total, 8);
    let random = CounterRandom::new(1, "kill points");
    for attempt in 0..3 {
        let killed_after = 1 + random.below(attempt, total - 1);
        let (first, copy) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        trained(&model, &spec, &data, Some((first.path(), false)), |report| {
            if report.step == killed_after {
                copy_folder(first.path(), copy.path());
            }
            Control::Continue
        });
        let (resumed, later, summary) = trained(&model, &spec, &data, Some((copy.path(), true)), |_| Control::Continue);
        // The copy is taken before the step's own checkpoint is written.
        let held = (killed_after - 1) / 3 * 3;
        assert_eq!(
            summary.resumed_from,
            (held > 0).then_some(held),
            "killed after {killed_after}"
        );
        assert_eq!(resumed, whole, "killed after {killed_after}");
        for (report, original) in later.iter().zip(&reports[held..]) {
            assert_eq!(
                (report.step, report.loss, report.gradient_norm),
                (original.step, original.loss, original.gradient_norm)
            );
        }
        assert_eq!(summary.step, total);
        assert!((summary.first_loss.unwrap() - reports[0].loss).abs() < 1e-12);
    }
}

#[test]
fn a_stopped_run_writes_a_checkpoint_and_continues_to_the_same_bytes() {
    let model = model(Family::Qwen2, 1, REFERENCE);
    let data = examples(9);
    let spec = checkpointing(0);
    let (whole, _, _) = trained(&model, &spec, &data, None, |_| Control::Continue);
    for reason in [StopReason::Shutdown, StopReason::Cancel] {
        let folder = tempfile::tempdir().unwrap();
        let stop_at = |step: usize| {
            move |report: &StepReport| match report.step == step {
                true => Control::Stop(reason),
                false => Control::Continue,
            }
        };
        let (_, _, first) = trained(&model, &spec, &data, Some((folder.path(), true)), stop_at(2));
        assert_eq!((first.outcome, first.step), (Outcome::Stopped(reason), 2));
        assert_eq!(checkpoints(folder.path()), ["step-00000002.ckpt"]);
        let (_, _, second) = trained(&model, &spec, &data, Some((folder.path(), true)), stop_at(5));
        assert_eq!((second.resumed_from, second.step), (Some(2), 5));
        let (resumed, _, last) = trained(&model, &spec, &data, Some((folder.path(), true)), |_| Control::Continue);
        assert_eq!((last.outcome, last.resumed_from), (Outcome::Finished, Some(5)));
        assert_eq!(resumed, whole);
    }
}

/// Counts the questions and says stop at the chosen one.
struct StopAtQuestion {
    left: usize,
    steps: usize,
}

impl TrainEvents for StopAtQuestion {
    fn control(&mut self) -> Control {
        if self.left == 0 {
            return Control::Stop(StopReason::Shutdown);
        }
        self.left -= 1;
        Control::Continue
    }

    fn on_step(&mut self, _: &StepReport) -> Control {
        self.steps += 1;
        Control::Continue
    }
}

#[test]
fn a_stop_inside_a_step_is_honoured_before_its_next_micro_batch_and_loses_only_that_step() {
    let model = model(Family::Qwen3, 2, REFERENCE);
    let data = examples(9);
    // Each example is longer than the limit, so a step of three has three micro-batches.
    let spec = TrainSpec {
        micro_batch_tokens: 1,
        ..checkpointing(0)
    };
    let (whole, _, _) = trained(&model, &spec, &data, None, |_| Control::Continue);
    for questions in [1, 4, 5] {
        let folder = tempfile::tempdir().unwrap();
        let mut adapter = lora(&model, &spec);
        let mut events = StopAtQuestion {
            left: questions,
            steps: 0,
        };
        let request = TrainRequest {
            model: &model,
            lora: &mut adapter,
            spec: &spec,
            train: &data,
            validation: &[],
            checkpoint_dir: Some(folder.path()),
            resume: true,
        };
        let summary = run(request, &mut events).unwrap();
        assert_eq!(summary.outcome, Outcome::Stopped(StopReason::Shutdown));
        assert_eq!((summary.step, events.steps), (questions / 3, questions / 3));
        let (resumed, _, _) = trained(&model, &spec, &data, Some((folder.path(), true)), |_| Control::Continue);
        assert_eq!(resumed, whole, "stopped at question {questions}");
    }
}

#[test]
fn a_torn_or_damaged_checkpoint_is_passed_over_for_the_one_before_it() {
    let model = model(Family::Qwen3, 2, REFERENCE);
    let data = examples(9);
    let spec = checkpointing(1);
    let (whole, _, _) = trained(&model, &spec, &data, None, |_| Control::Continue);
    let folder = tempfile::tempdir().unwrap();
    let stop = |report: &StepReport| match report.step {
        4 => Control::Stop(StopReason::Shutdown),
        _ => Control::Continue,
    };
    trained(&model, &spec, &data, Some((folder.path(), false)), stop);
    assert_eq!(checkpoints(folder.path()), ["step-00000003.ckpt", "step-00000004.ckpt"]);
    let newest = std::fs::read(folder.path().join("step-00000004.ckpt")).unwrap();
    let mut flipped = newest.clone();
    *flipped.last_mut().unwrap() ^= 1;
    let half = newest[..newest.len() / 2].to_vec();
    for damaged in [half, flipped, Vec::new()] {
        let copy = tempfile::tempdir().unwrap();
        copy_folder(folder.path(), copy.path());
        std::fs::write(copy.path().join("step-00000004.ckpt"), damaged).unwrap();
        std::fs::write(copy.path().join(".writing-abc"), b"left by a kill").unwrap();
        let (resumed, _, summary) = trained(&model, &spec, &data, Some((copy.path(), true)), |_| Control::Continue);
        assert_eq!(summary.resumed_from, Some(3));
        assert_eq!(resumed, whole);
    }
}

#[test]
fn a_checkpoint_of_another_run_is_refused_by_name() {
    let qwen3 = model(Family::Qwen3, 2, REFERENCE);
    let folder = tempfile::tempdir().unwrap();
    let spec = checkpointing(1);
    let stop = |_: &StepReport| Control::Stop(StopReason::Shutdown);
    trained(&qwen3, &spec, &examples(9), Some((folder.path(), false)), stop);
    let faster = TrainSpec {
        learning_rate: 1e-2,
        seed: 7,
        ..spec.clone()
    };
    let failure = resume_failure(&qwen3, &faster, 9, folder.path());
    assert_eq!(failure.code, "CHECKPOINT_MISMATCH");
    for word in ["learning_rate", "seed was 42 and is now 7"] {
        assert!(failure.message.contains(word), "{failure}");
    }
    assert!(
        resume_failure(&qwen3, &spec, 8, folder.path())
            .message
            .contains("examples")
    );
    let qwen2 = model(Family::Qwen2, 2, REFERENCE);
    assert!(
        resume_failure(&qwen2, &spec, 9, folder.path())
            .message
            .contains("model")
    );
    // What changes no bit of the result may change.
    let free = TrainSpec {
        checkpoint_every: 2,
        activation_budget_bytes: 0,
        ..spec
    };
    let (_, _, summary) = trained(&qwen3, &free, &examples(9), Some((folder.path(), true)), |_| {
        Control::Continue
    });
    assert_eq!(summary.resumed_from, Some(1));
}

#[test]
fn a_finished_run_resumes_to_its_end_without_another_step() {
    let model = model(Family::Qwen3, 2, REFERENCE);
    let folder = tempfile::tempdir().unwrap();
    let spec = checkpointing(100);
    let (whole, _, _) = trained(&model, &spec, &examples(6), Some((folder.path(), false)), |_| {
        Control::Continue
    });
    let (again, reports, summary) = trained(&model, &spec, &examples(6), Some((folder.path(), true)), |_| {
        Control::Continue
    });
    assert_eq!((again, reports.len(), summary.outcome), (whole, 0, Outcome::Finished));
}

#[test]
fn a_folder_that_cannot_be_written_is_an_error_with_its_path() {
    let model = model(Family::Qwen3, 1, REFERENCE);
    let folder = tempfile::tempdir().unwrap();
    let blocked = folder.path().join("file");
    std::fs::write(&blocked, b"not a folder").unwrap();
    let failure = resume_failure(&model, &checkpointing(1), 6, &blocked.join("checkpoints"));
    assert_eq!(failure.code, "STORAGE_FOLDER_UNWRITABLE");
    assert!(failure.place.contains("checkpoints"), "{failure}");
}
