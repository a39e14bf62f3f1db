//! Element-wise ops, norms and the optimizer.

use brightrun_kernels::ops::{
    AdamW, AddNormForward, BlockMoment, Device, MOMENT_BLOCK, MomentsMut, NormBackward, NormForward, NormWeight,
    OptimizerOps, Precision, Trained, Write,
};
use brightrun_kernels::oracle::{
    Real, adamw_step, decode_moment, rms_norm_backward, rms_norm_forward, swiglu_backward, swiglu_forward,
};
use brightrun_kernels::testing::Random;
use brightrun_kernels::{DType, Shape, Tensor, dynamic};
use half::bf16;

use super::backends::{Run, Traits, narrow, wide};
use super::weights::dense;
use crate::{judged, on_every_backend};

/// Rows and columns: nothing, one, odd tails, more than a task, more than a warp's row.
const SHAPES: &[[usize; 2]] = &[
    [0, 4],
    [1, 1],
    [1, 15],
    [3, 16],
    [5, 17],
    [7, 63],
    [2, 64],
    [33, 65],
    [40, 1000],
    [3, 1032],
    [2, 2049],
];

/// Gates far out on both sides too, where a careless logistic overflows.
fn gates(random: &mut Random, count: usize) -> Vec<f32> {
    let values = random.normal(count);
    values
        .into_iter()
        .map(|value| value * [1.0, 10.0, 40.0, 200.0][random.below(4)])
        .collect()
}

fn swiglu<B: Traits>(run: &mut Run<'_, B>, shape: [usize; 2], activation: DType) {
    let mut random = Random::new(shape[1] as u64);
    let count = shape[0] * shape[1];
    let (mut gate, mut up, mut dy) = (
        gates(&mut random, count),
        random.adversarial(count),
        random.adversarial(count),
    );
    let device = run.backend;
    let [gate_t, up_t, dy_t] = [&mut gate, &mut up, &mut dy].map(|values| run.upload(activation, shape, values));
    let [mut y, mut dgate, mut dup] = [(); 3].map(|()| run.output(activation, shape));
    device.swiglu_forward(&gate_t, &up_t, &mut y).unwrap();
    device
        .swiglu_backward(&gate_t, &up_t, &dy_t, &mut dgate, &mut dup)
        .unwrap();
    let (plain, oracle) = judged!(Precision::F32, N, {
        let (gate, up, dy) = (narrow::<N>(&gate), narrow::<N>(&up), narrow::<N>(&dy));
        let (dgate, dup) = swiglu_backward(&gate, &up, &dy);
        vec![wide(swiglu_forward(&gate, &up)), wide(dgate), wide(dup)]
    });
    let mut case = run.case(format_args!("swiglu {shape:?} {activation}"), 8);
    for (i, (name, tensor)) in [("y", &y), ("dgate", &dgate), ("dup", &dup)].into_iter().enumerate() {
        case.compare(name, tensor, &plain[i], &oracle[i]);
    }
}

fn add<B: Traits>(run: &mut Run<'_, B>, shape: [usize; 2], activation: DType) {
    let mut random = Random::new(shape[1] as u64);
    let count = shape[0] * shape[1];
    let (mut x, mut y) = (random.adversarial(count), random.normal(count));
    let [x_t, mut y_t] = [&mut x, &mut y].map(|values| run.upload(activation, shape, values));
    run.backend.add_assign(&mut y_t, &x_t).unwrap();
    let stored = |sum: f32| match activation {
        DType::BF16 => bf16::from_f32(sum).to_f64(),
        _ => f64::from(sum),
    };
    let sum: Vec<f64> = x.iter().zip(&y).map(|(x, y)| stored(x + y)).collect();
    run.case(format_args!("add_assign {shape:?} {activation}"), 0)
        .compare("y", &y_t, &sum, &sum);
}

/// How a norm's weight is kept and its gradient written.
type NormStyle = (NormWeight, DType, Write);

