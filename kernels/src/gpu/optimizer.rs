//! Gradient norm and AdamW: `optimizer.cu`.

use super::elementwise::{PACK, packs};
use super::family::Family;
use super::kernel::Parameter::{F32, I32, I64, In, Out};
use super::sources::OPTIMIZER;
use super::{Argument, Element, Geometry, Gpu, Kernel, Runtime};
use crate::contract;
use crate::dtype::DType;
use crate::dynamic;
use crate::error::{Error, Result};
use crate::ops::{AdamW, BlockMoment, Device, MOMENT_BLOCK, Op, OptimizerOps};
use crate::tensor::Tensor;

pub(super) static FAMILY: Family = Family {
    source: &OPTIMIZER,
    kernels: &[&SQUARED_NORM_PARTS, &SQUARED_NORM_TOTAL, &ADAMW_STEP, &ADAMW_8BIT_STEP],
    ops: &[Op::SquaredNorm, Op::AdamwStep, Op::Adamw8bitStep],
};

const THREADS: u32 = 256;
/// The most parts of a norm: enough blocks to fill any device. It decides the order of the sum, so it is a constant.
const MOST_PARTS: usize = 1024;
const SINGLE: Element = Element::Is(DType::F32);
const BYTE: Element = Element::Is(DType::U8);

static SQUARED_NORM_PARTS: Kernel = Kernel {
    source: &OPTIMIZER,
    stem: "squared_norm_parts",
    types: &[],
    threads: THREADS,
    parameters: &[("x", In(SINGLE)), ("parts", Out(Element::F64)), ("count", I64)],
};

static SQUARED_NORM_TOTAL: Kernel = Kernel {
    source: &OPTIMIZER,
    stem: "squared_norm_total",
    types: &[],
    threads: THREADS,
    parameters: &[
        ("parts", In(Element::F64)),
        ("norm", Out(Element::F64)),
        ("count", I32),
        ("accumulate", I32),
    ],
};

static ADAMW_STEP: Kernel = Kernel {
    source: &OPTIMIZER,
    stem: "adamw_step",
    types: &[],
    threads: THREADS,
    parameters: &[
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
};

static ADAMW_8BIT_STEP: Kernel = Kernel {
    source: &OPTIMIZER,
    stem: "adamw_8bit_step",
    types: &[],
    threads: THREADS,
    parameters: &[
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
};

impl<R: Runtime> OptimizerOps for Gpu<R> {
    fn squared_norm(&self, tensors: &[&Tensor<Self>]) -> Result<f64> {
        let mut norm = self.alloc(DType::U8, [size_of::<f64>()])?;
        self.fill_zero(&mut norm)?;
        for tensor in tensors {
            if tensor.dtype() != DType::F32 {
                return Err(Error::DType {
                    op: "squared_norm",
                    argument: "tensors",
                    expected: "f32",
                    got: tensor.dtype(),
                });
            }
            self.add_squared_norm(tensor, &mut norm)?;
        }
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
        self.launch(&ADAMW_STEP, &[], packs(count), &arguments)
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
        self.launch(&ADAMW_8BIT_STEP, &[], Geometry::cover(count, MOMENT_BLOCK), &arguments)
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
    /// The signed and the unsigned map of 8-bit moments, f32 `[512]`, brought to the device once.
    fn moment_maps(&self) -> Result<&Tensor<Self>> {
        if let Some(maps) = self.inner.moment_maps.get() {
            return Ok(maps);
        }
        let maps = self.upload_f32([512], &[dynamic::signed(), dynamic::unsigned()].concat())?;
        Ok(self.inner.moment_maps.get_or_init(|| maps))
    }

    /// `norm += Σ x²`, with `norm` the eight bytes of an f64.
    fn add_squared_norm(&self, x: &Tensor<Self>, norm: &mut Tensor<Self>) -> Result<()> {
        let count = x.shape().elements();
        let parts = count.div_ceil(THREADS as usize * PACK).min(MOST_PARTS);
        let mut sums = self.alloc(DType::U8, [parts * size_of::<f64>()])?;
        let arguments = [Argument::In(x), Argument::Out(&mut sums), Argument::Size(count)];
        self.launch(&SQUARED_NORM_PARTS, &[], Geometry::cover(parts, 1), &arguments)?;
        let total = Geometry::cover(parts.min(1), 1);
        let arguments = [
            Argument::In(&sums),
            Argument::Out(norm),
            Argument::Size(parts),
            Argument::Flag(true),
        ];
        self.launch(&SQUARED_NORM_TOTAL, &[], total, &arguments)
    }
}
