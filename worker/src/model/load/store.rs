//! Weights on their way into the model: each has a slot, filled in whatever order the files have.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use brightrun_kernels::weight::{NF4_BLOCK, NF4_NESTED_BLOCK};
use brightrun_kernels::{
    Backend, DType, Nf4Scales, Nf4Stack, Nf4StackScales, Nf4Weight, Shape, Tensor, Weight, WeightStack,
};
use serde::{Deserialize, Serialize};

use crate::error::{Failure, Result};

/// How a weight is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Form {
    /// Plain elements; stacks of experts too, `[E, O, I]`.
    Dense {
        /// f32, bf16 or f16.
        #[serde(with = "dtype_name")]
        dtype: DType,
        /// Extents, outermost first.
        shape: Vec<usize>,
    },
    /// One matrix in NF4 with nested scales.
    Nf4 {
        /// `O`.
        outputs: usize,
        /// `I`.
        inputs: usize,
    },
    /// A matrix of each expert in NF4 with nested scales.
    Nf4Stack {
        /// `E`.
        experts: usize,
        /// `O`.
        outputs: usize,
        /// `I`.
        inputs: usize,
    },
}

/// One contiguous tensor of a weight.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    /// Element type.
    pub dtype: DType,
    /// Extents, outermost first.
    pub shape: Vec<usize>,
}

impl Section {
    fn new(dtype: DType, shape: &[usize]) -> Self {
        Self {
            dtype,
            shape: shape.to_vec(),
        }
    }

    /// Length in bytes.
    pub fn size_bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.size_bytes()
    }
}

impl Form {
    /// The tensors it consists of, in the order of [`Value::sections`].
    pub fn sections(&self) -> Vec<Section> {
        let (experts, outputs, inputs) = match self {
            Self::Dense { dtype, shape } => return vec![Section::new(*dtype, shape)],
            Self::Nf4 { outputs, inputs } => (None, *outputs, *inputs),
            Self::Nf4Stack {
                experts,
                outputs,
                inputs,
            } => (Some(*experts), *outputs, *inputs),
        };
        let blocks = (outputs * inputs).div_ceil(NF4_BLOCK);
        let of_each = |dtype, length| {
            let shape: Vec<usize> = experts.into_iter().chain([length]).collect();
            Section::new(dtype, &shape)
        };
        let mut sections = vec![
            of_each(DType::U8, (outputs * inputs).div_ceil(2)),
            of_each(DType::U8, blocks),
            of_each(DType::F32, blocks.div_ceil(NF4_NESTED_BLOCK)),
            Section::new(DType::F32, &[256]),
        ];
        sections.extend(experts.map(|experts| Section::new(DType::F32, &[experts])));
        sections
    }

    /// Bytes of the weight in memory.
    pub fn size_bytes(&self) -> u64 {
        self.sections().iter().map(|section| section.size_bytes() as u64).sum()
    }
}

/// A weight in a backend's memory.
#[derive(Debug)]
pub enum Value<B: Backend> {
    /// Plain elements.
    Dense(Tensor<B>),
    /// One matrix in NF4.
    Nf4(Nf4Weight<B>),
    /// A matrix of each expert in NF4.
    Stack(WeightStack<B>),
}

impl<B: Backend> Value<B> {
    /// Its tensors, in the order of [`Form::sections`].
    pub fn sections(&self) -> Vec<&Tensor<B>> {
        match self {
            Self::Dense(tensor) | Self::Stack(WeightStack::Dense(tensor)) => vec![tensor],
            Self::Nf4(weight) => match &weight.scales {
                Nf4Scales::Flat(absmax) => vec![&weight.codes, absmax],
                Nf4Scales::Nested {
                    codes,
                    nested_absmax,
                    nested_code,
                    ..
                } => vec![&weight.codes, codes, nested_absmax, nested_code],
            },
            Self::Stack(WeightStack::Nf4(stack)) => match &stack.scales {
                Nf4StackScales::Flat(absmax) => vec![&stack.codes, absmax],
                Nf4StackScales::Nested {
                    codes,
                    nested_absmax,
                    nested_code,
                    offsets,
                } => vec![&stack.codes, codes, nested_absmax, nested_code, offsets],
            },
        }
    }

    /// The one number of an NF4 matrix that is kept beside its tensors; 0 for other forms.
    pub fn offset(&self) -> f32 {
        match self {
            Self::Nf4(Nf4Weight {
                scales: Nf4Scales::Nested { offset, .. },
                ..
            }) => *offset,
            _ => 0.0,
        }
    }

    /// Puts a weight together; `None` when the tensors are not those of the form.
    pub fn from_sections(form: &Form, sections: Vec<Tensor<B>>, offset: f32) -> Option<Self> {
        let mut sections = sections.into_iter();
        let mut next = || sections.next();
        Some(match form {
            Form::Dense { .. } => Self::Dense(next()?),
            Form::Nf4 { outputs, inputs } => Self::Nf4(Nf4Weight {
                codes: next()?,
                scales: Nf4Scales::Nested {
                    codes: next()?,
                    nested_absmax: next()?,
                    nested_code: next()?,
                    offset,
                },
                outputs: *outputs,
                inputs: *inputs,
            }),
            Form::Nf4Stack {
                experts,
                outputs,
                inputs,
            } => Self::Stack(WeightStack::Nf4(Nf4Stack {
                codes: next()?,
                scales: Nf4StackScales::Nested {
                    codes: next()?,
                    nested_absmax: next()?,
                    nested_code: next()?,
                    offsets: next()?,
                },
                experts: *experts,
                outputs: *outputs,
                inputs: *inputs,
            })),
        })
    }
}