fn norm<B: Traits>(run: &mut Run<'_, B>, shape: [usize; 2], (style, dtype, write): NormStyle, activation: DType) {
    let [rows, width] = shape;
    let mut random = Random::new(width as u64);
    let count = rows * width;
    let (mut x, mut dy, mut old) = (random.adversarial(count), random.normal(count), random.normal(count));
    let stored = random.normal(width);
    let device = run.backend;
    let [x_t, dy_t, mut dx] = [&mut x, &mut dy, &mut old].map(|values| run.upload(activation, shape, values));
    let weight = dense(device, dtype, [1, width], &stored).reshaped([width]).unwrap();
    let stored = device.read_f32(&weight).unwrap();
    let factor: Vec<f32> = stored
        .iter()
        .map(|w| if style == NormWeight::ZeroCentred { 1.0 + w } else { *w })
        .collect();
    let (mut y, mut rstd) = (run.output(activation, shape), device.alloc(DType::F32, [rows]).unwrap());
    let eps = 1e-6;
    let call = NormForward {
        x: &x_t,
        weight: &weight,
        style,
        eps,
        y: &mut y,
        rstd: &mut rstd,
    };
    device.rms_norm_forward(call).unwrap();
    let call = NormBackward {
        x: &x_t,
        weight: &weight,
        style,
        rstd: &rstd,
        dy: &dy_t,
        dx: (&mut dx, write),
    };
    device.rms_norm_backward(call).unwrap();
    let (plain, oracle) = judged!(Precision::F32, N, {
        let (x, dy, factor) = (narrow::<N>(&x), narrow::<N>(&dy), narrow::<N>(&factor));
        let (y, rstd) = rms_norm_forward(&x, &factor, N::new(f64::from(eps)));
        let mut dx = rms_norm_backward(&x, &factor, &rstd, &dy);
        if write == Write::Accumulate {
            #[allow(clippy::assign_op_pattern)] // `Real` has no such operator
            dx.iter_mut()
                .zip(narrow::<N>(&old))
                .for_each(|(dx, old)| *dx = *dx + old);
        }
        vec![wide(y), wide(rstd), wide(dx)]
    });
    let what = format_args!("rms_norm {shape:?} {style:?} {dtype} {write:?} {activation}");
    let mut case = run.case(what, width);
    for (i, (name, tensor)) in [("y", &y), ("rstd", &rstd), ("dx", &dx)].into_iter().enumerate() {
        case.compare(name, tensor, &plain[i], &oracle[i]);
    }
}

fn add_norm<B: Traits>(
    run: &mut Run<'_, B>,
    shape: [usize; 2],
    (style, dtype): (NormWeight, DType),
    activation: DType,
) {
    let [rows, width] = shape;
    let mut random = Random::new(width as u64 + 1);
    let count = rows * width;
    let (mut x, mut added) = (random.adversarial(count), random.normal(count));
    let device = run.backend;
    let [mut x_t, added_t] = [&mut x, &mut added].map(|values| run.upload(activation, shape, values));
    let weight = dense(device, dtype, [1, width], &random.normal(width));
    let weight = weight.reshaped([width]).unwrap();
    let factor = device.read_f32(&weight).unwrap().into_iter();
    let factor: Vec<f32> = factor
        .map(|w| if style == NormWeight::ZeroCentred { 1.0 + w } else { w })
        .collect();
    let (mut y, mut rstd) = (run.output(activation, shape), device.alloc(DType::F32, [rows]).unwrap());
    let call = AddNormForward {
        x: &mut x_t,
        added: &added_t,
        weight: &weight,
        style,
        eps: 1e-6,
        y: &mut y,
        rstd: &mut rstd,
    };
    device.add_rms_norm_forward(call).unwrap();
    let stored = |sum: f32| match activation {
        DType::BF16 => bf16::from_f32(sum).to_f32(),
        _ => sum,
    };
    let sum: Vec<f32> = x.iter().zip(&added).map(|(x, added)| stored(x + added)).collect();
    let (plain, oracle) = judged!(Precision::F32, N, {
        let (y, rstd) = rms_norm_forward(&narrow::<N>(&sum), &narrow::<N>(&factor), N::new(f64::from(1e-6f32)));
        vec![wide(y), wide(rstd)]
    });
    let exact: Vec<f64> = sum.iter().copied().map(f64::from).collect();
    let what = format_args!("add_rms_norm {shape:?} {style:?} {dtype} {activation}");
    let mut case = run.case(what, width);
    case.compare("x", &x_t, &exact, &exact);
    case.compare("y", &y, &plain[0], &oracle[0]);
    case.compare("rstd", &rstd, &plain[1], &oracle[1]);
}

