//! Compiling the engine and the kernels with the machine's C++ compiler, once for each text of theirs.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::{Error, Result};
use crate::gpu::cache;
use crate::gpu::{Source, sources};

const ENGINE_HEADER: (&str, &str) = ("cuda_emu.h", include_str!("../../emu/cuda_emu.h"));
const ENGINE_OF_HOPPER: (&str, &str) = ("hopper_emu.h", include_str!("../../emu/hopper_emu.h"));
const ENGINE: (&str, &str) = ("cuda_emu.cpp", include_str!("../../emu/cuda_emu.cpp"));
/// The environment variable that names the compiler.
pub const VARIABLE: &str = "BRIGHTRUN_EMULATION_CXX";

/// What kernels are checked for as they run: a device does not forgive a misaligned access either. A violation is an illegal
/// instruction, which the engine makes a message of; `-g1` is for where it was.
const CHECKS: &[&str] = &[
    "-fsanitize=alignment,bounds,signed-integer-overflow,integer-divide-by-zero",
    "-fsanitize-undefined-trap-on-error",
    "-g1",
];

/// Set to anything, engine and kernels are built with the address sanitizer, whose library must be preloaded.
pub const SANITIZE: &str = "BRIGHTRUN_EMULATION_SANITIZE";

/// Optimised less: with every access checked, the compiler otherwise takes longer than the kernels that it makes faster.
const SANITIZER: &[&str] = &[
    "-O1",
    "-fsanitize=address",
    "-fno-omit-frame-pointer",
    "-DBRIGHTRUN_EMU_SANITIZED",
];

/// A C++ compiler and how it is called.
pub(super) struct Compiler {
    program: PathBuf,
    /// What it says of itself: part of every digest.
    version: String,
    flags: Vec<&'static str>,
    folder: PathBuf,
}

impl Compiler {
    /// The compiler of this machine.
    pub(super) fn find() -> Result<Self> {
        let named = std::env::var_os(VARIABLE).map(PathBuf::from);
        let candidates = match named {
            Some(named) => vec![named],
            None => ["g++", "clang++", "c++"].map(PathBuf::from).to_vec(),
        };
        for program in candidates {
            let Ok(output) = Command::new(&program).arg("--version").output() else {
                continue;
            };
            if output.status.success() {
                return Ok(Self {
                    program,
                    version: String::from_utf8_lossy(&output.stdout).into_owned(),
                    flags: flags()?,
                    folder: cache::folder().join("emulated"),
                });
            }
        }
        Err(Error::Unsupported {
            op: "emulation",
            backend: "emulated",
            reason: format!("no C++ compiler (g++, clang++ or c++ on the path, or {VARIABLE})"),
        })
    }

    /// The engine's library.
    pub(super) fn engine(&self) -> Result<PathBuf> {
        self.library("engine", &[], &[ENGINE_HEADER, ENGINE_OF_HOPPER], ENGINE)
    }

    /// The library of one source's kernels, whose doors are named `emu_entry_…`.
    pub(super) fn source(&self, source: &'static Source) -> Result<PathBuf> {
        let file = format!("{}.cu", source.name);
        let mut main = format!("#include \"{file}\"\n");
        for entry in sources::entries(source) {
            main.push_str(&format!("EMU_ENTRY({entry})\n"));
        }
        let mut includes = vec![ENGINE_HEADER, (&file, source.text)];
        includes.extend(sources::HEADERS);
        self.library(source.name, CHECKS, &includes, ("main.cpp", &main))
    }

    fn library(
        &self,
        name: &str,
        checks: &[&'static str],
        includes: &[(&str, &str)],
        main: (&str, &str),
    ) -> Result<PathBuf> {
        let texts = includes.iter().chain([&main]).flat_map(|(name, text)| [*name, *text]);
        let flags: Vec<&str> = self.flags.iter().chain(checks).copied().collect();
        let digest = cache::digest(
            [self.version.as_str()]
                .into_iter()
                .chain(flags.iter().copied())
                .chain(texts),
        );
        let path = self.folder.join(format!("{name}-{digest}.so"));
        if path.exists() {
            return Ok(path);
        }
        let mut failure = None;
        let published = cache::publish(&path, |library| {
            let build = library.with_extension("build");
            std::fs::create_dir_all(&build)?;
            let done = self.compile(&build, &flags, includes, main, library);
            std::fs::remove_dir_all(&build)?;
            failure = done?;
            // A library that was not made must not be found by the next one who asks.
            match failure {
                Some(_) => Err(std::io::Error::other("it does not compile")),
                None => Ok(()),
            }
        });
        match (failure, published) {
            (Some(message), _) => {
                let _ = std::fs::remove_file(&path); // what was published is empty
                Err(failed(name, message))
            }
            (None, Err(error)) => Err(failed(name, format!("{}: {error}", path.display()))),
            (None, Ok(())) => Ok(path),
        }
    }

    /// Compiles `main` in a folder of its own; the compiler's complaints, if it has any.
    fn compile(
        &self,
        build: &Path,
        flags: &[&str],
        includes: &[(&str, &str)],
        main: (&str, &str),
        library: &Path,
    ) -> std::io::Result<Option<String>> {
        for (name, text) in includes.iter().chain([&main]) {
            std::fs::write(build.join(name), text)?;
        }
        let output = Command::new(&self.program)
            .current_dir(build)
            .env_remove("LD_PRELOAD") // a sanitizer is for what runs the kernels
            .args(flags)
            .arg("-o")
            .arg(std::path::absolute(library)?)
            .arg(main.0)
            .output()?;
        if output.status.success() {
            return Ok(None);
        }
        Ok(Some(String::from_utf8_lossy(&output.stderr).into_owned()))
    }
}

fn failed(name: &str, message: String) -> Error {
    Error::Device {
        op: "emulation",
        message: format!("compiling {name}: {message}"),
    }
}

/// How sources are compiled: as C++17 without the freedom to change arithmetic beyond fusing multiply and add, which NVRTC has
/// too.
fn flags() -> Result<Vec<&'static str>> {
    let mut flags = vec![
        "-std=c++17",
        "-O3",
        "-fPIC",
        "-shared",
        "-pthread",
        "-ffp-contract=fast",
        "-fno-strict-aliasing",
        "-Wno-unknown-pragmas",
        "-DBRIGHTRUN_EMULATED",
    ];
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c") {
        flags.extend(["-mavx2", "-mfma", "-mf16c"]);
    }
    if std::env::var_os(SANITIZE).is_some() {
        // Its runtime ends the process when it is loaded later than everything else.
        if !std::env::var("LD_PRELOAD").is_ok_and(|preloaded| preloaded.contains("libasan")) {
            return Err(Error::Device {
                op: "emulation",
                message: format!("{SANITIZE} needs LD_PRELOAD=\"$(g++ -print-file-name=libasan.so)\""),
            });
        }
        flags.extend(SANITIZER);
    }
    Ok(flags)
}
