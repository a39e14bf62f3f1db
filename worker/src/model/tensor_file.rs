//! One safetensors file, read by position: no mmap, so that a file on a network volume is read in as few requests as it
//! has tensors, and a file that shrinks while it is read is an error and not a signal.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use brightrun_kernels::DType;
use half::{bf16, f16};
use safetensors::tensor::{Dtype as StoredDtype, Metadata};
use sha2::{Digest, Sha256};

use crate::error::{Failure, Result};

/// The format's own limit on a header's length.
const LARGEST_HEADER_BYTES: u64 = 100_000_000;

/// Where a tensor lies in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredTensor {
    /// Element type.
    pub dtype: DType,
    /// Extents, outermost first.
    pub shape: Vec<usize>,
    /// First byte, counted from the beginning of the file.
    offset: u64,
    /// Length in bytes.
    bytes: usize,
}

/// An open safetensors file whose header has been checked against its length.
#[derive(Debug)]
pub struct TensorFile {
    path: PathBuf,
    file: File,
    tensors: BTreeMap<String, StoredTensor>,
    metadata: BTreeMap<String, String>,
    header_hash: [u8; 32],
}

/// A tensor in host memory.
#[derive(Clone, Debug, PartialEq)]
pub struct HostTensor {
    /// Element type.
    pub dtype: DType,
    /// Extents, outermost first.
    pub shape: Vec<usize>,
    /// Little-endian contents.
    pub bytes: Vec<u8>,
}

impl StoredTensor {
    /// Length in bytes.
    pub fn size_bytes(&self) -> usize {
        self.bytes
    }

    /// First byte, counted from the beginning of the file.
    pub fn offset(&self) -> u64 {
        self.offset
    }
}

impl TensorFile {
    /// Opens a file, reads its header and checks it: offsets without gaps or overlaps, extents that multiply to the
    /// lengths, and a file exactly as long as the header says.
    ///
    /// # Errors
    /// `MODEL_FILE_MISSING`, `MODEL_FILE_DAMAGED`, `MODEL_UNSUPPORTED` (a dtype this program does not read).
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|error| {
            Failure::platform("MODEL_FILE_MISSING", format!("The file cannot be opened: {error}"))
                .at(path.display().to_string())
        })?;
        let length = file.metadata().map_err(|error| read_failure(path, &error))?.len();
        let header = read_header(path, &file, length)?;
        let parsed: Metadata = serde_json::from_slice(&header[8..])
            .map_err(|error| damaged(path, format!("The file's header is damaged: {error}")))?;
        let (tensors, end) = locate(path, &parsed, header.len() as u64)?;
        if end != length {
            return Err(damaged(
                path,
                format!("The file has {length} bytes, but its header describes {end}"),
            ));
        }
        Ok(Self {
            path: path.to_owned(),
            file,
            tensors,
            metadata: parsed.metadata().clone().unwrap_or_default().into_iter().collect(),
            header_hash: Sha256::digest(&header).into(),
        })
    }

    /// Its tensors by name.
    pub fn tensors(&self) -> &BTreeMap<String, StoredTensor> {
        &self.tensors
    }

    /// The free-form strings of its header.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// SHA-256 of the header: names, dtypes, extents and offsets.
    pub fn header_hash(&self) -> [u8; 32] {
        self.header_hash
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Another handle to the open file.
    ///
    /// # Errors
    /// `MODEL_FILE_DAMAGED` when the system gives none.
    pub fn handle(&self) -> Result<File> {
        self.file.try_clone().map_err(|error| read_failure(&self.path, &error))
    }

    /// Reads one tensor.
    ///
    /// # Errors
    /// `MODEL_TENSOR_MISSING` when it is not in the file, `MODEL_FILE_DAMAGED` when it cannot be read.
    pub fn read(&self, name: &str) -> Result<HostTensor> {
        let stored = self.stored(name)?;
        let mut bytes = vec![0; stored.bytes];
        self.file
            .read_exact_at(&mut bytes, stored.offset)
            .map_err(|error| read_failure(&self.path, &error))?;
        Ok(HostTensor {
            dtype: stored.dtype,
            shape: stored.shape.clone(),
            bytes,
        })
    }

    fn stored(&self, name: &str) -> Result<&StoredTensor> {
        self.tensors.get(name).ok_or_else(|| {
            Failure::user("MODEL_TENSOR_MISSING", format!("The file has no tensor `{name}`"))
                .at(self.path.display().to_string())
        })
    }
}

