//! PEFT's names and shapes; safetensors out, and in again as a stream.
//!
//! An adapted module `M` has `base_model.model.M.lora_A.weight` `[r, in]` and
//! `base_model.model.M.lora_B.weight` `[out, r]`. Routed experts are stacked as
//! [`PeftLayout`](crate::model::peft::PeftLayout) describes. This is the only writer of adapters: a run's artifact and every
//! test that compares bytes go through it.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use brightrun_kernels::Backend;
use half::bf16;
use safetensors::tensor::{Dtype, Metadata, View};
use serde::{Deserialize, Serialize};

use super::AdapterConfig;
use crate::error::{Failure, Result};
use crate::model::LoraSet;
use crate::storage::disk_failure;

/// Longest header accepted, as in the safetensors library itself.
const MAX_HEADER_BYTES: u64 = 100_000_000;
const CHUNK_BYTES: usize = 1 << 20;

/// The type the tensors are saved in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AdapterDtype {
    /// float32: what training holds, exactly.
    #[default]
    F32,
    /// bfloat16, rounded to nearest: half the size.
    Bf16,
}

impl AdapterDtype {
    /// How far the loss of the reloaded adapter may lie from the recorded one, in nats per token.
    ///
    /// float32 is saved exactly, so only the order of sums may differ between two processes: 10⁻⁵,
    /// about a hundred roundings of a loss near one. bfloat16 rounds A and B by up to 2⁻⁹ each, so
    /// the adapter's contribution changes by at most about 2⁻⁸ of itself; a loss that the
    /// adapter moved by one nat then moves by at most 2⁻⁸.
    pub fn loss_tolerance(self) -> f64 {
        match self {
            Self::F32 => 1e-5,
            Self::Bf16 => 1.0 / 256.0,
        }
    }

    /// Bytes of one value.
    fn width(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }

    fn stored(self) -> Dtype {
        match self {
            Self::F32 => Dtype::F32,
            Self::Bf16 => Dtype::BF16,
        }
    }
}

/// One A or B, in float32.
#[derive(Clone, Debug)]
pub struct AdapterTensor<'a> {
    /// PEFT's key.
    pub name: String,
    /// Rows and columns.
    pub shape: Vec<usize>,
    /// The values, row by row.
    pub data: Cow<'a, [f32]>,
}

struct Saved<'a> {
    tensor: &'a AdapterTensor<'a>,
    dtype: AdapterDtype,
}

impl View for Saved<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype.stored()
    }

    fn shape(&self) -> &[usize] {
        &self.tensor.shape
    }

    /// Converted one tensor at a time, when its turn to be written comes.
    fn data(&self) -> Cow<'_, [u8]> {
        match self.dtype {
            AdapterDtype::F32 => Cow::Borrowed(bytemuck::cast_slice(&self.tensor.data)),
            AdapterDtype::Bf16 => {
                let rounded: Vec<bf16> = self.tensor.data.iter().map(|value| bf16::from_f32(*value)).collect();
                Cow::Owned(bytemuck::cast_slice(&rounded).to_vec())
            }
        }
    }

    fn data_len(&self) -> usize {
        self.tensor.data.len() * self.dtype.width()
    }
}

/// The tensors of an adapter in a backend's memory, as PEFT has them.
///
/// # Errors
/// The backend's own.
pub fn tensors_of<B: Backend>(device: &B, lora: &LoraSet<B>) -> Result<Vec<AdapterTensor<'static>>> {
    let mut tensors = Vec::new();
    for pair in lora.pairs() {
        tensors.extend(pair.to_peft(device)?.map(|factor| AdapterTensor {
            name: factor.key,
            shape: factor.shape.to_vec(),
            data: factor.values.into(),
        }));
    }
    Ok(tensors)
}

