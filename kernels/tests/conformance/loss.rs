//! Cross-entropy.

use brightrun_kernels::ops::{Device, LinearCrossEntropy, LossOps, Precision};
use brightrun_kernels::oracle::{Real, linear_cross_entropy};
use brightrun_kernels::testing::Random;
use brightrun_kernels::{DType, Error};

use super::backends::{PRECISIONS, Run, Traits, narrow, wide};
use super::weights::{ENCODINGS, Encoding, weight};
use crate::{judged, on_every_backend};

/// Tokens, width, vocabulary, and one supervised position in how many.
type Shape = (usize, usize, usize, usize);

const FACTOR: f32 = 0.125;

/// The deviation of the head's elements where logits are of ordinary size.
const ORDINARY: f32 = 0.3;

fn check<B: Traits>(run: &mut Run<'_, B>, dtype: DType, shape: Shape, encoding: Encoding, precision: Precision) {
    check_sized(run, dtype, shape, (encoding, ORDINARY), precision);
}

/// As [`check`], with a head whose elements have this deviation.
fn check_sized<B: Traits>(
    run: &mut Run<'_, B>,
    dtype: DType,
    shape: Shape,
    (encoding, deviation): (Encoding, f32),
    precision: Precision,
) {
    let (tokens, width, vocabulary, one_in) = shape;
    let mut random = Random::new(vocabulary as u64);
    let mut x = random.normal(tokens * width);
    let values: Vec<f32> = random
        .normal(vocabulary * width)
        .into_iter()
        .map(|v| deviation * v)
        .collect();
    let label = |random: &mut Random| {
        if random.below(one_in) == 0 {
            random.below(vocabulary) as i32
        } else {
            -100
        }
    };
    let labels: Vec<i32> = (0..tokens).map(|_| label(&mut random)).collect();
    let device = run.backend;
    let (head, values) = weight(device, encoding, [vocabulary, width], &values);
    let x_t = run.upload(dtype, [tokens, width], &mut x);
    let labels_t = device.upload_i32([tokens], &labels).unwrap();
    let mut losses = device.alloc(DType::F32, [tokens]).unwrap();
    let mut only_losses = device.alloc(DType::F32, [tokens]).unwrap();
    let mut dx = run.output(dtype, [tokens, width]);
    let factor = device.upload_f32([1], &[FACTOR]).unwrap();
    for (losses, dx) in [(&mut losses, Some((&mut dx, &factor))), (&mut only_losses, None)] {
        let call = LinearCrossEntropy {
            x: &x_t,
            head: &head,
            labels: &labels_t,
            precision,
            losses,
            dx,
        };
        device.linear_cross_entropy(call).unwrap();
    }
    let (plain, oracle) = judged!(precision, N, {
        let factor = N::new(f64::from(FACTOR));
        let (losses, dx) = linear_cross_entropy(&narrow::<N>(&x), &narrow::<N>(&values), &labels, width, factor);
        vec![wide(losses), wide(dx)]
    });
    let mut case = run.case(
        format_args!("linear_cross_entropy {shape:?} {encoding:?} {deviation} {dtype} {precision:?}"),
        width + vocabulary,
    );
    case.compare("losses", &losses, &plain[0], &oracle[0]);
    case.compare("losses without dx", &only_losses, &plain[0], &oracle[0]);
    case.compare("dx", &dx, &plain[1], &oracle[1]);
}

