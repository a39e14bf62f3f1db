//! Data on the device that breaks an op's contract.
//!
//! Whether an id lies in its table is only known on the device, and asking would stall the queue in every op. A kernel that
//! meets such data notes it (`report_fault` in `common.cuh`) and goes on without touching memory it should not; the backend
//! looks at the note when it next reads a tensor.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::{Runtime, Span};
use crate::error::{Error, Result};
use crate::weight::NF4_BLOCK;

/// What a kernel may note; its code is its place here, counted from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// `gather_rows`: an id outside the table.
    Id = 1,
    /// `rope`: a position outside the angles.
    Position = 2,
    /// `linear_cross_entropy`: a label that is neither −100 nor in the vocabulary.
    Label = 3,
    /// `quantize_nf4`: an element that is not finite; the value is its block.
    NotFinite = 4,
    /// Routed experts: an index that no routing has which `route` wrote.
    Routing = 5,
}

impl Fault {
    const ALL: [Self; 5] = [Self::Id, Self::Position, Self::Label, Self::NotFinite, Self::Routing];

    /// As kernels get it.
    pub(super) fn code(self) -> i32 {
        self as i32
    }

    fn error(self, value: i32) -> Error {
        let (op, argument, problem) = match self {
            Self::Id => (
                "gather_rows",
                "ids",
                format!("has {value}, which is not a row of the table"),
            ),
            Self::Position => ("rope", "positions", format!("has {value}, which is beyond the table")),
            Self::Label => {
                let problem = format!("has {value}, which is neither -100 nor in the vocabulary");
                ("linear_cross_entropy", "labels", problem)
            }
            Self::NotFinite => {
                let first = i64::from(value) * NF4_BLOCK as i64;
                let problem = format!("has an element that is not finite, from element {first} on");
                ("quantize_nf4", "source", problem)
            }
            Self::Routing => {
                let problem = format!("has index {value} and is not one that `route` wrote");
                ("routed experts", "routing", problem)
            }
        };
        Error::Value { op, argument, problem }
    }
}

/// Code and culprit, as two i32.
const NOTE_BYTES: usize = 8;

/// The note on the device.
pub(super) struct Faults<R: Runtime> {
    note: Arc<R::Memory>,
    /// A kernel that may write the note was launched since it was last read.
    armed: AtomicBool,
    /// Held while the note is read and cleared.
    clearing: Mutex<()>,
}

impl<R: Runtime> Faults<R> {
    pub(super) fn new(runtime: &R) -> Result<Self> {
        let faults = Self {
            note: Arc::new(runtime.allocate(NOTE_BYTES.next_multiple_of(R::GRANULE))?),
            armed: AtomicBool::new(false),
            clearing: Mutex::new(()),
        };
        runtime.fill(faults.span(), 0)?;
        Ok(faults)
    }

    /// The note's memory, for a launch.
    pub(super) fn arm(&self) -> Span<'_, R::Memory> {
        self.armed.store(true, Ordering::Release);
        self.span()
    }

    fn span(&self) -> Span<'_, R::Memory> {
        Span {
            memory: &self.note,
            first: 0,
            bytes: NOTE_BYTES,
        }
    }

    /// The fault since the last check, if there was one.
    pub(super) fn check(&self, runtime: &R) -> Result<()> {
        let _guard = self.clearing.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.armed.swap(false, Ordering::AcqRel) {
            return Ok(());
        }
        let mut note = [0; 2];
        runtime.read(&self.note, 0, bytemuck::cast_slice_mut(&mut note))?;
        let [code, value] = note;
        let Some(fault) = Fault::ALL.into_iter().find(|fault| fault.code() == code) else {
            return Ok(());
        };
        runtime.fill(self.span(), 0)?;
        Err(fault.error(value))
    }
}
