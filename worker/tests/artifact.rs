//! An artifact is written whole, proven by reading it again, and delivered without remains.

#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use brightrun_worker::artifact::input::{
    BaseModel, DataRecord, DroppedLine, MetricPoint, Program, Proof, ProofSplit, RunMetrics, Sample,
};
use brightrun_worker::artifact::tensors::check_layout;
use brightrun_worker::artifact::{
    AdapterConfig, AdapterDtype, AdapterLayout, AdapterTensor, ArtifactFiles, ArtifactInput, Destination, Manifest,
    artifact_id, object_path, record_verification, upload, verify, write,
};
use brightrun_worker::error::{Blame, Result};
use brightrun_worker::spec::TrainSpec;
use brightrun_worker::storage::{HttpOptions, Storage, StorageConfig, open};
use brightrun_worker::template::PassedFile;
use safetensors::SafeTensors;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use uuid::Uuid;

const LOSS: f64 = 1.25;

fn fixture(case: &str, file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures/peft")
        .join(case)
        .join(file)
}

fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// One adapted module `q_proj` of rank 2: A `[2, 3]`, B `[4, 2]`.
fn tensors() -> Vec<AdapterTensor<'static>> {
    let tensor = |half: &str, shape: [usize; 2], first: f32| AdapterTensor {
        name: format!("base_model.model.model.layers.0.self_attn.q_proj.lora_{half}.weight"),
        shape: shape.to_vec(),
        data: Cow::Owned(
            (0..shape[0] * shape[1])
                .map(|index| first + index as f32 / 3.0)
                .collect(),
        ),
    };
    vec![tensor("B", [4, 2], -1.0), tensor("A", [2, 3], 0.1)]
}

/// A file as it was used.
fn passed(path: &Path, used: &[u8]) -> PassedFile {
    PassedFile {
        path: path.to_owned(),
        sha256: hex::encode(Sha256::digest(used)),
    }
}

fn layout(dtype: AdapterDtype) -> AdapterLayout {
    AdapterLayout {
        rank: 2,
        alpha: 4.0,
        target_modules: vec!["q_proj".to_owned()],
        target_parameters: Vec::new(),
        dtype,
    }
}

fn base() -> BaseModel {
    BaseModel {
        id: "Example/Model".to_owned(),
        revision: Some("0123abc".to_owned()),
        config_sha256: "c0".repeat(32),
        checkpoint_fingerprint: "f1".repeat(32),
    }
}

fn spec() -> TrainSpec {
    TrainSpec {
        rank: 2,
        targets: vec!["q_proj".to_owned()],
        ..TrainSpec::default()
    }
}

fn data() -> DataRecord {
    DataRecord {
        name: "Support | *answers*".to_owned(),
        sha256: "ab".repeat(32),
        bytes: 1234,
        lines: 15,
        training_examples: 12,
        validation_examples: 2,
        trimmed_examples: 1,
        dropped: vec![DroppedLine {
            line: 7,
            code: "DATA_EMPTY_ANSWER".to_owned(),
            reason: "The answer is empty".to_owned(),
        }],
    }
}

const POINT: MetricPoint = MetricPoint {
    step: 1,
    epoch: 1,
    loss: 2.5,
    validation_loss: None,
    learning_rate: 1e-4,
    gradient_norm: f64::INFINITY,
    tokens_per_second: 100.0,
};

fn input<'a>(spec: &'a TrainSpec, issues: &'a [Value], samples: &'a [Sample]) -> ArtifactInput<'a> {
    ArtifactInput {
        job_id: Uuid::from_u128(1),
        base: base(),
        spec,
        adapter: layout(AdapterDtype::F32),
        tensors: tensors(),
        data: data(),
        metrics: RunMetrics {
            first_training_loss: Some(2.5),
            last_training_loss: Some(1.0),
            steps: 9,
            epochs: 3,
            ..RunMetrics::default()
        },
        proof: Proof {
            split: ProofSplit::HeldOut,
            loss: LOSS,
            examples: 2,
            supervised_tokens: 40,
        },
        points: std::slice::from_ref(&POINT),
        issues,
        samples,
        copied_files: Vec::new(),
        template_sha256: "7e".repeat(32),
        warnings: vec!["One line was dropped".to_owned()],
        program: Program {
            version: "0.1.0".to_owned(),
            git_revision: None,
            backend: "cpu".to_owned(),
        },
        created_at: chrono::DateTime::from_timestamp(1_767_225_600, 0).unwrap(),
    }
}

