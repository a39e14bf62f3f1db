//! A checkpoint folder: one safetensors file, or shards listed by `model.safetensors.index.json`.
//!
//! Everything that headers can tell is checked when it is opened, so that an incomplete download is refused with the
//! whole list of what is missing, before the first weight is read. Tensors are then read one at a time.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use brightrun_kernels::DType;
use rayon::prelude::*;
use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::error::{Failure, Result};
use crate::model::config::{ExpectedTensor, ExpertStorage};
use crate::model::fp8;
use crate::model::load::stream::{Input, Wanted};
use crate::model::tensor_file::{HostTensor, StoredTensor, TensorFile};

/// How many names a message lists before it only counts.
const NAMES_IN_A_MESSAGE: usize = 8;

/// An opened checkpoint.
#[derive(Debug)]
pub struct Checkpoint {
    directory: PathBuf,
    files: Vec<TensorFile>,
    /// Which file holds a tensor.
    home: BTreeMap<String, usize>,
    /// Rows and columns that share one scale, where the weights are FP8.
    fp8_block: Option<[usize; 2]>,
}

/// What the name of an FP8 matrix's scales has behind the matrix's own.
pub(crate) const SCALES: &str = "_scale_inv";

/// The file that says which shard holds which tensor.
pub(crate) const INDEX: &str = "model.safetensors.index.json";

/// The file of a checkpoint that is not cut into shards.
const SINGLE: &str = "model.safetensors";

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Index {
    /// Names of the shards, sorted, each once.
    fn files(&self) -> Vec<String> {
        let names: BTreeSet<&String> = self.weight_map.values().collect();
        names.into_iter().cloned().collect()
    }
}

/// Names of the files that a checkpoint folder says it consists of, sorted. Whether they are there is not asked.
///
/// # Errors
/// `MODEL_FILE_MISSING` when the folder is no checkpoint; `MODEL_FILE_DAMAGED` when its index cannot be read.
pub fn file_names(directory: &Path) -> Result<Vec<String>> {
    let index = directory.join(INDEX);
    if index.is_file() {
        return Ok(read_index(&index)?.files());
    }
    if directory.join(SINGLE).is_file() {
        return Ok(vec![SINGLE.to_owned()]);
    }
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let shards = entries.filter(|entry| {
        let name = entry.file_name().to_string_lossy().into_owned();
        name.starts_with("model-") && name.ends_with(".safetensors")
    });
    let failure = match shards.count() {
        0 => Failure::user(
            "MODEL_FILE_MISSING",
            format!("The folder holds neither {SINGLE} nor {INDEX}"),
        )
        .hint("Name a folder that holds a safetensors checkpoint"),
        count => Failure::platform(
            "MODEL_FILE_MISSING",
            format!("The folder holds {count} shards, but not {INDEX}, which says what belongs to them"),
        )
        .hint("Finish the download of this checkpoint"),
    };
    Err(failure.at(directory.display().to_string()))
}

/// Opens all files at once and reads their headers: on a network volume each takes a few round trips. All that is wrong with
/// any of them is told together.
fn opened(directory: &Path, names: &[String]) -> Result<Vec<TensorFile>> {
    let absent: Vec<String> = names
        .iter()
        .filter(|name| !directory.join(name).is_file())
        .cloned()
        .collect();
    if !absent.is_empty() {
        return Err(Failure::platform(
            "MODEL_FILE_MISSING",
            format!(
                "{} of {} shards are missing: {}",
                absent.len(),
                names.len(),
                shortened(&absent)
            ),
        )
        .at(directory.display().to_string())
        .hint("Finish the download of this checkpoint"));
    }
    let opened: Vec<Result<TensorFile>> = names
        .par_iter()
        .map(|name| TensorFile::open(&directory.join(name)))
        .collect();
    let (files, failures): (Vec<_>, Vec<_>) = opened.into_iter().partition(Result::is_ok);
    let failures: Vec<Failure> = failures.into_iter().filter_map(Result::err).collect();
    match failures.as_slice() {
        [] => Ok(files.into_iter().filter_map(Result::ok).collect()),
        [only] => Err(only.clone()),
        [first, ..] => {
            let each: Vec<String> = failures
                .iter()
                .map(|failure| {
                    let name = Path::new(&failure.place).file_name().unwrap_or_default();
                    format!("{}: {}", name.to_string_lossy(), failure.message)
                })
                .collect();
            let summary = format!(
                "{} of {} shards cannot be used: {}",
                each.len(),
                names.len(),
                shortened(&each)
            );
            Err(Failure::new(first.blame, first.code.clone(), summary)
                .at(directory.display().to_string())
                .hint("Download these files again"))
        }
    }
}

