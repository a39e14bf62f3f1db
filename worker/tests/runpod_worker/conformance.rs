//! The table of cases in the documents: complete, and true about the tests it names.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// The cases of the protocol's list: letter and number of the last one.
const CASES: [(&str, usize); 13] = [
    ("T", 22),
    ("R", 25),
    ("S", 6),
    ("P", 4),
    ("H", 8),
    ("C", 6),
    ("D", 5),
    ("X", 7),
    ("F", 3),
    ("L", 3),
    ("A", 6),
    ("G", 1),
    ("Z", 2),
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// First and second cell of each row of the table, and the words in backquotes of the last one.
fn rows() -> Vec<(String, BTreeSet<String>)> {
    let page = std::fs::read_to_string(root().join("docs/reference/runpod-conformance.md")).unwrap();
    let rows = page.lines().filter_map(|line| {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let is_case = cells.get(1).is_some_and(|cell| {
            cell.starts_with(|letter: char| letter.is_ascii_uppercase())
                && cell[1..].starts_with(|digit: char| digit.is_ascii_digit())
        });
        is_case.then(|| {
            let quoted = cells[3].split('`').skip(1).step_by(2);
            let tests = quoted.filter(|word| word.matches('_').count() >= 3 && !word.contains(['/', '=', '.']));
            let case = cells[1].split(' ').next().unwrap().to_owned();
            (case, tests.map(str::to_owned).collect())
        })
    });
    rows.collect()
}

/// `R01–R11` is eleven cases.
fn cases_of(cell: &str) -> Vec<String> {
    let Some((first, last)) = cell.split_once('–') else {
        return vec![cell.to_owned()];
    };
    let number = |case: &str| case[1..].parse::<usize>().unwrap();
    (number(first)..=number(last))
        .map(|number| format!("{}{number:02}", &first[..1]))
        .collect()
}

fn sources(folder: &Path, found: &mut String) {
    for entry in std::fs::read_dir(folder).unwrap().flatten() {
        let path = entry.path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|ending| ending == "rs") {
            found.push_str(&std::fs::read_to_string(path).unwrap());
        }
    }
}

#[test]
fn every_case_of_the_protocols_list_is_in_the_table_once() {
    let named: Vec<String> = rows().iter().flat_map(|(cell, _)| cases_of(cell)).collect();
    let wanted: Vec<String> = CASES
        .iter()
        .flat_map(|(letter, last)| (1..=*last).map(move |number| format!("{letter}{number:02}")))
        .collect();
    let sorted = |mut cases: Vec<String>| {
        cases.sort();
        cases
    };
    assert_eq!(sorted(named), sorted(wanted));
}

#[test]
fn every_case_has_tests_and_they_exist() {
    let mut text = String::new();
    for folder in ["worker/src", "worker/tests", "tests"] {
        sources(&root().join(folder), &mut text);
    }
    let mut missing = Vec::new();
    for (case, tests) in rows() {
        assert!(!tests.is_empty(), "{case} names no test");
        missing.extend(tests.into_iter().filter(|test| !text.contains(&format!("fn {test}("))));
    }
    assert!(missing.is_empty(), "named in the table, but not there: {missing:#?}");
}

#[test]
fn no_test_of_a_case_is_left_out_of_the_table() {
    let named: BTreeSet<String> = rows().into_iter().flat_map(|(_, tests)| tests).collect();
    let mut text = String::new();
    sources(&root().join("worker/tests/runpod_worker"), &mut text);
    let tests = text
        .lines()
        .filter_map(|line| line.strip_prefix("fn ")?.split_once('('));
    let of_cases = tests.filter(|(name, _)| {
        let mut letters = name.chars();
        let letter = letters.next().unwrap().to_ascii_uppercase().to_string();
        letters.next().is_some_and(|digit| digit.is_ascii_digit()) && CASES.iter().any(|(known, _)| *known == letter)
    });
    let left_out: Vec<&str> = of_cases
        .map(|(name, _)| name)
        .filter(|name| !named.contains(*name))
        .collect();
    assert!(left_out.is_empty(), "{left_out:#?}");
}
