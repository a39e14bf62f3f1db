//! Recordings: the launches of some work, captured once and run again.
//!
//! A recording repeats addresses and numbers, so the work must have them the same each time: its tensors lie in the arena
//! (`memory`) or outlive the recording, what depends on the batch lies in tables of its shape (`layouts`) or in tensors that the
//! caller writes before, and no number that changes is an argument of a launch. Work that asks the host for something in the
//! middle, or the device for memory, cannot be recorded; it says so in an error that names what it did, and is run as it is.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::ThreadId;

use super::layouts::Key;
use super::{Gpu, Runtime};
use crate::error::{Error, Result};
use crate::ops::{Recorded, Recording};
use crate::tensor::Segments;

/// The work that is being recorded, if any, and every recording that still holds.
pub(super) struct Tape<R: Runtime> {
    /// Whether `capture` is occupied: looked at in every launch.
    is_running: AtomicBool,
    capture: Mutex<Option<Capture>>,
    graphs: Mutex<HashMap<u64, Arc<R::Graph>>>,
    next: AtomicU64,
    /// The kernel launched last, for messages.
    last: Mutex<&'static str>,
}

/// What was launched before the first kernel.
const NOTHING_YET: &str = "the beginning";

struct Capture {
    thread: ThreadId,
    tables: HashSet<Key>,
    /// The kernel launched last.
    last: &'static str,
    writes_faults: bool,
    /// What could not be recorded.
    problem: Option<String>,
}

/// Launches on a device.
struct Taped<R: Runtime> {
    gpu: Gpu<R>,
    number: u64,
    tables: Vec<Key>,
    writes_faults: bool,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<R: Runtime> Tape<R> {
    pub(super) fn new() -> Self {
        Self {
            is_running: AtomicBool::new(false),
            capture: Mutex::new(None),
            graphs: Mutex::new(HashMap::new()),
            next: AtomicU64::new(0),
            last: Mutex::new(NOTHING_YET),
        }
    }

    /// Does something to the capture that is running.
    fn capturing<T>(&self, does: impl FnOnce(&mut Capture) -> T) -> Option<T> {
        match self.is_running.load(Ordering::Acquire) {
            true => locked(&self.capture).as_mut().map(does),
            false => None,
        }
    }

    /// The kernel launched last.
    pub(super) fn last(&self) -> &'static str {
        *locked(&self.last)
    }

    /// The work was given a table's address.
    pub(super) fn uses(&self, key: Key) {
        self.capturing(|capture| capture.tables.insert(key));
    }

    /// The work launches a kernel.
    ///
    /// # Errors
    /// [`Error::Device`] from another thread than the one that records: its launch would become part of the recording.
    pub(super) fn launches(&self, kernel: &'static str, writes_faults: bool) -> Result<()> {
        *locked(&self.last) = kernel;
        let is_foreign = self.capturing(|capture| {
            capture.last = kernel;
            capture.writes_faults |= writes_faults;
            capture.thread != std::thread::current().id()
        });
        match is_foreign {
            Some(true) => Err(Error::Device {
                op: kernel,
                message: "launched while another thread records its work on this device".to_owned(),
            }),
            _ => Ok(()),
        }
    }

    /// Something that a recording cannot repeat.
    ///
    /// # Errors
    /// [`Error::Device`] while work is recorded, naming `op` and the launch before it.
    pub(super) fn forbid(&self, op: &'static str, what: impl FnOnce() -> String) -> Result<()> {
        let problem = self.capturing(|capture| {
            let problem = format!("{}, which a recording cannot repeat (after {})", what(), capture.last);
            capture.problem.get_or_insert_with(|| format!("{op}: {problem}"));
            problem
        });
        match problem {
            Some(message) => Err(Error::Device { op, message }),
            None => Ok(()),
        }
    }

    fn begin(&self) {
        *locked(&self.capture) = Some(Capture {
            thread: std::thread::current().id(),
            tables: HashSet::new(),
            last: NOTHING_YET,
            writes_faults: false,
            problem: None,
        });
        self.is_running.store(true, Ordering::Release);
    }

    fn end(&self) -> Option<Capture> {
        self.is_running.store(false, Ordering::Release);
        locked(&self.capture).take()
    }

    /// Forgets every recording: the addresses they have are about to go.
    pub(super) fn clear(&self) {
        locked(&self.graphs).clear();
    }

    pub(super) fn has_recordings(&self) -> bool {
        !locked(&self.graphs).is_empty()
    }
}

impl<R: Runtime> Gpu<R> {
    /// [`Device::record`](crate::ops::Device::record).
    pub(super) fn recorded<E: From<Error>>(
        &self,
        documents: &Segments,
        mut work: impl FnMut() -> Result<(), E>,
    ) -> Result<Recorded, E> {
        if let Some(reason) = self.inner.memory.unsteady() {
            work()?;
            return Ok(Recorded::Not(reason.to_owned()));
        }
        self.refresh(documents)?;
        self.runtime().begin_capture()?;
        self.tape().begin();
        let done = work();
        let capture = self.tape().end();
        let graph = self.runtime().end_capture();
        let problem = capture.as_ref().and_then(|capture| capture.problem.clone());
        let problem = match (done, problem, capture, graph) {
            (Ok(()), None, Some(capture), Ok(graph)) => {
                let recording = self.taped(graph, capture);
                recording.replay(documents)?;
                return Ok(Recorded::Yes(Box::new(recording)));
            }
            (_, Some(problem), ..) => problem,
            (Err(error), ..) => return Err(error),
            // Of a device without memory for a graph, say. One that does nothing any more says so when the work is done.
            (Ok(()), None, _, Err(error)) => error.to_string(),
            (Ok(()), None, None, Ok(_)) => "the recording was lost".to_owned(),
        };
        // Nothing of it has run.
        work()?;
        Ok(Recorded::Not(problem))
    }

    fn taped(&self, graph: R::Graph, capture: Capture) -> Taped<R> {
        let tables: Vec<Key> = capture.tables.into_iter().collect();
        self.pin(&tables, true);
        let tape = self.tape();
        let number = tape.next.fetch_add(1, Ordering::Relaxed);
        locked(&tape.graphs).insert(number, Arc::new(graph));
        Taped {
            gpu: self.clone(),
            number,
            tables,
            writes_faults: capture.writes_faults,
        }
    }
}

impl<R: Runtime> Recording for Taped<R> {
    fn replay(&self, documents: &Segments) -> Result<bool> {
        let inner = &self.gpu.inner;
        let graph = locked(&self.gpu.tape().graphs).get(&self.number).map(Arc::clone);
        let Some(graph) = graph.filter(|_| inner.memory.unsteady().is_none()) else {
            return Ok(false);
        };
        self.gpu.refresh(documents)?;
        if self.writes_faults {
            inner.faults.arm();
        }
        self.gpu.runtime().replay(&graph)?;
        Ok(true)
    }
}

impl<R: Runtime> Drop for Taped<R> {
    fn drop(&mut self) {
        locked(&self.gpu.tape().graphs).remove(&self.number);
        self.gpu.pin(&self.tables, false);
    }
}