/// A weight that shall be filled.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Slot {
    /// Its name: a tensor's, or `….experts.gate_proj` for a stack.
    pub key: String,
    /// How it is kept.
    pub form: Form,
    /// In how many parts it comes.
    #[serde(skip)]
    pub parts: usize,
}

/// A slot's contents so far.
pub struct Cell<B: Backend> {
    /// What there is.
    pub value: Option<Value<B>>,
    /// Parts that have not come yet.
    missing: usize,
}

/// All slots. Threads fill them at once, each behind a lock of its own.
pub struct Store<B: Backend> {
    slots: Vec<Slot>,
    cells: Vec<Mutex<Cell<B>>>,
    places: BTreeMap<String, usize>,
}

impl<B: Backend> Store<B> {
    /// Empty slots.
    pub fn new(slots: Vec<Slot>) -> Self {
        let places = slots
            .iter()
            .enumerate()
            .map(|(place, slot)| (slot.key.clone(), place))
            .collect();
        let cells = slots.iter().map(|slot| Cell {
            value: None,
            missing: slot.parts,
        });
        Self {
            cells: cells.map(Mutex::new).collect(),
            slots,
            places,
        }
    }

    /// What a slot is for.
    pub fn slot(&self, place: usize) -> &Slot {
        &self.slots[place]
    }

    /// A slot's contents.
    pub fn cell(&self, place: usize) -> MutexGuard<'_, Cell<B>> {
        self.cells[place].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes elements of a dense weight, from byte `first` on. The first write allocates it.
    ///
    /// # Errors
    /// The backend's own.
    pub fn write_dense(&self, device: &B, place: usize, first: usize, bytes: &[u8]) -> Result<()> {
        let Form::Dense { dtype, shape } = &self.slots[place].form else {
            return Err(wrong_form(&self.slots[place].key));
        };
        let mut cell = self.cell(place);
        if cell.value.is_none() {
            cell.value = Some(Value::Dense(device.alloc(*dtype, Shape::new(shape))?));
        }
        match &mut cell.value {
            Some(Value::Dense(tensor)) => Ok(device.write_at(tensor, first, bytes)?),
            _ => Err(wrong_form(&self.slots[place].key)),
        }
    }

    /// Puts an NF4 matrix in its place: the whole weight, or one expert's part of it.
    ///
    /// # Errors
    /// The backend's own.
    pub fn put_nf4(&self, device: &B, place: usize, expert: Option<usize>, weight: Nf4Weight<B>) -> Result<()> {
        let mut cell = self.cell(place);
        match (&self.slots[place].form, expert) {
            (Form::Nf4 { .. }, None) => cell.value = Some(Value::Nf4(weight)),
            (Form::Nf4Stack { experts, .. }, Some(expert)) => {
                let weight = Weight::Nf4(weight);
                if cell.value.is_none() {
                    cell.value = Some(Value::Stack(WeightStack::alloc_like(device, *experts, &weight)?));
                }
                match &mut cell.value {
                    Some(Value::Stack(stack)) => device.stack_expert(&weight, expert, stack)?,
                    _ => return Err(wrong_form(&self.slots[place].key)),
                }
            }
            _ => return Err(wrong_form(&self.slots[place].key)),
        }
        Ok(())
    }

    /// Puts a whole weight into its slot.
    pub fn put(&mut self, place: usize, value: Value<B>) {
        if let Some(cell) = self.cells.get_mut(place) {
            *cell.get_mut().unwrap_or_else(PoisonError::into_inner) = Cell {
                value: Some(value),
                missing: 0,
            };
        }
    }

    /// Notes that a part of a slot has come; whether it was the last one.
    pub fn part_came(&self, place: usize) -> bool {
        let mut cell = self.cell(place);
        cell.missing = cell.missing.saturating_sub(1);
        cell.missing == 0
    }

    /// Takes a finished weight out.
    ///
    /// # Errors
    /// `MODEL_TENSOR_MISSING` when there is no such slot, or not all of it has come.
    pub fn take(&mut self, key: &str) -> Result<Value<B>> {
        let cell = self.places.get(key).map(|place| &mut self.cells[*place]);
        let cell = cell.map(|cell| cell.get_mut().unwrap_or_else(PoisonError::into_inner));
        cell.filter(|cell| cell.missing == 0)
            .and_then(|cell| cell.value.take())
            .ok_or_else(|| Failure::system("MODEL_TENSOR_MISSING", format!("The weight `{key}` was not loaded")))
    }
}

fn wrong_form(key: &str) -> Failure {
    Failure::system(
        "MODEL_READ_PLAN",
        format!("The weight `{key}` comes in a form that was not planned"),
    )
}

/// Dtypes in files of this program.
mod dtype_name {
    use brightrun_kernels::DType;
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    const NAMES: [(DType, &str); 3] = [(DType::F32, "f32"), (DType::BF16, "bf16"), (DType::F16, "f16")];

    #[allow(clippy::trivially_copy_pass_by_ref)] // serde's signature
    pub fn serialize<S: Serializer>(dtype: &DType, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&dtype.to_string())
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<DType, D::Error> {
        let text = String::deserialize(deserializer)?;
        let found = NAMES.into_iter().find(|(_, name)| *name == text);
        found
            .map(|(dtype, _)| dtype)
            .ok_or_else(|| D::Error::custom(format!("`{text}` is not a float type")))
    }
}
