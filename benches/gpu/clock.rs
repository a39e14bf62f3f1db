//! Time, as the device measures it.

use std::time::Instant;

use brightrun_kernels::cpu::Cpu;
use brightrun_kernels::cuda::Cuda;
use brightrun_kernels::emu::Emulated;
use brightrun_kernels::ops::Backend;

/// A backend that can say how long its work takes.
pub trait Clock: Backend {
    /// Milliseconds of what `work` queues, from its beginning on the device to its end.
    fn milliseconds(&self, work: &mut dyn FnMut()) -> f64;

    /// What it runs on.
    fn describe(&self) -> serde_json::Value;
}

impl Clock for Cuda {
    fn milliseconds(&self, work: &mut dyn FnMut()) -> f64 {
        let begin = self.runtime().mark().unwrap();
        work();
        let end = self.runtime().mark().unwrap();
        f64::from(begin.milliseconds_until(&end).unwrap())
    }

    fn describe(&self) -> serde_json::Value {
        let info = self.runtime().info();
        let (free, total) = self.runtime().free_and_total_bytes().unwrap();
        serde_json::json!({
            "device": info.name, "target": info.target().to_string(), "multiprocessors": info.multiprocessors,
            "total_bytes": total, "free_bytes": free,
        })
    }
}

fn wall(work: &mut dyn FnMut()) -> f64 {
    let begin = Instant::now();
    work();
    begin.elapsed().as_secs_f64() * 1e3
}

impl Clock for Cpu {
    fn milliseconds(&self, work: &mut dyn FnMut()) -> f64 {
        wall(work)
    }

    fn describe(&self) -> serde_json::Value {
        serde_json::json!({ "device": self.simd_level().to_string(), "threads": self.threads() })
    }
}

impl Clock for Emulated {
    fn milliseconds(&self, work: &mut dyn FnMut()) -> f64 {
        wall(work)
    }

    fn describe(&self) -> serde_json::Value {
        serde_json::json!({ "device": "emulated" })
    }
}
