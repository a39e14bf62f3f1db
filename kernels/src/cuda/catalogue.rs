//! Every source and every entry; and compiling all of them ahead of time.

use std::path::{Path, PathBuf};

use super::cubins::{self, Cubins};
use super::{Nvrtc, Target};
use crate::error::{Error, Result};
use crate::gpu::{FAMILIES, Source, sources};

/// One entry of a source: a kernel for one combination of element types.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The source's name, without `.cu`.
    pub source: &'static str,
    /// The kernel's name, without types.
    pub kernel: &'static str,
    /// The entry's own name.
    pub name: String,
    /// Threads of a block.
    pub threads: u32,
    /// The only target it is compiled for, if not for all.
    pub only: Option<&'static str>,
}

/// Every entry there is, in the order of the sources.
pub fn entries() -> Vec<Entry> {
    let kernels = FAMILIES.iter().flat_map(|family| family.kernels);
    let entries = kernels.flat_map(|kernel| {
        kernel.instances().into_iter().map(|types| Entry {
            source: kernel.source.name,
            kernel: kernel.stem,
            name: kernel.entry(&types),
            threads: kernel.threads,
            only: kernel.source.only,
        })
    });
    entries.collect()
}

/// One file that [`build`] made or found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Built {
    /// The source's name, without `.cu`.
    pub source: &'static str,
    /// What it was compiled for.
    pub target: Target,
    /// The file.
    pub path: PathBuf,
    /// Whether it was there already, whole.
    pub was_there: bool,
}

/// Compiles every source for every target that it is for into a folder, which [`PRECOMPILED_VARIABLE`](super::PRECOMPILED_VARIABLE) can then
/// name. Each file is told when it is there; files that are there already are left alone.
///
/// # Errors
/// [`Error::Device`], with the compiler's log or the file that cannot be written.
pub fn build(compiler: &Nvrtc, targets: &[Target], folder: &Path, mut told: impl FnMut(&Built)) -> Result<()> {
    for target in targets {
        for source in sources::all().filter(|source| source.is_for(&target.to_string())) {
            told(&build_one(compiler, source, *target, folder)?);
        }
    }
    Ok(())
}

fn build_one(compiler: &Nvrtc, source: &'static Source, target: Target, folder: &Path) -> Result<Built> {
    let path = folder.join(cubins::file_name(source, target, compiler));
    let was_there = cubins::read(&path).is_some();
    if !was_there {
        let cubin = cubins::compile(compiler, source, target)?;
        cubins::write(&path, &cubin).map_err(|error| Error::Device {
            op: "cuda",
            message: format!("writing {}: {error}", path.display()),
        })?;
    }
    Ok(Built {
        source: source.name,
        target,
        path,
        was_there,
    })
}

impl Cubins {
    /// A source's code for a target, by the source's name; what the tests of machine code read.
    ///
    /// # Errors
    /// As compiling; [`Error::Device`] for a name that no source has.
    pub fn of_source(&self, name: &str, target: Target) -> Result<Vec<u8>> {
        match sources::all().find(|source| source.name == name) {
            Some(source) => self.compiled(source, target),
            None => Err(Error::Device {
                op: "cuda",
                message: format!("there is no {name}.cu"),
            }),
        }
    }
}
