//! Finding a Postgres server on this machine.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::{ServerError, ServerResult};

/// Names a folder with `initdb` and `postgres` (its parent will do), ahead of any other place.
pub(super) const ENVIRONMENT: &str = "BRIGHTRUN_POSTGRES_BIN";

/// Older servers lack what the schema uses.
const OLDEST_MAJOR: u32 = 15;

/// Where distributions and installers put servers: a folder, and what precedes the version in the
/// names under it.
const VERSIONED: [(&str, &str); 5] = [
    ("/usr/lib/postgresql", ""),
    ("/usr", "pgsql-"),
    ("/opt/homebrew/opt", "postgresql@"),
    ("/usr/local/opt", "postgresql@"),
    ("/Library/PostgreSQL", ""),
];

/// A usable set of server programs.
#[derive(Clone, Debug)]
pub(super) struct Binaries {
    pub(super) initdb: PathBuf,
    pub(super) postgres: PathBuf,
    pub(super) major: u32,
}

/// The named folder; else `PATH`; else the newest of the usual places; else `pg_config --bindir`.
pub(super) fn find() -> ServerResult<Binaries> {
    if let Some(named) = std::env::var_os(ENVIRONMENT) {
        // Who names a folder means that one: a silent fallback would test the wrong server.
        return find_in(Path::new(&named));
    }
    let mut looked_in = Vec::new();
    for folder in candidates() {
        if let Some(binaries) = probe(&folder) {
            return Ok(binaries);
        }
        looked_in.push(folder.display().to_string());
    }
    looked_in.dedup();
    Err(ServerError::NoBinaries {
        looked_in: looked_in.join(", "),
    })
}

/// The programs of a folder that the caller named, or of its `bin`.
pub(super) fn find_in(folder: &Path) -> ServerResult<Binaries> {
    [folder.join("bin"), folder.to_owned()]
        .iter()
        .find_map(|folder| probe(folder))
        .ok_or_else(|| ServerError::NoBinaries {
            looked_in: folder.display().to_string(),
        })
}

fn candidates() -> Vec<PathBuf> {
    let mut folders = Vec::new();
    if let Some(path) = std::env::var_os("PATH") {
        folders.extend(std::env::split_paths(&path).filter(|folder| folder.is_absolute()));
    }
    let mut versioned: Vec<(u32, PathBuf)> = VERSIONED
        .iter()
        .flat_map(|(base, prefix)| versions_under(Path::new(base), prefix))
        .collect();
    versioned.sort_by(|one, other| other.cmp(one));
    folders.extend(versioned.into_iter().map(|(_, folder)| folder));
    folders.extend(["/usr/local/pgsql/bin", "/usr/local/bin"].map(PathBuf::from));
    if let Ok(output) = Command::new("pg_config").arg("--bindir").output() {
        let folder = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        if !folder.is_empty() {
            folders.push(folder.into());
        }
    }
    folders
}

fn versions_under(base: &Path, prefix: &str) -> Vec<(u32, PathBuf)> {
    let Ok(entries) = std::fs::read_dir(base) else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name();
            let version = name.to_str()?.strip_prefix(prefix)?;
            let major = version.split('.').next()?.parse().ok()?;
            Some((major, entry.path().join("bin")))
        })
        .collect()
}

/// The programs of `folder`, if both are there, run, and are new enough.
fn probe(folder: &Path) -> Option<Binaries> {
    let initdb = folder.join("initdb");
    let postgres = folder.join("postgres");
    if !initdb.is_file() || !postgres.is_file() {
        return None;
    }
    let output = Command::new(&postgres).arg("--version").output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let version = text
        .split_whitespace()
        .find(|word| word.chars().next().is_some_and(|letter| letter.is_ascii_digit()))?;
    let digits: String = version.chars().take_while(char::is_ascii_digit).collect();
    let major: u32 = digits.parse().ok()?;
    (major >= OLDEST_MAJOR).then_some(Binaries {
        initdb,
        postgres,
        major,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::*;

    #[test]
    fn a_folder_without_a_server_is_not_taken() {
        let empty = tempfile::tempdir().unwrap();
        assert!(probe(empty.path()).is_none());
        std::fs::write(empty.path().join("initdb"), "").unwrap();
        std::fs::write(empty.path().join("postgres"), "").unwrap();
        assert!(probe(empty.path()).is_none());
        let error = find_in(empty.path()).unwrap_err().to_string();
        assert!(error.contains(&empty.path().display().to_string()), "{error}");
    }

    #[test]
    fn the_error_says_what_to_install() {
        let text = ServerError::NoBinaries {
            looked_in: "/nowhere".into(),
        }
        .to_string();
        assert!(text.contains("apt-get install postgresql") && text.contains(ENVIRONMENT));
    }
}
