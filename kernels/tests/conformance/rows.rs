//! Gathering and copying rows, and rotary embedding.

use brightrun_kernels::ops::{Device, EmbeddingOps, Precision, RopeDirection, RopeOps, RopeTable};
use brightrun_kernels::oracle::rope;
use brightrun_kernels::testing::Random;
use brightrun_kernels::{DType, Error, Weight};
use half::bf16;

use super::backends::{Run, Traits, narrow, wide};
use super::weights::{Encoding, weight};
use crate::{judged, on_every_backend};

/// Tokens, heads, head dimension, rotary pairs.
type RopeShape = (usize, usize, usize, usize);

fn rotate<B: Traits>(run: &mut Run<'_, B>, shape: RopeShape, direction: RopeDirection, activation: DType) {
    let (tokens, heads, dim, pairs) = shape;
    let mut random = Random::new(dim as u64);
    let mut x = random.normal(tokens * heads * dim);
    let count = 50;
    let positions: Vec<i32> = (0..tokens).map(|_| random.below(count) as i32).collect();
    let angles = random.normal(count * pairs);
    let (cos, sin): (Vec<f32>, Vec<f32>) = angles.iter().map(|angle| (angle.cos(), angle.sin())).unzip();
    let device = run.backend;
    let mut x_t = run.upload(activation, [tokens, heads, dim], &mut x);
    let table = RopeTable {
        cos: device.upload_f32([count, pairs], &cos).unwrap(),
        sin: device.upload_f32([count, pairs], &sin).unwrap(),
    };
    device
        .rope(
            &mut x_t,
            &device.upload_i32([tokens], &positions).unwrap(),
            &table,
            direction,
        )
        .unwrap();
    let sign = if direction == RopeDirection::Forward { 1.0 } else { -1.0 };
    let (plain, oracle) = judged!(Precision::F32, N, {
        let mut x = narrow::<N>(&x);
        rope(
            &mut x,
            (heads, dim),
            &positions,
            &narrow::<N>(&cos),
            &narrow::<N>(&sin),
            pairs,
            sign,
        );
        vec![wide(x)]
    });
    run.case(format_args!("rope {shape:?} {direction:?} {activation}"), 2)
        .compare("x", &x_t, &plain[0], &oracle[0]);
}

#[test]
fn rope_agrees_with_the_oracle() {
    on_every_backend!("rope", [Rope], |run| {
        for shape in [
            (0, 2, 8, 4),
            (1, 1, 2, 1),
            (3, 2, 64, 32),
            (5, 3, 20, 10),
            (9, 2, 64, 8),
            (130, 4, 128, 64),
            (2, 1, 6, 0),
        ] {
            for activation in run.activations() {
                rotate(run, shape, RopeDirection::Forward, *activation);
                rotate(run, shape, RopeDirection::Backward, *activation);
            }
        }
    });
}

#[test]
fn gathered_rows_are_the_tables_rows() {
    on_every_backend!("gather_rows", [GatherRows], |run| {
        let device = run.backend;
        for (encoding, width) in [(Encoding::F32, 5), (Encoding::Bf16, 33), (Encoding::F16, 64)] {
            let (table, values) = weight(device, encoding, [7, width], &Random::new(1).normal(7 * width));
            let ids = [6, 0, 3, 3];
            let ids_t = device.upload_i32([4], &ids).unwrap();
            for activation in run.activations() {
                let mut y = run.output(*activation, [4, width]);
                device.gather_rows(&table, &ids_t, &mut y).unwrap();
                let rows = ids.iter().flat_map(|id| &values[*id as usize * width..][..width]);
                let rows: Vec<f64> = match activation {
                    DType::BF16 => rows.map(|v| bf16::from_f32(*v).to_f64()).collect(),
                    _ => rows.map(|v| f64::from(*v)).collect(),
                };
                run.case(format_args!("gather_rows {encoding:?} {width} {activation}"), 0)
                    .compare("y", &y, &rows, &rows);
            }
        }
    });
}

#[test]
fn ids_and_positions_outside_their_tables_are_refused() {
    on_every_backend!("refusals", [GatherRows, Rope], |run| {
        let device = run.backend;
        let table = Weight::Dense(device.upload_f32([3, 2], &[0.0; 6]).unwrap());
        let mut y = device.alloc(DType::F32, [1, 2]).unwrap();
        for id in [-1, 3] {
            let ids = device.upload_i32([1], &[id]).unwrap();
            // At the latest when the result is read: a device is not asked for its opinion in every op.
            let read = device.gather_rows(&table, &ids, &mut y).and_then(|()| device.read(&y));
            let error = read.unwrap_err();
            assert!(matches!(error, Error::Value { argument: "ids", .. }), "{error}");
        }
        let angles = || device.upload_f32([2, 1], &[0.0; 2]).unwrap();
        let table = RopeTable {
            cos: angles(),
            sin: angles(),
        };
        let mut x = device.upload_f32([1, 1, 2], &[1.0, 2.0]).unwrap();
        for position in [-1, 2] {
            let positions = device.upload_i32([1], &[position]).unwrap();
            let rotated = device.rope(&mut x, &positions, &table, RopeDirection::Forward);
            let error = rotated.and_then(|()| device.read(&x)).unwrap_err();
            assert!(
                matches!(
                    error,
                    Error::Value {
                        argument: "positions",
                        ..
                    }
                ),
                "{error}"
            );
        }
        run.case("refusals", 0);
    });
}

#[test]
fn copied_rows_land_where_they_are_told() {
    on_every_backend!("copy_rows", [CopyRows], |run| {
        let device = run.backend;
        let source = device.upload_f32([2, 1, 2], &[1.0, 2.0, 3.0, 4.0]).unwrap();
        let mut target = device.upload_f32([4, 1, 2], &[0.0; 8]).unwrap();
        device.copy_rows(&source, &mut target, 1).unwrap();
        let expected = [0.0, 0.0, 1.0, 2.0, 3.0, 4.0, 0.0, 0.0];
        run.case("copy_rows", 0)
            .compare("target", &target, &expected, &expected);
        let error = device.copy_rows(&source, &mut target, 3).unwrap_err();
        assert!(matches!(error, Error::Value { argument: "first", .. }), "{error}");
    });
}
