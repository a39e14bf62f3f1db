//! The kernels on an NVIDIA GPU: a [`Runtime`](crate::gpu::Runtime) over the CUDA driver.
//!
//! The driver's library is loaded when it is asked for, so the same binary runs where there is none; [`Cuda::probe`] says as a
//! value what is there. Kernels are compiled by NVRTC alone, which needs neither a GPU nor CUDA's headers:
//!
//! | file | what |
//! |---|---|
//! | `presence` | what there is: driver, devices, or the reason why not |
//! | `target` | architectures, and which of them run on a device |
//! | `nvrtc` | the compiler, through its library |
//! | `cubins` | compiled sources: from the image, from the cache, or compiled now |
//! | `catalogue` | every source and entry; compiling all of them ahead of time |
//! | `driver` | the runtime: streams, modules, launches |
//! | `staging` | uploads through pinned memory |
//! | `launch` | the driver calls that need `unsafe` |
//! | `cublaslt` | plain products by NVIDIA's library, where it is installed |
//!
//! `unsafe` is in `launch`, `nvrtc` and `cublaslt` only: the doors to three foreign libraries.

mod catalogue;
mod cubins;
mod cublaslt;
mod driver;
mod launch;
mod nvrtc;
mod presence;
mod staging;
mod target;

pub use self::catalogue::{Built, Entry, build, entries};
pub use self::cubins::{Cubins, PRECOMPILED_VARIABLE};
pub use self::driver::{Driver, Graph, Mark, Memory, SYNCHRONOUS_VARIABLE, cuda};
pub use self::nvrtc::{Nvrtc, VARIABLE as NVRTC_VARIABLE};
pub use self::presence::{DeviceInfo, Presence};
pub use self::target::Target;

/// A GPU backend on an NVIDIA device.
pub type Cuda = crate::gpu::Gpu<Driver>;

impl Cuda {
    /// What there is to run on. Never fails and never panics: absence is an answer.
    pub fn probe() -> Presence {
        presence::probe()
    }
}
