//! A string that cannot be printed, formatted or serialised.

use std::str::FromStr;

/// The environment variable that allows core dumps again when it is `1`: for a developer with a debugger.
pub const CORE_DUMPS_VARIABLE: &str = "BRIGHTRUN_CORE_DUMPS";

/// Lets no core dump of this process be written: it would hold every credential. The limit is for cores in files, the other
/// switch also for those that the system hands to a program.
pub fn forbid_core_dumps() {
    use rustix::process::{Resource, Rlimit, setrlimit};
    if std::env::var(CORE_DUMPS_VARIABLE).is_ok_and(|value| value == "1") {
        return;
    }
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    // Where the system refuses, nothing can be done about it, and nobody is there yet to be told.
    let _refused = setrlimit(Resource::Core, none);
    #[cfg(target_os = "linux")]
    {
        use rustix::process::{DumpableBehavior, set_dumpable_behavior};
        let _refused = set_dumpable_behavior(DumpableBehavior::NotDumpable);
    }
}

/// A credential. It has no `Display` and no `Serialize`; `Debug` shows only that it is there.
///
/// The memory is not wiped: the aim is that a secret never reaches a row, a log line, an error
/// or a file by accident, which the type system can guarantee. Memory dumps are forbidden by [`forbid_core_dumps`].
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Wraps a credential.
    pub fn new(value: impl Into<String>) -> Self {
        Self(value.into())
    }

    /// The credential itself. Call this only where it is handed to the service it opens.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Secret(…)")
    }
}

impl FromStr for Secret {
    type Err = std::convert::Infallible;
    fn from_str(value: &str) -> Result<Self, Self::Err> {
        Ok(Self::new(value))
    }
}
