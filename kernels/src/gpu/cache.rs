//! Where compiled kernels are kept between runs, and the names they have there.
//!
//! A name holds a digest of everything the compiler was given and of the compiler itself, so a stale file is never used and
//! nothing is ever invalidated.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use sha2::{Digest, Sha256};

/// The environment variable that names the folder; without it, `brightrun/kernels` in the user's cache.
pub const VARIABLE: &str = "BRIGHTRUN_KERNEL_CACHE";

/// The folder of compiled kernels. It need not exist yet.
pub(crate) fn folder() -> PathBuf {
    let variable = |name: &str| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    variable(VARIABLE).unwrap_or_else(|| {
        variable("XDG_CACHE_HOME")
            .or_else(|| variable("HOME").map(|home| home.join(".cache")))
            .unwrap_or_else(std::env::temp_dir)
            .join("brightrun")
            .join("kernels")
    })
}

/// A digest of parts, each with its length, as 32 hexadecimal digits.
pub(crate) fn digest<'a>(parts: impl IntoIterator<Item = &'a str>) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part.as_bytes());
    }
    hash.finalize()
        .iter()
        .take(16)
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// Makes `path` by writing a file beside it and renaming that, so that nobody ever sees half of it.
pub(crate) fn publish(path: &Path, make: impl FnOnce(&Path) -> std::io::Result<()>) -> std::io::Result<()> {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let unique = format!("{}-{}", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed));
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{unique}.new"));
    let own = path.with_file_name(name);
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    make(&own).and_then(|()| std::fs::rename(&own, path)).inspect_err(|_| {
        let _ = std::fs::remove_file(&own);
    })
}
