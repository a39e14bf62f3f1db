//! Offsets beyond 2³¹ elements, which 32-bit arithmetic would wrap.
//!
//! Memory is reserved, not touched: only the pages that are written exist. Of the products' grids only the last blocks are run,
//! those that meet the far ends; what they leave there is compared with the same product of nothing but the ends. All
//! numbers are −1, 0 and 1, whose sums no kernel rounds.

#![allow(clippy::unwrap_used, clippy::panic)]

use super::Gpu;
use crate::dtype::DType;
use crate::emu::{Emulated, Emulation, emulated};
use crate::error::Error;
use crate::ops::{
    Device, EmbeddingOps, GroupedLinearBackward, GroupedLinearForward, LinearBackward, LinearForward, MatmulOps,
    MoeOps, Noise, Precision, QuantizeOps, RandomOps, Routing, RowOrder, Write, random_bits,
};
use crate::stack::{Nf4Stack, Nf4StackScales, WeightStack};
use crate::tensor::{Shape, Tensor};
use crate::testing::Random;
use crate::weight::{NF4_BLOCK, Nf4Scales, Nf4Weight, Weight};

/// A tensor of unspecified contents, which is not filled with NaN.
fn untouched(device: &Emulated, dtype: DType, shape: impl Into<Shape>) -> Tensor<Emulated> {
    let shape = shape.into();
    let buffer = device.inner.memory.take(shape.elements() * dtype.size_bytes()).unwrap();
    Tensor::from_buffer(buffer, dtype, shape)
}

#[test]
fn rows_beyond_two_to_the_31_elements_are_found_where_they_were_put() {
    let device = match emulated(Some(2)) {
        Ok(device) => device,
        Err(Error::Unsupported { reason, .. }) => return println!("emulated: absent: {reason}"),
        Err(error) => panic!("{error}"),
    };
    const WIDTH: usize = 1000;
    let rows = (1 << 31) / WIDTH + 10;
    let mut table = untouched(&device, DType::BF16, [rows, WIDTH]);
    let bits: Vec<u16> = (0..WIDTH as u16).map(|i| 0x3F80 + i).collect();
    let row = device
        .upload(DType::BF16, [1, WIDTH], bytemuck::cast_slice(&bits))
        .unwrap();
    device.copy_rows(&row, &mut table, rows - 1).unwrap();
    let ids = device.upload_i32([1], &[rows as i32 - 1]).unwrap();
    let mut found = device.alloc(DType::BF16, [1, WIDTH]).unwrap();
    device.gather_rows(&Weight::Dense(table), &ids, &mut found).unwrap();
    assert_eq!(device.read(&found).unwrap(), bytemuck::cast_slice::<u16, u8>(&bits));
}

#[test]
fn random_contents_beyond_two_to_the_31_elements_have_counters_of_64_bits() {
    let Some(device) = device((8, 0), usize::MAX) else {
        return;
    };
    let count = (1usize << 32) + 5_003;
    let mut codes = untouched(&device, DType::U8, [count]);
    device.fill_random(&mut codes, 3, Noise::Bytes).unwrap();
    let mut end = [0; 5_003];
    device.read_at(&codes, 1 << 32, &mut end).unwrap();
    let byte = |i: usize| random_bits(3, i as u64 / 8).to_le_bytes()[i % 8];
    assert!((0..end.len()).all(|i| end[i] == byte((1 << 32) + i)));
}

/// What a frozen matrix is kept in.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kept {
    Dense(DType),
    Nf4,
}

/// What may be far.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Far {
    /// The rows of activations, for a large tile of results or a small one.
    Tokens,
    TokensOfFew,
    /// The results' columns, and with them the weight's rows or columns.
    Results,
    /// The last expert of a stack.
    Experts,
}

/// Rows at the far end, and the experts of a stack.
const END: usize = 72;
const EXPERTS: usize = 34;
/// Columns of experts' results, which Hopper's kernels do in tiles of 128.
const WIDE: usize = 1 << 20;
/// The last blocks of a grid that are run.
const BLOCKS: usize = 80;

/// One product, forward or back to its inputs, of a dense layer or of routed experts.
#[derive(Clone, Copy, Debug)]
struct Case {
    precision: Precision,
    kept: Kept,
    backward: bool,
    far: Far,
}

/// `M`, the columns of the result, and what is summed over.
#[derive(Clone, Copy, Debug)]
struct Extents {
    tokens: usize,
    results: usize,
    depth: usize,
}

impl Case {
    /// What reaches beyond 2³¹ elements, with a depth of whole blocks of NF4.
    fn extents(self) -> Extents {
        let near = self.near();
        match self.far {
            Far::Tokens | Far::TokensOfFew => Extents {
                tokens: (1 << 25) + 100,
                ..near
            },
            // A grid has no more than 65 535 blocks of 64 or 128 columns.
            Far::Results => Extents {
                results: ((1 << 31) / near.depth + 200).next_multiple_of(64),
                ..near
            },
            Far::Experts => Extents { results: WIDE, ..near },
        }
    }

