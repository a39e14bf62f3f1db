//! The cases: shapes of Qwen3-Next-80B-A3B (width 2048, 512 experts of 512, top 10, 151 936 tokens of vocabulary), by the goals
//! they answer.

use brightrun_kernels::ops::{
    AdamW, AttentionBackward, AttentionForward, BlockMoment, ConvolutionBackward, ConvolutionForward, DELTA_CHUNK,
    DeltaBackward, DeltaForward, GroupedLinearBackward, GroupedLinearForward, GroupedLoraBackward, LinearBackward,
    LinearCrossEntropy, LinearForward, LoraForward, NormForward, NormWeight, Precision, Routing, RowOrder, Write,
};
use brightrun_kernels::testing::Random;
use brightrun_kernels::{DType, Result, Tensor, WeightStack};
use serde_json::{Value, json};

use crate::clock::Clock;
use crate::operands::{activation, documents, room, single, skewed_logits, stack, weight};

/// One call of a case's op.
pub type Body<'a> = Box<dyn FnMut() -> Result<()> + 'a>;

/// What is measured, with its sizes.
#[derive(Clone, Copy, Debug)]
pub enum Work {
    Copy {
        elements: usize,
    },
    Dequantize {
        outputs: usize,
        inputs: usize,
    },
    Quantize {
        outputs: usize,
        inputs: usize,
    },
    Linear {
        tokens: usize,
        outputs: usize,
        inputs: usize,
        nf4: bool,
        rank: usize,
    },
    LinearInput {
        tokens: usize,
        outputs: usize,
        inputs: usize,
        nf4: bool,
    },
    Grouped {
        tokens: usize,
        experts: usize,
        top: usize,
        outputs: usize,
        inputs: usize,
    },
    GroupedInput {
        tokens: usize,
        experts: usize,
        top: usize,
        outputs: usize,
        inputs: usize,
    },
    Experts {
        tokens: usize,
        experts: usize,
        top: usize,
        inner: usize,
        width: usize,
    },
    GroupedLora {
        tokens: usize,
        experts: usize,
        top: usize,
        outputs: usize,
        inputs: usize,
        rank: usize,
    },
    Delta {
        tokens: usize,
        documents: usize,
        key_heads: usize,
        value_heads: usize,
        dim: usize,
    },
    DeltaBackward {
        tokens: usize,
        documents: usize,
        key_heads: usize,
        value_heads: usize,
        dim: usize,
    },
    Convolution {
        tokens: usize,
        documents: usize,
        channels: usize,
    },
    ConvolutionBackward {
        tokens: usize,
        documents: usize,
        channels: usize,
    },
    Loss {
        tokens: usize,
        width: usize,
        vocabulary: usize,
    },
    Attention {
        tokens: usize,
        documents: usize,
        heads: usize,
        kv_heads: usize,
        dim: usize,
    },
    AttentionBackward {
        tokens: usize,
        documents: usize,
        heads: usize,
        kv_heads: usize,
        dim: usize,
    },
    Adamw {
        elements: usize,
    },
    Adamw8bit {
        elements: usize,
    },
    Norm {
        tokens: usize,
        width: usize,
    },
    Swiglu {
        tokens: usize,
        width: usize,
    },
}

/// A case.
pub struct Case {
    /// Goal, op and shape.
    pub name: String,
    /// The goal it answers.
    pub goal: &'static str,
    pub work: Work,
    /// Bytes that must be moved.
    pub bytes: f64,
    /// Floating-point operations that must be done.
    pub flops: f64,
}

impl Case {
    pub fn describe(&self) -> Value {
        json!({
            "name": self.name, "goal": self.goal, "work": format!("{:?}", self.work),
            "bytes": self.bytes, "flops": self.flops,
        })
    }
}

/// Bytes of an NF4 element with its nested scale: half a byte, and a code and 1/256 of a float for 64.
const NF4: f64 = 0.5 + (1.0 + 4.0 / 256.0) / 64.0;
const HALF: f64 = 2.0;

const WIDTH: usize = 2048;
const EXPERTS: usize = 512;
const TOP: usize = 10;
const INNER: usize = 512;
const VOCABULARY: usize = 151_936;

/// Every case; `shrink` divides tokens, experts and vocabulary, to try the bench where there is no GPU.
pub fn all(shrink: usize) -> Vec<Case> {
    let small = |count: usize| (count / shrink).max(16);
    let works = works(&small);
    works.into_iter().map(|(goal, work)| Case::new(goal, work)).collect()
}

