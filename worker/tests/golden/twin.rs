//! A model's twins: the same checkpoint, each weight changed by about one rounding error of a sum.
//!
//! The bounds of [`crate::bounds`] count the sums in a chain and take for granted that a layer passes errors on about as large
//! as they came. Gated DeltaNet does not: it normalises small differences of large numbers, twice, and feeds its own error back
//! through its state; and training multiplies what is left at each step. How much is a property of the model and its numbers,
//! so it is measured: a sum of `n` products with rounding errors is the exact sum for weights changed by a relative `λ·√n·u`
//! (Higham & Mary 2019, as in `bounds`), hence two right computations may lie as far apart as twins do, each on its own side.
//! The twin is compared with this program's own results, never with the peer's: a wrong formula is wrong in both alike and
//! gains nothing. Where twins part altogether, as in later steps of a training that a rounding error throws off, the check of
//! that step says nothing: in float64 the peer itself does not repeat what it recorded in float32 there.

use std::path::Path;

use brightrun_worker::error::Failure;
use brightrun_worker::model::ModelConfig;
use brightrun_worker::model::checkpoint::Checkpoint;
use brightrun_worker::model::random::CounterRandom;
use safetensors::tensor::{Dtype, TensorView};
use tempfile::TempDir;

/// Seeds of the changes' signs, one for each twin.
pub const SEEDS: [u64; 3] = [1, 2, 3];

/// Writes the twin of the checkpoint in `source`: each weight in f32, up or down by `relative` of itself.
pub fn write(source: &Path, relative: f64, seed: u64) -> Result<TempDir, Failure> {
    let config = ModelConfig::load(source)?;
    let checkpoint = Checkpoint::open(source)?.with_fp8_blocks(config.fp8_block)?;
    let mut tensors = Vec::new();
    for name in checkpoint.names().filter(|name| !name.ends_with("_scale_inv")) {
        let host = checkpoint.read(name)?;
        let random = CounterRandom::new(seed, name);
        let sign = |place: usize| if random.unit(place as u64) < 0.5 { -1.0 } else { 1.0 };
        let changed = |(place, value): (usize, f32)| (f64::from(value) * (1.0 + relative * sign(place))) as f32;
        let values: Vec<f32> = host.to_f32()?.into_iter().enumerate().map(changed).collect();
        let bytes: Vec<u8> = bytemuck::allocation::pod_collect_to_vec(&values);
        tensors.push((name, host.shape, bytes));
    }
    let views = tensors
        .iter()
        .map(|(name, shape, bytes)| (*name, TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap()));
    let folder = tempfile::tempdir().unwrap();
    let file = safetensors::serialize(views, None).unwrap();
    std::fs::write(folder.path().join("model.safetensors"), file).unwrap();
    std::fs::copy(source.join("config.json"), folder.path().join("config.json")).unwrap();
    Ok(folder)
}
