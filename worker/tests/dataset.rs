//! Datasets: every accepted shape, every kind of problem, nothing lost.
#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used)]

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use brightrun_worker::dataset::{
    self, Container, Example, IssueCode, Message, Packing, Report, Role, ScanOptions, Severity, pack, scan, split,
};
use proptest::prelude::*;
use serde_json::{Value, json};

fn fixtures(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(path)
}

fn load(path: &str) -> (Vec<Example>, Report) {
    dataset::load(&fixtures(path)).unwrap()
}

fn scan_text(text: &str) -> (Vec<Example>, Report) {
    let mut examples = Vec::new();
    let report = scan(text.as_bytes(), &ScanOptions::default(), &mut |example| {
        examples.push(example)
    })
    .unwrap();
    (examples, report)
}

/// File, number of examples, and every issue as line, path and code.
type Broken = (&'static str, usize, &'static [(u64, &'static str, &'static str)]);

#[rustfmt::skip]
const BROKEN: &[Broken] = &[
    ("all_bad.jsonl", 0, &[(1, "", "DATA_SHAPE_UNKNOWN"), (2, "", "DATA_JSON_INVALID"), (3, "", "DATA_NO_ASSISTANT"), (1, "", "DATA_NO_EXAMPLES")]),
    ("blank.jsonl", 0, &[(1, "", "DATA_BLANK")]),
    ("blank_between.jsonl", 2, &[(2, "", "DATA_BLANK_LINE")]),
    ("bom.jsonl", 1, &[(1, "", "DATA_BOM")]),
    ("content_empty.jsonl", 1, &[(1, "messages[0].content", "DATA_CONTENT_EMPTY")]),
    ("content_missing.jsonl", 1, &[(1, "messages[0].content", "DATA_CONTENT_MISSING"), (1, "messages[1].content", "DATA_TYPE_WRONG")]),
    ("control_character.jsonl", 1, &[(1, "messages[0].content", "DATA_CONTROL_CHARACTER")]),
    ("crlf.jsonl", 2, &[(1, "", "DATA_CRLF")]),
    ("document_bad_pair.json", 1, &[(6, "conversations[0].training_pairs[1].target_response", "DATA_TYPE_WRONG"), (45, "conversations[1].training_pairs", "DATA_TYPE_WRONG")]),
    ("document_truncated.json", 0, &[(4, "", "DATA_JSON_TRUNCATED"), (1, "", "DATA_NO_EXAMPLES")]),
    ("duplicate.jsonl", 3, &[(3, "", "DATA_DUPLICATE")]),
    ("duplicate_key.jsonl", 1, &[(1, "messages[0].content", "DATA_KEY_DUPLICATE")]),
    ("empty.jsonl", 0, &[(1, "", "DATA_EMPTY")]),
    ("empty_conversation.jsonl", 1, &[(1, "turns", "DATA_EMPTY_CONVERSATION"), (2, "", "DATA_SHAPE_MIXED")]),
    ("gzip.jsonl", 0, &[(1, "", "DATA_BINARY")]),
    ("header_misplaced.jsonl", 2, &[(2, "_meta", "DATA_HEADER_MISPLACED")]),
    ("history_broken.jsonl", 1, &[(1, "conversation_history[0].role", "DATA_ROLE_UNKNOWN"), (1, "conversation_history[1].content", "DATA_CONTENT_EMPTY"), (1, "conversation_history[2]", "DATA_TYPE_WRONG")]),
    ("invalid_utf8.jsonl", 1, &[(2, "", "DATA_INVALID_UTF8")]),
    ("json_array.json", 2, &[(1, "", "DATA_JSON_ARRAY")]),
    ("last_character_truncated.jsonl", 1, &[(2, "", "DATA_LAST_LINE_TRUNCATED")]),
    ("last_line_truncated.jsonl", 1, &[(2, "", "DATA_LAST_LINE_TRUNCATED")]),
    ("last_not_assistant.jsonl", 1, &[(1, "messages[2]", "DATA_LAST_NOT_ASSISTANT")]),
    ("line_break_in_string.jsonl", 1, &[(2, "", "DATA_JSON_TRUNCATED"), (3, "", "DATA_JSON_INVALID")]),
    ("lone_surrogate.jsonl", 1, &[(1, "", "DATA_LONE_SURROGATE")]),
    ("mixed_shapes.jsonl", 2, &[(2, "", "DATA_SHAPE_MIXED")]),
    ("nested_too_deep.jsonl", 1, &[(1, "", "DATA_NESTED_TOO_DEEP")]),
    ("no_assistant.jsonl", 1, &[(1, "", "DATA_NO_ASSISTANT")]),
    ("no_user.jsonl", 1, &[(1, "", "DATA_NO_USER")]),
    ("not_alternating.jsonl", 2, &[(1, "messages[1]", "DATA_ROLES_NOT_ALTERNATING"), (2, "messages[0]", "DATA_ROLES_NOT_ALTERNATING")]),
    ("not_an_object.jsonl", 1, &[(2, "", "DATA_NOT_OBJECT"), (3, "", "DATA_NOT_OBJECT")]),
    ("not_json.jsonl", 0, &[(1, "", "DATA_JSON_INVALID"), (2, "", "DATA_JSON_INVALID"), (1, "", "DATA_NO_EXAMPLES")]),
    ("nul_line.jsonl", 2, &[(2, "", "DATA_BINARY")]),
    ("number_out_of_range.jsonl", 1, &[(1, "", "DATA_NUMBER_OUT_OF_RANGE")]),
    ("only_header.jsonl", 0, &[(1, "", "DATA_ONLY_HEADER")]),
    ("parquet.jsonl", 0, &[(1, "", "DATA_BINARY")]),
    ("python_repr.jsonl", 1, &[(1, "", "DATA_JSON_INVALID")]),
    ("raw_tab_in_string.jsonl", 1, &[(1, "", "DATA_JSON_CONTROL_CHARACTER")]),
    ("replacement_character.jsonl", 1, &[(1, "messages[0].content", "DATA_REPLACEMENT_CHARACTER")]),
    ("role_missing.jsonl", 0, &[(1, "turns[0].role", "DATA_ROLE_MISSING"), (1, "turns[1].role", "DATA_ROLE_MISSING"), (1, "turns[1].content", "DATA_CONTENT_MISSING"), (1, "", "DATA_NO_EXAMPLES")]),
    ("role_unknown.jsonl", 1, &[(2, "messages[3].role", "DATA_ROLE_UNKNOWN")]),
    ("special_token.jsonl", 1, &[(1, "messages[0].content", "DATA_SPECIAL_TOKEN")]),
    ("system_not_first.jsonl", 1, &[(1, "messages[2].role", "DATA_SYSTEM_NOT_FIRST")]),
    ("target_empty.jsonl", 1, &[(1, "target_response", "DATA_TARGET_EMPTY")]),
    ("target_missing.jsonl", 1, &[(1, "target_response", "DATA_TARGET_MISSING")]),
    ("target_null.jsonl", 1, &[(1, "target_response", "DATA_TARGET_NULL")]),
    ("trailing_comma.jsonl", 1, &[(1, "", "DATA_JSON_INVALID")]),
    ("two_values_on_a_line.jsonl", 0, &[(1, "", "DATA_TRAILING_DATA"), (1, "", "DATA_NO_EXAMPLES")]),
    ("unknown_shape.jsonl", 1, &[(2, "", "DATA_SHAPE_UNKNOWN"), (3, "", "DATA_SHAPE_UNKNOWN")]),
    ("user_input_missing.jsonl", 1, &[(1, "current_user_input", "DATA_USER_INPUT_MISSING")]),
    ("utf16.jsonl", 0, &[(1, "", "DATA_UTF16")]),
    ("utf16_without_mark.jsonl", 0, &[(1, "", "DATA_UTF16")]),
    ("utf32.jsonl", 0, &[(1, "", "DATA_UTF32")]),
    ("wrong_types.jsonl", 1, &[(1, "messages", "DATA_TYPE_WRONG"), (2, "messages[0]", "DATA_TYPE_WRONG"), (3, "messages[0].role", "DATA_TYPE_WRONG"), (3, "messages[0].content", "DATA_TYPE_WRONG"), (4, "", "DATA_SHAPE_MIXED"), (4, "system_prompt", "DATA_TYPE_WRONG"), (4, "conversation_history", "DATA_TYPE_WRONG"), (4, "target_response", "DATA_TYPE_WRONG"), (4, "id", "DATA_TYPE_WRONG")]),
    ("zip.jsonl", 0, &[(1, "", "DATA_BINARY")]),
];

