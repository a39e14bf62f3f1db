//! A model without weights: every tensor that loading a checkpoint of some configuration would leave in memory, in the encodings
//! it would have, and no contents. On a counting backend this takes milliseconds for any size.
//!
//! It mirrors [`load`](crate::model::load), which a test of every family and encoding guards: the same bytes by encoding, the
//! same modules in the same order.

use std::collections::BTreeMap;

use brightrun_kernels::ops::{Columns, NormWeight};
use brightrun_kernels::{Backend, DType, Tensor, Weight, WeightStack};

use super::contents::{Filler, unfilled_nf4};
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
use crate::model::rope::RopeCache;
use crate::model::transformer::Model;

/// What the tensors of a skeleton hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Contents {
    /// Nothing in particular.
    None,
    /// Random numbers of this seed, as `contents.rs` makes them, other ones in every matrix, for measuring without a checkpoint.
    /// Routers choose as unevenly as trained ones in every layer: the residual stream, which all layers together leave about as the
    /// embedding made it, has one constant element, by which a router sees its experts' popularity.
    Random(u64),
}

/// The constant element of each row of a filled embedding, whose others have deviation 1.
const CONSTANT: f32 = 8.0;

/// How popularity falls with an expert's rank: its logit by this times the rank's logarithm, a Zipf-like law. With normal noise
/// beside it, 512 experts and 10 choices, the busiest gets several times the mean and some get nothing.
const SKEW: f32 = 0.8;

