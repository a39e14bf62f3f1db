//! Compiled sources: looked for in the image, then in the cache, and compiled where neither has them.
//!
//! A file's name says everything its bytes depend on, so a stale one is never used:
//!
//! ```text
//! norm.sm_90a.<digest of options, text and included headers>.nvrtc-13.0.cubin
//! ```
//!
//! Its last bytes are a digest of the others. A file that a full disk or a killed process left damaged is thus noticed and
//! made anew, and any tool that reads ELF files still reads it.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use sha2::{Digest, Sha256};

use super::nvrtc::{Nvrtc, Text};
use super::target::Target;
use crate::error::{Error, Result};
use crate::gpu::Source;
use crate::gpu::cache;
use crate::gpu::sources::HEADERS;

/// The environment variable that names a folder of kernels compiled ahead of time; without it, `kernels` beside the binary.
pub const PRECOMPILED_VARIABLE: &str = "BRIGHTRUN_KERNELS";
const BESIDE: &str = "kernels";
const ENDING: &str = ".cubin";

/// What marks the digest at a file's end, and both their bytes.
const SEAL: &[u8; 8] = b"BRSEAL01";
const SEAL_BYTES: usize = SEAL.len() + 32;

/// Where compiled sources come from.
pub struct Cubins {
    precompiled: Option<PathBuf>,
    cache: PathBuf,
    /// Opened when first needed: an image with every kernel in it has no compiler.
    compiler: OnceLock<Result<Nvrtc>>,
}

impl Cubins {
    /// The folders of this machine, and the compiler that [`Nvrtc::find`] finds.
    pub fn of_machine() -> Self {
        let named = std::env::var_os(PRECOMPILED_VARIABLE)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from);
        let beside = || Some(std::env::current_exe().ok()?.parent()?.join(BESIDE));
        Self {
            precompiled: named.or_else(beside),
            cache: cache::folder().join("cuda"),
            compiler: OnceLock::new(),
        }
    }

    /// These folders and this compiler.
    pub fn new(precompiled: Option<PathBuf>, cache: PathBuf, compiler: Nvrtc) -> Self {
        Self {
            precompiled,
            cache,
            compiler: OnceLock::from(Ok(compiler)),
        }
    }

    /// The compiler, if there is one.
    ///
    /// # Errors
    /// [`Error::Unsupported`], with every place that was looked at.
    pub fn compiler(&self) -> Result<&Nvrtc> {
        self.compiler.get_or_init(Nvrtc::find).as_ref().map_err(Clone::clone)
    }

    /// Offers compiled code that may run on the device to `accept`, best first, until it takes one: precompiled for this very
    /// target, cached or compiled for it, precompiled for an earlier target of the same generation.
    ///
    /// # Errors
    /// What `accept` said of the last code it was offered; otherwise why there is none to offer.
    pub(super) fn load<T>(
        &self,
        source: &Source,
        target: Target,
        mut accept: impl FnMut(&[u8]) -> Result<T>,
    ) -> Result<T> {
        let mut failure = None;
        for cubin in self.precompiled(source, target) {
            match accept(&cubin) {
                Ok(taken) => return Ok(taken),
                Err(error) => failure = Some(error),
            }
        }
        match self.compiled(source, target).and_then(|cubin| accept(&cubin)) {
            Ok(taken) => return Ok(taken),
            Err(error) => failure = failure.or(Some(error)),
        }
        for earlier in target.runnable().into_iter().skip(1) {
            for cubin in self.precompiled(source, earlier) {
                if let Ok(taken) = accept(&cubin) {
                    return Ok(taken);
                }
            }
        }
        Err(failure.unwrap_or_else(|| Error::Device {
            op: "cuda",
            message: format!("no code of {}.cu for {target}", source.name),
        }))
    }

    /// A source's code for a target from the cache, or compiled now and put there.
    ///
    /// # Errors
    /// [`Error::Unsupported`] without a compiler; [`Error::Device`] with its log. A cache that cannot be written to is no error.
    pub(super) fn compiled(&self, source: &Source, target: Target) -> Result<Vec<u8>> {
        let compiler = self.compiler()?;
        let path = self.cache.join(file_name(source, target, compiler));
        if let Some(cubin) = read(&path) {
            return Ok(cubin);
        }
        let cubin = compile(compiler, source, target)?;
        let _ = write(&path, &cubin);
        Ok(cubin)
    }

    /// What the folder of precompiled code has of a source as it is now, by any compiler; a newer compiler's first.
    fn precompiled(&self, source: &Source, target: Target) -> Vec<Vec<u8>> {
        let Some(entries) = self
            .precompiled
            .as_ref()
            .and_then(|folder| std::fs::read_dir(folder).ok())
        else {
            return Vec::new();
        };
        let begin = format!("{}.", stem(source, target));
        let matching = entries.flatten().filter(|entry| {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            name.starts_with(&begin) && name.ends_with(ENDING)
        });
        let mut paths: Vec<PathBuf> = matching.map(|entry| entry.path()).collect();
        paths.sort();
        paths.iter().rev().filter_map(|path| read(path)).collect()
    }
}

/// The name of a source's code: [`stem`], then the compiler.
pub(super) fn file_name(source: &Source, target: Target, compiler: &Nvrtc) -> String {
    let (major, minor) = compiler.version();
    format!("{}.nvrtc-{major}.{minor}{ENDING}", stem(source, target))
}

/// Source, target, and a digest of what a compiler is given.
fn stem(source: &Source, target: Target) -> String {
    let options = options(target);
    let headers = included(source);
    let parts = options.iter().map(String::as_str).chain([source.text]);
    let digest = cache::digest(parts.chain(headers.iter().flat_map(|(name, text)| [*name, *text])));
    format!("{}.{target}.{digest}", source.name)
}

