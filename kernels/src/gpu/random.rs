//! Random contents: `random.cu`.

use super::elementwise::packs;
use super::family::Family;
use super::kernel::Parameter::{F32, I64, Out};
use super::sources::RANDOM;
use super::{Argument, Element, Gpu, Kernel, Runtime};
use crate::contract;
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::{Noise, Op, RandomOps};
use crate::tensor::Tensor;

pub(super) static FAMILY: Family = Family {
    source: &RANDOM,
    kernels: &[&BYTES, &NORMAL],
    ops: &[Op::FillRandom],
};

const THREADS: u32 = 256;

static BYTES: Kernel = Kernel {
    source: &RANDOM,
    stem: "fill_random_bytes",
    types: &[],
    threads: THREADS,
    parameters: &[("out", Out(Element::Is(DType::U8))), ("count", I64), ("key", I64)],
};

static NORMAL: Kernel = Kernel {
    source: &RANDOM,
    stem: "fill_random_normal",
    types: &[&[DType::F32, DType::BF16]],
    threads: THREADS,
    parameters: &[
        ("out", Out(Element::Type(0))),
        ("count", I64),
        ("key", I64),
        ("mean", F32),
        ("step", F32),
    ],
};

impl<R: Runtime> RandomOps for Gpu<R> {
    fn fill_random(&self, tensor: &mut Tensor<Self>, key: u64, noise: Noise) -> Result<()> {
        contract::fill_random(tensor, noise)?;
        let (count, dtype) = (tensor.shape().elements(), tensor.dtype());
        let mut arguments = vec![
            Argument::Out(tensor),
            Argument::Size(count),
            Argument::I64(key.cast_signed()),
        ];
        match noise {
            Noise::Bytes => self.launch(&BYTES, &[], packs(count), &arguments),
            Noise::Normal { mean, deviation } => {
                arguments.extend([Argument::F32(mean), Argument::F32(Noise::step(deviation))]);
                self.launch(&NORMAL, &[dtype], packs(count), &arguments)
            }
        }
    }
}
