//! Frozen weights in every encoding.

use brightrun_kernels::ops::{Device, QuantizeOps};
use brightrun_kernels::{DType, Nf4Scales, Nf4Weight, Tensor, Weight, fp8};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

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

/// A weight of these values in an encoding, and the values it then has.
pub fn weight<D: QuantizeOps>(
    device: &D,
    encoding: Encoding,
    shape: [usize; 2],
    values: &[f32],
) -> (Weight<D>, Vec<f32>) {
    let weight = match encoding {
        Encoding::F32 => Weight::Dense(dense(device, DType::F32, shape, values)),
        Encoding::Bf16 => Weight::Dense(dense(device, DType::BF16, shape, values)),
        Encoding::F16 => Weight::Dense(dense(device, DType::F16, shape, values)),
        Encoding::Nf4 | Encoding::Nf4Nested => {
            let source = device.upload_f32(shape, values).unwrap();
            Weight::Nf4(device.quantize_nf4(&source, encoding == Encoding::Nf4Nested).unwrap())
        }
    };
    let mut decoded = device.alloc(DType::F32, shape).unwrap();
    device.dequantize(&weight, &mut decoded).unwrap();
    let decoded = device.read_f32(&decoded).unwrap();
    (weight, decoded)
}

#[test]
fn dense_weights_decode_to_their_own_values() {
    for (name, cpu) in super::backends::backends() {
        for (encoding, values) in [
            (Encoding::F32, [0.1, -3.0]),
            (Encoding::Bf16, [0.5, -3.0]),
            (Encoding::F16, [0.25, 7.0]),
        ] {
            let (_, decoded) = weight(&cpu, encoding, [1, 2], &values);
            assert_eq!(decoded, values, "{encoding:?} on {name}");
        }
    }
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
    for (name, cpu) in super::backends::backends() {
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
                    nf4_bytes(&cpu, &direct),
                    nf4_bytes(&cpu, &through_floats),
                    "{shape:?} in {block:?} on {name}"
                );
            }
        }
    }
}

#[test]
fn an_fp8_code_that_is_no_number_is_not_quantised() {
    for (_, cpu) in super::backends::backends() {
        let codes = cpu.upload(DType::F8E4M3, [1, 128], &[[0x30; 127].as_slice(), &[0xff]].concat());
        let scales = cpu.upload_f32([1, 1], &[1.0]).unwrap();
        let failure = cpu
            .quantize_nf4_fp8(&codes.unwrap(), &scales, [128, 128], true)
            .err()
            .unwrap();
        assert!(failure.to_string().contains("from element 64 on"), "{failure}");
    }
}