impl HostTensor {
    /// The elements as f32; exact for every float type.
    ///
    /// # Errors
    /// `MODEL_UNSUPPORTED` when they are not f32, bf16 or f16.
    pub fn to_f32(&self) -> Result<Vec<f32>> {
        let mut values = vec![0.0; self.bytes.len() / self.dtype.size_bytes()];
        widen(self.dtype, &self.bytes, &mut values)?;
        Ok(values)
    }

    /// The same tensor in f32.
    ///
    /// # Errors
    /// As [`HostTensor::to_f32`].
    pub fn widened(self) -> Result<Self> {
        if self.dtype == DType::F32 {
            return Ok(self);
        }
        let values = self.to_f32()?;
        Ok(Self {
            dtype: DType::F32,
            shape: self.shape,
            bytes: bytemuck::allocation::pod_collect_to_vec(&values),
        })
    }

    /// Index of the first element that is infinite or not a number.
    pub fn first_non_finite(&self) -> Option<usize> {
        first_non_finite(self.dtype, &self.bytes)
    }
}

/// Index of the first element of little-endian contents that is infinite or not a number; `None` for types that have no such.
pub fn first_non_finite(dtype: DType, bytes: &[u8]) -> Option<usize> {
    /// The exponent's bits of two or four bytes; all set means not finite.
    fn search<const WIDTH: usize>(bytes: &[u8], is_bad: impl Fn(&[u8; WIDTH]) -> bool) -> Option<usize> {
        /// Elements that are looked at without leaving the loop early, so that it becomes vector instructions.
        const AT_ONCE: usize = 1024;
        let elements = bytes.as_chunks::<WIDTH>().0;
        let parts = elements.chunks(AT_ONCE).enumerate();
        let (index, part) = parts
            .into_iter()
            .find(|(_, part)| part.iter().fold(false, |any, element| any | is_bad(element)))?;
        Some(index * AT_ONCE + part.iter().position(is_bad)?)
    }
    match dtype {
        DType::F32 => search(bytes, |word| u32::from_le_bytes(*word) & 0x7f80_0000 == 0x7f80_0000),
        DType::BF16 => search(bytes, |half| u16::from_le_bytes(*half) & 0x7f80 == 0x7f80),
        DType::F16 => search(bytes, |half| u16::from_le_bytes(*half) & 0x7c00 == 0x7c00),
        DType::F8E4M3 => search(bytes, |[code]: &[u8; 1]| code & 0x7f == 0x7f),
        DType::U8 | DType::I32 => None,
    }
}

/// f32 values of little-endian f32, bf16 or f16 contents.
///
/// # Errors
/// `MODEL_UNSUPPORTED` for other types.
pub fn widen(dtype: DType, bytes: &[u8], values: &mut [f32]) -> Result<()> {
    let halves = bytes.as_chunks::<2>().0.iter().map(|half| u16::from_le_bytes(*half));
    match dtype {
        DType::F32 => {
            for (value, word) in values.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *value = f32::from_le_bytes(*word);
            }
        }
        DType::BF16 => {
            for (value, bits) in values.iter_mut().zip(halves) {
                *value = f32::from_bits(u32::from(bits) << 16);
            }
        }
        DType::F16 => {
            for (value, bits) in values.iter_mut().zip(halves) {
                *value = f16::from_bits(bits).to_f32();
            }
        }
        other => {
            return Err(Failure::user(
                "MODEL_UNSUPPORTED",
                format!("{other} is not a float type this program reads"),
            ));
        }
    }
    Ok(())
}

