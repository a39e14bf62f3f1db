//! A model without weights: every tensor that loading a checkpoint of some configuration would leave in memory, in the encodings
//! it would have, and no contents. On a counting backend this takes milliseconds for any size.
//!
//! It mirrors [`load`](crate::model::load), which a test of every family and encoding guards: the same bytes by encoding, the
//! same modules in the same order.

use std::cell::Cell;
use std::collections::BTreeMap;

use brightrun_kernels::ops::NormWeight;
use brightrun_kernels::{Backend, DType, Tensor, Weight, WeightStack};
use half::bf16;

use crate::error::Result;
use crate::model::attention::Attention;
use crate::model::config::{DeltaConfig, Mixing, ModelConfig, MoeConfig};
use crate::model::delta::DeltaNet;
use crate::model::experts::Experts;
use crate::model::feed_forward::FeedForward;
use crate::model::layer::Layer;
use crate::model::linear::Linear;
use crate::model::load::{Encoding, LoadOptions};
use crate::model::lora::{Module, ModuleId};
use crate::model::mixer::Mixer;
use crate::model::mlp::Mlp;
use crate::model::moe::{Moe, SharedExpert};
use crate::model::norm::Norm;
use crate::model::random::CounterRandom;
use crate::model::rope::RopeCache;
use crate::model::transformer::Model;

/// What the tensors of a skeleton hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Contents {
    /// Nothing in particular.
    None,
    /// Seeded small random numbers, others in every tensor; experts of a stack take a few matrices in turn. For measuring without a
    /// checkpoint.
    Random(u64),
    /// The same, but such that routers choose as unevenly as trained ones in every layer: a residual stream that all layers leave
    /// nearly as the embedding made it has one constant element, by which a router sees its experts' popularity.
    Skewed(u64),
}

/// Numbers that a tensor repeats: a prime, so that the rows of no matrix are alike.
const CYCLE: u64 = 8191;

/// Elements of seeded contents.
const SMALL: f64 = 0.02;

/// Different matrices of a stack of experts, which are taken in turn: neighbours differ, and making them takes little.
const DIFFERENT: usize = 8;

/// What keeps the residual stream nearly as it was: a projection of 2048 such elements gives a tenth of its input.
const SMALLER: f64 = 0.002;

/// The constant element of each row of a skewed model's embedding, whose others are normal.
const CONSTANT: f32 = 8.0;

/// How popularity falls with an expert's rank: its logit by this times the rank's logarithm, a Zipf-like law. With normal noise
/// beside it, 512 experts and 10 choices, the busiest gets several times the mean and some get nothing.
const SKEW: f32 = 0.8;

/// A model of `config` on `device`, as loading a checkpoint with tensors of dtype `stored` leaves it; `positions` is the longest
/// document's length.
///
/// # Errors
/// The backend's own.
pub fn skeleton<B: Backend>(
    device: &B,
    config: ModelConfig,
    options: LoadOptions,
    stored: DType,
    positions: usize,
) -> Result<Model<B>> {
    skeleton_with(device, config, options, stored, positions, Contents::None)
}

/// As [`skeleton`], with contents.
///
/// # Errors
/// The backend's own.
pub fn skeleton_with<B: Backend>(
    device: &B,
    config: ModelConfig,
    options: LoadOptions,
    stored: DType,
    positions: usize,
    contents: Contents,
) -> Result<Model<B>> {
    let mut builder = Builder {
        device,
        noise: match contents {
            Contents::None => None,
            Contents::Random(seed) | Contents::Skewed(seed) => Some(CounterRandom::new(seed, "skeleton")),
        },
        drawn: Cell::new(0),
        is_skewed: matches!(contents, Contents::Skewed(_)),
        encoding: options.encoding,
        // Block-scaled FP8 is decoded to f32 when it is read.
        projections: match config.fp8_block {
            Some(_) => DType::F32,
            None => stored,
        },
        stored,
        modules: Vec::new(),
        weight_bytes: BTreeMap::new(),
    };
    let embedding = builder.embedding(config.vocabulary, config.hidden)?;
    let layers = (0..config.layers)
        .map(|layer| builder.layer(&config, layer))
        .collect::<Result<_>>()?;
    let final_norm = builder.norm(&config, config.hidden)?;
    let head = match config.tied_embeddings {
        true => None,
        false => Some(builder.table([config.vocabulary, config.hidden])?),
    };
    Ok(Model {
        device: device.clone(),
        precision: options.precision,
        embedding,
        layers,
        final_norm,
        head,
        rope: match contents {
            Contents::None => RopeCache::uncomputed(config.rotary, device, positions)?,
            // What a step computes with must be numbers.
            Contents::Random(_) | Contents::Skewed(_) => {
                RopeCache::new(config.rope_theta, config.rotary, options.rope_frequencies)
            }
        },
        modules: builder.modules,
        weight_bytes: builder.weight_bytes,
        fingerprint: String::new(),
        config,
    })
}

