//! The rotary table, grown to the longest position seen.

use std::sync::{Arc, Mutex, PoisonError};

use brightrun_kernels::ops::RopeTable;
use brightrun_kernels::{Backend, DType};
use half::bf16;

use crate::error::Result;

/// Positions are added in steps of this many, so that growing documents do not rebuild the table each time.
const GROWTH: usize = 1024;

/// In which precision the rotary frequencies are held, before angles are computed from them in f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RopeFrequencies {
    /// f32: what transformers' `from_pretrained`, vLLM and all servers compute with.
    #[default]
    F32,
    /// Rounded to bf16: what a transformers model holds after it was cast to bf16 as a whole, buffers included, and what
    /// adapters trained by such scripts have seen. At position 500 the angle is off by up to one radian.
    Bf16,
}

/// A table shared by all layers.
pub struct RopeCache<B: Backend> {
    theta: f64,
    rotary: usize,
    frequencies: RopeFrequencies,
    table: Mutex<Option<(usize, Arc<RopeTable<B>>)>>,
}

impl<B: Backend> RopeCache<B> {
    /// A table for heads of which the first `rotary` elements are rotated, with frequencies `theta^(−2p / rotary)`.
    pub fn new(theta: f64, rotary: usize, frequencies: RopeFrequencies) -> Self {
        Self {
            theta,
            rotary,
            frequencies,
            table: Mutex::new(None),
        }
    }

    /// A table of exactly so many positions (rounded up as [`RopeCache::table`] does) without contents, for backends that only
    /// count: a table for a long context takes longer to compute than everything else there.
    ///
    /// # Errors
    /// The backend's own.
    pub fn uncomputed(rotary: usize, device: &B, positions: usize) -> Result<Self> {
        let length = rounded(positions);
        let table = RopeTable {
            cos: device.alloc(DType::F32, [length, rotary / 2])?,
            sin: device.alloc(DType::F32, [length, rotary / 2])?,
        };
        Ok(Self {
            theta: 1.0,
            rotary,
            frequencies: RopeFrequencies::F32,
            table: Mutex::new(Some((length, Arc::new(table)))),
        })
    }

    /// A table of at least `positions` positions.
    ///
    /// # Errors
    /// The backend's own.
    pub fn table(&self, device: &B, positions: usize) -> Result<Arc<RopeTable<B>>> {
        let mut held = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, table)) = held.as_ref().filter(|(length, _)| *length >= positions) {
            return Ok(Arc::clone(table));
        }
        let length = rounded(positions);
        let table = Arc::new(self.build(device, length)?);
        *held = Some((length, Arc::clone(&table)));
        Ok(table)
    }

    /// Rounds where Hugging Face's modelling code rounds: power, frequency and angle in f32; cosine and sine of that angle
    /// are exact to f32.
    fn build(&self, device: &B, length: usize) -> Result<RopeTable<B>> {
        let pairs = self.rotary / 2;
        let exact = |pair: usize| 1.0 / self.theta.powf(f64::from((2 * pair) as f32 / self.rotary as f32)) as f32;
        let frequencies: Vec<f32> = match self.frequencies {
            RopeFrequencies::F32 => (0..pairs).map(exact).collect(),
            RopeFrequencies::Bf16 => (0..pairs).map(|pair| bf16::from_f32(exact(pair)).to_f32()).collect(),
        };
        let angles =
            (0..length).flat_map(|position| frequencies.iter().map(move |frequency| position as f32 * frequency));
        let (cos, sin): (Vec<f32>, Vec<f32>) = angles
            .map(|angle| (f64::from(angle).cos() as f32, f64::from(angle).sin() as f32))
            .unzip();
        Ok(RopeTable {
            cos: device.upload_f32([length, pairs], &cos)?,
            sin: device.upload_f32([length, pairs], &sin)?,
        })
    }
}

fn rounded(positions: usize) -> usize {
    positions.next_multiple_of(GROWTH).max(GROWTH)
}
