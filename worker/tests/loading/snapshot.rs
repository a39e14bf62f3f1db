//! Snapshots: used when they are right, made again when they are not, never in the way.

use std::path::{Path, PathBuf};
use std::sync::Barrier;
use std::time::{Duration, SystemTime};

use brightrun_worker::model::load::snapshot::folder::FOLDER;
use brightrun_worker::model::load::snapshot::{Snapshot, SnapshotSettings, listed};
use brightrun_worker::model::load::stream::Limits;
use brightrun_worker::model::synthetic::SyntheticDtype;
use brightrun_worker::model::{Encoding, LoadSource, SnapshotOutcome};

use super::support::{checkpoint, load, logits, shards, snapshots, write};

const QUANTISED: [Encoding; 2] = [Encoding::Nf4, Encoding::Nf4Experts];

/// Loads with snapshots on; the logits, where the weights came from, what became of the snapshot.
fn loaded(folder: &Path, encoding: Encoding, settings: SnapshotSettings) -> (Vec<f32>, LoadSource, SnapshotOutcome) {
    let (model, report) = load(folder, encoding, Some(settings)).unwrap();
    (logits(&model), report.source, report.snapshot)
}

fn written(folder: &Path) -> PathBuf {
    match loaded(folder, Encoding::Nf4, snapshots()).2 {
        SnapshotOutcome::Written(path) => path,
        other => panic!("{other:?}"),
    }
}

fn files(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder.join(FOLDER)).unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

#[test]
fn the_next_start_reads_only_the_snapshot_and_has_the_same_model_to_the_last_bit() {
    for dtype in [SyntheticDtype::Bf16, SyntheticDtype::Fp8] {
        for encoding in QUANTISED {
            let folder = checkpoint(dtype);
            let (direct, _) = load(folder.path(), encoding, None).unwrap();
            let (first, report) = load(folder.path(), encoding, Some(snapshots())).unwrap();
            assert_eq!(report.source, LoadSource::Checkpoint);
            // Damage in every weight file: who read one again would notice. Lengths and times stay.
            for shard in shards(folder.path()) {
                let time = std::fs::metadata(&shard).unwrap().modified().unwrap();
                let length = std::fs::metadata(&shard).unwrap().len();
                std::fs::write(&shard, vec![0xff; length as usize]).unwrap();
                std::fs::File::options()
                    .write(true)
                    .open(&shard)
                    .unwrap()
                    .set_modified(time)
                    .unwrap();
            }
            let (second, report) = load(folder.path(), encoding, Some(snapshots())).unwrap();
            assert_eq!(report.source, LoadSource::Snapshot);
            assert_eq!(logits(&first), logits(&direct));
            assert_eq!(logits(&second), logits(&direct));
            assert_eq!(second.weight_bytes(), direct.weight_bytes());
            assert_eq!(second.fingerprint(), direct.fingerprint());
            assert_eq!(second.modules(), direct.modules());
        }
    }
}

#[test]
fn a_changed_checkpoint_another_encoding_or_another_configuration_is_another_snapshot() {
    let folder = checkpoint(SyntheticDtype::Fp8);
    let first = written(folder.path());
    assert_eq!(
        loaded(folder.path(), Encoding::Nf4Experts, snapshots()).1,
        LoadSource::Checkpoint
    );
    assert_eq!(files(folder.path()).len(), 2);
    write(folder.path(), SyntheticDtype::Fp8, 4);
    assert_eq!(listed(&folder.path().join(FOLDER))[0].state, "stale");
    let (fresh, source, outcome) = loaded(folder.path(), Encoding::Nf4, snapshots());
    assert_eq!(source, LoadSource::Checkpoint);
    assert_eq!(fresh, logits(&load(folder.path(), Encoding::Nf4, None).unwrap().0));
    // The old one of this encoding is gone, the other encoding's is left to its own next start.
    assert!(!first.exists() && matches!(outcome, SnapshotOutcome::Written(path) if path.exists()));
    assert_eq!(files(folder.path()).len(), 2);
}

