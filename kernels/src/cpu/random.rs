//! Random contents.

use half::bf16;

use super::Cpu;
use crate::contract;
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::random::normal;
use crate::ops::{Noise, RandomOps, random_bits};
use crate::tensor::Tensor;

/// Bytes of a task.
const TASK_BYTES: usize = 256 << 10;

impl RandomOps for Cpu {
    fn fill_random(&self, tensor: &mut Tensor<Self>, key: u64, noise: Noise) -> Result<()> {
        contract::fill_random(tensor, noise)?;
        let dtype = tensor.dtype();
        let tasks = tensor.buffer_mut().bytes_mut().chunks_mut(TASK_BYTES).enumerate();
        self.for_each_item(tasks.collect(), |(task, bytes)| {
            let first = (task * TASK_BYTES / dtype.size_bytes()) as u64;
            match noise {
                Noise::Bytes => {
                    for (counter, out) in (first / 8..).zip(bytes.chunks_mut(8)) {
                        out.copy_from_slice(&random_bits(key, counter).to_le_bytes()[..out.len()]);
                    }
                }
                Noise::Normal { mean, deviation } => {
                    let step = Noise::step(deviation);
                    let values = (first..).map(|counter| normal(random_bits(key, counter), mean, step));
                    fill(bytes, dtype, values);
                }
            }
        });
        Ok(())
    }
}

/// Elements of a dtype, one after another.
fn fill(bytes: &mut [u8], dtype: DType, values: impl Iterator<Item = f32>) {
    match dtype {
        DType::BF16 => {
            for (out, value) in bytes.as_chunks_mut::<2>().0.iter_mut().zip(values) {
                *out = bf16::from_f32(value).to_le_bytes();
            }
        }
        _ => {
            for (out, value) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(values) {
                *out = value.to_le_bytes();
            }
        }
    }
}
