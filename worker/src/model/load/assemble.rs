//! From finished weights to a model: which weight belongs where.

use std::collections::BTreeMap;

use brightrun_kernels::ops::NormWeight;
use brightrun_kernels::{Backend, DType, Tensor, Weight, WeightStack};

use super::LoadOptions;
use super::store::{Store, Value};
use crate::error::{Failure, Result};
use crate::model::attention::Attention;
use crate::model::config::{DeltaConfig, Mixing, ModelConfig, MoeConfig};
use crate::model::delta::DeltaNet;
use crate::model::experts::Experts;
use crate::model::feed_forward::FeedForward;
use crate::model::layer::Layer;
use crate::model::linear::Linear;
use crate::model::lora::{Module, ModuleId};
use crate::model::mixer::Mixer;
use crate::model::mlp::Mlp;
use crate::model::moe::{Moe, SharedExpert};
use crate::model::norm::Norm;
use crate::model::rope::RopeCache;
use crate::model::transformer::Model;

/// Takes every weight of a configuration out of a store.
///
/// # Errors
/// `MODEL_TENSOR_MISSING` when one was not loaded, `MODEL_READ_PLAN` when it has another form; the backend's own.
pub fn assembled<B: Backend>(
    device: &B,
    config: ModelConfig,
    options: LoadOptions,
    store: Store<B>,
    fingerprint: String,
) -> Result<Model<B>> {
    let mut assembler = Assembler {
        device,
        options,
        store,
        modules: Vec::new(),
        weight_bytes: BTreeMap::new(),
        fingerprint,
    };
    assembler.model(config)
}

struct Assembler<'a, B: Backend> {
    device: &'a B,
    options: LoadOptions,
    store: Store<B>,
    modules: Vec<Module>,
    weight_bytes: BTreeMap<&'static str, u64>,
    fingerprint: String,
}

