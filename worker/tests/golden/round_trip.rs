//! Checkpoints whose projections went through NF4 and back.

use std::collections::BTreeMap;
use std::path::Path;

use brightrun_kernels::{Backend, DType, Nf4Scales, Nf4Weight, Shape, Weight};
use brightrun_worker::error::Failure;
use brightrun_worker::model::ModelConfig;
use brightrun_worker::model::checkpoint::Checkpoint;
use brightrun_worker::model::tensor_file::HostTensor;
use safetensors::tensor::{Dtype, TensorView};
use tempfile::TempDir;

/// NF4's values (Dettmers et al. 2023, arXiv 2305.14314, appendix E).
const CODE: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

const BLOCK: usize = 64;
const NESTED_BLOCK: usize = 256;

/// Who turns codes and scales into values.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Decoding {
    /// This program: the scale of an element's block, rounded to bfloat16.
    Ours,
    /// bitsandbytes 0.50 on the CPU that made the cases, from a float32 matrix: nothing is rounded, and where the row length is a
    /// multiple of 16 its vector code counts `row length / 64`, rounded down, blocks a row. For rows that are no multiple of 64
    /// this takes scales of other blocks: a defect of the peer's CPU code (its CUDA code has none), recorded in the cases, and
    /// found here by comparing its decoded values with its own codes and scales.
    Peer,
}

/// Writes the checkpoint in `source` to a temporary folder, each projection whose name ends in one of `suffixes` quantised and
/// decoded, in f32.
pub fn write<B: Backend>(
    device: &B,
    source: &Path,
    suffixes: &[String],
    decoding: Decoding,
) -> Result<TempDir, Failure> {
    let checkpoint = Checkpoint::open(source)?.with_fp8_blocks(ModelConfig::load(source)?.fp8_block)?;
    let mut tensors = BTreeMap::new();
    for name in checkpoint.names().filter(|name| !name.ends_with("_scale_inv")) {
        let host = checkpoint.read(name)?;
        let module = name.strip_suffix(".weight").unwrap_or(name);
        let is_quantised = host.shape.len() == 2 && suffixes.iter().any(|suffix| module.ends_with(suffix.as_str()));
        let tensor = if is_quantised {
            round_trip(device, &host, decoding)?
        } else {
            host.widened()?
        };
        tensors.insert(name.to_owned(), tensor);
    }
    let views = tensors.iter().map(|(name, tensor)| {
        (
            name,
            TensorView::new(Dtype::F32, tensor.shape.clone(), &tensor.bytes).unwrap(),
        )
    });
    let folder = tempfile::tempdir().unwrap();
    let file = safetensors::serialize(views, None).unwrap();
    std::fs::write(folder.path().join("model.safetensors"), file).unwrap();
    std::fs::copy(source.join("config.json"), folder.path().join("config.json")).unwrap();
    Ok(folder)
}

fn round_trip<B: Backend>(device: &B, host: &HostTensor, decoding: Decoding) -> Result<HostTensor, Failure> {
    let shape = Shape::new(&host.shape);
    let weight = device.quantize_nf4(&device.upload(host.dtype, shape, &host.bytes)?, true)?;
    let values = match decoding {
        Decoding::Peer => decoded_by_the_peer(device, &weight)?,
        Decoding::Ours => {
            let mut decoded = device.alloc(DType::F32, shape)?;
            device.dequantize(&Weight::Nf4(weight), &mut decoded)?;
            device.read_f32(&decoded)?
        }
    };
    Ok(HostTensor {
        dtype: DType::F32,
        shape: host.shape.clone(),
        bytes: bytemuck::allocation::pod_collect_to_vec(&values),
    })
}

fn decoded_by_the_peer<B: Backend>(device: &B, weight: &Nf4Weight<B>) -> Result<Vec<f32>, Failure> {
    let codes = device.read(&weight.codes)?;
    let scales = flat_scales(device, &weight.scales)?;
    let width = weight.inputs;
    let block = |row: usize, column: usize| match width.is_multiple_of(16) {
        true => row * (width / BLOCK) + column / BLOCK,
        false => (row * width + column) / BLOCK,
    };
    Ok((0..weight.outputs * width)
        .map(|element| {
            let code = codes[element / 2] >> (4 * (1 - element % 2)) & 15;
            CODE[usize::from(code)] * scales[block(element / width, element % width)]
        })
        .collect())
}

fn flat_scales<B: Backend>(device: &B, scales: &Nf4Scales<B>) -> Result<Vec<f32>, Failure> {
    match scales {
        Nf4Scales::Flat(absmax) => Ok(device.read_f32(absmax)?),
        Nf4Scales::Nested {
            codes,
            nested_absmax,
            nested_code,
            offset,
        } => {
            let (map, absmax) = (device.read_f32(nested_code)?, device.read_f32(nested_absmax)?);
            let codes = device.read(codes)?.into_iter().enumerate();
            Ok(codes
                .map(|(block, code)| map[usize::from(code)] * absmax[block / NESTED_BLOCK] + offset)
                .collect())
        }
    }
}
