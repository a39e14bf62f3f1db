//! NF4 against bitsandbytes, bit for bit.

use std::path::Path;

use brightrun_kernels::{Backend, DType, Nf4Scales, Nf4Weight, Shape, Weight};
use brightrun_worker::model::tensor_file::TensorFile;
use serde_json::Value;

use crate::{CaseResult, Check};

/// Runs the case in a folder with `nf4.json` and `nf4.safetensors`.
pub fn run<B: Backend>(folder: &Path, device: &B) -> CaseResult {
    let settings: Value =
        serde_json::from_str(&std::fs::read_to_string(folder.join("nf4.json")).map_err(|e| e.to_string())?)
            .map_err(|error| error.to_string())?;
    if settings["blocksize"] != 64 || settings["quant_type"] != "nf4" {
        return Err(format!(
            "only nf4 with blocks of 64 is implemented, the case has {settings}"
        ));
    }
    let file = TensorFile::open(&folder.join("nf4.safetensors")).map_err(|failure| failure.to_string())?;
    let matrices: Vec<&str> = file
        .tensors()
        .keys()
        .filter_map(|name| name.strip_suffix(".weight"))
        .collect();
    if matrices.is_empty() {
        return Err("nf4.safetensors holds no `….weight`".to_owned());
    }
    let case = Case {
        device: device.clone(),
        file: &file,
        settings: &settings,
    };
    matrices
        .into_iter()
        .map(|name| case.matrix(name))
        .collect::<Result<Vec<_>, _>>()
        .map(|all| all.concat_checks())
}

trait ConcatChecks {
    fn concat_checks(self) -> Vec<Check>;
}

impl ConcatChecks for Vec<Vec<Check>> {
    fn concat_checks(self) -> Vec<Check> {
        self.into_iter().flatten().collect()
    }
}

struct Case<'a, B: Backend> {
    device: B,
    file: &'a TensorFile,
    settings: &'a Value,
}

impl<B: Backend> Case<'_, B> {
    /// Quantises one matrix and compares everything bitsandbytes stores for it. The "error" is the number of differing bytes.
    fn matrix(&self, name: &str) -> CaseResult {
        let source = self
            .file
            .read(&format!("{name}.weight"))
            .map_err(|failure| failure.to_string())?;
        let tensor = self
            .device
            .upload(source.dtype, Shape::new(&source.shape), &source.bytes)
            .map_err(|error| error.to_string())?;
        let nested = self.file.tensors().contains_key(&format!("{name}.nested_absmax"));
        let weight = self
            .device
            .quantize_nf4(&tensor, nested)
            .map_err(|error| error.to_string())?;
        let mut checks = vec![self.same(name, "packed", self.read(&weight.codes)?)?];
        checks.extend(self.scales(name, &weight)?);
        let mut decoded = self
            .device
            .alloc(DType::F32, Shape::new(&source.shape))
            .map_err(|error| error.to_string())?;
        self.device
            .dequantize(&Weight::Nf4(weight), &mut decoded)
            .map_err(|error| error.to_string())?;
        checks.push(self.same(name, "dequantized", self.read(&decoded)?)?);
        Ok(checks)
    }

    fn scales(&self, name: &str, weight: &Nf4Weight<B>) -> CaseResult {
        match &weight.scales {
            Nf4Scales::Flat(absmax) => Ok(vec![self.same(name, "absmax", self.read(absmax)?)?]),
            Nf4Scales::Nested {
                codes,
                nested_absmax,
                nested_code,
                offset,
            } => {
                let expected = self.settings[format!("{name}.offset")]
                    .as_f64()
                    .ok_or("nf4.json has no offset")? as f32;
                let differs = if offset.to_bits() == expected.to_bits() {
                    0.0
                } else {
                    1.0
                };
                Ok(vec![
                    self.same(name, "absmax", self.read(codes)?)?,
                    self.same(name, "nested_absmax", self.read(nested_absmax)?)?,
                    self.same(name, "nested_code", self.read(nested_code)?)?,
                    Check::new(format!("offset of {name}"), differs, 0.0),
                ])
            }
        }
    }

    fn read(&self, tensor: &brightrun_kernels::Tensor<B>) -> Result<Vec<u8>, String> {
        self.device.read(tensor).map_err(|error| error.to_string())
    }

    fn same(&self, name: &str, part: &str, got: Vec<u8>) -> Result<Check, String> {
        let expected = self
            .file
            .read(&format!("{name}.{part}"))
            .map_err(|failure| failure.to_string())?
            .bytes;
        let differing = match got.len() == expected.len() {
            true => got
                .iter()
                .zip(&expected)
                .filter(|(got, expected)| got != expected)
                .count() as f64,
            false => f64::INFINITY,
        };
        Ok(Check::new(format!("{part} of {name}"), differing, 0.0))
    }
}
