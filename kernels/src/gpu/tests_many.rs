//! Launches over many tensors, on the emulation.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeMap;

use super::addresses::{Field, Row};
use super::kernel::Parameter::{Addresses, I64, In, Out};
use super::tests::{Emulated, device};
use super::{Argument, Element, Geometry, Kernel, sources};
use crate::dtype::DType;
use crate::emu::Emulation;
use crate::error::Result;
use crate::ops::{AdamW, BlockMoment, Device, MomentsMut, OptimizerOps, Recorded, Trained};
use crate::tensor::{Segments, Shape, Tensor};
use crate::testing::{Random, Watched};

const SETTINGS: AdamW = AdamW {
    learning_rate: 1e-2,
    beta1: 0.9,
    beta2: 0.999,
    epsilon: 1e-8,
    weight_decay: 0.1,
    step: 3,
    gradient_scale: 0.5,
};

enum Moments {
    Single([Tensor<Emulated>; 2]),
    Blocks([BlockMoment<Emulated>; 2]),
}

/// A parameter with its gradient and moments.
struct Factor {
    parameter: Tensor<Emulated>,
    gradient: Tensor<Emulated>,
    moments: Moments,
}

impl Factor {
    fn new(device: &Emulated, elements: usize, in_8bit: bool) -> Self {
        let mut random = Random::new(elements as u64);
        let mut numbers = || device.upload_f32([elements], &random.normal(elements)).unwrap();
        let zeros = || device.zeros(DType::F32, [elements]).unwrap();
        let blocks = || BlockMoment::zeros(device, Shape::from([elements])).unwrap();
        Self {
            parameter: numbers(),
            gradient: numbers(),
            moments: match in_8bit {
                false => Moments::Single([zeros(), zeros()]),
                true => Moments::Blocks([blocks(), blocks()]),
            },
        }
    }

    fn trained(&mut self) -> Trained<'_, Emulated> {
        Trained {
            parameter: &mut self.parameter,
            gradient: &self.gradient,
            moments: match &mut self.moments {
                Moments::Single([m, v]) => MomentsMut::Single { m, v },
                Moments::Blocks([m, v]) => MomentsMut::Blocks { m, v },
            },
        }
    }

    /// Everything that a step changes.
    fn bytes(&self, device: &Emulated) -> Vec<Vec<u8>> {
        let changed = match &self.moments {
            Moments::Single([m, v]) => vec![&self.parameter, m, v],
            Moments::Blocks([m, v]) => vec![&self.parameter, &m.codes, &m.absmax, &v.codes, &v.absmax],
        };
        changed.into_iter().map(|tensor| device.read(tensor).unwrap()).collect()
    }
}

/// Nothing, one, around a block of 8 bits, around a chunk, several chunks.
const SIZES: [usize; 9] = [0, 1, 255, 257, 4095, 4096, 4097, 9000, 20_003];

fn factors(device: &Emulated) -> Vec<Factor> {
    let sizes = SIZES.iter().enumerate();
    sizes.map(|(i, size)| Factor::new(device, *size, i % 2 == 1)).collect()
}

fn step(device: &Emulated, factors: &mut [Factor]) -> Result<()> {
    device.adamw_step_many(factors.iter_mut().map(Factor::trained).collect(), &SETTINGS)
}

fn entries(pairs: &[(&str, u64)]) -> BTreeMap<String, u64> {
    pairs.iter().map(|(name, times)| ((*name).to_owned(), *times)).collect()
}

#[test]
fn any_number_of_parameters_takes_two_launches_and_no_copy_after_the_first_step() {
    let Some(device) = device() else { return };
    let mut factors = factors(&device);
    step(&device, &mut factors).unwrap();
    device.runtime().entries();
    device.runtime().calls();
    for _ in 0..2 {
        step(&device, &mut factors).unwrap();
        let calls = device.runtime().calls();
        assert_eq!([calls.writes, calls.allocations, calls.reads], [0; 3]);
        let expected = entries(&[("adamw_step_many", 1), ("adamw_8bit_step_many", 1)]);
        assert_eq!(device.runtime().entries(), expected);
    }
    let gradients: Vec<_> = factors.iter().map(|factor| &factor.gradient).collect();
    device.squared_norm(&gradients).unwrap();
    let expected = entries(&[("squared_norm_parts", 1), ("squared_norm_total", 1)]);
    assert_eq!(device.runtime().entries(), expected);
    let gradients = factors.iter_mut().map(|factor| &mut factor.gradient);
    device.zero_many(gradients.collect()).unwrap();
    assert_eq!(device.runtime().entries(), entries(&[("zero_many", 1)]));
}

#[test]
fn a_parameter_that_has_moved_is_found_where_it_is_now() {
    let Some(device) = device() else { return };
    let [mut many, mut single] = [(); 2].map(|()| factors(&device));
    for round in 0..3 {
        step(&device, &mut many).unwrap();
        for factor in &mut single {
            step(&device, std::slice::from_mut(factor)).unwrap();
        }
        let bytes = |factors: &[Factor]| factors.iter().map(|one| one.bytes(&device)).collect::<Vec<_>>();
        assert!(bytes(&many) == bytes(&single), "round {round}");
        // Other memory for one of them; the old one's is given to somebody else.
        let values = device.read(&many[7].parameter).unwrap();
        let moved = device.upload(DType::F32, [9000], &values).unwrap();
        drop(std::mem::replace(&mut many[7].parameter, moved));
        let mut other = device.zeros(DType::F32, [9000]).unwrap();
        device.fill_zero(&mut other).unwrap();
        many.push(Factor::new(&device, 33, true));
        single.push(Factor::new(&device, 33, true));
    }
}