#[test]
fn a_norm_of_the_sum_is_a_sum_and_then_a_norm() {
    on_every_backend!("add_rms_norm", [AddAssign, RmsNormForward], |run| {
        for shape in SHAPES {
            for (i, activation) in run.activations().iter().enumerate() {
                let styles = [(NormWeight::Plain, DType::F32), (NormWeight::ZeroCentred, DType::BF16)];
                add_norm(run, *shape, styles[(shape[1] + i) % 2], *activation);
            }
        }
    });
}

fn adamw<B: Traits>(run: &mut Run<'_, B>, shape: [usize; 2], step: u64) {
    let mut random = Random::new(step);
    let count = shape[0] * shape[1];
    let (w, g, m) = (random.normal(count), random.adversarial(count), random.normal(count));
    let v: Vec<f32> = random.normal(count).into_iter().map(|v| v * v).collect();
    let settings = AdamW {
        learning_rate: 3e-3,
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        weight_decay: 0.01,
        step,
        gradient_scale: 0.37,
    };
    let device = run.backend;
    let [mut w_t, g_t, mut m_t, mut v_t] = [&w, &g, &m, &v].map(|values| device.upload_f32(shape, values).unwrap());
    device
        .adamw_step(&mut w_t, &g_t, &mut m_t, &mut v_t, &settings)
        .unwrap();
    let (plain, oracle) = judged!(Precision::F32, N, {
        let (mut w, g, mut m, mut v) = (narrow::<N>(&w), narrow::<N>(&g), narrow::<N>(&m), narrow::<N>(&v));
        adamw_step(&mut w, &g, &mut m, &mut v, &settings);
        vec![wide(w), wide(m), wide(v)]
    });
    let mut case = run.case(format_args!("adamw {shape:?} step {step}"), 4);
    for (i, (name, tensor)) in [("w", &w_t), ("m", &m_t), ("v", &v_t)].into_iter().enumerate() {
        case.compare(name, tensor, &plain[i], &oracle[i]);
    }
}

/// Every shape in every dtype that activations may have.
fn cases<B: Traits>(run: &Run<'_, B>) -> impl Iterator<Item = ([usize; 2], DType)> + use<B> {
    let dtypes = run.activations();
    SHAPES
        .iter()
        .flat_map(|shape| dtypes.iter().map(|dtype| (*shape, *dtype)))
}

