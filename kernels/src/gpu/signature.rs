//! The descriptors against the text of the `.cu` sources.
//!
//! Reads as much C++ as the sources use: function-like macros whose bodies define entries, their invocations, and the heads of
//! `ENTRY(threads) name(parameters)`.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeMap;

use super::kernel::{Element, Parameter};
use super::{FAMILIES, Source, sources};
use crate::dtype::DType;

/// Name and parameters of every entry of a source, each parameter as `const f32* x`, and the threads it is bounded to.
fn entries(source: &Source) -> BTreeMap<String, (String, Vec<String>)> {
    let text = without_comments(source.text).replace("\\\n", " ");
    let (mut macros, mut code) = (BTreeMap::new(), String::new());
    for line in text.lines() {
        match line.trim_start().strip_prefix("#define ") {
            Some(definition) if definition.contains("ENTRY(") => {
                let (name, rest) = definition.split_once('(').unwrap();
                let (parameters, body) = rest.split_once(')').unwrap();
                let parameters: Vec<String> = parameters.split(',').map(|p| p.trim().to_owned()).collect();
                macros.insert(name.trim().to_owned(), (parameters, body.to_owned()));
            }
            _ => {
                code.push_str(line);
                code.push('\n');
            }
        }
    }
    let expanded = code
        .lines()
        .filter_map(|line| expand(line, &macros))
        .collect::<Vec<_>>()
        .join("\n");
    code.push_str(&expanded);
    heads(&code)
}

fn without_comments(text: &str) -> String {
    text.lines()
        .map(|line| line.split("//").next().unwrap_or(""))
        .collect::<Vec<_>>()
        .join("\n")
}

/// The body of the macro that a line invokes.
fn expand(line: &str, macros: &BTreeMap<String, (Vec<String>, String)>) -> Option<String> {
    let (name, rest) = line.split_once('(')?;
    let (parameters, body) = macros.get(name.trim())?;
    let arguments: Vec<&str> = rest
        .trim_end()
        .trim_end_matches([')', ';'])
        .split(',')
        .map(str::trim)
        .collect();
    assert_eq!(arguments.len(), parameters.len(), "{line}");
    let mut out = String::new();
    for token in tokens(body) {
        match parameters.iter().position(|parameter| *parameter == token) {
            Some(index) => out.push_str(arguments[index]),
            None => out.push_str(&token),
        }
    }
    Some(out.replace("##", ""))
}

/// Words, and everything between them.
fn tokens(text: &str) -> Vec<String> {
    let word = |c: char| c.is_alphanumeric() || c == '_';
    let mut tokens: Vec<String> = Vec::new();
    for c in text.chars() {
        match tokens.last_mut() {
            Some(last) if word(c) && last.chars().all(word) => last.push(c),
            _ => tokens.push(c.to_string()),
        }
    }
    tokens
}

fn heads(code: &str) -> BTreeMap<String, (String, Vec<String>)> {
    let mut found = BTreeMap::new();
    for part in code.split("ENTRY(").skip(1) {
        let (threads, rest) = part.split_once(')').unwrap();
        let (name, rest) = rest.split_once('(').unwrap();
        let (parameters, _) = rest.split_once(')').unwrap();
        let parameters = parameters.split(',').map(|parameter| {
            let words = parameter.replace("__restrict__", "").replace('*', "* ");
            words
                .split_whitespace()
                .collect::<Vec<_>>()
                .join(" ")
                .replace(" *", "*")
        });
        found.insert(
            name.trim().to_owned(),
            (threads.trim().to_owned(), parameters.collect()),
        );
    }
    found
}

/// A descriptor's parameters, or a row's fields, written as the source writes them.
fn written(parameters: &[(&str, Parameter)], types: &[DType]) -> Vec<String> {
    let element = |element: &Element| match element {
        Element::Is(dtype) => dtype.to_string(),
        Element::Type(index) => types[*index].to_string(),
        Element::F64 => "f64".to_owned(),
    };
    let one = |(name, parameter): &(&str, Parameter)| match parameter {
        Parameter::In(e) => format!("const {}* {name}", element(e)),
        Parameter::Out(e) => format!("{}* {name}", element(e)),
        Parameter::I32 => format!("i32 {name}"),
        Parameter::I64 => format!("i64 {name}"),
        Parameter::F32 => format!("f32 {name}"),
        Parameter::Map => format!("MAP {name}"),
        Parameter::Addresses(row) => format!("const {}* {name}", row.name),
    };
    parameters.iter().map(one).collect()
}