fn works(small: &dyn Fn(usize) -> usize) -> Vec<(&'static str, Work)> {
    let (experts, top) = (small(EXPERTS), TOP.min(small(EXPERTS)));
    let mut works = vec![
        (
            "K1",
            Work::Copy {
                elements: small(1 << 28),
            },
        ),
        (
            "K1",
            Work::Dequantize {
                outputs: small(16_384),
                inputs: 4096,
            },
        ),
        (
            "K2",
            Work::Quantize {
                outputs: small(16_384),
                inputs: 4096,
            },
        ),
    ];
    let (outputs, inputs) = (small(12_288), WIDTH);
    for tokens in [64, 128, 256, 512] {
        works.push((
            "K3",
            Work::Linear {
                tokens: small(tokens),
                outputs,
                inputs,
                nf4: true,
                rank: 0,
            },
        ));
    }
    for tokens in [4096, 16_384] {
        let tokens = small(tokens);
        works.push((
            "K4",
            Work::Linear {
                tokens,
                outputs,
                inputs,
                nf4: true,
                rank: 0,
            },
        ));
        works.push((
            "K4",
            Work::Linear {
                tokens,
                outputs,
                inputs,
                nf4: false,
                rank: 0,
            },
        ));
        works.push((
            "K4",
            Work::LinearInput {
                tokens,
                outputs,
                inputs,
                nf4: true,
            },
        ));
        works.push((
            "K13",
            Work::Linear {
                tokens,
                outputs,
                inputs,
                nf4: true,
                rank: 16,
            },
        ));
    }
    for tokens in [1024, 4096, 16_384].map(small) {
        let (outputs, inputs) = (INNER, WIDTH);
        works.push((
            "K5",
            Work::Grouped {
                tokens,
                experts,
                top,
                outputs,
                inputs,
            },
        ));
        works.push((
            "K7",
            Work::GroupedInput {
                tokens,
                experts,
                top,
                outputs,
                inputs,
            },
        ));
        works.push((
            "K6",
            Work::Experts {
                tokens,
                experts,
                top,
                inner: INNER,
                width: WIDTH,
            },
        ));
        works.push((
            "K14",
            Work::GroupedLora {
                tokens,
                experts,
                top,
                outputs,
                inputs,
                rank: 16,
            },
        ));
    }
    let tokens = small(8192);
    let (key_heads, value_heads, dim) = (16, 32, 128);
    works.push((
        "K9",
        Work::Delta {
            tokens,
            documents: 8,
            key_heads,
            value_heads,
            dim,
        },
    ));
    works.push((
        "K9",
        Work::DeltaBackward {
            tokens,
            documents: 8,
            key_heads,
            value_heads,
            dim,
        },
    ));
    works.push((
        "K10",
        Work::Convolution {
            tokens,
            documents: 8,
            channels: 8192,
        },
    ));
    works.push((
        "K10",
        Work::ConvolutionBackward {
            tokens,
            documents: 8,
            channels: 8192,
        },
    ));
    works.push((
        "K11",
        Work::Loss {
            tokens: small(4096),
            width: WIDTH,
            vocabulary: small(VOCABULARY),
        },
    ));
    let (heads, kv_heads, dim) = (16, 2, 256);
    for (tokens, documents) in [(4096, 1), (16_384, 4)] {
        let tokens = small(tokens);
        works.push((
            "K12",
            Work::Attention {
                tokens,
                documents,
                heads,
                kv_heads,
                dim,
            },
        ));
        works.push((
            "K12",
            Work::AttentionBackward {
                tokens,
                documents,
                heads,
                kv_heads,
                dim,
            },
        ));
    }
    let elements = small(100_000_000);
    works.extend([("K15", Work::Adamw { elements }), ("K15", Work::Adamw8bit { elements })]);
    works.push((
        "bandwidth",
        Work::Norm {
            tokens: small(16_384),
            width: WIDTH,
        },
    ));
    works.push((
        "bandwidth",
        Work::Swiglu {
            tokens: small(16_384),
            width: 5120,
        },
    ));
    works
}

impl Case {
    fn new(goal: &'static str, work: Work) -> Self {
        let (name, bytes, flops) = cost(work);
        Self {
            name: format!("{goal} {name}"),
            goal,
            work,
            bytes,
            flops,
        }
    }
}

fn product(counts: &[usize]) -> f64 {
    counts.iter().map(|count| *count as f64).product()
}