/// Moments as codes: the weights against the oracle's step from the decoded moments; the new codes by the rule that none is
/// further from the oracle's moment than the nearest value of the map, rounding apart.
fn adamw_8bit<B: Traits>(run: &mut Run<'_, B>, shape: [usize; 2], step: u64) {
    let mut random = Random::new(step + 77);
    let count = shape[0] * shape[1];
    let (w, g) = (random.normal(count), random.normal(count));
    let codes = |random: &mut Random| -> Vec<u8> { (0..count).map(|_| random.below(256) as u8).collect() };
    let (m_codes, v_codes) = (codes(&mut random), codes(&mut random));
    let scales: Vec<f32> = random
        .normal(count.div_ceil(MOMENT_BLOCK))
        .into_iter()
        .map(f32::abs)
        .collect();
    let (signed, unsigned) = (dynamic::signed(), dynamic::unsigned());
    let settings = AdamW {
        learning_rate: 3e-3,
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        weight_decay: 0.01,
        step,
        gradient_scale: 0.37,
    };
    let device = run.backend;
    let [mut w_t, g_t] = [&w, &g].map(|values| device.upload_f32(shape, values).unwrap());
    let moment = |codes: &[u8]| BlockMoment {
        codes: device.upload(DType::U8, shape, codes).unwrap(),
        absmax: device.upload_f32([scales.len()], &scales).unwrap(),
    };
    let (mut m_t, mut v_t) = (moment(&m_codes), moment(&v_codes));
    device
        .adamw_8bit_step(&mut w_t, &g_t, &mut m_t, &mut v_t, &settings)
        .unwrap();
    let (plain, oracle) = judged!(Precision::F32, N, {
        let (mut w, g) = (narrow::<N>(&w), narrow::<N>(&g));
        let mut m = decode_moment::<N>(&signed, &m_codes, &scales);
        let mut v = decode_moment::<N>(&unsigned, &v_codes, &scales);
        adamw_step(&mut w, &g, &mut m, &mut v, &settings);
        vec![wide(w), wide(m), wide(v)]
    });
    run.case(format_args!("adamw_8bit {shape:?} step {step}"), 4)
        .compare("w", &w_t, &plain[0], &oracle[0]);
    for (moment, map, expected, least) in [(&m_t, &signed, &oracle[1], 0), (&v_t, &unsigned, &oracle[2], 1)] {
        let absmax = device.read_f32(&moment.absmax).unwrap();
        for (i, code) in device.read(&moment.codes).unwrap().into_iter().enumerate() {
            let scale = f64::from(absmax[i / MOMENT_BLOCK]);
            let distance = |code: u8| (f64::from(map[usize::from(code)]) * scale - expected[i]).abs();
            let wanted = dynamic::nearest(map, (expected[i] / scale.max(1e-300)) as f32);
            let wanted = if expected[i] > 0.0 { wanted.max(least) } else { wanted };
            assert!(
                distance(code) <= distance(wanted) + 1e-6 * scale,
                "adamw_8bit {shape:?} step {step}, element {i}: code {code}, nearest {wanted}"
            );
        }
    }
}

#[test]
fn eight_bit_adamw_agrees_with_the_oracle() {
    on_every_backend!("adamw_8bit_step", [Adamw8bitStep], |run| {
        for (shape, step) in SHAPES.iter().zip([1, 2, 3, 10, 100, 1000, 5, 7, 1, 4, 6]) {
            adamw_8bit(run, *shape, step);
        }
    });
}

#[test]
fn swiglu_agrees_with_the_oracle() {
    on_every_backend!(
        "swiglu",
        [SwigluForward, SwigluBackward],
        |run| for (shape, activation) in cases(run) {
            swiglu(run, shape, activation);
        }
    );
}

#[test]
fn add_assign_adds() {
    on_every_backend!("add_assign", [AddAssign], |run| for (shape, activation) in cases(run) {
        add(run, shape, activation);
    });
}

#[test]
fn rms_norm_agrees_with_the_oracle() {
    on_every_backend!("rms_norm", [RmsNormForward, RmsNormBackward], |run| {
        for (shape, activation) in cases(run) {
            for style in [
                (NormWeight::Plain, DType::F32, Write::Overwrite),
                (NormWeight::Plain, DType::BF16, Write::Accumulate),
                (NormWeight::ZeroCentred, DType::F32, Write::Accumulate),
            ] {
                norm(run, shape, style, activation);
            }
        }
    });
}

#[test]
fn adamw_agrees_with_the_oracle() {
    on_every_backend!("adamw_step", [AdamwStep], |run| {
        for (shape, step) in SHAPES.iter().zip([1, 2, 3, 10, 100, 1000, 5, 7, 1, 4, 6]) {
            adamw(run, *shape, step);
        }
    });
}

/// A parameter, its gradient, and moments of one kind or the other.
type Factor<B> = ([Tensor<B>; 2], Result<[Tensor<B>; 2], [BlockMoment<B>; 2]>);

/// Parameters of all sizes, by turns with f32 moments and with moments in 8 bits.
fn factors<B: Traits>(device: &B) -> Vec<Factor<B>> {
    let sizes = [0, 1, 255, 257, 4096, 4097, 9000, 20_003];
    let factor = |(i, size): (usize, &usize)| {
        let random = |seed: usize| {
            let values = Random::new((i + 100 * seed) as u64).adversarial(*size);
            device.upload_f32([*size], &values).unwrap()
        };
        let zeros = || device.zeros(DType::F32, [*size]).unwrap();
        let blocks = || BlockMoment::zeros(device, Shape::from([*size])).unwrap();
        let moments = if i % 2 == 0 {
            Ok([zeros(), zeros()])
        } else {
            Err([blocks(), blocks()])
        };
        ([random(1), random(2)], moments)
    };
    sizes.iter().enumerate().map(factor).collect()
}

