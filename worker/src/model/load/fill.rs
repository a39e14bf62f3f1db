//! From stored bytes to a weight in the backend's memory: checked, decoded, quantised, part by part.

use brightrun_kernels::{Backend, DType, Error, Nf4Weight};

use super::plan::{Part, Place, Plan};
use super::store::{Form, Store};
use crate::error::{Failure, Result};
use crate::model::fp8::{self, Grid};
use crate::model::tensor_file::{first_non_finite, narrow, widen};

/// Elements that are converted at a time.
const CONVERTED_AT_ONCE: usize = 64 << 10;

/// What the parts need besides their own bytes.
pub struct Filler<'a, B: Backend> {
    /// Where the weights go.
    pub device: &'a B,
    /// What is loaded.
    pub plan: &'a Plan,
    /// Values of [`Plan::scales`].
    pub scales: &'a [Vec<f32>],
    /// Rows and columns that share a scale.
    pub block: Option<[usize; 2]>,
    /// The weights.
    pub store: &'a Store<B>,
}

impl<B: Backend> Filler<'_, B> {
    /// Encodes a part and puts it in its place.
    ///
    /// # Errors
    /// `MODEL_NON_FINITE` naming tensor and element; `MODEL_FP8_SCALES`; the backend's own.
    pub fn fill(&self, part: &Part, bytes: &[u8]) -> Result<()> {
        match part.place {
            Place::Elements(first) => self.elements(part, first, bytes),
            Place::Matrix => self.quantise(part, None, bytes),
            Place::Expert(expert) => self.quantise(part, Some(expert), bytes),
        }
    }

    fn elements(&self, part: &Part, first: usize, bytes: &[u8]) -> Result<()> {
        let Form::Dense { dtype, .. } = self.store.slot(part.slot).form else {
            return Err(self.no_scales(part));
        };
        if part.stored == dtype {
            self.check_finite(part, part.stored, bytes)?;
            return self
                .store
                .write_dense(self.device, part.slot, first * dtype.size_bytes(), bytes);
        }
        let width = part.stored.size_bytes();
        let mut values = vec![0.0; CONVERTED_AT_ONCE.min(bytes.len() / width)];
        for (index, chunk) in bytes.chunks(CONVERTED_AT_ONCE * width).enumerate() {
            let done = index * CONVERTED_AT_ONCE;
            let values = &mut values[..chunk.len() / width];
            self.decode(part, done, chunk, values)?;
            let target = (first + done) * dtype.size_bytes();
            match dtype {
                DType::BF16 => {
                    let halves = narrow(values);
                    self.check_values(part, done, values)?;
                    self.store
                        .write_dense(self.device, part.slot, target, bytemuck::cast_slice(&halves))?;
                }
                _ => {
                    self.check_values(part, done, values)?;
                    self.store
                        .write_dense(self.device, part.slot, target, bytemuck::cast_slice(values))?;
                }
            }
        }
        Ok(())
    }

    /// Values of the part's elements from its own element `done` on.
    fn decode(&self, part: &Part, done: usize, bytes: &[u8], values: &mut [f32]) -> Result<()> {
        match part.stored {
            DType::F8E4M3 => self.grid(part)?.decode(self.within(part) + done, bytes, values),
            stored => widen(stored, bytes, values)?,
        }
        Ok(())
    }

    /// The part's first element, counted from the beginning of the matrix it lies in.
    fn within(&self, part: &Part) -> usize {
        part.first % (part.matrix[0] * part.matrix[1]).max(1)
    }

    /// The scales of the matrix that the part lies in.
    fn grid(&self, part: &Part) -> Result<Grid<'_>> {
        let (scales, block) = part
            .scales
            .and_then(|place| self.scales.get(place))
            .zip(self.block)
            .ok_or_else(|| self.no_scales(part))?;
        let [rows, columns] = part.matrix;
        let size: usize = fp8::scale_extents(part.matrix, block).iter().product();
        let matrix = part.first / (rows * columns).max(1);
        let scales = scales.get(matrix * size..(matrix + 1) * size);
        Ok(Grid {
            scales: scales.ok_or_else(|| self.no_scales(part))?,
            columns,
            block,
        })
    }

    fn quantise(&self, part: &Part, expert: Option<usize>, bytes: &[u8]) -> Result<()> {
        let (Form::Nf4 { outputs, inputs } | Form::Nf4Stack { outputs, inputs, .. }) = self.store.slot(part.slot).form
        else {
            return Err(self.no_scales(part));
        };
        let weight = match part.stored {
            DType::F8E4M3 => self.quantised_fp8(part, [outputs, inputs], bytes)?,
            stored => {
                let source = self.device.upload(stored, [outputs, inputs], bytes)?;
                self.device
                    .quantize_nf4(&source, true)
                    .map_err(|error| self.named(part, error, bytes))?
            }
        };
        self.store.put_nf4(self.device, part.slot, expert, weight)
    }

    fn quantised_fp8(&self, part: &Part, shape: [usize; 2], bytes: &[u8]) -> Result<Nf4Weight<B>> {
        let grid = self.grid(part)?;
        let first_row = self.within(part) / grid.columns.max(1);
        let named = |error| self.named(part, error, bytes);
        if first_row.is_multiple_of(grid.block[0]) {
            // The grid of a half begins at a row of the whole's.
            let across = grid.columns.div_ceil(grid.block[1]);
            let extents = fp8::scale_extents(shape, grid.block);
            let from = first_row / grid.block[0] * across;
            let scales = grid.scales.get(from..from + extents[0] * across);
            let scales = self
                .device
                .upload_f32(extents, scales.ok_or_else(|| self.no_scales(part))?)?;
            let codes = self.device.upload(DType::F8E4M3, shape, bytes)?;
            return self
                .device
                .quantize_nf4_fp8(&codes, &scales, grid.block, true)
                .map_err(named);
        }
        let mut values = vec![0.0; bytes.len()];
        grid.decode(self.within(part), bytes, &mut values);
        let source = self.device.upload_f32(shape, &values)?;
        self.device.quantize_nf4(&source, true).map_err(named)
    }

    /// A refusal to quantise, with the tensor's name and the element.
    fn named(&self, part: &Part, error: Error, bytes: &[u8]) -> Failure {
        let (true, DType::F8E4M3) = (matches!(error, Error::Value { .. }), part.stored) else {
            return match self.check_finite(part, part.stored, bytes) {
                Err(failure) => failure,
                Ok(()) => error.into(),
            };
        };
        let mut values = vec![0.0; bytes.len()];
        match self
            .decode(part, 0, bytes, &mut values)
            .and_then(|()| self.check_values(part, 0, &values))
        {
            Err(failure) => failure,
            Ok(()) => error.into(),
        }
    }

    fn check_values(&self, part: &Part, done: usize, values: &[f32]) -> Result<()> {
        match first_non_finite(DType::F32, bytemuck::cast_slice(values)) {
            None => Ok(()),
            Some(element) => Err(self.non_finite(part, done + element)),
        }
    }

    fn check_finite(&self, part: &Part, dtype: DType, bytes: &[u8]) -> Result<()> {
        match first_non_finite(dtype, bytes) {
            None => Ok(()),
            Some(element) => Err(self.non_finite(part, element)),
        }
    }

    fn name(&self, part: &Part) -> &str {
        self.plan.tensors.get(part.tensor).map_or("?", String::as_str)
    }

    fn non_finite(&self, part: &Part, element: usize) -> Failure {
        Failure::user(
            "MODEL_NON_FINITE",
            format!(
                "Element {} of the tensor `{}` is infinite or not a number",
                part.first + element,
                self.name(part)
            ),
        )
        .hint("Download the checkpoint again; its weights are damaged")
    }

    fn no_scales(&self, part: &Part) -> Failure {
        Failure::user(
            "MODEL_FP8_SCALES",
            format!(
                "The tensor `{}` is FP8, but nothing says how it is scaled",
                self.name(part)
            ),
        )
    }
}
