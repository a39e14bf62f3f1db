//! Gradient norm and AdamW, of one tensor or of many in one launch: `optimizer.cu`.

use super::addresses::{Field, Row};
use super::family::Family;
use super::kernel::Parameter::{self, Addresses, F32, I64, In, Out};
use super::sources::OPTIMIZER;
use super::{Argument, Element, Geometry, Gpu, Kernel, Runtime};
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::{AdamW, BlockMoment, Device, MomentsMut, Op, OptimizerOps, Trained};
use crate::tensor::Tensor;
use crate::{contract, dynamic};

pub(super) static FAMILY: Family = Family {
    source: &OPTIMIZER,
    kernels: &[
        &SQUARED_NORM_PARTS,
        &SQUARED_NORM_TOTAL,
        &ZERO_MANY,
        &ADAMW_STEP,
        &ADAMW_STEP_MANY,
        &ADAMW_8BIT_STEP,
        &ADAMW_8BIT_STEP_MANY,
    ],
    ops: &[Op::SquaredNorm, Op::AdamwStep, Op::Adamw8bitStep],
};

const THREADS: u32 = 256;
/// Elements of a tensor that a block of threads does. It decides the order of the norm's sum.
const CHUNK: usize = 4096;
const SINGLE: Element = Element::Is(DType::F32);
const BYTE: Element = Element::Is(DType::U8);
const CHUNKS: (&str, Parameter) = ("chunks", In(Element::Is(DType::I32)));

static SUMMED: Row = Row {
    name: "Summed",
    fields: &[("x", In(SINGLE)), ("count", I64)],
    chunk: CHUNK,
};

static CLEARED: Row = Row {
    name: "Cleared",
    fields: &[("x", Out(SINGLE)), ("count", I64)],
    chunk: CHUNK,
};

static OF_SINGLE: Row = Row {
    name: "Single",
    fields: &[
        ("parameter", Out(SINGLE)),
        ("gradient", In(SINGLE)),
        ("m", Out(SINGLE)),
        ("v", Out(SINGLE)),
        ("count", I64),
    ],
    chunk: CHUNK,
};

static OF_BLOCKS: Row = Row {
    name: "Blocks",
    fields: &[
        ("parameter", Out(SINGLE)),
        ("gradient", In(SINGLE)),
        ("m_codes", Out(BYTE)),
        ("m_absmax", Out(SINGLE)),
        ("v_codes", Out(BYTE)),
        ("v_absmax", Out(SINGLE)),
        ("count", I64),
    ],
    chunk: CHUNK,
};

