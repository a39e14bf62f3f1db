//! Where a model lies on this machine.
//!
//! A path that was given is the model, or an error: it is never taken for a name on a hub, and nothing is downloaded in its place. A
//! name is looked for on the volumes, in the layouts that volumes have, and in hub caches:
//!
//! | place | layout |
//! |---|---|
//! | `/runpod-volume`, `/workspace` | `models/ORG/NAME`, `models/ORG--NAME`, `models/NAME`, `ORG/NAME`, `NAME` |
//! | hub caches | `models--ORG--NAME/snapshots/REVISION`, where `refs/main` says which |
//! | RunPod's cached models | a hub cache at `/runpod-volume/huggingface-cache/hub` |
//!
//! Serverless workers have the network volume at `/runpod-volume`, pods have the same one at `/workspace`.

use std::path::{Path, PathBuf};

use crate::error::{Failure, Result};

/// Where the same network volume is mounted, on serverless workers and on pods.
pub const MOUNTS: [&str; 2] = ["/runpod-volume", "/workspace"];

/// The hub cache of RunPod's cached models, below a volume.
const RUNPOD_CACHE: &str = "huggingface-cache/hub";

/// Where models are looked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ModelRoots {
    /// Volumes, best first.
    pub volumes: Vec<PathBuf>,
    /// Hub caches, best first.
    pub hub_caches: Vec<PathBuf>,
}

