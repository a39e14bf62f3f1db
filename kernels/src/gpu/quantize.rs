//! NF4: quantising (`quantize.cu`) and decoding (`nf4.cu`); dense weights are decoded by `convert`.

use super::elementwise::packs;
use super::family::Family;
use super::faults::Fault;
use super::kernel::Parameter::{F32, I32, I64, In, Out};
use super::sources::{NF4, QUANTIZE};
use super::{Argument, Element, Geometry, Gpu, Kernel, Runtime};
use crate::contract;
use crate::cpu::nf4::cascade_power;
use crate::dtype::DType;
use crate::dynamic;
use crate::error::Result;
use crate::ops::{Device, Op, QuantizeOps};
use crate::tensor::Tensor;
use crate::weight::{NF4_BLOCK, NF4_NESTED_BLOCK, Nf4Scales, Nf4Weight, Weight};

pub(super) static FAMILY: Family = Family {
    source: &QUANTIZE,
    kernels: &[&QUANTIZE_NF4, &QUANTIZE_NF4_FP8, &NESTED_MEAN, &NESTED_SCALES],
    ops: &[Op::QuantizeNf4],
};

pub(super) static DECODE_FAMILY: Family = Family {
    source: &NF4,
    kernels: &[&DEQUANTIZE_FLAT, &DEQUANTIZE_NESTED],
    ops: &[Op::Dequantize],
};

const THREADS: u32 = 256;
/// Elements of a block of threads: 8 a thread in each of four rounds.
const PER_BLOCK: usize = THREADS as usize * 32;
/// What `out` may be.
const DECODED: &[DType] = &[DType::F32, DType::BF16];
const BYTE: Element = Element::Is(DType::U8);
const SINGLE: Element = Element::Is(DType::F32);

static QUANTIZE_NF4: Kernel = Kernel {
    source: &QUANTIZE,
    stem: "quantize_nf4",
    types: &[&[DType::F32, DType::BF16, DType::F16]],
    threads: THREADS,
    parameters: &[
        ("source", In(Element::Type(0))),
        ("codes", Out(BYTE)),
        ("absmax", Out(SINGLE)),
        ("count", I64),
        ("faults", Out(Element::Is(DType::I32))),
        ("fault", I32),
    ],
};

static QUANTIZE_NF4_FP8: Kernel = Kernel {
    source: &QUANTIZE,
    stem: "quantize_nf4_fp8",
    types: &[DECODED],
    threads: THREADS,
    parameters: &[
        ("source", In(Element::Is(DType::F8E4M3))),
        ("scales", In(Element::Type(0))),
        ("codes", Out(BYTE)),
        ("absmax", Out(SINGLE)),
        ("count", I64),
        ("columns", I32),
        ("high", I32),
        ("wide", I32),
        ("faults", Out(Element::Is(DType::I32))),
        ("fault", I32),
    ],
};

static NESTED_MEAN: Kernel = Kernel {
    source: &QUANTIZE,
    stem: "nested_mean",
    types: &[],
    threads: 32,
    parameters: &[
        ("absmax", In(SINGLE)),
        ("mean", Out(SINGLE)),
        ("count", I64),
        ("power", I32),
    ],
};