    /// The same with nothing but the ends.
    fn near(self) -> Extents {
        Extents {
            tokens: END,
            // As many as one tile has.
            results: match (self.far, self.precision) {
                (Far::Tokens, Precision::Bf16) => 128,
                _ => 64,
            },
            depth: if self.far == Far::Results { 576 } else { 64 },
        }
    }

    fn activation(self) -> DType {
        match self.precision {
            Precision::F32 => DType::F32,
            Precision::Bf16 => DType::BF16,
        }
    }

    /// The factors at the ends: `[END, depth]` of activations; of the weight `[results, depth]`.
    fn numbers(self) -> [Vec<f32>; 2] {
        let Extents {
            tokens, results, depth, ..
        } = self.near();
        let mut random = Random::new(depth as u64);
        [tokens * depth, results * depth].map(|count| (0..count).map(|_| random.below(3) as f32 - 1.0).collect())
    }

    /// The result's last rows and columns, of a product with these extents.
    fn run(self, device: &Emulated, extents: Extents) -> Vec<u8> {
        let dtype = self.activation();
        let [left, weight] = self.numbers();
        let mut x = untouched(device, dtype, [extents.tokens, extents.depth]);
        let bytes = elements(device, dtype, &left);
        let first = x.size_bytes() - bytes.len();
        device.write_at(&mut x, first, &bytes).unwrap();
        let mut y = untouched(device, dtype, [extents.tokens, extents.results]);
        let frozen = self.frozen(device, extents, &weight);
        match self.far {
            Far::Experts => self.through_experts(device, &x, frozen, &mut y),
            _ => self.through_layer(device, &x, frozen, &mut y),
        }
        let width = self.near().results * dtype.size_bytes();
        let rows = extents.tokens - END..extents.tokens;
        let end = |row: usize| {
            let mut out = vec![0; width];
            let first = (row + 1) * extents.results * dtype.size_bytes() - width;
            device.read_at(&y, first, &mut out).unwrap();
            out
        };
        rows.flat_map(end).collect()
    }

    /// The weight `[results, depth]`, or transposed, with numbers at its end; of experts the last one's.
    fn frozen(self, device: &Emulated, extents: Extents, numbers: &[f32]) -> WeightStack<Emulated> {
        let Extents { results, depth, .. } = extents;
        let near = self.near().results;
        let experts = if self.far == Far::Experts && results > near {
            EXPERTS
        } else {
            1
        };
        let (rows, columns) = if self.backward {
            (depth, results)
        } else {
            (results, depth)
        };
        let element = |row: usize, column: usize| match self.backward {
            true => numbers[column * depth + row],
            false => numbers[row * depth + column],
        };
        // Of each row what is at its end; of a forward weight whole rows, but the last ones.
        let (here, width) = if self.backward { (depth, near) } else { (near, depth) };
        let last = |row: usize| (experts * rows - here + row) * columns + columns - width;
        let values = |row: usize| (0..width).map(|column| element(row, column)).collect::<Vec<f32>>();
        let mut pieces = (0..here).map(|row| (last(row), values(row)));
        match self.kept {
            Kept::Dense(dtype) => {
                let mut dense = untouched(device, dtype, [experts, rows, columns]);
                pieces.for_each(|(first, values)| {
                    let bytes = elements(device, dtype, &values);
                    device.write_at(&mut dense, first * dtype.size_bytes(), &bytes).unwrap();
                });
                WeightStack::Dense(dense)
            }
            Kept::Nf4 => {
                let size = rows * columns;
                let mut codes = untouched(device, DType::U8, [experts, size / 2]);
                let mut absmax = untouched(device, DType::F32, [experts, size / NF4_BLOCK]);
                let width = values(0).len();
                let source =
                    device.upload_f32([here, width], &pieces.by_ref().flat_map(|(_, v)| v).collect::<Vec<_>>());
                let quantised = device.quantize_nf4(&source.unwrap(), false).unwrap();
                let all = device.read(&quantised.codes).unwrap();
                for row in 0..here {
                    let piece = &all[row * width / 2..(row + 1) * width / 2];
                    device.write_at(&mut codes, last(row) / 2, piece).unwrap();
                    let ones = elements(device, DType::F32, &vec![1.0; width / NF4_BLOCK]);
                    device.write_at(&mut absmax, last(row) / NF4_BLOCK * 4, &ones).unwrap();
                }
                WeightStack::Nf4(Nf4Stack {
                    codes,
                    scales: Nf4StackScales::Flat(absmax),
                    experts,
                    outputs: rows,
                    inputs: columns,
                })
            }
        }
    }

