//! Which bytes of a checkpoint go where, known from headers alone.

use std::collections::BTreeMap;

use brightrun_kernels::DType;

use super::Encoding;
use super::store::{Form, Slot};
use super::stream::{LARGEST_RANGE_BYTES, Wanted};
use crate::error::{Failure, Result};
use crate::model::checkpoint::{Checkpoint, SCALES};
use crate::model::config::{ExpectedTensor, ModelConfig, Role};

/// Where a part of a stored tensor goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Elements of a dense weight, from this one on.
    Elements(usize),
    /// The whole of an NF4 matrix.
    Matrix,
    /// One expert's matrix of an NF4 stack.
    Expert(usize),
}

/// A part of a stored tensor: the unit of reading and encoding.
#[derive(Clone, Debug)]
pub struct Part {
    /// Where it lies.
    pub wanted: Wanted,
    /// Which stored tensor, in [`Plan::tensors`].
    pub tensor: usize,
    /// Its first element within the stored tensor.
    pub first: usize,
    /// Stored type.
    pub stored: DType,
    /// Rows and columns of the matrix it is cut from; a vector is one row.
    pub matrix: [usize; 2],
    /// Which slot it fills, in [`Plan::slots`].
    pub slot: usize,
    /// Where in the slot.
    pub place: Place,
    /// Its scales, in [`Plan::scales`], where it is FP8.
    pub scales: Option<usize>,
}

/// A stored tensor of scales.
#[derive(Clone, Debug)]
pub struct ScaleTensor {
    /// Its name.
    pub name: String,
    /// Where it lies.
    pub wanted: Wanted,
    /// Stored type.
    pub stored: DType,
}

/// What is read, and what it becomes.
#[derive(Debug, Default)]
pub struct Plan {
    /// The model's weights, layer by layer.
    pub slots: Vec<Slot>,
    /// Names of the stored tensors that are read.
    pub tensors: Vec<String>,
    /// What is read before everything else: a few thousandths of an FP8 checkpoint.
    pub scales: Vec<ScaleTensor>,
    /// Everything else, in the order of the files.
    pub parts: Vec<Part>,
}

impl Plan {
    /// Plans how a checked checkpoint is loaded in an encoding.
    ///
    /// # Errors
    /// `MODEL_UNSUPPORTED` naming the tensor when its stored type is no type of weights; `MODEL_TENSOR_MISSING`.
    pub fn new(config: &ModelConfig, checkpoint: &Checkpoint, encoding: Encoding) -> Result<Self> {
        let mut planner = Planner {
            checkpoint,
            encoding,
            experts: config.moe.as_ref().map_or(0, |moe| moe.experts),
            places: BTreeMap::new(),
            plan: Self::default(),
        };
        let mut expected = config.tensors_with(checkpoint.expert_storage());
        // The head lies behind the layers, as it is used.
        expected.sort_by_key(|tensor| tensor.name == "lm_head.weight");
        for tensor in &expected {
            planner.tensor(tensor)?;
        }
        let mut plan = planner.plan;
        let order = |wanted: Wanted| (wanted.file, wanted.offset);
        plan.scales.sort_by_key(|scales| order(scales.wanted));
        plan.parts.sort_by_key(|part| order(part.wanted));
        plan.number_scales();
        Ok(plan)
    }

    /// Bytes that are read.
    pub fn bytes(&self) -> u64 {
        let scales = self.scales.iter().map(|scales| scales.wanted.length as u64);
        scales
            .chain(self.parts.iter().map(|part| part.wanted.length as u64))
            .sum()
    }

    /// Bytes of the loaded weights.
    pub fn weight_bytes(&self) -> u64 {
        self.slots.iter().map(|slot| slot.form.size_bytes()).sum()
    }

    /// Points each FP8 part at its scales, which have been sorted since.
    fn number_scales(&mut self) {
        let places: BTreeMap<&str, usize> = self
            .scales
            .iter()
            .enumerate()
            .map(|(place, scales)| (scales.name.as_str(), place))
            .collect();
        for part in &mut self.parts {
            if part.stored == DType::F8E4M3 {
                let name = format!("{}{SCALES}", self.tensors[part.tensor]);
                part.scales = places.get(name.as_str()).copied();
            }
        }
    }
}

struct Planner<'a> {
    checkpoint: &'a Checkpoint,
    encoding: Encoding,
    experts: usize,
    places: BTreeMap<String, usize>,
    plan: Plan,
}

/// One stored tensor on its way into the plan.
#[derive(Clone, Copy)]
struct Stored<'a> {
    tensor: usize,
    wanted: Wanted,
    dtype: DType,
    shape: &'a [usize],
}

