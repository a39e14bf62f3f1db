//! Frozen weights in every encoding.

use brightrun_kernels::cpu::{Cpu, SimdLevel};
use brightrun_kernels::ops::{Device, QuantizeOps};
use brightrun_kernels::testing::Random;
use brightrun_kernels::{DType, Nf4Scales, Nf4Weight, Tensor, Weight, fp8};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::on_every_backend;

/// The encodings a frozen matrix may have.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Encoding {
    F32,
    Bf16,
    F16,
    Nf4,
    Nf4Nested,
}

pub const ENCODINGS: [Encoding; 5] = [
    Encoding::F32,
    Encoding::Bf16,
    Encoding::F16,
    Encoding::Nf4,
    Encoding::Nf4Nested,
];

/// A dense tensor of the encoding's dtype.
pub fn dense<D: Device>(device: &D, dtype: DType, shape: [usize; 2], values: &[f32]) -> Tensor<D> {
    match dtype {
        DType::BF16 => {
            let mut halves = vec![bf16::ZERO; values.len()];
            halves.convert_from_f32_slice(values);
            device.upload(dtype, shape, bytemuck::cast_slice(&halves)).unwrap()
        }
        DType::F16 => {
            let mut halves = vec![f16::ZERO; values.len()];
            halves.convert_from_f32_slice(values);
            device.upload(dtype, shape, bytemuck::cast_slice(&halves)).unwrap()
        }
        _ => device.upload_f32(shape, values).unwrap(),
    }
}

/// A weight of these values in an encoding, and the values it then has. The CPU backend quantises and decodes for all, so that
/// a backend's products do not depend on its own quantiser.
pub fn weight<D: Device>(device: &D, encoding: Encoding, shape: [usize; 2], values: &[f32]) -> (Weight<D>, Vec<f32>) {
    let cpu = Cpu::with_simd(Some(1), SimdLevel::Portable).unwrap();
    let weight = match encoding {
        Encoding::F32 => Weight::Dense(dense(&cpu, DType::F32, shape, values)),
        Encoding::Bf16 => Weight::Dense(dense(&cpu, DType::BF16, shape, values)),
        Encoding::F16 => Weight::Dense(dense(&cpu, DType::F16, shape, values)),
        Encoding::Nf4 | Encoding::Nf4Nested => {
            let source = cpu.upload_f32(shape, values).unwrap();
            Weight::Nf4(cpu.quantize_nf4(&source, encoding == Encoding::Nf4Nested).unwrap())
        }
    };
    let mut decoded = cpu.alloc(DType::F32, shape).unwrap();
    cpu.dequantize(&weight, &mut decoded).unwrap();
    (moved(&cpu, &weight, device), cpu.read_f32(&decoded).unwrap())
}

/// The same weight on another device.
fn moved<D: Device>(cpu: &Cpu, weight: &Weight<Cpu>, device: &D) -> Weight<D> {
    let tensor = |tensor: &Tensor<Cpu>| {
        let bytes = cpu.read(tensor).unwrap();
        device.upload(tensor.dtype(), tensor.shape(), &bytes).unwrap()
    };
    match weight {
        Weight::Dense(dense) => Weight::Dense(tensor(dense)),
        Weight::Nf4(nf4) => Weight::Nf4(Nf4Weight {
            codes: tensor(&nf4.codes),
            scales: match &nf4.scales {
                Nf4Scales::Flat(absmax) => Nf4Scales::Flat(tensor(absmax)),
                Nf4Scales::Nested {
                    codes,
                    nested_absmax,
                    nested_code,
                    offset,
                } => Nf4Scales::Nested {
                    codes: tensor(codes),
                    nested_absmax: tensor(nested_absmax),
                    nested_code: tensor(nested_code),
                    offset: *offset,
                },
            },
            outputs: nf4.outputs,
            inputs: nf4.inputs,
        }),
    }
}

/// Nothing, one element, half a byte over, a block and its neighbours, more than one group of nested scales.
const SHAPES: [[usize; 2]; 8] = [[0, 4], [1, 1], [1, 63], [8, 8], [5, 13], [3, 65], [7, 96], [130, 128]];