/// Pairs of a query and a key it may see, of equal documents.
fn pairs(tokens: usize, documents: usize) -> f64 {
    let length = tokens / documents;
    product(&[documents, length, length + 1]) / 2.0
}

/// Name, bytes and operations at least.
fn cost(work: Work) -> (String, f64, f64) {
    match work {
        Work::Copy { elements } => (format!("copy {elements}"), 2.0 * HALF * elements as f64, 0.0),
        Work::Dequantize { outputs, inputs } => (
            format!("dequantize O{outputs} I{inputs}"),
            (NF4 + HALF) * product(&[outputs, inputs]),
            0.0,
        ),
        Work::Quantize { outputs, inputs } => (
            format!("quantize O{outputs} I{inputs}"),
            (NF4 + HALF) * product(&[outputs, inputs]),
            0.0,
        ),
        Work::Linear {
            tokens,
            outputs,
            inputs,
            nf4,
            rank,
        } => (
            format!(
                "linear T{tokens} O{outputs} I{inputs} {} R{rank}",
                if nf4 { "nf4" } else { "bf16" }
            ),
            HALF * product(&[tokens, outputs + inputs]) + if nf4 { NF4 } else { HALF } * product(&[outputs, inputs]),
            2.0 * (product(&[tokens, outputs, inputs]) + product(&[tokens, rank, outputs + inputs])),
        ),
        Work::LinearInput {
            tokens,
            outputs,
            inputs,
            nf4,
        } => (
            format!(
                "linear_dx T{tokens} O{outputs} I{inputs} {}",
                if nf4 { "nf4" } else { "bf16" }
            ),
            HALF * product(&[tokens, outputs + inputs]) + if nf4 { NF4 } else { HALF } * product(&[outputs, inputs]),
            2.0 * product(&[tokens, outputs, inputs]),
        ),
        Work::Grouped {
            tokens,
            experts,
            top,
            outputs,
            inputs,
        } => (
            format!("grouped T{tokens} E{experts} top{top} O{outputs} I{inputs} nf4 skewed"),
            HALF * (product(&[tokens, inputs]) + product(&[tokens, top, outputs]))
                + NF4 * product(&[experts, outputs, inputs]),
            2.0 * product(&[tokens, top, outputs, inputs]),
        ),
        Work::GroupedInput {
            tokens,
            experts,
            top,
            outputs,
            inputs,
        } => (
            format!("grouped_dx T{tokens} E{experts} top{top} O{outputs} I{inputs} nf4 skewed"),
            HALF * product(&[tokens, top, outputs + inputs]) + NF4 * product(&[experts, outputs, inputs]),
            2.0 * product(&[tokens, top, outputs, inputs]),
        ),
        Work::Experts {
            tokens,
            experts,
            top,
            inner,
            width,
        } => (
            format!("experts T{tokens} E{experts} top{top} F{inner} C{width} nf4 skewed"),
            2.0 * HALF * product(&[tokens, width]) + 3.0 * NF4 * product(&[experts, inner, width]),
            6.0 * product(&[tokens, top, inner, width]),
        ),
        Work::GroupedLora {
            tokens,
            experts,
            top,
            outputs,
            inputs,
            rank,
        } => (
            format!("grouped_lora T{tokens} E{experts} top{top} O{outputs} I{inputs} R{rank} skewed"),
            HALF * (product(&[tokens, inputs]) + product(&[tokens, top, outputs]))
                + 8.0 * product(&[experts, rank, outputs + inputs]),
            2.0 * product(&[tokens, top, rank, 2 * outputs + inputs]),
        ),
        Work::Delta {
            tokens,
            documents,
            key_heads,
            value_heads,
            dim,
        } => (
            format!("delta T{tokens} docs{documents} Hk{key_heads} Hv{value_heads} D{dim}"),
            HALF * product(&[tokens, 2 * key_heads + 2 * value_heads, dim]) + 8.0 * product(&[tokens, value_heads]),
            product(&[tokens, value_heads, 6 * dim * dim + 4 * DELTA_CHUNK * dim]),
        ),
        Work::DeltaBackward {
            tokens,
            documents,
            key_heads,
            value_heads,
            dim,
        } => (
            format!("delta_backward T{tokens} docs{documents} Hk{key_heads} Hv{value_heads} D{dim}"),
            HALF * product(&[tokens, 4 * key_heads + 4 * value_heads, dim]) + 16.0 * product(&[tokens, value_heads]),
            2.5 * product(&[tokens, value_heads, 6 * dim * dim + 4 * DELTA_CHUNK * dim]),
        ),
        Work::Convolution {
            tokens,
            documents,
            channels,
        } => (
            format!("convolution T{tokens} docs{documents} C{channels}"),
            2.0 * HALF * product(&[tokens, channels]),
            0.0,
        ),
        Work::ConvolutionBackward {
            tokens,
            documents,
            channels,
        } => (
            format!("convolution_backward T{tokens} docs{documents} C{channels}"),
            3.0 * HALF * product(&[tokens, channels]),
            0.0,
        ),
        Work::Loss {
            tokens,
            width,
            vocabulary,
        } => (
            format!("loss T{tokens} C{width} V{vocabulary}"),
            HALF * (product(&[2, tokens, width]) + product(&[vocabulary, width])),
            4.0 * product(&[tokens, width, vocabulary]),
        ),
        Work::Attention {
            tokens,
            documents,
            heads,
            kv_heads,
            dim,
        } => (
            format!("attention T{tokens} docs{documents} H{heads} K{kv_heads} D{dim}"),
            HALF * product(&[tokens, dim, 2 * heads + 2 * kv_heads]),
            4.0 * pairs(tokens, documents) * product(&[heads, dim]),
        ),
        Work::AttentionBackward {
            tokens,
            documents,
            heads,
            kv_heads,
            dim,
        } => (
            format!("attention_backward T{tokens} docs{documents} H{heads} K{kv_heads} D{dim}"),
            HALF * product(&[tokens, dim, 4 * heads + 4 * kv_heads]),
            10.0 * pairs(tokens, documents) * product(&[heads, dim]),
        ),
        Work::Adamw { elements } => (format!("adamw_f32 {elements}"), 28.0 * elements as f64, 0.0),
        Work::Adamw8bit { elements } => (format!("adamw_8bit {elements}"), 16.0 * elements as f64, 0.0),
        Work::Norm { tokens, width } => (
            format!("rms_norm T{tokens} C{width}"),
            2.0 * HALF * product(&[tokens, width]),
            0.0,
        ),
        Work::Swiglu { tokens, width } => (
            format!("swiglu T{tokens} F{width}"),
            3.0 * HALF * product(&[tokens, width]),
            0.0,
        ),
    }
}