#[test]
fn every_kind_of_damage_is_noticed_and_the_snapshot_made_again() {
    let folder = checkpoint(SyntheticDtype::Fp8);
    let path = written(folder.path());
    let whole = std::fs::read(&path).unwrap();
    let expected = logits(&load(folder.path(), Encoding::Nf4, None).unwrap().0);
    let table = Snapshot::open(&path).unwrap().table().clone();
    let first_weight = table.weights[0].sections[0].offset as usize;
    let last_weight = table.weights.last().unwrap().sections[0].offset as usize;
    let flipped = |place: usize| {
        let mut bytes = whole.clone();
        bytes[place] ^= 1;
        bytes
    };
    let cases = [
        ("head", flipped(20)),
        ("first weight", flipped(first_weight)),
        ("last weight", flipped(last_weight)),
        ("table", flipped(whole.len() - 40)),
        ("cut off", whole[..whole.len() - 1].to_vec()),
        ("half", whole[..whole.len() / 2].to_vec()),
        ("empty", Vec::new()),
        ("zeros", vec![0; whole.len()]),
    ];
    for (what, bytes) in cases {
        std::fs::write(&path, bytes).unwrap();
        let opened = Snapshot::open(&path).and_then(|snapshot| snapshot.verify(Limits::default(), &mut |_| {}));
        assert_eq!(opened.unwrap_err().code, "SNAPSHOT_DAMAGED", "{what}");
        let (logits, source, outcome) = loaded(folder.path(), Encoding::Nf4, snapshots());
        assert_eq!((source, logits == expected), (LoadSource::Checkpoint, true), "{what}");
        assert!(matches!(outcome, SnapshotOutcome::Written(_)), "{what}");
        assert_eq!(std::fs::read(&path).unwrap(), whole, "{what}: made again, to the byte");
    }
}

#[test]
fn two_workers_that_write_at_once_both_finish_and_leave_one_whole_snapshot() {
    for _ in 0..5 {
        let folder = checkpoint(SyntheticDtype::Fp8);
        let barrier = Barrier::new(4);
        let outcomes: Vec<_> = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..4)
                .map(|_| {
                    scope.spawn(|| {
                        barrier.wait();
                        loaded(folder.path(), Encoding::Nf4, snapshots())
                    })
                })
                .collect();
            workers.into_iter().map(|worker| worker.join().unwrap()).collect()
        });
        for (logits, _, outcome) in &outcomes {
            assert_eq!(*logits, outcomes[0].0);
            assert!(
                matches!(outcome, SnapshotOutcome::Written(_) | SnapshotOutcome::Used(_)),
                "{outcome:?}"
            );
        }
        assert_eq!(files(folder.path()).len(), 1, "{:?}", files(folder.path()));
        assert_eq!(
            loaded(folder.path(), Encoding::Nf4, snapshots()).1,
            LoadSource::Snapshot
        );
    }
}

#[test]
fn a_dead_writers_file_is_removed_and_a_living_ones_is_not() {
    let folder = checkpoint(SyntheticDtype::Bf16);
    let place = folder.path().join(FOLDER);
    std::fs::create_dir_all(&place).unwrap();
    let old = SystemTime::now() - Duration::from_secs(3600);
    let unfinished = |name: &str| {
        let path = place.join(name);
        std::fs::write(&path, "half").unwrap();
        let file = std::fs::File::options().write(true).open(&path).unwrap();
        file.set_modified(old).unwrap();
        file
    };
    drop(unfinished("dead.part"));
    let living = unfinished("locked.part");
    living.lock().unwrap();
    unfinished("recent.part").set_modified(SystemTime::now()).unwrap();
    let path = written(folder.path());
    let name = path.file_name().unwrap().to_str().unwrap().to_owned();
    let mut expected = vec!["locked.part".to_owned(), "recent.part".to_owned(), name];
    expected.sort();
    assert_eq!(files(folder.path()), expected);
}

#[test]
fn a_folder_that_cannot_be_written_costs_a_warning_and_not_the_run() {
    let folder = checkpoint(SyntheticDtype::Fp8);
    // A file where the folder should be stops root too, whom permissions do not.
    let blocked = folder.path().join("occupied");
    std::fs::write(&blocked, "").unwrap();
    let settings = SnapshotSettings {
        folder: Some(blocked.join("snapshots")),
        ..snapshots()
    };
    let (logits, source, outcome) = loaded(folder.path(), Encoding::Nf4, settings);
    let SnapshotOutcome::NotWritten(failure) = outcome else {
        panic!("{outcome:?}")
    };
    assert_eq!(
        (failure.code.as_str(), source),
        ("SNAPSHOT_NOT_WRITTEN", LoadSource::Checkpoint)
    );
    assert_eq!(
        logits,
        super::support::logits(&load(folder.path(), Encoding::Nf4, None).unwrap().0)
    );
}

