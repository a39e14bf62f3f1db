//! Checkpoints of any size from a `config.json`: sharded, bf16 or FP8, gigabytes in seconds.
//!
//! The files are laid out as transformers writes them: shards filled in the model's order, inside each the wider types first and then
//! by name, an index beside them. One piece of one tensor is in memory at a time. Values come from a table of normal numbers, drawn
//! by a counter: nothing depends on threads or order, and no value is above four deviations.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use half::bf16;
use rayon::prelude::*;
use serde_json::{Map, Value, json};

use super::{EMBEDDING_DEVIATION, write_failure};
use crate::error::{Failure, Result};
use crate::model::checkpoint::{INDEX, SCALES};
use crate::model::config::{ExpectedTensor, ModelConfig, Role};
use crate::model::fp8;
use crate::model::random::CounterRandom;

/// Normal numbers in a table: drawing one is a look-up instead of a logarithm and a cosine.
const TABLE_ENTRIES: usize = 1 << 14;

/// No value is above this many deviations.
const LARGEST_DEVIATION: f64 = 4.0;

/// Rows and columns that share a scale, as FP8 releases have them.
const FP8_BLOCK: [usize; 2] = [128, 128];

/// Bytes that are made at a time.
const PIECE_BYTES: usize = 8 << 20;

/// What matrices are stored as.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SyntheticDtype {
    /// bf16 throughout.
    #[default]
    Bf16,
    /// Projections and experts in FP8 with scales of 128 × 128 blocks, the rest in bf16, as FP8 releases are.
    Fp8,
}

/// What [`generate`] writes.
#[derive(Clone, Debug, PartialEq)]
pub struct SyntheticSettings {
    /// Layers, the first of the configuration's; all of them where `None`.
    pub layers: Option<usize>,
    /// What matrices are stored as.
    pub dtype: SyntheticDtype,
    /// Most bytes of a shard; a larger tensor has a shard to itself.
    pub shard_bytes: u64,
    /// Seed of the values.
    pub seed: u64,
}

impl Default for SyntheticSettings {
    fn default() -> Self {
        Self {
            layers: None,
            dtype: SyntheticDtype::Bf16,
            shard_bytes: 4 << 30,
            seed: 42,
        }
    }
}

/// What was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Generated {
    /// Bytes of all tensors.
    pub bytes: u64,
    /// Shards.
    pub shards: usize,
    /// Tensors, scales included.
    pub tensors: usize,
    /// Parameters of the model, scales not counted.
    pub parameters: u64,
}

/// A configuration as it will lie beside the weights: other numbers of layers, another quantisation.
///
/// # Errors
/// `MODEL_CONFIG_INVALID`, `MODEL_UNSUPPORTED`; `SYNTH_LAYERS` when the configuration has fewer layers than are asked for.
pub fn config_text(text: &str, settings: &SyntheticSettings) -> Result<String> {
    let whole = ModelConfig::parse(text)?;
    let mut value: Value = serde_json::from_str(text).map_err(|error| {
        Failure::user(
            "MODEL_CONFIG_INVALID",
            format!("config.json is not valid JSON: {error}"),
        )
    })?;
    if let Some(layers) = settings.layers {
        if layers == 0 || layers > whole.layers {
            return Err(Failure::user(
                "SYNTH_LAYERS",
                format!(
                    "The configuration has {} layers, so {layers} cannot be written",
                    whole.layers
                ),
            )
            .hint("Ask for between 1 and that many"));
        }
        value["num_hidden_layers"] = json!(layers);
        if let Some(types) = value.get_mut("layer_types").and_then(Value::as_array_mut) {
            types.truncate(layers);
        }
        if let Some(dense) = value.get_mut("mlp_only_layers").and_then(Value::as_array_mut) {
            dense.retain(|layer| layer.as_u64().is_some_and(|layer| layer < layers as u64));
        }
    }
    if let Some(object) = value.as_object_mut() {
        object.remove("quantization_config");
        if settings.dtype == SyntheticDtype::Fp8 {
            let quantization = json!({
                "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": FP8_BLOCK,
            });
            object.insert("quantization_config".to_owned(), quantization);
        }
    }
    Ok(format!("{value:#}\n"))
}