/// Operands are taken in turn until together they exceed twice the largest cache (H200: 60 MB).
const CACHE_BYTES: f64 = 120e6;
const MOST_TURNS: usize = 16;

/// How many sets of operands of so many bytes are taken in turn.
fn turns(bytes: f64) -> usize {
    ((CACHE_BYTES / bytes).ceil() as usize).clamp(1, MOST_TURNS)
}

const BF16: Precision = Precision::Bf16;

/// Makes a case's operands.
pub fn prepare<'a, B: Clock>(backend: &'a B, case: &Case) -> Result<Body<'a>> {
    match case.work {
        Work::Copy { elements } => {
            let source = activation(backend, &[elements], 1.0, 1)?;
            let mut target = room(backend, &[elements])?;
            Ok(Box::new(move || backend.copy(&source, &mut target)))
        }
        Work::Dequantize { outputs, inputs } => {
            let weight = weight(backend, outputs, inputs, true, 1)?;
            let mut out = backend.alloc(DType::BF16, [outputs, inputs])?;
            Ok(Box::new(move || backend.dequantize(&weight, &mut out)))
        }
        Work::Quantize { outputs, inputs } => {
            let mut source = backend.alloc(DType::BF16, [outputs, inputs])?;
            backend.copy(&single(backend, &[outputs, inputs], 0.02, 1)?, &mut source)?;
            Ok(Box::new(move || backend.quantize_nf4(&source, true).map(drop)))
        }
        Work::Linear {
            tokens,
            outputs,
            inputs,
            nf4,
            rank,
        } => linear(backend, case.bytes, [tokens, outputs, inputs, rank], nf4),
        Work::LinearInput {
            tokens,
            outputs,
            inputs,
            nf4,
        } => linear_input(backend, case.bytes, [tokens, outputs, inputs], nf4),
        Work::Grouped {
            tokens,
            experts,
            top,
            outputs,
            inputs,
        } => grouped(backend, [tokens, experts, top, outputs, inputs]),
        Work::GroupedInput {
            tokens,
            experts,
            top,
            outputs,
            inputs,
        } => grouped_input(backend, [tokens, experts, top, outputs, inputs]),
        Work::Experts {
            tokens,
            experts,
            top,
            inner,
            width,
        } => experts_forward(backend, [tokens, experts, top, inner, width]),
        Work::GroupedLora {
            tokens,
            experts,
            top,
            outputs,
            inputs,
            rank,
        } => grouped_lora(backend, [tokens, experts, top, outputs, inputs, rank]),
        Work::Delta {
            tokens,
            documents,
            key_heads,
            value_heads,
            dim,
        } => delta(backend, [tokens, documents, key_heads, value_heads, dim], false),
        Work::DeltaBackward {
            tokens,
            documents,
            key_heads,
            value_heads,
            dim,
        } => delta(backend, [tokens, documents, key_heads, value_heads, dim], true),
        Work::Convolution {
            tokens,
            documents,
            channels,
        } => convolution(backend, [tokens, documents, channels], false),
        Work::ConvolutionBackward {
            tokens,
            documents,
            channels,
        } => convolution(backend, [tokens, documents, channels], true),
        Work::Loss {
            tokens,
            width,
            vocabulary,
        } => loss(backend, [tokens, width, vocabulary]),
        Work::Attention {
            tokens,
            documents,
            heads,
            kv_heads,
            dim,
        } => attention(backend, [tokens, documents, heads, kv_heads, dim], false),
        Work::AttentionBackward {
            tokens,
            documents,
            heads,
            kv_heads,
            dim,
        } => attention(backend, [tokens, documents, heads, kv_heads, dim], true),
        Work::Adamw { elements } => adamw(backend, elements),
        Work::Adamw8bit { elements } => adamw_8bit(backend, elements),
        Work::Norm { tokens, width } => norm(backend, tokens, width),
        Work::Swiglu { tokens, width } => {
            let [gate, up] = [
                activation(backend, &[tokens, width], 1.0, 1)?,
                activation(backend, &[tokens, width], 1.0, 2)?,
            ];
            let mut y = room(backend, &[tokens, width])?;
            Ok(Box::new(move || backend.swiglu_forward(&gate, &up, &mut y)))
        }
    }
}

