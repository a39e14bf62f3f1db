//! Decoding frozen weights: `nf4.cu`, and `convert` for dense ones.

use super::family::Family;
use super::kernel::Parameter::{F32, I64, In, Out};
use super::sources::NF4;
use super::{Argument, Element, Geometry, Gpu, Kernel, Runtime};
use crate::contract;
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::{Op, QuantizeOps};
use crate::tensor::Tensor;
use crate::weight::{Nf4Scales, Nf4Weight, Weight};

pub(super) static FAMILY: Family = Family {
    source: &NF4,
    kernels: &[&DEQUANTIZE_FLAT, &DEQUANTIZE_NESTED],
    ops: &[Op::Dequantize],
};

const THREADS: u32 = 256;
/// Elements of a block of threads: 32 a thread.
const PER_BLOCK: usize = THREADS as usize * 32;
/// What `out` may be.
const DECODED: &[DType] = &[DType::F32, DType::BF16];
const BYTE: Element = Element::Is(DType::U8);
const SINGLE: Element = Element::Is(DType::F32);

static DEQUANTIZE_FLAT: Kernel = Kernel {
    source: &NF4,
    stem: "dequantize_flat",
    types: &[DECODED],
    threads: THREADS,
    parameters: &[
        ("codes", In(BYTE)),
        ("absmax", In(SINGLE)),
        ("out", Out(Element::Type(0))),
        ("count", I64),
    ],
};

static DEQUANTIZE_NESTED: Kernel = Kernel {
    source: &NF4,
    stem: "dequantize_nested",
    types: &[DECODED],
    threads: THREADS,
    parameters: &[
        ("codes", In(BYTE)),
        ("nested_codes", In(BYTE)),
        ("nested_absmax", In(SINGLE)),
        ("nested_map", In(SINGLE)),
        ("offset", F32),
        ("out", Out(Element::Type(0))),
        ("count", I64),
    ],
};

impl<R: Runtime> QuantizeOps for Gpu<R> {
    fn quantize_nf4(&self, source: &Tensor<Self>, _nested: bool) -> Result<Nf4Weight<Self>> {
        contract::quantize_nf4(source)?;
        self.absent("quantize_nf4")
    }

    fn dequantize(&self, weight: &Weight<Self>, out: &mut Tensor<Self>) -> Result<()> {
        contract::dequantize(weight, out)?;
        match weight {
            Weight::Dense(tensor) => self.convert("dequantize", tensor, out),
            Weight::Nf4(weight) => self.decode(weight, out),
        }
    }
}

impl<R: Runtime> Gpu<R> {
    fn decode(&self, weight: &Nf4Weight<Self>, out: &mut Tensor<Self>) -> Result<()> {
        let count = out.shape().elements();
        let types = [out.dtype()];
        let geometry = Geometry::cover(count, PER_BLOCK);
        match &weight.scales {
            Nf4Scales::Flat(absmax) => {
                let arguments = [
                    Argument::In(&weight.codes),
                    Argument::In(absmax),
                    Argument::Out(out),
                    Argument::Size(count),
                ];
                self.launch(&DEQUANTIZE_FLAT, &types, geometry, &arguments)
            }
            Nf4Scales::Nested {
                codes,
                nested_absmax,
                nested_code,
                offset,
            } => {
                let arguments = [
                    Argument::In(&weight.codes),
                    Argument::In(codes),
                    Argument::In(nested_absmax),
                    Argument::In(nested_code),
                    Argument::F32(*offset),
                    Argument::Out(out),
                    Argument::Size(count),
                ];
                self.launch(&DEQUANTIZE_NESTED, &types, geometry, &arguments)
            }
        }
    }
}
