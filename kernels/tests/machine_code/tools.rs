//! The compiler and the disassemblers.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

use brightrun_kernels::cuda::{Cubins, NVRTC_VARIABLE, Nvrtc, Target};

use crate::resources::{self, Resources};
use crate::sass::{self, Code};

const REQUIRED: &str = "BRIGHTRUN_REQUIRE_NVRTC";

pub struct Tools {
    cubins: Cubins,
    programs: PathBuf,
    scratch: PathBuf,
}

/// Says by a test's name that it judges nothing, and why, if the tools are missing.
pub fn find(test: &str) -> Option<Tools> {
    match Tools::open() {
        Ok(tools) => Some(tools),
        Err(reason) => {
            println!("{test}: not run: {reason}");
            assert!(std::env::var_os(REQUIRED).is_none(), "{REQUIRED} is set, but {reason}");
            None
        }
    }
}

/// The repository.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

impl Tools {
    fn open() -> Result<Self, String> {
        let fetched = root().join(".brightrun/nvrtc");
        let folder = std::env::var_os(NVRTC_VARIABLE).map_or(fetched, PathBuf::from);
        let compiler = Nvrtc::open(&folder).map_err(|error| error.to_string())?;
        let programs = folder.join("bin");
        for program in ["cuobjdump", "nvdisasm"] {
            let path = programs.join(program);
            if !path.is_file() {
                return Err(format!(
                    "{} is missing (scripts/fetch-test-assets fetches it)",
                    path.display()
                ));
            }
        }
        // Beside the other build outputs, so that a change of one kernel compiles one source.
        let target = root().join("target").join("cubins");
        Ok(Self {
            cubins: Cubins::new(None, target.clone(), compiler),
            programs,
            scratch: target,
        })
    }

    pub fn compiler(&self) -> &Nvrtc {
        self.cubins.compiler().unwrap()
    }

    pub fn cubin(&self, source: &str, target: Target) -> Vec<u8> {
        self.cubins
            .of_source(source, target)
            .unwrap_or_else(|error| panic!("{error}"))
    }

    /// What the compiler says each entry takes.
    pub fn resources(&self, cubin: &[u8]) -> BTreeMap<String, Resources> {
        resources::parse(&self.tell("cuobjdump", &["--dump-resource-usage"], cubin))
    }

    /// The instructions of each entry.
    pub fn code(&self, cubin: &[u8]) -> BTreeMap<String, Code> {
        sass::parse(&self.tell("nvdisasm", &["--print-code", "--no-dataflow"], cubin))
    }

    fn tell(&self, program: &str, options: &[&str], cubin: &[u8]) -> String {
        static COUNTER: AtomicUsize = AtomicUsize::new(0);
        std::fs::create_dir_all(&self.scratch).unwrap();
        let unique = format!(
            "read-{}-{}.cubin",
            std::process::id(),
            COUNTER.fetch_add(1, Ordering::Relaxed)
        );
        let file = self.scratch.join(unique);
        std::fs::write(&file, cubin).unwrap();
        let output = Command::new(self.programs.join(program))
            .args(options)
            .arg(&file)
            .output()
            .unwrap();
        std::fs::remove_file(&file).unwrap();
        assert!(
            output.status.success(),
            "{program}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).unwrap()
    }
}