fn linear<'a, B: Clock>(backend: &'a B, bytes: f64, sizes: [usize; 4], nf4: bool) -> Result<Body<'a>> {
    let [tokens, outputs, inputs, rank] = sizes;
    let sets = (0..turns(bytes)).map(|turn| {
        let seed = 10 * turn as u64;
        Ok((
            activation(backend, &[tokens, inputs], 1.0, seed)?,
            weight(backend, outputs, inputs, nf4, seed + 1)?,
        ))
    });
    let mut sets = sets.collect::<Result<Vec<_>>>()?;
    let a = single(backend, &[rank.max(1), inputs], 0.02, 2)?;
    let b = single(backend, &[outputs, rank.max(1)], 0.02, 3)?;
    let mut hidden = backend.alloc(DType::F32, [tokens, rank.max(1)])?;
    let mut y = room(backend, &[tokens, outputs])?;
    Ok(Box::new(move || {
        sets.rotate_left(1);
        let (x, weight) = &sets[0];
        let lora = LoraForward {
            a: &a,
            b: &b,
            scale: 2.0,
            hidden: &mut hidden,
        };
        backend.linear_forward(LinearForward {
            x,
            weight,
            bias: None,
            lora: (rank > 0).then_some(lora),
            precision: BF16,
            y: &mut y,
        })
    }))
}

fn linear_input<'a, B: Clock>(backend: &'a B, bytes: f64, sizes: [usize; 3], nf4: bool) -> Result<Body<'a>> {
    let [tokens, outputs, inputs] = sizes;
    let sets = (0..turns(bytes)).map(|turn| {
        let seed = 10 * turn as u64;
        Ok((
            activation(backend, &[tokens, outputs], 1.0, seed)?,
            weight(backend, outputs, inputs, nf4, seed + 1)?,
        ))
    });
    let mut sets = sets.collect::<Result<Vec<_>>>()?;
    let mut dx = room(backend, &[tokens, inputs])?;
    Ok(Box::new(move || {
        sets.rotate_left(1);
        let (dy, weight) = &sets[0];
        backend.linear_backward(LinearBackward {
            dy,
            weight,
            lora: None,
            precision: BF16,
            dx: Some((&mut dx, Write::Overwrite)),
        })
    }))
}