impl Checkpoint {
    /// Opens a checkpoint folder and checks every header.
    ///
    /// # Errors
    /// `MODEL_FILE_MISSING` with the list of absent files, `MODEL_FILE_DAMAGED` with the list of damaged ones, `MODEL_TENSOR_MISSING`
    /// when the index names a tensor that its file does not hold.
    pub fn open(directory: &Path) -> Result<Self> {
        let index_path = directory.join(INDEX);
        if index_path.is_file() {
            return Self::open_shards(directory, &index_path);
        }
        let names = file_names(directory)?;
        let files = opened(directory, &names)?;
        let tensors = files.iter().flat_map(|file| file.tensors().keys());
        let home = tensors.map(|name| (name.clone(), 0)).collect();
        Ok(Self {
            directory: directory.to_owned(),
            files,
            home,
            fp8_block: None,
        })
    }

    fn open_shards(directory: &Path, index_path: &Path) -> Result<Self> {
        let index = read_index(index_path)?;
        let names = index.files();
        let files = opened(directory, &names)?;
        let mut home = BTreeMap::new();
        let mut absent = Vec::new();
        for (tensor, file_name) in &index.weight_map {
            let place = names.binary_search(file_name).unwrap_or_default();
            if !files[place].tensors().contains_key(tensor) {
                absent.push(format!("`{tensor}` in {file_name}"));
            }
            home.insert(tensor.clone(), place);
        }
        if !absent.is_empty() {
            return Err(Failure::platform(
                "MODEL_TENSOR_MISSING",
                format!(
                    "The index names {} tensors that their files do not hold: {}",
                    absent.len(),
                    shortened(&absent)
                ),
            )
            .at(index_path.display().to_string())
            .hint("Download the checkpoint again"));
        }
        Ok(Self {
            directory: directory.to_owned(),
            files,
            home,
            fp8_block: None,
        })
    }

    /// Says in which blocks FP8 weights are scaled, and checks that exactly the FP8 matrices have scales: a wrong guess about
    /// one matrix would be a silently wrong model.
    ///
    /// # Errors
    /// `MODEL_FP8_SCALES` naming the tensor: FP8 without scales of the right extents and a float type, scales of what is not
    /// FP8 or not there, FP8 without a `quantization_config`.
    pub fn with_fp8_blocks(mut self, block: Option<[usize; 2]>) -> Result<Self> {
        for name in self.home.keys() {
            if let Some(problem) = self.scale_problem(name, block) {
                return Err(
                    Failure::user("MODEL_FP8_SCALES", format!("The tensor `{name}` {problem}"))
                        .at(self.directory.display().to_string())
                        .hint("Check that config.json belongs to these weights and that all shards are there"),
                );
            }
        }
        self.fp8_block = block;
        Ok(self)
    }

    fn scale_problem(&self, name: &str, block: Option<[usize; 2]>) -> Option<String> {
        let is_fp8 = |name: &str| self.tensor(name).is_some_and(|stored| stored.dtype == DType::F8E4M3);
        if let Some(matrix) = name.strip_suffix(SCALES) {
            return (!is_fp8(matrix)).then(|| format!("holds scales, but `{matrix}` is not FP8 or not there"));
        }
        if !is_fp8(name) {
            return None;
        }
        let shape = &self.tensor(name)?.shape;
        let (Some(block), [stack @ .., rows, columns]) = (block, shape.as_slice()) else {
            return Some(format!(
                "is FP8 of the shape {shape:?}, but only matrices under a quantization_config with weight_block_size are read"
            ));
        };
        let expected = [stack, &fp8::scale_extents([*rows, *columns], block)].concat();
        match self.tensor(&format!("{name}{SCALES}")) {
            None => Some(format!("is FP8, but its scales `{name}{SCALES}` are missing")),
            Some(scales) if scales.shape != expected => Some(format!(
                "has scales of the shape {:?}, but {expected:?} were expected",
                scales.shape
            )),
            Some(scales) if !matches!(scales.dtype, DType::F32 | DType::BF16 | DType::F16) => {
                Some(format!("has scales of the type {}", scales.dtype))
            }
            Some(_) => None,
        }
    }