/// A written artifact in a folder of its own.
fn written() -> (tempfile::TempDir, ArtifactFiles) {
    let folder = tempfile::tempdir().unwrap();
    let files = write(&folder.path().join("adapter"), &input(&spec(), &[], &[])).unwrap();
    (folder, files)
}

fn proven(_: &Path) -> Result<f64> {
    Ok(LOSS)
}

#[track_caller]
fn check_code<T: std::fmt::Debug>(result: Result<T>, code: &str) {
    let failure = result.expect_err(code);
    assert_eq!(failure.code, code, "{failure}");
}

/// Changes the manifest as someone would who wants a damaged file to pass.
fn forge_manifest(dir: &Path, change: impl FnOnce(&mut Value)) {
    let path = dir.join("manifest.json");
    let mut manifest = read_json(&path);
    change(&mut manifest);
    fs::write(path, manifest.to_string()).unwrap();
}

/// Replaces a file and makes the manifest agree with it.
fn replace_and_sign(dir: &Path, name: &str, content: &[u8]) {
    fs::write(dir.join(name), content).unwrap();
    forge_manifest(dir, |manifest| {
        manifest["files"][name] = json!({ "bytes": content.len(), "sha256": hex::encode(Sha256::digest(content)) });
    });
}

/// The weights file anew, its tensors changed.
fn changed_weights(dir: &Path, change: impl FnOnce(&mut BTreeMap<String, (Vec<usize>, Vec<f32>)>)) {
    let bytes = fs::read(dir.join("adapter_model.safetensors")).unwrap();
    let mut tensors: BTreeMap<_, _> = SafeTensors::deserialize(&bytes)
        .unwrap()
        .tensors()
        .into_iter()
        .map(|(name, view)| {
            let values = view
                .data()
                .chunks_exact(4)
                .map(|value| f32::from_le_bytes(value.try_into().unwrap()));
            (name, (view.shape().to_vec(), values.collect::<Vec<_>>()))
        })
        .collect();
    change(&mut tensors);
    let raw: BTreeMap<_, (_, Vec<u8>)> = tensors
        .into_iter()
        .map(|(name, (shape, values))| {
            (
                name,
                (shape, values.iter().flat_map(|value| value.to_le_bytes()).collect()),
            )
        })
        .collect();
    let views = raw.iter().map(|(name, (shape, bytes))| {
        let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes).unwrap();
        (name, view)
    });
    let bytes = safetensors::serialize(views, None).unwrap();
    replace_and_sign(dir, "adapter_model.safetensors", &bytes);
}

#[test]
fn the_configuration_has_pefts_keys_and_values() {
    for (case, rank, alpha) in [
        ("qwen3", 8, 16.0),
        ("qwen3_moe_experts", 4, 8.0),
        ("qwen3_next", 8, 16.0),
    ] {
        let golden = read_json(&fixture(case, "adapter_config.json"));
        let names = |key: &str| -> Vec<String> {
            let list = golden[key].as_array().cloned().unwrap_or_default();
            list.iter().map(|name| name.as_str().unwrap().to_owned()).collect()
        };
        let mut target_modules = names("target_modules");
        target_modules.reverse();
        let layout = AdapterLayout {
            rank,
            alpha,
            target_modules,
            target_parameters: names("target_parameters"),
            dtype: AdapterDtype::F32,
        };
        let base = BaseModel {
            id: case.to_owned(),
            revision: None,
            ..base()
        };
        let config = serde_json::to_value(AdapterConfig::new(&layout, &base).unwrap()).unwrap();
        assert_eq!(config, golden, "{case}");
        let keys = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
        assert_eq!(keys(&config), keys(&golden), "{case}: the order too");
    }
}

#[test]
fn pefts_own_adapters_pass_the_layout_check() {
    for case in ["qwen3", "qwen3_moe_experts", "qwen3_next"] {
        let config: AdapterConfig = serde_json::from_value(read_json(&fixture(case, "adapter_config.json"))).unwrap();
        let shapes: BTreeMap<String, Vec<usize>> =
            serde_json::from_value(read_json(&fixture(case, "shapes.json"))).unwrap();
        assert_eq!(check_layout(&config, &shapes), Ok(()), "{case}");
        for name in shapes.keys() {
            let mut without = shapes.clone();
            without.remove(name);
            check_code(check_layout(&config, &without), "ADAPTER_TENSOR_MISSING");
        }
    }
}

