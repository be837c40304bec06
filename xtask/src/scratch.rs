//! Scratch folders on disk: gone when a run ends, and after a run that was killed when the next one begins.

use std::fs::{self, File};
use std::path::Path;

use anyhow::{Context, Result};
use tempfile::TempDir;

const PREFIX: &str = "xtask-scratch-";
/// Locked by the process that the folder belongs to.
const LOCK: &str = "lock";

/// A folder for what a run must not hold in memory.
#[derive(Debug)]
pub(crate) struct Scratch {
    dir: TempDir,
    _lock: File,
}

impl Scratch {
    /// A new folder where the system keeps temporary files.
    pub(crate) fn new() -> Result<Self> {
        Self::new_in(&std::env::temp_dir())
    }

    fn new_in(parent: &Path) -> Result<Self> {
        clear(parent);
        let named = || format!("scratch folder in {}", parent.display());
        let dir = TempDir::with_prefix_in(PREFIX, parent).with_context(named)?;
        // Under its name once it is locked, so that nobody takes a new folder for an abandoned one.
        let early = dir.path().join("locking");
        let lock = File::create(&early).with_context(named)?;
        lock.lock().with_context(named)?;
        fs::rename(&early, dir.path().join(LOCK)).with_context(named)?;
        Ok(Self { dir, _lock: lock })
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }
}

/// Removes the folders of processes that are no more. What cannot be removed is left to the system.
fn clear(parent: &Path) {
    let Ok(entries) = fs::read_dir(parent) else {
        return;
    };
    for entry in entries.flatten() {
        if !entry.file_name().to_string_lossy().starts_with(PREFIX) {
            continue;
        }
        let lock = File::open(entry.path().join(LOCK));
        if lock.is_ok_and(|lock| lock.try_lock().is_ok()) {
            fs::remove_dir_all(entry.path()).ok();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_killed_run_left_is_cleared_and_what_runs_is_not() {
        let parent = tempfile::tempdir().unwrap();
        let running = Scratch::new_in(parent.path()).unwrap();
        let killed = Scratch::new_in(parent.path()).unwrap();
        // A killed process removes nothing, and its lock goes with it.
        let Scratch { dir, _lock } = killed;
        let left = dir.keep();
        drop(_lock);
        assert!(left.is_dir());
        let next = Scratch::new_in(parent.path()).unwrap();
        assert!(!left.exists());
        assert!(running.path().is_dir() && next.path().is_dir());
        let ended = next.path().to_owned();
        drop(next);
        assert!(!ended.exists());
    }
}
