//! What a case is: an op with its sizes, and the bytes and operations that it cannot do without.

use brightrun_kernels::ops::DELTA_CHUNK;
use serde_json::{Value, json};

/// A linear layer `[outputs, inputs]` with an adapter of `rank`; 0 is none.
#[derive(Clone, Copy, Debug)]
pub struct Layer {
    pub tokens: usize,
    pub outputs: usize,
    pub inputs: usize,
    pub nf4: bool,
    pub rank: usize,
}

/// Routed experts: each token goes to `top` of them, as the stored histogram has it or evenly.
#[derive(Clone, Copy, Debug)]
pub struct Routed {
    pub tokens: usize,
    pub experts: usize,
    pub top: usize,
    pub outputs: usize,
    pub inputs: usize,
    pub skewed: bool,
}

/// Heads of attention (`heads` of queries, `keys` of keys and values) or of the delta rule (`heads` of values, `keys` of keys).
#[derive(Clone, Copy, Debug)]
pub struct Heads {
    pub tokens: usize,
    pub documents: usize,
    pub keys: usize,
    pub heads: usize,
    pub dim: usize,
}

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
    QuantizeFp8 {
        outputs: usize,
        inputs: usize,
    },
    Linear(Layer),
    LinearInput(Layer),
    Grouped(Routed),
    GroupedInput(Routed),
    GroupedLora {
        routed: Routed,
        rank: usize,
    },
    /// A whole block of routed experts, forward: `outputs` is the width inside, `inputs` that of tokens.
    Experts(Routed),
    Delta(Heads),
    DeltaBackward(Heads),
    /// Everything between the projections and the delta rule.
    DeltaInputs(Heads),
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
    Attention(Heads),
    AttentionBackward(Heads),
    /// Of so many tensors of as many elements each.
    Adamw {
        tensors: usize,
        elements: usize,
    },
    Adamw8bit {
        tensors: usize,
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

/// Bytes of an NF4 element with its nested scale: half a byte, and a code and 1/256 of a float for 64.
const NF4: f64 = 0.5 + (1.0 + 4.0 / 256.0) / 64.0;
const HALF: f64 = 2.0;

fn product(counts: &[usize]) -> f64 {
    counts.iter().map(|count| *count as f64).product()
}

/// What a case is called without its goal, its bytes and its operations, at least.
pub struct Cost {
    pub name: String,
    pub bytes: f64,
    pub flops: f64,
}

fn cost(name: String, bytes: f64, flops: f64) -> Cost {
    Cost { name, bytes, flops }
}

impl Layer {
    fn cost(self, name: &str) -> Cost {
        let Self {
            tokens,
            outputs,
            inputs,
            nf4,
            rank,
        } = self;
        let (encoding, element) = if nf4 { ("nf4", NF4) } else { ("bf16", HALF) };
        cost(
            format!("{name} T{tokens} O{outputs} I{inputs} {encoding} R{rank}"),
            HALF * product(&[tokens, outputs + inputs]) + element * product(&[outputs, inputs]),
            2.0 * (product(&[tokens, outputs, inputs]) + product(&[tokens, rank, outputs + inputs])),
        )
    }

    /// As a backward pass: with an adapter it reads `x` as well and does two more products for each factor.
    fn backward_cost(self, name: &str) -> Cost {
        let mut own = self.cost(name);
        if self.rank > 0 {
            own.bytes += HALF * product(&[self.tokens, self.inputs]);
            own.flops += 2.0 * product(&[self.tokens, self.rank, self.outputs + self.inputs]);
        }
        own
    }
}

impl Routed {
    fn slots(self) -> usize {
        self.tokens * self.top
    }

    fn text(self, name: &str, rest: &str) -> String {
        let Self {
            tokens,
            experts,
            top,
            outputs,
            inputs,
            skewed,
        } = self;
        let routing = if skewed { "skewed" } else { "uniform" };
        format!("{name} T{tokens} E{experts} top{top} O{outputs} I{inputs} {rest} {routing}")
    }

    fn weight_bytes(self) -> f64 {
        NF4 * product(&[self.experts, self.outputs, self.inputs])
    }

    fn flops(self) -> f64 {
        2.0 * product(&[self.slots(), self.outputs, self.inputs])
    }
}

impl Heads {
    fn text(self, name: &str) -> String {
        let Self {
            tokens,
            documents,
            keys,
            heads,
            dim,
        } = self;
        format!("{name} T{tokens} docs{documents} K{keys} H{heads} D{dim}")
    }

    /// Pairs of a query and a key it may see, of equal documents.
    fn pairs(self) -> f64 {
        let length = self.tokens / self.documents;
        product(&[self.documents, length, length + 1]) / 2.0
    }

    /// Bytes of activations: so many tensors of all query or value heads, so many of all key heads.
    fn bytes(self, wide: usize, narrow: usize) -> f64 {
        HALF * product(&[self.tokens, self.dim, wide * self.heads + narrow * self.keys])
    }

    fn delta_flops(self) -> f64 {
        product(&[
            self.tokens,
            self.heads,
            6 * self.dim * self.dim + 4 * DELTA_CHUNK * self.dim,
        ])
    }

    fn gate_bytes(self) -> f64 {
        8.0 * product(&[self.tokens, self.heads])
    }
}

impl Work {
    pub fn cost(self) -> Cost {
        let matrix = |outputs, inputs| product(&[outputs, inputs]);
        match self {
            Self::Copy { elements } => cost(format!("copy {elements}"), 2.0 * HALF * elements as f64, 0.0),
            Self::Dequantize { outputs, inputs } => {
                let bytes = (NF4 + HALF) * matrix(outputs, inputs);
                cost(format!("dequantize O{outputs} I{inputs}"), bytes, 0.0)
            }
            Self::Quantize { outputs, inputs } => {
                let bytes = (NF4 + HALF) * matrix(outputs, inputs);
                cost(format!("quantize O{outputs} I{inputs} bf16"), bytes, 0.0)
            }
            Self::QuantizeFp8 { outputs, inputs } => {
                let bytes = (NF4 + 1.0) * matrix(outputs, inputs);
                cost(format!("quantize O{outputs} I{inputs} fp8"), bytes, 0.0)
            }
            Self::Linear(layer) => layer.cost("linear"),
            Self::LinearInput(layer) => layer.backward_cost("linear_dx"),
            Self::Grouped(routed) => cost(
                routed.text("grouped", "nf4"),
                HALF * (product(&[routed.tokens, routed.inputs]) + product(&[routed.slots(), routed.outputs]))
                    + routed.weight_bytes(),
                routed.flops(),
            ),
            Self::GroupedInput(routed) => cost(
                routed.text("grouped_dx", "nf4"),
                HALF * product(&[routed.slots(), routed.outputs + routed.inputs]) + routed.weight_bytes(),
                routed.flops(),
            ),
            Self::Experts(routed) => cost(
                routed.text("experts", "nf4"),
                2.0 * HALF * product(&[routed.tokens, routed.inputs]) + 3.0 * routed.weight_bytes(),
                3.0 * routed.flops(),
            ),
            Self::GroupedLora { routed, rank } => cost(
                routed.text("grouped_lora", &format!("R{rank}")),
                HALF * (product(&[routed.tokens, routed.inputs]) + product(&[routed.slots(), routed.outputs]))
                    + 8.0 * product(&[routed.experts, rank, routed.outputs + routed.inputs]),
                2.0 * product(&[routed.slots(), rank, 2 * routed.outputs + routed.inputs]),
            ),
            Self::Delta(heads) => cost(
                heads.text("delta"),
                heads.bytes(2, 2) + heads.gate_bytes(),
                heads.delta_flops(),
            ),
            Self::DeltaBackward(heads) => cost(
                heads.text("delta_backward"),
                heads.bytes(4, 4) + 2.0 * heads.gate_bytes(),
                2.5 * heads.delta_flops(),
            ),
            Self::DeltaInputs(heads) => cost(
                heads.text("delta_inputs"),
                2.0 * heads.bytes(2, 2) + 1.5 * heads.gate_bytes(),
                0.0,
            ),
            Self::ConvolutionBackward {
                tokens,
                documents,
                channels,
            } => cost(
                format!("convolution_backward T{tokens} docs{documents} C{channels}"),
                3.0 * HALF * matrix(tokens, channels),
                0.0,
            ),
            Self::Loss {
                tokens,
                width,
                vocabulary,
            } => cost(
                format!("loss T{tokens} C{width} V{vocabulary}"),
                HALF * (2.0 * matrix(tokens, width) + matrix(vocabulary, width)),
                4.0 * product(&[tokens, width, vocabulary]),
            ),
            Self::Attention(heads) => cost(
                heads.text("attention"),
                heads.bytes(2, 2),
                4.0 * heads.pairs() * product(&[heads.heads, heads.dim]),
            ),
            Self::AttentionBackward(heads) => cost(
                heads.text("attention_backward"),
                heads.bytes(4, 4),
                10.0 * heads.pairs() * product(&[heads.heads, heads.dim]),
            ),
            Self::Adamw { tensors, elements } => {
                let bytes = 28.0 * matrix(tensors, elements);
                cost(format!("adamw_f32 {tensors} of {elements}"), bytes, 0.0)
            }
            Self::Adamw8bit { tensors, elements } => {
                let bytes = 16.0 * matrix(tensors, elements);
                cost(format!("adamw_8bit {tensors} of {elements}"), bytes, 0.0)
            }
            Self::Norm { tokens, width } => cost(
                format!("rms_norm T{tokens} C{width}"),
                2.0 * HALF * matrix(tokens, width),
                0.0,
            ),
            Self::Swiglu { tokens, width } => cost(
                format!("swiglu T{tokens} F{width}"),
                3.0 * HALF * matrix(tokens, width),
                0.0,
            ),
        }
    }
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
    /// Another case that is measured in turns with it: what it is a share of, or what it adds to.
    pub beside: Option<String>,
}

impl Case {
    pub fn new(goal: &'static str, work: Work, beside: Option<String>) -> Self {
        let Cost { name, bytes, flops } = work.cost();
        Self {
            name: format!("{goal} {name}"),
            goal,
            work,
            bytes,
            flops,
            beside,
        }
    }

    pub fn describe(&self) -> Value {
        json!({
            "name": self.name, "goal": self.goal, "work": format!("{:?}", self.work), "bytes": self.bytes,
            "flops": self.flops, "beside": self.beside,
        })
    }

    /// How many sets of operands are taken in turn, so that together they exceed twice the largest cache (H200: 60 MB).
    pub fn turns(&self) -> usize {
        ((CACHE_BYTES / self.bytes).ceil() as usize).clamp(1, MOST_TURNS)
    }
}

/// Twice the largest cache.
pub const CACHE_BYTES: f64 = 120e6;
const MOST_TURNS: usize = 16;
