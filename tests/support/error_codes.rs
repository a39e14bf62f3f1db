//! Every error code with its blame, its words and its advice, read from the sources: `docs/reference/errors.md`.

use std::collections::BTreeMap;

/// One way a code is raised.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Entry {
    pub blames: Vec<&'static str>,
    pub message: String,
    pub hint: String,
}

const BLAMES: [&str; 3] = ["user", "system", "platform"];

/// The text of the first string literal of `code`, and what follows it.
fn literal(code: &str) -> Option<(String, &str)> {
    let begin = code.find('"')? + 1;
    let mut text = String::new();
    let mut characters = code[begin..].char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return Some((text, &code[begin + at + 1..])),
            '\\' => match characters.next()?.1 {
                'n' => text.push(' '),
                // A line that goes on: its indentation is not part of the text.
                '\n' => {
                    let rest = characters.as_str();
                    let skipped = rest.len() - rest.trim_start().len();
                    for _ in 0..rest[..skipped].chars().count() {
                        characters.next();
                    }
                }
                other => text.push(other),
            },
            other => text.push(other),
        }
    }
    None
}

/// The arguments of a call that begins after its opening parenthesis, and what follows the closing one.
fn arguments(code: &str) -> (&str, &str) {
    let (mut depth, mut is_text, mut escaped) = (1_usize, false, false);
    for (at, character) in code.char_indices() {
        match character {
            _ if escaped => escaped = false,
            '\\' if is_text => escaped = true,
            '"' => is_text = !is_text,
            '(' if !is_text => depth += 1,
            ')' if !is_text => {
                depth -= 1;
                if depth == 0 {
                    return (&code[..at], &code[at + 1..]);
                }
            }
            _ => {}
        }
    }
    (code, "")
}

/// The advice of the method calls that follow a failure's constructor.
fn hint_after(mut code: &str) -> String {
    while let Some(call) = code.trim_start().strip_prefix('.') {
        let Some(open) = call.find('(') else { break };
        let (inside, rest) = arguments(&call[open + 1..]);
        if call[..open].trim() == "hint" {
            return literal(inside).map(|(text, _)| text).unwrap_or_default();
        }
        code = rest;
    }
    String::new()
}

/// Codes of `Failure::user("CODE", …)` and its sisters in one source, tests left out.
pub fn read(source: &str, into: &mut BTreeMap<String, Entry>) {
    let source = source.split("#[cfg(test)]").next().unwrap_or_default();
    let code: String = source
        .lines()
        .filter(|line| !line.trim_start().starts_with("//"))
        .map(|line| format!("{line}\n"))
        .collect();
    for blame in BLAMES {
        for call in code.split(&format!("Failure::{blame}(")).skip(1) {
            let (inside, rest) = arguments(call);
            let Some((name, words)) = literal(inside).filter(|(name, _)| is_code(name)) else {
                continue;
            };
            let entry = into.entry(name).or_default();
            if !entry.blames.contains(&blame) {
                entry.blames.push(blame);
            }
            if entry.message.is_empty() {
                entry.message = literal(words).map(|(text, _)| text).unwrap_or_default();
            }
            if entry.hint.is_empty() {
                entry.hint = hint_after(rest);
            }
        }
    }
}

/// Codes and words of the queue's error type: `#[error("words")] Variant …` and `Self::Variant { .. } => "CODE"`.
pub fn read_queue(source: &str) -> Vec<(String, String)> {
    let words: BTreeMap<&str, String> = source
        .split("#[error(")
        .skip(1)
        .filter_map(|part| {
            let (inside, rest) = arguments(part);
            let name = rest
                .trim_start_matches(']')
                .trim_start()
                .split([' ', '{', '('])
                .next()?;
            Some((name, literal(inside)?.0))
        })
        .collect();
    let codes = source.split("Self::").skip(1).filter_map(|part| {
        let (name, rest) = part.split_once(" { .. } => \"")?;
        let code = rest.split('"').next().filter(|code| is_code(code))?;
        Some((code.to_owned(), words.get(name)?.clone()))
    });
    codes.collect()
}

/// Codes, blames and words of the failures that the engine itself writes into jobs: `'code', 'CODE', 'blame', '…', 'message', …('words'`.
pub fn read_engine(schema: &str) -> BTreeMap<String, (String, String)> {
    let quoted = |text: &str| text.split('\'').nth(1).unwrap_or_default().to_owned();
    let mut codes = BTreeMap::new();
    for part in schema.split("'code', ").skip(1) {
        let (code, rest) = (quoted(part), part.split_once("'blame',"));
        let (Some((_, rest)), true) = (rest, is_code(&code) && part.starts_with('\'')) else {
            continue;
        };
        let blame = quoted(rest);
        let words = rest
            .split_once("format(")
            .filter(|(between, _)| between.len() < 120)
            .map(|(_, words)| quoted(words).replace("%s", "…"))
            .unwrap_or_default();
        codes.entry(code).or_insert((blame, words));
    }
    codes
}

fn is_code(text: &str) -> bool {
    text.contains('_')
        && text
            .bytes()
            .all(|byte| byte.is_ascii_uppercase() || byte.is_ascii_digit() || byte == b'_')
}

/// Text as the cell of a table.
pub fn cell(text: &str) -> String {
    let words: Vec<&str> = text.split_whitespace().collect();
    words.join(" ").replace('|', "\\|")
}
