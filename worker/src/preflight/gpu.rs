//! Whether the GPU is the one that was meant: there at all, of its class, with memory for the plan, and with code that runs on it.
//!
//! Everything is asked of the driver by loading its library; nothing is allocated, and no context is made. Where there is no
//! library, that is the answer.

use std::path::{Path, PathBuf};

use brightrun_kernels::counting::Habits;
use brightrun_kernels::cuda::{Cuda, DeviceInfo, Nvrtc, PRECOMPILED_VARIABLE, Presence, Target};

use crate::cli::output::bytes;
use crate::config::{Config, DeviceChoice};
use crate::error::{Failure, Result};
use crate::job::services::model_folder;
use crate::model::config::ModelConfig;
use crate::plan::{GPUS, Gpu, Shape, footprint, reserve_bytes, stored_dtype};

/// Where the driver's kernel module says what there is, also to containers that lack its library.
const KERNEL_MODULE: &str = "/proc/driver/nvidia";

/// Pools are named by rounded sizes: a card of the pool of 80 has 79.6 GiB, or 74.5.
const ROUNDING: f64 = 0.9;

/// What this machine has, and what was promised to it.
pub(super) struct Gpus {
    presence: Presence,
    /// Names of the kernel module's GPUs.
    modules: Vec<String>,
    /// `RUNPOD_GPU_COUNT`.
    promised: Option<usize>,
    /// `RUNPOD_GPU_SIZE`: pools, one of which the GPU is from.
    pools: Vec<String>,
    /// The settings insist on a GPU.
    is_required: bool,
    /// The settings do without one.
    is_unwanted: bool,
}

impl Gpus {
    /// Asks the driver.
    pub fn of_machine(config: &Config) -> Self {
        let variable = |name: &str| std::env::var(name).unwrap_or_default();
        let pools = variable("RUNPOD_GPU_SIZE");
        let is_unwanted = matches!(config.worker.device, DeviceChoice::Cpu | DeviceChoice::Emulated);
        Self {
            presence: if is_unwanted {
                Presence::Absent("the settings choose another device".to_owned())
            } else {
                Cuda::probe()
            },
            modules: module_names(Path::new(KERNEL_MODULE)),
            promised: variable("RUNPOD_GPU_COUNT").parse().ok(),
            pools: pools
                .split(',')
                .map(str::trim)
                .filter(|pool| !pool.is_empty())
                .map(str::to_owned)
                .collect(),
            is_required: config.worker.device == DeviceChoice::Cuda,
            is_unwanted,
        }
    }

    /// The one that would compute, and the newest CUDA its driver knows.
    fn first(&self) -> Option<(&DeviceInfo, (u32, u32))> {
        match &self.presence {
            Presence::Present { driver, devices } => Some((devices.first()?, *driver)),
            Presence::Absent(_) => None,
        }
    }

    /// Driver, compute capability, number and class.
    pub fn check(&self) -> Result<String> {
        let (driver, devices) = match &self.presence {
            Presence::Present { driver, devices } => (driver, devices),
            Presence::Absent(reason) => return self.absent(reason),
        };
        let promised = self.promised.unwrap_or(0);
        if devices.len() < promised {
            let message = format!(
                "RunPod gave this worker {promised} GPUs, and the driver shows {}",
                devices.len()
            );
            return Err(Failure::system("GPU_MISSING", message).hint("Have the worker replaced"));
        }
        for device in devices {
            self.check_class(device)?;
        }
        let described: Vec<String> = devices.iter().map(describe).collect();
        Ok(format!(
            "{} (driver of CUDA {}.{})",
            described.join(", "),
            driver.0,
            driver.1
        ))
    }

    fn absent(&self, reason: &str) -> Result<String> {
        if self.is_unwanted {
            return Ok(format!("not used: {reason}"));
        }
        if !self.is_required && self.promised.unwrap_or(0) == 0 && self.modules.is_empty() {
            return Ok(format!("none ({reason}); the CPU computes"));
        }
        let failure = if self.modules.is_empty() {
            Failure::system("GPU_MISSING", format!("A GPU is expected, and there is none: {reason}"))
                .hint("Have the worker replaced; elsewhere, install NVIDIA's driver, or set worker.device to cpu")
        } else {
            let there = self.modules.join(", ");
            Failure::system("GPU_MISSING", format!("The machine has {there}, which this container cannot use: {reason}")).hint(
                "Run the image with NVIDIA's container runtime and NVIDIA_DRIVER_CAPABILITIES=compute,utility; GPUs before Ampere \
                 (compute capability 8.0) cannot be used",
            )
        };
        Err(failure.at(KERNEL_MODULE))
    }

