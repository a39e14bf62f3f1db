//! Files read in large stretches, in order, by several threads: what a network volume wants.
//!
//! Each thread takes the next stretch, reads it with one positioned read and does the work on it itself, so that some
//! threads wait for the volume while others compute. No mmap: page faults fetch a network volume in tiny pieces, and a file that
//! shrinks is an error here and not a signal.
//!
//! Large streams are read past the page cache (O_DIRECT) where the file system allows it: copying every byte once more and
//! filling the cache with what is read once costs more processor time than everything else. Where it is refused, as on many
//! network mounts, the same reads go through the cache.
//!
//! Where a piece's bytes end in host memory anyway and large pieces begin at whole pages there and in the file, they are read to
//! their place, not to a buffer first ([`stream_into`]).
//!
//! Host memory is bounded: a stretch is taken only while the cost of all stretches in flight stays below
//! [`Limits::in_flight_bytes`]; one that costs more than the whole limit goes alone.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError, mpsc};

use crate::error::{Failure, Result};

/// How much is read at once.
pub const LARGEST_RANGE_BYTES: usize = 32 << 20;

/// Bytes between two wanted stretches that are read and dropped rather than skipped: a request costs more.
const LARGEST_GAP_BYTES: u64 = 64 << 10;

/// What unbuffered reads are aligned to, in the file and in memory: the page size, which satisfies every disk.
const ALIGNMENT: usize = 4096;

/// An open file and its name for messages.
#[derive(Debug)]
pub struct Input {
    /// The file.
    pub file: File,
    /// Where it lies.
    pub path: PathBuf,
}

/// Something wanted from a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Which file.
    pub file: usize,
    /// Its first byte in the file.
    pub offset: u64,
    /// How many bytes.
    pub length: usize,
}

/// A stretch of a file that is read in one go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stretch {
    /// What is read.
    pub place: Wanted,
    /// Which of the wanted pieces lie in it.
    pub pieces: Range<usize>,
}

/// How a stream is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Threads that read and work.
    pub threads: usize,
    /// Most bytes of host memory for stretches in flight.
    pub in_flight_bytes: u64,
    /// Streams of at least this many bytes are read past the page cache.
    pub direct_from_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            threads: 8,
            in_flight_bytes: 512 << 20,
            direct_from_bytes: 1 << 30,
        }
    }
}

/// Merges pieces, sorted by file and offset, into stretches of at most [`LARGEST_RANGE_BYTES`] (a larger piece is one stretch).
pub fn merged(pieces: &[Wanted]) -> Vec<Stretch> {
    merged_below(pieces, usize::MAX)
}

/// The same, but pieces of `alone_from` bytes and more are stretches of their own.
pub fn merged_below(pieces: &[Wanted], alone_from: usize) -> Vec<Stretch> {
    let mut stretches: Vec<Stretch> = Vec::new();
    let mut last_is_alone = false;
    for (index, piece) in pieces.iter().enumerate() {
        let end = piece.offset + piece.length as u64;
        let is_alone = piece.length >= alone_from;
        let may_join = !is_alone && !last_is_alone;
        last_is_alone = is_alone;
        if let Some(last) = stretches.last_mut().filter(|_| may_join) {
            let last_end = last.place.offset + last.place.length as u64;
            let length = end.saturating_sub(last.place.offset);
            let is_near = piece.file == last.place.file
                && piece.offset >= last_end
                && piece.offset - last_end <= LARGEST_GAP_BYTES;
            if is_near && length <= LARGEST_RANGE_BYTES as u64 {
                last.place.length = length as usize;
                last.pieces.end = index + 1;
                continue;
            }
        }
        stretches.push(Stretch {
            place: *piece,
            pieces: index..index + 1,
        });
    }
    stretches
}

/// What the threads share.
struct State {
    next: usize,
    in_flight: u64,
    failed: Option<(usize, Failure)>,
}

struct Queue<'a> {
    stretches: &'a [Stretch],
    limit: u64,
    state: Mutex<State>,
    freed: Condvar,
}

