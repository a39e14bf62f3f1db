//! What the README names as guards is there.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::path::Path;

/// The tests of one module of `tests/engine`, or of a module in `src`.
fn source(module: &str) -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let places = [
        root.join(format!("tests/engine/{module}.rs")),
        root.join(format!("src/{module}.rs")),
    ];
    places
        .iter()
        .find_map(|path| std::fs::read_to_string(path).ok())
        .unwrap_or_else(|| panic!("the README names the module {module}, which is nowhere"))
}

/// `module::name_of_a_test`; a name may end in an ellipsis.
#[test]
fn every_test_that_the_readme_names_exists() {
    let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/README.md")).unwrap();
    let mut named = 0;
    for word in page.split('`') {
        let Some((module, test)) = word.split_once("::") else {
            continue;
        };
        let is_name = |text: &str| {
            text.chars()
                .all(|letter| letter.is_ascii_lowercase() || letter.is_ascii_digit() || letter == '_' || letter == '…')
        };
        if !is_name(module) || !is_name(test) || test == "*" {
            continue;
        }
        named += 1;
        let (start, end) = match test.strip_suffix('…') {
            Some(start) => (start, ""),
            None => (test, "("),
        };
        let found =
            source(module).contains(&format!("fn {start}{end}")) || source(module).contains(&format!("mod {test} "));
        assert!(found, "the README names {word}, which is nowhere");
    }
    assert!(named > 50, "only {named} tests were found in the README");
}
