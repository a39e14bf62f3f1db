//! Launches over many tensors: a table of their addresses in device memory, and a list that gives every block of threads a row of
//! it and a chunk of that row's tensors.
//!
//! An adapter has hundreds of tensors, most of them small; a launch for each would cost more than the work. What a launch
//! checks of its arguments is checked of a table's rows where they are made:
//!
//! | obligation | how |
//! |---|---|
//! | an address is one of a tensor of the right type | every field is compared with the [`Row`], and that with the `struct` in the `.cu` by a test |
//! | the tensor lives while the kernel runs | [`Addresses`] borrows it until the launch is queued, and freeing is queued behind that |
//! | nothing else has what is written | it is borrowed mutably |
//! | the kernel stays within it | the runtime is told all memory that a table names, and the emulation watches it |
//! | the table is not another's meanwhile | it is replaced, never rewritten, and work that uses one is not recorded |
//!
//! A table is written when the addresses change, which those of an adapter never do: its rows are compared on the host, some
//! fifty bytes a tensor.

use std::sync::{Arc, Mutex, PoisonError};

use super::kernel::Parameter;
use super::{Element, Gpu, Runtime, Span};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::ops::Device;
use crate::tensor::Tensor;

/// A `struct` of a source, of which a table has one for each tensor, or for each group that is worked on together.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Row {
    pub(crate) name: &'static str,
    /// Pointers, and the count of elements last. All take eight bytes, so there are no gaps.
    pub(crate) fields: &'static [(&'static str, Parameter)],
    /// Elements that a block of threads does.
    pub(crate) chunk: usize,
}

/// The value of a field.
pub(crate) enum Field<'a, R: Runtime> {
    In(&'a Tensor<Gpu<R>>),
    Out(&'a mut Tensor<Gpu<R>>),
    Count(usize),
}

/// A field as it lies in memory, and the memory it names.
type Word<'a, R> = (u64, Option<Span<'a, <R as Runtime>::Memory>>);

/// The rows of a launch, on the device.
pub(crate) struct Addresses<'a, R: Runtime> {
    row: &'static Row,
    lists: Arc<Lists<R>>,
    named: Vec<Span<'a, R::Memory>>,
}

/// Tables that were made, the last of each kind of row.
pub(super) struct Tables<R: Runtime> {
    kept: Mutex<Vec<Arc<Lists<R>>>>,
}

struct Lists<R: Runtime> {
    row: &'static Row,
    /// The rows as they lie on the device.
    words: Vec<u64>,
    /// u8 `[8 · words]`.
    rows: Tensor<Gpu<R>>,
    /// i32 `[chunks, 2]`: for each block of threads its row, and which chunk of that.
    chunks: Tensor<Gpu<R>>,
}

impl<R: Runtime> Tables<R> {
    pub(super) fn new() -> Self {
        Self {
            kept: Mutex::new(Vec::new()),
        }
    }
}

impl<'a, R: Runtime> Addresses<'a, R> {
    /// The kind of its rows.
    pub(crate) fn row(&self) -> &'static Row {
        self.row
    }

    /// How many rows there are.
    pub(crate) fn rows(&self) -> usize {
        self.lists.words.len() / self.row.fields.len()
    }

    /// The rows' memory; `None` without any.
    pub(crate) fn table(&self) -> Option<Span<'_, R::Memory>> {
        self.lists.rows.buffer().span()
    }

    /// The memory that the rows name.
    pub(crate) fn named(&self) -> &[Span<'a, R::Memory>] {
        &self.named
    }

    /// The list of chunks, i32 `[chunks, 2]`.
    pub(crate) fn chunks(&self) -> &Tensor<Gpu<R>> {
        &self.lists.chunks
    }

    /// How many blocks of threads there are to be.
    pub(crate) fn blocks(&self) -> usize {
        self.lists.chunks.shape().rows()
    }
}

