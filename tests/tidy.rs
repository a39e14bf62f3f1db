//! Promises about the tree itself.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

use brightrun_worker::dataset::{IssueCode, Severity};

#[path = "support/error_codes.rs"]
mod error_codes;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_path_buf()
}

/// Every file below `folder` whose name ends in one of `endings`; build outputs and hidden folders left out.
fn files(folder: &Path, endings: &[&str]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut paths: Vec<PathBuf> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    paths.sort();
    for path in paths {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() && name != "target" && name != "node_modules" && !name.starts_with('.') {
            found.extend(files(&path, endings));
        } else if path.is_file() && endings.iter().any(|ending| name.ends_with(ending)) {
            found.push(path);
        }
    }
    found
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

/// Lines of `folder`'s Rust sources that hold `word` outside comments, as `path: line`.
fn code_lines_with(folder: &str, word: &str) -> Vec<String> {
    let mut found = Vec::new();
    for path in files(&root().join(folder), &[".rs"]) {
        for line in read(&path).lines().filter(|line| !line.trim_start().starts_with("//")) {
            if line.contains(word) {
                found.push(format!(
                    "{}: {}",
                    path.strip_prefix(root()).unwrap().display(),
                    line.trim()
                ));
            }
        }
    }
    found
}

/// SIMD, and the doors to libraries that are loaded at run time.
const UNSAFE_PLACES: [&str; 5] = [
    "kernels/src/cpu/simd",
    "kernels/src/cuda/cublaslt.rs",
    "kernels/src/cuda/launch.rs",
    "kernels/src/cuda/nvrtc.rs",
    "kernels/src/emu/ffi.rs",
];

#[test]
fn rooms_keep_to_themselves() {
    let opt_ins: Vec<String> = ["queue/src", "kernels/src", "worker/src"]
        .iter()
        .flat_map(|folder| code_lines_with(folder, "allow(unsafe_code)"))
        .filter(|line| !UNSAFE_PLACES.iter().any(|place| line.starts_with(place)))
        .collect();
    assert_eq!(opt_ins, Vec::<String>::new(), "unsafe outside {UNSAFE_PLACES:?}");

    for folder in ["worker/src/model", "worker/src/train", "worker/src/recipe.rs"] {
        let path = root().join(folder);
        let sources = if path.is_file() {
            vec![path]
        } else {
            files(&path, &[".rs"])
        };
        for source in sources {
            let text = read(&source);
            let code = text.split("#[cfg(test)]").next().unwrap();
            assert!(!code.contains("cpu::Cpu"), "{} names a backend", source.display());
        }
    }

    for statement in [
        "\"select ",
        "\"insert into",
        "\"update ",
        "\"delete from",
        "\"create table",
    ] {
        let found = code_lines_with("worker/src", statement);
        assert!(found.is_empty(), "SQL text in worker: {found:?}");
    }
    for word in ["serde_json", "reqwest", "tokio"] {
        let found: Vec<String> = code_lines_with("kernels/src", &format!("use {word}"));
        assert!(found.is_empty(), "{word} in kernels: {found:?}");
    }
}

#[test]
fn every_test_that_the_architecture_names_exists() {
    let page = read(&root().join("ARCHITECTURE.md"));
    let table = page
        .split("## Invariants")
        .nth(1)
        .unwrap()
        .split("\n## ")
        .next()
        .unwrap();
    let named: BTreeSet<&str> = table
        .split('`')
        .skip(1)
        .step_by(2)
        .filter(|word| word.matches('_').count() >= 3)
        .collect();
    assert!(named.len() >= 15, "the table names its tests in backquotes: {named:?}");
    let sources: String = ["queue", "kernels", "worker", "tests"]
        .iter()
        .flat_map(|room| files(&root().join(room), &[".rs"]))
        .map(|path| read(&path))
        .collect();
    let missing: Vec<&&str> = named
        .iter()
        .filter(|name| !sources.contains(&format!("fn {name}(")))
        .collect();
    assert!(
        missing.is_empty(),
        "named in ARCHITECTURE.md, but not there: {missing:?}"
    );
}

#[test]
fn the_tree_is_clean() {
    let endings = [
        ".rs",
        ".sql",
        ".md",
        ".toml",
        ".py",
        ".sh",
        ".mjs",
        ".json",
        "Makefile",
        "Dockerfile",
        "run",
        "setup",
    ];
    let checkout = root().display().to_string();
    let mut trouble = Vec::new();
    for path in files(&root(), &endings) {
        let text = read(&path);
        let name = path.strip_prefix(root()).unwrap().display().to_string();
        if text.contains(&checkout) {
            trouble.push(format!("{name} holds a path of this machine"));
        }
        // Written in two parts so that this file does not find itself.
        for begin in [
            concat!("sb", "p_"),
            concat!("rp", "a_"),
            concat!("AK", "IA"),
            concat!("-----BEGIN PRIVATE", " KEY"),
        ] {
            let is_credential = |rest: &str| {
                let end = rest.find(|c: char| !c.is_ascii_alphanumeric()).unwrap_or(rest.len());
                end >= 16
                    && !rest[..end].to_ascii_lowercase().contains("canary")
                    && !rest[..end].to_ascii_lowercase().contains("fake")
            };
            if text.split(begin).skip(1).any(is_credential) {
                trouble.push(format!("{name} holds what looks like a credential ({begin}…)"));
            }
        }
    }
    assert!(trouble.is_empty(), "{trouble:#?}");
}

/// Set to write a generated page anew instead of comparing it.
const WRITE: &str = "BRIGHTRUN_WRITE_DOCS";

fn is_what_the_sources_say(page: &str, text: &str) {
    let path = root().join(page);
    if std::env::var_os(WRITE).is_some() {
        fs::write(&path, text).unwrap();
    }
    assert!(
        read(&path) == text,
        "{page} is not what the sources say; `{WRITE}=1 cargo test --release -p brightrun-worker --test tidy` writes it"
    );
}

#[test]
fn the_page_of_error_codes_is_what_the_sources_say() {
    let mut codes = BTreeMap::new();
    for path in files(&root().join("worker/src"), &[".rs"]) {
        error_codes::read(&read(&path), &mut codes);
    }
    assert!(codes.len() > 100, "the codes were not found: {}", codes.len());
    let mut text = String::from(
        "# Error codes\n\n\
         Every failure says what happened, where, what to do, and a code that never changes its meaning. The *blame* decides what the\n\
         queue does: `user` is not tried again; `system` (this program or its machine) and `platform` (something it depends on) are, with\n\
         backoff. Braces stand for values. This page is generated from the sources, and a test compares it with them.\n\n\
         ## Failures\n\n| code | blame | what happened | what to do |\n|---|---|---|---|\n",
    );
    for (code, entry) in &codes {
        let cells = [
            entry.blames.join(", "),
            error_codes::cell(&entry.message),
            error_codes::cell(&entry.hint),
        ];
        writeln!(text, "| `{code}` | {} |", cells.join(" | ")).unwrap();
    }
    let queue = error_codes::read_queue(&read(&root().join("queue/src/error.rs")));
    assert!(queue.len() > 10, "the queue's codes were not found: {queue:?}");
    text.push_str("\n## The queue\n\n| code | what happened |\n|---|---|\n");
    for (code, message) in queue {
        writeln!(text, "| `{code}` | {} |", error_codes::cell(&message)).unwrap();
    }
    let engine = error_codes::read_engine(&read(&root().join("schema.sql")));
    assert!(engine.len() >= 5, "the engine's codes were not found: {engine:?}");
    text.push_str("\nWhat the engine itself writes into a job:\n\n| code | blame | what happened |\n|---|---|---|\n");
    for (code, (blame, words)) in engine {
        writeln!(text, "| `{code}` | {blame} | {} |", error_codes::cell(&words)).unwrap();
    }
    text.push_str(
        "\n## Problems of a dataset\n\n\
         An *error* refuses the dataset, a *warning* is for its owner to know. Each comes with its line, its JSON path and the text.\n\n\
         | code | severity | meaning | what to do |\n|---|---|---|---|\n",
    );
    for code in IssueCode::ALL {
        let severity = match code.severity() {
            Severity::Error => "error",
            Severity::Warning => "warning",
        };
        let (meaning, hint) = (error_codes::cell(code.meaning()), error_codes::cell(code.hint()));
        writeln!(text, "| `{code}` | {severity} | {meaning} | {hint} |").unwrap();
    }
    is_what_the_sources_say("docs/reference/errors.md", &text);
}
