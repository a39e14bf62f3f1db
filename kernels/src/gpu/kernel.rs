//! Typed descriptors of kernels, and launching by them.
//!
//! A [`Kernel`] says what its entries' parameters are. Every launch compares its arguments with them; a test compares them with
//! the text of the `.cu` (`signature.rs`). So a parameter changed on one side only cannot reach a device.

use std::fmt;

use super::{Addresses, Gpu, Launch, Map, Row, Runtime, Source, Value};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// A kernel and its entries: one for every combination of element types, named `stem_type_type…`.
#[derive(Debug)]
pub(crate) struct Kernel {
    pub(crate) source: &'static Source,
    pub(crate) stem: &'static str,
    /// The element types of each type parameter. A [`Kernel`] that only some combinations of exist for is several kernels.
    pub(crate) types: &'static [&'static [DType]],
    /// Threads of a block.
    pub(crate) threads: u32,
    pub(crate) parameters: &'static [(&'static str, Parameter)],
}

/// What kind of argument a parameter takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Parameter {
    /// `const T* __restrict__`; may be null where the kernel says so.
    In(Element),
    /// `T* __restrict__`: written, or read and written.
    Out(Element),
    I32,
    I64,
    F32,
    /// `MAP`: a tensor's map, by value.
    Map,
    /// `const ROW* __restrict__`: rows of the addresses of many tensors.
    Addresses(&'static Row),
}

/// The elements behind a pointer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Element {
    /// Always this type.
    Is(DType),
    /// The kernel's type parameter of this index.
    Type(usize),
    /// f64, which no tensor has: a buffer of bytes.
    F64,
}

