use std::path::Path;
#[test]
fn dump() {
    for d in ["broken", "accepted", "../data"] {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/fixtures/dataset")
            .join(d);
        let mut files: Vec<_> = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect();
        files.sort();
        for f in files {
            let (ex, r) = brightrun_worker::dataset::load(&f).unwrap();
            println!("(\"{}\", {}, &[", f.file_name().unwrap().to_str().unwrap(), ex.len());
            for i in &r.issues {
                println!(
                    "    ({}, \"{}\", \"{}\"),   // {} | {} | {:?} {}",
                    i.line, i.path, i.code, i.message, i.hint, i.byte_offset, i.snippet
                );
            }
            println!(
                "]), // {:?} {:?} lines {} blank {} hdr {} drop {} skip {} conv {} turns {} {:?} stated {:?} tok {}",
                r.container,
                r.shapes,
                r.lines,
                r.blank_lines,
                r.header_lines,
                r.dropped_records,
                r.user_turns_skipped,
                r.conversations,
                r.turns,
                r.repairs,
                r.stated_pairs,
                r.estimated_tokens
            );
        }
    }
}