/// Writes a checkpoint of the configuration in `text` to `directory`; `progress` hears of bytes written and bytes in all.
///
/// # Errors
/// As [`config_text`]; `MODEL_WRITE` when the folder cannot be written.
pub fn generate(
    directory: &Path,
    text: &str,
    settings: &SyntheticSettings,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Generated> {
    let text = config_text(text, settings)?;
    let config = ModelConfig::parse(&text)?;
    let tensors = tensors(&config, settings.dtype);
    let parameters = config
        .tensors()
        .iter()
        .map(|tensor| tensor.shape.iter().product::<usize>() as u64)
        .sum();
    let shards = shards(&tensors, settings.shard_bytes);
    let total: u64 = tensors.iter().map(Planned::bytes).sum();
    let failed = |error: std::io::Error| write_failure(directory, &error);
    std::fs::create_dir_all(directory).map_err(failed)?;
    let source = Source::new(settings.seed);
    let (mut map, mut written) = (BTreeMap::new(), 0);
    for (number, shard) in shards.iter().enumerate() {
        let name = format!("model-{:05}-of-{:05}.safetensors", number + 1, shards.len());
        let mut count = |bytes: u64| {
            written += bytes;
            progress(written, total);
        };
        write_shard(&directory.join(&name), &config, shard, &source, &mut count).map_err(failed)?;
        map.extend(shard.iter().map(|tensor| (tensor.name.clone(), name.clone())));
    }
    let index = json!({"metadata": {"total_size": total}, "weight_map": map});
    std::fs::write(directory.join(INDEX), format!("{index:#}\n")).map_err(failed)?;
    std::fs::write(directory.join("config.json"), text).map_err(failed)?;
    Ok(Generated {
        bytes: total,
        shards: shards.len(),
        tensors: tensors.len(),
        parameters,
    })
}

/// How a tensor is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stored {
    Bf16,
    Fp8,
    /// Scales, bf16 as in the releases.
    Scales,
}

/// A tensor that will be written.
#[derive(Clone, Debug)]
struct Planned {
    name: String,
    shape: Vec<usize>,
    stored: Stored,
}

impl Planned {
    fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    fn width(&self) -> usize {
        if self.stored == Stored::Fp8 { 1 } else { 2 }
    }

    fn bytes(&self) -> u64 {
        (self.elements() * self.width()) as u64
    }
}

/// Every tensor, FP8 matrices followed by their scales.
fn tensors(config: &ModelConfig, dtype: SyntheticDtype) -> Vec<Planned> {
    let mut list = Vec::new();
    for ExpectedTensor { name, shape } in config.tensors() {
        let role = ExpectedTensor {
            name: name.clone(),
            shape: Vec::new(),
        }
        .role();
        let is_fp8 = dtype == SyntheticDtype::Fp8 && matches!(role, Role::Projection | Role::Expert);
        if let (true, [rows, columns]) = (is_fp8, shape.as_slice()) {
            list.push(Planned {
                name: format!("{name}{SCALES}"),
                shape: fp8::scale_extents([*rows, *columns], FP8_BLOCK).to_vec(),
                stored: Stored::Scales,
            });
        }
        list.push(Planned {
            name,
            shape,
            stored: if is_fp8 { Stored::Fp8 } else { Stored::Bf16 },
        });
    }
    list
}

/// Fills shards in order, and sorts each as transformers does: wider types first, then by name.
fn shards(tensors: &[Planned], most: u64) -> Vec<Vec<Planned>> {
    let mut shards: Vec<Vec<Planned>> = Vec::new();
    let mut held = 0;
    for tensor in tensors {
        if shards.is_empty() || held + tensor.bytes() > most && held > 0 {
            shards.push(Vec::new());
            held = 0;
        }
        held += tensor.bytes();
        if let Some(shard) = shards.last_mut() {
            shard.push(tensor.clone());
        }
    }
    for shard in &mut shards {
        shard.sort_by(|left, right| (right.width(), &left.name).cmp(&(left.width(), &right.name)));
    }
    shards
}

