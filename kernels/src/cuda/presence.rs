//! What there is to run on, found out without creating anything on a device.

use std::fmt;

use super::Target;
use super::launch;

/// What a machine has of CUDA.
#[derive(Clone, Debug, PartialEq)]
pub enum Presence {
    /// A driver and at least one device.
    Present {
        /// The newest CUDA version the driver knows, as (major, minor).
        driver: (u32, u32),
        /// The devices, by ordinal.
        devices: Vec<DeviceInfo>,
    },
    /// Nothing to run on, and why.
    Absent(String),
}

/// One device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Its number among the visible devices.
    pub ordinal: usize,
    /// As its maker calls it.
    pub name: String,
    /// Compute capability: (major, minor).
    pub capability: (u32, u32),
    /// Its memory.
    pub total_bytes: u64,
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
}

impl DeviceInfo {
    /// What kernels are compiled for to run on it.
    pub fn target(&self) -> Target {
        Target::of_device(self.capability.0, self.capability.1)
    }
}

impl fmt::Display for DeviceInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let gib = self.total_bytes as f64 / f64::from(1 << 30);
        write!(
            f,
            "{}: {} ({}, {} multiprocessors, {gib:.1} GiB)",
            self.ordinal,
            self.name,
            self.target(),
            self.multiprocessors
        )
    }
}

impl fmt::Display for Presence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Absent(reason) => write!(f, "no CUDA device: {reason}"),
            Self::Present { driver, devices } => {
                write!(f, "CUDA driver {}.{}", driver.0, driver.1)?;
                devices.iter().try_for_each(|device| write!(f, "\n{device}"))
            }
        }
    }
}

/// The first compute capability with what the kernels need.
const OLDEST_MAJOR: u32 = 8;

pub(super) fn probe() -> Presence {
    if !launch::has_driver_library() {
        return Presence::Absent("the driver's library (libcuda) is not installed".to_owned());
    }
    let (driver, devices) = match launch::describe_devices() {
        Ok(found) => found,
        Err(error) => return Presence::Absent(format!("the driver does not start: {error}")),
    };
    if devices.is_empty() {
        return Presence::Absent("the driver sees no device".to_owned());
    }
    if devices.iter().all(|device| device.capability.0 < OLDEST_MAJOR) {
        let names: Vec<String> = devices.iter().map(DeviceInfo::to_string).collect();
        return Presence::Absent(format!(
            "compute capability {OLDEST_MAJOR}.0 or newer is needed; there is {}",
            names.join(", ")
        ));
    }
    Presence::Present { driver, devices }
}