/// The fields of a `struct` of a source, each as `const f32* x`.
fn fields(source: &Source, name: &str) -> Vec<String> {
    let text = without_comments(source.text);
    let marker = format!("struct {name} {{");
    let (_, rest) = text.split_once(&marker).unwrap_or_else(|| panic!("no {marker}"));
    let (body, _) = rest.split_once("};").unwrap();
    let fields = body.split(';').map(str::trim).filter(|field| !field.is_empty());
    fields.map(str::to_owned).collect()
}

/// The threads that the first argument of an `ENTRY` stands for: a number, a constant, or a tile's.
fn bound(source: &Source, arguments: &str) -> u32 {
    let after = |marker: &str| {
        let (_, rest) = source.text.split_once(marker).unwrap_or_else(|| panic!("no {marker}"));
        rest.split(';').next().unwrap().trim().to_owned()
    };
    let threads = arguments.split(',').next().unwrap().trim();
    if let Some(tile) = threads.strip_suffix("::THREADS") {
        let numbers = after(&format!("using {tile} = Tile<"));
        let numbers: Vec<u32> = numbers
            .trim_end_matches('>')
            .split(',')
            .map(|n| n.trim().parse().unwrap())
            .collect();
        return numbers[2] * numbers[3] * 32;
    }
    constant(source, threads)
}

/// A number, or a constant of the source or of a header, which may be another one's.
fn constant(source: &Source, name: &str) -> u32 {
    if let Ok(number) = name.parse() {
        return number;
    }
    let marker = format!("constexpr i32 {name} = ");
    let texts = std::iter::once(source.text).chain(sources::HEADERS.iter().map(|(_, text)| *text));
    let value = texts
        .filter_map(|text| text.split_once(&marker))
        .find_map(|(_, rest)| rest.split(';').next())
        .unwrap_or_else(|| panic!("no {marker}"));
    constant(source, value.trim())
}

#[test]
fn every_descriptor_has_the_signature_of_its_entry_and_every_entry_a_descriptor() {
    for source in sources::all() {
        let mut found = entries(source);
        for kernel in FAMILIES.iter().flat_map(|family| family.kernels) {
            if kernel.source != source {
                continue;
            }
            for types in kernel.instances() {
                let name = kernel.entry(&types);
                let Some((threads, parameters)) = found.remove(&name) else {
                    panic!("{}.cu has no entry {name}", source.name);
                };
                let expected = written(kernel.parameters, &types);
                assert_eq!(parameters, expected, "{name} in {}.cu", source.name);
                assert_eq!(bound(source, &threads), kernel.threads, "threads of {name}");
            }
        }
        let unused: Vec<&String> = found.keys().collect();
        assert!(
            unused.is_empty(),
            "{}.cu has entries without a descriptor: {unused:?}",
            source.name
        );
    }
}

#[test]
fn every_row_of_addresses_has_the_fields_of_its_struct() {
    let mut rows = 0;
    for kernel in FAMILIES.iter().flat_map(|family| family.kernels) {
        for (_, parameter) in kernel.parameters {
            let Parameter::Addresses(row) = parameter else { continue };
            assert_eq!(
                fields(kernel.source, row.name),
                written(row.fields, &[]),
                "{}",
                row.name
            );
            let [pointers @ .., (_, Parameter::I64)] = row.fields else {
                panic!("the count of {} comes last", row.name);
            };
            let is_pointer = |field: &(&str, Parameter)| matches!(field.1, Parameter::In(_) | Parameter::Out(_));
            assert!(pointers.iter().all(is_pointer), "{}: fields of eight bytes", row.name);
            rows += 1;
        }
    }
    assert!(rows >= 4, "{rows}");
}

/// Every kernel must run emulated, so what a compiler for the CPU does not know is wrapped in two places: for all targets, and
/// for Hopper.
#[test]
fn intrinsics_live_in_the_headers_of_wrappers() {
    let headers = sources::HEADERS
        .iter()
        .filter(|(name, _)| !["common.cuh", "hopper.cuh"].contains(name))
        .copied();
    for (name, text) in sources::all().map(|source| (source.name, source.text)).chain(headers) {
        for word in ["asm", "__shared__", "__shfl", "__ballot_sync", "atomic"] {
            let code = without_comments(text);
            assert!(
                !tokens(&code).iter().any(|token| token.starts_with(word)),
                "{name} uses {word}"
            );
        }
    }
}

#[test]
fn a_changed_parameter_is_seen() {
    let source = Source {
        name: "sample",
        only: None,
        text: "#define ONE(A) \\\n ENTRY(32) \\\n f_##A(const A* __restrict__ x, i64 n) {}\nONE(f32)\nENTRY(64) g(f32* y) {}",
    };
    let found = entries(&source);
    assert_eq!(
        found["f_f32"],
        ("32".to_owned(), vec!["const f32* x".to_owned(), "i64 n".to_owned()])
    );
    assert_eq!(found["g"].1, ["f32* y"]);
}