impl<R: Runtime> Gpu<R> {
    /// Rows of this kind on the device, for launches of `op`.
    ///
    /// # Errors
    /// [`Error::Device`] for fields that are not the row's, and while work is recorded; as [`Device::upload`].
    pub(crate) fn addresses<'a>(
        &self,
        op: &'static str,
        row: &'static Row,
        rows: Vec<Vec<Field<'a, R>>>,
    ) -> Result<Addresses<'a, R>> {
        let refused = |problem: String| Error::Device {
            op,
            message: format!("launch refused: {problem}"),
        };
        let count = rows.len();
        self.tape()
            .forbid(op, || format!("the addresses of {count} tensors lie in a table"))?;
        let (mut words, mut chunks, mut named) = (Vec::new(), Vec::new(), Vec::new());
        for (index, fields) in rows.into_iter().enumerate() {
            if fields.len() != row.fields.len() {
                let problem = format!("{} fields for {} of `{}`", fields.len(), row.fields.len(), row.name);
                return Err(refused(problem));
            }
            for ((name, parameter), field) in row.fields.iter().zip(fields) {
                if let Field::Count(elements) = field {
                    let numbers = chunk_numbers(index, elements.div_ceil(row.chunk));
                    chunks.extend(numbers.ok_or_else(|| refused(format!("{elements} elements in row {index}")))?);
                }
                let (word, span) = self
                    .word(*parameter, field)
                    .map_err(|problem| refused(format!("`{name}` of row {index} {problem}")))?;
                words.push(word);
                named.extend(span);
            }
        }
        let lists = self.lists(row, words, &chunks)?;
        Ok(Addresses { row, lists, named })
    }

    /// A field as it lies in memory, and the memory it names.
    fn word<'a>(&self, parameter: Parameter, field: Field<'a, R>) -> Result<Word<'a, R>, String> {
        let (wanted, tensor): (Element, &'a Tensor<Self>) = match (parameter, field) {
            (Parameter::I64, Field::Count(count)) => return Ok((count as u64, None)),
            (Parameter::In(element), Field::In(tensor)) => (element, tensor),
            (Parameter::Out(element), Field::Out(tensor)) => (element, tensor),
            (parameter, _) => return Err(format!("wants {parameter:?} and got another kind of field")),
        };
        if wanted != Element::Is(tensor.dtype()) {
            return Err(format!("wants {wanted:?}, but is {tensor:?}"));
        }
        let span = tensor.buffer().span();
        let address = |span: Span<'_, R::Memory>| self.runtime().address(span.memory) + span.first as u64;
        Ok((span.map_or(0, address), span))
    }

    /// The table of these words, the one at hand if it is the same.
    fn lists(&self, row: &'static Row, words: Vec<u64>, chunks: &[i32]) -> Result<Arc<Lists<R>>> {
        let mut kept = self.inner.tables.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let place = kept.iter().position(|lists| std::ptr::eq(lists.row, row));
        if let Some(lists) = place.and_then(|place| kept.get(place))
            && lists.words == words
        {
            return Ok(Arc::clone(lists));
        }
        let bytes: &[u8] = bytemuck::cast_slice(&words);
        let mut on_device = self.alloc_lasting(DType::U8, [bytes.len()])?;
        self.write(&mut on_device, bytes)?;
        let mut blocks = self.alloc_lasting(DType::I32, [chunks.len() / 2, 2])?;
        self.write(&mut blocks, bytemuck::cast_slice(chunks))?;
        let made = Arc::new(Lists {
            row,
            words,
            rows: on_device,
            chunks: blocks,
        });
        match place.and_then(|place| kept.get_mut(place)) {
            Some(old) => *old = Arc::clone(&made),
            None => kept.push(Arc::clone(&made)),
        }
        Ok(made)
    }
}

/// The entries of the list of chunks for one row; `None` for more than its numbers can tell.
fn chunk_numbers(row: usize, chunks: usize) -> Option<Vec<i32>> {
    let row = i32::try_from(row).ok()?;
    let chunks = i32::try_from(chunks).ok()?;
    Some((0..chunks).flat_map(|chunk| [row, chunk]).collect())
}