#[test]
fn the_bound_on_the_folder_evicts_the_longest_unused_first_and_refuses_what_cannot_fit() {
    let (one, two) = (checkpoint(SyntheticDtype::Fp8), checkpoint(SyntheticDtype::Bf16));
    let shared = tempfile::tempdir().unwrap();
    let settings = |bound| SnapshotSettings {
        folder: Some(shared.path().to_owned()),
        largest_folder: bound,
        ..snapshots()
    };
    let SnapshotOutcome::Written(first) = loaded(one.path(), Encoding::Nf4, settings(None)).2 else {
        panic!()
    };
    let SnapshotOutcome::Written(second) = loaded(one.path(), Encoding::Nf4Experts, settings(None)).2 else {
        panic!()
    };
    let long_ago = SystemTime::now() - Duration::from_secs(1000);
    for (path, time) in [(&first, long_ago), (&second, long_ago - Duration::from_secs(1000))] {
        let file = std::fs::File::options().write(true).open(path).unwrap();
        file.set_modified(time).unwrap();
    }
    // Room for two like the first, whose shapes the new one has, but not for a third.
    let bound = 2 * std::fs::metadata(&first).unwrap().len() + 1000;
    let (_, _, outcome) = loaded(two.path(), Encoding::Nf4, settings(Some(bound)));
    assert!(matches!(outcome, SnapshotOutcome::Written(_)), "{outcome:?}");
    assert!(first.exists() && !second.exists(), "the longest unused goes first");
    let (_, _, outcome) = loaded(two.path(), Encoding::Nf4Experts, settings(Some(1000)));
    assert!(
        matches!(&outcome, SnapshotOutcome::NotWritten(failure) if failure.message.contains("bound")),
        "{outcome:?}"
    );
}

#[test]
fn small_checkpoints_and_plain_encodings_get_none() {
    let folder = checkpoint(SyntheticDtype::Bf16);
    let by_default = loaded(folder.path(), Encoding::Nf4, SnapshotSettings::default()).2;
    assert_eq!(by_default, SnapshotOutcome::NotWanted);
    for encoding in [Encoding::Bf16, Encoding::Stored] {
        assert_eq!(
            loaded(folder.path(), encoding, snapshots()).2,
            SnapshotOutcome::NotWanted
        );
    }
    assert!(!folder.path().join(FOLDER).exists());
}

#[test]
fn a_missing_shard_is_refused_though_a_snapshot_is_there() {
    let folder = checkpoint(SyntheticDtype::Bf16);
    written(folder.path());
    std::fs::remove_file(&shards(folder.path())[1]).unwrap();
    let failure = load(folder.path(), Encoding::Nf4, Some(snapshots())).err().unwrap();
    assert_eq!(failure.code, "MODEL_FILE_MISSING");
}

/// Mounts a file system of its own at a folder, if this process may.
fn mount(folder: &Path, options: &str) -> bool {
    let mut command = std::process::Command::new("mount");
    command.args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(folder);
    let mounted = command.output().is_ok_and(|output| output.status.success());
    if !mounted {
        println!("skipped: a file system cannot be mounted here");
    }
    mounted
}

/// As root: a real disk that is full, and one that is read-only. Elsewhere the writer's own test stands for them.
#[test]
fn a_full_or_read_only_disk_costs_a_warning_and_leaves_nothing_behind() {
    for (options, hint) in [("size=64k", "Free space"), ("ro", "writable")] {
        let folder = checkpoint(SyntheticDtype::Fp8);
        let disk = tempfile::tempdir().unwrap();
        if !mount(disk.path(), options) {
            return;
        }
        let settings = SnapshotSettings {
            folder: Some(disk.path().to_owned()),
            ..snapshots()
        };
        let (_, _, outcome) = loaded(folder.path(), Encoding::Nf4, settings);
        let left = std::fs::read_dir(disk.path()).unwrap().count();
        let unmounted = std::process::Command::new("umount").arg(disk.path()).status().unwrap();
        assert!(unmounted.success());
        let SnapshotOutcome::NotWritten(failure) = outcome else {
            panic!("{options}: {outcome:?}")
        };
        assert_eq!((failure.code.as_str(), left), ("SNAPSHOT_NOT_WRITTEN", 0), "{options}");
        assert!(failure.hint.contains(hint), "{options}: {failure}");
    }
}
