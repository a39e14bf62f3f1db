//! What a user reads when something goes wrong on a device, word for word: every text names the op, and shape and launch where
//! there are any.

#![allow(clippy::unwrap_used, clippy::panic)]

use super::kernel::Parameter::{I64, In, Out};
use super::{Argument, Element, Geometry, Kernel, sources};
use crate::dtype::DType;
use crate::emu::{Emulated, emulated};
use crate::error::{Error, Result};
use crate::ops::{
    ActivationOps, Device, EmbeddingOps, LinearForward, MatmulOps, Precision, QuantizeOps, Recorded, RopeDirection,
    RopeOps, RopeTable,
};
use crate::tensor::{Segments, Tensor};
use crate::weight::Weight;

fn device() -> Option<Emulated> {
    match emulated(Some(1)) {
        Ok(device) => Some(device),
        Err(Error::Unsupported { reason, .. }) => {
            println!("emulated: absent (not tested): {reason}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

fn said<T>(result: Result<T>) -> String {
    match result {
        Ok(_) => panic!("nothing went wrong"),
        Err(error) => error.to_string(),
    }
}

fn linear(device: &Emulated, x: [usize; 2], weight: [usize; 2], y: [usize; 2], dtype: DType) -> Result<()> {
    let x = device.zeros(dtype, x)?;
    let weight = Weight::Dense(device.zeros(DType::BF16, weight)?);
    let mut y = device.zeros(DType::BF16, y)?;
    device.linear_forward(LinearForward {
        x: &x,
        weight: &weight,
        bias: None,
        lora: None,
        precision: Precision::Bf16,
        y: &mut y,
    })
}

#[test]
fn an_argument_outside_the_contract_is_named_with_its_op_and_shape() {
    let Some(device) = device() else { return };
    assert_eq!(
        said(linear(&device, [3, 64], [32, 65], [3, 32], DType::BF16)),
        "linear_forward: `x` must be [T, I] with I = 65, but is [3, 64]"
    );
    assert_eq!(
        said(linear(&device, [3, 64], [32, 64], [3, 33], DType::BF16)),
        "linear_forward: `y` must be [T, O] = [3, 32], but is [3, 33]"
    );
    assert_eq!(
        said(linear(&device, [3, 64], [32, 64], [3, 32], DType::I32)),
        "linear_forward: `x` must be f32 or bf16, but is i32"
    );
    let mut tensor = device.zeros(DType::F32, [2, 3]).unwrap();
    assert_eq!(
        said(device.write(&mut tensor, &[0; 23])),
        "write: `bytes` are 23, but Tensor(f32 [2, 3]) has 24"
    );
    assert_eq!(
        said(device.read_at(&tensor, 20, &mut [0; 8])),
        "read_at: `bytes` are 8 from byte 20 on, but Tensor(f32 [2, 3]) has 24"
    );
}

#[test]
fn data_on_the_device_that_breaks_a_contract_is_named_by_the_next_read() {
    let Some(device) = device() else { return };
    let table = Weight::Dense(device.zeros(DType::BF16, [4, 8]).unwrap());
    let ids = device.upload_i32([2], &[3, 4]).unwrap();
    let mut rows = device.alloc(DType::BF16, [2, 8]).unwrap();
    device.gather_rows(&table, &ids, &mut rows).unwrap();
    assert_eq!(
        said(device.read(&rows)),
        "gather_rows: `ids` has 4, which is not a row of the table"
    );
    device.read(&rows).unwrap();
    let angles = || device.zeros(DType::F32, [10, 4]).unwrap();
    let rope = RopeTable {
        cos: angles(),
        sin: angles(),
    };
    let positions = device.upload_i32([1], &[10]).unwrap();
    let mut x = device.zeros(DType::F32, [1, 1, 8]).unwrap();
    device.rope(&mut x, &positions, &rope, RopeDirection::Forward).unwrap();
    assert_eq!(
        said(device.read(&x)),
        "rope: `positions` has 10, which is beyond the table"
    );
    let source = device
        .upload_f32([2, 64], &[[1.0; 127].as_slice(), &[f32::NAN]].concat())
        .unwrap();
    assert_eq!(
        said(device.quantize_nf4(&source, false)),
        "quantize_nf4: `source` has an element that is not finite, from element 64 on"
    );
}

static CONVERT: Kernel = Kernel {
    source: &sources::ELEMENTWISE,
    stem: "convert_f32_bf16",
    types: &[],
    threads: 256,
    parameters: &[
        ("target", Out(Element::Is(DType::BF16))),
        ("source", In(Element::Is(DType::F32))),
        ("count", I64),
    ],
};

#[test]
fn a_launch_that_fails_is_told_with_kernel_grid_block_and_tensors() {
    let Some(device) = device() else { return };
    let source = device.zeros(DType::F32, [3, 100]).unwrap();
    let mut target = device.zeros(DType::BF16, [300]).unwrap();
    let arguments = [Argument::Out(&mut target), Argument::In(&source), Argument::Size(5000)];
    // More elements than there are, so the kernel leaves its tensors.
    let message = said(device.launch(&CONVERT, &[], Geometry::cover(5000, 2048), &arguments));
    let (before, after) = message.split_once("touched memory ").unwrap();
    assert_eq!(
        before,
        "convert_f32_bf16: convert_f32_bf16 in elementwise.cu, grid [3, 1, 1] of 256 threads: block (0, 0, 0), thread (37, 0, 0): "
    );
    // Which byte of a pack is touched first is up to the compiler.
    let (_, after) = after.split_once(" bytes past").unwrap();
    assert_eq!(
        after,
        " the end of buffer 1 of the launch (1200 bytes); given target bf16 [300], source f32 [3, 100]"
    );
}

#[test]
fn a_launch_that_does_not_fit_is_refused_with_what_does_not_fit() {
    let Some(device) = device() else { return };
    let source = device.zeros(DType::F32, [4]).unwrap();
    let mut target = device.zeros(DType::BF16, [4]).unwrap();
    let mut refused = |launch: &dyn Fn(&mut Tensor<Emulated>) -> Result<()>| said(launch(&mut target));
    let grid = Geometry::cover(1, 1);
    assert_eq!(
        refused(&|target| device.launch(&CONVERT, &[], grid, &[Argument::Out(target)])),
        "convert_f32_bf16: launch refused: 1 arguments for 3 parameters"
    );
    assert_eq!(
        refused(&|target| {
            let arguments = [Argument::In(&source), Argument::Out(target), Argument::Size(4)];
            device.launch(&CONVERT, &[], grid, &arguments)
        }),
        "convert_f32_bf16: launch refused: `target` wants Out(Is(BF16)) and got another kind of argument"
    );
    let wide = Geometry::grid([1, 65_536, 1]);
    assert_eq!(
        refused(&|target| {
            let arguments = [Argument::Out(target), Argument::In(&source), Argument::Size(4)];
            device.launch(&CONVERT, &[], wide, &arguments)
        }),
        "convert_f32_bf16: launch refused: a grid of [1, 65536, 1] blocks is too large"
    );
}

#[test]
fn memory_that_cannot_be_had_is_told_with_tensor_and_launch() {
    let Some(device) = device() else { return };
    let mut x = device.zeros(DType::F32, [1000]).unwrap();
    assert_eq!(
        said(device.alloc(DType::BF16, [1 << 20, 1 << 30])),
        "the emulated backend is out of memory: asked for 2251799813685248 bytes for bf16 [1048576, 1073741824] after the \
         beginning with 4000 in use"
    );
    let y = device.zeros(DType::F32, [1000]).unwrap();
    device.add_assign(&mut x, &y).unwrap();
    assert_eq!(
        said(device.alloc(DType::U8, [1 << 50])),
        "the emulated backend is out of memory: asked for 1125899906842624 bytes for u8 [1125899906842624] after add_assign with \
         8000 in use"
    );
}

/// A step that needs more than the arena has gets it elsewhere; when nobody has it, the error is that of any tensor, and the
/// device works on.
#[test]
fn a_step_that_exhausts_its_arena_and_the_device_says_so_and_the_next_one_works() {
    let Some(device) = device() else { return };
    let step = |bytes: usize| device.step(|| device.zeros(DType::U8, [bytes]).map(|_| ()));
    step(1000).unwrap();
    let arena = device.arena_bytes();
    assert!(arena >= 1000);
    step(5000).unwrap();
    assert!(device.arena_bytes() >= 5000, "the arena has grown");
    assert_eq!(
        said(step(1 << 50)),
        "the emulated backend is out of memory: asked for 1125899906842624 bytes for u8 [1125899906842624] after the beginning \
         with 0 in use"
    );
    step(5000).unwrap();
    assert!(device.arena_bytes() >= 5000, "what could not be had is not planned for");
    let recorded = device.step(|| device.record(&Segments::from_lengths([1]), || step(6000)));
    match recorded.unwrap() {
        Recorded::Not(reason) => assert_eq!(
            reason,
            "alloc: 6000 bytes do not fit the step's memory, which a recording cannot repeat (after the beginning)"
        ),
        Recorded::Yes(_) => panic!("memory that no replay has"),
    }
}