impl Queue<'_> {
    /// The counters stay correct whatever a panicking thread did in between, so a poisoned lock is still good.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a stretch takes from the limit: itself, and a copy on its way to the device.
    fn cost(&self, index: usize) -> u64 {
        (2 * self.stretches[index].place.length as u64).min(self.limit)
    }

    /// The next stretch, once there is room for it; `None` when there is none or another has failed.
    fn take(&self) -> Option<usize> {
        let mut state = self.state();
        loop {
            if state.failed.is_some() || state.next >= self.stretches.len() {
                return None;
            }
            let cost = self.cost(state.next);
            if state.in_flight + cost <= self.limit {
                state.in_flight += cost;
                state.next += 1;
                return Some(state.next - 1);
            }
            state = self.freed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Frees a stretch's room. Of several failures the earliest in the file is kept, whichever thread was first.
    fn put_back(&self, index: usize, result: Result<()>) {
        let mut state = self.state();
        state.in_flight -= self.cost(index);
        if let Err(failure) = result
            && state.failed.as_ref().is_none_or(|(first, _)| index < *first)
        {
            state.failed = Some((index, failure));
        }
        drop(state);
        self.freed.notify_all();
    }
}

/// Gives back a stretch's room even when the work on it panics; the others must not wait for ever.
struct Taken<'a, 'b> {
    queue: &'a Queue<'b>,
    index: usize,
    result: Option<Result<()>>,
}

impl Drop for Taken<'_, '_> {
    fn drop(&mut self) {
        let result = self.result.take().unwrap_or_else(|| {
            Err(Failure::system(
                "INTERNAL_PANIC",
                "A thread that loads the model panicked",
            ))
        });
        self.queue.put_back(self.index, result);
    }
}

/// Where a piece shall lie in the end. A place is taken by the one read that fills it.
pub type Place<'a> = Mutex<Option<&'a mut [u8]>>;

/// What is done with a stretch's bytes; whether they lie in their place already.
pub type Work<'a> = dyn Fn(&Stretch, &[u8], bool) -> Result<()> + Sync + 'a;

/// A place, for the one that fills it: there is one stretch for each piece.
pub fn claimed<'a>(place: &Place<'a>) -> Option<&'a mut [u8]> {
    place.lock().unwrap_or_else(PoisonError::into_inner).take()
}

/// Reads every stretch and gives it to `work`, several at a time; `done` hears of each on the calling thread.
///
/// # Errors
/// `MODEL_FILE_DAMAGED` naming file and place when a stretch cannot be read; the work's own.
pub fn stream(
    inputs: &[Input],
    stretches: &[Stretch],
    limits: Limits,
    work: &(dyn Fn(&Stretch, &[u8]) -> Result<()> + Sync),
    done: &mut dyn FnMut(&Stretch),
) -> Result<()> {
    stream_into(
        inputs,
        stretches,
        &[],
        limits,
        &|stretch, bytes, _| work(stretch, bytes),
        done,
    )
}

/// Reads every stretch. One that is a single piece with a place (`places` has one for each piece, or none at all) is read to it;
/// `work` is told whether its bytes lie in their place already. Of stretches with several pieces it must copy them there.
///
/// # Errors
/// As [`stream`].
pub fn stream_into(
    inputs: &[Input],
    stretches: &[Stretch],
    places: &[Place<'_>],
    limits: Limits,
    work: &Work<'_>,
    done: &mut dyn FnMut(&Stretch),
) -> Result<()> {
    let queue = Queue {
        stretches,
        limit: limits.in_flight_bytes.max(1),
        state: Mutex::new(State {
            next: 0,
            in_flight: 0,
            failed: None,
        }),
        freed: Condvar::new(),
    };
    let total: u64 = stretches.iter().map(|stretch| stretch.place.length as u64).sum();
    let files: Vec<Reader<'_>> = inputs
        .iter()
        .map(|input| Reader {
            input,
            direct: if total >= limits.direct_from_bytes {
                direct(input)
            } else {
                None
            },
        })
        .collect();
    let files = files.as_slice();
    std::thread::scope(|scope| {
        let (sender, receiver) = mpsc::channel();
        for _ in 0..limits.threads.clamp(1, stretches.len().max(1)) {
            let (sender, queue) = (sender.clone(), &queue);
            scope.spawn(move || {
                let mut buffer = Vec::new();
                while let Some(index) = queue.take() {
                    let mut taken = Taken {
                        queue,
                        index,
                        result: None,
                    };
                    let stretch = &stretches[index];
                    let own = (stretch.pieces.len() == 1).then(|| places.get(stretch.pieces.start).and_then(claimed));
                    let result = match own.flatten() {
                        Some(own) => {
                            read_to(files, stretch.place, own, &mut buffer).and_then(|()| work(stretch, own, true))
                        }
                        None => read(files, stretch.place, &mut buffer).and_then(|bytes| work(stretch, bytes, false)),
                    };
                    let is_done = result.is_ok();
                    taken.result = Some(result);
                    if buffer.len() > LARGEST_RANGE_BYTES + 3 * ALIGNMENT {
                        buffer = Vec::new();
                    }
                    drop(taken);
                    if is_done && sender.send(index).is_err() {
                        return;
                    }
                }
            });
        }
        drop(sender);
        for index in receiver {
            done(&stretches[index]);
        }
    });
    match queue.state.into_inner().unwrap_or_else(PoisonError::into_inner).failed {
        Some((_, failure)) => Err(failure),
        None => Ok(()),
    }
}

/// A file, and a second handle to it that reads past the page cache.
struct Reader<'a> {
    input: &'a Input,
    direct: Option<File>,
}