    /// How routed experts are stored.
    pub fn expert_storage(&self) -> ExpertStorage {
        match self.home.keys().any(|name| name.ends_with(".mlp.experts.gate_up_proj")) {
            true => ExpertStorage::Stacked,
            false => ExpertStorage::Each,
        }
    }

    /// The folder.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// A tensor's dtype and extents, if it is there.
    pub fn tensor(&self, name: &str) -> Option<&StoredTensor> {
        self.files[*self.home.get(name)?].tensors().get(name)
    }

    /// Where a tensor's bytes lie, by the place of its file in [`Checkpoint::inputs`], and their type.
    pub fn place(&self, name: &str) -> Option<(Wanted, DType)> {
        let file = *self.home.get(name)?;
        let stored = self.files.get(file)?.tensors().get(name)?;
        let wanted = Wanted {
            file,
            offset: stored.offset(),
            length: stored.size_bytes(),
        };
        Some((wanted, stored.dtype))
    }

    /// Its open files.
    ///
    /// # Errors
    /// `MODEL_FILE_DAMAGED` when the system gives no handle.
    pub fn inputs(&self) -> Result<Vec<Input>> {
        let input = |file: &TensorFile| {
            Ok(Input {
                file: file.handle()?,
                path: file.path().to_owned(),
            })
        };
        self.files.iter().map(input).collect()
    }

    /// Names of all tensors.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.home.keys().map(String::as_str)
    }

    /// Compares the headers with what a configuration promises.
    ///
    /// # Errors
    /// `MODEL_TENSOR_MISSING` with all absent names; `MODEL_TENSOR_SHAPE` naming tensor, expected and found extents.
    pub fn check(&self, expected: &[ExpectedTensor]) -> Result<()> {
        let missing: Vec<&str> = expected
            .iter()
            .filter(|tensor| self.tensor(&tensor.name).is_none())
            .map(|tensor| tensor.name.as_str())
            .collect();
        if !missing.is_empty() {
            return Err(Failure::user(
                "MODEL_TENSOR_MISSING",
                format!(
                    "{} tensors that config.json asks for are not in the checkpoint: {}",
                    missing.len(),
                    shortened(&missing)
                ),
            )
            .at(self.directory.display().to_string())
            .hint("Check that config.json belongs to these weights and that all shards are there"));
        }
        for tensor in expected {
            let Some(stored) = self.tensor(&tensor.name) else {
                continue;
            };
            if stored.shape != tensor.shape {
                return Err(Failure::user(
                    "MODEL_TENSOR_SHAPE",
                    format!(
                        "By config.json the tensor `{}` has the shape {:?}, but in the checkpoint it is {:?}",
                        tensor.name, tensor.shape, stored.shape
                    ),
                )
                .at(self.directory.display().to_string())
                .hint("Check that config.json belongs to these weights"));
            }
        }
        Ok(())
    }

    /// Reads one tensor and checks that every element is finite. FP8 becomes f32, scaled.
    ///
    /// # Errors
    /// `MODEL_TENSOR_MISSING`, `MODEL_FILE_DAMAGED`, `MODEL_NON_FINITE` naming tensor and element.
    pub fn read(&self, name: &str) -> Result<HostTensor> {
        let file = self.file(name)?;
        let mut tensor = file.read(name)?;
        if tensor.dtype == DType::F8E4M3 {
            tensor = self.dequantised(name, &tensor)?;
        }
        finite(file, name, tensor)
    }

    fn file(&self, name: &str) -> Result<&TensorFile> {
        self.home.get(name).map(|place| &self.files[*place]).ok_or_else(|| {
            Failure::user("MODEL_TENSOR_MISSING", format!("The checkpoint has no tensor `{name}`"))
                .at(self.directory.display().to_string())
        })
    }

    fn dequantised(&self, name: &str, codes: &HostTensor) -> Result<HostTensor> {
        let (Some(block), [_, columns]) = (self.fp8_block, codes.shape.as_slice()) else {
            return Err(Failure::user(
                "MODEL_FP8_SCALES",
                format!("The tensor `{name}` is FP8, but nothing says how it is scaled"),
            ));
        };
        let scales_name = format!("{name}{SCALES}");
        let file = self.file(&scales_name)?;
        let scales = finite(file, &scales_name, file.read(&scales_name)?)?.to_f32()?;
        let values = fp8::dequantised(&codes.bytes, *columns, &scales, block);
        Ok(HostTensor {
            dtype: DType::F32,
            shape: codes.shape.clone(),
            bytes: bytemuck::allocation::pod_collect_to_vec(&values),
        })
    }

    /// SHA-256 over all headers: names, dtypes, extents and places of every tensor.
    pub fn header_hash(&self) -> [u8; 32] {
        let mut hash = Sha256::new();
        for file in &self.files {
            hash.update(file.header_hash());
        }
        hash.finalize().into()
    }
}

