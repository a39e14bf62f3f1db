//! From a checkpoint folder to a model in a backend's memory, one tensor at a time.
//!
//! A tensor is read, checked, encoded and dropped before the next one is read: the peak is the loaded model plus one
//! tensor (twice where the backend's memory is the host's).

use std::collections::BTreeMap;
use std::path::Path;

use brightrun_kernels::ops::{NormWeight, Precision};
use brightrun_kernels::{Backend, DType, Tensor, Weight};
use sha2::{Digest, Sha256};

use crate::error::Result;
use crate::model::attention::Attention;
use crate::model::checkpoint::Checkpoint;
use crate::model::config::ModelConfig;
use crate::model::layer::{FeedForward, Layer, Mixer};
use crate::model::linear::Linear;
use crate::model::lora::{Module, ModuleId};
use crate::model::mlp::Mlp;
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
        let checkpoint = Checkpoint::open(directory)?;
        let expected = config.tensors();
        checkpoint.check(&expected)?;
        report_unused(
            &checkpoint,
            &expected.iter().map(|tensor| tensor.name.as_str()).collect(),
        );
        let mut loader = Loader {
            device,
            checkpoint: &checkpoint,
            options,
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
    let unused: Vec<&str> = checkpoint.names().filter(|name| !expected.contains(name)).collect();
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
            .map(|layer| self.layer(&config, &format!("model.layers.{layer}")))
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
            rope: RopeCache::new(config.rope_theta, config.head_dim, self.options.rope_frequencies),
            weight_bytes: std::mem::take(&mut self.weight_bytes),
            fingerprint: hex::encode(self.fingerprint.clone().finalize()),
            config,
        })
    }

    fn layer(&mut self, config: &ModelConfig, prefix: &str) -> Result<Layer<B>> {
        let head_norm = |loader: &mut Self, name: &str| match config.qk_norm {
            true => loader
                .norm(config, &format!("{prefix}.self_attn.{name}.weight"))
                .map(Some),
            false => Ok(None),
        };
        Ok(Layer {
            input_norm: self.norm(config, &format!("{prefix}.input_layernorm.weight"))?,
            mixer: Mixer::Attention(Attention {
                q: self.linear(&format!("{prefix}.self_attn.q_proj"), config.qkv_bias)?,
                k: self.linear(&format!("{prefix}.self_attn.k_proj"), config.qkv_bias)?,
                v: self.linear(&format!("{prefix}.self_attn.v_proj"), config.qkv_bias)?,
                o: self.linear(&format!("{prefix}.self_attn.o_proj"), config.output_bias)?,
                q_norm: head_norm(self, "q_norm")?,
                k_norm: head_norm(self, "k_norm")?,
                head_dim: config.head_dim,
            }),
            middle_norm: self.norm(config, &format!("{prefix}.post_attention_layernorm.weight"))?,
            feed_forward: FeedForward::Mlp(Mlp {
                gate: self.linear(&format!("{prefix}.mlp.gate_proj"), false)?,
                up: self.linear(&format!("{prefix}.mlp.up_proj"), false)?,
                down: self.linear(&format!("{prefix}.mlp.down_proj"), false)?,
            }),
        })
    }

    /// A projection, which becomes an adaptable module.
    fn linear(&mut self, path: &str, has_bias: bool) -> Result<Linear<B>> {
        let weight = self.projection(&format!("{path}.weight"))?;
        let bias = match has_bias {
            true => Some(self.vector(&format!("{path}.bias"))?),
            false => None,
        };
        let (outputs, inputs) = weight.extents();
        let module = ModuleId(self.modules.len());
        self.modules.push(Module {
            path: path.to_owned(),
            outputs,
            inputs,
        });
        Ok(Linear { module, weight, bias })
    }

    fn projection(&mut self, name: &str) -> Result<Weight<B>> {
        let host = self.read(name)?;
        let weight = match self.options.encoding {
            Encoding::Stored => Weight::Dense(self.upload(&host)?),
            Encoding::Bf16 => Weight::Dense(self.upload(&host.rounded_to_bf16()?)?),
            Encoding::Nf4 => Weight::Nf4(self.device.quantize_nf4(&self.upload(&host)?, true)?),
        };
        Ok(self.counted(weight))
    }

    /// The embedding or the head.
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
            style: NormWeight::Plain,
            eps: config.rms_norm_eps,
        })
    }

    /// A norm's weight or a bias: f32 or bf16, an f16 one widened.
    fn vector(&mut self, name: &str) -> Result<Tensor<B>> {
        let host = self.read(name)?;
        let host = if host.dtype == DType::F16 {
            host.widened()?
        } else {
            host
        };
        let tensor = self.upload(&host)?;
        self.count(
            if host.dtype == DType::BF16 { "bf16" } else { "f32" },
            tensor.size_bytes(),
        );
        Ok(tensor)
    }

    fn read(&mut self, name: &str) -> Result<HostTensor> {
        let host = self.checkpoint.read(name)?;
        let sample = &host.bytes[..host.bytes.len().min(FINGERPRINT_SAMPLE_BYTES)];
        self.fingerprint.update(sample);
        self.state.tensors += 1;
        self.state.bytes += host.bytes.len() as u64;
        (self.progress)(self.state);
        Ok(host)
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
