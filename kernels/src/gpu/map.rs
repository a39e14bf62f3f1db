//! Maps of tensors: what Hopper's copy engine is told about a tensor that it copies boxes of.
//!
//! A [`Map`] names a tensor of this crate and says how a kernel cuts it up; [`TensorMap`] is the same as a runtime gets it, with the
//! engine's rules checked here, once for device and emulation. A device's driver makes of it 128 bytes that only the hardware reads.

use super::{Gpu, Runtime, Span};
use crate::tensor::Tensor;

/// How a box's chunks of 16 bytes are exchanged in shared memory, so that neither rows nor columns of them meet a bank twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Swizzle {
    /// Not at all.
    None,
    /// Within rows of 64 bytes.
    Bytes64,
    /// Within rows of 128 bytes.
    Bytes128,
}

impl Swizzle {
    /// The rows that the pattern is made of, in bytes; 0 where there is none.
    pub fn bytes(self) -> u32 {
        match self {
            Self::None => 0,
            Self::Bytes64 => 64,
            Self::Bytes128 => 128,
        }
    }
}

/// A tensor of three extents and the box that is copied of it, the innermost first.
#[derive(Debug)]
pub struct TensorMap<'a, M> {
    /// Where the tensor lies.
    pub part: Span<'a, M>,
    /// Bytes of an element: 1, or 2 for bf16.
    pub element_bytes: u32,
    /// Elements in each direction.
    pub extents: [u64; 3],
    /// Bytes from one row to the next, and from one plane to the next.
    pub strides: [u64; 2],
    /// Elements of a box in each direction.
    pub rectangle: [u32; 3],
    /// How a box lies in shared memory.
    pub swizzle: Swizzle,
}

impl<M> Clone for TensorMap<'_, M> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<M> Copy for TensorMap<'_, M> {}

/// The argument of a launch: planes of rows that follow each other, and boxes of them.
pub(crate) struct Map<'a, R: Runtime> {
    pub(crate) tensor: &'a Tensor<Gpu<R>>,
    /// Elements of a row, rows of a plane, planes.
    pub(crate) extents: [usize; 3],
    /// Elements, rows and planes of a box.
    pub(crate) rectangle: [usize; 3],
    pub(crate) swizzle: Swizzle,
}

/// Strides and the beginning are multiples of this, in bytes.
pub(crate) const MAP_GRANULE: usize = 16;
/// The most elements of a box in one direction.
const MOST_OF_A_BOX: u32 = 256;

impl<R: Runtime> Map<'_, R> {
    /// The map as runtimes get it.
    ///
    /// # Errors
    /// Which rule of the copy engine it breaks (CUDA driver API, `cuTensorMapEncodeTiled`).
    pub(crate) fn checked(&self) -> Result<TensorMap<'_, R::Memory>, String> {
        let element = self.tensor.dtype().size_bytes();
        let wrong = |what: &str| Err(format!("maps {:?} as {:?}: {what}", self.tensor, self.extents));
        let Some(part) = self.tensor.buffer().span() else {
            return wrong("it is empty");
        };
        let [row, rows, planes] = self.extents;
        let strides = [row * element, row * rows * element];
        if row == 0 || strides[1] == 0 || strides[1].saturating_mul(planes) > part.bytes || planes == 0 {
            return wrong("it has another size");
        }
        if strides.iter().any(|stride| !stride.is_multiple_of(MAP_GRANULE)) {
            return wrong("a row does not begin at 16 bytes");
        }
        let narrow = |extent: usize| u32::try_from(extent).map_err(|_| "an extent is too large".to_owned());
        let [row_of_box, rows_of_box, planes_of_box] = self.rectangle;
        let rectangle = [narrow(row_of_box)?, narrow(rows_of_box)?, narrow(planes_of_box)?];
        let row_bytes = rectangle[0] as usize * element;
        let swizzle = self.swizzle.bytes() as usize;
        if rectangle.iter().any(|extent| *extent == 0 || *extent > MOST_OF_A_BOX) {
            return wrong("a box has 1 to 256 elements in each direction");
        }
        if !row_bytes.is_multiple_of(MAP_GRANULE) || (swizzle > 0 && row_bytes > swizzle) {
            return wrong("a box's row does not fit its swizzle");
        }
        Ok(TensorMap {
            part,
            element_bytes: element as u32,
            extents: [
                u64::from(narrow(row)?),
                u64::from(narrow(rows)?),
                u64::from(narrow(planes)?),
            ],
            strides: strides.map(|stride| stride as u64),
            rectangle,
            swizzle: self.swizzle,
        })
    }
}