#[test]
fn every_broken_file_gives_exactly_its_issues() {
    let listed: BTreeSet<&str> = BROKEN.iter().map(|(file, _, _)| *file).collect();
    let present: BTreeSet<String> = std::fs::read_dir(fixtures("dataset/broken"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert_eq!(
        listed,
        present.iter().map(String::as_str).collect(),
        "the table covers the folder"
    );
    for (file, examples, expected) in BROKEN {
        let (found, report) = load(&format!("dataset/broken/{file}"));
        let issues: Vec<(u64, &str, &str)> = report
            .issues
            .iter()
            .map(|issue| (issue.line, issue.path.as_str(), issue.code.as_str()))
            .collect();
        assert_eq!(issues, *expected, "{file}");
        assert_eq!(found.len(), *examples, "{file}");
        assert_eq!(report.is_ready(), report.errors == 0 && !found.is_empty(), "{file}");
        assert_eq!(report.validation_errors().is_null(), report.errors == 0, "{file}");
        for issue in &report.issues {
            assert!(!issue.message.is_empty() && !issue.hint.is_empty(), "{file}: {issue:?}");
            assert!(issue.snippet.chars().count() <= 81, "{file}: {issue:?}");
        }
    }
}

#[test]
fn every_code_has_a_file_that_produces_it() {
    let seen: BTreeSet<&str> = BROKEN
        .iter()
        .flat_map(|(_, _, issues)| issues.iter().map(|(_, _, code)| *code))
        .collect();
    for code in IssueCode::ALL {
        let has_own_test = *code == IssueCode::LineTooLong;
        assert!(has_own_test || seen.contains(code.as_str()), "{code} has no fixture");
        assert!(code.as_str().starts_with("DATA_"));
    }
}

#[test]
fn every_accepted_shape_is_read() {
    let expected: HashMap<&str, (Container, usize, &str)> = HashMap::from([
        ("messages.jsonl", (Container::Jsonl, 2, "messages")),
        ("turns.jsonl", (Container::Jsonl, 2, "turns")),
        ("conversations.jsonl", (Container::Jsonl, 2, "conversations")),
        ("v4.jsonl", (Container::Jsonl, 2, "v4")),
        ("v5_without_history.jsonl", (Container::Jsonl, 2, "v4")),
        ("tools.jsonl", (Container::Jsonl, 2, "messages")),
        (
            "individual_conversation.json",
            (Container::JsonDocument, 2, "conversation"),
        ),
        (
            "individual_conversation_on_one_line.json",
            (Container::JsonDocument, 2, "conversation"),
        ),
        ("training_file.json", (Container::JsonDocument, 2, "conversation")),
        (
            "training_file_on_one_line.json",
            (Container::JsonDocument, 2, "conversation"),
        ),
        (
            "single_conversation.json",
            (Container::JsonDocument, 1, "conversations"),
        ),
        ("single_messages_object.json", (Container::JsonDocument, 1, "messages")),
        ("array_of_messages.json", (Container::JsonArray, 2, "messages")),
        ("array_of_v4.json", (Container::JsonArray, 2, "v4")),
        ("array_of_conversations.json", (Container::JsonArray, 2, "conversation")),
        (
            "array_of_training_files.json",
            (Container::JsonArray, 2, "training_file"),
        ),
    ]);
    let mut files = 0;
    for entry in std::fs::read_dir(fixtures("dataset/accepted")).unwrap() {
        let file = entry.unwrap().file_name().into_string().unwrap();
        let (container, examples, shape) = expected[file.as_str()];
        let (found, report) = load(&format!("dataset/accepted/{file}"));
        assert!(report.is_ready(), "{file}: {:?}", report.issues);
        assert_eq!((report.container, found.len()), (container, examples), "{file}");
        assert_eq!(report.shapes.keys().collect::<Vec<_>>(), [shape], "{file}");
        for example in &found {
            assert_eq!(
                example.messages.last().map(|message| message.role),
                Some(Role::Assistant),
                "{file}"
            );
        }
        files += 1;
    }
    assert_eq!(files, expected.len());
}

#[test]
fn one_document_gives_the_same_examples_in_every_layout() {
    let (lines, _) = load("dataset/accepted/training_file.json");
    for file in [
        "training_file_on_one_line.json",
        "array_of_conversations.json",
        "array_of_training_files.json",
    ] {
        let (others, _) = load(&format!("dataset/accepted/{file}"));
        for (one, other) in lines.iter().zip(&others) {
            assert_eq!(one.messages, other.messages, "{file}");
            assert_eq!(
                (&one.id, &one.conversation_id),
                (&other.id, &other.conversation_id),
                "{file}"
            );
        }
    }
}

#[test]
fn a_genuine_export_passes_with_both_traps_disarmed() {
    let (examples, report) = load("data/eq-sample-v4.jsonl");
    assert!(report.is_ready() && report.warnings == 0, "{:?}", report.issues);
    assert_eq!((report.examples, report.conversations, report.turns), (34, 9, 68));
    assert_eq!(
        (report.stated_pairs, report.header_lines, report.lines),
        (Some(69), 1, 35)
    );
    assert_eq!(report.repairs.repeated_user_inputs_removed, 34);
    assert_eq!(report.bytes, 334_576);
    assert_eq!(report.sample_data.len(), 3);
    for example in &examples {
        assert_eq!(example.messages[0].role, Role::System);
        for (index, message) in example.messages[1..].iter().enumerate() {
            let expected = if index % 2 == 0 { Role::User } else { Role::Assistant };
            assert_eq!(message.role, expected, "line {}", example.line);
        }
    }
}

#[test]
fn the_full_training_json_gives_the_same_examples_as_the_lines() {
    let (lines, _) = load("data/eq-sample-v4.jsonl");
    let (document, report) = load("data/eq-sample-v4-full.json");
    assert!(report.is_ready(), "{:?}", report.issues);
    assert_eq!(
        (report.examples, report.user_turns_skipped, report.conversations),
        (6, 6, 2)
    );
    for example in &document {
        let line = lines
            .iter()
            .find(|line| line.messages == example.messages)
            .expect("the same messages");
        assert_eq!(
            (&line.id, &line.conversation_id),
            (&example.id, &example.conversation_id)
        );
    }
}

#[test]
fn the_app_columns_have_the_apps_words() {
    let (_, report) = scan_text("{\"conversation_id\":\"1\",\"turns\":[]}\nnope\n");
    assert_eq!(
        report.validation_errors()[0],
        json!({"line": 1, "error": "Empty turns array", "suggestion": "Conversation must have at least one turn",
               "code": "DATA_EMPTY_CONVERSATION", "path": "turns"})
    );
    assert!(
        report.validation_errors()[1]["error"]
            .as_str()
            .unwrap()
            .starts_with("JSON parse error")
    );
    assert_eq!(report.error_message().unwrap(), "Found 3 validation error(s)");
    let failure = report.failure().unwrap();
    assert_eq!(
        (failure.code.as_str(), failure.place.as_str()),
        ("DATASET_INVALID", "Dataset line 1, `turns`")
    );
    assert_eq!(scan_text("").1.error_message().unwrap(), "File is empty");
    assert_eq!(load("data/eq-sample-v4.jsonl").1.failure(), None);
}

#[test]
fn at_most_ten_errors_are_shown_and_all_are_counted() {
    let text = "nope\n".repeat(2500);
    let (_, report) = scan_text(&text);
    assert_eq!(report.validation_errors().as_array().unwrap().len(), 10);
    assert_eq!(report.issues.len(), ScanOptions::default().max_issues);
    assert_eq!(report.issue_totals[&IssueCode::JsonInvalid], 2500);
    assert_eq!((report.errors, report.dropped_records), (2501, 2500));
}

#[test]
fn a_line_or_record_over_the_limit_is_reported_and_the_rest_is_read() {
    let good = r#"{"messages":[{"role":"user","content":"Q"},{"role":"assistant","content":"A"}]}"#;
    let long = good.replace('Q', &"Q".repeat(5000));
    let options = ScanOptions {
        max_record_bytes: 1000,
        ..ScanOptions::default()
    };
    let mut count = 0;
    let report = scan(format!("{good}\n{long}\n{good}").as_bytes(), &options, &mut |_| {
        count += 1
    })
    .unwrap();
    assert_eq!(count, 2);
    assert_eq!(
        (report.issues[0].code, report.issues[0].line),
        (IssueCode::LineTooLong, 2)
    );
    assert_eq!(report.issues[0].byte_offset, Some(good.len() as u64 + 1));

    let array = format!("[{good},\n{long},\n{good}]");
    let report = scan(array.as_bytes(), &options, &mut |_| {}).unwrap();
    assert_eq!((report.examples, report.issue_totals[&IssueCode::LineTooLong]), (1, 1));
    assert_eq!(report.bytes, array.len() as u64, "the whole file is counted and hashed");
}

#[test]
fn byte_offsets_point_at_the_problem() {
    let (_, report) = load("dataset/broken/invalid_utf8.jsonl");
    let bytes = std::fs::read(fixtures("dataset/broken/invalid_utf8.jsonl")).unwrap();
    let offset = usize::try_from(report.issues[0].byte_offset.unwrap()).unwrap();
    assert_eq!(bytes[offset], 0xe9);
    assert!(std::str::from_utf8(&bytes[..offset]).is_ok());
}

#[test]
fn bad_utf8_inside_a_document_is_named_with_its_offset() {
    let bytes = b"[\n{\"messages\":[{\"role\":\"user\",\"content\":\"caf\xe9 x\"},{\"role\":\"assistant\",\"content\":\"A\"}]}\n]";
    let report = scan(bytes.as_slice(), &ScanOptions::default(), &mut |_| {}).unwrap();
    let issue = report
        .issues
        .iter()
        .find(|issue| issue.code == IssueCode::InvalidUtf8)
        .expect("named");
    let offset = usize::try_from(issue.byte_offset.unwrap()).unwrap();
    assert_eq!((bytes[offset], issue.line), (0xe9, 2));
}

#[test]
fn a_reader_that_fails_is_a_failure_and_not_an_empty_dataset() {
    struct Broken;
    impl std::io::Read for Broken {
        fn read(&mut self, _: &mut [u8]) -> std::io::Result<usize> {
            Err(std::io::Error::other("connection reset"))
        }
    }
    let failure = scan(Broken, &ScanOptions::default(), &mut |_| {}).unwrap_err();
    assert_eq!(failure.code, "DATASET_READ_FAILED");
    assert!(failure.blame.is_retryable());
    let missing = dataset::load(Path::new("/nonexistent/file.jsonl")).unwrap_err();
    assert_eq!(missing.code, "DATASET_NOT_FOUND");
}

#[test]
fn the_report_is_json_and_free_of_nul() {
    let (_, report) = scan_text(
        "{\"messages\":[{\"role\":\"user\",\"content\":\"a\\u0000b\"},{\"role\":\"assistant\",\"content\":\"A\"}]}",
    );
    let written = serde_json::to_string(&report).unwrap();
    assert!(!written.contains("\\u0000"), "Postgres cannot store it: {written}");
    assert_eq!(report.issues[0].severity, Severity::Warning);
}

/// A line that a property test may put anywhere, and what becomes of it.
#[derive(Clone, Debug)]
enum LineKind {
    Example,
    Blank,
    Header,
    Broken,
}

fn line(kind: &LineKind, number: usize) -> String {
    match kind {
        LineKind::Example => {
            format!(r#"{{"messages":[{{"role":"user","content":"Q{number}"}},{{"role":"assistant","content":"A"}}]}}"#)
        }
        LineKind::Blank => "  ".to_owned(),
        LineKind::Header => r#"{"_meta":{"total_pairs":1}}"#.to_owned(),
        LineKind::Broken => {
            ["{", "[]x", "{\"a\":1}", "7", "{\"messages\":[{\"role\":\"user\"}]}"][number % 5].to_owned()
        }
    }
}

proptest! {
    #[test]
    fn no_line_is_lost(kinds in proptest::collection::vec(
        prop_oneof![Just(LineKind::Example), Just(LineKind::Blank), Just(LineKind::Header), Just(LineKind::Broken)], 0..40
    ), ends_with_newline: bool) {
        // The first line decides that these are lines.
        let mut text = line(&LineKind::Example, 999);
        for (number, kind) in kinds.iter().enumerate() {
            text.push('\n');
            text.push_str(&line(kind, number));
        }
        if ends_with_newline {
            text.push('\n');
        }
        let (examples, report) = scan_text(&text);
        let accounted = report.examples + report.dropped_records + report.blank_lines + report.header_lines;
        prop_assert_eq!(accounted, report.lines);
        prop_assert_eq!(report.lines, kinds.len() as u64 + 1);
        prop_assert_eq!(examples.len() as u64, report.examples);
        prop_assert_eq!(report.dropped.len() as u64, report.dropped_records);
        for example in &examples[1..] {
            let expected = &kinds[usize::try_from(example.line).unwrap() - 2];
            prop_assert!(matches!(expected, LineKind::Example), "line {} is no example", example.line);
        }
    }

    #[test]
    fn any_bytes_give_a_report_and_no_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400), shape in 0..4usize) {
        let prefix: &[u8] = [&b""[..], b"{\"messages\":[", b"[{", b"{\n\"conversations\": [{"][shape];
        let all = [prefix, &bytes].concat();
        let report = scan(all.as_slice(), &ScanOptions::default(), &mut |_| {}).unwrap();
        prop_assert_eq!(report.bytes, all.len() as u64);
        prop_assert!(report.examples > 0 || report.errors > 0);
    }

    #[test]
    fn packing_keeps_every_example_once_and_respects_the_limit(
        lengths in proptest::collection::vec(1..3000usize, 0..60), limit in 1..5000usize, in_order: bool
    ) {
        let packing = if in_order { Packing::InOrder } else { Packing::Tight };
        let batches = pack(&lengths, limit, packing);
        let mut members: Vec<usize> = batches.concat();
        if in_order {
            prop_assert!(members.is_sorted());
        }
        members.sort_unstable();
        prop_assert_eq!(members, (0..lengths.len()).collect::<Vec<_>>());
        for batch in &batches {
            let tokens: usize = batch.iter().map(|index| lengths[*index]).sum();
            prop_assert!(tokens <= limit || batch.len() == 1);
        }
    }

    #[test]
    fn a_split_never_parts_a_conversation(conversations in 1..12usize, share in 0.0..0.5f32, seed: u64, with_ids: bool) {
        let examples = nested(conversations, with_ids);
        let parts = split(&examples, share, seed);
        let key = |index: &usize| examples[*index].messages[0].content.clone();
        let train: BTreeSet<String> = parts.train.iter().map(key).collect();
        let validation: BTreeSet<String> = parts.validation.iter().map(key).collect();
        prop_assert!(train.is_disjoint(&validation));
        prop_assert_eq!(parts.train.len() + parts.validation.len(), examples.len());
        prop_assert!(!parts.train.is_empty());
        if share > 0.0 && conversations > 1 {
            prop_assert!(!validation.is_empty());
        }
        let mut reversed = examples.clone();
        reversed.reverse();
        let again = split(&reversed, share, seed);
        let held_out: BTreeSet<String> = again.validation.iter().map(|index| reversed[*index].messages[0].content.clone()).collect();
        prop_assert_eq!(held_out, validation, "the order of the file does not matter");
    }
}

/// Conversations of three nested examples each, as the app exports them.
fn nested(conversations: usize, with_ids: bool) -> Vec<Example> {
    let mut examples = Vec::new();
    for turn in 1..=3 {
        for conversation in 0..conversations {
            let mut messages = Vec::new();
            for step in 0..turn {
                messages.push(Message::user(format!("conversation {conversation}, question {step}")));
                messages.push(Message::assistant(format!("answer {step}")));
            }
            messages[0].content = format!("conversation {conversation}");
            examples.push(Example {
                line: examples.len() as u64 + 1,
                index: examples.len() as u64,
                id: String::new(),
                conversation_id: with_ids.then(|| conversation.to_string()),
                messages,
                tools: None,
            });
        }
    }
    examples
}

#[test]
fn a_copy_under_another_id_is_held_out_with_the_original() {
    let mut examples = nested(6, true);
    let mut copy = examples[0].clone();
    copy.conversation_id = Some("elsewhere".to_owned());
    examples.push(copy);
    for seed in 0..20 {
        let parts = split(&examples, 0.3, seed);
        let copied = examples.len() - 1;
        assert_eq!(
            parts.validation.contains(&0),
            parts.validation.contains(&copied),
            "seed {seed}"
        );
    }
}

#[test]
fn the_seed_decides_what_is_held_out() {
    let examples = nested(20, true);
    let parts: BTreeSet<Vec<usize>> = (0..10).map(|seed| split(&examples, 0.1, seed).validation).collect();
    assert!(parts.len() > 1);
    assert_eq!(split(&examples, 0.1, 7), split(&examples, 0.1, 7));
    assert_eq!(
        split(&examples, 0.1, 7).validation.len(),
        2 * 3,
        "a tenth of twenty conversations"
    );
    assert!(split(&examples, 0.0, 7).validation.is_empty());
}

#[test]
fn an_unpaired_header_key_does_not_hide_a_record() {
    let (examples, report) =
        scan_text(r#"{"_meta":{},"messages":[{"role":"user","content":"Q"},{"role":"assistant","content":"A"}]}"#);
    assert_eq!((examples.len(), report.header_lines), (1, 0));
    let value: Value = serde_json::to_value(&examples[0]).unwrap();
    assert_eq!(value["messages"][0], json!({"role": "user", "content": "Q"}));
}
