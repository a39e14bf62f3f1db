//! Owned, contiguous, row-major tensors in a backend's memory, and the documents packed in them.

use std::fmt;

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::ops::Device;

/// Up to four extents, outermost first.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shape {
    extents: [usize; 4],
    rank: u8,
}

impl Shape {
    /// A shape from its extents, outermost first.
    ///
    /// # Panics
    /// When there are more than four extents; ranks are fixed by the model's code, not by data.
    #[allow(clippy::panic)]
    pub fn new(extents: &[usize]) -> Self {
        assert!(extents.len() <= 4, "a tensor has at most four extents");
        let mut own = [1; 4];
        own[..extents.len()].copy_from_slice(extents);
        Self {
            extents: own,
            rank: extents.len() as u8,
        }
    }

    /// The extents, outermost first.
    pub fn extents(&self) -> &[usize] {
        &self.extents[..usize::from(self.rank)]
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.extents().iter().product()
    }

    /// The innermost extent: the length of a row. 1 for a scalar.
    pub fn row(&self) -> usize {
        self.extents().last().copied().unwrap_or(1)
    }

    /// Number of rows: all extents but the innermost, multiplied.
    pub fn rows(&self) -> usize {
        match self.extents().split_last() {
            Some((_, outer)) => outer.iter().product(),
            None => 1,
        }
    }
}

impl<const LENGTH: usize> From<[usize; LENGTH]> for Shape {
    fn from(extents: [usize; LENGTH]) -> Self {
        Self::new(&extents)
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{:?}", self.extents())
    }
}

impl fmt::Debug for Shape {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, formatter)
    }
}

/// A contiguous, row-major tensor owned by a backend. Dropping it returns its memory to the
/// backend's pool, so a step that allocates in the same order as the last one allocates nothing new.
pub struct Tensor<D: Device> {
    buffer: D::Buffer,
    dtype: DType,
    shape: Shape,
}

impl<D: Device> Tensor<D> {
    /// Joins a buffer with its type. Backends call this; everyone else uses [`Device::alloc`] or [`Device::upload`].
    pub fn from_buffer(buffer: D::Buffer, dtype: DType, shape: Shape) -> Self {
        Self { buffer, dtype, shape }
    }

    /// The backend's storage.
    pub fn buffer(&self) -> &D::Buffer {
        &self.buffer
    }

    /// The backend's storage, to be written.
    pub fn buffer_mut(&mut self) -> &mut D::Buffer {
        &mut self.buffer
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Extents.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Bytes of all elements.
    pub fn size_bytes(&self) -> usize {
        self.shape.elements() * self.dtype.size_bytes()
    }

    /// The same elements under other extents.
    ///
    /// # Errors
    /// [`Error::Shape`] when the number of elements differs.
    pub fn reshaped(mut self, shape: impl Into<Shape>) -> Result<Self> {
        let shape = shape.into();
        if shape.elements() != self.shape.elements() {
            return Err(Error::Shape {
                op: "reshape",
                argument: "tensor",
                expected: format!("{} elements as {shape}", shape.elements()),
                got: self.shape,
            });
        }
        self.shape = shape;
        Ok(self)
    }
}

impl<D: Device> fmt::Debug for Tensor<D> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Tensor({} {})", self.dtype, self.shape)
    }
}

/// Where the documents of a packed sequence begin and end.
///
/// `offsets` has one more entry than there are documents, starts at 0 and never falls; document
/// `i` is rows `offsets[i]..offsets[i + 1]`. The offsets are kept on the host, because every
/// backend plans its launches from them; a backend that needs them on the device uploads them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segments {
    offsets: Vec<usize>,
}

impl Segments {
    /// Segments from offsets.
    ///
    /// # Errors
    /// [`Error::Value`] when `offsets` is empty, does not start at 0, or falls.
    pub fn new(offsets: Vec<usize>) -> Result<Self> {
        if offsets.first() != Some(&0) || offsets.windows(2).any(|pair| pair[0] > pair[1]) {
            return Err(Error::Value {
                op: "segments",
                argument: "offsets",
                problem: format!("must start at 0 and never fall, but is {offsets:?}"),
            });
        }
        Ok(Self { offsets })
    }

    /// Segments from the documents' lengths.
    pub fn from_lengths(lengths: impl IntoIterator<Item = usize>) -> Self {
        let mut offsets = vec![0];
        let mut end = 0;
        for length in lengths {
            end += length;
            offsets.push(end);
        }
        Self { offsets }
    }

    /// The offsets, one more than there are documents.
    pub fn offsets(&self) -> &[usize] {
        &self.offsets
    }

    /// Number of documents.
    pub fn len(&self) -> usize {
        self.offsets.len() - 1
    }

    /// Whether there is no document.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Rows of all documents together.
    pub fn tokens(&self) -> usize {
        self.offsets.last().copied().unwrap_or(0)
    }

    /// Row ranges, one per document.
    pub fn ranges(&self) -> impl ExactSizeIterator<Item = std::ops::Range<usize>> + '_ {
        self.offsets.windows(2).map(|pair| pair[0]..pair[1])
    }

    /// The longest document's length.
    pub fn longest(&self) -> usize {
        self.ranges().map(|range| range.len()).max().unwrap_or(0)
    }
}