fn contents<B: Traits>(device: &B, factors: &[Factor<B>]) -> Vec<Vec<u8>> {
    let tensors = factors.iter().flat_map(|([w, _], moments)| match moments {
        Ok([m, v]) => vec![w, m, v],
        Err([m, v]) => vec![w, &m.codes, &m.absmax, &v.codes, &v.absmax],
    });
    tensors.map(|tensor| device.read(tensor).unwrap()).collect()
}

#[test]
fn many_parameters_at_once_have_the_bits_of_one_by_one() {
    on_every_backend!("adamw_step_many", [AdamwStep, Adamw8bitStep], |run| {
        let device = run.backend;
        let [mut many, mut single] = [(); 2].map(|()| factors(device));
        for step in 1..=3 {
            let settings = AdamW {
                learning_rate: 3e-3,
                beta1: 0.9,
                beta2: 0.999,
                epsilon: 1e-8,
                weight_decay: 0.01,
                step,
                gradient_scale: 0.37,
            };
            let trained = many.iter_mut().map(|([parameter, gradient], moments)| Trained {
                parameter,
                gradient,
                moments: match moments {
                    Ok([m, v]) => MomentsMut::Single { m, v },
                    Err([m, v]) => MomentsMut::Blocks { m, v },
                },
            });
            device.adamw_step_many(trained.collect(), &settings).unwrap();
            for ([w, g], moments) in &mut single {
                match moments {
                    Ok([m, v]) => device.adamw_step(w, g, m, v, &settings).unwrap(),
                    Err([m, v]) => device.adamw_8bit_step(w, g, m, v, &settings).unwrap(),
                }
            }
            assert!(contents(device, &many) == contents(device, &single), "step {step}");
        }
        assert!(
            contents(device, &many) != contents(device, &factors(device)),
            "something was updated"
        );
        run.case("adamw_step_many", 0);
    });
}

#[test]
fn many_gradients_at_once_become_zero_and_nothing_beside_them() {
    on_every_backend!("zero_many", [AdamwStep], |run| {
        let device = run.backend;
        let mut factors = factors(device);
        let kept: Vec<_> = factors.iter().map(|([w, _], _)| device.read(w).unwrap()).collect();
        let gradients = factors.iter_mut().map(|([_, g], _)| g);
        device.zero_many(gradients.collect()).unwrap();
        for (([w, g], _), kept) in factors.iter().zip(kept) {
            assert!(device.read(g).unwrap().iter().all(|byte| *byte == 0), "{g:?}");
            assert!(device.read(w).unwrap() == kept, "{w:?}");
        }
        let mut codes = device.zeros(DType::U8, [4]).unwrap();
        assert!(device.zero_many(vec![&mut codes]).is_err(), "f32 alone");
        run.case("zero_many", 0);
    });
}

#[test]
fn the_squared_norm_is_summed_in_double_precision() {
    on_every_backend!("squared_norm", [SquaredNorm], |run| {
        let mut random = Random::new(3);
        let parts: Vec<Vec<f32>> = [0, 1, 1000, 70_000]
            .iter()
            .map(|count| random.adversarial(*count))
            .collect();
        let tensors: Vec<_> = parts
            .iter()
            .map(|part| run.backend.upload_f32([part.len()], part).unwrap())
            .collect();
        let ours = run.backend.squared_norm(&tensors.iter().collect::<Vec<_>>()).unwrap();
        let exact: f64 = parts.iter().flatten().map(|x| f64::from(*x) * f64::from(*x)).sum();
        let count = parts.iter().map(Vec::len).sum::<usize>() as f64;
        assert!(
            (ours - exact).abs() <= count * f64::EPSILON * exact,
            "{ours} against {exact} on {}",
            run.name
        );
        let infinite = run.backend.upload_f32([2], &[1.0, f32::INFINITY]).unwrap();
        assert!(!run.backend.squared_norm(&[&infinite]).unwrap().is_finite());
        run.case("squared_norm", 0);
    });
}