/// A handle that reads past the page cache, where the file system gives one and the name still means the same file.
fn direct(input: &Input) -> Option<File> {
    let flags = rustix::fs::OFlags::DIRECT.bits() as i32;
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(flags)
        .open(&input.path)
        .ok()?;
    let (own, known) = (file.metadata().ok()?, input.file.metadata().ok()?);
    ((own.dev(), own.ino()) == (known.dev(), known.ino())).then_some(file)
}

fn reader<'a, 'b>(files: &'a [Reader<'b>], place: Wanted) -> Result<&'a Reader<'b>> {
    files.get(place.file).ok_or_else(|| {
        Failure::system(
            "MODEL_READ_PLAN",
            format!("The plan reads file {}, which is not open", place.file),
        )
    })
}

fn unreadable(input: &Input, place: Wanted, error: &io::Error) -> Failure {
    Failure::platform(
        "MODEL_FILE_DAMAGED",
        format!(
            "{} bytes at byte {} of the file cannot be read: {error}",
            place.length, place.offset
        ),
    )
    .at(input.path.display().to_string())
    .hint("Check the volume, or download the file again")
}

/// Reads a place to where it shall lie: whole pages past the page cache, if both sides begin at one, the rest through `buffer`.
fn read_to(files: &[Reader<'_>], place: Wanted, own: &mut [u8], buffer: &mut Vec<u8>) -> Result<()> {
    let Reader { input, direct } = reader(files, place)?;
    let is_aligned = place.offset.is_multiple_of(ALIGNMENT as u64) && own.as_ptr().align_offset(ALIGNMENT) == 0;
    let pages = place.length / ALIGNMENT * ALIGNMENT;
    if let Some(file) = direct
        && is_aligned
        && own.len() == place.length
        && file.read_exact_at(&mut own[..pages], place.offset).is_ok()
    {
        let rest = Wanted {
            offset: place.offset + pages as u64,
            length: place.length - pages,
            ..place
        };
        if rest.length > 0 {
            own[pages..].copy_from_slice(read(files, rest, buffer)?);
        }
        return Ok(());
    }
    input
        .file
        .read_exact_at(own, place.offset)
        .map_err(|error| unreadable(input, place, &error))
}

fn read<'a>(files: &[Reader<'_>], place: Wanted, buffer: &'a mut Vec<u8>) -> Result<&'a [u8]> {
    let Reader { input, direct } = reader(files, place)?;
    // Room for the pages at both ends and for moving the beginning to a page's.
    let room = place.length + 3 * ALIGNMENT;
    if buffer.len() < room {
        buffer.resize(room, 0);
    }
    let unbuffered = direct.as_ref().map(|file| read_direct(file, place, buffer));
    let range = match unbuffered {
        Some(Ok(range)) => Ok(range),
        // Whatever such a read does not like, an ordinary one decides whether the file is readable.
        Some(Err(_)) | None => {
            let bytes = &mut buffer[..place.length];
            input.file.read_exact_at(bytes, place.offset).map(|()| 0..place.length)
        }
    };
    let range = range.map_err(|error| unreadable(input, place, &error))?;
    Ok(&buffer[range])
}