    /// A pool's name says its memory: `AMPERE_80`, `ADA_48_PRO`.
    fn check_class(&self, device: &DeviceInfo) -> Result<()> {
        let gib = device.total_bytes as f64 / f64::from(1 << 30);
        let least = self.pools.iter().filter_map(|pool| pool_gib(pool)).reduce(f64::min);
        match least {
            Some(least) if gib < least * ROUNDING => Err(Failure::system(
                "GPU_CLASS_WRONG",
                format!(
                    "{} has {gib:.0} GiB, which is less than its pool promises ({})",
                    device.name,
                    self.pools.join(", ")
                ),
            )
            .at("environment variable `RUNPOD_GPU_SIZE`")
            .hint("Have the worker replaced, or correct the endpoint's list of GPUs")),
            _ => Ok(()),
        }
    }

    /// Whether the longest example that the settings allow can be trained, as planned without loading anything.
    pub fn check_memory(&self, config: &Config) -> Result<String> {
        let Some((device, _)) = self.first() else {
            return Ok("no GPU whose memory would have to suffice".to_owned());
        };
        let folder = model_folder(config)?;
        let text = std::fs::read_to_string(folder.join("config.json")).unwrap_or_default();
        let model = ModelConfig::load(&folder)?;
        // What can be computed again is not kept: the least that is needed.
        let mut spec = config.train.clone();
        spec.activation_budget_bytes = 0;
        let shape = Shape {
            sequences: 1,
            length: spec.max_length.min(model.max_positions),
        };
        let taken = footprint(&model, stored_dtype(&text), &spec, Habits::gpu(), shape)?;
        suffices(taken.bytes.total(), device)
    }

    /// Whether there is code for the device that its driver can load.
    pub fn check_kernels(&self) -> Result<String> {
        let Some((device, driver)) = self.first() else {
            return Ok("no GPU that would need any".to_owned());
        };
        let folder = precompiled();
        let found = folder.as_deref().map(compiled_in).unwrap_or_default();
        let mine: Vec<&Compiled> = found
            .iter()
            .filter(|code| runs_on(code.target, device.target()))
            .collect();
        if let Some(loadable) = mine.iter().find(|code| code.compiler.0 <= driver.0) {
            return Ok(format!(
                "{} for {} by NVRTC {}.{}",
                mine.len(),
                loadable.target,
                loadable.compiler.0,
                loadable.compiler.1
            ));
        }
        match Nvrtc::find() {
            Ok(compiler) if compiler.version().0 <= driver.0 => {
                let (major, minor) = compiler.version();
                Ok(format!(
                    "compiled for {} when first used, by NVRTC {major}.{minor}",
                    device.target()
                ))
            }
            _ => Err(unusable(device, driver, &mine, folder.as_deref())),
        }
    }
}

fn describe(device: &DeviceInfo) -> String {
    let class = Gpu::named(&device.name).map_or("class unknown", |gpu| gpu.name);
    format!(
        "{} ({}, {}, {class})",
        device.name,
        device.target(),
        bytes(device.total_bytes)
    )
}

/// The gibibytes in a pool's name.
fn pool_gib(pool: &str) -> Option<f64> {
    pool.split('_').find_map(|part| part.parse().ok())
}

/// Compares what training needs with a card.
fn suffices(needed: u64, device: &DeviceInfo) -> Result<String> {
    let total = needed + reserve_bytes(device.total_bytes);
    let shown = format!("{} of {} are needed", bytes(total), bytes(device.total_bytes));
    if total <= device.total_bytes {
        return Ok(shown);
    }
    let larger = GPUS
        .iter()
        .find(|gpu| needed + reserve_bytes(gpu.memory_bytes()) <= gpu.memory_bytes());
    let choose = larger.map_or_else(String::new, |gpu| {
        format!(", or a card like {} ({})", gpu.name, bytes(gpu.memory_bytes()))
    });
    Err(Failure::user(
        "GPU_TOO_SMALL",
        format!("The model does not fit {} with these settings: {shown}", device.name),
    )
    .at("sections `model` and `train` of the settings")
    .hint(format!("Choose train.base_dtype = \"nf4\", a smaller train.max_length or train.rank{choose}; `brightrun plan` shows every part")))
}

