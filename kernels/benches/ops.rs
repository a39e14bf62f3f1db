//! How fast the CPU backend's ops are, and what share of the machine that is.
//!
//! Rates are by *busy* time: processor time of all threads divided by their number. On an idle machine it is wall time less
//! waiting; on a shared one wall time, printed too, says more about the others.
//!
//! `cargo bench -p brightrun-kernels --bench ops [-- FILTER] [--json FILE]` prints, for each op and shape, milliseconds, GFLOP/s
//! or GB/s, and the share of a ceiling measured in the same run: dot products in registers for products, a large copy for
//! the rest.

#![allow(clippy::unwrap_used)]

use std::hint::black_box;
use std::io::Write as _;
use std::time::Instant;

use brightrun_kernels::cpu::{Cpu, ceiling, timed};
use brightrun_kernels::ops::{
    ActivationOps, AdamW, AttentionBackward, AttentionForward, AttentionOps, Device, LinearBackward,
    LinearCrossEntropy, LinearForward, LoraBackward, LoraForward, LossOps, MatmulOps, NormBackward, NormForward,
    NormOps, NormWeight, OptimizerOps, Precision, QuantizeOps, Write,
};
use brightrun_kernels::testing::Random;
use brightrun_kernels::{DType, Segments, Tensor, Weight};

/// What limits an op.
#[derive(Clone, Copy)]
enum Work {
    /// Floating-point operations.
    Flops(f64),
    /// Bytes moved.
    Bytes(f64),
}

struct Bench {
    cpu: Cpu,
    precision: Precision,
    flops_ceiling: f64,
    bytes_ceiling: f64,
    filter: Option<String>,
    json: Option<std::fs::File>,
}

impl Bench {
    /// Times `body`: the fastest of runs that together take about half a second, so that other users of the machine disturb
    /// the result as little as possible.
    fn run(&mut self, op: &str, shape: &str, work: Work, mut body: impl FnMut()) {
        if self.filter.as_ref().is_some_and(|filter| !op.contains(filter.as_str())) {
            return;
        }
        body();
        let begin = Instant::now();
        let mut times = Vec::new();
        while times.len() < 5 || begin.elapsed().as_millis() < 500 {
            times.push(timed(&self.cpu, &mut body));
        }
        let least = |time: fn(&(f64, f64)) -> f64| times.iter().map(time).fold(f64::INFINITY, f64::min);
        let (seconds, wall) = (least(|time| time.0), least(|time| time.1));
        let (rate, unit, ceiling) = match work {
            Work::Flops(flops) => (flops / seconds / 1e9, "GFLOP/s", self.flops_ceiling),
            Work::Bytes(bytes) => (bytes / seconds / 1e9, "GB/s", self.bytes_ceiling),
        };
        let share = rate / ceiling;
        let milliseconds = seconds * 1e3;
        println!(
            "{op:<28} {shape:<34} {milliseconds:>9.3} ms busy {:>9.3} ms wall {rate:>8.1} {unit:<8} {:>5.1} %",
            wall * 1e3,
            100.0 * share
        );
        if let Some(file) = &mut self.json {
            let precision = format!("{:?}", self.precision);
            let ceiling = format!("{ceiling:.1}");
            let (level, threads, wall) = (self.cpu.simd_level(), self.cpu.threads(), wall * 1e3);
            let line = format!(
                "{{\"op\":\"{op}\",\"shape\":\"{shape}\",\"precision\":\"{precision}\",\"level\":\"{level}\",\"threads\":{threads},\
                 \"busy_milliseconds\":{milliseconds:.4},\"wall_milliseconds\":{wall:.4},\
                 \"rate\":{rate:.2},\"unit\":\"{unit}\",\"ceiling\":{ceiling},\"share_of_ceiling\":{share:.4}}}"
            );
            writeln!(file, "{line}").unwrap();
        }
    }

    fn random(&self, shape: &[usize], seed: u64) -> Tensor<Cpu> {
        let shape = brightrun_kernels::Shape::new(shape);
        self.cpu
            .upload_f32(shape, &Random::new(seed).normal(shape.elements()))
            .unwrap()
    }

    fn bf16(&self, shape: &[usize], seed: u64) -> Weight<Cpu> {
        let source = self.random(shape, seed);
        let mut weight = self.cpu.alloc(DType::BF16, source.shape()).unwrap();
        self.cpu.copy(&source, &mut weight).unwrap();
        Weight::Dense(weight)
    }

