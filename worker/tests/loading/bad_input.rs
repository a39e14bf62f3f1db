//! Checkpoints that must not be loaded: each is refused with its own code, before or while it is read.

use brightrun_worker::model::load::snapshot::folder::FOLDER;
use brightrun_worker::model::synthetic::SyntheticDtype;
use brightrun_worker::model::tensor_file::TensorFile;
use brightrun_worker::model::{Encoding, ModelRoots};

use super::support::{checkpoint, failure, load, logits, shards, snapshots};

/// Changes the text of a file.
fn edit(path: &std::path::Path, change: impl Fn(String) -> String) {
    let text = std::fs::read_to_string(path).unwrap();
    let changed = change(text.clone());
    assert_ne!(text, changed, "the edit changes something");
    std::fs::write(path, changed).unwrap();
}

/// Overwrites bytes of a tensor in whichever shard holds it.
fn overwrite(folder: &std::path::Path, tensor: &str, from: usize, bytes: &[u8]) {
    for shard in shards(folder) {
        let place = TensorFile::open(&shard)
            .unwrap()
            .tensors()
            .get(tensor)
            .map(|stored| stored.offset() as usize);
        if let Some(place) = place {
            let mut file = std::fs::read(&shard).unwrap();
            file[place + from..][..bytes.len()].copy_from_slice(bytes);
            return std::fs::write(&shard, file).unwrap();
        }
    }
    panic!("no shard holds {tensor}");
}

#[test]
fn every_missing_shard_is_named_at_once() {
    let folder = checkpoint(SyntheticDtype::Fp8);
    let shards = shards(folder.path());
    assert!(shards.len() >= 4);
    for shard in [&shards[0], &shards[2]] {
        std::fs::remove_file(shard).unwrap();
    }
    let failure = failure(folder.path());
    assert_eq!(failure.code, "MODEL_FILE_MISSING");
    for shard in [&shards[0], &shards[2]] {
        let name = shard.file_name().unwrap().to_str().unwrap();
        assert!(failure.message.contains(name), "{failure}");
    }
}

#[test]
fn every_truncated_shard_is_named_at_once_with_its_lengths() {
    let folder = checkpoint(SyntheticDtype::Bf16);
    let shards = shards(folder.path());
    for shard in [&shards[1], &shards[3]] {
        let bytes = std::fs::read(shard).unwrap();
        std::fs::write(shard, &bytes[..bytes.len() - 100]).unwrap();
    }
    let failure = failure(folder.path());
    assert_eq!(failure.code, "MODEL_FILE_DAMAGED");
    for shard in [&shards[1], &shards[3]] {
        let name = shard.file_name().unwrap().to_str().unwrap();
        assert!(failure.message.contains(name), "{failure}");
    }
    assert!(failure.message.contains("2 of"), "{failure}");
}

#[test]
fn shards_without_their_index_are_no_checkpoint() {
    let folder = checkpoint(SyntheticDtype::Bf16);
    std::fs::remove_file(folder.path().join("model.safetensors.index.json")).unwrap();
    let failure = failure(folder.path());
    assert_eq!(failure.code, "MODEL_FILE_MISSING");
    assert!(failure.message.contains("index.json"), "{failure}");
}

#[test]
fn an_index_that_names_absent_files_or_tensors_is_refused() {
    let folder = checkpoint(SyntheticDtype::Bf16);
    let index = folder.path().join("model.safetensors.index.json");
    let whole = std::fs::read_to_string(&index).unwrap();
    edit(&index, |text| {
        text.replacen(
            "\"weight_map\": {",
            "\"weight_map\": {\"extra\": \"model-99999-of-99999.safetensors\",",
            1,
        )
    });
    let absent = failure(folder.path());
    assert_eq!(absent.code, "MODEL_FILE_MISSING");
    assert!(absent.message.contains("model-99999"), "{absent}");
    let name = shards(folder.path())[0]
        .file_name()
        .unwrap()
        .to_str()
        .unwrap()
        .to_owned();
    std::fs::write(&index, whole).unwrap();
    edit(&index, |text| {
        text.replacen(
            "\"weight_map\": {",
            &format!("\"weight_map\": {{\"extra\": \"{name}\","),
            1,
        )
    });
    assert_eq!(failure(folder.path()).code, "MODEL_TENSOR_MISSING");
}

#[test]
fn weights_of_a_type_that_is_none_of_weights_are_refused() {
    let folder = checkpoint(SyntheticDtype::Bf16);
    for shard in shards(folder.path()) {
        let bytes = std::fs::read(&shard).unwrap();
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header = std::str::from_utf8(&bytes[8..8 + length]).unwrap();
        let from = "\"model.layers.1.input_layernorm.weight\":{\"dtype\":\"BF16\"";
        if header.contains(from) {
            // As wide as bf16, so that only the type is wrong.
            let mut header = header.replace(from, &from.replace("BF16", "I16")).into_bytes();
            header.resize(header.len().next_multiple_of(8), b' ');
            let file = [
                &(header.len() as u64).to_le_bytes(),
                header.as_slice(),
                &bytes[8 + length..],
            ]
            .concat();
            std::fs::write(&shard, file).unwrap();
        }
    }
    let refused = failure(folder.path());
    assert_eq!(refused.code, "MODEL_UNSUPPORTED");
    assert!(refused.message.contains("input_layernorm"), "{refused}");
}