    fn through_layer(
        self,
        device: &Emulated,
        x: &Tensor<Emulated>,
        frozen: WeightStack<Emulated>,
        y: &mut Tensor<Emulated>,
    ) {
        let (_, outputs, inputs) = frozen.extents();
        let weight = match frozen {
            WeightStack::Dense(tensor) => Weight::Dense(tensor.reshaped([outputs, inputs]).unwrap()),
            WeightStack::Nf4(stack) => Weight::Nf4(Nf4Weight {
                codes: flat(stack.codes),
                scales: match stack.scales {
                    Nf4StackScales::Flat(absmax) => Nf4Scales::Flat(flat(absmax)),
                    Nf4StackScales::Nested { .. } => panic!("flat scales were made"),
                },
                outputs,
                inputs,
            }),
        };
        let precision = self.precision;
        let done = match self.backward {
            false => device.linear_forward(LinearForward {
                x,
                weight: &weight,
                bias: None,
                lora: None,
                precision,
                y,
            }),
            true => device.linear_backward(LinearBackward {
                dy: x,
                weight: &weight,
                lora: None,
                precision,
                dx: Some((y, Write::Overwrite)),
            }),
        };
        done.unwrap();
    }

    fn through_experts(
        self,
        device: &Emulated,
        x: &Tensor<Emulated>,
        weight: WeightStack<Emulated>,
        y: &mut Tensor<Emulated>,
    ) {
        let (experts, ..) = weight.extents();
        let mut logits = vec![0.0; END * experts];
        logits
            .iter_mut()
            .skip(experts - 1)
            .step_by(experts)
            .for_each(|last| *last = 9.0);
        let logits = device.upload_f32([END, experts], &logits).unwrap();
        let mut routing = Routing::alloc(device, END, experts, 1).unwrap();
        device.route(&logits, true, &mut routing).unwrap();
        let precision = self.precision;
        let done = match self.backward {
            false => device.grouped_linear_forward(GroupedLinearForward {
                x,
                x_order: RowOrder::Token,
                routing: &routing,
                weight: &weight,
                lora: None,
                precision,
                y,
            }),
            true => device.grouped_linear_backward(GroupedLinearBackward {
                dy: x,
                dy_order: RowOrder::Token,
                routing: &routing,
                weight: &weight,
                lora: None,
                precision,
                dx: Some((y, Write::Overwrite)),
            }),
        };
        done.unwrap();
    }
}

fn flat(tensor: Tensor<Emulated>) -> Tensor<Emulated> {
    let elements = tensor.shape().elements();
    tensor.reshaped([elements]).unwrap()
}

/// Whole numbers in a dtype.
fn elements(device: &Emulated, dtype: DType, values: &[f32]) -> Vec<u8> {
    let single = device.upload_f32([values.len()], values).unwrap();
    let mut converted = device.alloc(dtype, [values.len()]).unwrap();
    device.copy(&single, &mut converted).unwrap();
    device.read(&converted).unwrap()
}

/// A device that runs the last of each `period` blocks; `None`, told, where there is no compiler.
fn device(capability: (u32, u32), period: usize) -> Option<Emulated> {
    match Emulation::of(Some(2), capability) {
        Ok(emulation) => Some(Gpu::new(emulation.of_last_blocks(BLOCKS, period)).unwrap()),
        Err(Error::Unsupported { reason, .. }) => {
            println!("emulated: absent: {reason}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// Every form of a product on a device of this capability.
fn check(capability: (u32, u32), precision: Precision, weights: [Kept; 2]) {
    for far in [Far::Tokens, Far::TokensOfFew, Far::Results, Far::Experts] {
        // On Hopper the tiles of one expert's rows follow each other, and lines of nothing follow those.
        let period = match (capability, far) {
            ((9, 0), Far::Experts) => WIDE / 128,
            _ => usize::MAX,
        };
        let Some(device) = device(capability, period) else {
            return;
        };
        for (kept, backward) in weights.into_iter().flat_map(|kept| [(kept, false), (kept, true)]) {
            let case = Case {
                precision,
                kept,
                backward,
                far,
            };
            let near = case.run(&device, case.near());
            let sums = elements_that_differ(&near);
            assert!(sums > 3, "{case:?}: {sums} different sums");
            assert!(case.run(&device, case.extents()) == near, "{case:?}");
        }
    }
}

/// How many different bytes there are: a result that was not computed is all alike.
fn elements_that_differ(bytes: &[u8]) -> usize {
    bytes.iter().collect::<std::collections::BTreeSet<_>>().len()
}

#[test]
fn products_beyond_two_to_the_31_elements_are_those_of_the_ends() {
    check((8, 0), Precision::Bf16, [Kept::Dense(DType::BF16), Kept::Nf4]);
}

#[test]
fn exact_products_beyond_two_to_the_31_elements_are_those_of_the_ends() {
    check((8, 0), Precision::F32, [Kept::Dense(DType::F32), Kept::Nf4]);
}

#[test]
fn products_of_hopper_beyond_two_to_the_31_elements_are_those_of_the_ends() {
    check((9, 0), Precision::Bf16, [Kept::Dense(DType::BF16), Kept::Nf4]);
}
