//! Promises about the tree itself.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_path_buf()
}

/// Every file below `folder` whose name ends in one of `endings`; build outputs and hidden folders left out.
fn files(folder: &Path, endings: &[&str]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
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
const UNSAFE_PLACES: [&str; 4] = [
    "kernels/src/cpu/simd",
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
