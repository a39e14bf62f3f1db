//! Frozen weights in every encoding.

use brightrun_kernels::ops::{Device, QuantizeOps};
use brightrun_kernels::{DType, Tensor, Weight};
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
    for (name, cpu) in super::backends::cpus() {
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
