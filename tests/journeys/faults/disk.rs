//! A small file system under the work folder, which can be filled.

use std::io::BufRead;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// As many files as a run needs many times over; after that, nothing can be made.
const MOST_FILES: usize = 2048;

/// A mount that only processes see which were started inside. It ends with its keeper, a process that only holds it.
///
/// What runs out is the number of files (the error is the same as for bytes): a worker refuses to start with less than two
/// gibibytes, and so many would have to be written to fill what is left.
pub struct SmallDisk {
    keeper: Child,
    folder: PathBuf,
}

impl SmallDisk {
    /// Mounts one at `folder`; `None` where this system gives no mount of its own.
    pub fn mount(folder: &Path) -> Option<Self> {
        std::fs::create_dir_all(folder).unwrap();
        let script = format!(
            "mount -t tmpfs -o size=3g,nr_inodes={MOST_FILES} tmpfs {} && echo mounted && exec cat",
            folder.display()
        );
        let mut keeper = Command::new("unshare")
            .args(["-m", "sh", "-c", &script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .ok()?;
        let mut said = String::new();
        std::io::BufReader::new(keeper.stdout.take()?)
            .read_line(&mut said)
            .ok()?;
        if said.trim() == "mounted" {
            return Some(Self {
                keeper,
                folder: folder.to_owned(),
            });
        }
        let _gone = keeper.wait();
        None
    }

    /// The same command, started inside. Its process keeps the id that the child has.
    pub fn inside(&self, command: &Command) -> Command {
        let mut inside = Command::new("nsenter");
        inside
            .arg(format!("--mount=/proc/{}/ns/mnt", self.keeper.id()))
            .arg(command.get_program())
            .args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => inside.env(name, value),
                None => inside.env_remove(name),
            };
        }
        inside
    }

    /// Makes files until the disk takes no more.
    pub fn fill(&self) {
        let folder = self.filler();
        std::fs::create_dir_all(&folder).unwrap();
        let made =
            (0..MOST_FILES * 2).take_while(|number| std::fs::write(folder.join(number.to_string()), b"").is_ok());
        assert!(made.count() < MOST_FILES * 2, "the disk does not become full");
    }

    /// Frees what [`Self::fill`] took.
    pub fn free(&self) {
        std::fs::remove_dir_all(self.filler()).unwrap();
    }

    /// The mount as its keeper sees it.
    fn filler(&self) -> PathBuf {
        let root = PathBuf::from(format!("/proc/{}/root", self.keeper.id()));
        let inside = self.folder.strip_prefix("/").unwrap();
        root.join(inside).join("filler")
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _gone = self.keeper.kill();
        let _reaped = self.keeper.wait();
    }
}
