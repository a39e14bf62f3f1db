//! `scripts/gpu-check run` from its parts to its table of goals, where there is no GPU: `brightrun` as it is, on the emulated device at
//! miniature sizes, and the bench with its protocol behind a socket. The two test programs of a pack are stood in for by scripts that
//! print what they print; they run by themselves beside this.
#![allow(clippy::unwrap_used, clippy::panic, dead_code)]

#[path = "../../benches/gpu/cases.rs"]
mod cases;
#[path = "../../benches/gpu/check.rs"]
mod check;
#[path = "../../benches/gpu/clock.rs"]
mod clock;
#[path = "../../benches/gpu/operands.rs"]
mod operands;
#[path = "../../benches/gpu/prepare.rs"]
mod prepare;
#[path = "../../benches/gpu/routing.rs"]
mod routing;
#[path = "../../benches/gpu/serve.rs"]
mod serve;
#[path = "../../benches/gpu/work.rs"]
mod work;

use std::io::BufReader;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use brightrun_kernels::{Error, emu};
use brightrun_worker::demo::miniature::Miniature;
use serde_json::Value;

use self::clock::Clock;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

/// `python3`, if this machine has one.
fn python() -> Option<&'static str> {
    let found = Command::new("python3").arg("--version").output();
    found.is_ok_and(|output| output.status.success()).then_some("python3")
}

fn gpu_check(words: &[&str]) -> Output {
    Command::new(python().unwrap())
        .arg(root().join("scripts/gpu-check"))
        .args(words)
        .output()
        .unwrap()
}