impl<B: Backend> Assembler<'_, B> {
    fn model(&mut self, config: ModelConfig) -> Result<Model<B>> {
        let embedding = self.matrix("model.embed_tokens.weight")?;
        let layers = (0..config.layers)
            .map(|layer| self.layer(&config, layer))
            .collect::<Result<_>>()?;
        let final_norm = self.norm(&config, "model.norm.weight")?;
        let head = match config.tied_embeddings {
            true => None,
            false => Some(self.matrix("lm_head.weight")?),
        };
        Ok(Model {
            device: self.device.clone(),
            precision: self.options.precision,
            modules: std::mem::take(&mut self.modules),
            embedding,
            layers,
            final_norm,
            head,
            rope: RopeCache::new(config.rope_theta, config.rotary, self.options.rope_frequencies),
            weight_bytes: std::mem::take(&mut self.weight_bytes),
            fingerprint: std::mem::take(&mut self.fingerprint),
            config,
        })
    }

    fn layer(&mut self, config: &ModelConfig, layer: usize) -> Result<Layer<B>> {
        let prefix = format!("model.layers.{layer}");
        Ok(Layer {
            input_norm: self.norm(config, &format!("{prefix}.input_layernorm.weight"))?,
            mixer: match config.mixing(layer) {
                Mixing::Attention => Mixer::Attention(self.attention(config, &format!("{prefix}.self_attn"))?),
                Mixing::Delta(delta) => Mixer::Delta(self.delta(config, delta, &format!("{prefix}.linear_attn"))?),
            },
            middle_norm: self.norm(config, &format!("{prefix}.post_attention_layernorm.weight"))?,
            feed_forward: match config.routing(layer) {
                None => FeedForward::Mlp(Box::new(self.mlp(&format!("{prefix}.mlp"))?)),
                Some(moe) => FeedForward::Moe(Box::new(self.moe(config, moe, &format!("{prefix}.mlp"))?)),
            },
        })
    }

    fn attention(&mut self, config: &ModelConfig, prefix: &str) -> Result<Attention<B>> {
        let head_norm = |loader: &mut Self, name: &str| match config.qk_norm {
            true => loader.norm(config, &format!("{prefix}.{name}.weight")).map(Some),
            false => Ok(None),
        };
        Ok(Attention {
            q: self.linear(&format!("{prefix}.q_proj"), config.qkv_bias)?,
            k: self.linear(&format!("{prefix}.k_proj"), config.qkv_bias)?,
            v: self.linear(&format!("{prefix}.v_proj"), config.qkv_bias)?,
            o: self.linear(&format!("{prefix}.o_proj"), config.output_bias)?,
            q_norm: head_norm(self, "q_norm")?,
            k_norm: head_norm(self, "k_norm")?,
            head_dim: config.head_dim,
            is_gated: config.attention_gate,
        })
    }

    fn delta(&mut self, config: &ModelConfig, delta: &DeltaConfig, prefix: &str) -> Result<DeltaNet<B>> {
        Ok(DeltaNet {
            qkvz: self.linear(&format!("{prefix}.in_proj_qkvz"), false)?,
            ba: self.linear(&format!("{prefix}.in_proj_ba"), false)?,
            out: self.linear(&format!("{prefix}.out_proj"), false)?,
            taps: self.taps(delta, &format!("{prefix}.conv1d.weight"))?,
            a_log: self.vector(&format!("{prefix}.A_log"))?,
            dt_bias: self.vector(&format!("{prefix}.dt_bias"))?,
            norm: self.vector(&format!("{prefix}.norm.weight"))?,
            norm_eps: config.rms_norm_eps,
            key_heads: delta.key_heads,
            value_heads: delta.value_heads,
            key_dim: delta.key_dim,
            value_dim: delta.value_dim,
        })
    }

    /// The convolution `[channels, 1, taps]`, cut into its parts for q, k and v.
    fn taps(&mut self, delta: &DeltaConfig, name: &str) -> Result<[Tensor<B>; 3]> {
        let whole = self.tensor(name)?;
        let bytes = self.device.read(&whole)?;
        let mut rest = bytes.as_slice();
        let mut part = |channels: usize| {
            let (bytes, behind) = rest.split_at(channels * delta.taps * whole.dtype().size_bytes());
            rest = behind;
            self.device.upload(whole.dtype(), [channels, delta.taps], bytes)
        };
        let (keys, values) = (delta.key_width(), delta.value_width());
        let parts = [part(keys)?, part(keys)?, part(values)?];
        self.count(encoding_of(whole.dtype()), bytes.len());
        Ok(parts)
    }

    fn mlp(&mut self, prefix: &str) -> Result<Mlp<B>> {
        Ok(Mlp {
            gate: self.linear(&format!("{prefix}.gate_proj"), false)?,
            up: self.linear(&format!("{prefix}.up_proj"), false)?,
            down: self.linear(&format!("{prefix}.down_proj"), false)?,
        })
    }

    fn moe(&mut self, config: &ModelConfig, moe: &MoeConfig, prefix: &str) -> Result<Moe<B>> {
        let shared = match moe.shared_intermediate {
            None => None,
            Some(_) => Some(SharedExpert {
                mlp: self.mlp(&format!("{prefix}.shared_expert"))?,
                gate: self.linear(&format!("{prefix}.shared_expert_gate"), false)?,
            }),
        };
        Ok(Moe {
            router: self.matrix(&format!("{prefix}.gate.weight"))?,
            experts: self.experts(config, moe, &format!("{prefix}.experts"))?,
            top: moe.top,
            renormalise: moe.renormalise,
            shared,
        })
    }

    fn experts(&mut self, config: &ModelConfig, moe: &MoeConfig, prefix: &str) -> Result<Experts<B>> {
        let gate = self.stack(&format!("{prefix}.gate_proj"))?;
        let up = self.stack(&format!("{prefix}.up_proj"))?;
        let down = self.stack(&format!("{prefix}.down_proj"))?;
        let gate_up = format!("{prefix}.gate_up_proj");
        let down_path = format!("{prefix}.down_proj");
        Ok(Experts {
            gate,
            up,
            down,
            gate_up_module: self.module(&gate_up, (2 * moe.intermediate, config.hidden), Some(moe.experts)),
            down_module: self.module(&down_path, (config.hidden, moe.intermediate), Some(moe.experts)),
        })
    }

    /// All experts' matrices of one projection.
    fn stack(&mut self, key: &str) -> Result<WeightStack<B>> {
        let stack = match self.store.take(key)? {
            Value::Dense(tensor) => WeightStack::Dense(tensor),
            Value::Stack(stack) => stack,
            Value::Nf4(_) => return Err(other_form(key)),
        };
        self.count(stack.encoding(), stack.size_bytes());
        Ok(stack)
    }

    /// A projection, which becomes an adaptable module.
    fn linear(&mut self, path: &str, has_bias: bool) -> Result<Linear<B>> {
        let weight = self.matrix(&format!("{path}.weight"))?;
        let bias = match has_bias {
            true => Some(self.vector(&format!("{path}.bias"))?),
            false => None,
        };
        let module = self.module(path, weight.extents(), None);
        Ok(Linear { module, weight, bias })
    }

    fn module(&mut self, path: &str, (outputs, inputs): (usize, usize), experts: Option<usize>) -> ModuleId {
        self.modules.push(Module {
            path: path.to_owned(),
            outputs,
            inputs,
            experts,
        });
        ModuleId(self.modules.len() - 1)
    }

    fn matrix(&mut self, name: &str) -> Result<Weight<B>> {
        let weight = match self.store.take(name)? {
            Value::Dense(tensor) => Weight::Dense(tensor),
            Value::Nf4(weight) => Weight::Nf4(weight),
            Value::Stack(_) => return Err(other_form(name)),
        };
        self.count(weight.encoding(), weight.size_bytes());
        Ok(weight)
    }

    fn norm(&mut self, config: &ModelConfig, name: &str) -> Result<Norm<B>> {
        Ok(Norm {
            weight: self.vector(name)?,
            style: match config.zero_centred_norms {
                true => NormWeight::ZeroCentred,
                false => NormWeight::Plain,
            },
            eps: config.rms_norm_eps,
        })
    }

    /// A norm's weight, a bias or the like.
    fn vector(&mut self, name: &str) -> Result<Tensor<B>> {
        let tensor = self.tensor(name)?;
        self.count(encoding_of(tensor.dtype()), tensor.size_bytes());
        Ok(tensor)
    }

    fn tensor(&mut self, name: &str) -> Result<Tensor<B>> {
        match self.store.take(name)? {
            Value::Dense(tensor) => Ok(tensor),
            _ => Err(other_form(name)),
        }
    }

    fn count(&mut self, encoding: &'static str, bytes: usize) {
        *self.weight_bytes.entry(encoding).or_default() += bytes as u64;
    }
}

fn other_form(key: &str) -> Failure {
    Failure::system(
        "MODEL_READ_PLAN",
        format!("The weight `{key}` was loaded in a form that its place in the model does not take"),
    )
}

/// The name of a small tensor's encoding, for reports.
fn encoding_of(dtype: DType) -> &'static str {
    match dtype {
        DType::BF16 => "bf16",
        _ => "f32",
    }
}