/// Writes the tensors, sorted by name, so that equal runs give equal bytes.
pub(super) fn save(tensors: &[AdapterTensor<'_>], dtype: AdapterDtype, file: &Path) -> Result<()> {
    safetensors::serialize_to_file(views(tensors, dtype)?, header(), file).map_err(|error| match error {
        safetensors::SafeTensorError::IoError(error) => disk_failure(&error, file),
        error => unwritable(&error),
    })
}

/// The bytes of `adapter_model.safetensors`: what a run's artifact holds.
///
/// # Errors
/// `ADAPTER_SHAPE_MISMATCH` when a tensor's values are not as many as its shape says.
pub fn encode_tensors(tensors: &[AdapterTensor<'_>], dtype: AdapterDtype) -> Result<Vec<u8>> {
    safetensors::serialize(views(tensors, dtype)?, header()).map_err(|error| unwritable(&error))
}

fn views<'a>(tensors: &'a [AdapterTensor<'a>], dtype: AdapterDtype) -> Result<Vec<(&'a str, Saved<'a>)>> {
    tensors
        .iter()
        .map(|tensor| {
            check_elements(tensor)?;
            Ok((tensor.name.as_str(), Saved { tensor, dtype }))
        })
        .collect()
}

fn check_elements(tensor: &AdapterTensor<'_>) -> Result<()> {
    let sizes = tensor.shape.iter();
    let elements = sizes.copied().try_fold(1_usize, usize::checked_mul);
    if elements == Some(tensor.data.len()) {
        return Ok(());
    }
    Err(Failure::system(
        "ADAPTER_SHAPE_MISMATCH",
        format!(
            "The tensor has {} values but the shape {:?}",
            tensor.data.len(),
            tensor.shape
        ),
    )
    .at(format!("`{}`", tensor.name)))
}

/// What PEFT writes into the header.
fn header() -> Option<HashMap<String, String>> {
    Some(HashMap::from([("format".to_owned(), "pt".to_owned())]))
}

fn unwritable(error: &safetensors::SafeTensorError) -> Failure {
    Failure::system("ADAPTER_UNREADABLE", format!("The adapter cannot be saved: {error}"))
}

/// The shapes of all tensors, by name.
pub type Shapes = BTreeMap<String, Vec<usize>>;

/// The shapes of tensors in memory; a name given twice is refused.
pub(super) fn shapes_of(tensors: &[AdapterTensor<'_>]) -> Result<Shapes> {
    let mut shapes = Shapes::new();
    for tensor in tensors {
        if shapes.insert(tensor.name.clone(), tensor.shape.clone()).is_some() {
            return Err(
                Failure::system("ADAPTER_TENSOR_UNEXPECTED", "The tensor is given twice")
                    .at(format!("`{}`", tensor.name)),
            );
        }
    }
    Ok(shapes)
}

/// Which half of a pair a tensor is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Half {
    A,
    B,
}

/// Splits PEFT's key into the module's path and the half.
pub(super) fn parse_name(name: &str) -> Option<(&str, Half)> {
    let path = name.strip_prefix("base_model.model.")?;
    path.strip_suffix(".lora_A.weight")
        .map(|module| (module, Half::A))
        .or_else(|| path.strip_suffix(".lora_B.weight").map(|module| (module, Half::B)))
}

/// Checks that names and shapes are what PEFT and vLLM expect of this configuration: complete pairs
/// of the configured rank, on targets only, every target met.
pub fn check_layout(config: &AdapterConfig, shapes: &Shapes) -> Result<()> {
    let parameters = config.target_parameters.as_deref().unwrap_or_default();
    let mut unmet_modules: BTreeSet<&str> = config.target_modules.iter().map(String::as_str).collect();
    let mut unmet_parameters: BTreeSet<&str> = parameters.iter().map(String::as_str).collect();
    for (name, shape) in shapes {
        let (module, half) = parse_name(name).ok_or_else(|| unexpected(name, "is not a LoRA tensor's name"))?;
        let is_module = config
            .target_modules
            .iter()
            .any(|target| ends_with_path(module, target));
        let holder = module.trim_end_matches(".base_layer");
        let is_routed = !is_module
            && parameters
                .iter()
                .any(|target| ends_with_path(holder, holder_of(target)));
        if !is_module && !is_routed {
            return Err(unexpected(name, "belongs to no target of adapter_config.json"));
        }
        check_shape(name, shape, half, config.r, is_routed)?;
        check_partner(shapes, name, module, shape, half)?;
        if is_routed {
            unmet_parameters.retain(|target| !ends_with_path(holder, holder_of(target)));
        } else {
            unmet_modules.retain(|target| !ends_with_path(module, target));
        }
    }
    match unmet_modules.first().or(unmet_parameters.first()) {
        None => Ok(()),
        Some(target) => Err(Failure::system(
            "ADAPTER_TARGET_UNMATCHED",
            format!("The adapter has no tensor for the target `{target}`"),
        )
        .hint("Choose targets that the model has")),
    }
}

fn check_shape(name: &str, shape: &[usize], half: Half, rank: usize, is_routed: bool) -> Result<()> {
    let inner = match (shape, half) {
        ([inner, other], Half::A) | ([other, inner], Half::B) if *other > 0 => *inner,
        _ => return Err(wrong_shape(name, shape, "two dimensions")),
    };
    let fits = if is_routed {
        inner > 0 && rank > 0 && inner.is_multiple_of(rank)
    } else {
        inner == rank
    };
    if fits {
        return Ok(());
    }
    Err(wrong_shape(name, shape, &format!("the rank {rank}")))
}

fn check_partner(shapes: &Shapes, name: &str, module: &str, shape: &[usize], half: Half) -> Result<()> {
    let (letter, inner) = match half {
        Half::A => ("B", shape.first()),
        Half::B => ("A", shape.last()),
    };
    let partner = format!("base_model.model.{module}.lora_{letter}.weight");
    let Some(other) = shapes.get(&partner) else {
        return Err(missing(&partner));
    };
    let other_inner = if half == Half::A { other.last() } else { other.first() };
    if inner == other_inner {
        Ok(())
    } else {
        Err(wrong_shape(name, shape, &format!("its partner's {other:?}")))
    }
}

fn ends_with_path(path: &str, end: &str) -> bool {
    path.strip_suffix(end)
        .is_some_and(|before| before.is_empty() || before.ends_with('.'))
}

/// `mlp.experts` of `mlp.experts.gate_up_proj`.
fn holder_of(parameter: &str) -> &str {
    parameter.rsplit_once('.').map_or(parameter, |(holder, _)| holder)
}

pub(super) fn missing(name: &str) -> Failure {
    Failure::system("ADAPTER_TENSOR_MISSING", "The adapter lacks a tensor").at(format!("`{name}`"))
}

pub(super) fn unexpected(name: &str, why: &str) -> Failure {
    Failure::system(
        "ADAPTER_TENSOR_UNEXPECTED",
        format!("The adapter has a tensor that {why}"),
    )
    .at(format!("`{name}`"))
}

pub(super) fn wrong_shape(name: &str, shape: &[usize], wanted: &str) -> Failure {
    Failure::system(
        "ADAPTER_SHAPE_MISMATCH",
        format!("The tensor's shape {shape:?} does not fit {wanted}"),
    )
    .at(format!("`{name}`"))
}

/// What reading every value of a saved adapter found.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Scan {
    pub(super) shapes: Shapes,
    pub(super) parameters: u64,
    /// Names of the B tensors that are zero throughout.
    pub(super) zero_b: Vec<String>,
    pub(super) b_tensors: u64,
}

/// Reads a saved adapter as a stream: header, names, and every value, which must be finite.
pub(super) fn scan(file: &Path) -> Result<Scan> {
    let opened = File::open(file).map_err(|error| disk_failure(&error, file))?;
    let total_bytes = opened.metadata().map_err(|error| disk_failure(&error, file))?.len();
    let mut reader = BufReader::with_capacity(CHUNK_BYTES, opened);
    let metadata = read_header(&mut reader, total_bytes, file)?;
    let mut scan = Scan::default();
    // In the order in which the data lies; the header's check has proven that it is without gaps.
    for name in metadata.offset_keys() {
        let info = metadata
            .info(&name)
            .ok_or_else(|| unreadable(file, "its header contradicts itself"))?;
        let elements: usize = info.shape.iter().product();
        let is_zero = scan_values(&mut reader, info.dtype, elements, &name, file)?;
        scan.parameters += elements as u64;
        if matches!(parse_name(&name), Some((_, Half::B))) {
            scan.b_tensors += 1;
            scan.zero_b.extend(is_zero.then(|| name.clone()));
        }
        scan.shapes.insert(name, info.shape.clone());
    }
    Ok(scan)
}

fn read_header(reader: &mut impl Read, total_bytes: u64, file: &Path) -> Result<Metadata> {
    let mut length = [0; 8];
    reader
        .read_exact(&mut length)
        .map_err(|_| unreadable(file, "it is shorter than a header"))?;
    let header_bytes = u64::from_le_bytes(length);
    if header_bytes > MAX_HEADER_BYTES || header_bytes > total_bytes.saturating_sub(8) {
        return Err(unreadable(file, "its header does not fit in the file"));
    }
    let mut header = vec![0; header_bytes as usize];
    reader
        .read_exact(&mut header)
        .map_err(|_| unreadable(file, "its header is cut"))?;
    let metadata: Metadata = serde_json::from_slice(&header).map_err(|error| {
        unreadable(
            file,
            &format!("its header is not what safetensors prescribes ({error})"),
        )
    })?;
    if metadata.data_len() as u64 + 8 + header_bytes != total_bytes {
        return Err(unreadable(file, "its size is not what its header says"));
    }
    Ok(metadata)
}

/// Reads the values of one tensor and returns whether all are zero.
fn scan_values(reader: &mut impl Read, dtype: Dtype, elements: usize, name: &str, file: &Path) -> Result<bool> {
    let width = match dtype {
        Dtype::F32 => 4,
        Dtype::BF16 => 2,
        _ => return Err(unexpected(name, "is neither float32 nor bfloat16")),
    };
    let mut buffer = vec![0; CHUNK_BYTES];
    let mut is_zero = true;
    let mut left = elements * width;
    while left > 0 {
        let taken = left.min(CHUNK_BYTES);
        let chunk = &mut buffer[..taken];
        reader.read_exact(chunk).map_err(|error| disk_failure(&error, file))?;
        for value in chunk.chunks_exact(width).map(value_of) {
            if !value.is_finite() {
                return Err(
                    Failure::system("ADAPTER_NOT_FINITE", format!("The tensor holds {value}"))
                        .at(format!("`{name}`"))
                        .hint("Lower the learning rate; the training diverged"),
                );
            }
            is_zero &= value == 0.0;
        }
        left -= taken;
    }
    Ok(is_zero)
}

/// A little-endian float32, or the upper half of one: bfloat16.
fn value_of(bytes: &[u8]) -> f32 {
    match *bytes {
        [first, second, third, fourth] => f32::from_le_bytes([first, second, third, fourth]),
        [first, second] => f32::from_le_bytes([0, 0, first, second]),
        _ => f32::NAN,
    }
}

fn unreadable(file: &Path, why: &str) -> Failure {
    Failure::system(
        "ADAPTER_UNREADABLE",
        format!("The adapter's weights cannot be read: {why}"),
    )
    .at(format!("`{}`", file.display()))
}
