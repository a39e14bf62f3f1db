//! GPUs as data.

use serde::Serialize;

use crate::error::{Failure, Result};

/// What a plan needs to know of a card.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Gpu {
    /// Its name, as users write it.
    pub name: &'static str,
    /// Memory as the driver reports it, in MiB.
    pub memory_mib: u64,
    /// Memory bandwidth in GB/s, by the data sheet.
    pub bandwidth_gb_s: f64,
    /// Dense bf16 tensor throughput with f32 sums in TFLOP/s, by the data sheet.
    pub bf16_tflops: f64,
    /// An example price in US dollars an hour; see [`PRICE_SOURCE`].
    pub example_price_per_hour: f64,
}

/// Where the example prices come from: RunPod's serverless flex price per second, times 3600.
pub const PRICE_SOURCE: &str = "example: RunPod serverless flex price, docs.runpod.io/serverless/pricing, read 2026-11";

const fn card(
    name: &'static str,
    memory_mib: u64,
    bandwidth_gb_s: f64,
    bf16_tflops: f64,
    price_per_second: f64,
) -> Gpu {
    Gpu {
        name,
        memory_mib,
        bandwidth_gb_s,
        bf16_tflops,
        example_price_per_hour: price_per_second * 3600.0,
    }
}

/// Every card a plan knows, the smallest memory first. Memory as `nvidia-smi` shows it; bandwidth and throughput (dense, without
/// sparsity) by NVIDIA's data sheets; consumer cards sum in f32 at half of their headline rate. Prices per second: see
/// [`PRICE_SOURCE`]. Cards missing there have the price of the nearest class: RTX 5090 as L40S, H100 PCIe as H100, A100 40 GB as
/// A100, RTX PRO 6000 as A100.
pub const GPUS: [Gpu; 17] = [
    card("L4", 23_034, 300.0, 121.0, 0.000_19),
    card("RTX 4090", 24_564, 1008.0, 165.0, 0.000_31),
    card("RTX 3090", 24_576, 936.0, 71.0, 0.000_19),
    card("RTX 5090", 32_607, 1792.0, 210.0, 0.000_53),
    card("A100 40GB", 40_960, 1555.0, 312.0, 0.000_76),
    card("L40S", 46_068, 864.0, 362.0, 0.000_53),
    card("A40", 46_068, 696.0, 150.0, 0.000_34),
    card("RTX A6000", 49_140, 768.0, 155.0, 0.000_34),
    card("RTX 6000 Ada", 49_140, 960.0, 364.0, 0.000_53),
    card("H100 PCIe", 81_559, 2000.0, 756.0, 0.001_16),
    card("H100 SXM", 81_559, 3350.0, 989.0, 0.001_16),
    card("A100 PCIe", 81_920, 1935.0, 312.0, 0.000_76),
    card("A100 SXM", 81_920, 2039.0, 312.0, 0.000_76),
    card("H100 NVL", 95_830, 3938.0, 835.0, 0.001_16),
    card("RTX PRO 6000", 97_887, 1792.0, 500.0, 0.000_76),
    card("H200", 143_771, 4800.0, 989.0, 0.001_55),
    card("B200", 183_359, 8000.0, 2250.0, 0.002_40),
];

impl Gpu {
    /// Bytes of memory.
    pub fn memory_bytes(&self) -> u64 {
        self.memory_mib << 20
    }

    /// The card that a user means: spaces, dashes and case do not matter, nor does what stands around the name (`NVIDIA H200`);
    /// where several match the one with the most memory is meant (`A100`). A driver's own name counts by its words
    /// (`NVIDIA A100-SXM4-80GB`).
    ///
    /// # Errors
    /// `GPU_UNKNOWN` with the names that are known.
    pub fn named(name: &str) -> Result<&'static Self> {
        let plain = |text: &str| -> String {
            text.to_lowercase()
                .chars()
                .filter(char::is_ascii_alphanumeric)
                .collect()
        };
        let wanted = plain(name).replace("nvidia", "").replace("geforce", "");
        let exact = GPUS.iter().find(|gpu| plain(gpu.name) == wanted);
        let by_part = || {
            let matches = |gpu: &&Self| {
                let own = plain(gpu.name);
                !wanted.is_empty() && (own.contains(&wanted) || wanted.contains(&own))
            };
            GPUS.iter().filter(matches).max_by_key(|gpu| gpu.memory_mib)
        };
        exact.or_else(|| Self::by_words(name)).or_else(by_part).ok_or_else(|| {
            let names: Vec<&str> = GPUS.iter().map(|gpu| gpu.name).collect();
            Failure::user("GPU_UNKNOWN", format!("The GPU `{name}` is not known"))
                .hint(format!("Known are {}", names.join(", ")))
        })
    }

    /// The card whose model number is among the words of a name, and of several the one with which it has most letters in common.
    fn by_words(name: &str) -> Option<&'static Self> {
        let words: Vec<String> = name
            .to_lowercase()
            .split(|c: char| !c.is_ascii_alphanumeric())
            // The form of a module has a generation in drivers' names, and the H100's goes by its memory alone.
            .map(|word| match word {
                "sxm2" | "sxm3" | "sxm4" | "sxm5" | "hbm3" => "sxm".to_owned(),
                other => other.to_owned(),
            })
            .collect();
        let common = |gpu: &&Self| {
            let own = gpu.name.to_lowercase();
            let has = |word: &&str| words.iter().any(|other| other == word);
            let is_same_model = own
                .split(' ')
                .find(|word| word.contains(|c: char| c.is_ascii_digit()))
                .is_some_and(|model| has(&model));
            is_same_model.then(|| own.split(' ').filter(has).map(str::len).sum::<usize>())
        };
        GPUS.iter()
            .filter(|gpu| common(gpu).is_some())
            .max_by_key(|gpu| (common(gpu), gpu.memory_mib))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn names_are_found_as_people_write_them() {
        for (written, meant) in [
            ("h200", "H200"),
            ("NVIDIA H200", "H200"),
            ("H100-SXM", "H100 SXM"),
            ("a100", "A100 SXM"),
            ("A6000", "RTX A6000"),
            ("rtx4090", "RTX 4090"),
            ("NVIDIA GeForce RTX 3090", "RTX 3090"),
            ("NVIDIA A100 80GB PCIe", "A100 PCIe"),
            ("NVIDIA A100-SXM4-80GB", "A100 SXM"),
            ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
            ("NVIDIA H100 80GB HBM3", "H100 SXM"),
            ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
            ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX PRO 6000"),
            ("NVIDIA L4", "L4"),
        ] {
            assert_eq!(Gpu::named(written).unwrap().name, meant, "{written}");
        }
        let failure = Gpu::named("TPU").unwrap_err();
        assert!(
            failure.code == "GPU_UNKNOWN" && failure.hint.contains("H200"),
            "{failure}"
        );
    }
}
