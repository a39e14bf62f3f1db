//! From a checkpoint folder to a model in a backend's memory, one tensor at a time.
//!
//! A tensor is read, checked, encoded and dropped before the next one is read: the peak is the loaded model plus one
//! tensor (twice where the backend's memory is the host's).

use std::collections::BTreeMap;
use std::path::Path;

use brightrun_kernels::ops::{NormWeight, Precision};
use brightrun_kernels::{Backend, DType, Tensor, Weight, WeightStack};
use sha2::{Digest, Sha256};

use crate::error::Result;
use crate::model::attention::Attention;
use crate::model::checkpoint::Checkpoint;
use crate::model::config::{DeltaConfig, ExpertStorage, Mixing, ModelConfig, MoeConfig};
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
use crate::model::rope::{RopeCache, RopeFrequencies};
use crate::model::tensor_file::HostTensor;
use crate::model::transformer::Model;
use crate::spec::BaseDtype;

/// How much of each tensor goes into the model's fingerprint. Headers and lengths are hashed whole; hashing all weights of
/// a large model would take longer than loading it.
const FINGERPRINT_SAMPLE_BYTES: usize = 4096;

/// How the projections are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// NF4 with double quantisation; embedding, head, norms and biases as in the checkpoint.
    Nf4,
    /// bf16, rounded where the checkpoint has more; norms and biases as in the checkpoint.
    Bf16,
    /// As in the checkpoint.
    Stored,
}

/// How a model is loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadOptions {
    /// How the projections are kept.
    pub encoding: Encoding,
    /// In which precision products are computed.
    pub precision: Precision,
    /// In which precision rotary frequencies are held.
    pub rope_frequencies: RopeFrequencies,
}

/// What [`Model::load`] reports after each tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadProgress {
    /// Tensors loaded.
    pub tensors: usize,
    /// Tensors to be loaded.
    pub tensors_total: usize,
    /// Bytes read.
    pub bytes: u64,
}

impl From<BaseDtype> for LoadOptions {
    fn from(dtype: BaseDtype) -> Self {
        let (encoding, precision) = match dtype {
            BaseDtype::Nf4 => (Encoding::Nf4, Precision::Bf16),
            BaseDtype::Bf16 => (Encoding::Bf16, Precision::Bf16),
            BaseDtype::F32 => (Encoding::Stored, Precision::F32),
        };
        Self {
            encoding,
            precision,
            rope_frequencies: RopeFrequencies::default(),
        }
    }
}

impl<B: Backend> Model<B> {
    /// Loads a checkpoint folder. `progress` is called after each tensor.
    ///
    /// # Errors
    /// `MODEL_…`: see [`ModelConfig::load`], [`Checkpoint::open`], [`Checkpoint::check`], [`Checkpoint::read`]; the backend's own.
    pub fn load(
        device: &B,
        directory: &Path,
        options: LoadOptions,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Self> {
        let config = ModelConfig::load(directory)?;
        let checkpoint = Checkpoint::open(directory)?.with_fp8_blocks(config.fp8_block)?;
        let storage = checkpoint.expert_storage();
        let expected = config.tensors_with(storage);
        checkpoint.check(&expected)?;
        report_unused(
            &checkpoint,
            &expected.iter().map(|tensor| tensor.name.as_str()).collect(),
        );
        let mut loader = Loader {
            device,
            checkpoint: &checkpoint,
            options,
            storage,
            modules: Vec::new(),
            weight_bytes: BTreeMap::new(),
            fingerprint: Sha256::new()
                .chain_update(format!("{config:?} {options:?}"))
                .chain_update(checkpoint.header_hash()),
            progress,
            state: LoadProgress {
                tensors: 0,
                tensors_total: expected.len(),
                bytes: 0,
            },
        };
        loader.model(config)
    }
}

/// Tensors this program has no use for are said, not passed over in silence.
fn report_unused(checkpoint: &Checkpoint, expected: &std::collections::BTreeSet<&str>) {
    let is_unused = |name: &&str| !expected.contains(name) && !expected.contains(name.trim_end_matches("_scale_inv"));
    let (predicting, unused): (Vec<&str>, Vec<&str>) = checkpoint
        .names()
        .filter(is_unused)
        .partition(|name| name.starts_with("mtp."));
    if !predicting.is_empty() {
        tracing::info!(
            count = predicting.len(),
            "the checkpoint's multi-token prediction layers (mtp.*) are not used: training predicts the next token"
        );
    }
    if let Some(first) = unused.first() {
        tracing::warn!(
            count = unused.len(),
            first,
            "the checkpoint holds tensors that this model does not use"
        );
    }
}

struct Loader<'a, B: Backend> {
    device: &'a B,
    checkpoint: &'a Checkpoint,
    options: LoadOptions,
    storage: ExpertStorage,
    modules: Vec<Module>,
    weight_bytes: BTreeMap<&'static str, u64>,
    fingerprint: Sha256,
    progress: &'a mut dyn FnMut(LoadProgress),
    state: LoadProgress,
}