#[test]
fn a_step_over_many_is_not_recorded_and_done_all_the_same() {
    let Some(device) = device() else { return };
    let [mut recorded, mut plain] = [(); 2].map(|()| factors(&device));
    step(&device, &mut plain).unwrap();
    step(&device, &mut plain).unwrap();
    device
        .step(|| {
            drop(device.zeros(DType::U8, [4])?);
            step(&device, &mut recorded)
        })
        .unwrap();
    let documents = Segments::from_lengths([1]);
    let answer = device.step(|| device.record(&documents, || step(&device, &mut recorded)));
    match answer.unwrap() {
        Recorded::Not(reason) => assert_eq!(
            reason,
            "adamw_step_many: the addresses of 5 tensors lie in a table, which a recording cannot repeat (after the beginning)"
        ),
        Recorded::Yes(_) => panic!("a table that may change was recorded"),
    }
    for (ours, theirs) in recorded.iter().zip(&plain) {
        assert!(ours.bytes(&device) == theirs.bytes(&device));
    }
}

#[test]
fn what_a_step_keeps_does_not_stand_in_the_way_of_its_arena() {
    let Some(device) = device() else { return };
    let mut factors = factors(&device);
    device
        .step(|| {
            drop(device.zeros(DType::U8, [1000])?);
            step(&device, &mut factors)
        })
        .unwrap();
    assert!(device.arena_bytes() >= 1000, "{}", device.arena_bytes());
}

#[test]
fn nothing_is_updated_when_one_of_many_breaks_the_contract() {
    let Some(device) = device() else { return };
    let mut factors = factors(&device);
    let before: Vec<_> = factors.iter().map(|factor| factor.bytes(&device)).collect();
    factors[8].gradient = device.zeros(DType::F32, [20_002]).unwrap();
    let error = step(&device, &mut factors).unwrap_err();
    assert_eq!(
        error.to_string(),
        "adamw_step: `gradient` must be the parameter's shape = [20003], but is [20002]"
    );
    let after: Vec<_> = factors.iter().map(|factor| factor.bytes(&device)).collect();
    assert!(before == after);
}

static ROW: Row = Row {
    name: "Cleared",
    fields: &[("x", Out(Element::Is(DType::F32))), ("count", I64)],
    chunk: 4096,
};

static ZERO: Kernel = Kernel {
    source: &sources::OPTIMIZER,
    stem: "zero_many",
    types: &[],
    threads: 256,
    parameters: &[("rows", Addresses(&ROW)), ("chunks", In(Element::Is(DType::I32)))],
};

#[test]
fn a_kernel_that_leaves_a_tensor_of_a_table_is_named_with_the_distance() {
    let Some(device) = device() else { return };
    let [mut right, mut wrong] = [(); 2].map(|()| device.zeros(DType::F32, [100]).unwrap());
    let rows = vec![
        vec![Field::Out(&mut right), Field::Count(100)],
        vec![Field::Out(&mut wrong), Field::Count(101)],
    ];
    let addresses = device.addresses("zero_many", &ROW, rows).unwrap();
    let arguments = [Argument::Addresses(&addresses), Argument::In(addresses.chunks())];
    let error = device
        .launch(&ZERO, &[], Geometry::cover(2, 1), &arguments)
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "zero_many: zero_many in optimizer.cu, grid [2, 1, 1] of 256 threads: block (1, 0, 0), thread (12, 0, 0): touched memory 0 \
         bytes past the end of buffer 2 of the launch (400 bytes); given rows of 2 Cleared, chunks i32 [2, 2]"
    );
}

#[test]
fn a_row_of_other_fields_than_its_struct_is_refused() {
    let Some(device) = device() else { return };
    let (mut x, mut codes) = (
        device.zeros(DType::F32, [4]).unwrap(),
        device.zeros(DType::U8, [4]).unwrap(),
    );
    fn refused(device: &Emulated, row: Vec<Field<'_, Watched<Emulation>>>) -> String {
        let made = device.addresses("zero_many", &ROW, vec![row]).map(|_| ());
        made.unwrap_err().to_string()
    }
    assert_eq!(
        refused(&device, vec![Field::In(&x), Field::Count(4)]),
        "zero_many: launch refused: `x` of row 0 wants Out(Is(F32)) and got another kind of field"
    );
    assert_eq!(
        refused(&device, vec![Field::Out(&mut codes), Field::Count(4)]),
        "zero_many: launch refused: `x` of row 0 wants Is(F32), but is Tensor(u8 [4])"
    );
    assert_eq!(
        refused(&device, vec![Field::Out(&mut x)]),
        "zero_many: launch refused: 1 fields for 2 of `Cleared`"
    );
}
