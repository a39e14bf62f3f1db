//! What the emulation must find, and what it must do as the hardware does: kernels with one mistake each, and some without.

#![allow(clippy::unwrap_used, clippy::panic)]

use super::{Emulated, emulated, emulated_as};
use crate::dtype::DType;
use crate::error::Error;
use crate::gpu::{Argument, Element, Family, Geometry, Kernel, Launch, Parameter, Runtime, Source};
use crate::ops::Device;
use crate::tensor::Tensor;

static SOURCE: Source = Source {
    name: "defects",
    text: include_str!("../../emu/defects.cu"),
    only: None,
};

pub(crate) static FAMILY: Family = Family {
    source: &SOURCE,
    kernels: &[
        &REVERSE,
        &PRODUCT_NN,
        &PRODUCT_NT,
        &NO_WAIT,
        &NO_BARRIER,
        &PAST_THE_END,
        &BEFORE_THE_BEGINNING,
        &HALF_A_BARRIER,
        &TWO_BARRIERS,
        &HALF_A_WARP,
        &UNWRITTEN_SHARED,
        &PAST_A_SHARED_ARRAY,
        &TOO_MUCH_SHARED,
        &MISALIGNED,
        &INDEX_OUTSIDE,
    ],
    ops: &[],
};

const SINGLE: Element = Element::Is(DType::F32);
const X: (&str, Parameter) = ("x", Parameter::Out(SINGLE));