fn lines(folder: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(folder.join("results.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// What became of a part: `Some` of whether it passed, `None` where it is absent.
fn verdict(lines: &[Value], part: &str) -> Option<bool> {
    let line = lines.iter().find(|line| line["part"] == part);
    line.unwrap_or_else(|| panic!("nothing is said of {part}"))["passed"].as_bool()
}

fn script(path: &Path, text: &str) {
    std::fs::write(path, format!("#!/bin/sh\n{text}\n")).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
}

/// A pack without compiled kernels: the device it is tried on needs none.
fn pack(folder: &Path) -> PathBuf {
    let pack = folder.join("pack");
    std::fs::create_dir(&pack).unwrap();
    symlink(env!("CARGO_BIN_EXE_brightrun"), pack.join("brightrun")).unwrap();
    symlink(root().join("benches/gpu"), pack.join("peers")).unwrap();
    let line = |number: usize| {
        let turn = |role: &str, text: String| format!("{{\"role\": \"{role}\", \"content\": \"{text}\"}}");
        let turns = [
            turn("user", format!("say {number}")),
            turn("assistant", format!("it is {number}")),
        ];
        format!("{{\"messages\": [{}]}}\n", turns.join(", "))
    };
    std::fs::write(pack.join("sample.jsonl"), (0..8).map(line).collect::<String>()).unwrap();
    let texts = vec!["A short text from which few tokens are learnt, for a model that is small.".to_owned(); 4];
    let model = Miniature {
        hidden: 32,
        layers: 1,
        heads: 2,
        key_value_heads: 1,
        head_dim: 16,
        intermediate: 64,
        vocabulary: 300,
        seed: 1,
    };
    model.write(&pack.join("model"), &texts).unwrap();
    script(
        &pack.join("conformance"),
        "[ \"$BRIGHTRUN_REQUIRED_BACKENDS\" = emulated ] && echo '  emulated 3 12'",
    );
    script(
        &pack.join("golden"),
        "echo 'golden qwen2 on emulated: agrees (error/bound): packed 2.5e-07/1.0e-05' >&2",
    );
    pack
}

/// Answers one client on a socket, as the bench program does on its standard input and output.
fn serve_at<B: Clock>(socket: &Path, backend: B) -> std::thread::JoinHandle<()> {
    let listener = UnixListener::bind(socket).unwrap();
    std::thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        let input = BufReader::new(stream.try_clone().unwrap());
        serve::serve(&backend, &cases::all(4096), input, stream);
    })
}

#[test]
fn a_run_goes_through_its_parts_and_ends_with_the_table_of_goals() {
    if python().is_none() {
        println!("gpu-check: absent (there is no python3); nothing was tested");
        return;
    }
    let device = match emu::emulated(Some(2)) {
        Ok(device) => device,
        Err(Error::Unsupported { reason, .. }) => {
            println!("gpu-check on `emulated`: absent ({reason}); nothing was tested");
            return;
        }
        Err(error) => panic!("{error}"),
    };
    let folder = tempfile::tempdir().unwrap();
    let (pack, out) = (pack(folder.path()), folder.path().join("out"));
    let server = serve_at(&pack.join("bench"), device);
    let output = gpu_check(&[
        "run",
        pack.to_str().unwrap(),
        "--out",
        out.to_str().unwrap(),
        "--device",
        "emulated",
        "--only",
        "conformance,golden,determinism,memcheck,bench,model,memory,longest,layers",
        "--cases",
        "K1,K3,bandwidth rms_norm",
    ]);
    // A client that never came must not be waited for.
    drop(UnixStream::connect(pack.join("bench")));
    server.join().unwrap();
    let told = format!(
        "{}{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
        std::fs::read_to_string(out.join("log.txt")).unwrap_or_default()
    );
    let lines = lines(&out);
    let passed = [
        "devices",
        "conformance",
        "golden",
        "determinism",
        "bench",
        "model",
        "memory",
        "longest",
    ];
    for part in passed {
        assert_eq!(verdict(&lines, part), Some(true), "{part}: {told}");
    }
    // What only a device has is absent, and the run says so by its status.
    for part in ["memcheck", "layers"] {
        assert_eq!(verdict(&lines, part), None, "{part}: {told}");
    }
    assert_eq!(output.status.code(), Some(2), "{told}");
    measured_cases_count(&lines);
    let table: Vec<Value> = serde_json::from_str(&std::fs::read_to_string(out.join("goals.json")).unwrap()).unwrap();
    let row = |goal: &str| table.iter().find(|row| row["goal"] == goal).unwrap();
    assert_eq!(
        (&row("Q1")["verdict"], row("Q1")["value"].as_f64()),
        (&Value::from("pass"), Some(2.5e-7))
    );
    assert_eq!(row("Q3")["verdict"], "moonshot");
    assert!(
        row("K1")["value"].as_f64().unwrap() > 0.0,
        "a share of a copy: {}",
        row("K1")
    );
    // A peer that is not there is named, and its goal is not passed.
    assert_eq!(row("K3")["verdict"], "not measured");
    assert!(
        row("K3")["note"].as_str().unwrap().contains("bitsandbytes"),
        "{}",
        row("K3")
    );
    assert_eq!(
        (&row("E1")["verdict"], &row("K9")["verdict"]),
        (&"not measured".into(), &"not measured".into())
    );
}

/// Every case has times in turns with what is beside it, numerics, and how much memory it took.
fn measured_cases_count(lines: &[Value]) {
    let cases: Vec<&Value> = lines.iter().filter(|line| line["case"].is_string()).collect();
    assert!(cases.len() >= 4, "{cases:?}");
    for case in &cases {
        assert_eq!(case["ours"]["count"], 20, "{case}");
        assert!(case["ours"]["check"]["mean"].as_f64().unwrap() < 0.02, "{case}");
        assert!(case["ours"]["working_bytes"].is_u64(), "{case}");
    }
    let beside = cases
        .iter()
        .filter(|case| case["beside"]["gigabytes_per_second"].as_f64().is_some());
    assert_eq!(beside.count(), 2, "{cases:?}");
    let model = lines.iter().find(|line| line["measurement"] == "speed").unwrap();
    assert!(
        model["is_recorded"] == true && model["flops"].as_u64().unwrap() > 0,
        "{model}"
    );
}

#[test]
fn without_a_device_every_part_is_absent_by_name_and_the_status_says_so() {
    if python().is_none() {
        println!("gpu-check: absent (there is no python3); nothing was tested");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (pack, out) = (pack(folder.path()), folder.path().join("out"));
    // Hides a device, if this machine has one.
    let program = pack.join("brightrun");
    std::fs::remove_file(&program).unwrap();
    script(
        &program,
        &format!("CUDA_VISIBLE_DEVICES= exec {} \"$@\"", env!("CARGO_BIN_EXE_brightrun")),
    );
    let output = gpu_check(&["run", pack.to_str().unwrap(), "--out", out.to_str().unwrap()]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(2), "{text}");
    let lines = lines(&out);
    let parts: Vec<&Value> = lines.iter().filter(|line| line["part"].is_string()).collect();
    assert!(parts.len() > 10, "{text}");
    for part in parts {
        assert!(part["passed"].is_null(), "{part}");
        assert!(part["problem"].as_str().unwrap().starts_with("no device: "), "{part}");
    }
    let table = std::fs::read_to_string(out.join("goals.md")).unwrap();
    assert!(table.contains("0 moonshot, 0 pass, 0 missed"), "{table}");
}

/// Sides that are off, or that nobody judged, do not count, and what was not measured is not passed.
#[test]
fn a_timing_counts_only_with_numerics_near_float32() {
    if python().is_none() {
        println!("gpu-check: absent (there is no python3); nothing was tested");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let verdicts = |ours: &str, theirs: &str| {
        let case = format!(
            "{{\"case\": \"K3 linear T64 O12288 I2048 nf4 R0\", \"goal\": \"K3\", \
             \"ours\": {{\"median_ms\": 1.0, \"tflops\": 3.2, \"check\": {ours}}}, \
             \"peers\": {{\"bitsandbytes matmul_4bit\": {{\"median_ms\": 1.2, \"check\": {theirs}}}}}}}"
        );
        std::fs::write(folder.path().join("results.jsonl"), case).unwrap();
        assert!(gpu_check(&["goals", folder.path().to_str().unwrap()]).status.success());
        let table = std::fs::read_to_string(folder.path().join("goals.json")).unwrap();
        let table: Vec<Value> = serde_json::from_str(&table).unwrap();
        let row = table.into_iter().find(|row| row["goal"] == "K3").unwrap();
        (row["verdict"].as_str().unwrap().to_owned(), row["note"].to_string())
    };
    let (near, far) = (
        "{\"mean\": 0.004, \"largest\": 0.03}",
        "{\"mean\": 0.4, \"largest\": 3.0}",
    );
    assert_eq!(verdicts(near, near).0, "pass");
    for (ours, theirs) in [
        (far, near),
        ("null", near),
        (near, far),
        (near, "null"),
        ("{\"mean\": null}", near),
    ] {
        let (verdict, note) = verdicts(ours, theirs);
        assert_eq!(verdict, "not measured", "{ours} {theirs} {note}");
    }
}

#[test]
fn the_page_says_which_command_measures_each_goal() {
    let Some(python) = python() else {
        println!("gpu-check: absent (there is no python3); nothing was tested");
        return;
    };
    let output = Command::new(python)
        .args(["-B", "benches/gpu/goals.py", "--page"])
        .current_dir(root())
        .output()
        .unwrap();
    let table = String::from_utf8(output.stdout).unwrap();
    let page = std::fs::read_to_string(root().join("docs/reference/performance.md")).unwrap();
    assert!(
        table.lines().count() == 31 && page.contains(&table),
        "docs/reference/performance.md lacks the table that `benches/gpu/goals.py --page` prints:\n{table}"
    );
}