/// The deviation of biases and of norms' weights.
const SMALL: f32 = 0.02;

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
        filler: Filler::new(
            device,
            match contents {
                Contents::None => None,
                Contents::Random(seed) => Some(seed),
            },
        ),
        // Half of the writers to the residual stream are in front of the feed-forward parts.
        writer: 1.0 / (2.0 * config.layers as f32).sqrt(),
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
            Contents::Random(_) => RopeCache::new(config.rope_theta, config.rotary, options.rope_frequencies),
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
    filler: Filler<'a, B>,
    /// By how much what writes to the residual stream is smaller.
    writer: f32,
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
                self.taps(keys, delta.taps)?,
                self.taps(keys, delta.taps)?,
                self.taps(values, delta.taps)?,
            ],
            a_log: self.small(&[delta.value_heads], 0.0)?,
            dt_bias: self.small(&[delta.value_heads], 0.0)?,
            norm: self.small(&[delta.value_dim], 1.0)?,
            norm_eps: config.rms_norm_eps,
            key_heads: delta.key_heads,
            value_heads: delta.value_heads,
            key_dim: delta.key_dim,
            value_dim: delta.value_dim,
        })
    }

    fn taps(&mut self, channels: usize, taps: usize) -> Result<Tensor<B>> {
        self.vector(&[channels, taps], 0.0, 1.0 / (taps as f32).sqrt())
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
            gate: self.stack(moe.experts, wide, "gate_proj")?,
            up: self.stack(moe.experts, wide, "up_proj")?,
            down: self.stack(moe.experts, narrow, "down_proj")?,
            gate_up_module: self.module(
                &format!("{prefix}.gate_up_proj"),
                [2 * moe.intermediate, config.hidden],
                Some(moe.experts),
            ),
            down_module: self.module(&format!("{prefix}.down_proj"), narrow, Some(moe.experts)),
        })
    }

    fn stack(&mut self, experts: usize, shape: [usize; 2], path: &str) -> Result<WeightStack<B>> {
        let is_quantised = matches!(self.encoding, Encoding::Nf4 | Encoding::Nf4Experts);
        let first = self.unfilled(shape, is_quantised)?;
        let mut stack = WeightStack::alloc_like(self.device, experts, &first)?;
        drop(first);
        self.filler.stack(&mut stack, self.deviation(path, shape))?;
        self.count(stack.encoding(), stack.size_bytes());
        Ok(stack)
    }

    fn linear(&mut self, path: &str, shape: [usize; 2], has_bias: bool) -> Result<Linear<B>> {
        let mut weight = self.unfilled(shape, self.encoding == Encoding::Nf4)?;
        self.filler.weight(&mut weight, self.deviation(path, shape))?;
        self.count(weight.encoding(), weight.size_bytes());
        let bias = match has_bias {
            true => Some(self.small(&shape[..1], 0.0)?),
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

    /// The deviation of a matrix's elements.
    fn deviation(&self, path: &str, [_, inputs]: [usize; 2]) -> f32 {
        let writes = ["o_proj", "out_proj", "down_proj"]
            .iter()
            .any(|name| path.ends_with(name));
        let all = 1.0 / (inputs as f32).sqrt();
        if writes { all * self.writer } else { all }
    }

    /// A matrix of unspecified contents.
    fn unfilled(&self, shape: [usize; 2], is_quantised: bool) -> Result<Weight<B>> {
        if is_quantised {
            return unfilled_nf4(self.device, shape);
        }
        let dtype = match self.encoding {
            Encoding::Bf16 | Encoding::Nf4Experts => DType::BF16,
            Encoding::Nf4 | Encoding::Stored => self.projections,
        };
        Ok(Weight::Dense(self.device.alloc(dtype, shape)?))
    }

    fn table(&mut self, shape: [usize; 2]) -> Result<Weight<B>> {
        let table = self.filled(shape, 1.0 / (shape[1] as f32).sqrt())?;
        Ok(self.counted(table))
    }

    fn filled(&self, shape: [usize; 2], deviation: f32) -> Result<Tensor<B>> {
        let mut table = self.device.alloc(self.table_dtype(), shape)?;
        self.filler.normal(&mut table, 0.0, deviation)?;
        Ok(table)
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
        self.special([vocabulary, hidden], 1.0, |_| CONSTANT)
    }

    fn router(&mut self, experts: usize, hidden: usize) -> Result<Weight<B>> {
        // What the norm before the router makes of the constant element.
        let width = hidden as f32;
        let seen = CONSTANT / ((CONSTANT * CONSTANT + width - 1.0) / width).sqrt();
        // Ranks in an order without a pattern: 193 is prime to the number of experts or only reorders part of them.
        let popularity = |expert: usize| -SKEW * ((193 * expert % experts + 1) as f32).ln() / seen;
        self.special([experts, hidden], 1.0 / width.sqrt(), popularity)
    }

    /// Rows of noise whose first element is `first` of the row.
    fn special(&mut self, shape: [usize; 2], deviation: f32, first: impl Fn(usize) -> f32) -> Result<Weight<B>> {
        let mut table = self.filled(shape, deviation)?;
        if self.filler.seed.is_some() {
            let column: Vec<f32> = (0..shape[0]).map(first).collect();
            let exact = self.device.upload_f32([shape[0], 1], &column)?;
            let mut column = self.device.alloc(table.dtype(), [shape[0], 1])?;
            self.device.copy(&exact, &mut column)?;
            let columns = Columns {
                groups: 1,
                source: 0,
                target: 0,
                width: 1,
            };
            self.device.copy_columns(&column, &mut table, columns)?;
        }
        Ok(self.counted(table))
    }

    fn norm(&mut self, config: &ModelConfig, width: usize) -> Result<Norm<B>> {
        let mean = if config.zero_centred_norms { 0.0 } else { 1.0 };
        let weight = self.small(&[width], mean)?;
        Ok(Norm {
            weight,
            style: match config.zero_centred_norms {
                true => NormWeight::ZeroCentred,
                false => NormWeight::Plain,
            },
            eps: config.rms_norm_eps,
        })
    }

    /// A norm's weight, a bias or the like, near `mean`: f32 or bf16, as stored.
    fn small(&mut self, shape: &[usize], mean: f32) -> Result<Tensor<B>> {
        self.vector(shape, mean, SMALL)
    }

    fn vector(&mut self, shape: &[usize], mean: f32, deviation: f32) -> Result<Tensor<B>> {
        let (dtype, name) = self.small_dtype();
        let mut tensor = self.device.alloc(dtype, brightrun_kernels::Shape::new(shape))?;
        self.filler.normal(&mut tensor, mean, deviation)?;
        self.count(name, tensor.size_bytes());
        Ok(tensor)
    }

    fn small_dtype(&self) -> (DType, &'static str) {
        match self.stored {
            DType::BF16 => (DType::BF16, "bf16"),
            _ => (DType::F32, "f32"),
        }
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
    use brightrun_kernels::emu::emulated;
    use brightrun_kernels::ops::{Device, QuantizeOps};
    use brightrun_kernels::{Error, Nf4StackScales};

    use super::super::contents::nested_offset;
    use super::*;
    use crate::model::feed_forward::FeedForward;
    use crate::model::{Batch, Family};
    use crate::spec::BaseDtype;

    fn filled(device: &Cpu, config: ModelConfig, dtype: BaseDtype) -> Model<Cpu> {
        let options = LoadOptions::from(dtype);
        skeleton_with(device, config, options, DType::BF16, 64, Contents::Random(1)).unwrap()
    }

    /// Measured memory and caches would mean little if layers shared their weights.
    #[test]
    fn every_expert_of_every_layer_has_weights_of_its_own() {
        let device = Cpu::new(Some(1)).unwrap();
        let before = device.memory().in_use_bytes;
        let config = ModelConfig::miniature(Family::Qwen3Next, 320);
        let experts = config.moe.as_ref().unwrap().experts;
        let model = filled(&device, config, BaseDtype::Nf4Experts);
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
        assert_eq!(seen.len(), 3 * experts * model.layers.len());
    }

    #[test]
    fn a_matrix_in_four_bits_has_positive_scales_and_elements_of_the_size_of_a_trained_one() {
        let device = Cpu::new(Some(1)).unwrap();
        let filler = Filler::new(&device, Some(5));
        let (shape, deviation) = ([256, 512], 1.0 / 512f32.sqrt());
        let mut weight = unfilled_nf4(&device, shape).unwrap();
        filler.weight(&mut weight, deviation).unwrap();
        let mut decoded = device.alloc(DType::F32, shape).unwrap();
        device.dequantize(&weight, &mut decoded).unwrap();
        let values = device.read_f32(&decoded).unwrap();
        let square = values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / values.len() as f64;
        let ratio = square.sqrt() / f64::from(deviation);
        // 2048 scales of a deviation of some 15 %, and 131 072 codes: half a percent of sampling.
        assert!((ratio - 1.0).abs() < 0.03, "{ratio}");
        // The largest code is 1: what it decodes to is the block's scale.
        let scales = values.chunks(64).map(|block| block.iter().copied().fold(0.0, f32::max));
        let offset = nested_offset(deviation);
        assert!(
            scales
                .clone()
                .all(|scale| (0.1 * offset..1.7 * offset).contains(&scale))
        );
        assert!(scales.clone().any(|scale| scale > 1.3 * offset), "scales do not vary");
    }

    /// As many layers as the largest model has, in the encoding in which it is measured.
    #[test]
    fn activations_of_48_layers_stay_finite_and_near_what_the_embedding_made_them() {
        let device = Cpu::new(Some(2)).unwrap();
        let mut config = ModelConfig::miniature(Family::Qwen3Next, 320);
        config.layers = 48;
        if let Some(delta) = &mut config.delta {
            delta.layers = (0..48).filter(|layer| layer % 4 != 3).collect();
        }
        let model = filled(&device, config, BaseDtype::Nf4);
        let batch = Batch::prompt(&(0..60).map(|t| 5 * t).collect::<Vec<_>>());
        let inputs = model.inputs(&batch, 0.0).unwrap();
        let pass = model.pass(None, &inputs);
        let square = |x: Tensor<Cpu>| {
            let values = device.read_f32(&x).unwrap();
            values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / values.len() as f64
        };
        let first = square(model.embed(&pass, &inputs).unwrap());
        let last = square(model.hidden(&pass, &inputs).unwrap());
        // Every layer adds something, and all together less than there was.
        assert!((1.05..2.0).contains(&(last / first)), "{first} {last}");
    }
    #[test]
    fn the_same_seed_gives_the_same_weights_on_the_kernels() {
        let cpu = Cpu::new(Some(1)).unwrap();
        let device = match emulated(Some(2)) {
            Ok(device) => device,
            Err(Error::Unsupported { reason, .. }) => return println!("emulated: absent ({reason})"),
            Err(error) => panic!("{error}"),
        };
        let ours = weights(&device);
        assert!(ours == weights(&cpu), "a backend fills weights otherwise");
        let seen: HashSet<_> = ours.iter().collect();
        assert_eq!(seen.len(), ours.len(), "two tensors are alike");
    }

    /// The bits of a matrix in bf16, one in NF4, a stack of experts and an embedding.
    fn weights<B: Backend>(device: &B) -> Vec<Vec<u8>> {
        let filler = Filler::new(device, Some(9));
        let shape = [24, 128];
        let mut quantised = unfilled_nf4(device, shape).unwrap();
        let mut stack = WeightStack::alloc_like(device, 5, &quantised).unwrap();
        filler.weight(&mut quantised, 0.1).unwrap();
        filler.stack(&mut stack, 0.1).unwrap();
        let config = ModelConfig::miniature(Family::Qwen3Next, 320);
        let options = LoadOptions::from(BaseDtype::Nf4Experts);
        let model = skeleton_with(device, config, options, DType::BF16, 64, Contents::Random(1)).unwrap();
        let (Weight::Nf4(quantised), WeightStack::Nf4(stack), Weight::Dense(embedding)) =
            (&quantised, &stack, &model.embedding)
        else {
            panic!("encodings are others");
        };
        let Nf4StackScales::Nested {
            codes,
            nested_absmax,
            offsets,
            ..
        } = &stack.scales
        else {
            panic!("scales are not nested");
        };
        [&quantised.codes, &stack.codes, codes, nested_absmax, offsets, embedding]
            .map(|tensor| device.read(tensor).unwrap())
            .into()
    }
}
