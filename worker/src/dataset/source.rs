//! The bytes of a dataset, read once: hashed, counted and handed out in bounded pieces.

use std::cell::Cell;
use std::io::{self, Read};
use std::rc::Rc;

use sha2::{Digest, Sha256};

/// Bytes looked at before the layout is decided, and the size of one read.
pub(super) const WINDOW_BYTES: usize = 64 * 1024;

/// The text of the error that ends a record longer than the limit.
pub(super) const RECORD_TOO_LONG: &str = "the record is longer than the limit";

/// Where reading stands; shared with whoever builds values out of the bytes.
#[derive(Debug, Default)]
pub(super) struct Position {
    /// Bytes handed out.
    pub offset: Cell<u64>,
    /// Line of the next byte, 1-based.
    pub line: Cell<u64>,
    /// Where the current record starts; reading more than the limit past it is an error.
    pub record_start: Cell<u64>,
}

/// A reader that hashes all bytes, knows its position and refuses records beyond a limit.
pub(super) struct Source<R> {
    inner: R,
    buffer: Vec<u8>,
    start: usize,
    ended: bool,
    hash: Sha256,
    read_bytes: u64,
    last_byte: Option<u8>,
    newlines: u64,
    max_record_bytes: u64,
    utf8: Utf8Check,
    position: Rc<Position>,
}

/// One line of the source.
pub(super) enum Line {
    /// The line without its end, in the caller's buffer. `ended` tells whether a line end followed.
    Whole { ended: bool },
    /// The line exceeded the limit; the buffer holds its first bytes and it has this many.
    TooLong { bytes: u64 },
}

impl<R: Read> Source<R> {
    pub fn new(inner: R, max_record_bytes: usize) -> Self {
        let position = Rc::new(Position::default());
        position.line.set(1);
        Self {
            inner,
            buffer: Vec::new(),
            start: 0,
            ended: false,
            hash: Sha256::new(),
            read_bytes: 0,
            last_byte: None,
            newlines: 0,
            max_record_bytes: max_record_bytes as u64,
            utf8: Utf8Check::default(),
            position,
        }
    }

    /// The shared position.
    pub fn position(&self) -> Rc<Position> {
        Rc::clone(&self.position)
    }

    /// The next bytes without consuming them: [`WINDOW_BYTES`], fewer only at the end of the source.
    pub fn window(&mut self) -> io::Result<&[u8]> {
        while !self.ended && self.buffer.len() - self.start < WINDOW_BYTES {
            self.fill()?;
        }
        Ok(self.buffer.get(self.start..).unwrap_or_default())
    }

    /// Reads one more piece into the buffer.
    fn fill(&mut self) -> io::Result<()> {
        self.buffer.drain(..self.start);
        self.start = 0;
        let old = self.buffer.len();
        self.buffer.resize(old + WINDOW_BYTES, 0);
        let result = loop {
            match self.inner.read(self.buffer.get_mut(old..).unwrap_or_default()) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => break other,
            }
        };
        let count = *result.as_ref().unwrap_or(&0);
        self.buffer.truncate(old + count);
        result?;
        self.ended = count == 0;
        let fresh = self.buffer.get(old..).unwrap_or_default();
        self.hash.update(fresh);
        self.utf8.add(fresh, self.read_bytes);
        self.read_bytes += count as u64;
        self.newlines += count_newlines(fresh);
        self.last_byte = fresh.last().copied().or(self.last_byte);
        Ok(())
    }

    /// Marks `count` bytes as handed out.
    fn consume(&mut self, count: usize) {
        let taken = self.buffer.get(self.start..self.start + count).unwrap_or_default();
        let position = &self.position;
        position.line.set(position.line.get() + count_newlines(taken));
        position.offset.set(position.offset.get() + taken.len() as u64);
        self.start += taken.len();
    }

    /// Drops `count` bytes, a byte-order mark.
    pub fn skip(&mut self, count: usize) {
        self.consume(count);
        self.position.record_start.set(self.position.offset.get());
    }

    /// Skips white space; returns the next byte without consuming it, `None` at the end.
    pub fn skip_whitespace(&mut self) -> io::Result<Option<u8>> {
        loop {
            let window = self.window()?;
            let blanks = window.iter().take_while(|byte| byte.is_ascii_whitespace()).count();
            let next = window.get(blanks).copied();
            self.consume(blanks);
            if next.is_some() || self.ended {
                return Ok(next);
            }
        }
    }

    /// Reads the next line into `line` (cleared first); `None` at the end of the source.
    pub fn next_line(&mut self, line: &mut Vec<u8>) -> io::Result<Option<Line>> {
        line.clear();
        line.shrink_to(1 << 20);
        let mut bytes = 0u64;
        loop {
            let window = self.buffer.get(self.start..).unwrap_or_default();
            if window.is_empty() {
                if self.ended {
                    return Ok((bytes > 0).then(|| self.line_of(bytes, false)));
                }
                self.fill()?;
                continue;
            }
            let end = window.iter().position(|byte| *byte == b'\n');
            let piece = window.get(..end.unwrap_or(window.len())).unwrap_or_default();
            bytes += piece.len() as u64;
            if bytes <= self.max_record_bytes {
                line.extend_from_slice(piece);
            }
            let count = piece.len() + usize::from(end.is_some());
            self.consume(count);
            if end.is_some() {
                return Ok(Some(self.line_of(bytes, true)));
            }
        }
    }

    fn line_of(&self, bytes: u64, ended: bool) -> Line {
        if bytes > self.max_record_bytes {
            Line::TooLong { bytes }
        } else {
            Line::Whole { ended }
        }
    }

    /// Offset of the first byte that is not UTF-8, among those handed out.
    pub fn invalid_utf8(&self) -> Option<u64> {
        self.utf8
            .first_invalid
            .filter(|offset| *offset < self.position.offset.get())
    }

    /// Reads what is left, so that size, hash and line count are the whole file's.
    pub fn finish(mut self) -> io::Result<Totals> {
        while !self.ended {
            self.start = self.buffer.len();
            self.fill()?;
        }
        let open_line = self.last_byte.is_some_and(|byte| byte != b'\n');
        Ok(Totals {
            bytes: self.read_bytes,
            sha256: hex::encode(self.hash.finalize()),
            lines: self.newlines + u64::from(open_line),
        })
    }
}