/// One file of compiled kernels, by its name.
#[derive(Debug, PartialEq)]
struct Compiled {
    target: Target,
    compiler: (u32, u32),
}

impl Compiled {
    /// `norm.sm_90a.DIGEST.nvrtc-13.0.cubin`.
    fn named(name: &str) -> Option<Self> {
        let rest = name.strip_suffix(".cubin")?;
        let (before, version) = rest.split_once(".nvrtc-")?;
        let (major, minor) = version.split_once('.')?;
        Some(Self {
            target: before.split('.').nth(1)?.parse().ok()?,
            compiler: (major.parse().ok()?, minor.parse().ok()?),
        })
    }
}

/// The folder of the image's kernels, as the backend looks for it.
fn precompiled() -> Option<PathBuf> {
    let named = std::env::var_os(PRECOMPILED_VARIABLE).filter(|value| !value.is_empty());
    named
        .map(PathBuf::from)
        .or_else(|| Some(std::env::current_exe().ok()?.parent()?.join("kernels")))
}

fn compiled_in(folder: &Path) -> Vec<Compiled> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| Compiled::named(&entry.file_name().to_string_lossy()))
        .collect()
}

/// Code runs on its own architecture, and on later ones of the same generation unless it uses what only its own has.
fn runs_on(code: Target, device: Target) -> bool {
    let is_specific = code.to_string().ends_with('a');
    code == device || (!is_specific && code.number() / 10 == device.number() / 10 && code.number() <= device.number())
}

fn unusable(device: &DeviceInfo, driver: (u32, u32), mine: &[&Compiled], folder: Option<&Path>) -> Failure {
    let place = folder.map_or_else(String::new, |folder| folder.display().to_string());
    let Some(newest) = mine.iter().map(|code| code.compiler).max() else {
        return Failure::system(
            "KERNELS_MISSING",
            format!(
                "There is no compiled code for {} ({}), and no compiler that could make it",
                device.name,
                device.target()
            ),
        )
        .at(place)
        .hint(format!(
            "Use an image whose KERNEL_TARGETS name {}, or put NVRTC where `brightrun kernels build` finds it",
            device.target()
        ));
    };
    Failure::system(
        "DRIVER_TOO_OLD",
        format!(
            "The driver knows CUDA {}.{}, and the kernels were compiled by {}.{}",
            driver.0, driver.1, newest.0, newest.1
        ),
    )
    .at(place)
    .hint(format!(
        "Allow only CUDA {}.0 or newer in the endpoint's settings, or build the image with an NVRTC of CUDA {}",
        newest.0, driver.0
    ))
}

