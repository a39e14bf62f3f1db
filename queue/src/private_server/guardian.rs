//! The guardian: a small shell that outlives a killed owner just long enough to clean up.
//!
//! It reads from a pipe whose other end only the owner holds. Normal end, panic or `kill -9`: the
//! pipe closes, the read ends, the shell stops the server and removes a temporary folder. (The
//! kernel's parent-death signal would not do: it follows the thread that started the child, and
//! test threads come and go.)

use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use super::{ServerResult, io_error};

/// `$1`: data folder; the rest: folders to remove. The pid is read when it is needed, since a
/// restart changes it.
const SCRIPT: &str = r#"
trap '' INT TERM HUP QUIT
cat >/dev/null
pid=$(head -n 1 "$1/postmaster.pid" 2>/dev/null)
if [ -n "$pid" ]; then
    kill -INT "$pid" 2>/dev/null
    tries=0
    while kill -0 "$pid" 2>/dev/null && [ $tries -lt 100 ]; do
        sleep 0.05
        tries=$((tries + 1))
    done
    kill -QUIT "$pid" 2>/dev/null
fi
shift
if [ $# -gt 0 ]; then
    rm -rf -- "$@"
fi
"#;

/// The running guardian. Dropping it closes the pipe and waits for the clean-up.
pub(super) struct Guardian {
    child: Child,
}

impl Guardian {
    pub(super) fn start(data: &Path, remove: &[&Path]) -> ServerResult<Self> {
        let shell = Path::new("/bin/sh");
        let child = Command::new(shell)
            .args(["-c", SCRIPT, "brightrun-postgres-guardian"])
            .arg(data)
            .args(remove)
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            // A Ctrl-C at the terminal is for the owner.
            .process_group(0)
            .spawn()
            .map_err(io_error("starting", shell))?;
        Ok(Self { child })
    }

    /// Lets it do its work now.
    pub(super) fn dismiss(&mut self) {
        if let Some(mut pipe) = self.child.stdin.take() {
            // Closing is the signal; there is nothing to flush.
            let _ = pipe.flush();
        }
        let _ = self.child.wait();
    }
}

impl Drop for Guardian {
    fn drop(&mut self) {
        self.dismiss();
    }
}