#[test]
fn pefts_tensors_are_written_byte_for_byte_as_peft_wrote_them() {
    let golden = fs::read(fixture("qwen3", "adapter_model.safetensors")).unwrap();
    let config = read_json(&fixture("qwen3", "adapter_config.json"));
    let parsed = SafeTensors::deserialize(&golden).unwrap();
    let spec = TrainSpec { rank: 8, ..spec() };
    let mut run = input(&spec, &[], &[]);
    run.adapter.rank = 8;
    run.adapter.target_modules = serde_json::from_value(config["target_modules"].clone()).unwrap();
    run.tensors = parsed
        .tensors()
        .into_iter()
        .map(|(name, view)| AdapterTensor {
            name,
            shape: view.shape().to_vec(),
            data: view
                .data()
                .chunks_exact(4)
                .map(|value| f32::from_le_bytes(value.try_into().unwrap()))
                .collect(),
        })
        .collect();
    let folder = tempfile::tempdir().unwrap();
    let files = write(&folder.path().join("adapter"), &run).unwrap();
    assert!(fs::read(files.dir.join("adapter_model.safetensors")).unwrap() == golden);
    assert!(verify(&files.dir, proven).is_ok());
}

#[test]
fn an_artifact_has_its_files_and_verifies() {
    let folder = tempfile::tempdir().unwrap();
    let tokenizer = folder.path().join("tokenizer.json");
    fs::write(&tokenizer, "{}").unwrap();
    let spec = spec();
    let issues = [json!({ "line": 7, "code": "DATA_EMPTY_ANSWER" })];
    let samples = [Sample {
        prompt: "p".to_owned(),
        base: "b".to_owned(),
        adapter: "a".to_owned(),
    }];
    let mut run = input(&spec, &issues, &samples);
    run.copied_files = vec![passed(&tokenizer, b"{}")];
    let files = write(&folder.path().join("adapter"), &run).unwrap();
    let names: Vec<&str> = files.files.iter().map(|file| file.name.as_str()).collect();
    let expected = [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "manifest.json",
        "metrics.jsonl",
        "samples.jsonl",
        "tokenizer.json",
        "validation.jsonl",
    ];
    assert_eq!(names, expected);
    let metrics = fs::read_to_string(files.dir.join("metrics.jsonl")).unwrap();
    let point: Value = serde_json::from_str(metrics.trim_end()).unwrap();
    assert_eq!(
        (&point["loss"], &point["gradient_norm"]),
        (&json!(2.5), &Value::Null),
        "{metrics}"
    );
    let weights = fs::read(files.dir.join("adapter_model.safetensors")).unwrap();
    let (_, header) = SafeTensors::read_metadata(&weights).unwrap();
    assert_eq!(header.metadata().as_ref().unwrap()["format"], "pt");

    let verification = verify(&files.dir, proven).unwrap();
    assert_eq!(
        (verification.tensors, verification.parameters, verification.files),
        (2, 14, 7)
    );
    let recorded = record_verification(&files.dir, &verification).unwrap();
    let manifest: Manifest = serde_json::from_value(read_json(&files.dir.join("manifest.json"))).unwrap();
    assert_eq!(manifest.verification.as_ref(), Some(&verification));
    assert_eq!(manifest.spec, spec);
    assert_eq!(manifest.artifact_id, artifact_id(Uuid::from_u128(1)));
    assert_eq!(recorded.files.len(), files.files.len());
    assert_ne!(recorded.files, files.files, "the manifest's hash is a new one");
    assert_eq!(verify(&files.dir, proven), Ok(verification), "and all still verifies");
}

#[test]
fn the_model_card_says_what_matters_and_keeps_foreign_text_as_text() {
    let (_folder, files) = written();
    let card = fs::read_to_string(files.dir.join("README.md")).unwrap();
    assert!(
        card.starts_with("---\nbase_model: \"Example/Model\"\nlibrary_name: peft\n"),
        "{card}"
    );
    for part in [
        "Support \\| \\*answers\\*",
        "line 7: The answer is empty",
        &"ab".repeat(32),
        "PeftModel.from_pretrained",
        "vllm serve",
        "One line was dropped",
        "not measured",
    ] {
        assert!(card.contains(part), "{part} is missing in\n{card}");
    }
}

