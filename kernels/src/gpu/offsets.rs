//! Offsets beyond 2³¹ elements, which 32-bit arithmetic would wrap.
//!
//! The memory is reserved, not touched: only the pages that the kernels write exist.

#![allow(clippy::unwrap_used, clippy::panic)]

use crate::dtype::DType;
use crate::emu::{Emulated, emulated};
use crate::error::Error;
use crate::ops::{Device, EmbeddingOps};
use crate::tensor::{Shape, Tensor};
use crate::weight::Weight;

/// A tensor of unspecified contents, which is not filled with NaN.
fn untouched(device: &Emulated, dtype: DType, shape: impl Into<Shape>) -> Tensor<Emulated> {
    let shape = shape.into();
    let buffer = device.inner.memory.take(shape.elements() * dtype.size_bytes()).unwrap();
    Tensor::from_buffer(buffer, dtype, shape)
}

#[test]
fn rows_beyond_two_to_the_31_elements_are_found_where_they_were_put() {
    let device = match emulated(Some(2)) {
        Ok(device) => device,
        Err(Error::Unsupported { reason, .. }) => return println!("emulated: absent: {reason}"),
        Err(error) => panic!("{error}"),
    };
    const WIDTH: usize = 1000;
    let rows = (1 << 31) / WIDTH + 10;
    let mut table = untouched(&device, DType::BF16, [rows, WIDTH]);
    let bits: Vec<u16> = (0..WIDTH as u16).map(|i| 0x3F80 + i).collect();
    let row = device
        .upload(DType::BF16, [1, WIDTH], bytemuck::cast_slice(&bits))
        .unwrap();
    device.copy_rows(&row, &mut table, rows - 1).unwrap();
    let ids = device.upload_i32([1], &[rows as i32 - 1]).unwrap();
    let mut found = device.alloc(DType::BF16, [1, WIDTH]).unwrap();
    device.gather_rows(&Weight::Dense(table), &ids, &mut found).unwrap();
    assert_eq!(device.read(&found).unwrap(), bytemuck::cast_slice::<u16, u8>(&bits));
}
