//! What computes: the backend that `worker.device` names, chosen here and nowhere else.

use std::fmt;

use brightrun_kernels::cpu::Cpu;
use brightrun_kernels::cuda::{self, Cuda};
use brightrun_kernels::emu::{self, Emulated};
use brightrun_kernels::ops::Device;
use brightrun_kernels::{Op, Support};

use crate::config::{Config, DeviceChoice};
use crate::error::{Failure, Result};

/// A backend that was opened.
pub(crate) enum Chosen {
    Cpu(Cpu),
    Cuda(Cuda),
    Emulated(Emulated),
}

/// Evaluates an expression with the chosen backend, whose type is then known: all below is generic over it.
macro_rules! on_device {
    ($config:expr, |$device:ident| $body:expr) => {
        match $crate::cli::device::Chosen::by($config)? {
            $crate::cli::device::Chosen::Cpu($device) => $body,
            $crate::cli::device::Chosen::Cuda($device) => $body,
            $crate::cli::device::Chosen::Emulated($device) => $body,
        }
    };
}
pub(super) use on_device;

/// What every model's training needs; a GPU backend without it is not chosen unasked.
const NEEDED: [Op; 11] = [
    Op::LinearForward,
    Op::LinearBackward,
    Op::RmsNormForward,
    Op::RmsNormBackward,
    Op::AttentionForward,
    Op::AttentionBackward,
    Op::Rope,
    Op::GatherRows,
    Op::LinearCrossEntropy,
    Op::SquaredNorm,
    Op::AdamwStep,
];

impl Chosen {
    /// Opens the backend that the settings name.
    ///
    /// # Errors
    /// When it was named and is not there, or does not start.
    pub(crate) fn by(config: &Config) -> Result<Self> {
        let threads = config.worker.backend_threads();
        match config.worker.device {
            DeviceChoice::Cpu => Ok(Self::Cpu(Cpu::new(threads)?)),
            DeviceChoice::Cuda => Ok(Self::Cuda(cuda::cuda(0).map_err(no_gpu)?)),
            DeviceChoice::Emulated => Ok(Self::Emulated(emu::emulated(threads)?)),
            DeviceChoice::Auto => match gpu() {
                Some(device) => Ok(Self::Cuda(device)),
                None => Ok(Self::Cpu(Cpu::new(threads)?)),
            },
        }
    }
}

/// The first GPU, if it can train; why not is logged.
fn gpu() -> Option<Cuda> {
    let device = match cuda::cuda(0) {
        Ok(device) => device,
        Err(brightrun_kernels::Error::Unsupported { reason, .. }) => {
            tracing::debug!(reason, "no GPU is used");
            return None;
        }
        Err(error) => {
            tracing::warn!(%error, "the GPU does not start; the CPU is used");
            return None;
        }
    };
    for op in NEEDED {
        if let Support::Absent(reason) = device.supports(op) {
            tracing::warn!(?op, reason, "the GPU is not used");
            return None;
        }
    }
    Some(device)
}

fn no_gpu(error: brightrun_kernels::Error) -> Failure {
    Failure::from(error).hint("Set worker.device (or --device) to auto or cpu, or see `brightrun kernels devices`")
}

impl fmt::Display for Chosen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu(device) => f.write_str(device.name()),
            Self::Cuda(device) => write!(f, "cuda {}", device.runtime().info()),
            Self::Emulated(device) => f.write_str(device.name()),
        }
    }
}