impl<B: Backend> Loader<'_, B> {
    fn model(&mut self, config: ModelConfig) -> Result<Model<B>> {
        let embedding = self.table("model.embed_tokens.weight")?;
        let layers = (0..config.layers)
            .map(|layer| self.layer(&config, layer))
            .collect::<Result<_>>()?;
        let final_norm = self.norm(&config, "model.norm.weight")?;
        let head = match config.tied_embeddings {
            true => None,
            false => Some(self.table("lm_head.weight")?),
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
            fingerprint: hex::encode(self.fingerprint.clone().finalize()),
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
            ba: self.kept_linear(&format!("{prefix}.in_proj_ba"))?,
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
        let host = self.float(name)?;
        let mut rest = host.bytes.as_slice();
        let mut part = |channels: usize| {
            let (bytes, behind) = rest.split_at(channels * delta.taps * host.dtype.size_bytes());
            rest = behind;
            self.device.upload(host.dtype, [channels, delta.taps], bytes)
        };
        let (keys, values) = (delta.key_width(), delta.value_width());
        let parts = [part(keys)?, part(keys)?, part(values)?];
        self.count(encoding_of(host.dtype), host.bytes.len());
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
                gate: self.kept_linear(&format!("{prefix}.shared_expert_gate"))?,
            }),
        };
        Ok(Moe {
            router: self.table(&format!("{prefix}.gate.weight"))?,
            experts: self.experts(config, moe, &format!("{prefix}.experts"))?,
            top: moe.top,
            renormalise: moe.renormalise,
            shared,
        })
    }

    fn experts(&mut self, config: &ModelConfig, moe: &MoeConfig, prefix: &str) -> Result<Experts<B>> {
        let (wide, narrow) = ([moe.intermediate, config.hidden], [config.hidden, moe.intermediate]);
        let gate = self.stack(moe.experts, |loader, expert| match loader.storage {
            ExpertStorage::Each => loader.read(&format!("{prefix}.{expert}.gate_proj.weight")),
            ExpertStorage::Stacked => loader.read_part(&format!("{prefix}.gate_up_proj"), 2 * expert, wide),
        })?;
        let up = self.stack(moe.experts, |loader, expert| match loader.storage {
            ExpertStorage::Each => loader.read(&format!("{prefix}.{expert}.up_proj.weight")),
            ExpertStorage::Stacked => loader.read_part(&format!("{prefix}.gate_up_proj"), 2 * expert + 1, wide),
        })?;
        let down = self.stack(moe.experts, |loader, expert| match loader.storage {
            ExpertStorage::Each => loader.read(&format!("{prefix}.{expert}.down_proj.weight")),
            ExpertStorage::Stacked => loader.read_part(&format!("{prefix}.down_proj"), expert, narrow),
        })?;
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

    /// All experts' matrices of one projection, each encoded by itself.
    fn stack(
        &mut self,
        experts: usize,
        mut read: impl FnMut(&mut Self, usize) -> Result<HostTensor>,
    ) -> Result<WeightStack<B>> {
        let host = read(self, 0)?;
        let first = self.encoded(host)?;
        let mut stack = WeightStack::alloc_like(self.device, experts, &first)?;
        self.device.stack_expert(&first, 0, &mut stack)?;
        drop(first);
        for expert in 1..experts {
            let host = read(self, expert)?;
            let weight = self.encoded(host)?;
            self.device.stack_expert(&weight, expert, &mut stack)?;
        }
        self.count(stack.encoding(), stack.size_bytes());
        Ok(stack)
    }

    /// A projection, which becomes an adaptable module.
    fn linear(&mut self, path: &str, has_bias: bool) -> Result<Linear<B>> {
        let host = self.read(&format!("{path}.weight"))?;
        let weight = self.encoded(host)?;
        let weight = self.counted(weight);
        let bias = match has_bias {
            true => Some(self.vector(&format!("{path}.bias"))?),
            false => None,
        };
        let module = self.module(path, weight.extents(), None);
        Ok(Linear { module, weight, bias })
    }

    /// A projection with a handful of outputs, which steer everything else and are never quantised.
    fn kept_linear(&mut self, path: &str) -> Result<Linear<B>> {
        let weight = self.table(&format!("{path}.weight"))?;
        let module = self.module(path, weight.extents(), None);
        Ok(Linear {
            module,
            weight,
            bias: None,
        })
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

    /// A projection's matrix as it shall be kept.
    fn encoded(&self, host: HostTensor) -> Result<Weight<B>> {
        Ok(match self.options.encoding {
            Encoding::Stored => Weight::Dense(self.upload(&host)?),
            Encoding::Bf16 => Weight::Dense(self.upload(&host.rounded_to_bf16()?)?),
            Encoding::Nf4 => Weight::Nf4(self.device.quantize_nf4(&self.upload(&host)?, true)?),
        })
    }

    /// The embedding, the head, a router: what is never quantised.
    fn table(&mut self, name: &str) -> Result<Weight<B>> {
        let host = self.read(name)?;
        let host = match self.options.encoding {
            Encoding::Bf16 => host.rounded_to_bf16()?,
            Encoding::Nf4 | Encoding::Stored => host,
        };
        let weight = Weight::Dense(self.upload(&host)?);
        Ok(self.counted(weight))
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
        let host = self.float(name)?;
        let tensor = self.upload(&host)?;
        self.count(encoding_of(host.dtype), tensor.size_bytes());
        Ok(tensor)
    }

    /// A small tensor in f32 or bf16, an f16 one widened.
    fn float(&mut self, name: &str) -> Result<HostTensor> {
        let host = self.read(name)?;
        match host.dtype {
            DType::F16 => host.widened(),
            _ => Ok(host),
        }
    }

    fn read(&mut self, name: &str) -> Result<HostTensor> {
        let host = self.checkpoint.read(name)?;
        let stored_bytes = self
            .checkpoint
            .tensor(name)
            .map_or(host.bytes.len(), |stored| stored.size_bytes());
        self.seen(&host, stored_bytes, 1);
        Ok(host)
    }

    /// Matrix number `place` of a stacked tensor. The tensor counts as loaded with its first matrix.
    fn read_part(&mut self, name: &str, place: usize, shape: [usize; 2]) -> Result<HostTensor> {
        let host = self.checkpoint.read_part(name, place * shape[0] * shape[1], &shape)?;
        self.seen(&host, host.bytes.len(), usize::from(place == 0));
        Ok(host)
    }

    fn seen(&mut self, host: &HostTensor, stored_bytes: usize, tensors: usize) {
        let sample = &host.bytes[..host.bytes.len().min(FINGERPRINT_SAMPLE_BYTES)];
        self.fingerprint.update(sample);
        self.state.tensors += tensors;
        self.state.bytes += stored_bytes as u64;
        (self.progress)(self.state);
    }

    fn upload(&self, host: &HostTensor) -> Result<Tensor<B>> {
        Ok(self
            .device
            .upload(host.dtype, brightrun_kernels::Shape::new(&host.shape), &host.bytes)?)
    }

    fn counted(&mut self, weight: Weight<B>) -> Weight<B> {
        self.count(weight.encoding(), weight.size_bytes());
        weight
    }

    fn count(&mut self, encoding: &'static str, bytes: usize) {
        *self.weight_bytes.entry(encoding).or_default() += bytes as u64;
    }
}

/// The name of a small tensor's encoding, for reports.
fn encoding_of(dtype: DType) -> &'static str {
    match dtype {
        DType::BF16 => "bf16",
        _ => "f32",
    }
}