/// A skewed choice of experts.
pub fn routing<B: Clock>(backend: &B, tokens: usize, experts: usize, top: usize) -> Result<Routing<B>> {
    let mut routing = Routing::alloc(backend, tokens, experts, top)?;
    let logits = backend.upload_f32([tokens, experts], &skewed_logits(tokens, experts))?;
    backend.route(&logits, true, &mut routing)?;
    Ok(routing)
}

/// All of the routed experts' forward pass, from tokens to their weighted sums.
fn experts_forward<'a, B: Clock>(backend: &'a B, sizes: [usize; 5]) -> Result<Body<'a>> {
    let [tokens, experts, top, inner, width] = sizes;
    let routing = routing(backend, tokens, experts, top)?;
    let x = activation(backend, &[tokens, width], 1.0, 1)?;
    let [gate, up, down] = [
        stack(backend, experts, inner, width)?,
        stack(backend, experts, inner, width)?,
        stack(backend, experts, width, inner)?,
    ];
    let rows = tokens * top;
    let [mut gated, mut upped, mut activated] = [
        room(backend, &[rows, inner])?,
        room(backend, &[rows, inner])?,
        room(backend, &[rows, inner])?,
    ];
    let (mut grouped, mut y) = (room(backend, &[rows, width])?, room(backend, &[tokens, width])?);
    Ok(Box::new(move || {
        through(backend, (&x, RowOrder::Token), &gate, &routing, &mut gated)?;
        through(backend, (&x, RowOrder::Token), &up, &routing, &mut upped)?;
        backend.routed_swiglu_forward(&gated, &upped, &routing, &mut activated)?;
        through(backend, (&activated, RowOrder::Grouped), &down, &routing, &mut grouped)?;
        backend.combine(&grouped, &routing, &mut y, Write::Overwrite)
    }))
}

fn through<B: Clock>(
    backend: &B,
    (x, x_order): (&Tensor<B>, RowOrder),
    weight: &WeightStack<B>,
    routing: &Routing<B>,
    y: &mut Tensor<B>,
) -> Result<()> {
    backend.grouped_linear_forward(GroupedLinearForward {
        x,
        x_order,
        routing,
        weight,
        lora: None,
        precision: BF16,
        y,
    })
}

fn grouped<'a, B: Clock>(backend: &'a B, sizes: [usize; 5]) -> Result<Body<'a>> {
    let [tokens, experts, top, outputs, inputs] = sizes;
    let routing = routing(backend, tokens, experts, top)?;
    let (x, stack) = (
        activation(backend, &[tokens, inputs], 1.0, 1)?,
        stack(backend, experts, outputs, inputs)?,
    );
    let mut y = room(backend, &[tokens * top, outputs])?;
    Ok(Box::new(move || {
        backend.grouped_linear_forward(GroupedLinearForward {
            x: &x,
            x_order: RowOrder::Token,
            routing: &routing,
            weight: &stack,
            lora: None,
            precision: BF16,
            y: &mut y,
        })
    }))
}

fn grouped_input<'a, B: Clock>(backend: &'a B, sizes: [usize; 5]) -> Result<Body<'a>> {
    let [tokens, experts, top, outputs, inputs] = sizes;
    let routing = routing(backend, tokens, experts, top)?;
    let (dy, stack) = (
        activation(backend, &[tokens * top, outputs], 1.0, 1)?,
        stack(backend, experts, outputs, inputs)?,
    );
    let mut dx = room(backend, &[tokens * top, inputs])?;
    Ok(Box::new(move || {
        backend.grouped_linear_backward(GroupedLinearBackward {
            dy: &dy,
            dy_order: RowOrder::Grouped,
            routing: &routing,
            weight: &stack,
            lora: None,
            precision: BF16,
            dx: Some((&mut dx, Write::Overwrite)),
        })
    }))
}

