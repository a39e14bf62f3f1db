//! Results that were computed: written to disk before they are posted, remembered after.
//!
//! Deliveries are at least once, and a result may be computed but not acknowledged: the control plane was away, the process died
//! between the two. Whoever is handed the same job again, in this process or in another one on the same volume, posts what is
//! remembered instead of computing it again. An acknowledged *failure* is forgotten: the same id comes back by `/retry`, which asks for
//! another attempt.
//!
//! Beside them a counter per job says how often it was begun without coming to any end: a job that kills its worker (out of memory, a
//! defect of a driver) would otherwise be handed out for ever.

use std::collections::VecDeque;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

/// Results kept in memory.
const KEPT: usize = 32;

/// How long an acknowledged result is kept on disk.
const KEPT_ACKNOWLEDGED: Duration = Duration::from_secs(600);

/// How long an unacknowledged one is: as long as the platform keeps a job by default.
const KEPT_PENDING: Duration = Duration::from_secs(24 * 3600);

/// A finished job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Remembered {
    pub job: String,
    pub body: Value,
    pub is_stream: bool,
    pub is_failure: bool,
}

/// The remembered results.
#[derive(Debug)]
pub(crate) struct Memory {
    folder: Option<PathBuf>,
    recent: Mutex<VecDeque<Remembered>>,
}

impl Memory {
    /// Results in `folder`, on durable storage, or in memory only.
    pub fn new(folder: Option<PathBuf>) -> Self {
        let memory = Self {
            folder,
            recent: Mutex::default(),
        };
        memory.prune();
        memory
    }

    /// What was computed for a job.
    pub fn find(&self, job: &str) -> Option<Remembered> {
        let recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        let found = recent.iter().find(|result| result.job == job).cloned();
        drop(recent);
        found.or_else(|| self.read(job))
    }

    /// Keeps a result that is about to be posted. A disk that refuses it costs the safety, not the job.
    pub fn keep(&self, result: &Remembered) {
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        recent.retain(|other| other.job != result.job);
        recent.push_back(result.clone());
        while recent.len() > KEPT {
            recent.pop_front();
        }
        drop(recent);
        self.prune();
        let Some((folder, path)) = self.folder.as_deref().zip(self.path(&result.job, State::Pending)) else {
            return;
        };
        if let Err(error) = write_atomically(folder, &path, result) {
            tracing::warn!(%error, "the result cannot be kept on disk; if this process dies before it is delivered, it is lost");
        }
    }

    /// The control plane has the result.
    pub fn acknowledge(&self, result: &Remembered) {
        let pending = self.path(&result.job, State::Pending);
        let done = self.path(&result.job, State::Acknowledged);
        if result.is_failure {
            self.forget(&result.job);
        } else if let (Some(pending), Some(done)) = (pending, done) {
            // Without the rename the file counts as pending and is kept longer, which harms nobody.
            let _kept_longer = fs::rename(pending, done);
        }
    }

    /// Forgets a job.
    pub fn forget(&self, job: &str) {
        self.recent
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .retain(|other| other.job != job);
        for state in [State::Pending, State::Acknowledged] {
            if let Some(path) = self.path(job, state) {
                let _may_be_absent = fs::remove_file(path);
            }
        }
    }

    /// Notes that a job begins and says for the how-manieth time since it last came to an end.
    pub fn begin(&self, job: &str) -> u32 {
        let Some(path) = self.path(job, State::Begun) else {
            return 1;
        };
        let before: u32 = fs::read_to_string(&path)
            .ok()
            .and_then(|text| text.trim().parse().ok())
            .unwrap_or(0);
        let starts = before.saturating_add(1);
        let written = path
            .parent()
            .map_or(Ok(()), fs::create_dir_all)
            .and_then(|()| fs::write(&path, starts.to_string()));
        if let Err(error) = written {
            tracing::warn!(%error, "it cannot be noted on disk that this job has begun");
        }
        starts
    }