#[test]
fn equal_runs_give_equal_bytes_whatever_the_order_of_tensors() {
    let folder = tempfile::tempdir().unwrap();
    let spec = spec();
    let mut reversed = input(&spec, &[], &[]);
    reversed.tensors.reverse();
    let one = write(&folder.path().join("one"), &input(&spec, &[], &[])).unwrap();
    let other = write(&folder.path().join("other"), &reversed).unwrap();
    assert_eq!(one.files, other.files);
}

#[test]
fn bfloat16_is_half_the_size_rounds_to_nearest_and_has_a_wider_tolerance() {
    let folder = tempfile::tempdir().unwrap();
    let spec = spec();
    let mut run = input(&spec, &[], &[]);
    run.adapter = layout(AdapterDtype::Bf16);
    let files = write(&folder.path().join("adapter"), &run).unwrap();
    let bytes = fs::read(files.dir.join("adapter_model.safetensors")).unwrap();
    let parsed = SafeTensors::deserialize(&bytes).unwrap();
    for tensor in tensors() {
        let view = parsed.tensor(&tensor.name).unwrap();
        assert_eq!(view.data().len(), 2 * tensor.data.len());
        for (stored, exact) in view.data().chunks_exact(2).zip(tensor.data.iter()) {
            let stored = f32::from_bits(u32::from(u16::from_le_bytes(stored.try_into().unwrap())) << 16);
            // Half a unit in the last of bfloat16's 8 significant bits.
            assert!((stored - exact).abs() <= exact.abs() / 256.0, "{stored} for {exact}");
        }
    }
    assert!(verify(&files.dir, |_| Ok(LOSS + 0.003)).is_ok());
    check_code(verify(&files.dir, |_| Ok(LOSS + 0.005)), "ARTIFACT_LOSS_MISMATCH");
}

#[test]
fn a_second_attempt_replaces_the_first_whole() {
    let (folder, files) = written();
    fs::write(files.dir.join("left-over.txt"), "from an earlier attempt").unwrap();
    let partial = folder.path().join(".adapter.partial");
    fs::create_dir(&partial).unwrap();
    fs::write(partial.join("half"), "of an interrupted attempt").unwrap();
    let again = write(&files.dir, &input(&spec(), &[], &[])).unwrap();
    assert_eq!(again, files);
    assert!(verify(&files.dir, proven).is_ok(), "nothing of the first is left");
    let names: Vec<_> = fs::read_dir(folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(names, ["adapter"]);
}

#[test]
fn a_failed_attempt_leaves_the_earlier_artifact_as_it_was() {
    let (folder, files) = written();
    let spec = spec();
    let mut run = input(&spec, &[], &[]);
    let tokenizer = folder.path().join("tokenizer.json");
    run.copied_files = vec![passed(&tokenizer, b"{}")];
    check_code(write(&files.dir, &run), "STORAGE_IO");
    fs::write(&tokenizer, "[]").unwrap();
    check_code(write(&files.dir, &run), "TOKENIZER_CHANGED");
    fs::remove_file(&tokenizer).unwrap();
    assert!(verify(&files.dir, proven).is_ok());
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn what_does_not_fit_is_not_written() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("adapter");
    let spec = spec();
    let check = |code: &str, change: &dyn Fn(&mut ArtifactInput<'_>)| {
        let mut run = input(&spec, &[], &[]);
        change(&mut run);
        check_code(write(&dir, &run), code);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "{code}");
    };
    check("ADAPTER_TENSOR_MISSING", &|run| drop(run.tensors.pop()));
    check("ADAPTER_TARGET_UNMATCHED", &|run| {
        run.adapter.target_modules.push("k_proj".to_owned())
    });
    check("ADAPTER_TENSOR_UNEXPECTED", &|run| {
        run.adapter.target_modules = vec!["k_proj".to_owned()]
    });
    check("ADAPTER_TENSOR_UNEXPECTED", &|run| {
        run.tensors.push(run.tensors[0].clone())
    });
    check("ADAPTER_TENSOR_UNEXPECTED", &|run| {
        let mut foreign = run.tensors[0].clone();
        foreign.name = "lm_head.weight".to_owned();
        run.tensors.push(foreign);
    });
    check("ADAPTER_SHAPE_MISMATCH", &|run| run.adapter.rank = 3);
    check("ADAPTER_SHAPE_MISMATCH", &|run| run.tensors[0].shape = vec![5, 2]);
    check("ADAPTER_CONFIG_INVALID", &|run| run.adapter.alpha = f32::NAN);
    check("ARTIFACT_NAME_TAKEN", &|run| {
        run.copied_files = vec![passed(Path::new("/x/manifest.json"), b"")]
    });
}

