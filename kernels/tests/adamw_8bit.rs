//! 8-bit AdamW against bitsandbytes 0.50.2, whose PyTorch form of `optimizer_update_8bit_blockwise` was run on a CPU for five
//! steps; what it left behind is in `fixtures/adamw_8bit.txt`. Inputs come from a congruential generator, so that they need not
//! be stored.
#![allow(clippy::unwrap_used)]

use std::collections::HashMap;

use brightrun_kernels::cpu::Cpu;
use brightrun_kernels::ops::{AdamW, BlockMoment, Device, OptimizerOps};
use brightrun_kernels::{Shape, dynamic};

const ELEMENTS: usize = 600;

/// Numbers of the Numerical Recipes generator, its upper 24 bits as a fraction around 0.
fn numbers(seed: u32, scale: f64) -> Vec<f32> {
    let mut state = seed;
    let next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        ((f64::from(state >> 8) / 16_777_216.0 - 0.5) * scale) as f32
    };
    std::iter::repeat_with(next).take(ELEMENTS).collect()
}

fn recorded() -> HashMap<&'static str, Vec<u8>> {
    let text = include_str!("fixtures/adamw_8bit.txt");
    let lines = text.lines().filter_map(|line| line.split_once(' '));
    let is_data = |(name, _): &(&str, &str)| *name != "#";
    lines
        .filter(is_data)
        .map(|(name, digits)| (name, hex(digits)))
        .collect()
}

fn hex(digits: &str) -> Vec<u8> {
    let pairs = (0..digits.len() / 2).map(|i| &digits[2 * i..2 * i + 2]);
    pairs.map(|pair| u8::from_str_radix(pair, 16).unwrap()).collect()
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    let words = bytes.chunks_exact(4);
    words.map(|word| f32::from_be_bytes(word.try_into().unwrap())).collect()
}

#[test]
fn five_steps_leave_what_bitsandbytes_leaves() {
    let device = Cpu::new(Some(2)).unwrap();
    let shape = Shape::from([20, 30]);
    let mut w = device.upload_f32(shape, &numbers(1, 2.0)).unwrap();
    let mut m = BlockMoment::zeros(&device, shape).unwrap();
    let mut v = BlockMoment::zeros(&device, shape).unwrap();
    for step in 1..=5 {
        let gradient = device.upload_f32(shape, &numbers(100 + step, 0.25)).unwrap();
        let settings = AdamW {
            learning_rate: 0.007_812_5,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.015_625,
            step: u64::from(step),
            gradient_scale: 0.5,
        };
        device
            .adamw_8bit_step(&mut w, &gradient, &mut m, &mut v, &settings)
            .unwrap();
    }
    let peer = recorded();
    for (moment, map, codes, absmax) in [
        (&m, dynamic::signed(), "m", "m_absmax"),
        (&v, dynamic::unsigned(), "v", "v_absmax"),
    ] {
        // β₂ is an f32 here and a double there: 1 − 0.999 differs by 1.3e-5.
        let scales = device.read_f32(&moment.absmax).unwrap();
        for (ours, theirs) in scales.iter().zip(floats(&peer[absmax])) {
            assert!((ours - theirs).abs() <= 2e-5 * theirs, "{absmax}: {ours} and {theirs}");
        }
        // Both sum in f32, in another order of roundings: a value in the middle of two codes may take either.
        let ours = device.read(&moment.codes).unwrap();
        let differing: Vec<_> = ours
            .iter()
            .zip(&peer[codes])
            .filter(|(ours, theirs)| ours != theirs)
            .collect();
        assert!(
            differing.len() <= ELEMENTS / 100,
            "{codes}: {} codes differ",
            differing.len()
        );
        for (ours, theirs) in differing {
            assert_eq!(ours.abs_diff(*theirs), 1, "{codes} of {:?}", map[usize::from(*ours)]);
        }
    }
    let start = numbers(1, 2.0);
    for ((ours, theirs), start) in device.read_f32(&w).unwrap().iter().zip(floats(&peer["w"])).zip(start) {
        // A code that fell on the other side changes one element's later steps by a share of a step.
        let moved = (theirs - start).abs();
        assert!(
            (ours - theirs).abs() <= 0.02 * moved + 1e-6,
            "{ours} and {theirs}, moved by {moved}"
        );
    }
}

#[test]
fn a_positive_second_moment_never_becomes_zero() {
    let device = Cpu::new(Some(1)).unwrap();
    let mut gradient = vec![1e-5f32; 256];
    gradient[0] = 1.0;
    let settings = AdamW {
        learning_rate: 1e-3,
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        weight_decay: 0.0,
        step: 1,
        gradient_scale: 1.0,
    };
    let mut w = device.upload_f32([256], &[0.0; 256]).unwrap();
    let mut m = BlockMoment::zeros(&device, Shape::from([256])).unwrap();
    let mut v = BlockMoment::zeros(&device, Shape::from([256])).unwrap();
    let none = device.upload_f32([256], &[0.0; 256]).unwrap();
    let first = device.upload_f32([256], &gradient).unwrap();
    device
        .adamw_8bit_step(&mut w, &first, &mut m, &mut v, &settings)
        .unwrap();
    let second = AdamW { step: 2, ..settings };
    device.adamw_8bit_step(&mut w, &none, &mut m, &mut v, &second).unwrap();
    let largest = device
        .read_f32(&w)
        .unwrap()
        .iter()
        .fold(0.0f32, |largest, w| largest.max(w.abs()));
    assert!(largest < 1e-2, "a step without gradient moved a weight by {largest}");
}

#[test]
fn the_result_does_not_depend_on_the_number_of_threads() {
    let run = |threads| {
        let device = Cpu::new(Some(threads)).unwrap();
        let values: Vec<f32> = (0..70_000).map(|i| (i as f32 * 0.37).sin()).collect();
        let shape = Shape::from([70_000]);
        let mut w = device.upload_f32(shape, &values).unwrap();
        let gradient = device.upload_f32(shape, &values).unwrap();
        let mut m = BlockMoment::zeros(&device, shape).unwrap();
        let mut v = BlockMoment::zeros(&device, shape).unwrap();
        let settings = AdamW {
            learning_rate: 1e-3,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.01,
            step: 1,
            gradient_scale: 1.0,
        };
        device
            .adamw_8bit_step(&mut w, &gradient, &mut m, &mut v, &settings)
            .unwrap();
        (
            device.read(&w).unwrap(),
            device.read(&m.codes).unwrap(),
            device.read(&v.codes).unwrap(),
        )
    };
    assert!(run(1) == run(3));
}