    /// The job came to an end, whichever.
    pub fn end(&self, job: &str) {
        if let Some(path) = self.path(job, State::Begun) {
            let _may_be_absent = fs::remove_file(path);
        }
    }

    fn read(&self, job: &str) -> Option<Remembered> {
        [State::Pending, State::Acknowledged].into_iter().find_map(|state| {
            let text = fs::read(self.path(job, state)?).ok()?;
            let result: Remembered = serde_json::from_slice(&text).ok()?;
            (result.job == job).then_some(result)
        })
    }

    /// A job id is outside data: only its hash becomes a file name.
    fn path(&self, job: &str, state: State) -> Option<PathBuf> {
        let name = hex::encode(Sha256::digest(job.as_bytes()));
        let ending = state.ending();
        self.folder
            .as_ref()
            .map(|folder| folder.join(format!("{}.{ending}", &name[..32])))
    }

    fn prune(&self) {
        let entries = self.folder.as_deref().and_then(|folder| fs::read_dir(folder).ok());
        for entry in entries.into_iter().flatten().flatten() {
            let path = entry.path();
            let limit = match path.extension().and_then(|ending| ending.to_str()) {
                Some(ending) if ending == State::Acknowledged.ending() => KEPT_ACKNOWLEDGED,
                Some(ending) if ending == State::Pending.ending() || ending == State::Begun.ending() => KEPT_PENDING,
                _ => continue,
            };
            let modified = entry.metadata().and_then(|metadata| metadata.modified());
            let is_old = modified.is_ok_and(|at| SystemTime::now().duration_since(at).is_ok_and(|age| age > limit));
            if is_old {
                let _another_worker_was_faster = fs::remove_file(path);
            }
        }
    }
}

#[derive(Clone, Copy)]
enum State {
    Pending,
    Acknowledged,
    Begun,
}

impl State {
    fn ending(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Acknowledged => "delivered",
            Self::Begun => "begun",
        }
    }
}

fn write_atomically(folder: &Path, path: &Path, result: &Remembered) -> std::io::Result<()> {
    fs::create_dir_all(folder)?;
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    serde_json::to_writer(&mut file, result)?;
    file.flush()?;
    file.as_file().sync_all()?;
    file.persist(path)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::json;

    fn result(job: &str, is_failure: bool) -> Remembered {
        Remembered {
            job: job.to_owned(),
            body: json!({"output": 1}),
            is_stream: false,
            is_failure,
        }
    }

    #[test]
    fn a_result_outlives_the_process_and_a_path_like_id_stays_inside_the_folder() {
        let folder = tempfile::tempdir().unwrap();
        let outer = folder.path().join("results");
        let kept = result("../../etc/passwd", false);
        Memory::new(Some(outer.clone())).keep(&kept);
        assert_eq!(Memory::new(Some(outer.clone())).find(&kept.job), Some(kept));
        assert_eq!(fs::read_dir(outer).unwrap().count(), 1);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn an_acknowledged_success_is_remembered_and_an_acknowledged_failure_may_be_tried_again() {
        let folder = tempfile::tempdir().unwrap();
        let memory = Memory::new(Some(folder.path().to_path_buf()));
        for (job, is_failure) in [("good", false), ("bad", true)] {
            memory.keep(&result(job, is_failure));
            assert!(memory.find(job).is_some(), "until it is acknowledged both are kept");
            memory.acknowledge(&result(job, is_failure));
        }
        let later = Memory::new(Some(folder.path().to_path_buf()));
        assert!(later.find("good").is_some());
        assert!(later.find("bad").is_none() && memory.find("bad").is_none());
    }

    #[test]
    fn a_damaged_file_is_no_result() {
        let folder = tempfile::tempdir().unwrap();
        let memory = Memory::new(Some(folder.path().to_path_buf()));
        memory.keep(&result("a", false));
        fs::write(memory.path("a", State::Pending).unwrap(), b"{\"job\":\"a\"").unwrap();
        assert_eq!(Memory::new(Some(folder.path().to_path_buf())).find("a"), None);
    }
}