#[test]
fn weights_decode_to_the_same_bits_on_every_backend() {
    on_every_backend!("dequantize", [Dequantize], |run| {
        let device = run.backend;
        for (encoding, shape) in ENCODINGS.into_iter().flat_map(|e| SHAPES.map(|shape| (e, shape))) {
            let values = Random::new(shape[1] as u64).normal(shape[0] * shape[1]);
            let (weight, decoded) = weight(device, encoding, shape, &values);
            for dtype in [DType::F32, DType::BF16] {
                let exact = match dtype {
                    DType::BF16 => decoded.iter().map(|value| bf16::from_f32(*value).to_f64()).collect(),
                    _ => wide64(&decoded),
                };
                let mut out = device.alloc(dtype, shape).unwrap();
                device.dequantize(&weight, &mut out).unwrap();
                let mut case = run.case(format_args!("dequantize {encoding:?} {shape:?} {dtype}"), 0);
                case.compare("out", &out, &exact, &exact);
            }
        }
    });
}

fn wide64(values: &[f32]) -> Vec<f64> {
    values.iter().copied().map(f64::from).collect()
}

/// Bits of every tensor of an NF4 weight, and of its offset.
fn bits<D: Device>(device: &D, weight: &Nf4Weight<D>) -> Vec<Vec<u8>> {
    let read = |tensor| device.read(tensor).unwrap();
    match &weight.scales {
        Nf4Scales::Flat(absmax) => vec![read(&weight.codes), read(absmax)],
        Nf4Scales::Nested {
            codes,
            nested_absmax,
            nested_code,
            offset,
        } => vec![
            read(&weight.codes),
            read(codes),
            read(nested_absmax),
            read(nested_code),
            offset.to_le_bytes().to_vec(),
        ],
    }
}

/// The shapes above, fewer scales than a vector of their mean has lanes, and enough for three levels of its cascade.
#[test]
fn weights_are_quantised_to_the_same_bits_on_every_backend() {
    let cpu = Cpu::with_simd(Some(1), SimdLevel::Portable).unwrap();
    on_every_backend!("quantize_nf4", [QuantizeNf4], |run| {
        for shape in SHAPES.into_iter().chain([[6, 64], [31, 64], [1_100, 512]]) {
            let mut values = Random::new(shape[0] as u64).adversarial(shape[0] * shape[1]);
            values.iter_mut().take(64).for_each(|value| *value = 0.0);
            for (dtype, nested) in [
                (DType::F32, false),
                (DType::F32, true),
                (DType::BF16, true),
                (DType::F16, true),
            ] {
                let theirs = cpu.quantize_nf4(&dense(&cpu, dtype, shape, &values), nested).unwrap();
                let ours = run
                    .backend
                    .quantize_nf4(&dense(run.backend, dtype, shape, &values), nested);
                let (ours, theirs) = (bits(run.backend, &ours.unwrap()), bits(&cpu, &theirs));
                for (part, (ours, theirs)) in ours.iter().zip(&theirs).enumerate() {
                    let different = ours.iter().zip(theirs).position(|(a, b)| a != b);
                    assert_eq!(
                        different, None,
                        "byte of part {part}: {shape:?} {dtype} {nested} on {}",
                        run.name
                    );
                }
                run.case("quantize_nf4", 0);
            }
        }
    });
}

#[test]
fn dense_weights_decode_to_their_own_values() {
    on_every_backend!("dequantize, dense", [Dequantize], |run| {
        for (encoding, values) in [
            (Encoding::F32, [0.1, -3.0]),
            (Encoding::Bf16, [0.5, -3.0]),
            (Encoding::F16, [0.25, 7.0]),
        ] {
            let (weight, _) = weight(run.backend, encoding, [1, 2], &values);
            let mut decoded = run.backend.alloc(DType::F32, [1, 2]).unwrap();
            run.backend.dequantize(&weight, &mut decoded).unwrap();
            let mut case = run.case(format_args!("{encoding:?}"), 0);
            case.compare("decoded", &decoded, &wide64(&values), &wide64(&values));
        }
    });
}

/// Every tensor of an NF4 matrix.
fn nf4_bytes<D: Device>(device: &D, weight: &Nf4Weight<D>) -> Vec<Vec<u8>> {
    let read = |tensor| device.read(tensor).unwrap();
    let mut all = vec![read(&weight.codes)];
    match &weight.scales {
        Nf4Scales::Flat(absmax) => all.push(read(absmax)),
        Nf4Scales::Nested {
            codes,
            nested_absmax,
            nested_code,
            offset,
        } => all.extend([
            read(codes),
            read(nested_absmax),
            read(nested_code),
            offset.to_le_bytes().to_vec(),
        ]),
    }
    all
}

