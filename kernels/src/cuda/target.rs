//! Architectures that kernels are compiled for.

use std::fmt;
use std::str::FromStr;

/// A real architecture, written as the compiler wants it: `sm_80`, `sm_90a`.
///
/// `a` asks for what only this very architecture has (on `sm_90a`: wgmma, TMA with its register hints) and gives up running on
/// later ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Target {
    /// Compute capability as one number: 80, 90, 120.
    number: u32,
    specific: bool,
}

/// The oldest architecture the kernels are written for: the first with bf16 tensor cores and `cp.async`.
const OLDEST: u32 = 80;
/// The first architecture with instructions that only its own code may use.
const FIRST_SPECIFIC: u32 = 90;

impl Target {
    /// The target that uses all of a device of this compute capability.
    pub fn of_device(major: u32, minor: u32) -> Self {
        Self::best(major * 10 + minor)
    }

    /// Hopper's wgmma kernels exist in `sm_90a` code only. Nothing here needs more of later architectures than they all have.
    fn best(number: u32) -> Self {
        Self {
            number,
            specific: number == FIRST_SPECIFIC,
        }
    }

    /// Targets for every architecture of a compiler's list that the kernels are written for.
    pub(super) fn of_compiler(numbers: &[u32]) -> Vec<Self> {
        let known = numbers.iter().filter(|number| **number >= OLDEST);
        known.map(|number| Self::best(*number)).collect()
    }

    /// The targets whose code runs on a device of this target, best first: its own, then that of earlier minor versions.
    pub(super) fn runnable(self) -> Vec<Self> {
        let generation = self.number / 10 * 10;
        let plain = (generation..=self.number).rev().map(|number| Self {
            number,
            specific: false,
        });
        self.specific.then_some(self).into_iter().chain(plain).collect()
    }

    /// Compute capability as one number: 80, 90, 120.
    pub fn number(self) -> u32 {
        self.number
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sm_{}{}", self.number, if self.specific { "a" } else { "" })
    }
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is no target: write one like sm_80 or sm_90a, from sm_{OLDEST} on");
        let rest = text.strip_prefix("sm_").ok_or_else(wrong)?;
        let digits = rest.strip_suffix('a').unwrap_or(rest);
        let number: u32 = digits.parse().map_err(|_| wrong())?;
        if number < OLDEST || digits.len() > 3 || (digits.len() < rest.len() && number < FIRST_SPECIFIC) {
            return Err(wrong());
        }
        Ok(Self {
            number,
            specific: digits.len() < rest.len(),
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_device_runs_its_own_code_and_that_of_earlier_minor_versions() {
        let runnable = |major, minor| -> Vec<String> {
            let targets = Target::of_device(major, minor).runnable();
            targets.iter().map(Target::to_string).collect()
        };
        assert_eq!(runnable(9, 0), ["sm_90a", "sm_90"]);
        assert_eq!(runnable(8, 0), ["sm_80"]);
        let ada = runnable(8, 9);
        assert_eq!(
            (ada.first().unwrap().as_str(), ada.last().unwrap().as_str()),
            ("sm_89", "sm_80")
        );
        assert!(ada.contains(&"sm_86".to_owned()) && ada.iter().all(|target| !target.ends_with('a')));
    }

    #[test]
    fn targets_are_written_as_the_compiler_reads_them() {
        for text in ["sm_80", "sm_90a", "sm_120"] {
            assert_eq!(text.parse::<Target>().unwrap().to_string(), text);
        }
        for text in ["sm_75", "80", "sm_", "sm_80a", "compute_90", "sm_90f", "sm_9000"] {
            assert!(text.parse::<Target>().is_err(), "{text}");
        }
    }
}