/// How every source is compiled. Line numbers cost nothing at run time and are what profilers and sanitizers report.
fn options(target: Target) -> Vec<String> {
    vec![
        format!("--gpu-architecture={target}"),
        "--std=c++17".to_owned(),
        "--generate-line-info".to_owned(),
    ]
}

/// The headers a source includes, directly or through others, in the order of [`HEADERS`].
fn included(source: &Source) -> Vec<(&'static str, &'static str)> {
    let names = |text: &'static str| {
        text.lines()
            .filter_map(|line| line.trim().strip_prefix("#include \"")?.split('"').next())
    };
    let mut wanted: Vec<&str> = names(source.text).collect();
    let mut seen = 0;
    while let Some(name) = wanted.get(seen).copied() {
        seen += 1;
        if let Some((_, text)) = HEADERS.iter().find(|(header, _)| *header == name) {
            let new: Vec<&str> = names(text).filter(|name| !wanted.contains(name)).collect();
            wanted.extend(new);
        }
    }
    HEADERS
        .iter()
        .filter(|(name, _)| wanted.contains(name))
        .copied()
        .collect()
}

/// Compiles one source, past any cache.
pub(super) fn compile(compiler: &Nvrtc, source: &Source, target: Target) -> Result<Vec<u8>> {
    let name = format!("{}.cu", source.name);
    let text = Text {
        name: &name,
        text: source.text,
        headers: &included(source),
    };
    compiler.compile(&text, &options(target))
}

/// Writes code and its seal, whole or not at all.
pub(super) fn write(path: &Path, cubin: &[u8]) -> std::io::Result<()> {
    let mut bytes = cubin.to_vec();
    bytes.extend_from_slice(SEAL);
    bytes.extend_from_slice(&Sha256::digest(cubin));
    cache::publish(path, |own| std::fs::write(own, &bytes))
}

/// Code whose seal is whole; `None` for a missing or damaged file.
pub(super) fn read(path: &Path) -> Option<Vec<u8>> {
    let mut bytes = std::fs::read(path).ok()?;
    let end = bytes.len().checked_sub(SEAL_BYTES)?;
    let seal = bytes.split_off(end);
    let (mark, digest) = seal.split_at(SEAL.len());
    (mark == SEAL && digest == Sha256::digest(&bytes).as_slice()).then_some(bytes)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    const SOURCE: Source = Source {
        name: "sample",
        text: "#include \"nf4.cuh\"\nint x;",
        only: None,
    };

    fn folder(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("brightrun-cubins-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        path
    }

    /// A store without a compiler.
    fn store(folder: PathBuf) -> Cubins {
        Cubins {
            precompiled: Some(folder.clone()),
            cache: folder.join("cache"),
            compiler: OnceLock::from(Err(Error::Unsupported {
                op: "compiling kernels",
                backend: "cuda",
                reason: "none here".to_owned(),
            })),
        }
    }

    fn target(text: &str) -> Target {
        text.parse().unwrap()
    }

    #[test]
    fn a_damaged_file_is_no_code() {
        let folder = folder("damaged");
        let path = folder.join("x.cubin");
        write(&path, b"machine code").unwrap();
        assert_eq!(read(&path).unwrap(), b"machine code");
        let whole = std::fs::read(&path).unwrap();
        for damaged in [
            &whole[..whole.len() - 1],
            &whole[..3],
            &[whole.as_slice(), b"x"].concat(),
            b"",
        ] {
            std::fs::write(&path, damaged).unwrap();
            assert_eq!(read(&path), None);
        }
        let mut flipped = whole;
        flipped[0] ^= 1;
        std::fs::write(&path, flipped).unwrap();
        assert_eq!(read(&path), None);
        std::fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn a_name_changes_with_the_text_its_headers_and_the_target() {
        let name = stem(&SOURCE, target("sm_80"));
        let changed = Source {
            name: "sample",
            text: "#include \"nf4.cuh\"\nint y;",
            only: None,
        };
        assert_ne!(name, stem(&changed, target("sm_80")));
        let other_target = stem(&SOURCE, target("sm_90a"));
        assert_ne!(name.rsplit('.').next(), other_target.rsplit('.').next());
        // nf4.cuh includes common.cuh, which the source does not name.
        let headers: Vec<&str> = included(&SOURCE).iter().map(|(name, _)| *name).collect();
        assert_eq!(headers, ["common.cuh", "nf4.cuh"]);
    }

    #[test]
    fn precompiled_code_is_offered_for_the_target_then_for_earlier_ones_of_its_generation() {
        let folder = folder("offered");
        for (text, code) in [("sm_80", "old"), ("sm_89", "own"), ("sm_90a", "later")] {
            write(
                &folder.join(format!("{}.nvrtc-13.0.cubin", stem(&SOURCE, target(text)))),
                code.as_bytes(),
            )
            .unwrap();
        }
        let store = store(folder.clone());
        let take = |cubin: &[u8]| Ok(String::from_utf8(cubin.to_vec()).unwrap());
        let own = store.load(&SOURCE, target("sm_89"), take);
        assert_eq!(own.unwrap(), "own");
        let refused = store.load(&SOURCE, target("sm_89"), |cubin| match cubin {
            b"own" => Err(Error::Device {
                op: "cuda",
                message: "too new".to_owned(),
            }),
            other => take(other),
        });
        assert_eq!(refused.unwrap(), "old");
        let none = store.load(&SOURCE, target("sm_120"), take).unwrap_err();
        assert!(none.to_string().contains("none here"), "{none}");
        std::fs::remove_dir_all(folder).unwrap();
    }
}
