//! The CPU backend computes what the op contracts say, on examples small enough to check by hand.

#![allow(clippy::unwrap_used)]

use brightrun_kernels::ops::{
    AttentionForward, AttentionOps, Device, LinearForward, MatmulOps, NormForward, NormOps, NormWeight, Precision,
};
use brightrun_kernels::{DType, Segments, Weight, cpu::Cpu};

fn cpu() -> Cpu {
    Cpu::new(Some(2)).unwrap()
}

#[test]
fn a_linear_layer_multiplies_by_the_transposed_weight_and_adds_the_bias() {
    let cpu = cpu();
    let x = cpu.upload_f32([2, 3], &[1.0, 2.0, 3.0, 0.0, -1.0, 4.0]).unwrap();
    let weight = Weight::Dense(cpu.upload_f32([2, 3], &[1.0, 0.0, 1.0, 2.0, 1.0, 0.0]).unwrap());
    let bias = cpu.upload_f32([2], &[10.0, 20.0]).unwrap();
    let mut y = cpu.alloc(DType::F32, [2, 2]).unwrap();
    let call = LinearForward {
        x: &x,
        weight: &weight,
        bias: Some(&bias),
        lora: None,
        precision: Precision::F32,
        y: &mut y,
    };
    cpu.linear_forward(call).unwrap();
    assert_eq!(cpu.read_f32(&y).unwrap(), [14.0, 24.0, 14.0, 19.0]);
}

#[test]
fn a_normalised_row_has_a_mean_square_of_one() {
    let cpu = cpu();
    let x = cpu.upload_f32([1, 4], &[3.0, -3.0, 3.0, -3.0]).unwrap();
    let weight = cpu.upload_f32([4], &[1.0, 1.0, 2.0, 1.0]).unwrap();
    let (mut y, mut rstd) = (
        cpu.alloc(DType::F32, [1, 4]).unwrap(),
        cpu.alloc(DType::F32, [1]).unwrap(),
    );
    let call = NormForward {
        x: &x,
        weight: &weight,
        style: NormWeight::Plain,
        eps: 0.0,
        y: &mut y,
        rstd: &mut rstd,
    };
    cpu.rms_norm_forward(call).unwrap();
    assert_eq!(cpu.read_f32(&y).unwrap(), [1.0, -1.0, 2.0, -1.0]);
}

#[test]
fn the_first_token_of_each_document_attends_to_itself_only() {
    let cpu = cpu();
    let values: Vec<f32> = (0..3 * 2).map(|i| i as f32).collect();
    let [q, k, v] = [0, 1, 2].map(|_| cpu.upload_f32([3, 1, 2], &values).unwrap());
    let segments = Segments::from_lengths([1, 2]);
    let (mut out, mut lse) = (
        cpu.alloc(DType::F32, [3, 1, 2]).unwrap(),
        cpu.alloc(DType::F32, [3, 1]).unwrap(),
    );
    cpu.attention_forward(AttentionForward {
        q: &q,
        k: &k,
        v: &v,
        query_segments: &segments,
        key_segments: &segments,
        scale: 1.0,
        precision: Precision::F32,
        out: &mut out,
        lse: &mut lse,
    })
    .unwrap();
    let out = cpu.read_f32(&out).unwrap();
    assert_eq!(out[..4], [0.0, 1.0, 2.0, 3.0]);
    assert!(out[4] > 3.9 && out[4] <= 4.0);
}
