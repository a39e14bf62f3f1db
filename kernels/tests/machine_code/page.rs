//! `docs/reference/kernels.md`: the readings as a page.

use std::collections::BTreeMap;
use std::fmt::Write;

use brightrun_kernels::cuda::{Entry, entries};

use crate::expected::launched_bytes;
use crate::occupancy::occupancy;
use crate::sass::Counts;
use crate::tools::{Tools, root};
use crate::{Read, Readings, is_for, roofline, sources};

const PAGE: &str = "docs/reference/kernels.md";
const UPDATE: &str = "BRIGHTRUN_UPDATE_PAGES";

/// Compares the page with what was read, or writes it. By another compiler than the page's, there is nothing to compare.
pub fn check(tools: &Tools, readings: &Readings) {
    let path = root().join(PAGE);
    let now = render(tools, readings);
    if std::env::var_os(UPDATE).is_some() {
        std::fs::write(&path, now).unwrap();
        return;
    }
    let kept = std::fs::read_to_string(&path).unwrap_or_default();
    let compiler = compiler(tools);
    if !kept.contains(&compiler) {
        println!("{PAGE} is not compared: it describes the code of another compiler than {compiler}");
        return;
    }
    let differing = kept.lines().zip(now.lines()).find(|(kept, now)| kept != now);
    assert!(
        kept == now,
        "{PAGE} is not what the kernels compile to; {UPDATE}=1 with this test writes it. First difference: {differing:?}"
    );
}

fn compiler(tools: &Tools) -> String {
    let (major, minor) = tools.compiler().version();
    format!("NVRTC {major}.{minor}")
}

fn render(tools: &Tools, readings: &Readings) -> String {
    let mut page = String::new();
    let head = HEAD.replace("COMPILER", &compiler(tools));
    page.push_str(&head);
    page.push_str(&roofline::render(readings));
    for source in sources() {
        let _ = write!(page, "\n## {source}.cu\n");
        for (target, read) in readings {
            if !is_for(source, target) {
                let _ = write!(page, "\n{target}: not compiled; its twin is.\n");
                continue;
            }
            let _ = write!(page, "\n{target}:\n\n{COLUMNS}");
            for entry in entries().iter().filter(|entry| entry.source == source) {
                if let Some(read) = read.get(&entry.name) {
                    page.push_str(&row(target, entry, read));
                }
            }
        }
    }
    page
}

const COLUMNS: &str = "\
| entry | threads | registers | shared | blocks | warps | code | tensor | float | decode | integer | LDS/STS | LDSM | async | reads | writes | local |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|
";

fn row(target: &str, entry: &Entry, read: &Read) -> String {
    let (name, threads, resources) = (&entry.name, entry.threads as usize, &read.resources);
    let launched_bytes = launched_bytes(name, entry.kernel);
    let (blocks, share) = occupancy(target, resources, threads, launched_bytes);
    let mut row = format!(
        "| `{name}` | {threads} | {} | {} | {blocks} | {:.0}% | {} |",
        resources.registers,
        resources.shared_bytes + launched_bytes,
        100.0 * share,
        read.code.whole.all,
    );
    // A matrix kernel is described by its loop, any other as a whole.
    let counts = match &read.code.main_loop {
        Some(main) if main.hmma + main.hgmma > 0 => main,
        _ => &read.code.whole,
    };
    let Counts {
        float,
        decode,
        integer,
        shared,
        shared_matrices,
        ..
    } = counts;
    // Where a warp group multiplies, another one copies.
    let copies = if counts.hgmma > 0 {
        read.code.whole.copies
    } else {
        counts.copies
    };
    let _ = writeln!(
        row,
        " {} | {float} | {decode} | {integer} | {shared} | {shared_matrices} | {copies} | {} | {} | {} |",
        tensor(counts),
        widths(&counts.loads),
        widths(&counts.stores),
        read.code.whole.local,
    );
    row
}

fn tensor(counts: &Counts) -> String {
    match (counts.hmma, counts.hgmma) {
        (0, 0) => "–".to_owned(),
        (warp, 0) => format!("{warp} HMMA"),
        (0, group) => format!("{group} HGMMA"),
        (warp, group) => format!("{warp} HMMA, {group} HGMMA"),
    }
}

/// `16 B × 4, 2 B × 8`.
fn widths(accesses: &BTreeMap<usize, usize>) -> String {
    let texts: Vec<String> = accesses
        .iter()
        .rev()
        .map(|(width, count)| format!("{width} B × {count}"))
        .collect();
    if texts.is_empty() {
        "–".to_owned()
    } else {
        texts.join(", ")
    }
}

const HEAD: &str = "\
# Kernels as machine code

What the compiler makes of `kernels/cu/`, read without a GPU from the code itself (COMPILER, `cuobjdump`, `nvdisasm`). Nothing
here is measured on a device. Written by

```
scripts/fetch-test-assets
BRIGHTRUN_UPDATE_PAGES=1 cargo test --release -p brightrun-kernels --test machine_code
```

and compared by the same test without the variable. That test fails when a matrix kernel has no tensor-core instruction, when a
kernel spills registers or keeps anything in local memory unexplained, and when an entry does not compile for sm_80, sm_86, sm_89,
sm_90a, sm_100 or sm_120 (with `BRIGHTRUN_EVERY_TARGET=1`: for any target from sm_80 on that the compiler knows). Sources named
`…_hopper` are compiled for sm_90a only; a table chooses between them and their portable twins.

| column | what |
|---|---|
| registers, shared | of a thread; of a block, in bytes, with what launches of matrix kernels add |
| blocks, warps | blocks that fit on a multiprocessor by registers, threads and shared memory; the share of its warps they are |
| code | instructions of the entry; the columns from here on count instructions too |
| tensor … local | of the loop with the tensor-core instructions, where there is one; otherwise of the whole entry |
| float, decode, integer | f32 arithmetic; picking bits apart and converting; integers, mostly addresses |
| LDS/STS, LDSM, async | shared memory by elements, by matrices; copies to it by cp.async, or by TMA, which are counted in the whole entry: another warp group begins them |
| reads, writes | of global memory, by bytes that one thread moves |
| local | reads and writes of local memory, in the whole entry |
";