    fn linear(&mut self, tokens: usize, inputs: usize, outputs: usize, rank: usize, nf4: bool) {
        let cpu = self.cpu.clone();
        let weight = match self.bf16(&[outputs, inputs], 1) {
            Weight::Dense(dense) if nf4 => Weight::Nf4(cpu.quantize_nf4(&dense, true).unwrap()),
            other => other,
        };
        let (x, dy) = (self.random(&[tokens, inputs], 2), self.random(&[tokens, outputs], 3));
        let (a, b) = (self.random(&[rank, inputs], 4), self.random(&[outputs, rank], 5));
        let mut hidden = self.random(&[tokens, rank], 6);
        let mut y = cpu.alloc(DType::F32, [tokens, outputs]).unwrap();
        let mut dx = cpu.alloc(DType::F32, [tokens, inputs]).unwrap();
        let (mut da, mut db) = (self.random(&[rank, inputs], 7), self.random(&[outputs, rank], 8));
        let shape = format!("T{tokens} I{inputs} O{outputs} R{rank} {}", weight.encoding());
        let dense = 2.0 * (tokens * inputs * outputs) as f64;
        let low_rank = 2.0 * (tokens * rank * (inputs + outputs)) as f64;
        let precision = self.precision;
        self.run("linear_forward", &shape, Work::Flops(dense + low_rank), || {
            let lora = LoraForward {
                a: &a,
                b: &b,
                scale: 2.0,
                hidden: &mut hidden,
            };
            let call = LinearForward {
                x: &x,
                weight: &weight,
                bias: None,
                lora: (rank > 0).then_some(lora),
                precision,
                y: &mut y,
            };
            cpu.linear_forward(call).unwrap();
        });
        self.run("linear_backward", &shape, Work::Flops(dense + 2.0 * low_rank), || {
            let lora = LoraBackward {
                x: &x,
                a: &a,
                b: &b,
                scale: 2.0,
                hidden: &hidden,
                gradient_a: &mut da,
                gradient_b: &mut db,
            };
            let call = LinearBackward {
                dy: &dy,
                weight: &weight,
                lora: (rank > 0).then_some(lora),
                precision,
                dx: Some((&mut dx, Write::Overwrite)),
            };
            cpu.linear_backward(call).unwrap();
        });
    }

    fn attention(&mut self, lengths: &[usize], heads: usize, kv_heads: usize, dim: usize) {
        let cpu = self.cpu.clone();
        let segments = Segments::from_lengths(lengths.iter().copied());
        let tokens = segments.tokens();
        let q = self.random(&[tokens, heads, dim], 1);
        let (k, v) = (
            self.random(&[tokens, kv_heads, dim], 2),
            self.random(&[tokens, kv_heads, dim], 3),
        );
        let dout = self.random(&[tokens, heads, dim], 4);
        let mut out = cpu.alloc(DType::F32, q.shape()).unwrap();
        let mut lse = cpu.alloc(DType::F32, [tokens, heads]).unwrap();
        let mut dq = cpu.alloc(DType::F32, q.shape()).unwrap();
        let (mut dk, mut dv) = (
            cpu.alloc(DType::F32, k.shape()).unwrap(),
            cpu.alloc(DType::F32, k.shape()).unwrap(),
        );
        let pairs: f64 = lengths.iter().map(|n| (n * (n + 1) / 2) as f64).sum();
        let flops = 4.0 * pairs * (heads * dim) as f64;
        let shape = format!("{lengths:?} H{heads} K{kv_heads} D{dim}");
        let (precision, scale) = (self.precision, 1.0 / (dim as f32).sqrt());
        self.run("attention_forward", &shape, Work::Flops(flops), || {
            let call = AttentionForward {
                q: &q,
                k: &k,
                v: &v,
                query_segments: &segments,
                key_segments: &segments,
                scale,
                precision,
                out: &mut out,
                lse: &mut lse,
            };
            cpu.attention_forward(call).unwrap();
        });
        self.run("attention_backward", &shape, Work::Flops(2.5 * flops), || {
            let call = AttentionBackward {
                q: &q,
                k: &k,
                v: &v,
                out: &out,
                lse: &lse,
                dout: &dout,
                segments: &segments,
                scale,
                precision,
                dq: &mut dq,
                dk: &mut dk,
                dv: &mut dv,
            };
            cpu.attention_backward(call).unwrap();
        });
    }

    fn loss(&mut self, tokens: usize, width: usize, vocabulary: usize) {
        let cpu = self.cpu.clone();
        let (x, head) = (self.random(&[tokens, width], 1), self.bf16(&[vocabulary, width], 2));
        let mut random = Random::new(3);
        let labels: Vec<i32> = (0..tokens).map(|_| random.below(vocabulary) as i32).collect();
        let labels = cpu.upload_i32([tokens], &labels).unwrap();
        let mut losses = cpu.alloc(DType::F32, [tokens]).unwrap();
        let mut dx = cpu.alloc(DType::F32, [tokens, width]).unwrap();
        let one = cpu.upload_f32([1], &[1.0]).unwrap();
        let flops = 4.0 * (tokens * width * vocabulary) as f64;
        let precision = self.precision;
        self.run(
            "linear_cross_entropy",
            &format!("T{tokens} C{width} V{vocabulary}"),
            Work::Flops(flops),
            || {
                let call = LinearCrossEntropy {
                    x: &x,
                    head: &head,
                    labels: &labels,
                    precision,
                    losses: &mut losses,
                    dx: Some((&mut dx, &one)),
                };
                cpu.linear_cross_entropy(call).unwrap();
            },
        );
    }