#[test]
fn a_folder_that_cannot_be_written_is_named() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("file"), "in the way").unwrap();
    let written = write(&folder.path().join("file/adapter"), &input(&spec(), &[], &[]));
    check_code(written, "STORAGE_FOLDER_UNWRITABLE");
}

/// Spoils the artifact in a folder.
type Damage<'a> = &'a dyn Fn(&Path);

#[test]
fn every_damage_to_the_files_has_its_code() {
    let damages: [(&str, Damage); 8] = [
        ("ARTIFACT_HASH_MISMATCH", &|dir| {
            let path = dir.join("adapter_model.safetensors");
            let mut bytes = fs::read(&path).unwrap();
            *bytes.last_mut().unwrap() ^= 1;
            fs::write(path, bytes).unwrap();
        }),
        ("ARTIFACT_HASH_MISMATCH", &|dir| {
            let path = dir.join("README.md");
            let card = fs::read_to_string(&path).unwrap();
            fs::write(path, card.replacen("LoRA", "LORA", 1)).unwrap();
        }),
        ("ARTIFACT_SIZE_MISMATCH", &|dir| {
            let path = dir.join("adapter_model.safetensors");
            let bytes = fs::read(&path).unwrap();
            fs::write(path, &bytes[..bytes.len() - 4]).unwrap();
        }),
        ("ARTIFACT_FILE_MISSING", &|dir| {
            fs::remove_file(dir.join("metrics.jsonl")).unwrap()
        }),
        ("ARTIFACT_FILE_UNEXPECTED", &|dir| {
            fs::write(dir.join("extra.bin"), "x").unwrap()
        }),
        ("ARTIFACT_MANIFEST_INVALID", &|dir| {
            fs::remove_file(dir.join("manifest.json")).unwrap()
        }),
        ("ARTIFACT_MANIFEST_INVALID", &|dir| {
            forge_manifest(dir, |manifest| manifest["schema_version"] = json!(2));
        }),
        ("ARTIFACT_MANIFEST_INVALID", &|dir| {
            forge_manifest(dir, |manifest| {
                manifest["files"]["../x"] = json!({ "bytes": 0, "sha256": "" })
            });
        }),
    ];
    for (code, damage) in damages {
        let (_folder, files) = written();
        damage(&files.dir);
        check_code(
            verify(&files.dir, |_| panic!("a damaged adapter must not be loaded")),
            code,
        );
    }
}

#[test]
fn every_fault_of_an_adapter_has_its_code_even_when_the_hashes_agree() {
    const A: &str = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";
    const B: &str = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight";
    let faults: [(&str, Damage); 10] = [
        ("ADAPTER_UNTRAINED", &|dir| {
            changed_weights(dir, |all| all.get_mut(B).unwrap().1.fill(0.0))
        }),
        ("ADAPTER_NOT_FINITE", &|dir| {
            changed_weights(dir, |all| all.get_mut(A).unwrap().1[1] = f32::NAN)
        }),
        ("ADAPTER_NOT_FINITE", &|dir| {
            changed_weights(dir, |all| all.get_mut(B).unwrap().1[7] = f32::INFINITY)
        }),
        ("ADAPTER_TENSOR_MISSING", &|dir| {
            changed_weights(dir, |all| drop(all.remove(A)))
        }),
        ("ADAPTER_TENSOR_UNEXPECTED", &|dir| {
            changed_weights(dir, |all| drop(all.insert("extra".to_owned(), (vec![1], vec![1.0]))));
        }),
        ("ADAPTER_SHAPE_MISMATCH", &|dir| {
            changed_weights(dir, |all| all.get_mut(A).unwrap().0 = vec![3, 2]);
        }),
        ("ADAPTER_UNREADABLE", &|dir| {
            let bytes = fs::read(dir.join("adapter_model.safetensors")).unwrap();
            replace_and_sign(dir, "adapter_model.safetensors", &bytes[..bytes.len() - 4]);
        }),
        ("ADAPTER_UNREADABLE", &|dir| {
            replace_and_sign(dir, "adapter_model.safetensors", &[0xff; 32])
        }),
        ("ADAPTER_CONFIG_INVALID", &|dir| {
            replace_and_sign(dir, "adapter_config.json", b"{}")
        }),
        ("ADAPTER_CONFIG_INVALID", &|dir| {
            let mut config = read_json(&dir.join("adapter_config.json"));
            config["base_model_name_or_path"] = json!("Another/Model");
            replace_and_sign(dir, "adapter_config.json", config.to_string().as_bytes());
        }),
    ];
    for (code, fault) in faults {
        let (_folder, files) = written();
        fault(&files.dir);
        check_code(
            verify(&files.dir, |_| panic!("a faulty adapter must not be used")),
            code,
        );
    }
}