fn grouped_lora<'a, B: Clock>(backend: &'a B, sizes: [usize; 6]) -> Result<Body<'a>> {
    let [tokens, experts, top, outputs, inputs, rank] = sizes;
    let routing = routing(backend, tokens, experts, top)?;
    let (x, dy) = (
        activation(backend, &[tokens, inputs], 1.0, 1)?,
        activation(backend, &[tokens * top, outputs], 1.0, 2)?,
    );
    let stack = stack(backend, experts, outputs, inputs)?;
    let (a, b) = (
        single(backend, &[experts, rank, inputs], 0.02, 3)?,
        single(backend, &[experts, outputs, rank], 0.02, 4)?,
    );
    let hidden = single(backend, &[tokens * top, rank], 1.0, 5)?;
    let (mut gradient_a, mut gradient_b) = (
        backend.zeros(DType::F32, [experts, rank, inputs])?,
        backend.zeros(DType::F32, [experts, outputs, rank])?,
    );
    Ok(Box::new(move || {
        let lora = GroupedLoraBackward {
            x: &x,
            x_order: RowOrder::Token,
            a: &a,
            b: &b,
            scale: 2.0,
            hidden: &hidden,
            gradient_a: &mut gradient_a,
            gradient_b: &mut gradient_b,
        };
        backend.grouped_linear_backward(GroupedLinearBackward {
            dy: &dy,
            dy_order: RowOrder::Grouped,
            routing: &routing,
            weight: &stack,
            lora: Some(lora),
            precision: BF16,
            dx: None,
        })
    }))
}

fn delta<'a, B: Clock>(backend: &'a B, sizes: [usize; 5], backward: bool) -> Result<Body<'a>> {
    let [tokens, count, key_heads, value_heads, dim] = sizes;
    let segments = documents(tokens, count);
    let unit = 1.0 / (dim as f32).sqrt();
    let keys = [tokens, key_heads, dim];
    let values = [tokens, value_heads, dim];
    let (q, k) = (
        activation(backend, &keys, unit, 1)?,
        activation(backend, &keys, unit, 2)?,
    );
    let (v, dout) = (
        activation(backend, &values, 1.0, 3)?,
        activation(backend, &values, 1.0, 4)?,
    );
    let gates = tokens * value_heads;
    let decay = backend.upload_f32([tokens, value_heads], &vec![-0.05; gates])?;
    let beta = backend.upload_f32([tokens, value_heads], &vec![0.5; gates])?;
    let mut out = room(backend, &values)?;
    let mut solved = backend.alloc(DType::F32, [tokens, value_heads, DELTA_CHUNK])?;
    let (mut dq, mut dk, mut dv) = (room(backend, &keys)?, room(backend, &keys)?, room(backend, &values)?);
    let mut ddecay = backend.alloc(DType::F32, [tokens, value_heads])?;
    let mut dbeta = backend.alloc(DType::F32, [tokens, value_heads])?;
    let mut solve = true;
    Ok(Box::new(move || {
        // A backward pass needs one forward pass before it, for the solved triangle.
        if !backward || std::mem::take(&mut solve) {
            backend.delta_rule_forward(DeltaForward {
                q: &q,
                k: &k,
                v: &v,
                decay: &decay,
                beta: &beta,
                segments: &segments,
                scale: unit,
                state: None,
                out: &mut out,
                solved: &mut solved,
            })?;
        }
        if !backward {
            return Ok(());
        }
        backend.delta_rule_backward(DeltaBackward {
            q: &q,
            k: &k,
            v: &v,
            decay: &decay,
            beta: &beta,
            solved: &solved,
            dout: &dout,
            segments: &segments,
            scale: unit,
            dq: &mut dq,
            dk: &mut dk,
            dv: &mut dv,
            ddecay: &mut ddecay,
            dbeta: &mut dbeta,
        })
    }))
}

fn convolution<'a, B: Clock>(backend: &'a B, sizes: [usize; 3], backward: bool) -> Result<Body<'a>> {
    let [tokens, count, channels] = sizes;
    let segments = documents(tokens, count);
    let (x, dy) = (
        activation(backend, &[tokens, channels], 1.0, 1)?,
        activation(backend, &[tokens, channels], 1.0, 2)?,
    );
    let weight = single(backend, &[channels, 4], 0.5, 3)?;
    let mut out = room(backend, &[tokens, channels])?;
    Ok(Box::new(move || {
        if backward {
            return backend.convolution_backward(ConvolutionBackward {
                x: &x,
                weight: &weight,
                bias: None,
                segments: &segments,
                dy: &dy,
                dx: &mut out,
            });
        }
        backend.convolution_forward(ConvolutionForward {
            x: &x,
            weight: &weight,
            bias: None,
            segments: &segments,
            state: None,
            y: &mut out,
        })
    }))
}