/// bf16 bits of values, rounded to nearest even.
pub fn narrow(values: &[f32]) -> Vec<u16> {
    values.iter().map(|value| bf16::from_f32(*value).to_bits()).collect()
}

/// The length prefix and the header behind it.
fn read_header(path: &Path, file: &File, length: u64) -> Result<Vec<u8>> {
    let mut prefix = [0; 8];
    if length < 8 {
        return Err(damaged(
            path,
            format!("The file has {length} bytes, too few for a safetensors header"),
        ));
    }
    file.read_exact_at(&mut prefix, 0)
        .map_err(|error| read_failure(path, &error))?;
    let header_length = u64::from_le_bytes(prefix);
    if header_length > LARGEST_HEADER_BYTES || header_length > length - 8 {
        return Err(damaged(
            path,
            format!("The file has {length} bytes, but says that its header alone has {header_length}"),
        ));
    }
    let mut header = vec![0; 8 + header_length as usize];
    file.read_exact_at(&mut header, 0)
        .map_err(|error| read_failure(path, &error))?;
    Ok(header)
}

/// Turns a header into places in the file, and refuses one whose tensors leave gaps, overlap, or have other lengths than
/// their extents say. Also gives the end of the last tensor.
fn locate(path: &Path, metadata: &Metadata, data_start: u64) -> Result<(BTreeMap<String, StoredTensor>, u64)> {
    let mut infos: Vec<_> = metadata.tensors().into_iter().collect();
    infos.sort_by_key(|(_, info)| info.data_offsets);
    let mut located = BTreeMap::new();
    let mut end = 0;
    for (name, info) in infos {
        let dtype = supported_dtype(path, &name, info.dtype)?;
        let elements = info
            .shape
            .iter()
            .try_fold(1usize, |product, extent| product.checked_mul(*extent));
        let bytes = elements.and_then(|count| count.checked_mul(dtype.size_bytes()));
        let (start, stop) = info.data_offsets;
        if start != end || bytes != stop.checked_sub(start) {
            return Err(damaged(
                path,
                format!(
                    "The header places the tensor `{name}` ({dtype} {:?}) at bytes {start} to {stop}",
                    info.shape
                ),
            ));
        }
        end = stop;
        let stored = StoredTensor {
            dtype,
            shape: info.shape.clone(),
            offset: data_start + start as u64,
            bytes: stop - start,
        };
        located.insert(name, stored);
    }
    Ok((located, data_start + end as u64))
}

fn supported_dtype(path: &Path, name: &str, stored: StoredDtype) -> Result<DType> {
    match stored {
        StoredDtype::F32 => Ok(DType::F32),
        StoredDtype::BF16 => Ok(DType::BF16),
        StoredDtype::F16 => Ok(DType::F16),
        StoredDtype::F8_E4M3 => Ok(DType::F8E4M3),
        StoredDtype::U8 => Ok(DType::U8),
        StoredDtype::I32 => Ok(DType::I32),
        other => Err(Failure::user(
            "MODEL_UNSUPPORTED",
            format!("The tensor `{name}` has the dtype {other:?}, which is not supported"),
        )
        .at(path.display().to_string())
        .hint("Use a bf16, f16, f32 or block-wise FP8 checkpoint")),
    }
}

fn damaged(path: &Path, message: String) -> Failure {
    Failure::platform("MODEL_FILE_DAMAGED", message)
        .at(path.display().to_string())
        .hint("Download the file again")
}