#[test]
fn a_loss_that_does_not_come_back_is_refused() {
    let (_folder, files) = written();
    for wrong in [LOSS + 1e-4, LOSS - 1e-4, f64::NAN, f64::INFINITY] {
        check_code(verify(&files.dir, |_| Ok(wrong)), "ARTIFACT_LOSS_MISMATCH");
    }
    let seen = verify(&files.dir, |dir| {
        assert!(
            dir.join("adapter_model.safetensors").exists(),
            "the loss is computed from the saved files"
        );
        Ok(LOSS + 1e-6)
    });
    assert_eq!(seen.unwrap().recomputed_loss, LOSS + 1e-6);
}

#[test]
fn the_id_of_an_artifact_never_changes() {
    // From Python: uuid.UUID(bytes=sha1(b"brightRunArtifac" + job.bytes).digest()[:16], version=5).
    let job = Uuid::parse_str("12345678-1234-5678-1234-567812345678").unwrap();
    assert_eq!(artifact_id(job).to_string(), "6cf8b594-2787-5487-9d19-3a8412fc13f0");
}

fn destination() -> Destination {
    Destination::new(Uuid::from_u128(2), artifact_id(Uuid::from_u128(1)))
}

fn local(root: &Path) -> std::sync::Arc<dyn Storage> {
    open(
        &StorageConfig::Local {
            root: root.to_path_buf(),
        },
        &HttpOptions::default(),
    )
    .unwrap()
}

#[tokio::test]
async fn an_upload_leaves_exactly_the_artifacts_files() {
    let (folder, files) = written();
    let storage = local(&folder.path().join("storage"));
    let to = destination();
    let left_over = object_path(to.user_id, to.artifact_id, "old.bin");
    storage
        .put_bytes("lora-models", &left_over, "of an earlier attempt".into(), "x/y")
        .await
        .unwrap();
    let foreign = object_path(to.user_id, Uuid::from_u128(9), "old.bin");
    storage
        .put_bytes("lora-models", &foreign, "another artifact's".into(), "x/y")
        .await
        .unwrap();
    for _attempt in 0..2 {
        let mut seen = Vec::new();
        let paths = upload(&*storage, &to, &files, |progress| seen.push(progress))
            .await
            .unwrap();
        let last = seen.last().unwrap();
        assert_eq!((last.files, last.bytes), (last.total_files, last.total_bytes));
        assert_eq!(seen.len(), files.files.len());
        let stored = storage
            .list("lora-models", &format!("{}/{}", to.user_id, to.artifact_id))
            .await
            .unwrap();
        let names: Vec<&str> = stored.iter().map(|entry| entry.name.as_str()).collect();
        assert_eq!(
            names,
            files.files.iter().map(|file| file.name.as_str()).collect::<Vec<_>>()
        );
        for file in &files.files {
            let copy = folder.path().join("copy");
            let fetched = storage
                .get_to_file("lora-models", &paths[&file.name], &copy)
                .await
                .unwrap();
            assert_eq!((fetched.bytes, &fetched.sha256), (file.bytes, &file.sha256));
        }
    }
    assert!(
        storage.head("lora-models", &foreign).await.unwrap().is_some(),
        "others are left alone"
    );
}

#[tokio::test]
async fn a_file_above_the_buckets_limit_is_refused_before_anything_is_stored() {
    let (folder, files) = written();
    let storage = local(&folder.path().join("storage"));
    let to = Destination {
        file_limit_bytes: 100,
        ..destination()
    };
    let failure = upload(&*storage, &to, &files, |_| {}).await.unwrap_err();
    assert_eq!(
        (failure.code.as_str(), failure.blame),
        ("ARTIFACT_TOO_LARGE", Blame::User),
        "{failure}"
    );
    assert!(!folder.path().join("storage").exists());
}