impl Planner<'_> {
    fn tensor(&mut self, expected: &ExpectedTensor) -> Result<()> {
        let name = &expected.name;
        let missing = || Failure::user("MODEL_TENSOR_MISSING", format!("The checkpoint has no tensor `{name}`"));
        let (wanted, dtype) = self.checkpoint.place(name).ok_or_else(missing)?;
        if !matches!(dtype, DType::F32 | DType::BF16 | DType::F16 | DType::F8E4M3) {
            return Err(Failure::user(
                "MODEL_UNSUPPORTED",
                format!("The weight `{name}` is stored as {dtype}, which is no type of weights"),
            )
            .at(self.checkpoint.directory().display().to_string())
            .hint("Use a bf16, f16, f32 or block-wise FP8 checkpoint"));
        }
        if dtype == DType::F8E4M3 {
            let name = format!("{name}{SCALES}");
            let (wanted, stored) = self.checkpoint.place(&name).ok_or_else(missing)?;
            self.plan.scales.push(ScaleTensor { name, wanted, stored });
        }
        let stored = Stored {
            tensor: self.plan.tensors.len(),
            wanted,
            dtype,
            shape: &expected.shape,
        };
        self.plan.tensors.push(name.clone());
        match expected.role() {
            Role::Vector => self.dense(name, kept_dtype(dtype, true), stored),
            Role::Table => self.dense(name, self.table_dtype(dtype), stored),
            Role::Projection => self.projection(name, stored),
            Role::Expert => self.expert(name, stored),
        }
        Ok(())
    }

    /// The type of what is never quantised.
    fn table_dtype(&self, stored: DType) -> DType {
        match self.encoding {
            Encoding::Bf16 | Encoding::Nf4Experts => DType::BF16,
            Encoding::Nf4 | Encoding::Stored => kept_dtype(stored, false),
        }
    }

    fn projection(&mut self, name: &str, stored: Stored<'_>) {
        match (self.encoding, stored.shape) {
            (Encoding::Nf4, [outputs, inputs]) => {
                let form = Form::Nf4 {
                    outputs: *outputs,
                    inputs: *inputs,
                };
                let slot = self.slot(name, form);
                self.part(stored, 0, outputs * inputs, slot, Place::Matrix);
            }
            (Encoding::Bf16 | Encoding::Nf4Experts, _) => self.dense(name, DType::BF16, stored),
            _ => self.dense(name, kept_dtype(stored.dtype, false), stored),
        }
    }

    /// `PREFIX.experts.3.gate_proj.weight`, or a whole stack `PREFIX.experts.gate_up_proj`, expert by expert.
    fn expert(&mut self, name: &str, stored: Stored<'_>) {
        let Some((prefix, rest)) = name.rsplit_once(".experts.") else {
            return;
        };
        let key = |projection: &str| format!("{prefix}.experts.{projection}");
        match (rest.split_once('.'), stored.shape) {
            (Some((expert, projection)), [outputs, inputs]) => {
                let key = key(projection.trim_end_matches(".weight"));
                let expert = expert.parse().unwrap_or(0);
                self.expert_matrix(&key, stored, 0, expert, [*outputs, *inputs]);
            }
            (None, [experts, rows, inputs]) => {
                let halves: &[&str] = match rest {
                    "gate_up_proj" => &["gate_proj", "up_proj"],
                    other => &[other],
                };
                let outputs = rows / halves.len();
                let matrices = (0..*experts).flat_map(|expert| halves.iter().map(move |half| (expert, half)));
                for (place, (expert, half)) in matrices.enumerate() {
                    self.expert_matrix(&key(half), stored, place * outputs * inputs, expert, [outputs, *inputs]);
                }
            }
            _ => {}
        }
    }

    /// One expert's matrix, from element `first` of its tensor on.
    fn expert_matrix(
        &mut self,
        key: &str,
        stored: Stored<'_>,
        first: usize,
        expert: usize,
        [outputs, inputs]: [usize; 2],
    ) {
        let experts = self.experts;
        let size = outputs * inputs;
        if matches!(self.encoding, Encoding::Nf4 | Encoding::Nf4Experts) {
            let form = Form::Nf4Stack {
                experts,
                outputs,
                inputs,
            };
            let slot = self.slot(key, form);
            return self.part(stored, first, size, slot, Place::Expert(expert));
        }
        let dtype = match self.encoding {
            Encoding::Bf16 => DType::BF16,
            _ => kept_dtype(stored.dtype, false),
        };
        let form = Form::Dense {
            dtype,
            shape: vec![experts, outputs, inputs],
        };
        let slot = self.slot(key, form);
        self.elements(stored, first, size, slot, expert * size);
    }

    fn dense(&mut self, name: &str, dtype: DType, stored: Stored<'_>) {
        let form = Form::Dense {
            dtype,
            shape: stored.shape.to_vec(),
        };
        let slot = self.slot(name, form);
        self.elements(stored, 0, stored.shape.iter().product(), slot, 0);
    }

    /// Elements of a dense weight in parts that fit into one stretch.
    fn elements(&mut self, stored: Stored<'_>, first: usize, count: usize, slot: usize, target: usize) {
        let most = LARGEST_RANGE_BYTES / stored.dtype.size_bytes();
        for done in (0..count).step_by(most) {
            let length = most.min(count - done);
            self.part(stored, first + done, length, slot, Place::Elements(target + done));
        }
    }

    fn part(&mut self, stored: Stored<'_>, first: usize, count: usize, slot: usize, place: Place) {
        let width = stored.dtype.size_bytes();
        let matrix = match stored.shape {
            [.., rows, columns] => [*rows, *columns],
            [columns] => [1, *columns],
            [] => [1, 1],
        };
        self.plan.slots[slot].parts += 1;
        self.plan.parts.push(Part {
            wanted: Wanted {
                offset: stored.wanted.offset + (first * width) as u64,
                length: count * width,
                ..stored.wanted
            },
            tensor: stored.tensor,
            first,
            stored: stored.dtype,
            matrix,
            slot,
            place,
            scales: None,
        });
    }

    fn slot(&mut self, key: &str, form: Form) -> usize {
        if let Some(place) = self.places.get(key) {
            return *place;
        }
        let place = self.plan.slots.len();
        self.plan.slots.push(Slot {
            key: key.to_owned(),
            form,
            parts: 0,
        });
        self.places.insert(key.to_owned(), place);
        place
    }
}

/// The type in which stored elements are kept where nothing else is asked for: FP8 becomes f32, scaled. Small tensors are
/// f32 or bf16.
fn kept_dtype(stored: DType, is_small: bool) -> DType {
    match stored {
        DType::F8E4M3 => DType::F32,
        DType::F16 if is_small => DType::F32,
        other => other,
    }
}