#[test]
fn linear_cross_entropy_agrees_with_the_oracle() {
    on_every_backend!("linear_cross_entropy", [LinearCrossEntropy], |run| {
        for dtype in run.activations() {
            for precision in PRECISIONS {
                for encoding in ENCODINGS {
                    // Rows of NF4 that no kernel can read as they lie, and such that one can.
                    check(run, *dtype, (9, 33, 130, 2), encoding, precision);
                    check(run, *dtype, (9, 64, 70, 2), encoding, precision);
                }
                // What Hopper's kernels take: several tiles of rows, entries and width, with tails; and rows that are all passed over.
                for (shape, encoding) in ENCODINGS.iter().map(|encoding| ((300, 64, 264, 2), *encoding)).chain([
                    ((7, 192, 136, 1), Encoding::Nf4),
                    ((20, 136, 72, 1_000_000), Encoding::Bf16),
                ]) {
                    if run.affords(shape.0 * shape.1 * shape.2) {
                        check(run, *dtype, shape, encoding, precision);
                    }
                }
                for shape in [
                    (0, 4, 4, 1),
                    (1, 1, 1, 1),
                    (5, 8, 3, 1),
                    (17, 64, 257, 3),
                    (6, 16, 2_500, 1),
                    (129, 8, 20, 1),
                    (1_100, 3, 5, 9),
                    (4, 8, 8, 1_000_000),
                ] {
                    check(run, *dtype, shape, Encoding::Bf16, precision);
                }
            }
        }
    });
}

/// Logits whose exponentials are no numbers of f32, with others in the same row that are.
#[test]
fn logits_far_beyond_the_exponent_of_f32_are_those_of_the_oracle() {
    on_every_backend!("large logits", [LinearCrossEntropy], |run| {
        for (dtype, precision) in run
            .activations()
            .iter()
            .flat_map(|dtype| PRECISIONS.map(|p| (*dtype, p)))
        {
            for (shape, deviation) in [((20, 64, 264, 2), 8.0), ((9, 8, 400, 1), 30.0), ((9, 64, 72, 1), 1.0)] {
                check_sized(run, dtype, shape, (Encoding::Bf16, deviation), precision);
            }
        }
    });
}

#[test]
fn extreme_logits_give_finite_losses() {
    on_every_backend!("extreme logits", [LinearCrossEntropy], |run| {
        let device = run.backend;
        let (head, _) = weight(device, Encoding::F32, [2, 1], &[200.0, -200.0]);
        let x = device.upload_f32([2, 1], &[1.0, 1.0]).unwrap();
        let labels = device.upload_i32([2], &[0, 1]).unwrap();
        let one = device.upload_f32([1], &[1.0]).unwrap();
        for precision in PRECISIONS {
            let mut losses = device.alloc(DType::F32, [2]).unwrap();
            let mut dx = device.alloc(DType::F32, [2, 1]).unwrap();
            let call = LinearCrossEntropy {
                x: &x,
                head: &head,
                labels: &labels,
                precision,
                losses: &mut losses,
                dx: Some((&mut dx, &one)),
            };
            device.linear_cross_entropy(call).unwrap();
            let mut case = run.case("extreme logits", 1);
            case.compare("losses", &losses, &[0.0, 400.0], &[0.0, 400.0]);
            // A share of 1 has no rounding; the exponential that it comes from may have one.
            let mut case = run
                .case("extreme logits, dx", 1)
                .rounding(usize::from(precision == Precision::Bf16));
            case.compare("dx", &dx, &[0.0, 400.0], &[0.0, 400.0]);
        }
    });
}

#[test]
fn a_label_outside_the_vocabulary_is_refused() {
    on_every_backend!("labels", [LinearCrossEntropy], |run| {
        let device = run.backend;
        let (head, _) = weight(device, Encoding::F32, [2, 1], &[1.0, 2.0]);
        let x = device.upload_f32([1, 1], &[1.0]).unwrap();
        let mut losses = device.alloc(DType::F32, [1]).unwrap();
        for (label, precision) in [2, -1, -101]
            .into_iter()
            .flat_map(|label| PRECISIONS.map(|precision| (label, precision)))
        {
            let labels = device.upload_i32([1], &[label]).unwrap();
            let call = LinearCrossEntropy {
                x: &x,
                head: &head,
                labels: &labels,
                precision,
                losses: &mut losses,
                dx: None,
            };
            // At the latest when the result is read.
            let done = device.linear_cross_entropy(call).and_then(|()| device.read(&losses));
            let error = done.unwrap_err();
            assert!(matches!(error, Error::Value { argument: "labels", .. }), "{error}");
        }
        run.case("labels", 0);
    });
}
