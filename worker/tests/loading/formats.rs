//! The same weights in other layouts are the same model.

use std::collections::BTreeMap;

use brightrun_kernels::DType;
use brightrun_worker::model::Encoding;
use brightrun_worker::model::synthetic::SyntheticDtype;
use brightrun_worker::model::tensor_file::{HostTensor, TensorFile};
use safetensors::tensor::{Dtype, TensorView};
use tempfile::TempDir;

use super::support::{checkpoint, load, logits, shards};

type Tensors = BTreeMap<String, HostTensor>;

/// Every stored tensor of a checkpoint, as it is stored.
fn stored(folder: &std::path::Path) -> Tensors {
    let mut tensors = Tensors::new();
    for shard in shards(folder) {
        let file = TensorFile::open(&shard).unwrap();
        for name in file.tensors().keys() {
            tensors.insert(name.clone(), file.read(name).unwrap());
        }
    }
    tensors
}

fn single_file(tensors: &Tensors, config: &std::path::Path) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let views = tensors.iter().map(|(name, tensor)| {
        let dtype = match tensor.dtype {
            DType::F8E4M3 => Dtype::F8_E4M3,
            DType::F32 => Dtype::F32,
            _ => Dtype::BF16,
        };
        (
            name,
            TensorView::new(dtype, tensor.shape.clone(), &tensor.bytes).unwrap(),
        )
    });
    let file = safetensors::serialize(views, None).unwrap();
    std::fs::write(folder.path().join("model.safetensors"), file).unwrap();
    std::fs::copy(config.join("config.json"), folder.path().join("config.json")).unwrap();
    folder
}

const ENCODINGS: [Encoding; 4] = [Encoding::Nf4, Encoding::Nf4Experts, Encoding::Bf16, Encoding::Stored];

/// Gate and up of an expert share their block of 128 rows here, and the up projection begins in the middle of it.
#[test]
fn fp8_experts_in_stacks_are_the_same_model_as_separate_ones() {
    let source = checkpoint(SyntheticDtype::Fp8);
    let mut separate = stored(source.path());
    let mut stacked = separate.clone();
    stacked.retain(|name, _| !name.contains(".mlp.experts."));
    for layer in 0..2 {
        let name = |expert: usize, rest: &str| format!("model.layers.{layer}.mlp.experts.{expert}.{rest}");
        for expert in 0..8 {
            let scale = separate[&name(expert, "gate_proj.weight_scale_inv")].clone();
            separate.insert(name(expert, "up_proj.weight_scale_inv"), scale);
        }
        let joined = |parts: &[&str], ending: &str| -> Vec<u8> {
            let names = (0..8).flat_map(|expert| parts.iter().map(move |part| (expert, part)));
            names
                .flat_map(|(expert, part)| separate[&name(expert, &format!("{part}{ending}"))].bytes.clone())
                .collect()
        };
        for (projection, parts, shape) in [
            ("gate_up_proj", &["gate_proj", "up_proj"][..], [8, 80, 64]),
            ("down_proj", &["down_proj"][..], [8, 64, 40]),
        ] {
            let path = format!("model.layers.{layer}.mlp.experts.{projection}");
            let codes = HostTensor {
                dtype: DType::F8E4M3,
                shape: shape.to_vec(),
                bytes: joined(parts, ".weight"),
            };
            let scales = HostTensor {
                dtype: DType::BF16,
                shape: vec![8, 1, 1],
                bytes: joined(&parts[..1], ".weight_scale_inv"),
            };
            stacked.insert(format!("{path}_scale_inv"), scales);
            stacked.insert(path, codes);
        }
    }
    let (separate, stacked) = (
        single_file(&separate, source.path()),
        single_file(&stacked, source.path()),
    );
    for encoding in ENCODINGS {
        let of = |folder: &TempDir| logits(&load(folder.path(), encoding, None).unwrap().0);
        assert_eq!(of(&separate), of(&stacked), "{encoding:?}");
    }
}

#[test]
fn scales_in_f32_and_in_bf16_and_one_file_or_many_make_no_difference() {
    let source = checkpoint(SyntheticDtype::Fp8);
    let mut tensors = stored(source.path());
    for (name, tensor) in &mut tensors {
        if name.ends_with("_scale_inv") {
            *tensor = tensor.clone().widened().unwrap();
        }
    }
    let wide = single_file(&tensors, source.path());
    for encoding in ENCODINGS {
        let of = |folder: &TempDir| logits(&load(folder.path(), encoding, None).unwrap().0);
        assert_eq!(of(&source), of(&wide), "{encoding:?}");
    }
}

/// FP8 is decoded on the way: what is loaded is the model of the decoded values, whatever that is kept as.
#[test]
fn fp8_is_the_model_of_its_values() {
    let source = checkpoint(SyntheticDtype::Fp8);
    let mut tensors = stored(source.path());
    let scales: Tensors = tensors
        .iter()
        .filter(|(name, _)| name.ends_with("_scale_inv"))
        .map(|(name, tensor)| (name.clone(), tensor.clone()))
        .collect();
    tensors.retain(|name, _| !name.ends_with("_scale_inv"));
    for (name, tensor) in &mut tensors {
        if tensor.dtype == DType::F8E4M3 {
            let scales = scales[&format!("{name}_scale_inv")].to_f32().unwrap();
            let values = brightrun_kernels::fp8::dequantised(&tensor.bytes, tensor.shape[1], &scales, [128, 128]);
            tensor.dtype = DType::F32;
            tensor.bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        }
    }
    let wide = single_file(&tensors, source.path());
    for encoding in ENCODINGS {
        let of = |folder: &TempDir| logits(&load(folder.path(), encoding, None).unwrap().0);
        assert_eq!(of(&source), of(&wide), "{encoding:?}");
    }
}
