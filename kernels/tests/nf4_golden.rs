//! NF4 is bit-equal to bitsandbytes: codes, scales, nested scales, offsets and decoded values.
//!
//! Every file `nf4/nf4.safetensors` under `BRIGHTRUN_GOLDEN_DIR` (default: this crate's fixtures) is compared whole; its
//! matrices may have any shape, and any dtype a checkpoint may have.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeSet;
use std::path::PathBuf;

use brightrun_kernels::cpu::Cpu;
use brightrun_kernels::emu::emulated;
use brightrun_kernels::ops::{Device, QuantizeOps};
use brightrun_kernels::{DType, Error, Nf4Scales, Nf4Weight, Tensor, Weight};
use safetensors::SafeTensors;

/// The recorded vectors.
struct Golden {
    bytes: Vec<u8>,
    facts: serde_json::Value,
}

impl Golden {
    fn open() -> Self {
        let folder = match std::env::var_os("BRIGHTRUN_GOLDEN_DIR") {
            Some(folder) => PathBuf::from(folder),
            None => PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures"),
        };
        let folder = folder.join("nf4");
        let read = |name: &str| {
            std::fs::read(folder.join(name)).unwrap_or_else(|e| panic!("{}/{name}: {e}", folder.display()))
        };
        Self {
            bytes: read("nf4.safetensors"),
            facts: serde_json::from_slice(&read("nf4.json")).unwrap(),
        }
    }

    fn tensors(&self) -> SafeTensors<'_> {
        SafeTensors::deserialize(&self.bytes).unwrap()
    }

    /// `m0.plain`, `m0.double`, …
    fn cases(&self) -> BTreeSet<String> {
        let tensors = self.tensors();
        let names = tensors.names().into_iter();
        names
            .filter_map(|name| name.strip_suffix(".weight").map(str::to_owned))
            .collect()
    }
}

/// Bits of a tensor against the recorded ones; the first difference is named.
fn assert_same<D: Device>(device: &D, golden: &Golden, name: &str, tensor: &Tensor<D>) {
    let ours = device.read(tensor).unwrap();
    let tensors = golden.tensors();
    let theirs = tensors
        .tensor(name)
        .unwrap_or_else(|_| panic!("{name} is not recorded"))
        .data();
    assert_eq!(ours.len(), theirs.len(), "{name}: number of bytes");
    let size = tensor.dtype().size_bytes();
    let different = ours
        .chunks(size)
        .zip(theirs.chunks(size))
        .filter(|(a, b)| a != b)
        .count();
    if let Some(at) = ours.iter().zip(theirs).position(|(a, b)| a != b) {
        let range = at / size * size..(at / size + 1) * size;
        panic!(
            "{name}: {different} elements differ, the first at {}: ours {:02x?}, recorded {:02x?}",
            at / size,
            &ours[range.clone()],
            &theirs[range]
        );
    }
}

fn quantized<D: QuantizeOps>(device: &D, golden: &Golden, case: &str) -> Nf4Weight<D> {
    let tensors = golden.tensors();
    let weight = tensors.tensor(&format!("{case}.weight")).unwrap();
    let dtype = match weight.dtype() {
        safetensors::Dtype::F32 => DType::F32,
        safetensors::Dtype::BF16 => DType::BF16,
        safetensors::Dtype::F16 => DType::F16,
        other => panic!("{case}.weight is {other:?}"),
    };
    let source = device
        .upload(dtype, brightrun_kernels::Shape::new(weight.shape()), weight.data())
        .unwrap();
    device.quantize_nf4(&source, case.ends_with("double")).unwrap()
}

fn compare<D: QuantizeOps>(device: &D) {
    let golden = Golden::open();
    let cases = golden.cases();
    assert!(!cases.is_empty(), "no case is recorded");
    let mut decoded = 0;
    for case in &cases {
        let weight = quantized(device, &golden, case);
        match &weight.scales {
            Nf4Scales::Flat(absmax) => assert_same(device, &golden, &format!("{case}.absmax"), absmax),
            Nf4Scales::Nested {
                codes,
                nested_absmax,
                nested_code,
                offset,
            } => {
                let recorded = golden.facts[format!("{case}.offset")].as_f64().unwrap() as f32;
                assert_eq!(
                    offset.to_bits(),
                    recorded.to_bits(),
                    "{case}: offset {offset} against {recorded}"
                );
                assert_same(device, &golden, &format!("{case}.nested_code"), nested_code);
                assert_same(device, &golden, &format!("{case}.nested_absmax"), nested_absmax);
                assert_same(device, &golden, &format!("{case}.absmax"), codes);
            }
        }
        assert_same(device, &golden, &format!("{case}.packed"), &weight.codes);
        let mut values = device.alloc(DType::F32, [weight.outputs, weight.inputs]).unwrap();
        device.dequantize(&Weight::Nf4(weight), &mut values).unwrap();
        // A case may leave the values out where the peer itself is wrong or depends on the machine.
        if golden.tensors().tensor(&format!("{case}.dequantized")).is_ok() {
            assert_same(device, &golden, &format!("{case}.dequantized"), &values);
            decoded += 1;
        }
    }
    assert!(decoded > 0, "no decoded values are recorded");
    let (name, count) = (device.name(), cases.len());
    println!("{name}: {count} cases bit-equal, {decoded} of them with decoded values");
}

#[test]
fn codes_scales_and_values_have_the_peers_bits() {
    compare(&Cpu::new(Some(2)).unwrap());
}

#[test]
fn the_kernels_give_the_same_bits() {
    match emulated(Some(2)) {
        Ok(device) => compare(&device),
        Err(Error::Unsupported { reason, .. }) => println!("emulated: absent: {reason}"),
        Err(error) => panic!("{error}"),
    }
}
