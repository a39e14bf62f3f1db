//! What the emulation of Hopper's engines must do as the hardware does, and what it must find.

#![allow(clippy::unwrap_used, clippy::panic)]

use half::bf16;

use super::{Emulated, emulated};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::gpu::{Argument, Element, Family, Geometry, Kernel, Map, Parameter, Source, Swizzle};
use crate::ops::Device;
use crate::tensor::Tensor;

static SOURCE: Source = Source {
    name: "hopper_defects",
    text: include_str!("../../emu/hopper_defects.cu"),
    only: None,
};

const SIDE: usize = 64;
const TILE_BYTES: usize = SIDE * SIDE * 2;

const fn product(stem: &'static str) -> Kernel {
    Kernel {
        source: &SOURCE,
        stem,
        types: &[],
        threads: 128,
        parameters: &[
            ("a", Parameter::Map),
            ("b", Parameter::Map),
            ("left", Parameter::In(Element::Is(DType::BF16))),
            ("c", Parameter::Out(Element::Is(DType::F32))),
            ("in_registers", Parameter::I32),
            ("transposed", Parameter::I32),
        ],
    }
}

static RIGHT: Kernel = product("group_product");
static BOX_NOT_WAITED_FOR: Kernel = product("box_not_waited_for");
static WRONG_PARITY: Kernel = product("wrong_parity");
static BYTES_NOT_EXPECTED: Kernel = product("bytes_not_expected");
static TOO_MUCH_EXPECTED: Kernel = product("too_much_expected");
static TOO_MANY_ARRIVALS: Kernel = product("too_many_arrivals");
static BARRIER_NOT_PUBLISHED: Kernel = product("barrier_not_published");
static WITHOUT_FENCE: Kernel = product("product_without_fence");
static PRODUCTS_NOT_WAITED_FOR: Kernel = product("products_not_waited_for");
static PRODUCTS_NOT_COMMITTED: Kernel = product("products_not_committed");
static SUMS_TOUCHED: Kernel = product("sums_touched");
static REGISTERS_TOUCHED: Kernel = product("registers_touched");
static FACTOR_OVERWRITTEN: Kernel = product("factor_overwritten");
static FACTOR_NOT_SHOWN: Kernel = product("factor_not_shown");
static WRONG_STRIDE: Kernel = product("wrong_stride");
static DIFFERENT_PRODUCTS: Kernel = product("different_products");

const fn wide_product(stem: &'static str) -> Kernel {
    Kernel {
        source: &SOURCE,
        stem,
        types: &[],
        threads: 128,
        parameters: &[
            ("a", Parameter::Map),
            ("b", Parameter::Map),
            ("left", Parameter::In(Element::Is(DType::BF16))),
            ("c", Parameter::Out(Element::Is(DType::F32))),
            ("in_registers", Parameter::I32),
        ],
    }
}

static WIDE: Kernel = wide_product("wide_group_product");
static REGISTERS_CHANGED: Kernel = wide_product("registers_changed");
static SUMS_NOT_BEGUN: Kernel = wide_product("sums_not_begun");
static WRONG_ACROSS: Kernel = wide_product("wrong_across");

const fn meeting(stem: &'static str) -> Kernel {
    Kernel {
        source: &SOURCE,
        stem,
        types: &[],
        threads: 256,
        parameters: &[
            ("out", Parameter::Out(Element::Is(DType::F32))),
            ("pieces", Parameter::I32),
        ],
    }
}

static MEET: Kernel = meeting("groups_meet");
static DO_NOT_MEET: Kernel = meeting("groups_do_not_meet");
static MEET_ALONE: Kernel = meeting("groups_meet_alone");
static LEAVE_TOO_EARLY: Kernel = meeting("groups_leave_too_early");

static BOX: Kernel = Kernel {
    source: &SOURCE,
    stem: "box",
    types: &[],
    threads: 128,
    parameters: &[
        ("map", Parameter::Map),
        ("out", Parameter::Out(Element::Is(DType::U8))),
        ("x", Parameter::I32),
        ("y", Parameter::I32),
        ("bytes", Parameter::I32),
    ],
};

