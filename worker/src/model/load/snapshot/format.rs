//! How a snapshot lies on the disk, and what it belongs to.

use std::path::Path;
use std::time::UNIX_EPOCH;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use xxhash_rust::xxh3::xxh3_128;

use crate::error::{Failure, Result};
use crate::model::checkpoint;
use crate::model::load::Encoding;
use crate::model::load::store::{Form, Slot};

/// Raised whenever a reader of this program would misread an older file.
pub const VERSION: u32 = 1;

/// Every section begins at a multiple of this: the page size, and what unbuffered reads want.
pub const ALIGNMENT: u64 = 4096;

/// Bytes that share one hash.
pub const PIECE_BYTES: usize = 8 << 20;

const MAGIC: [u8; 8] = *b"BRsnap\r\n";

/// The head: where the table lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// First byte of the table.
    pub table_offset: u64,
    /// Bytes of the table; the file ends with it.
    pub table_length: u64,
    /// The table's hash.
    pub table_hash: u128,
}

impl Head {
    /// Its bytes: magic, version, place and hash of the table, and a hash of all that.
    pub fn encoded(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(u64::from(VERSION).to_le_bytes());
        bytes.extend(self.table_offset.to_le_bytes());
        bytes.extend(self.table_length.to_le_bytes());
        bytes.extend(self.table_hash.to_le_bytes());
        bytes.extend(xxh3_128(&bytes).to_le_bytes());
        bytes.resize(ALIGNMENT as usize, 0);
        bytes
    }

    /// Reads a head back; `None` when it is none of this version, or damaged.
    pub fn decoded(bytes: &[u8]) -> Option<Self> {
        let (body, rest) = bytes.split_at_checked(48)?;
        let (hash, padding) = rest.split_at_checked(16)?;
        let is_whole = xxh3_128(body).to_le_bytes() == *hash && padding.iter().all(|byte| *byte == 0);
        let number = |at: usize| {
            let bytes = body.get(at..at + 8)?.try_into().ok()?;
            Some(u64::from_le_bytes(bytes))
        };
        if !is_whole || body[..8] != MAGIC || number(8)? != u64::from(VERSION) {
            return None;
        }
        Some(Self {
            table_offset: number(16)?,
            table_length: number(24)?,
            table_hash: u128::from_le_bytes(body.get(32..48)?.try_into().ok()?),
        })
    }
}

/// What lies where.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Table {
    /// What the snapshot belongs to; see [`identity`].
    pub identity: String,
    /// The folder of the checkpoint it was made from, for people.
    pub checkpoint: String,
    /// The encoding's name, for people.
    pub encoding: String,
    /// Version of the program that wrote it, for people.
    pub program: String,
    /// The part of the model's fingerprint that depends on the weights.
    pub weights_digest: String,
    /// The weights, in the order of the file.
    pub weights: Vec<WeightRecord>,
}

/// One weight.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct WeightRecord {
    /// Its name and form.
    #[serde(flatten)]
    pub slot: Slot,
    /// The bits of [`Value::offset`](crate::model::load::store::Value::offset).
    pub offset_bits: u32,
    /// Its tensors.
    pub sections: Vec<SectionRecord>,
}

/// One tensor.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SectionRecord {
    /// First byte in the file.
    pub offset: u64,
    /// XXH3-128 of each [`PIECE_BYTES`], in hexadecimal.
    pub hashes: Vec<String>,
}

/// Where each section of each slot will lie, and the first byte behind all of them.
pub fn layout(slots: &[Slot]) -> (Vec<Vec<u64>>, u64) {
    let mut end = ALIGNMENT;
    let mut place = |form: &Form| {
        form.sections()
            .iter()
            .map(|section| {
                let offset = end;
                end = (offset + section.size_bytes() as u64).next_multiple_of(ALIGNMENT);
                offset
            })
            .collect()
    };
    let offsets = slots.iter().map(|slot| place(&slot.form)).collect();
    (offsets, end)
}

/// The hash of a piece, as tables have it.
pub fn piece_hash(bytes: &[u8]) -> String {
    format!("{:032x}", xxh3_128(bytes))
}

/// The hash of a table, as heads have it.
pub fn table_hash(bytes: &[u8]) -> u128 {
    xxh3_128(bytes)
}

/// What a checkpoint is, as far as a look at its folder tells: SHA-256 over its configuration, its index, and names, lengths and
/// times of all its files; with it their bytes. The encoding and this format's version are part of it.
///
/// # Errors
/// `MODEL_FILE_MISSING` and the like, as [`checkpoint::file_names`].
pub fn identity(directory: &Path, encoding: Encoding) -> Result<(String, u64)> {
    let unreadable = |error: std::io::Error| {
        Failure::platform(
            "MODEL_FILE_MISSING",
            format!("A file of the model cannot be read: {error}"),
        )
        .at(directory.display().to_string())
    };
    let mut hash = Sha256::new_with_prefix(format!("snapshot {VERSION} {}", encoding.name()));
    for text in ["config.json", checkpoint::INDEX] {
        let path = directory.join(text);
        if path.is_file() {
            hash.update(Sha256::digest(std::fs::read(path).map_err(unreadable)?));
        }
    }
    let mut total = 0;
    for name in checkpoint::file_names(directory)? {
        let facts = std::fs::metadata(directory.join(&name)).map_err(unreadable)?;
        let modified = facts
            .modified()
            .ok()
            .and_then(|time| time.duration_since(UNIX_EPOCH).ok());
        let nanoseconds = modified.map_or(0, |time| time.as_nanos());
        hash.update(format!("\n{name} {} {nanoseconds}", facts.len()));
        total += facts.len();
    }
    Ok((hex::encode(hash.finalize()), total))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use brightrun_kernels::DType;

    use super::*;

    #[test]
    fn a_head_is_read_back_and_every_changed_byte_is_noticed() {
        let head = Head {
            table_offset: 1 << 40,
            table_length: 12_345,
            table_hash: u128::MAX / 3,
        };
        let bytes = head.encoded();
        assert_eq!((bytes.len() as u64, Head::decoded(&bytes)), (ALIGNMENT, Some(head)));
        for place in (0..70).chain([4000, 4095]) {
            let mut damaged = bytes.clone();
            damaged[place] ^= 0x40;
            assert_eq!(Head::decoded(&damaged), None, "byte {place}");
        }
        assert_eq!(Head::decoded(&bytes[..60]), None);
    }

    #[test]
    fn sections_are_aligned_in_order_and_do_not_overlap() {
        let form = |form| Slot {
            key: String::new(),
            form,
            parts: 1,
        };
        let slots = [
            form(Form::Dense {
                dtype: DType::BF16,
                shape: vec![3, 5],
            }),
            form(Form::Nf4Stack {
                experts: 3,
                outputs: 40,
                inputs: 64,
            }),
            form(Form::Nf4 {
                outputs: 10_000,
                inputs: 64,
            }),
        ];
        let (offsets, end) = layout(&slots);
        let lengths: Vec<u64> = slots
            .iter()
            .flat_map(|slot| slot.form.sections())
            .map(|section| section.size_bytes() as u64)
            .collect();
        let offsets: Vec<u64> = offsets.into_iter().flatten().chain([end]).collect();
        assert_eq!(offsets.len(), lengths.len() + 1);
        for (place, length) in lengths.iter().enumerate() {
            assert_eq!(offsets[place] % ALIGNMENT, 0);
            let gap = offsets[place + 1] - offsets[place] - length;
            assert!(gap < ALIGNMENT, "section {place}");
        }
    }
}
