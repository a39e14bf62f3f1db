//! The cases: shapes of Qwen3-Next-80B-A3B (width 2048, 512 experts of 512, top 10, 151 936 tokens of vocabulary), by the goals
//! they answer. What costs least and decides most comes first: a run that ends early has that.

use crate::work::{Case, Heads, Layer, Routed, Work};

const WIDTH: usize = 2048;
const EXPERTS: usize = 512;
const TOP: usize = 10;
const INNER: usize = 512;
const VOCABULARY: usize = 151_936;
/// Of the largest frozen projection, `in_proj_qkvz`.
const OUTPUTS: usize = 12_288;
const RANK: usize = 16;

/// Every case; `shrink` divides tokens, experts, vocabulary and outputs, to try the bench where there is no GPU.
pub fn all(shrink: usize) -> Vec<Case> {
    let small = |count: usize| (count / shrink).max(16);
    let mut cases = Cases {
        list: Vec::new(),
        small: &small,
    };
    cases.memory();
    cases.layers();
    cases.experts();
    cases.mixers();
    cases.loss();
    cases.optimizer();
    cases.list
}

struct Cases<'a> {
    list: Vec<Case>,
    small: &'a dyn Fn(usize) -> usize,
}

impl Cases<'_> {
    fn small(&self, count: usize) -> usize {
        (self.small)(count)
    }

    /// Adds a case and gives its name.
    fn add(&mut self, goal: &'static str, work: Work) -> String {
        self.add_beside(goal, work, None)
    }

    fn add_beside(&mut self, goal: &'static str, work: Work, beside: Option<&str>) -> String {
        let case = Case::new(goal, work, beside.map(str::to_owned));
        let name = case.name.clone();
        self.list.push(case);
        name
    }

    fn copy(&self) -> Case {
        let elements = self.small(1 << 28);
        Case::new("K1", Work::Copy { elements }, None)
    }

    fn memory(&mut self) {
        let copy = self.copy();
        let beside = copy.name.clone();
        self.list.push(copy);
        let (outputs, inputs) = (self.small(16_384), 4096);
        self.add_beside("K1", Work::Dequantize { outputs, inputs }, Some(&beside));
        self.add_beside("K2", Work::Quantize { outputs, inputs }, Some(&beside));
        self.add_beside("K2", Work::QuantizeFp8 { outputs, inputs }, Some(&beside));
        let tokens = self.small(16_384);
        self.add_beside("bandwidth", Work::Norm { tokens, width: WIDTH }, Some(&beside));
        let wide = Work::Swiglu { tokens, width: 5120 };
        self.add_beside("bandwidth", wide, Some(&beside));
    }

    fn layer(&self, tokens: usize, nf4: bool, rank: usize) -> Layer {
        Layer {
            tokens: self.small(tokens),
            outputs: self.small(OUTPUTS),
            inputs: WIDTH,
            nf4,
            rank,
        }
    }

    fn layers(&mut self) {
        for tokens in [64, 128, 256, 512] {
            self.add("K3", Work::Linear(self.layer(tokens, true, 0)));
        }
        for tokens in [4096, 16_384] {
            let plain = self.add("K4", Work::Linear(self.layer(tokens, true, 0)));
            self.add_beside("K13", Work::Linear(self.layer(tokens, true, RANK)), Some(&plain));
            let plain = self.add("K4", Work::LinearInput(self.layer(tokens, true, 0)));
            self.add_beside("K13", Work::LinearInput(self.layer(tokens, true, RANK)), Some(&plain));
            self.add("K4", Work::Linear(self.layer(tokens, false, 0)));
        }
    }

    fn routed(&self, tokens: usize, skewed: bool) -> Routed {
        let experts = self.small(EXPERTS);
        Routed {
            tokens: self.small(tokens),
            experts,
            top: TOP.min(experts),
            outputs: INNER,
            inputs: WIDTH,
            skewed,
        }
    }

    fn experts(&mut self) {
        for skewed in [true, false] {
            for tokens in [1024, 4096, 16_384] {
                let routed = self.routed(tokens, skewed);
                self.add("K5", Work::Grouped(routed));
                self.add("K7", Work::GroupedInput(routed));
                if skewed {
                    self.add("K6", Work::Experts(routed));
                    self.add("K14", Work::GroupedLora { routed, rank: RANK });
                }
            }
        }
    }

    fn mixers(&mut self) {
        let heads = Heads {
            tokens: self.small(8192),
            documents: 8,
            keys: 16,
            heads: 32,
            dim: 128,
        };
        self.add("K9", Work::Delta(heads));
        self.add("K9", Work::DeltaBackward(heads));
        self.add("K10", Work::DeltaInputs(heads));
        let tokens = heads.tokens;
        let channels = (2 * heads.keys + heads.heads) * heads.dim;
        let backward = Work::ConvolutionBackward {
            tokens,
            documents: heads.documents,
            channels,
        };
        self.add("bandwidth", backward);
        for (tokens, documents) in [(4096, 1), (16_384, 4)] {
            let heads = Heads {
                tokens: self.small(tokens),
                documents,
                keys: 2,
                heads: 16,
                dim: 256,
            };
            self.add("K12", Work::Attention(heads));
            self.add("K12", Work::AttentionBackward(heads));
        }
    }

    fn loss(&mut self) {
        for tokens in [4096, 16_384] {
            let loss = Work::Loss {
                tokens: self.small(tokens),
                width: WIDTH,
                vocabulary: self.small(VOCABULARY),
            };
            self.add("K11", loss);
        }
    }

    fn optimizer(&mut self) {
        let beside = self.copy().name;
        // One large tensor, and about as much in as many as an adapter has.
        for (tensors, elements) in [(1, self.small(100_000_000)), (self.small(1024), self.small(98_304))] {
            self.add_beside("K15", Work::Adamw8bit { tensors, elements }, Some(&beside));
            self.add_beside("K15", Work::Adamw { tensors, elements }, Some(&beside));
        }
    }
}