fn write_shard(
    path: &Path,
    config: &ModelConfig,
    tensors: &[Planned],
    source: &Source,
    count: &mut dyn FnMut(u64),
) -> std::io::Result<()> {
    let mut header = Map::from_iter([("__metadata__".to_owned(), json!({"format": "pt"}))]);
    let mut end = 0;
    for tensor in tensors {
        let dtype = if tensor.stored == Stored::Fp8 {
            "F8_E4M3"
        } else {
            "BF16"
        };
        let start = end;
        end += tensor.bytes();
        let entry = json!({"dtype": dtype, "shape": tensor.shape, "data_offsets": [start, end]});
        header.insert(tensor.name.clone(), entry);
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = BufWriter::with_capacity(PIECE_BYTES, File::create(path)?);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    for tensor in tensors {
        let filler = source.filler(config, tensor);
        let bytes = tensor.bytes() as usize;
        for first in (0..bytes).step_by(PIECE_BYTES) {
            let piece = filler.bytes(first, PIECE_BYTES.min(bytes - first));
            file.write_all(&piece)?;
            count(piece.len() as u64);
        }
    }
    file.into_inner()
        .map_err(std::io::IntoInnerError::into_error)?
        .sync_all()
}

/// The table of normal numbers.
struct Source {
    seed: u64,
    normal: Vec<f64>,
    /// The nearest FP8 codes when four deviations are the largest code.
    codes: Vec<u8>,
}

impl Source {
    fn new(seed: u64) -> Self {
        let random = CounterRandom::new(seed, "synthetic table");
        let normal: Vec<f64> = (0..TABLE_ENTRIES as u64)
            .map(|place| random.normal(place).clamp(-LARGEST_DEVIATION, LARGEST_DEVIATION))
            .collect();
        let codes = normal
            .iter()
            .map(|value| nearest_code((value / LARGEST_DEVIATION * 448.0) as f32))
            .collect();
        Self { seed, normal, codes }
    }

    fn filler(&self, config: &ModelConfig, tensor: &Planned) -> Filler {
        let random = CounterRandom::new(self.seed, &format!("synthetic {}", tensor.name));
        let inputs = tensor.shape.last().copied().unwrap_or(1).max(1) as f64;
        let table = match tensor.stored {
            Stored::Fp8 => Table::Bytes(self.codes.clone()),
            Stored::Scales => {
                // Blocks of a real matrix have scales of about one size.
                let matrix_inputs = inputs * FP8_BLOCK[1] as f64;
                let scale = LARGEST_DEVIATION / 448.0 / matrix_inputs.sqrt();
                self.halves(|normal| scale * (1.0 + normal / (2.0 * LARGEST_DEVIATION)))
            }
            Stored::Bf16 => {
                let (mean, deviation) = moments(config, tensor, inputs);
                self.halves(|normal| mean + deviation * normal)
            }
        };
        Filler { random, table }
    }

    fn halves(&self, value: impl Fn(f64) -> f64) -> Table {
        let bits = self
            .normal
            .iter()
            .map(|normal| bf16::from_f64(value(*normal)).to_le_bytes());
        Table::Halves(bits.collect())
    }
}

/// Mean and deviation of a tensor's values: as in a fresh model, so that activations neither vanish nor grow.
fn moments(config: &ModelConfig, tensor: &Planned, inputs: f64) -> (f64, f64) {
    let name = tensor.name.as_str();
    match tensor.shape.as_slice() {
        _ if name.ends_with("linear_attn.norm.weight") => (1.0, 0.0),
        _ if name.ends_with("norm.weight") && config.zero_centred_norms => (0.0, 0.0),
        _ if name.ends_with("norm.weight") || name.ends_with("dt_bias") => (1.0, 0.0),
        [_, _, _] => (0.0, 1.0 / inputs.sqrt()),
        _ if name.ends_with("embed_tokens.weight") => (0.0, EMBEDDING_DEVIATION),
        [_, _] => (0.0, 1.0 / inputs.sqrt()),
        _ => (0.0, 0.02),
    }
}

enum Table {
    Bytes(Vec<u8>),
    Halves(Vec<[u8; 2]>),
}

/// The contents of one tensor.
struct Filler {
    random: CounterRandom,
    table: Table,
}

impl Filler {
    /// Bytes `first..first + length`; `first` is even.
    fn bytes(&self, first: usize, length: usize) -> Vec<u8> {
        /// Elements that one draw of 64 bits gives: 14 bits each.
        const DRAWN: usize = 4;
        let mut bytes = vec![0; length];
        let chunk = 64 << 10;
        bytes.par_chunks_mut(chunk).enumerate().for_each(|(index, out)| {
            let start = first + index * chunk;
            let places = |group: usize| {
                let bits = self.random.bits(group as u64);
                [0, 16, 32, 48].map(|shift| (bits >> shift) as usize % TABLE_ENTRIES)
            };
            match &self.table {
                Table::Bytes(table) => {
                    for (group, out) in out.chunks_mut(DRAWN).enumerate() {
                        for (out, place) in out.iter_mut().zip(places(start / DRAWN + group)) {
                            *out = table[place];
                        }
                    }
                }
                Table::Halves(table) => {
                    for (group, out) in out.chunks_mut(2 * DRAWN).enumerate() {
                        let places = places(start / (2 * DRAWN) + group);
                        for (out, place) in out.as_chunks_mut::<2>().0.iter_mut().zip(places) {
                            *out = table[place];
                        }
                    }
                }
            }
        });
        bytes
    }
}

/// The FP8 code nearest to a value; never one that is not a number.
fn nearest_code(value: f32) -> u8 {
    let magnitude = value.abs();
    let codes = (0..0x7fu8).min_by(|left, right| {
        let distance = |code: u8| (fp8::value(code) - magnitude).abs();
        distance(*left).total_cmp(&distance(*right))
    });
    let code = codes.unwrap_or(0);
    if value < 0.0 { code | 0x80 } else { code }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::model::checkpoint::Checkpoint;
    use crate::model::{Family, ModelConfig};

    fn written(settings: &SyntheticSettings) -> (tempfile::TempDir, Generated) {
        let folder = tempfile::tempdir().unwrap();
        let text = ModelConfig::miniature(Family::Qwen3Next, 64).to_json();
        let generated = generate(folder.path(), &text, settings, &mut |_, _| {}).unwrap();
        (folder, generated)
    }

    fn small(dtype: SyntheticDtype) -> SyntheticSettings {
        SyntheticSettings {
            layers: Some(2),
            dtype,
            shard_bytes: 40_000,
            seed: 3,
        }
    }

    #[test]
    fn a_checkpoint_holds_what_its_configuration_asks_for_and_every_shard_keeps_its_bound() {
        for dtype in [SyntheticDtype::Bf16, SyntheticDtype::Fp8] {
            let (folder, generated) = written(&small(dtype));
            let config = ModelConfig::load(folder.path()).unwrap();
            assert_eq!(config.layers, 2);
            let checkpoint = Checkpoint::open(folder.path()).unwrap();
            let checkpoint = checkpoint.with_fp8_blocks(config.fp8_block).unwrap();
            checkpoint.check(&config.tensors()).unwrap();
            assert!(generated.shards > 2, "{generated:?}");
            for name in checkpoint.names() {
                // Reading checks that every value is finite.
                let tensor = checkpoint.read(name).unwrap();
                if name.ends_with("experts.3.up_proj.weight") {
                    let values = tensor.to_f32().unwrap();
                    let mean = values.iter().map(|value| value * value).sum::<f32>() / values.len() as f32;
                    assert!((0.3..3.0).contains(&(mean * 64.0)), "{name}: {mean}");
                }
            }
        }
    }

    #[test]
    fn the_same_seed_gives_the_same_bytes_and_another_seed_others() {
        let bytes = |settings: &SyntheticSettings| {
            let (folder, _) = written(settings);
            let shard = std::fs::read_dir(folder.path())
                .unwrap()
                .flatten()
                .map(|entry| entry.path());
            let mut shards: Vec<_> = shard
                .filter(|path| path.extension().unwrap() == "safetensors")
                .collect();
            shards.sort();
            shards
                .iter()
                .flat_map(|path| std::fs::read(path).unwrap())
                .collect::<Vec<u8>>()
        };
        let settings = small(SyntheticDtype::Fp8);
        let other = SyntheticSettings {
            seed: 4,
            ..settings.clone()
        };
        assert_eq!(bytes(&settings), bytes(&settings));
        assert_ne!(bytes(&settings), bytes(&other));
    }

    #[test]
    fn pieces_of_a_tensor_are_the_same_whatever_their_borders() {
        let source = Source::new(5);
        let config = ModelConfig::miniature(Family::Qwen3, 64);
        for stored in [Stored::Bf16, Stored::Fp8, Stored::Scales] {
            let tensor = Planned {
                name: "x".to_owned(),
                shape: vec![50, 1000],
                stored,
            };
            let filler = source.filler(&config, &tensor);
            let whole = filler.bytes(0, 40_000);
            assert_eq!(filler.bytes(8000, 100), whole[8000..8100], "{stored:?}");
        }
    }

    #[test]
    fn more_layers_than_the_configuration_has_are_refused() {
        let text = ModelConfig::miniature(Family::Qwen3Next, 64).to_json();
        let settings = SyntheticSettings {
            layers: Some(5),
            ..SyntheticSettings::default()
        };
        assert_eq!(config_text(&text, &settings).unwrap_err().code, "SYNTH_LAYERS");
    }

    #[test]
    fn the_nearest_code_is_the_nearest_and_never_no_number() {
        for (value, code) in [(0.0, 0), (1.0, 0x38), (-2.0, 0xc0), (1e9, 0x7e), (-448.0, 0xfe)] {
            assert_eq!(nearest_code(value), code, "{value}");
        }
    }
}