/// Names of the GPUs that the kernel module drives.
fn module_names(module: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(module.join("gpus")).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| {
            let information = std::fs::read_to_string(entry.path().join("information")).ok()?;
            let name = information.lines().find_map(|line| line.strip_prefix("Model:"))?;
            Some(name.trim().to_owned())
        })
        .collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const GIB: u64 = 1 << 30;

    fn device(name: &str, capability: (u32, u32), total_bytes: u64) -> DeviceInfo {
        DeviceInfo {
            ordinal: 0,
            name: name.to_owned(),
            capability,
            total_bytes,
            multiprocessors: 100,
        }
    }

    fn machine(presence: Presence) -> Gpus {
        Gpus {
            presence,
            modules: Vec::new(),
            promised: None,
            pools: Vec::new(),
            is_required: false,
            is_unwanted: false,
        }
    }

    fn with(device: DeviceInfo, driver: (u32, u32)) -> Gpus {
        machine(Presence::Present {
            driver,
            devices: vec![device],
        })
    }

    fn without() -> Gpus {
        machine(Presence::Absent(
            "the driver's library (libcuda) is not installed".to_owned(),
        ))
    }

    #[test]
    fn a_machine_without_a_gpu_is_in_order_unless_one_was_promised() {
        assert!(without().check().unwrap().ends_with("the CPU computes"));
        assert!(without().check_memory(&Config::default()).is_ok() && without().check_kernels().is_ok());
        let promised = Gpus {
            promised: Some(1),
            ..without()
        };
        let required = Gpus {
            is_required: true,
            ..without()
        };
        for gpus in [promised, required] {
            let failure = gpus.check().unwrap_err();
            assert!(
                failure.code == "GPU_MISSING" && failure.message.contains("libcuda"),
                "{failure}"
            );
        }
        let shut_out = Gpus {
            modules: vec!["NVIDIA H100".to_owned()],
            ..without()
        };
        let failure = shut_out.check().unwrap_err();
        assert!(
            failure.message.contains("NVIDIA H100") && failure.hint.contains("container runtime"),
            "{failure}"
        );
    }

    #[test]
    fn a_gpu_below_the_size_of_its_pool_or_fewer_than_promised_are_refused() {
        let a100 = || device("NVIDIA A100 80GB PCIe", (8, 0), 79 * GIB);
        let said = with(a100(), (12, 4)).check().unwrap();
        assert!(
            said.contains("sm_80") && said.contains("CUDA 12.4") && said.contains("A100 PCIe"),
            "{said}"
        );
        let pools = |names: &[&str], device| Gpus {
            pools: names.iter().map(ToString::to_string).collect(),
            ..with(device, (12, 4))
        };
        assert!(pools(&["AMPERE_80", "ADA_80_PRO"], a100()).check().is_ok());
        let small = device("NVIDIA L4", (8, 9), 22 * GIB);
        assert!(pools(&["ADA_24"], small.clone()).check().is_ok());
        assert_eq!(
            pools(&["ADA_48_PRO"], small).check().unwrap_err().code,
            "GPU_CLASS_WRONG"
        );
        let two = Gpus {
            promised: Some(2),
            ..with(a100(), (12, 4))
        };
        assert_eq!(two.check().unwrap_err().code, "GPU_MISSING");
    }

    #[test]
    fn a_card_that_is_too_small_for_the_plan_is_refused_with_one_that_is_not() {
        let l4 = device("NVIDIA L4", (8, 9), 22 * GIB);
        assert!(suffices(10 * GIB, &l4).is_ok());
        let failure = suffices(40 * GIB, &l4).unwrap_err();
        assert_eq!(failure.code, "GPU_TOO_SMALL");
        assert!(
            failure.hint.contains("L40S"),
            "the smallest that holds it: {}",
            failure.hint
        );
        assert!(suffices(1 << 50, &l4).unwrap_err().hint.contains("brightrun plan"));
    }

    #[test]
    fn kernels_are_known_by_their_names_and_an_older_driver_cannot_load_them() {
        let name = "norm.sm_90a.0123abcd.nvrtc-13.0.cubin";
        let code = Compiled::named(name).unwrap();
        assert_eq!((code.target.to_string().as_str(), code.compiler), ("sm_90a", (13, 0)));
        for other in [
            "norm.sm_90a.cubin",
            "x",
            "norm.sm_75.0.nvrtc-13.0.cubin",
            "norm.sm_80.0.nvrtc-13.cubin",
        ] {
            assert_eq!(Compiled::named(other), None, "{other}");
        }
        let target = |text: &str| text.parse::<Target>().unwrap();
        for (code, on, runs) in [
            ("sm_80", "sm_86", true),
            ("sm_86", "sm_80", false),
            ("sm_90a", "sm_90a", true),
            ("sm_80", "sm_90a", false),
            ("sm_100", "sm_103", true),
        ] {
            assert_eq!(runs_on(target(code), target(on)), runs, "{code} on {on}");
        }
        let h100 = device("NVIDIA H100", (9, 0), 80 * GIB);
        let old = unusable(&h100, (12, 4), &[&code], None);
        assert!(
            old.code == "DRIVER_TOO_OLD" && old.message.contains("12.4") && old.hint.contains("13.0"),
            "{old}"
        );
        let none = unusable(&h100, (12, 4), &[], None);
        assert!(none.code == "KERNELS_MISSING" && none.hint.contains("sm_90a"), "{none}");
    }

    #[test]
    fn gpus_are_read_from_the_kernel_modules_table() {
        let module = tempfile::tempdir().unwrap();
        assert!(module_names(module.path()).is_empty());
        let one = module.path().join("gpus/0000:01:00.0");
        std::fs::create_dir_all(&one).unwrap();
        std::fs::write(one.join("information"), "Model: \t\t NVIDIA H100 80GB HBM3\nIRQ: 1\n").unwrap();
        assert_eq!(module_names(module.path()), ["NVIDIA H100 80GB HBM3"]);
    }
}