/// What is known when every byte was read.
pub(super) struct Totals {
    pub bytes: u64,
    pub sha256: String,
    pub lines: u64,
}

/// The JSON reader asks for one byte at a time, so the position is exact at every value.
impl<R: Read> Read for Source<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if self.position.offset.get() - self.position.record_start.get() > self.max_record_bytes {
            return Err(io::Error::other(RECORD_TOO_LONG));
        }
        while self.buffer.len() == self.start && !self.ended {
            self.fill()?;
        }
        let window = self.buffer.get(self.start..).unwrap_or_default();
        let count = window.len().min(out.len());
        for (to, from) in out.iter_mut().zip(window) {
            *to = *from;
        }
        self.consume(count);
        Ok(count)
    }
}

fn count_newlines(bytes: &[u8]) -> u64 {
    bytes.iter().filter(|byte| **byte == b'\n').count() as u64
}

/// Finds the first byte that is not UTF-8 in a stream of pieces.
#[derive(Default)]
struct Utf8Check {
    /// The start of a character whose rest is in the next piece.
    pending: Vec<u8>,
    first_invalid: Option<u64>,
}

impl Utf8Check {
    /// Checks `piece`, which starts at `offset`.
    fn add(&mut self, piece: &[u8], offset: u64) {
        if self.first_invalid.is_some() {
            return;
        }
        let start = offset - self.pending.len() as u64;
        let joined;
        let text = if self.pending.is_empty() {
            piece
        } else {
            joined = [self.pending.as_slice(), piece].concat();
            &joined
        };
        let Err(error) = std::str::from_utf8(text) else {
            self.pending.clear();
            return;
        };
        if error.error_len().is_some() {
            self.first_invalid = Some(start + error.valid_up_to() as u64);
        }
        self.pending = text
            .get(error.valid_up_to()..)
            .unwrap_or_default()
            .iter()
            .take(4)
            .copied()
            .collect();
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::*;

    /// Gives one byte a read, the worst a reader may do.
    struct Drip<'a>(&'a [u8]);

    impl Read for Drip<'_> {
        fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
            let count = self.0.len().min(out.len()).min(1);
            out[..count].copy_from_slice(&self.0[..count]);
            self.0 = &self.0[count..];
            Ok(count)
        }
    }

    #[test]
    fn lines_are_the_same_however_the_bytes_arrive() {
        let text = "one\n\nthrée\r\nfour".as_bytes();
        let mut source = Source::new(Drip(text), 100);
        let (mut line, mut lines) = (Vec::new(), Vec::new());
        while source.next_line(&mut line).unwrap().is_some() {
            lines.push(String::from_utf8(line.clone()).unwrap());
        }
        assert_eq!(lines, ["one", "", "thrée\r", "four"]);
        assert_eq!(source.invalid_utf8(), None);
        let totals = source.finish().unwrap();
        assert_eq!((totals.bytes, totals.lines), (text.len() as u64, 4));
        assert_eq!(totals.sha256, hex::encode(Sha256::digest(text)));
    }

    #[test]
    fn the_first_bad_byte_is_found_across_pieces() {
        let mut source = Source::new(Drip(b"ab\xc3\xa9\xffz"), 100);
        let mut all = Vec::new();
        source.read_to_end(&mut all).unwrap();
        assert_eq!(source.invalid_utf8(), Some(4));
    }

    #[test]
    fn a_long_line_is_counted_but_not_kept() {
        let text = [vec![b'x'; 300_000], b"\nnext".to_vec()].concat();
        let mut source = Source::new(text.as_slice(), 1000);
        let mut line = Vec::new();
        assert!(matches!(
            source.next_line(&mut line).unwrap(),
            Some(Line::TooLong { bytes: 300_000 })
        ));
        assert!(line.len() <= 1000);
        source.next_line(&mut line).unwrap();
        assert_eq!(line, b"next");
    }
}