struct Builder<'a, B: Backend> {
    device: &'a B,
    /// What fills the tensors, if anything.
    noise: Option<CounterRandom>,
    /// How many of its numbers tensors have had.
    drawn: Cell<u64>,
    is_skewed: bool,
    encoding: Encoding,
    /// What projections are after they were read.
    projections: DType,
    /// What everything else is.
    stored: DType,
    modules: Vec<Module>,
    weight_bytes: BTreeMap<&'static str, u64>,
}

impl<B: Backend> Builder<'_, B> {
    fn layer(&mut self, config: &ModelConfig, layer: usize) -> Result<Layer<B>> {
        let prefix = format!("model.layers.{layer}");
        Ok(Layer {
            input_norm: self.norm(config, config.hidden)?,
            mixer: match config.mixing(layer) {
                Mixing::Attention => Mixer::Attention(self.attention(config, &format!("{prefix}.self_attn"))?),
                Mixing::Delta(delta) => Mixer::Delta(self.delta(config, delta, &format!("{prefix}.linear_attn"))?),
            },
            middle_norm: self.norm(config, config.hidden)?,
            feed_forward: match config.routing(layer) {
                None => {
                    let mlp = self.mlp(&format!("{prefix}.mlp"), config.hidden, config.intermediate)?;
                    FeedForward::Mlp(Box::new(mlp))
                }
                Some(moe) => FeedForward::Moe(Box::new(self.moe(config, moe, &format!("{prefix}.mlp"))?)),
            },
        })
    }

    fn attention(&mut self, config: &ModelConfig, prefix: &str) -> Result<Attention<B>> {
        let (heads, keys) = (config.heads * config.head_dim, config.key_value_heads * config.head_dim);
        let queries = if config.attention_gate { 2 * heads } else { heads };
        let inputs = config.hidden;
        let head_norm = |builder: &mut Self| match config.qk_norm {
            true => builder.norm(config, config.head_dim).map(Some),
            false => Ok(None),
        };
        let (q_norm, k_norm) = (head_norm(self)?, head_norm(self)?);
        Ok(Attention {
            q: self.linear(&format!("{prefix}.q_proj"), [queries, inputs], config.qkv_bias)?,
            k: self.linear(&format!("{prefix}.k_proj"), [keys, inputs], config.qkv_bias)?,
            v: self.linear(&format!("{prefix}.v_proj"), [keys, inputs], config.qkv_bias)?,
            o: self.linear(&format!("{prefix}.o_proj"), [inputs, heads], config.output_bias)?,
            q_norm,
            k_norm,
            head_dim: config.head_dim,
            is_gated: config.attention_gate,
        })
    }

    fn delta(&mut self, config: &ModelConfig, delta: &DeltaConfig, prefix: &str) -> Result<DeltaNet<B>> {
        let (keys, values) = (delta.key_width(), delta.value_width());
        let fused = [2 * keys + 2 * values, config.hidden];
        Ok(DeltaNet {
            qkvz: self.linear(&format!("{prefix}.in_proj_qkvz"), fused, false)?,
            ba: self.kept_linear(&format!("{prefix}.in_proj_ba"), [2 * delta.value_heads, config.hidden])?,
            out: self.linear(&format!("{prefix}.out_proj"), [config.hidden, values], false)?,
            taps: [
                self.small(&[keys, delta.taps])?,
                self.small(&[keys, delta.taps])?,
                self.small(&[values, delta.taps])?,
            ],
            a_log: self.small(&[delta.value_heads])?,
            dt_bias: self.small(&[delta.value_heads])?,
            norm: self.small(&[delta.value_dim])?,
            norm_eps: config.rms_norm_eps,
            key_heads: delta.key_heads,
            value_heads: delta.value_heads,
            key_dim: delta.key_dim,
            value_dim: delta.value_dim,
        })
    }

    fn mlp(&mut self, prefix: &str, hidden: usize, width: usize) -> Result<Mlp<B>> {
        Ok(Mlp {
            gate: self.linear(&format!("{prefix}.gate_proj"), [width, hidden], false)?,
            up: self.linear(&format!("{prefix}.up_proj"), [width, hidden], false)?,
            down: self.linear(&format!("{prefix}.down_proj"), [hidden, width], false)?,
        })
    }

    fn moe(&mut self, config: &ModelConfig, moe: &MoeConfig, prefix: &str) -> Result<Moe<B>> {
        let shared = match moe.shared_intermediate {
            None => None,
            Some(width) => Some(SharedExpert {
                mlp: self.mlp(&format!("{prefix}.shared_expert"), config.hidden, width)?,
                gate: self.kept_linear(&format!("{prefix}.shared_expert_gate"), [1, config.hidden])?,
            }),
        };
        Ok(Moe {
            router: self.router(moe.experts, config.hidden)?,
            experts: self.experts(config, moe, &format!("{prefix}.experts"))?,
            top: moe.top,
            renormalise: moe.renormalise,
            shared,
        })
    }

    fn experts(&mut self, config: &ModelConfig, moe: &MoeConfig, prefix: &str) -> Result<Experts<B>> {
        let (wide, narrow) = ([moe.intermediate, config.hidden], [config.hidden, moe.intermediate]);
        Ok(Experts {
            gate: self.stack(moe.experts, wide)?,
            up: self.stack(moe.experts, wide)?,
            down: self.stack(moe.experts, narrow)?,
            gate_up_module: self.module(
                &format!("{prefix}.gate_up_proj"),
                [2 * moe.intermediate, config.hidden],
                Some(moe.experts),
            ),
            down_module: self.module(&format!("{prefix}.down_proj"), narrow, Some(moe.experts)),
        })
    }

    fn stack(&mut self, experts: usize, shape: [usize; 2]) -> Result<WeightStack<B>> {
        let is_quantised = matches!(self.encoding, Encoding::Nf4 | Encoding::Nf4Experts);
        let first = self.encoded(shape, is_quantised)?;
        let mut stack = WeightStack::alloc_like(self.device, experts, &first)?;
        if self.noise.is_some() {
            let others = (1..DIFFERENT.min(experts)).map(|_| self.encoded(shape, is_quantised));
            let others = others.collect::<Result<Vec<_>>>()?;
            let in_turn = std::iter::once(&first).chain(&others).cycle();
            for (expert, matrix) in in_turn.take(experts).enumerate() {
                self.device.stack_expert(matrix, expert, &mut stack)?;
            }
        }
        drop(first);
        self.count(stack.encoding(), stack.size_bytes());
        Ok(stack)
    }

    fn linear(&mut self, path: &str, shape: [usize; 2], has_bias: bool) -> Result<Linear<B>> {
        let weight = self.encoded(shape, self.encoding == Encoding::Nf4)?;
        self.count(weight.encoding(), weight.size_bytes());
        let bias = match has_bias {
            true => Some(self.small(&shape[..1])?),
            false => None,
        };
        let module = self.module(path, shape, None);
        Ok(Linear { module, weight, bias })
    }

    fn kept_linear(&mut self, path: &str, shape: [usize; 2]) -> Result<Linear<B>> {
        let weight = self.table(shape)?;
        let module = self.module(path, shape, None);
        Ok(Linear {
            module,
            weight,
            bias: None,
        })
    }

    fn module(&mut self, path: &str, [outputs, inputs]: [usize; 2], experts: Option<usize>) -> ModuleId {
        self.modules.push(Module {
            path: path.to_owned(),
            outputs,
            inputs,
            experts,
        });
        ModuleId(self.modules.len() - 1)
    }

    fn encoded(&self, shape: [usize; 2], is_quantised: bool) -> Result<Weight<B>> {
        if is_quantised {
            let source = self.tensor(self.projections, &shape)?;
            return Ok(Weight::Nf4(self.device.quantize_nf4(&source, true)?));
        }
        let dtype = match self.encoding {
            Encoding::Bf16 | Encoding::Nf4Experts => DType::BF16,
            Encoding::Nf4 | Encoding::Stored => self.projections,
        };
        Ok(Weight::Dense(self.tensor(dtype, &shape)?))
    }

    fn table(&mut self, shape: [usize; 2]) -> Result<Weight<B>> {
        let tensor = self.tensor(self.table_dtype(), &shape)?;
        Ok(self.counted(tensor))
    }

    fn table_dtype(&self) -> DType {
        match self.encoding {
            Encoding::Bf16 | Encoding::Nf4Experts => DType::BF16,
            Encoding::Nf4 | Encoding::Stored => self.stored,
        }
    }

    fn counted(&mut self, tensor: Tensor<B>) -> Weight<B> {
        let weight = Weight::Dense(tensor);
        self.count(weight.encoding(), weight.size_bytes());
        weight
    }

    fn embedding(&mut self, vocabulary: usize, hidden: usize) -> Result<Weight<B>> {
        if !self.is_skewed {
            return self.table([vocabulary, hidden]);
        }
        self.special([vocabulary, hidden], 1.0, |_| CONSTANT)
    }

    fn router(&mut self, experts: usize, hidden: usize) -> Result<Weight<B>> {
        if !self.is_skewed {
            return self.table([experts, hidden]);
        }
        // What the norm before the router makes of the constant element.
        let width = hidden as f32;
        let seen = CONSTANT / ((CONSTANT * CONSTANT + width - 1.0) / width).sqrt();
        // Ranks in an order without a pattern: 193 is prime to the number of experts or only reorders part of them.
        let popularity = |expert: usize| -SKEW * ((193 * expert % experts + 1) as f32).ln() / seen;
        self.special([experts, hidden], 1.0 / f64::from(width).sqrt(), popularity)
    }

    /// Rows of noise whose first element is `first` of the row.
    fn special(&mut self, shape: [usize; 2], scale: f64, first: impl Fn(usize) -> f32) -> Result<Weight<B>> {
        let mut values = self.values(shape[0] * shape[1], scale);
        for (row, elements) in values.chunks_exact_mut(shape[1]).enumerate() {
            elements[0] = first(row);
        }
        let tensor = self.converted(self.table_dtype(), &shape, &values)?;
        Ok(self.counted(tensor))
    }

    fn norm(&mut self, config: &ModelConfig, width: usize) -> Result<Norm<B>> {
        // A plain norm's weight is near 1; a zero-centred one's near 0, as all contents are.
        let weight = match self.is_skewed && !config.zero_centred_norms {
            true => self.ones(width)?,
            false => self.small(&[width])?,
        };
        Ok(Norm {
            weight,
            style: match config.zero_centred_norms {
                true => NormWeight::ZeroCentred,
                false => NormWeight::Plain,
            },
            eps: config.rms_norm_eps,
        })
    }

    /// A norm's weight, a bias or the like: f32 or bf16, as stored.
    fn small(&mut self, shape: &[usize]) -> Result<Tensor<B>> {
        let (dtype, name) = self.small_dtype();
        let tensor = self.tensor(dtype, shape)?;
        self.count(name, tensor.size_bytes());
        Ok(tensor)
    }

    fn ones(&mut self, width: usize) -> Result<Tensor<B>> {
        let (dtype, name) = self.small_dtype();
        let tensor = self.converted(dtype, &[width], &vec![1.0; width])?;
        self.count(name, tensor.size_bytes());
        Ok(tensor)
    }

    fn small_dtype(&self) -> (DType, &'static str) {
        match self.stored {
            DType::BF16 => (DType::BF16, "bf16"),
            _ => (DType::F32, "f32"),
        }
    }

    fn tensor(&self, dtype: DType, shape: &[usize]) -> Result<Tensor<B>> {
        let shape = brightrun_kernels::Shape::new(shape);
        if self.noise.is_none() {
            return Ok(self.device.alloc(dtype, shape)?);
        }
        let scale = if self.is_skewed { SMALLER } else { SMALL };
        self.converted(dtype, shape.extents(), &self.values(shape.elements(), scale))
    }

    /// A short cycle of numbers, others for every tensor: what they are does not matter, that they are not zero and not alike does.
    fn values(&self, count: usize, scale: f64) -> Vec<f32> {
        let Some(noise) = &self.noise else {
            return vec![0.0; count];
        };
        let begin = self.drawn.get();
        self.drawn.set(begin + CYCLE);
        let places = begin..begin + CYCLE;
        let cycle: Vec<f32> = places.map(|place| (scale * noise.normal(place)) as f32).collect();
        cycle.iter().copied().cycle().take(count).collect()
    }

    fn converted(&self, dtype: DType, shape: &[usize], values: &[f32]) -> Result<Tensor<B>> {
        let shape = brightrun_kernels::Shape::new(shape);
        if dtype == DType::BF16 {
            // As they will lie: a copy in f32 on the device would count among the memory of what is measured.
            let halves: Vec<u8> = values
                .iter()
                .flat_map(|value| bf16::from_f32(*value).to_le_bytes())
                .collect();
            return Ok(self.device.upload(dtype, shape, &halves)?);
        }
        let exact = self.device.upload_f32(shape, values)?;
        let mut tensor = self.device.alloc(dtype, shape)?;
        self.device.copy(&exact, &mut tensor)?;
        Ok(tensor)
    }

    fn count(&mut self, encoding: &'static str, bytes: usize) {
        *self.weight_bytes.entry(encoding).or_default() += bytes as u64;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use std::collections::HashSet;

    use brightrun_kernels::cpu::Cpu;
    use brightrun_kernels::ops::Device;

    use super::*;
    use crate::model::Family;
    use crate::model::feed_forward::FeedForward;
    use crate::spec::BaseDtype;

    /// Measured memory and caches would mean little if layers shared their weights.
    #[test]
    fn every_layer_and_every_neighbouring_expert_has_weights_of_its_own() {
        let device = Cpu::new(Some(1)).unwrap();
        let before = device.memory().in_use_bytes;
        let config = ModelConfig::miniature(Family::Qwen3Next, 320);
        let options = LoadOptions::from(BaseDtype::Nf4Experts);
        let model = skeleton_with(&device, config, options, DType::BF16, 64, Contents::Skewed(1)).unwrap();
        let weights: u64 = model.weight_bytes().values().sum();
        assert!(
            device.memory().in_use_bytes - before >= weights,
            "a weight has no memory of its own"
        );
        let mut seen = HashSet::new();
        for (number, layer) in model.layers.iter().enumerate() {
            let FeedForward::Moe(moe) = &layer.feed_forward else {
                panic!("layer {number} has no experts");
            };
            for stack in [&moe.experts.gate, &moe.experts.up, &moe.experts.down] {
                let WeightStack::Nf4(stack) = stack else {
                    panic!("experts of layer {number} are not quantised");
                };
                let codes = device.read(&stack.codes).unwrap();
                for matrix in codes.chunks_exact(codes.len() / stack.experts) {
                    assert!(seen.insert(matrix.to_vec()), "layer {number} repeats a matrix");
                }
            }
        }
    }
}