static NESTED_SCALES: Kernel = Kernel {
    source: &QUANTIZE,
    stem: "nested_scales",
    types: &[],
    threads: THREADS,
    parameters: &[
        ("absmax", In(SINGLE)),
        ("mean", In(SINGLE)),
        ("map", In(SINGLE)),
        ("codes", Out(BYTE)),
        ("nested_absmax", Out(SINGLE)),
        ("count", I64),
    ],
};

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
    fn quantize_nf4(&self, source: &Tensor<Self>, nested: bool) -> Result<Nf4Weight<Self>> {
        let (outputs, inputs) = contract::quantize_nf4(source)?;
        let elements = outputs * inputs;
        let mut codes = self.alloc(DType::U8, [elements.div_ceil(2)])?;
        let mut absmax = self.alloc(DType::F32, [elements.div_ceil(NF4_BLOCK)])?;
        let arguments = [
            Argument::In(source),
            Argument::Out(&mut codes),
            Argument::Out(&mut absmax),
            Argument::Size(elements),
            Argument::Faults,
            Argument::I32(Fault::NotFinite.code()),
        ];
        self.launch(&QUANTIZE_NF4, &[source.dtype()], packs(elements), &arguments)?;
        self.quantized(codes, absmax, (outputs, inputs), nested)
    }

    fn quantize_nf4_fp8(
        &self,
        source: &Tensor<Self>,
        scales: &Tensor<Self>,
        block: [usize; 2],
        nested: bool,
    ) -> Result<Nf4Weight<Self>> {
        let (outputs, inputs) = contract::quantize_nf4_fp8(source, scales, block)?;
        let elements = outputs * inputs;
        let mut codes = self.alloc(DType::U8, [elements.div_ceil(2)])?;
        let mut absmax = self.alloc(DType::F32, [elements.div_ceil(NF4_BLOCK)])?;
        // A block larger than the matrix is one of its size.
        let [high, wide] = [block[0].min(outputs.max(1)), block[1].min(inputs.max(1))];
        let arguments = [
            Argument::In(source),
            Argument::In(scales),
            Argument::Out(&mut codes),
            Argument::Out(&mut absmax),
            Argument::Size(elements),
            Argument::Size(inputs),
            Argument::Size(high),
            Argument::Size(wide),
            Argument::Faults,
            Argument::I32(Fault::NotFinite.code()),
        ];
        self.launch(&QUANTIZE_NF4_FP8, &[scales.dtype()], packs(elements), &arguments)?;
        self.quantized(codes, absmax, (outputs, inputs), nested)
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
    /// The weight of these codes and scales, the scales quantised too where they are to be nested.
    fn quantized(
        &self,
        codes: Tensor<Self>,
        absmax: Tensor<Self>,
        (outputs, inputs): (usize, usize),
        nested: bool,
    ) -> Result<Nf4Weight<Self>> {
        // Weights are loaded once: what is wrong with one is said at once.
        self.inner.faults.check(self.runtime())?;
        let scales = if nested {
            self.nested(&absmax)?
        } else {
            Nf4Scales::Flat(absmax)
        };
        Ok(Nf4Weight {
            codes,
            scales,
            outputs,
            inputs,
        })
    }

    /// Quantises the scales themselves.
    fn nested(&self, absmax: &Tensor<Self>) -> Result<Nf4Scales<Self>> {
        let blocks = absmax.shape().elements();
        let groups = blocks.div_ceil(NF4_NESTED_BLOCK);
        let mut mean = self.zeros(DType::F32, [1])?;
        let arguments = [
            Argument::In(absmax),
            Argument::Out(&mut mean),
            Argument::Size(blocks),
            Argument::Size(cascade_power(blocks / 32)),
        ];
        self.launch(&NESTED_MEAN, &[], Geometry::cover(groups.min(1), 1), &arguments)?;
        let nested_code = self.upload_f32([256], &dynamic::signed())?;
        let mut codes = self.alloc(DType::U8, [blocks])?;
        let mut nested_absmax = self.alloc(DType::F32, [groups])?;
        let arguments = [
            Argument::In(absmax),
            Argument::In(&mean),
            Argument::In(&nested_code),
            Argument::Out(&mut codes),
            Argument::Out(&mut nested_absmax),
            Argument::Size(blocks),
        ];
        self.launch(&NESTED_SCALES, &[], Geometry::cover(groups, 1), &arguments)?;
        let offset = self.read_f32(&mean)?.first().copied().unwrap_or(0.0);
        Ok(Nf4Scales::Nested {
            codes,
            nested_absmax,
            nested_code,
            offset,
        })
    }

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