pub(crate) static FAMILY: Family = Family {
    source: &SOURCE,
    kernels: &[
        &RIGHT,
        &BOX_NOT_WAITED_FOR,
        &WRONG_PARITY,
        &BYTES_NOT_EXPECTED,
        &TOO_MUCH_EXPECTED,
        &TOO_MANY_ARRIVALS,
        &BARRIER_NOT_PUBLISHED,
        &WITHOUT_FENCE,
        &PRODUCTS_NOT_WAITED_FOR,
        &PRODUCTS_NOT_COMMITTED,
        &SUMS_TOUCHED,
        &REGISTERS_TOUCHED,
        &FACTOR_OVERWRITTEN,
        &FACTOR_NOT_SHOWN,
        &WRONG_STRIDE,
        &DIFFERENT_PRODUCTS,
        &WIDE,
        &REGISTERS_CHANGED,
        &SUMS_NOT_BEGUN,
        &WRONG_ACROSS,
        &BOX,
        &MEET,
        &DO_NOT_MEET,
        &MEET_ALONE,
        &LEAVE_TOO_EARLY,
    ],
    ops: &[],
};

/// Where the left factor is read from.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Left {
    Registers,
    Straight,
    Transposed,
}

/// An emulated device; `None`, told, where there is no compiler.
fn device() -> Option<Emulated> {
    match emulated(Some(1)) {
        Ok(device) => Some(device),
        Err(Error::Unsupported { reason, .. }) => {
            println!("emulated: absent: {reason}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// Whole numbers, so that products are exact, different in every row and column.
fn factor(seed: usize) -> Vec<f32> {
    let value = |i: usize| ((i * 7 + i / SIDE * 13 + seed) % 23) as f32 - 11.0;
    (0..SIDE * SIDE).map(value).collect()
}

fn upload(device: &Emulated, values: &[f32]) -> Tensor<Emulated> {
    let halves: Vec<bf16> = values.iter().map(|value| bf16::from_f32(*value)).collect();
    device
        .upload(DType::BF16, [SIDE, SIDE], bytemuck::cast_slice(&halves))
        .unwrap()
}

fn tile(tensor: &Tensor<Emulated>) -> Argument<'_, super::Emulation> {
    Argument::Map(Map {
        tensor,
        extents: [SIDE, SIDE, 1],
        rectangle: [SIDE, SIDE, 1],
        swizzle: Swizzle::Bytes128,
    })
}

/// `A · Bᵀ`, by a kernel.
fn run(device: &Emulated, kernel: &'static Kernel, left: Left) -> Result<Vec<f32>> {
    let (a, b) = (upload(device, &factor(1)), upload(device, &factor(5)));
    let mut c = device.zeros(DType::F32, [SIDE, SIDE])?;
    let arguments = [
        tile(&a),
        tile(&b),
        Argument::In(&a),
        Argument::Out(&mut c),
        Argument::Flag(left == Left::Registers),
        Argument::Flag(left == Left::Transposed),
    ];
    let geometry = Geometry::cover(1, 1).with_shared(2 * TILE_BYTES + 8);
    device.launch(kernel, &[], geometry, &arguments)?;
    device.read_f32(&c)
}

/// `A · Bᵀ` or `Aᵀ · Bᵀ` by a plain loop.
fn expected(left: Left) -> Vec<f32> {
    let (a, b) = (factor(1), factor(5));
    let of_a = |row: usize, k: usize| match left {
        Left::Transposed => a[k * SIDE + row],
        _ => a[row * SIDE + k],
    };
    let element = |i: usize| (0..SIDE).map(|k| of_a(i / SIDE, k) * b[i % SIDE * SIDE + k]).sum();
    (0..SIDE * SIDE).map(element).collect()
}

#[test]
fn a_warp_group_multiplies_as_the_hardware_defines_it() {
    let Some(device) = device() else { return };
    for left in [Left::Registers, Left::Straight, Left::Transposed] {
        assert_eq!(run(&device, &RIGHT, left).unwrap(), expected(left), "{left:?}");
    }
}

/// A launch fails with a message that has these words.
#[track_caller]
fn complains(kernel: &'static Kernel, left: Left, words: &str) {
    let Some(device) = device() else { return };
    let message = run(&device, kernel, left).err().map(|error| error.to_string());
    assert!(
        message.as_ref().is_some_and(|message| message.contains(words)),
        "{}: {message:?}",
        kernel.stem
    );
    assert_eq!(
        run(&device, &RIGHT, left).unwrap(),
        expected(left),
        "the device still works"
    );
}

#[test]
fn a_barrier_that_is_misused_is_found() {
    complains(
        &BYTES_NOT_EXPECTED,
        Left::Straight,
        "16384 bytes under way that nobody expected",
    );
    complains(&TOO_MUCH_EXPECTED, Left::Straight, "misses 0 arrivals and 16 bytes");
    complains(&TOO_MANY_ARRIVALS, Left::Straight, "more arrivals");
    complains(&BARRIER_NOT_PUBLISHED, Left::Straight, "not shown to the copy engine");
}

#[test]
fn products_that_are_misused_are_found() {
    complains(&WITHOUT_FENCE, Left::Registers, "without a fence");
    complains(&WITHOUT_FENCE, Left::Straight, "without a fence");
    complains(&PRODUCTS_NOT_WAITED_FOR, Left::Straight, "nobody waited for");
    complains(&PRODUCTS_NOT_COMMITTED, Left::Straight, "nobody waited for");
    complains(&SUMS_TOUCHED, Left::Straight, "sums were written");
    complains(
        &REGISTERS_TOUCHED,
        Left::Registers,
        "registers of a left factor were written",
    );
    complains(&DIFFERENT_PRODUCTS, Left::Straight, "different products");
}

/// `A · B` with twice as many columns, by a kernel.
fn run_wide(device: &Emulated, kernel: &'static Kernel, in_registers: bool) -> Result<Vec<f32>> {
    let a = upload(device, &factor(1));
    let halves: Vec<bf16> = wide_factor().into_iter().map(bf16::from_f32).collect();
    let b = device.upload(DType::BF16, [SIDE, 2 * SIDE], bytemuck::cast_slice(&halves))?;
    let mut c = device.zeros(DType::F32, [SIDE, 2 * SIDE])?;
    let map = Map {
        tensor: &b,
        extents: [2 * SIDE, SIDE, 1],
        rectangle: [SIDE, SIDE, 1],
        swizzle: Swizzle::Bytes128,
    };
    let arguments = [
        tile(&a),
        Argument::Map(map),
        Argument::In(&a),
        Argument::Out(&mut c),
        Argument::Flag(in_registers),
    ];
    let geometry = Geometry::cover(1, 1).with_shared(3 * TILE_BYTES + 8);
    device.launch(kernel, &[], geometry, &arguments)?;
    device.read_f32(&c)
}

fn wide_factor() -> Vec<f32> {
    [factor(5), factor(9)].concat()
}

#[test]
fn a_right_factor_whose_rows_are_the_depth_is_read_across_its_boxes() {
    let Some(device) = device() else { return };
    let (a, b) = (factor(1), wide_factor());
    let element = |i: usize| {
        let [row, column] = [i / (2 * SIDE), i % (2 * SIDE)];
        (0..SIDE).map(|k| a[row * SIDE + k] * b[k * 2 * SIDE + column]).sum()
    };
    let expected: Vec<f32> = (0..2 * SIDE * SIDE).map(element).collect();
    for in_registers in [false, true] {
        assert_eq!(run_wide(&device, &WIDE, in_registers).unwrap(), expected);
        assert_ne!(run_wide(&device, &WRONG_ACROSS, in_registers).unwrap(), expected);
    }
    let not_begun = run_wide(&device, &SUMS_NOT_BEGUN, false).unwrap();
    assert!(not_begun.iter().all(|value| value.is_nan()), "sums had no beginning");
}

#[test]
fn registers_that_change_between_their_fence_and_the_product_are_found() {
    let Some(device) = device() else { return };
    let message = run_wide(&device, &REGISTERS_CHANGED, true).unwrap_err().to_string();
    assert!(message.contains("between their fence and wgmma"), "{message}");
}

#[test]
fn what_was_not_waited_for_is_not_there() {
    let Some(device) = device() else { return };
    for kernel in [&BOX_NOT_WAITED_FOR, &WRONG_PARITY] {
        let result = run(&device, kernel, Left::Straight).unwrap();
        assert!(result.iter().all(|value| value.is_nan()), "{}", kernel.stem);
    }
    // The first warp overwrites what its own product still reads; the others may have been before it.
    let result = run(&device, &FACTOR_OVERWRITTEN, Left::Straight).unwrap();
    assert!(
        result.iter().take(16 * SIDE).all(|value| value.is_nan()),
        "read too early"
    );
}

#[test]
fn engines_do_not_see_ordinary_stores_and_follow_a_wrong_description() {
    let Some(device) = device() else { return };
    // The kernel adds to every element of B, which without the fence changes nothing.
    assert_eq!(
        run(&device, &FACTOR_NOT_SHOWN, Left::Straight).unwrap(),
        expected(Left::Straight)
    );
    assert_ne!(
        run(&device, &WRONG_STRIDE, Left::Straight).unwrap(),
        expected(Left::Straight)
    );
}

#[test]
fn groups_that_hand_each_other_sums_must_meet_before_and_after() {
    const PIECES: usize = 3;
    let Some(device) = device() else { return };
    let met = |kernel: &'static Kernel| {
        let mut out = device.zeros(DType::F32, [PIECES, 256]).unwrap();
        let geometry = Geometry::cover(1, 1).with_shared(256 * 4);
        let arguments = [Argument::Out(&mut out), Argument::Size(PIECES)];
        device.launch(kernel, &[], geometry, &arguments).unwrap();
        let expected = (0..PIECES * 256).map(|i| (1000 * (i / 256) + 255 - i % 256) as f32);
        device.read_f32(&out).unwrap().into_iter().eq(expected)
    };
    assert!(met(&MEET));
    for kernel in [&DO_NOT_MEET, &MEET_ALONE, &LEAVE_TOO_EARLY] {
        assert!(!met(kernel), "{}", kernel.stem);
    }
}

/// What a box of bytes looks like in shared memory.
fn box_of(extents: [usize; 2], rectangle: [usize; 2], at: [i32; 2], swizzle: Swizzle) -> Option<(Vec<u8>, Vec<u8>)> {
    let device = device()?;
    let bytes: Vec<u8> = (0..extents[0] * extents[1]).map(|i| (i % 251) as u8 + 1).collect();
    let tensor = device.upload(DType::U8, [extents[1], extents[0]], &bytes).unwrap();
    let count = rectangle[0] * rectangle[1];
    let mut out = device.zeros(DType::U8, [count]).unwrap();
    let map = Map {
        tensor: &tensor,
        extents: [extents[0], extents[1], 1],
        rectangle: [rectangle[0], rectangle[1], 1],
        swizzle,
    };
    let arguments = [
        Argument::Map(map),
        Argument::Out(&mut out),
        Argument::I32(at[0]),
        Argument::I32(at[1]),
        Argument::Size(count),
    ];
    let geometry = Geometry::cover(1, 1).with_shared(TILE_BYTES + 8);
    device.launch(&BOX, &[], geometry, &arguments).unwrap();
    Some((bytes, device.read(&out).unwrap()))
}

#[test]
fn a_box_is_swizzled_by_address_and_zero_outside_its_tensor() {
    let (extents, rectangle, at) = ([208, 40], [128, 32], [112, 20]);
    for (swizzle, bits) in [(Swizzle::None, 0), (Swizzle::Bytes128, 7)] {
        let Some((bytes, found)) = box_of(extents, rectangle, at, swizzle) else {
            return;
        };
        for (place, value) in found.iter().enumerate() {
            // Undo the exchange of chunks: it is its own inverse, since it leaves the row alone.
            let from = place ^ (((place / 128) & bits) * 16);
            let [x, y] = [from % 128 + 112, from / 128 + 20];
            let inside = x < extents[0] && y < extents[1];
            let wanted = if inside { bytes[y * extents[0] + x] } else { 0 };
            assert_eq!(*value, wanted, "{swizzle:?} at {place}");
        }
    }
    // Rows of 64 bytes: a pair of rows has a chunk's place in common.
    let Some((bytes, found)) = box_of([64, 16], [64, 16], [0, 0], Swizzle::Bytes64) else {
        return;
    };
    for (place, value) in found.iter().enumerate() {
        assert_eq!(*value, bytes[place ^ (((place / 128) & 3) * 16)], "at {place}");
    }
}

#[test]
fn a_box_before_the_first_row_is_zero() {
    let Some((_, found)) = box_of([128, 8], [128, 1], [0, -1], Swizzle::Bytes128) else {
        return;
    };
    assert!(found.iter().all(|byte| *byte == 0));
}

#[test]
fn a_map_that_the_copy_engine_would_refuse_is_refused() {
    let Some(device) = device() else { return };
    let tensor = device.zeros(DType::BF16, [16, 36]).unwrap();
    let refused = |extents, rectangle, swizzle, word: &str| {
        let map = Map {
            tensor: &tensor,
            extents,
            rectangle,
            swizzle,
        };
        let message = map.checked().map(|_| ()).unwrap_err();
        assert!(message.contains(word), "{message}");
    };
    refused([36, 16, 1], [64, 16, 1], Swizzle::Bytes128, "16 bytes");
    refused([32, 19, 1], [64, 16, 1], Swizzle::Bytes128, "another size");
    refused([32, 16, 1], [128, 16, 1], Swizzle::Bytes128, "swizzle");
    refused([32, 16, 1], [64, 257, 1], Swizzle::Bytes128, "1 to 256");
    refused([32, 16, 1], [4, 16, 1], Swizzle::None, "swizzle");
}