#[test]
fn a_weight_that_is_no_number_is_named_with_its_element_in_every_stored_type_and_encoding() {
    let expert = "model.layers.1.mlp.experts.5.down_proj.weight";
    let cases: [(SyntheticDtype, &str, usize, &[u8], usize); 5] = [
        (SyntheticDtype::Bf16, expert, 66, &[0xc0, 0x7f], 33),
        (SyntheticDtype::Fp8, expert, 70, &[0x7f], 70),
        (SyntheticDtype::Bf16, "model.norm.weight", 8, &[0x80, 0xff], 4),
        (SyntheticDtype::Fp8, "lm_head.weight", 10, &[0x80, 0x7f], 5),
        (
            SyntheticDtype::Fp8,
            "model.layers.0.linear_attn.out_proj.weight_scale_inv",
            0,
            &[0x80, 0x7f],
            0,
        ),
    ];
    for (dtype, tensor, from, bytes, element) in cases {
        let folder = checkpoint(dtype);
        overwrite(folder.path(), tensor, from, bytes);
        for encoding in [Encoding::Nf4, Encoding::Nf4Experts, Encoding::Bf16, Encoding::Stored] {
            let failure = load(folder.path(), encoding, None).err().unwrap();
            assert_eq!(failure.code, "MODEL_NON_FINITE", "{tensor} {encoding:?}: {failure}");
            let words = format!("Element {element} of the tensor `{tensor}`");
            assert!(failure.message.contains(&words), "{encoding:?}: {failure}");
            assert!(failure.place.ends_with(".safetensors"), "{failure}");
        }
    }
}

#[test]
fn a_damaged_checkpoint_leaves_no_snapshot_behind() {
    let folder = checkpoint(SyntheticDtype::Fp8);
    overwrite(
        folder.path(),
        "model.layers.1.mlp.experts.5.down_proj.weight",
        3,
        &[0xff],
    );
    assert!(load(folder.path(), Encoding::Nf4, Some(snapshots())).is_err());
    let left: Vec<_> = std::fs::read_dir(folder.path().join(FOLDER)).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn fp8_without_its_scales_and_scales_without_fp8_are_refused() {
    let folder = checkpoint(SyntheticDtype::Fp8);
    let index = folder.path().join("model.safetensors.index.json");
    let scales = "model.layers.0.mlp.experts.1.up_proj.weight_scale_inv";
    edit(&index, |text| text.replace(&format!("\"{scales}\""), "\"other\""));
    // The index now names a tensor that is nowhere; without the line the scales themselves are missing.
    assert_eq!(failure(folder.path()).code, "MODEL_TENSOR_MISSING");
    edit(&index, |text| {
        let lines: Vec<&str> = text.lines().filter(|line| !line.contains("\"other\"")).collect();
        lines.join("\n")
    });
    let missing = failure(folder.path());
    assert_eq!(missing.code, "MODEL_FP8_SCALES", "{missing}");
    assert!(missing.message.contains("experts.1.up_proj"), "{missing}");
    let plain = checkpoint(SyntheticDtype::Fp8);
    edit(&plain.path().join("config.json"), |text| {
        text.replace("quantization_config", "other_config")
    });
    assert_eq!(failure(plain.path()).code, "MODEL_FP8_SCALES");
}

#[test]
fn a_configuration_that_lies_about_shapes_or_names_another_architecture_is_refused() {
    let folder = checkpoint(SyntheticDtype::Bf16);
    let config = folder.path().join("config.json");
    let whole = std::fs::read_to_string(&config).unwrap();
    edit(&config, |text| {
        text.replace("\"moe_intermediate_size\": 40", "\"moe_intermediate_size\": 48")
    });
    let lie = failure(folder.path());
    assert_eq!(lie.code, "MODEL_TENSOR_SHAPE");
    assert!(
        lie.message.contains("[48, 64]") && lie.message.contains("[40, 64]"),
        "{lie}"
    );
    std::fs::write(&config, whole).unwrap();
    edit(&config, |text| text.replace("\"qwen3_next\"", "\"mamba9\""));
    let unknown = failure(folder.path());
    assert_eq!(unknown.code, "MODEL_UNSUPPORTED");
    assert!(unknown.message.contains("mamba9"), "{unknown}");
}

#[test]
fn a_name_that_is_no_folder_is_never_downloaded() {
    let roots = ModelRoots::default();
    let given = roots
        .locate(Some(std::path::Path::new("Org/Model")), "Org/Model")
        .unwrap_err();
    assert_eq!(given.code, "MODEL_PATH_MISSING");
    assert_eq!(roots.locate(None, "Org/Model").unwrap_err().code, "MODEL_NOT_FOUND");
}

#[test]
fn experts_in_four_bits_leave_everything_else_in_bf16() {
    let folder = checkpoint(SyntheticDtype::Fp8);
    let (mixed, _) = load(folder.path(), Encoding::Nf4Experts, None).unwrap();
    let (halves, _) = load(folder.path(), Encoding::Bf16, None).unwrap();
    let (quantised, _) = load(folder.path(), Encoding::Nf4, None).unwrap();
    // 2 layers × 8 experts × 3 matrices of 40 × 64, two bytes each.
    let experts = 2 * 8 * 3 * 40 * 64 * 2;
    assert_eq!(
        mixed.weight_bytes()["bf16"],
        halves.weight_bytes()["bf16"] - experts,
        "{:?}",
        mixed.weight_bytes()
    );
    let four_bits = mixed.weight_bytes()["nf4-nested"];
    assert!(four_bits > experts / 4 && four_bits < quantised.weight_bytes()["nf4-nested"]);
    assert_ne!(logits(&mixed), logits(&halves));
    assert_ne!(logits(&mixed), logits(&quantised));
    assert_ne!(mixed.fingerprint(), quantised.fingerprint());
}
