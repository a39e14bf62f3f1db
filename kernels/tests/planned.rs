//! What an op takes of a device's memory while it runs is what the counting backend says: for products that are made in parts, and for the
//! loss and its chunks.
#![allow(clippy::unwrap_used, clippy::panic)]

use brightrun_kernels::counting::{Counting, Habits};
use brightrun_kernels::emu::{Emulated, emulated, emulated_as};
use brightrun_kernels::ops::{
    Backend, LinearBackward, LinearCrossEntropy, LinearForward, LoraBackward, LoraForward, Precision, Write,
};
use brightrun_kernels::{DType, Error, Tensor, Weight};

/// Bytes that live at the worst moment of `work`, beyond those before it.
fn working<B: Backend>(device: &B, work: impl FnOnce()) -> u64 {
    let before = device.memory().in_use_bytes;
    device.reset_peak();
    work();
    device.memory().peak_bytes - before
}

/// Tokens, inputs, outputs, rank.
type Layer = [usize; 4];

/// A layer's working memory, forward and backward.
fn layer<B: Backend>(device: &B, [tokens, inputs, outputs, rank]: Layer) -> [u64; 2] {
    let zeros = |dtype, shape: [usize; 2]| -> Tensor<B> { device.zeros(dtype, shape).unwrap() };
    let weight = Weight::Dense(zeros(DType::BF16, [outputs, inputs]));
    let [a, b] = [[rank, inputs], [outputs, rank]].map(|shape| zeros(DType::F32, shape));
    let [x, dy] = [inputs, outputs].map(|width| zeros(DType::BF16, [tokens, width]));
    let [mut y, mut dx] = [outputs, inputs].map(|width| zeros(DType::BF16, [tokens, width]));
    let mut hidden = zeros(DType::F32, [tokens, rank]);
    let [mut gradient_a, mut gradient_b] = [[rank, inputs], [outputs, rank]].map(|shape| zeros(DType::F32, shape));
    let forward = working(device, || {
        let lora = LoraForward {
            a: &a,
            b: &b,
            scale: 1.0,
            hidden: &mut hidden,
        };
        let call = LinearForward {
            x: &x,
            weight: &weight,
            bias: None,
            lora: Some(lora),
            precision: Precision::Bf16,
            y: &mut y,
        };
        device.linear_forward(call).unwrap();
    });
    let backward = working(device, || {
        let lora = LoraBackward {
            x: &x,
            hidden: &hidden,
            a: &a,
            b: &b,
            scale: 1.0,
            gradient_a: &mut gradient_a,
            gradient_b: &mut gradient_b,
        };
        let call = LinearBackward {
            dy: &dy,
            weight: &weight,
            lora: Some(lora),
            precision: Precision::Bf16,
            dx: Some((&mut dx, Write::Overwrite)),
        };
        device.linear_backward(call).unwrap();
    });
    [forward, backward]
}

/// A loss's working memory, with and without the gradient.
fn loss<B: Backend>(device: &B, [tokens, width, vocabulary]: [usize; 3], precision: Precision) -> [u64; 2] {
    let dtype = device.activation_dtype(precision);
    let head = Weight::Dense(device.zeros(DType::BF16, [vocabulary, width]).unwrap());
    let x = device.zeros(dtype, [tokens, width]).unwrap();
    let mut dx = device.zeros(dtype, [tokens, width]).unwrap();
    let labels = device.zeros(DType::I32, [tokens]).unwrap();
    let mut losses = device.zeros(DType::F32, [tokens]).unwrap();
    let one = device.upload_f32([1], &[1.0]).unwrap();
    let mut run = |dx: Option<(&mut Tensor<B>, &Tensor<B>)>| {
        working(device, || {
            let call = LinearCrossEntropy {
                x: &x,
                head: &head,
                labels: &labels,
                precision,
                losses: &mut losses,
                dx,
            };
            device.linear_cross_entropy(call).unwrap();
        })
    };
    [run(Some((&mut dx, &one))), run(None)]
}

fn counting() -> Counting {
    Counting::new(Habits {
        alignment_bytes: 16,
        ..Habits::gpu()
    })
}

/// Both kinds of device; none, told, where there is no compiler.
fn devices() -> Vec<(Emulated, bool)> {
    let all = [(emulated(Some(2)), false), (emulated_as(Some(2), (9, 0)), true)];
    let there = all.map(|(device, is_hopper)| match device {
        Ok(device) => Some((device, is_hopper)),
        Err(Error::Unsupported { reason, .. }) => {
            println!("emulated: absent (not tested): {reason}");
            None
        }
        Err(error) => panic!("{error}"),
    });
    there.into_iter().flatten().collect()
}

#[test]
fn a_layer_takes_what_is_counted_also_where_its_products_are_made_in_parts() {
    // One tile high, with a depth of several parts forward, backward, and in the adapter's own products.
    for sizes in [[40, 2_048, 128, 16], [40, 128, 2_048, 16], [33, 256, 80, 8]] {
        let counted = layer(&counting(), sizes);
        for (device, is_hopper) in devices() {
            let measured = layer(&device, sizes);
            for (measured, counted) in measured.into_iter().zip(counted) {
                // A plan does not know the machine: Hopper's parts are fewer.
                let fits = if is_hopper {
                    measured <= counted
                } else {
                    measured == counted
                };
                assert!(fits, "{sizes:?}, Hopper {is_hopper}: {measured} of {counted}");
            }
        }
    }
    let [tokens, inputs, outputs, _] = [40, 2_048, 128, 16];
    let whole = layer(&counting(), [tokens, inputs, outputs, 16])[0];
    assert!(
        whole >= 4 * 4 * (tokens * outputs) as u64,
        "no parts are counted: {whole}"
    );
}

#[test]
fn a_loss_takes_what_is_counted_whatever_its_chunks() {
    for precision in [Precision::Bf16, Precision::F32] {
        for sizes in [[600, 16, 264], [100, 64, 136]] {
            let counted = loss(&counting(), sizes, precision);
            for (device, _) in devices() {
                assert_eq!(loss(&device, sizes, precision), counted, "{sizes:?} {precision:?}");
            }
        }
    }
}