/// Reads whole pages around a place; where in `buffer` the place itself then lies.
fn read_direct(file: &File, place: Wanted, buffer: &mut [u8]) -> io::Result<Range<usize>> {
    let skipped = (place.offset % ALIGNMENT as u64) as usize;
    let wanted = skipped + place.length;
    let base = buffer.as_ptr().align_offset(ALIGNMENT);
    let pages = buffer
        .get_mut(base..base + wanted.next_multiple_of(ALIGNMENT))
        .ok_or(io::ErrorKind::InvalidInput)?;
    let start = place.offset - skipped as u64;
    let mut filled = 0;
    while filled < wanted {
        match file.read_at(&mut pages[filled..], start + filled as u64) {
            Ok(count) if count > 0 => filled += count,
            Ok(_) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(base + skipped..base + wanted)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

    use super::*;

    fn piece(file: usize, offset: u64, length: usize) -> Wanted {
        Wanted { file, offset, length }
    }

    #[test]
    fn neighbours_are_merged_up_to_the_limit_and_gaps_and_files_part_them() {
        let mib = 1 << 20;
        let pieces = [
            piece(0, 100, 10),
            piece(0, 110, 20 * mib),
            piece(0, 110 + 20 * mib as u64, 20 * mib),
            piece(0, 200 * mib as u64, 1),
            piece(0, 200 * mib as u64 + 1000, 1),
            piece(1, 200 * mib as u64 + 1001, 90 * mib),
        ];
        let stretches = merged(&pieces);
        let found: Vec<_> = stretches
            .iter()
            .map(|stretch| (stretch.pieces.clone(), stretch.place.length))
            .collect();
        assert_eq!(
            found,
            [(0..2, 20 * mib + 10), (2..3, 20 * mib), (3..5, 1001), (5..6, 90 * mib)]
        );
    }

    fn inputs(bytes: &[u8]) -> (tempfile::TempDir, Vec<Input>) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::fs::write(&path, bytes).unwrap();
        let file = File::open(&path).unwrap();
        (folder, vec![Input { file, path }])
    }

    fn stretches(count: usize, length: usize) -> Vec<Stretch> {
        (0..count)
            .map(|index| Stretch {
                place: piece(0, (index * length) as u64, length),
                pieces: index..index + 1,
            })
            .collect()
    }

    #[test]
    fn every_byte_is_given_once_and_the_bound_on_memory_holds() {
        for direct_from_bytes in [0, u64::MAX] {
            every_byte_once(direct_from_bytes);
        }
    }

    fn every_byte_once(direct_from_bytes: u64) {
        let bytes: Vec<u8> = (0..64_000u32).map(|i| (i % 251) as u8).collect();
        let (_folder, inputs) = inputs(&bytes);
        let (in_flight, most, sum) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
        let limits = Limits {
            threads: 6,
            in_flight_bytes: 5000,
            direct_from_bytes,
        };
        let mut seen = Vec::new();
        let work = |stretch: &Stretch, bytes: &[u8]| {
            let now = in_flight.fetch_add(2 * bytes.len() as u64, Ordering::SeqCst) + 2 * bytes.len() as u64;
            most.fetch_max(now, Ordering::SeqCst);
            assert_eq!(bytes[0], (stretch.place.offset % 251) as u8);
            sum.fetch_add(bytes.iter().map(|byte| u64::from(*byte)).sum(), Ordering::SeqCst);
            in_flight.fetch_sub(2 * bytes.len() as u64, Ordering::SeqCst);
            Ok(())
        };
        stream(&inputs, &stretches(64, 1000), limits, &work, &mut |stretch| {
            seen.push(stretch.place.offset);
        })
        .unwrap();
        seen.sort_unstable();
        assert_eq!(seen, (0..64).map(|index| index * 1000).collect::<Vec<_>>());
        assert_eq!(sum.into_inner(), bytes.iter().map(|byte| u64::from(*byte)).sum::<u64>());
        assert!(most.into_inner() <= 5000);
    }

    /// Pieces of every kind of length and alignment, with their places in one block of memory that begins `shift` bytes past a page.
    fn read_to_places(direct_from_bytes: u64, shift: usize) {
        let bytes: Vec<u8> = (0..100_000u32).map(|i| (i % 251) as u8).collect();
        let (_folder, inputs) = inputs(&bytes);
        let pieces = [
            piece(0, 0, 8192),
            piece(0, 8192, 5000),
            piece(0, 16_384, 300),
            piece(0, 16_684, 100),
            piece(0, 20_480, 70_001),
        ];
        let mut memory = vec![0u8; 130_000];
        let base = memory.as_ptr().align_offset(ALIGNMENT) + shift;
        let mut rest = &mut memory[base..];
        let mut places = Vec::new();
        for piece in &pieces {
            let (own, more) = rest.split_at_mut(piece.length.next_multiple_of(ALIGNMENT));
            places.push(Mutex::new(Some(&mut own[..piece.length])));
            rest = more;
        }
        let limits = Limits {
            direct_from_bytes,
            ..Limits::default()
        };
        let stretches = merged_below(&pieces, 4096);
        assert_eq!(stretches.len(), 4, "the two small ones are read together");
        let work = |stretch: &Stretch, bytes: &[u8], in_place: bool| {
            assert_eq!(in_place, stretch.pieces.len() == 1);
            for index in stretch.pieces.clone().filter(|_| !in_place) {
                let from = (pieces[index].offset - stretch.place.offset) as usize;
                claimed(&places[index])
                    .unwrap()
                    .copy_from_slice(&bytes[from..from + pieces[index].length]);
            }
            Ok(())
        };
        stream_into(&inputs, &stretches, &places, limits, &work, &mut |_| {}).unwrap();
        drop(places);
        let mut at = base;
        for piece in &pieces {
            let wanted = &bytes[piece.offset as usize..][..piece.length];
            assert!(memory[at..at + piece.length] == *wanted, "{piece:?}");
            assert!(
                memory[at + piece.length..at + piece.length.next_multiple_of(ALIGNMENT)]
                    .iter()
                    .all(|byte| *byte == 0)
            );
            at += piece.length.next_multiple_of(ALIGNMENT);
        }
    }

    #[test]
    fn pieces_are_read_to_their_places_whatever_the_alignment_and_nothing_beside_them_is_touched() {
        for direct_from_bytes in [0, u64::MAX] {
            for shift in [0, 64] {
                read_to_places(direct_from_bytes, shift);
            }
        }
    }

    #[test]
    fn a_stretch_above_the_limit_goes_alone_instead_of_waiting_for_ever() {
        let (_folder, inputs) = inputs(&[7; 9000]);
        let limits = Limits {
            threads: 3,
            in_flight_bytes: 100,
            ..Limits::default()
        };
        let calls = AtomicUsize::new(0);
        let work = |_: &Stretch, _: &[u8]| {
            calls.fetch_add(1, Ordering::SeqCst);
            Ok(())
        };
        stream(&inputs, &stretches(3, 3000), limits, &work, &mut |_| {}).unwrap();
        assert_eq!(calls.into_inner(), 3);
    }

    #[test]
    fn a_file_that_shrank_is_an_error_that_names_it() {
        let (_folder, inputs) = inputs(&[7; 2500]);
        let failure = stream(
            &inputs,
            &stretches(3, 1000),
            Limits::default(),
            &|_, _| Ok(()),
            &mut |_| {},
        )
        .unwrap_err();
        assert_eq!(failure.code, "MODEL_FILE_DAMAGED");
        assert!(
            failure.message.contains("byte 2000") && failure.place.ends_with("file"),
            "{failure}"
        );
    }

    #[test]
    fn the_earliest_failure_is_told_and_ends_the_rest() {
        let (_folder, inputs) = inputs(&[7; 50_000]);
        let work = |stretch: &Stretch, _: &[u8]| match stretch.place.offset {
            offset if offset >= 3000 => Err(Failure::user("TEST", format!("at {offset}"))),
            _ => Ok(()),
        };
        let limits = Limits {
            threads: 1,
            ..Limits::default()
        };
        let failure = stream(&inputs, &stretches(50, 1000), limits, &work, &mut |_| {}).unwrap_err();
        assert_eq!(failure.message, "at 3000");
    }
}