impl ModelRoots {
    /// The mounts and caches of this machine. `variable` looks up an environment variable: `HF_HUB_CACHE`, `HF_HOME`, `HOME`.
    pub fn from_variables(variable: impl Fn(&str) -> Option<String>) -> Self {
        let volumes: Vec<PathBuf> = MOUNTS.map(PathBuf::from).to_vec();
        let given = |name: &str| variable(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let mut hub_caches: Vec<PathBuf> = given("HF_HUB_CACHE").into_iter().collect();
        hub_caches.extend(given("HF_HOME").map(|home| home.join("hub")));
        hub_caches.extend(volumes.iter().map(|volume| volume.join(RUNPOD_CACHE)));
        hub_caches.extend(given("HOME").map(|home| home.join(".cache/huggingface/hub")));
        Self { volumes, hub_caches }
    }

    /// As [`ModelRoots::from_variables`] with the process's own environment.
    pub fn of_environment() -> Self {
        Self::from_variables(|name| std::env::var(name).ok())
    }

    /// The folder of a model: at `path` where one is given, else under its name.
    ///
    /// # Errors
    /// `MODEL_PATH_MISSING` when a path is given and is no folder; `MODEL_NOT_FOUND` with every place that was looked at;
    /// `MODEL_AMBIGUOUS` when a cache has several revisions and does not say which is current.
    pub fn locate(&self, path: Option<&Path>, name: &str) -> Result<PathBuf> {
        match path {
            Some(path) => self.given(path),
            None => self.named(name),
        }
    }

    /// Refuses a path that is not a folder; a cache's folder of a model means its current revision.
    fn given(&self, path: &Path) -> Result<PathBuf> {
        if path.is_dir() {
            return Ok(revision(path)?.unwrap_or_else(|| path.to_owned()));
        }
        let hint = match self.under_another_mount(path) {
            Some(twin) => format!(
                "The folder is there as {}: this machine has the volume at another place, so name that one",
                twin.display()
            ),
            None => "Give the folder that holds `config.json`; nothing is downloaded in its place".to_owned(),
        };
        Err(
            Failure::user("MODEL_PATH_MISSING", "There is no model folder at this path")
                .at(path.display().to_string())
                .hint(hint),
        )
    }

    /// The same folder of the volume, where another mount has it.
    fn under_another_mount(&self, path: &Path) -> Option<PathBuf> {
        let inside = self.volumes.iter().find_map(|volume| path.strip_prefix(volume).ok())?;
        let twins = self.volumes.iter().map(|volume| volume.join(inside));
        twins.into_iter().find(|twin| twin.is_dir())
    }

    fn named(&self, name: &str) -> Result<PathBuf> {
        let is_name = !name.is_empty()
            && !name.starts_with('/')
            && name.split('/').count() <= 2
            && name.split('/').all(|part| !part.is_empty() && !part.starts_with('.'));
        if !is_name {
            return Err(Failure::user(
                "MODEL_NOT_FOUND",
                format!("`{name}` is neither a folder nor a name like Organisation/Model"),
            )
            .hint("Give `--model DIR`, or set BRIGHTRUN_MODEL_PATH"));
        }
        let flat = name.replace('/', "--");
        let short = name.rsplit('/').next().unwrap_or(name);
        let mut looked = Vec::new();
        for volume in &self.volumes {
            for inside in [
                format!("models/{name}"),
                format!("models/{flat}"),
                format!("models/{short}"),
                name.to_owned(),
                short.to_owned(),
            ] {
                let folder = volume.join(inside);
                if folder.join("config.json").is_file() {
                    return Ok(folder);
                }
                looked.push(folder);
            }
        }
        for cache in &self.hub_caches {
            let folder = cache.join(format!("models--{flat}"));
            if let Some(revision) = revision(&folder)? {
                return Ok(revision);
            }
            looked.push(folder);
        }
        looked.dedup();
        let looked: Vec<String> = looked.iter().map(|folder| folder.display().to_string()).collect();
        Err(Failure::user(
            "MODEL_NOT_FOUND",
            format!(
                "The model `{name}` is not on this machine; looked for at {}",
                looked.join(", ")
            ),
        )
        .hint("Give `--model DIR`, set BRIGHTRUN_MODEL_PATH, or fetch it with `brightrun fetch`"))
    }
}

/// The current revision in a cache's folder of a model; `None` when it is no such folder.
fn revision(folder: &Path) -> Result<Option<PathBuf>> {
    let snapshots = folder.join("snapshots");
    if !snapshots.is_dir() || folder.join("config.json").is_file() {
        return Ok(None);
    }
    if let Ok(main) = std::fs::read_to_string(folder.join("refs/main")) {
        let main = main.trim();
        let current = snapshots.join(main);
        // A file's text names a folder here: it must not lead out of it.
        if !main.is_empty() && !main.contains(['/', '\\', '.']) && current.is_dir() {
            return Ok(Some(current));
        }
    }
    let entries = std::fs::read_dir(&snapshots).into_iter().flatten().flatten();
    let mut revisions: Vec<PathBuf> = entries.map(|entry| entry.path()).filter(|path| path.is_dir()).collect();
    revisions.sort();
    match revisions.as_slice() {
        [] => Ok(None),
        [only] => Ok(Some(only.clone())),
        several => {
            let names: Vec<String> = several.iter().map(|path| path.display().to_string()).collect();
            Err(Failure::user(
                "MODEL_AMBIGUOUS",
                format!(
                    "The cache has {} revisions of the model and refs/main names none of them: {}",
                    several.len(),
                    names.join(", ")
                ),
            )
            .at(folder.display().to_string())
            .hint("Name one of these folders"))
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use tempfile::TempDir;

    use super::*;

    fn machine() -> (TempDir, ModelRoots) {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let roots = ModelRoots {
            volumes: vec![at("runpod-volume"), at("workspace")],
            hub_caches: vec![at("hub"), at("runpod-volume").join(RUNPOD_CACHE)],
        };
        (folder, roots)
    }

    fn model(folder: &Path) {
        std::fs::create_dir_all(folder).unwrap();
        std::fs::write(folder.join("config.json"), "{}").unwrap();
    }

    const NAME: &str = "Org/Model-1B";

    #[test]
    fn a_given_path_that_is_missing_is_fatal_even_where_the_name_is_at_hand() {
        let (machine, roots) = machine();
        model(&roots.hub_caches[0].join("models--Org--Model-1B/snapshots/abc"));
        let wanted = machine.path().join("workspace/Org/Model-1B");
        let failure = roots.locate(Some(&wanted), NAME).unwrap_err();
        assert_eq!(failure.code, "MODEL_PATH_MISSING");
        assert!(failure.hint.contains("nothing is downloaded"), "{failure}");
        assert_eq!(
            roots.locate(Some(Path::new("Org/Model-1B")), NAME).unwrap_err().code,
            "MODEL_PATH_MISSING"
        );
    }

    #[test]
    fn a_path_of_the_other_mount_is_fatal_and_the_hint_names_the_folder_on_this_one() {
        let (machine, roots) = machine();
        model(&roots.volumes[0].join("models/m"));
        let failure = roots
            .locate(Some(&machine.path().join("workspace/models/m")), NAME)
            .unwrap_err();
        assert_eq!(failure.code, "MODEL_PATH_MISSING");
        assert!(failure.hint.contains("runpod-volume/models/m"), "{failure}");
    }

    #[test]
    fn a_name_is_found_in_every_layout() {
        for inside in [
            "runpod-volume/models/Org/Model-1B",
            "runpod-volume/models/Org--Model-1B",
            "workspace/models/Model-1B",
            "workspace/Model-1B",
            "hub/models--Org--Model-1B/snapshots/abc",
            "runpod-volume/huggingface-cache/hub/models--Org--Model-1B/snapshots/abc",
        ] {
            let (machine, roots) = machine();
            model(&machine.path().join(inside));
            assert_eq!(roots.locate(None, NAME).unwrap(), machine.path().join(inside));
        }
    }

    #[test]
    fn of_several_revisions_the_current_one_is_taken_and_without_one_none() {
        let (_machine, roots) = machine();
        let folder = roots.hub_caches[0].join("models--Org--Model-1B");
        for revision in ["aaa", "bbb"] {
            model(&folder.join("snapshots").join(revision));
        }
        let failure = roots.locate(None, NAME).unwrap_err();
        assert_eq!(failure.code, "MODEL_AMBIGUOUS");
        std::fs::create_dir_all(folder.join("refs")).unwrap();
        std::fs::write(folder.join("refs/main"), "bbb\n").unwrap();
        assert!(roots.locate(None, NAME).unwrap().ends_with("snapshots/bbb"));
        assert!(roots.locate(Some(&folder), NAME).unwrap().ends_with("snapshots/bbb"));
        std::fs::write(folder.join("refs/main"), "../../elsewhere").unwrap();
        assert_eq!(roots.locate(None, NAME).unwrap_err().code, "MODEL_AMBIGUOUS");
    }

    #[test]
    fn a_name_that_is_nowhere_is_an_error_that_lists_where_it_was_looked_for() {
        let (_machine, roots) = machine();
        let failure = roots.locate(None, NAME).unwrap_err();
        assert_eq!(failure.code, "MODEL_NOT_FOUND");
        for place in [
            "models--Org--Model-1B",
            "workspace/models/Org/Model-1B",
            "huggingface-cache",
        ] {
            assert!(failure.message.contains(place), "{failure}");
        }
        for name in ["", "/etc", "../Org", "a/b/c"] {
            assert_eq!(roots.locate(None, name).unwrap_err().code, "MODEL_NOT_FOUND");
        }
    }
}