fn loss<'a, B: Clock>(backend: &'a B, sizes: [usize; 3]) -> Result<Body<'a>> {
    let [tokens, width, vocabulary] = sizes;
    let (x, head) = (
        activation(backend, &[tokens, width], 1.0, 1)?,
        weight(backend, vocabulary, width, false, 2)?,
    );
    let mut random = Random::new(3);
    let labels: Vec<i32> = (0..tokens).map(|_| random.below(vocabulary) as i32).collect();
    let labels = backend.upload_i32([tokens], &labels)?;
    let mut losses = backend.alloc(DType::F32, [tokens])?;
    let mut dx = room(backend, &[tokens, width])?;
    let one = backend.upload_f32([1], &[1.0])?;
    Ok(Box::new(move || {
        backend.linear_cross_entropy(LinearCrossEntropy {
            x: &x,
            head: &head,
            labels: &labels,
            precision: BF16,
            losses: &mut losses,
            dx: Some((&mut dx, &one)),
        })
    }))
}

fn attention<'a, B: Clock>(backend: &'a B, sizes: [usize; 5], backward: bool) -> Result<Body<'a>> {
    let [tokens, count, heads, kv_heads, dim] = sizes;
    let segments = documents(tokens, count);
    let (queries, keys) = ([tokens, heads, dim], [tokens, kv_heads, dim]);
    let (q, dout) = (
        activation(backend, &queries, 1.0, 1)?,
        activation(backend, &queries, 1.0, 2)?,
    );
    let (k, v) = (activation(backend, &keys, 1.0, 3)?, activation(backend, &keys, 1.0, 4)?);
    let (mut out, mut lse) = (room(backend, &queries)?, backend.alloc(DType::F32, [tokens, heads])?);
    let (mut dq, mut dk, mut dv) = (room(backend, &queries)?, room(backend, &keys)?, room(backend, &keys)?);
    let scale = 1.0 / (dim as f32).sqrt();
    let mut first = true;
    Ok(Box::new(move || {
        // A backward pass needs one forward pass before it, for the outputs and their sums.
        if !backward || std::mem::take(&mut first) {
            backend.attention_forward(AttentionForward {
                q: &q,
                k: &k,
                v: &v,
                query_segments: &segments,
                key_segments: &segments,
                scale,
                precision: BF16,
                out: &mut out,
                lse: &mut lse,
            })?;
        }
        if !backward {
            return Ok(());
        }
        backend.attention_backward(AttentionBackward {
            q: &q,
            k: &k,
            v: &v,
            out: &out,
            lse: &lse,
            dout: &dout,
            segments: &segments,
            scale,
            precision: BF16,
            dq: &mut dq,
            dk: &mut dk,
            dv: &mut dv,
        })
    }))
}

fn adamw<'a, B: Clock>(backend: &'a B, elements: usize) -> Result<Body<'a>> {
    let gradient = single(backend, &[elements], 0.01, 1)?;
    let mut parameter = single(backend, &[elements], 0.02, 2)?;
    let (mut first, mut second) = (
        backend.zeros(DType::F32, [elements])?,
        backend.zeros(DType::F32, [elements])?,
    );
    Ok(Box::new(move || {
        backend.adamw_step(&mut parameter, &gradient, &mut first, &mut second, &SETTINGS)
    }))
}

const SETTINGS: AdamW = AdamW {
    learning_rate: 1e-4,
    beta1: 0.9,
    beta2: 0.999,
    epsilon: 1e-8,
    weight_decay: 0.0,
    step: 3,
    gradient_scale: 1.0,
};

fn adamw_8bit<'a, B: Clock>(backend: &'a B, elements: usize) -> Result<Body<'a>> {
    let gradient = single(backend, &[elements], 0.01, 1)?;
    let mut parameter = single(backend, &[elements], 0.02, 2)?;
    let shape = parameter.shape();
    let (mut first, mut second) = (BlockMoment::zeros(backend, shape)?, BlockMoment::zeros(backend, shape)?);
    Ok(Box::new(move || {
        backend.adamw_8bit_step(&mut parameter, &gradient, &mut first, &mut second, &SETTINGS)
    }))
}

fn norm<'a, B: Clock>(backend: &'a B, tokens: usize, width: usize) -> Result<Body<'a>> {
    let (x, weight) = (
        activation(backend, &[tokens, width], 1.0, 1)?,
        single(backend, &[width], 1.0, 2)?,
    );
    let mut y = room(backend, &[tokens, width])?;
    let mut rstd = backend.alloc(DType::F32, [tokens])?;
    Ok(Box::new(move || {
        backend.rms_norm_forward(NormForward {
            x: &x,
            weight: &weight,
            style: NormWeight::Plain,
            eps: 1e-6,
            y: &mut y,
            rstd: &mut rstd,
        })
    }))
}