fn read_failure(path: &Path, error: &std::io::Error) -> Failure {
    damaged(path, format!("The file cannot be read: {error}"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn write_sample(path: &Path) -> Vec<u8> {
        let bytes: Vec<u8> = bytemuck::allocation::pod_collect_to_vec(&[1.0f32, -2.5, 3.0, 0.0]);
        let view = safetensors::tensor::TensorView::new(StoredDtype::F32, vec![2, 2], &bytes).unwrap();
        let file = safetensors::serialize([("a", view)], None).unwrap();
        std::fs::write(path, &file).unwrap();
        file
    }

    #[test]
    fn a_tensor_is_read_back_as_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.safetensors");
        write_sample(&path);
        let tensor = TensorFile::open(&path).unwrap().read("a").unwrap();
        assert_eq!(tensor.shape, [2, 2]);
        assert_eq!(tensor.to_f32().unwrap(), [1.0, -2.5, 3.0, 0.0]);
    }

    #[test]
    fn every_truncation_and_every_extra_byte_is_noticed_from_the_header_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.safetensors");
        let whole = write_sample(&path);
        for length in 0..whole.len() {
            std::fs::write(&path, &whole[..length]).unwrap();
            assert_eq!(
                TensorFile::open(&path).unwrap_err().code,
                "MODEL_FILE_DAMAGED",
                "{length} bytes"
            );
        }
        std::fs::write(&path, [whole, vec![0]].concat()).unwrap();
        assert_eq!(TensorFile::open(&path).unwrap_err().code, "MODEL_FILE_DAMAGED");
    }

    #[test]
    fn non_finite_elements_are_found_in_every_float_type() {
        let halves = |bits: [u16; 2], dtype| HostTensor {
            dtype,
            shape: vec![2],
            bytes: bytemuck::allocation::pod_collect_to_vec(&bits),
        };
        assert_eq!(halves([0x3f80, 0x7fc0], DType::BF16).first_non_finite(), Some(1));
        assert_eq!(halves([0xff80, 0x3f80], DType::BF16).first_non_finite(), Some(0));
        assert_eq!(halves([0x3c00, 0x7c00], DType::F16).first_non_finite(), Some(1));
        assert_eq!(halves([0x7bff, 0x3c00], DType::F16).first_non_finite(), None);
    }

    #[test]
    fn rounding_to_bf16_is_to_nearest_even() {
        let values = [0x3f80_8000, 0x3f81_8000, 0x3f80_8001].map(f32::from_bits);
        assert_eq!(narrow(&values), [0x3f80, 0x3f82, 0x3f81]);
    }

    #[test]
    fn widening_is_exact_in_every_float_type() {
        let mut values = [0.0; 2];
        widen(DType::BF16, &[0x80, 0x3f, 0x40, 0xc0], &mut values).unwrap();
        assert_eq!(values, [1.0, -3.0]);
        widen(DType::F16, &[0x00, 0x3c, 0x01, 0x00], &mut values).unwrap();
        assert_eq!(values, [1.0, 2f32.powi(-24)]);
        widen(DType::F32, bytemuck::cast_slice(&[0.1f32, -7.0]), &mut values).unwrap();
        assert_eq!(values, [0.1, -7.0]);
        assert_eq!(
            widen(DType::U8, &[1, 2], &mut values).unwrap_err().code,
            "MODEL_UNSUPPORTED"
        );
    }

    #[test]
    fn an_element_that_is_not_finite_is_found_wherever_it_lies() {
        let mut bytes = vec![0; 3 * 4096 + 6];
        assert_eq!(first_non_finite(DType::BF16, &bytes), None);
        for element in [0, 1023, 1024, 5000, 6146] {
            bytes[2 * element..2 * element + 2].copy_from_slice(&[0x80, 0x7f]);
            assert_eq!(first_non_finite(DType::BF16, &bytes), Some(element));
            bytes[2 * element..2 * element + 2].fill(0);
        }
        assert_eq!(first_non_finite(DType::F8E4M3, &[0x7e, 0xff]), Some(1));
    }
}