const fn kernel(stem: &'static str, parameters: &'static [(&'static str, Parameter)]) -> Kernel {
    Kernel {
        source: &SOURCE,
        stem,
        types: &[],
        threads: 64,
        parameters,
    }
}

static REVERSE: Kernel = kernel("reverse", &[X]);
static NO_WAIT: Kernel = kernel("no_wait", &[X]);
static NO_BARRIER: Kernel = kernel("no_barrier", &[X]);
static PAST_THE_END: Kernel = kernel("past_the_end", &[X, ("at", Parameter::I32)]);
static BEFORE_THE_BEGINNING: Kernel = kernel(
    "before_the_beginning",
    &[("x", Parameter::In(SINGLE)), ("y", Parameter::Out(SINGLE))],
);
static HALF_A_BARRIER: Kernel = kernel("half_a_barrier", &[X]);
static TWO_BARRIERS: Kernel = kernel("two_barriers", &[X]);
static HALF_A_WARP: Kernel = kernel("half_a_warp", &[X]);
static UNWRITTEN_SHARED: Kernel = kernel("unwritten_shared", &[X]);
static PAST_A_SHARED_ARRAY: Kernel = kernel("past_a_shared_array", &[X]);
static TOO_MUCH_SHARED: Kernel = kernel("too_much_shared", &[X]);

static MISALIGNED: Kernel = kernel("misaligned", &[X]);
static INDEX_OUTSIDE: Kernel = kernel("index_outside", &[X, ("at", Parameter::I32)]);

const fn product(stem: &'static str) -> Kernel {
    Kernel {
        source: &SOURCE,
        stem,
        types: &[],
        threads: 32,
        parameters: &[
            ("a", Parameter::In(Element::Is(DType::BF16))),
            ("b", Parameter::In(Element::Is(DType::BF16))),
            ("c", Parameter::Out(SINGLE)),
        ],
    }
}

static PRODUCT_NN: Kernel = product("product_nn");
static PRODUCT_NT: Kernel = product("product_nt");

/// An emulated device and 0, 1, … 63 on it; `None`, told, where there is no compiler.
fn device() -> Option<(Emulated, Tensor<Emulated>)> {
    match emulated(Some(1)) {
        Ok(device) => {
            let x = device
                .upload_f32([64], &(0..64).map(|i| i as f32).collect::<Vec<_>>())
                .unwrap();
            Some((device, x))
        }
        Err(Error::Unsupported { reason, .. }) => {
            println!("emulated: absent: {reason}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// The message of a launch of two blocks that must fail.
fn complaint(kernel: &'static Kernel) -> Option<String> {
    let (device, mut x) = device()?;
    let launched = device.launch(kernel, &[], Geometry::cover(2, 1), &[Argument::Out(&mut x)]);
    Some(launched.unwrap_err().to_string())
}

fn assert_complains(kernel: &'static Kernel, words: &[&str]) {
    if let Some(message) = complaint(kernel) {
        for word in words.iter().chain([&kernel.stem]) {
            assert!(message.contains(word), "{message:?} lacks {word:?}");
        }
    }
}

#[test]
fn a_right_kernel_runs() {
    let Some((device, mut x)) = device() else { return };
    device
        .launch(&REVERSE, &[], Geometry::cover(1, 1), &[Argument::Out(&mut x)])
        .unwrap();
    let expected: Vec<f32> = (0..64).rev().map(|i| i as f32).collect();
    assert_eq!(device.read_f32(&x).unwrap(), expected);
}

#[test]
fn a_tensor_core_multiplies_matrices_that_were_loaded_straight_or_transposed() {
    let Some((device, _)) = device() else { return };
    // Small integers, whose products and sums are exact.
    let a: Vec<f32> = (0..256).map(|i| (i * 7 % 31) as f32 - 15.0).collect();
    let b: Vec<f32> = (0..128).map(|i| (i * 5 % 23) as f32 - 11.0).collect();
    let halves = |shape: [usize; 2], values: &[f32]| {
        let bits: Vec<u16> = values.iter().map(|v| half::bf16::from_f32(*v).to_bits()).collect();
        device.upload(DType::BF16, shape, bytemuck::cast_slice(&bits)).unwrap()
    };
    let (a_t, b_t) = (halves([16, 16], &a), halves([16, 8], &b));
    for (kernel, transposed) in [(&PRODUCT_NN, false), (&PRODUCT_NT, true)] {
        let mut c = device.alloc(DType::F32, [16, 8]).unwrap();
        let arguments = [Argument::In(&a_t), Argument::In(&b_t), Argument::Out(&mut c)];
        device.launch(kernel, &[], Geometry::cover(1, 1), &arguments).unwrap();
        let of_b = |k: usize, n: usize| if transposed { b[n * 16 + k] } else { b[k * 8 + n] };
        let expected: Vec<f32> = (0..128)
            .map(|i| (0..16).map(|k| a[i / 8 * 16 + k] * of_b(k, i % 8)).sum())
            .collect();
        assert_eq!(device.read_f32(&c).unwrap(), expected, "{}", kernel.stem);
    }
}

#[test]
fn a_copy_that_was_not_waited_for_gives_nan() {
    let Some((device, mut x)) = device() else { return };
    device
        .launch(&NO_WAIT, &[], Geometry::cover(1, 1), &[Argument::Out(&mut x)])
        .unwrap();
    assert!(device.read_f32(&x).unwrap().iter().all(|value| value.is_nan()));
}

#[test]
fn a_missing_barrier_gives_nan() {
    let Some((device, mut x)) = device() else { return };
    device
        .launch(&NO_BARRIER, &[], Geometry::cover(1, 1), &[Argument::Out(&mut x)])
        .unwrap();
    assert!(device.read_f32(&x).unwrap().iter().any(|value| value.is_nan()));
}

#[test]
fn an_access_outside_a_buffer_names_it_and_the_distance() {
    let Some((device, mut x)) = device() else { return };
    for (at, distance) in [(64, "0 bytes past"), (100, "144 bytes past")] {
        let arguments = [Argument::Out(&mut x), Argument::Size(at)];
        let message = device
            .launch(&PAST_THE_END, &[], Geometry::cover(1, 1), &arguments)
            .unwrap_err()
            .to_string();
        assert!(message.contains(distance) && message.contains("buffer 0"), "{message}");
    }
    let mut y = device.zeros(DType::F32, [4]).unwrap();
    let arguments = [Argument::In(&x), Argument::Out(&mut y)];
    let launched = device.launch(&BEFORE_THE_BEGINNING, &[], Geometry::cover(1, 1), &arguments);
    let message = launched.unwrap_err().to_string();
    assert!(message.contains("before buffer 0"), "{message}");
    assert_eq!(device.read_f32(&y).unwrap(), [0.0; 4], "the device still works");
}

#[test]
fn a_barrier_that_not_all_threads_reach_is_found() {
    assert_complains(&HALF_A_BARRIER, &["barrier"]);
    assert_complains(&TWO_BARRIERS, &["two barriers", "defects.cu:"]);
    assert_complains(&HALF_A_WARP, &["never come"]);
}

#[test]
fn a_misaligned_access_and_an_index_outside_an_array_are_found() {
    assert_complains(&MISALIGNED, &["misaligned", "addr2line"]);
    let Some((device, mut x)) = device() else { return };
    let arguments = [Argument::Out(&mut x), Argument::Size(9)];
    let launched = device.launch(&INDEX_OUTSIDE, &[], Geometry::cover(1, 1), &arguments);
    assert!(launched.unwrap_err().to_string().contains("index outside an array"));
}

#[test]
fn a_launch_that_no_device_accepts_is_refused() {
    // A kernel's own 256 bytes and what the launch adds, which begins at 1 KiB.
    let launched = |device: &Emulated, kib: usize| {
        let mut x = device.alloc(DType::F32, [64]).unwrap();
        let geometry = Geometry::cover(1, 1).with_shared(kib << 10);
        device.launch(&UNWRITTEN_SHARED, &[], geometry, &[Argument::Out(&mut x)])
    };
    let Some((device, _)) = device() else { return };
    launched(&device, 98).unwrap();
    let message = launched(&device, 99).unwrap_err().to_string();
    assert!(message.contains("102400 bytes exceeds 99 KB"), "{message}");
    let message = launched(&device, 100).unwrap_err().to_string();
    assert!(message.contains("cannot be launched"), "{message}");
    let hopper = emulated_as(Some(1), (9, 0)).unwrap();
    launched(&hopper, 226).unwrap();
    let message = launched(&hopper, 227).unwrap_err().to_string();
    assert!(message.contains("exceeds 227 KB"), "{message}");

    // `Gpu::launch` leaves out grids without blocks and refuses larger ones, so neither comes here by it.
    for grid in [[0, 1, 1], [1, 0, 1], [1, 65_536, 1], [1 << 31, 1, 1]] {
        let launched = device.runtime().launch(&Launch {
            source: &SOURCE,
            entry: "reverse",
            grid,
            threads: 64,
            shared_bytes: 0,
            values: &[], // refused before anybody looks
        });
        let message = launched.unwrap_err().to_string();
        assert!(message.contains("blocks cannot be launched"), "{message}");
    }
}

#[test]
fn shared_memory_is_poisoned_fenced_and_limited() {
    assert_complains(&PAST_A_SHARED_ARRAY, &["shared array of 128 bytes"]);
    assert_complains(&TOO_MUCH_SHARED, &["65536 bytes exceeds 48 KB"]);
    let Some((device, mut x)) = device() else { return };
    device
        .launch(&UNWRITTEN_SHARED, &[], Geometry::cover(1, 1), &[Argument::Out(&mut x)])
        .unwrap();
    assert!(device.read_f32(&x).unwrap().iter().all(|value| value.is_nan()));
}

#[test]
fn a_launch_that_does_not_fit_its_kernel_is_refused() {
    let Some((device, mut x)) = device() else { return };
    let grid = Geometry::cover(1, 1);
    let refused = |launched: crate::Result<()>, word: &str| {
        let message = launched.unwrap_err().to_string();
        assert!(message.contains(word), "{message}");
    };
    refused(
        device.launch(&PAST_THE_END, &[], grid, &[Argument::Out(&mut x)]),
        "1 arguments for 2",
    );
    let huge = [Argument::Out(&mut x), Argument::Size(1 << 31)];
    refused(device.launch(&PAST_THE_END, &[], grid, &huge), "32-bit");
    let integers = device.upload_i32([1], &[1]).unwrap();
    let (mut y, wrong) = (device.zeros(DType::F32, [1]).unwrap(), Argument::In(&integers));
    refused(
        device.launch(&BEFORE_THE_BEGINNING, &[], grid, &[wrong, Argument::Out(&mut y)]),
        "`x` wants",
    );
    refused(
        device.launch(&REVERSE, &[DType::F32], grid, &[Argument::Out(&mut x)]),
        "no entry",
    );
    let grid = Geometry::grid([1, 70_000, 1]);
    refused(
        device.launch(&REVERSE, &[], grid, &[Argument::Out(&mut x)]),
        "too large",
    );
}