const fn kernel(stem: &'static str, parameters: &'static [(&'static str, Parameter)]) -> Kernel {
    Kernel {
        source: &OPTIMIZER,
        stem,
        types: &[],
        threads: THREADS,
        parameters,
    }
}

static SQUARED_NORM_PARTS: Kernel = kernel(
    "squared_norm_parts",
    &[("rows", Addresses(&SUMMED)), CHUNKS, ("parts", Out(Element::F64))],
);

static SQUARED_NORM_TOTAL: Kernel = kernel(
    "squared_norm_total",
    &[("parts", In(Element::F64)), ("norm", Out(Element::F64)), ("count", I64)],
);

static ZERO_MANY: Kernel = kernel("zero_many", &[("rows", Addresses(&CLEARED)), CHUNKS]);

static ADAMW_STEP_MANY: Kernel = kernel(
    "adamw_step_many",
    &[
        ("rows", Addresses(&OF_SINGLE)),
        CHUNKS,
        ("gradient_scale", F32),
        ("keep", F32),
        ("one_minus_beta1", F32),
        ("beta2", F32),
        ("one_minus_beta2", F32),
        ("rate", F32),
        ("root2", F32),
        ("epsilon", F32),
    ],
);

static ADAMW_8BIT_STEP_MANY: Kernel = kernel(
    "adamw_8bit_step_many",
    &[
        ("rows", Addresses(&OF_BLOCKS)),
        CHUNKS,
        ("maps", In(SINGLE)),
        ("gradient_scale", F32),
        ("keep", F32),
        ("one_minus_beta1", F32),
        ("beta2", F32),
        ("one_minus_beta2", F32),
        ("rate", F32),
        ("root2", F32),
        ("epsilon", F32),
    ],
);

static ADAMW_STEP: Kernel = kernel(
    "adamw_step",
    &[
        ("parameter", Out(SINGLE)),
        ("gradient", In(SINGLE)),
        ("m", Out(SINGLE)),
        ("v", Out(SINGLE)),
        ("count", I64),
        ("gradient_scale", F32),
        ("keep", F32),
        ("one_minus_beta1", F32),
        ("beta2", F32),
        ("one_minus_beta2", F32),
        ("rate", F32),
        ("root2", F32),
        ("epsilon", F32),
    ],
);

static ADAMW_8BIT_STEP: Kernel = kernel(
    "adamw_8bit_step",
    &[
        ("parameter", Out(SINGLE)),
        ("gradient", In(SINGLE)),
        ("m_codes", Out(BYTE)),
        ("m_absmax", Out(SINGLE)),
        ("v_codes", Out(BYTE)),
        ("v_absmax", Out(SINGLE)),
        ("maps", In(SINGLE)),
        ("count", I64),
        ("gradient_scale", F32),
        ("keep", F32),
        ("one_minus_beta1", F32),
        ("beta2", F32),
        ("one_minus_beta2", F32),
        ("rate", F32),
        ("root2", F32),
        ("epsilon", F32),
    ],
);

impl<R: Runtime> OptimizerOps for Gpu<R> {
    fn squared_norm(&self, tensors: &[&Tensor<Self>]) -> Result<f64> {
        tensors.iter().try_for_each(|tensor| contract::squared_norm(tensor))?;
        let rows = tensors
            .iter()
            .map(|tensor| vec![Field::In(tensor), Field::Count(tensor.shape().elements())]);
        let addresses = self.addresses("squared_norm", &SUMMED, rows.collect())?;
        let count = addresses.blocks();
        if count == 0 {
            return Ok(0.0);
        }
        let mut parts = self.alloc(DType::U8, [count * size_of::<f64>()])?;
        let arguments = [
            Argument::Addresses(&addresses),
            Argument::In(addresses.chunks()),
            Argument::Out(&mut parts),
        ];
        self.launch(&SQUARED_NORM_PARTS, &[], Geometry::cover(count, 1), &arguments)?;
        let mut norm = self.alloc(DType::U8, [size_of::<f64>()])?;
        let arguments = [Argument::In(&parts), Argument::Out(&mut norm), Argument::Size(count)];
        self.launch(&SQUARED_NORM_TOTAL, &[], Geometry::cover(1, 1), &arguments)?;
        let bytes = self.read(&norm)?;
        Ok(bytemuck::pod_read_unaligned(&bytes))
    }

    fn adamw_step(
        &self,
        parameter: &mut Tensor<Self>,
        gradient: &Tensor<Self>,
        m: &mut Tensor<Self>,
        v: &mut Tensor<Self>,
        settings: &AdamW,
    ) -> Result<()> {
        contract::adamw_step(parameter, gradient, m, v, settings)?;
        let count = gradient.shape().elements();
        let mut arguments = vec![
            Argument::Out(parameter),
            Argument::In(gradient),
            Argument::Out(m),
            Argument::Out(v),
            Argument::Size(count),
        ];
        arguments.extend(numbers(settings).map(Argument::F32));
        self.launch(&ADAMW_STEP, &[], Geometry::cover(count, CHUNK), &arguments)
    }

    fn adamw_8bit_step(
        &self,
        parameter: &mut Tensor<Self>,
        gradient: &Tensor<Self>,
        m: &mut BlockMoment<Self>,
        v: &mut BlockMoment<Self>,
        settings: &AdamW,
    ) -> Result<()> {
        contract::adamw_8bit_step(parameter, gradient, (m, v), settings)?;
        let count = gradient.shape().elements();
        let mut arguments = vec![
            Argument::Out(parameter),
            Argument::In(gradient),
            Argument::Out(&mut m.codes),
            Argument::Out(&mut m.absmax),
            Argument::Out(&mut v.codes),
            Argument::Out(&mut v.absmax),
            Argument::In(self.moment_maps()?),
            Argument::Size(count),
        ];
        arguments.extend(numbers(settings).map(Argument::F32));
        self.launch(&ADAMW_8BIT_STEP, &[], Geometry::cover(count, CHUNK), &arguments)
    }

    fn adamw_step_many(&self, trained: Vec<Trained<'_, Self>>, settings: &AdamW) -> Result<()> {
        trained.iter().try_for_each(|one| one.checked(settings))?;
        let (mut of_single, mut of_blocks) = (Vec::new(), Vec::new());
        for one in trained {
            let count = Field::Count(one.gradient.shape().elements());
            let mut row = vec![Field::Out(one.parameter), Field::In(one.gradient)];
            match one.moments {
                MomentsMut::Single { m, v } => {
                    row.extend([Field::Out(m), Field::Out(v), count]);
                    of_single.push(row);
                }
                MomentsMut::Blocks { m, v } => {
                    let fields = [&mut m.codes, &mut m.absmax, &mut v.codes, &mut v.absmax];
                    row.extend(fields.map(Field::Out));
                    row.push(count);
                    of_blocks.push(row);
                }
            }
        }
        self.step_single(of_single, settings)?;
        self.step_blocks(of_blocks, settings)
    }

    fn zero_many(&self, tensors: Vec<&mut Tensor<Self>>) -> Result<()> {
        tensors.iter().try_for_each(|tensor| contract::zero_many(tensor))?;
        let rows = tensors.into_iter().map(|tensor| {
            let count = Field::Count(tensor.shape().elements());
            vec![Field::Out(tensor), count]
        });
        let addresses = self.addresses("zero_many", &CLEARED, rows.collect())?;
        let arguments = [Argument::Addresses(&addresses), Argument::In(addresses.chunks())];
        let grid = Geometry::cover(addresses.blocks(), 1);
        self.launch(&ZERO_MANY, &[], grid, &arguments)
    }
}

/// A step's numbers in the order of the kernels' parameters, the corrections in f64, as Python computes them for torch.
fn numbers(settings: &AdamW) -> [f32; 8] {
    let step = settings.step as f64;
    let correction1 = 1.0 - f64::from(settings.beta1).powf(step);
    let correction2 = 1.0 - f64::from(settings.beta2).powf(step);
    let rate = f64::from(settings.learning_rate);
    [
        settings.gradient_scale,
        (1.0 - rate * f64::from(settings.weight_decay)) as f32,
        (1.0 - f64::from(settings.beta1)) as f32,
        settings.beta2,
        (1.0 - f64::from(settings.beta2)) as f32,
        (rate / correction1) as f32,
        correction2.sqrt() as f32,
        settings.epsilon,
    ]
}

impl<R: Runtime> Gpu<R> {
    fn step_single(&self, rows: Vec<Vec<Field<'_, R>>>, settings: &AdamW) -> Result<()> {
        if rows.is_empty() {
            return Ok(());
        }
        let addresses = self.addresses("adamw_step_many", &OF_SINGLE, rows)?;
        let mut arguments = vec![Argument::Addresses(&addresses), Argument::In(addresses.chunks())];
        arguments.extend(numbers(settings).map(Argument::F32));
        let grid = Geometry::cover(addresses.blocks(), 1);
        self.launch(&ADAMW_STEP_MANY, &[], grid, &arguments)
    }

    fn step_blocks(&self, rows: Vec<Vec<Field<'_, R>>>, settings: &AdamW) -> Result<()> {
        if rows.is_empty() {
            return Ok(());
        }
        let addresses = self.addresses("adamw_step_many", &OF_BLOCKS, rows)?;
        let mut arguments = vec![
            Argument::Addresses(&addresses),
            Argument::In(addresses.chunks()),
            Argument::In(self.moment_maps()?),
        ];
        arguments.extend(numbers(settings).map(Argument::F32));
        let grid = Geometry::cover(addresses.blocks(), 1);
        self.launch(&ADAMW_8BIT_STEP_MANY, &[], grid, &arguments)
    }

    /// The signed and the unsigned map of 8-bit moments and the trees of both, f32 `[1024]`, brought to the device once.
    fn moment_maps(&self) -> Result<&Tensor<Self>> {
        if let Some(maps) = self.inner.moment_maps.get() {
            return Ok(maps);
        }
        let values = [dynamic::signed(), dynamic::unsigned()];
        let tables = [
            values[0],
            values[1],
            dynamic::tree(&values[0]),
            dynamic::tree(&values[1]),
        ]
        .concat();
        let mut maps = self.alloc_lasting(DType::F32, [tables.len()])?;
        self.write(&mut maps, bytemuck::cast_slice(&tables))?;
        Ok(self.inner.moment_maps.get_or_init(|| maps))
    }
}