    fn elementwise(&mut self, tokens: usize, width: usize, feed_forward: usize) {
        let cpu = self.cpu.clone();
        let [gate, up, dy] = [1, 2, 3].map(|seed| self.random(&[tokens, feed_forward], seed));
        let [mut y, mut dgate, mut dup] = [(); 3].map(|()| cpu.alloc(DType::F32, gate.shape()).unwrap());
        let bytes = (4 * tokens * feed_forward) as f64;
        let shape = format!("T{tokens} F{feed_forward}");
        self.run("swiglu_forward", &shape, Work::Bytes(3.0 * bytes), || {
            cpu.swiglu_forward(&gate, &up, &mut y).unwrap()
        });
        self.run("swiglu_backward", &shape, Work::Bytes(5.0 * bytes), || {
            cpu.swiglu_backward(&gate, &up, &dy, &mut dgate, &mut dup).unwrap();
        });

        let [x, dy] = [1, 2].map(|seed| self.random(&[tokens, width], seed));
        let weight = self.random(&[width], 3);
        let (mut y, mut dx) = (self.random(&[tokens, width], 4), self.random(&[tokens, width], 5));
        let mut rstd = cpu.alloc(DType::F32, [tokens]).unwrap();
        let bytes = (4 * tokens * width) as f64;
        let shape = format!("T{tokens} C{width}");
        self.run("add_assign", &shape, Work::Bytes(3.0 * bytes), || {
            cpu.add_assign(&mut y, &x).unwrap()
        });
        self.run("rms_norm_forward", &shape, Work::Bytes(2.0 * bytes), || {
            let style = NormWeight::Plain;
            let call = NormForward {
                x: &x,
                weight: &weight,
                style,
                eps: 1e-5,
                y: &mut y,
                rstd: &mut rstd,
            };
            cpu.rms_norm_forward(call).unwrap();
        });
        self.run("rms_norm_backward", &shape, Work::Bytes(4.0 * bytes), || {
            let dx = (&mut dx, Write::Accumulate);
            let style = NormWeight::Plain;
            let call = NormBackward {
                x: &x,
                weight: &weight,
                style,
                rstd: &rstd,
                dy: &dy,
                dx,
            };
            cpu.rms_norm_backward(call).unwrap();
        });
    }

    fn weights(&mut self, outputs: usize, inputs: usize) {
        let cpu = self.cpu.clone();
        let Weight::Dense(source) = self.bf16(&[outputs, inputs], 1) else {
            return;
        };
        let elements = (outputs * inputs) as f64;
        let shape = format!("O{outputs} I{inputs} bf16");
        self.run("quantize_nf4", &shape, Work::Bytes(2.5 * elements), || {
            black_box(cpu.quantize_nf4(&source, true).unwrap());
        });
        let count = 5_000_000;
        let [mut w, g, mut m, mut v] = [1, 2, 3, 4].map(|seed| self.random(&[count], seed));
        let settings = AdamW {
            learning_rate: 1e-4,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.0,
            step: 3,
            gradient_scale: 1.0,
        };
        self.run(
            "adamw_step",
            &format!("{count}"),
            Work::Bytes(28.0 * count as f64),
            || {
                cpu.adamw_step(&mut w, &g, &mut m, &mut v, &settings).unwrap();
            },
        );
        self.run(
            "squared_norm",
            &format!("{count}"),
            Work::Bytes(4.0 * count as f64),
            || {
                black_box(cpu.squared_norm(&[&g]).unwrap());
            },
        );
    }
}

fn main() {
    let mut arguments = std::env::args().skip(1).filter(|argument| argument != "--bench");
    let (mut filter, mut json) = (None, None);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--json" => json = arguments.next().map(|path| std::fs::File::create(path).unwrap()),
            other => filter = Some(other.to_owned()),
        }
    }
    let cpu = Cpu::new(None).unwrap();
    for precision in [Precision::Bf16, Precision::F32] {
        let ceiling = ceiling(&cpu, precision);
        println!(
            "\n{precision:?}: {} threads, {}; ceilings {:.0} GFLOP/s, {:.1} GB/s",
            cpu.threads(),
            cpu.simd_level(),
            ceiling.gigaflops,
            ceiling.gigabytes
        );
        let mut bench = Bench {
            cpu: cpu.clone(),
            precision,
            flops_ceiling: ceiling.gigaflops,
            bytes_ceiling: ceiling.gigabytes,
            filter: filter.clone(),
            json: json.as_ref().map(|file| file.try_clone().unwrap()),
        };
        for tokens in [600, 3000] {
            for (inputs, outputs) in [(576, 576), (576, 192), (576, 1536), (1536, 576)] {
                bench.linear(tokens, inputs, outputs, 16, false);
            }
        }
        bench.linear(600, 576, 1536, 0, false);
        bench.linear(600, 576, 1536, 16, true);
        bench.attention(&[600], 9, 3, 64);
        bench.attention(&[3000], 9, 3, 64);
        bench.loss(300, 576, 49_152);
        if precision == Precision::Bf16 {
            bench.elementwise(3000, 576, 1536);
            bench.weights(1536, 576);
        }
    }
}