/// One argument of a launch.
pub(crate) enum Argument<'a, R: Runtime> {
    In(&'a Tensor<Gpu<R>>),
    /// A pointer that may be null.
    Optional(Option<&'a Tensor<Gpu<R>>>),
    Out(&'a mut Tensor<Gpu<R>>),
    /// A pointer to be written that may be null.
    OptionalOut(Option<&'a mut Tensor<Gpu<R>>>),
    /// The backend's record of faults (`i32*`).
    Faults,
    /// A count or an extent; must fit the parameter.
    Size(usize),
    Flag(bool),
    I32(i32),
    I64(i64),
    F32(f32),
    Map(Map<'a, R>),
    Addresses(&'a Addresses<'a, R>),
}

/// The shape of a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Geometry {
    /// Blocks in x, y and z. A grid without blocks is not launched.
    pub(crate) grid: [usize; 3],
    /// Dynamic shared memory of a block.
    pub(crate) shared_bytes: usize,
}

impl Geometry {
    /// Blocks of `per_block` items each, for `items` of them.
    pub(crate) fn cover(items: usize, per_block: usize) -> Self {
        Self::grid([items.div_ceil(per_block), 1, 1])
    }

    /// A grid of these extents.
    pub(crate) fn grid(grid: [usize; 3]) -> Self {
        Self { grid, shared_bytes: 0 }
    }

    /// With dynamic shared memory.
    pub(crate) fn with_shared(self, shared_bytes: usize) -> Self {
        Self { shared_bytes, ..self }
    }
}

/// The most blocks a grid may have in x, y and z on every target.
const MOST_BLOCKS: [usize; 3] = [i32::MAX as usize, 65_535, 65_535];

impl Kernel {
    /// The name of the entry of these types.
    pub(crate) fn entry(&self, types: &[DType]) -> String {
        let suffixes: String = types.iter().map(|dtype| format!("_{dtype}")).collect();
        format!("{}{suffixes}", self.stem)
    }

    /// The types of every entry.
    pub(crate) fn instances(&self) -> Vec<Vec<DType>> {
        self.types.iter().fold(vec![Vec::new()], |instances, choices| {
            instances
                .iter()
                .flat_map(|types| {
                    choices.iter().map(|choice| {
                        let mut types = types.clone();
                        types.push(*choice);
                        types
                    })
                })
                .collect()
        })
    }

    fn has(&self, types: &[DType]) -> bool {
        self.types.len() == types.len()
            && self
                .types
                .iter()
                .zip(types)
                .all(|(choices, dtype)| choices.contains(dtype))
    }

    /// A launch that would not fit the kernel: a mistake of this crate, told like one of the device.
    fn mismatch(&self, problem: impl fmt::Display) -> Error {
        Error::Device {
            op: self.stem,
            message: format!("launch refused: {problem}"),
        }
    }
}

impl<R: Runtime> Gpu<R> {
    /// Queues one launch, if its grid has any block.
    ///
    /// # Errors
    /// [`Error::Device`] when arguments or geometry do not fit the kernel, or as [`Runtime::launch`].
    pub(crate) fn launch(
        &self,
        kernel: &'static Kernel,
        types: &[DType],
        geometry: Geometry,
        arguments: &[Argument<'_, R>],
    ) -> Result<()> {
        if !kernel.has(types) {
            return Err(kernel.mismatch(format_args!("there is no entry for {types:?}")));
        }
        if kernel.parameters.len() != arguments.len() {
            return Err(kernel.mismatch(format_args!(
                "{} arguments for {} parameters",
                arguments.len(),
                kernel.parameters.len()
            )));
        }
        let mut values = Vec::with_capacity(arguments.len());
        for ((name, parameter), argument) in kernel.parameters.iter().zip(arguments) {
            let value = self.value(*parameter, types, argument);
            values.push(value.map_err(|problem| kernel.mismatch(format_args!("`{name}` {problem}")))?);
        }
        if geometry.grid.contains(&0) {
            return Ok(());
        }
        let Some(grid) = fitting(geometry.grid) else {
            return Err(kernel.mismatch(format_args!("a grid of {:?} blocks is too large", geometry.grid)));
        };
        let shared_bytes = u32::try_from(geometry.shared_bytes)
            .map_err(|_| kernel.mismatch(format_args!("{} bytes of shared memory", geometry.shared_bytes)))?;
        let writes_faults = arguments.iter().any(|argument| matches!(argument, Argument::Faults));
        self.tape().launches(kernel.stem, writes_faults)?;
        let launched = self.runtime().launch(&Launch {
            source: kernel.source,
            entry: &kernel.entry(types),
            grid,
            threads: kernel.threads,
            shared_bytes,
            values: &values,
        });
        launched.map_err(|error| match error {
            Error::Device { message, .. } => Error::Device {
                op: kernel.stem,
                message: format!("{message}; given {}", shapes(kernel, arguments)),
            },
            other => other,
        })
    }

    /// An argument as the device gets it, if it is what the parameter wants.
    fn value<'a>(
        &'a self,
        parameter: Parameter,
        types: &[DType],
        argument: &'a Argument<'_, R>,
    ) -> Result<Value<'a, R::Memory>, String> {
        let pointer = |tensor: &'a Tensor<Gpu<R>>, element: Element| {
            let wanted = match element {
                Element::Is(dtype) => Some(dtype),
                Element::Type(index) => types.get(index).copied(),
                Element::F64 => Some(DType::U8),
            };
            if wanted != Some(tensor.dtype()) {
                return Err(format!("wants {element:?} of {types:?}, but is {tensor:?}"));
            }
            Ok(Value::Memory(tensor.buffer().span()))
        };
        match (parameter, argument) {
            (Parameter::In(element), Argument::In(tensor) | Argument::Optional(Some(tensor))) => {
                pointer(tensor, element)
            }
            (Parameter::In(_), Argument::Optional(None)) => Ok(Value::Memory(None)),
            (Parameter::Out(element), Argument::Out(tensor) | Argument::OptionalOut(Some(tensor))) => {
                pointer(tensor, element)
            }
            (Parameter::Out(_), Argument::OptionalOut(None)) => Ok(Value::Memory(None)),
            (Parameter::Out(Element::Is(DType::I32)), Argument::Faults) => {
                Ok(Value::Memory(Some(self.inner.faults.arm())))
            }
            (Parameter::I32, Argument::Size(size)) => i32::try_from(*size)
                .map(Value::I32)
                .map_err(|_| format!("is {size}, more than a 32-bit extent holds")),
            (Parameter::I64, Argument::Size(size)) => i64::try_from(*size)
                .map(Value::I64)
                .map_err(|_| format!("is {size}, more than a 64-bit count holds")),
            (Parameter::I32, Argument::Flag(flag)) => Ok(Value::I32(i32::from(*flag))),
            (Parameter::I32, Argument::I32(value)) => Ok(Value::I32(*value)),
            (Parameter::I64, Argument::I64(value)) => Ok(Value::I64(*value)),
            (Parameter::F32, Argument::F32(value)) => Ok(Value::F32(*value)),
            (Parameter::Map, Argument::Map(map)) => map.checked().map(Value::Map),
            (Parameter::Addresses(row), Argument::Addresses(addresses)) if std::ptr::eq(row, addresses.row()) => {
                Ok(Value::Addresses {
                    table: addresses.table(),
                    named: addresses.named().to_vec(),
                })
            }
            (parameter, _) => Err(format!("wants {parameter:?} and got another kind of argument")),
        }
    }
}

/// The tensors of a launch, for a message: `x bf16 [70, 64], y f32 [70]`.
fn shapes<R: Runtime>(kernel: &Kernel, arguments: &[Argument<'_, R>]) -> String {
    let tensors = kernel
        .parameters
        .iter()
        .zip(arguments)
        .filter_map(|((name, _), argument)| {
            let tensor = match argument {
                Argument::In(tensor) | Argument::Optional(Some(tensor)) => *tensor,
                Argument::Out(tensor) | Argument::OptionalOut(Some(tensor)) => &**tensor,
                Argument::Addresses(addresses) => {
                    return Some(format!("{name} of {} {}", addresses.rows(), addresses.row().name));
                }
                _ => return None,
            };
            Some(format!("{name} {} {}", tensor.dtype(), tensor.shape()))
        });
    let tensors: Vec<String> = tensors.collect();
    match tensors.is_empty() {
        true => "no tensor".to_owned(),
        false => tensors.join(", "),
    }
}

fn fitting(grid: [usize; 3]) -> Option<[u32; 3]> {
    let fits = grid.iter().zip(MOST_BLOCKS).all(|(blocks, most)| *blocks <= most);
    let narrow = |blocks: usize| u32::try_from(blocks).ok();
    match grid.map(narrow) {
        [Some(x), Some(y), Some(z)] if fits => Some([x, y, z]),
        _ => None,
    }
}