/// Codes that are all finite, and scales of very different sizes.
fn fp8_matrix([rows, columns]: [usize; 2], block: [usize; 2]) -> (Vec<u8>, Vec<f32>) {
    let codes = (0..rows * columns).map(|i| ((i * 2_654_435_761) >> 7) as u8);
    let codes = codes
        .map(|code| if code & 0x7f == 0x7f { 0x30 } else { code })
        .collect();
    let scales = fp8::scale_extents([rows, columns], block).iter().product::<usize>();
    (codes, (0..scales).map(|i| 0.5f32.powi(i as i32 % 9) * 1.1).collect())
}

#[test]
fn quantising_fp8_is_quantising_its_values_also_in_ragged_blocks() {
    on_every_backend!("quantize_nf4_fp8", [QuantizeNf4], |run| {
        let (cpu, name) = (run.backend, run.backend.name());
        for (shape, block) in [
            ([4, 256], [128, 128]),
            ([130, 192], [128, 128]),
            ([7, 75], [2, 33]),
            ([300, 64], [128, 48]),
        ] {
            let (codes, scales) = fp8_matrix(shape, block);
            let values = fp8::dequantised(&codes, shape[1], &scales, block);
            let grid = fp8::scale_extents(shape, block);
            let codes = cpu.upload(DType::F8E4M3, shape, &codes).unwrap();
            let scales = cpu.upload_f32(grid, &scales).unwrap();
            for nested in [false, true] {
                let direct = cpu.quantize_nf4_fp8(&codes, &scales, block, nested).unwrap();
                let source = cpu.upload_f32(shape, &values).unwrap();
                let through_floats = cpu.quantize_nf4(&source, nested).unwrap();
                assert_eq!(
                    nf4_bytes(cpu, &direct),
                    nf4_bytes(cpu, &through_floats),
                    "{shape:?} in {block:?} on {name}"
                );
            }
        }
        run.case("quantize_nf4_fp8", 0);
    });
}

#[test]
fn fp8_is_quantised_to_the_same_bits_on_every_backend() {
    let cpu = Cpu::with_simd(Some(1), SimdLevel::Portable).unwrap();
    on_every_backend!("quantize_nf4_fp8, bits", [QuantizeNf4], |run| {
        for (shape, block) in [
            ([1, 1], [128, 128]),
            ([4, 256], [128, 128]),
            ([127, 129], [128, 128]),
            ([130, 192], [128, 128]),
            ([7, 75], [2, 33]),
            ([300, 64], [128, 48]),
            ([3, 5], [1, 1]),
        ] {
            let (codes, scales) = fp8_matrix(shape, block);
            let grid = fp8::scale_extents(shape, block);
            for dtype in [DType::F32, DType::BF16] {
                let theirs = (
                    cpu.upload(DType::F8E4M3, shape, &codes).unwrap(),
                    dense(&cpu, dtype, grid, &scales),
                );
                let ours = (
                    run.backend.upload(DType::F8E4M3, shape, &codes).unwrap(),
                    dense(run.backend, dtype, grid, &scales),
                );
                for nested in [false, true] {
                    let theirs = cpu.quantize_nf4_fp8(&theirs.0, &theirs.1, block, nested).unwrap();
                    let ours = run.backend.quantize_nf4_fp8(&ours.0, &ours.1, block, nested).unwrap();
                    assert_eq!(
                        nf4_bytes(run.backend, &ours),
                        nf4_bytes(&cpu, &theirs),
                        "{shape:?} in {block:?} {dtype} nested: {nested} on {}",
                        run.name
                    );
                }
                run.case("quantize_nf4_fp8", 0);
            }
        }
    });
}

#[test]
fn an_fp8_code_that_is_no_number_is_not_quantised() {
    for (_, cpu) in super::backends::cpus() {
        let codes = cpu.upload(DType::F8E4M3, [1, 128], &[[0x30; 127].as_slice(), &[0xff]].concat());
        let scales = cpu.upload_f32([1, 1], &[1.0]).unwrap();
        let failure = cpu
            .quantize_nf4_fp8(&codes.unwrap(), &scales, [128, 128], true)
            .err()
            .unwrap();
        assert!(failure.to_string().contains("from element 64 on"), "{failure}");
    }
}