fn finite(file: &TensorFile, name: &str, tensor: HostTensor) -> Result<HostTensor> {
    match tensor.first_non_finite() {
        None => Ok(tensor),
        Some(element) => Err(Failure::user(
            "MODEL_NON_FINITE",
            format!("Element {element} of the tensor `{name}` is infinite or not a number"),
        )
        .at(file.path().display().to_string())
        .hint("Download the checkpoint again; its weights are damaged")),
    }
}

fn read_index(path: &Path) -> Result<Index> {
    let failure = |message: String| {
        Failure::platform("MODEL_FILE_DAMAGED", message)
            .at(path.display().to_string())
            .hint("Download the index again")
    };
    let text = std::fs::read_to_string(path).map_err(|error| failure(format!("The index cannot be read: {error}")))?;
    let index: Index =
        serde_json::from_str(&text).map_err(|error| failure(format!("The index is not valid JSON: {error}")))?;
    // An index is outside data: it must not lead out of its folder.
    match index
        .weight_map
        .values()
        .find(|name| name.contains(['/', '\\']) || name.starts_with('.'))
    {
        Some(name) => Err(failure(format!(
            "The index names `{name}`, which is not a plain file name"
        ))),
        None => Ok(index),
    }
}

/// A list for a message: the first few, and how many more.
fn shortened(names: &[impl AsRef<str>]) -> String {
    let shown = names
        .iter()
        .take(NAMES_IN_A_MESSAGE)
        .map(AsRef::as_ref)
        .collect::<Vec<_>>()
        .join(", ");
    match names.len().saturating_sub(NAMES_IN_A_MESSAGE) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use brightrun_kernels::cpu::Cpu;
    use safetensors::tensor::{Dtype, TensorView};
    use serde_json::{Value, json};
    use tempfile::TempDir;

    use super::*;
    use crate::model::synthetic::write_checkpoint;
    use crate::model::{Encoding, Family, LoadOptions, Model, ModelConfig, RopeFrequencies};
    use crate::spec::BaseDtype;

    fn single() -> TempDir {
        let folder = tempfile::tempdir().unwrap();
        write_checkpoint(folder.path(), &ModelConfig::miniature(Family::Qwen3, 32), 3).unwrap();
        folder
    }

    /// Writes tensors of a checkpoint as one file, each changed by `change`.
    fn write_file(source: &Checkpoint, names: &[&str], path: &Path, change: fn(&str, HostTensor) -> HostTensor) {
        let tensors: Vec<(&str, HostTensor)> = names
            .iter()
            .map(|name| (*name, change(name, source.read(name).unwrap())))
            .collect();
        let views = tensors.iter().map(|(name, tensor)| {
            let dtype = match tensor.dtype {
                DType::BF16 => Dtype::BF16,
                _ => Dtype::F32,
            };
            (
                *name,
                TensorView::new(dtype, tensor.shape.clone(), &tensor.bytes).unwrap(),
            )
        });
        std::fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
    }

    fn unchanged(_: &str, tensor: HostTensor) -> HostTensor {
        tensor
    }

    /// The same checkpoint in three shards with an index.
    fn sharded() -> (TempDir, Value) {
        let (source, target) = (single(), tempfile::tempdir().unwrap());
        let checkpoint = Checkpoint::open(source.path()).unwrap();
        let names: Vec<&str> = checkpoint.names().collect();
        let mut map = serde_json::Map::new();
        for (shard, part) in names.chunks(names.len().div_ceil(3)).enumerate() {
            let file = format!("model-{:05}-of-00003.safetensors", shard + 1);
            write_file(&checkpoint, part, &target.path().join(&file), unchanged);
            map.extend(part.iter().map(|name| ((*name).to_owned(), json!(file))));
        }
        std::fs::copy(source.path().join("config.json"), target.path().join("config.json")).unwrap();
        let index = json!({"metadata": {}, "weight_map": map});
        write_index(target.path(), &index);
        (target, index)
    }

    fn write_index(folder: &Path, index: &Value) {
        std::fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
    }

    fn load(folder: &Path) -> Result<Model<Cpu>> {
        Model::load(
            &Cpu::new(Some(1))?,
            folder,
            LoadOptions::from(BaseDtype::F32),
            &mut |_| {},
        )
    }

    fn load_failure(folder: &Path) -> Failure {
        load(folder).err().unwrap()
    }

    #[test]
    fn shards_are_read_as_the_single_file_they_were_cut_from() {
        let (folder, _) = sharded();
        let (whole, shards) = (single(), Checkpoint::open(folder.path()).unwrap());
        let whole = Checkpoint::open(whole.path()).unwrap();
        assert!(whole.names().eq(shards.names()));
        for name in whole.names() {
            assert_eq!(whole.read(name).unwrap(), shards.read(name).unwrap());
        }
        load(folder.path()).unwrap();
    }

    #[test]
    fn all_missing_shards_are_listed_before_anything_is_read() {
        let (folder, _) = sharded();
        for shard in ["model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"] {
            std::fs::remove_file(folder.path().join(shard)).unwrap();
        }
        let failure = load_failure(folder.path());
        assert_eq!(failure.code, "MODEL_FILE_MISSING");
        assert!(
            failure.message.contains("2 of 3")
                && failure.message.contains("00001")
                && failure.message.contains("00003")
        );
    }

    #[test]
    fn an_index_that_lies_or_leads_out_of_its_folder_is_refused() {
        let (folder, index) = sharded();
        let mut absent = index.clone();
        absent["weight_map"]["model.norm.extra"] = json!("model-00001-of-00003.safetensors");
        write_index(folder.path(), &absent);
        assert_eq!(load_failure(folder.path()).code, "MODEL_TENSOR_MISSING");
        let mut outside = index;
        outside["weight_map"]["model.norm.weight"] = json!("../secret.safetensors");
        write_index(folder.path(), &outside);
        assert_eq!(load_failure(folder.path()).code, "MODEL_FILE_DAMAGED");
        std::fs::write(folder.path().join("model.safetensors.index.json"), b"{").unwrap();
        assert_eq!(load_failure(folder.path()).code, "MODEL_FILE_DAMAGED");
    }

    #[test]
    fn a_truncated_shard_is_named() {
        let (folder, _) = sharded();
        let shard = folder.path().join("model-00002-of-00003.safetensors");
        let bytes = std::fs::read(&shard).unwrap();
        std::fs::write(&shard, &bytes[..bytes.len() - 2]).unwrap();
        let failure = load_failure(folder.path());
        assert_eq!(failure.code, "MODEL_FILE_DAMAGED");
        assert!(failure.place.contains("00002"), "{failure}");
    }

    #[test]
    fn a_configuration_that_does_not_belong_to_the_weights_is_refused_with_tensor_and_shapes() {
        let folder = single();
        let config = ModelConfig {
            intermediate: 96,
            ..ModelConfig::miniature(Family::Qwen3, 32)
        };
        std::fs::write(folder.path().join("config.json"), config.to_json()).unwrap();
        let failure = load_failure(folder.path());
        assert_eq!(failure.code, "MODEL_TENSOR_SHAPE");
        for word in ["gate_proj", "[96, 64]", "[160, 64]"] {
            assert!(failure.message.contains(word), "{failure}");
        }
        let deeper = ModelConfig {
            layers: 3,
            ..ModelConfig::miniature(Family::Qwen3, 32)
        };
        std::fs::write(folder.path().join("config.json"), deeper.to_json()).unwrap();
        let failure = load_failure(folder.path());
        assert_eq!(failure.code, "MODEL_TENSOR_MISSING");
        assert!(
            failure.message.contains("11 tensors") && failure.message.contains("and 3 more"),
            "{failure}"
        );
    }

    #[test]
    fn a_weight_that_is_not_finite_is_named() {
        let folder = single();
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        let names: Vec<&str> = checkpoint.names().collect();
        let target = folder.path().join("poisoned.safetensors");
        write_file(&checkpoint, &names, &target, |name, mut tensor| {
            if name == "model.layers.1.mlp.up_proj.weight" {
                tensor.bytes[10..12].copy_from_slice(&0x7fc0u16.to_le_bytes());
            }
            tensor
        });
        std::fs::rename(target, folder.path().join("model.safetensors")).unwrap();
        let failure = load_failure(folder.path());
        assert_eq!(failure.code, "MODEL_NON_FINITE");
        assert!(
            failure.message.contains("Element 5") && failure.message.contains("layers.1.mlp.up_proj"),
            "{failure}"
        );
    }

    /// f32 tensors that hold bf16 values are the same model in every encoding.
    #[test]
    fn a_wider_checkpoint_of_the_same_values_gives_the_same_logits() {
        let (narrow, wide) = (single(), single());
        let checkpoint = Checkpoint::open(narrow.path()).unwrap();
        let names: Vec<&str> = checkpoint.names().collect();
        write_file(
            &checkpoint,
            &names,
            &wide.path().join("model.safetensors"),
            |_, tensor| tensor.widened().unwrap(),
        );
        let logits = |folder: &Path, encoding| {
            let options = LoadOptions {
                encoding,
                precision: brightrun_kernels::ops::Precision::F32,
                rope_frequencies: RopeFrequencies::F32,
            };
            let model = Model::load(&Cpu::new(Some(1)).unwrap(), folder, options, &mut |_| {}).unwrap();
            model.logits(None, &crate::model::Batch::prompt(&[1, 2, 3])).unwrap()
        };
        for encoding in [Encoding::Stored, Encoding::Bf16, Encoding::Nf4] {
            assert_eq!(
                logits(narrow.path(), encoding),
                logits(wide.path(), encoding),
                "{encoding:?}"
            );
        }
    }

    /// Writes a folder's checkpoint again with one tensor stored as FP8 codes of `code`, and its scales where given.
    fn store_as_fp8(folder: &Path, name: &str, code: u8, scales: Option<&[usize]>) {
        let checkpoint = Checkpoint::open(folder).unwrap();
        let mut tensors: Vec<(String, Dtype, HostTensor)> = checkpoint
            .names()
            .map(|name| (name.to_owned(), Dtype::BF16, checkpoint.read(name).unwrap()))
            .collect();
        let matrix = tensors.iter_mut().find(|(other, _, _)| other == name).unwrap();
        matrix.1 = Dtype::F8_E4M3;
        matrix.2.bytes = vec![code; matrix.2.shape.iter().product()];
        if let Some(shape) = scales {
            let values: Vec<f32> = (0..shape.iter().product::<usize>())
                .map(|place| place as f32 + 1.0)
                .collect();
            let scales = HostTensor {
                dtype: DType::F32,
                shape: shape.to_vec(),
                bytes: bytemuck::allocation::pod_collect_to_vec(&values),
            };
            tensors.push((format!("{name}_scale_inv"), Dtype::F32, scales));
        }
        let views = tensors.iter().map(|(name, dtype, tensor)| {
            (
                name,
                TensorView::new(*dtype, tensor.shape.clone(), &tensor.bytes).unwrap(),
            )
        });
        let file = safetensors::serialize(views, None).unwrap();
        std::fs::write(folder.join("model.safetensors"), file).unwrap();
    }

    const UP: &str = "model.layers.1.mlp.up_proj.weight";

    #[test]
    fn an_fp8_matrix_is_its_codes_times_the_scales_of_their_blocks() {
        let folder = single();
        // [160, 64] in blocks of 128 × 48: two by two, ragged both ways. Code 0x40 is 2.
        store_as_fp8(folder.path(), UP, 0x40, Some(&[2, 2]));
        let checkpoint = Checkpoint::open(folder.path())
            .unwrap()
            .with_fp8_blocks(Some([128, 48]));
        let values = checkpoint.unwrap().read(UP).unwrap().to_f32().unwrap();
        let at = |row: usize, column: usize| values[row * 64 + column];
        assert_eq!(
            [at(0, 0), at(127, 47), at(0, 48), at(128, 47), at(159, 63)],
            [2.0, 2.0, 4.0, 6.0, 8.0]
        );
    }

    #[test]
    fn fp8_and_scales_come_only_together_and_only_in_the_right_shape() {
        for (scales, block, word) in [
            (None, Some([128, 128]), "missing"),
            (Some(&[2, 2][..]), Some([128, 128]), "shape"),
            (Some(&[2, 1][..]), None, "quantization_config"),
        ] {
            let folder = single();
            store_as_fp8(folder.path(), UP, 0x40, scales);
            let failure = Checkpoint::open(folder.path())
                .unwrap()
                .with_fp8_blocks(block)
                .unwrap_err();
            assert_eq!(failure.code, "MODEL_FP8_SCALES");
            assert!(
                failure.message.contains(UP) && failure.message.contains(word),
                "{failure}"
            );
        }
        let folder = single();
        store_as_fp8(folder.path(), UP, 0x7f, Some(&[2, 1]));
        let checkpoint = Checkpoint::open(folder.path())
            .unwrap()
            .with_fp8_blocks(Some([128, 128]));
        assert_eq!(checkpoint.unwrap().read(UP).unwrap_err().code, "MODEL_NON_FINITE");
    }

    /// One checkpoint, its experts as one tensor each and as two stacks a layer.
    #[test]
    fn stacked_experts_are_the_same_model_as_separate_ones() {
        let (separate, stacked) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let config = ModelConfig::miniature(Family::Qwen3Moe, 32);
        write_checkpoint(separate.path(), &config, 3).unwrap();
        let checkpoint = Checkpoint::open(separate.path()).unwrap();
        let part = |name: &str| checkpoint.read(name).unwrap().bytes;
        let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = config
            .tensors_with(ExpertStorage::Stacked)
            .into_iter()
            .map(|tensor| {
                let bytes = match tensor.name.split_once(".experts.") {
                    None => part(&tensor.name),
                    Some((holder, projection)) => (0..8)
                        .flat_map(|expert| match projection {
                            "down_proj" => vec![format!("{holder}.experts.{expert}.down_proj.weight")],
                            _ => ["gate", "up"]
                                .map(|half| format!("{holder}.experts.{expert}.{half}_proj.weight"))
                                .to_vec(),
                        })
                        .flat_map(|name| part(&name))
                        .collect(),
                };
                (tensor.name, tensor.shape, bytes)
            })
            .collect();
        let views = tensors
            .iter()
            .map(|(name, shape, bytes)| (name, TensorView::new(Dtype::BF16, shape.clone(), bytes).unwrap()));
        let file = safetensors::serialize(views, None).unwrap();
        std::fs::write(stacked.path().join("model.safetensors"), file).unwrap();
        std::fs::write(stacked.path().join("config.json"), config.to_json()).unwrap();
        let logits = |folder: &Path| {
            let batch = crate::model::Batch::prompt(&[1, 2, 3]);
            load(folder).unwrap().logits(None, &batch).unwrap()
        };
        assert_eq!(logits(separate.path()), logits(stacked.path()));
    }
}
