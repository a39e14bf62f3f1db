//! A dataset larger than memory should be is read in bounded memory.
//!
//! Alone in its file: the peak is the process's, and other tests would raise it.
#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used)]

use std::io::Read;

use brightrun_worker::dataset::{Report, ScanOptions, scan};

const STREAM_BYTES: u64 = 220 << 20;
const ALLOWED_GROWTH_BYTES: u64 = 64 << 20;

/// Endless records between a head and a tail, made as they are read.
struct Generated {
    separator: &'static str,
    tail: &'static [u8],
    made: u64,
    number: u64,
    pending: Vec<u8>,
    is_finished: bool,
}

impl Generated {
    fn new(head: &'static [u8], separator: &'static str, tail: &'static [u8]) -> Self {
        Self {
            separator,
            tail,
            made: 0,
            number: 0,
            pending: head.to_vec(),
            is_finished: false,
        }
    }

    fn make_more(&mut self) {
        if self.made >= STREAM_BYTES {
            self.is_finished = true;
            self.pending = self.tail.to_vec();
            return;
        }
        let between = if self.number == 0 { "" } else { self.separator };
        let filler = "word ".repeat(800);
        let number = self.number;
        let record = format!(
            r#"{between}{{"messages":[{{"role":"user","content":"{number} {filler}"}},{{"role":"assistant","content":"A"}}]}}"#
        );
        self.number += 1;
        self.made += record.len() as u64;
        self.pending = record.into_bytes();
    }
}

impl Read for Generated {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        while self.pending.is_empty() && !self.is_finished {
            self.make_more();
        }
        let count = self.pending.len().min(out.len());
        out[..count].copy_from_slice(&self.pending[..count]);
        self.pending.drain(..count);
        Ok(count)
    }
}

/// The most memory this process has held so far, from the kernel.
fn peak_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmHWM:"))
        .expect("Linux reports the peak");
    let kibibytes: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    kibibytes << 10
}

fn scan_all(source: Generated) -> (u64, Report) {
    let mut examples = 0;
    let report = scan(source, &ScanOptions::default(), &mut |_| examples += 1).unwrap();
    (examples, report)
}

#[test]
fn large_files_are_read_in_bounded_memory() {
    let before = peak_bytes();
    for (head, separator, tail) in [
        (&b""[..], "\n", &b""[..]),
        (b"[\n", ",\n", b"\n]\n"),
        (
            b"{\"training_file_metadata\": {},\n\"conversations\": [\n",
            ",\n",
            b"\n]}\n",
        ),
    ] {
        let (examples, report) = scan_all(Generated::new(head, separator, tail));
        assert!(report.bytes >= STREAM_BYTES);
        assert!(report.is_ready(), "{:?}", report.issues);
        assert_eq!(examples, report.examples);
        assert!(examples > 50_000);
        let growth = peak_bytes() - before;
        assert!(
            growth < ALLOWED_GROWTH_BYTES,
            "{growth} bytes for {:?}",
            report.container
        );
    }
    // One endless line: counted, not kept.
    let head = b"{\"messages\":[{\"role\":\"user\",\"content\":\"";
    let report = scan(
        head.chain(std::io::repeat(b'x').take(STREAM_BYTES)),
        &ScanOptions::default(),
        &mut |_| {},
    )
    .unwrap();
    assert_eq!((report.examples, report.dropped_records), (0, 1));
    let growth = peak_bytes() - before;
    assert!(growth < ALLOWED_GROWTH_BYTES, "{growth} bytes for one endless line");
}
