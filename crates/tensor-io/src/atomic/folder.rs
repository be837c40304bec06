//! Folders: written beside the destination, renamed at the end.
//!
//! For a destination `out/model` everything is written to the hidden sibling `out/.model.tensor-io-partial`, which takes
//! the destination's name by a rename, once it is complete and on disk. An older `out/model` is renamed to
//! `out/.model.tensor-io-old` first and deleted last, so that at every moment one of the two is whole on disk. A lock
//! file, which the system lets go of when a process dies, keeps two writers apart and tells a leftover from work in
//! progress: whoever holds the lock first puts right what a killed process left.

use std::ffi::OsString;
use std::fs::{self, File, TryLockError};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use super::parent;
use crate::error::{Error, Result};
use crate::index::is_plain_file_name;

/// Whether a folder at the destination may be replaced.
#[derive(Debug, Clone, Copy, Default)]
pub enum Overwrite {
    /// No.
    #[default]
    Never,
    /// One that shows by a file what kind of folder it is, or one that is empty.
    IfHolds {
        /// Name of that file.
        marker: &'static str,
        /// Whether a file of this name is part of such a folder. All else that is there stays.
        owns: fn(&str) -> bool,
    },
}

/// A folder that is being written. Dropped without [`PendingFolder::persist`], it leaves the destination as it was.
///
/// ```
/// use tensor_io::atomic::{Overwrite, PendingFolder};
///
/// # let dir = tempfile::tempdir()?;
/// # let destination = dir.path().join("adapter");
/// let overwrite = Overwrite::IfHolds {
///     marker: "adapter.json",
///     owns: |name| name.starts_with("adapter"),
/// };
/// let folder = PendingFolder::create(&destination, overwrite)?;
/// folder.write("adapter.json", b"{}")?;
/// std::fs::write(folder.path().join("notes.txt"), "written by other means")?;
/// assert!(!destination.exists());
/// folder.persist()?;
/// assert!(destination.join("adapter.json").exists());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct PendingFolder {
    destination: PathBuf,
    partial: PathBuf,
    old: PathBuf,
    overwrite: Overwrite,
    // Dropped last: fields are dropped in order, after `Drop::drop` has removed the partial files.
    _lock: LockFile,
}

impl PendingFolder {
    /// Begins a folder at `destination`: makes missing parent folders, takes the destination's lock, puts right what a
    /// killed writer left, and makes the hidden folder to write into. Where `destination` is a symbolic link, the folder
    /// that it leads to is replaced, not the link.
    ///
    /// # Errors
    /// [`Error::Exists`] and [`Error::NotReplaceable`] where the destination may not be replaced, [`Error::Busy`] where
    /// another writer has it, [`Error::FileName`] for a path without a name, [`Error::Io`].
    pub fn create(destination: impl AsRef<Path>, overwrite: Overwrite) -> Result<Self> {
        let destination = resolve(destination.as_ref())?;
        let lock = LockFile::acquire(&destination)?;
        let folder = Self {
            partial: sibling(&destination, "partial"),
            old: sibling(&destination, "old"),
            destination,
            overwrite,
            _lock: lock,
        };
        folder.recover()?;
        folder.check_destination()?;
        fs::create_dir(&folder.partial).map_err(Error::io("create", &folder.partial))?;
        Ok(folder)
    }

    /// The hidden folder to write into.
    pub fn path(&self) -> &Path {
        &self.partial
    }

    /// Where it will be.
    pub fn destination(&self) -> &Path {
        &self.destination
    }

    /// Writes a file of this name.
    ///
    /// # Errors
    /// [`Error::FileName`] for a path, [`Error::Io`].
    pub fn write(&self, name: &str, contents: &[u8]) -> Result<()> {
        if !is_plain_file_name(name) {
            return Err(Error::FileName {
                name: name.to_string(),
                reason: "expected a plain file name",
            });
        }
        let path = self.partial.join(name);
        fs::write(&path, contents).map_err(Error::io("write", &path))
    }

    /// Brings all files in the folder to disk and gives it its name; returns where it is.
    ///
    /// # Errors
    /// [`Error::Exists`] if the destination has appeared meanwhile, [`Error::Io`]. In each case the destination is as it
    /// was before.
    pub fn persist(self) -> Result<PathBuf> {
        self.check_destination()?;
        let parent = parent(&self.destination);
        sync_all(&self.partial)?;
        // A folder with something in it cannot be replaced by a rename.
        let aside = exists(&self.destination);
        if aside {
            fs::rename(&self.destination, &self.old)
                .map_err(Error::io("rename", &self.destination))?;
        }
        if let Err(source) = fs::rename(&self.partial, &self.destination) {
            if aside {
                // If this fails too, the next writer puts the old folder back.
                drop(fs::rename(&self.old, &self.destination));
            }
            return Err(Error::io("rename", &self.partial)(source));
        }
        sync_folder(parent).map_err(Error::io("sync", parent))?;
        if aside {
            // The new folder is in place; a remainder of the old one is the next writer's to clear.
            if self.keep_others().is_ok() {
                drop(remove(&self.old));
            }
        }
        Ok(self.destination.clone())
    }

    /// Moves what is no part of the replaced folder into the new one.
    fn keep_others(&self) -> Result<()> {
        let Overwrite::IfHolds { owns, .. } = self.overwrite else {
            return Ok(());
        };
        for entry in fs::read_dir(&self.old).map_err(Error::io("read", &self.old))? {
            let entry = entry.map_err(Error::io("read", &self.old))?;
            let target = self.destination.join(entry.file_name());
            if !entry.file_name().to_str().is_some_and(owns) && !exists(&target) {
                let path = entry.path();
                fs::rename(&path, target).map_err(Error::io("move", &path))?;
            }
        }
        Ok(())
    }

    /// Puts right what a killed writer left behind.
    fn recover(&self) -> Result<()> {
        if exists(&self.old) && !exists(&self.destination) {
            fs::rename(&self.old, &self.destination).map_err(Error::io("restore", &self.old))?;
        } else if exists(&self.old) {
            self.keep_others()?;
        }
        for leftover in [&self.old, &self.partial] {
            remove(leftover).map_err(Error::io("remove", leftover))?;
        }
        Ok(())
    }

    fn check_destination(&self) -> Result<()> {
        let path = &self.destination;
        if !exists(path) {
            return Ok(());
        }
        match self.overwrite {
            Overwrite::Never => Err(Error::Exists { path: path.clone() }),
            Overwrite::IfHolds { marker, .. }
                if path.join(marker).is_file() || is_empty_folder(path) =>
            {
                Ok(())
            }
            Overwrite::IfHolds { marker, .. } => Err(Error::NotReplaceable {
                path: path.clone(),
                marker,
            }),
        }
    }
}

impl Drop for PendingFolder {
    fn drop(&mut self) {
        // After publishing there is nothing left under this name. An error cannot be reported from here; what remains
        // is the next writer's to remove.
        drop(remove(&self.partial));
    }
}

/// The lock of a destination: a sibling file, locked while it is being written.
#[derive(Debug)]
struct LockFile {
    path: PathBuf,
    file: File,
}

impl LockFile {
    fn acquire(destination: &Path) -> Result<Self> {
        let path = sibling(destination, "lock");
        loop {
            let file = File::options()
                .write(true)
                .create(true)
                .truncate(false)
                .open(&path)
                .map_err(Error::io("create", &path))?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    return Err(Error::Busy {
                        path: destination.to_path_buf(),
                        lock: path,
                    });
                }
                // Some network file systems have no locks: there, keeping writers apart is left to the user.
                Err(TryLockError::Error(error)) if error.kind() == ErrorKind::Unsupported => {}
                Err(TryLockError::Error(error)) => return Err(Error::io("lock", &path)(error)),
            }
            // Between opening and locking, the last writer may have removed the file that was opened.
            if is_same_file(&file, &path) {
                return Ok(Self { path, file });
            }
        }
    }
}

impl Drop for LockFile {
    fn drop(&mut self) {
        // Removed while locked, so that nobody can lock a file that is about to go; see `acquire`.
        drop(fs::remove_file(&self.path));
        drop(self.file.unlock());
    }
}

#[cfg(unix)]
fn is_same_file(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    match (file.metadata(), fs::metadata(path)) {
        (Ok(a), Ok(b)) => (a.dev(), a.ino()) == (b.dev(), b.ino()),
        _ => false,
    }
}

/// Elsewhere a file that is open cannot be removed under its holder.
#[cfg(not(unix))]
fn is_same_file(_file: &File, _path: &Path) -> bool {
    true
}

/// The destination behind symbolic links; its parent folder exists on return.
fn resolve(destination: &Path) -> Result<PathBuf> {
    if exists(destination) {
        return fs::canonicalize(destination).map_err(Error::io("resolve", destination));
    }
    if destination.file_name().is_none() {
        return Err(Error::FileName {
            name: destination.display().to_string(),
            reason: "expected a path that ends in a name",
        });
    }
    let parent = parent(destination);
    fs::create_dir_all(parent).map_err(Error::io("create", parent))?;
    Ok(destination.to_path_buf())
}

/// The hidden sibling of `destination` for `role`.
fn sibling(destination: &Path, role: &str) -> PathBuf {
    let mut name = OsString::from(".");
    // The root of the file system has no name; everything that follows fails on it with an error of its own.
    name.push(destination.file_name().unwrap_or_default());
    name.push(".tensor-io-");
    name.push(role);
    destination.with_file_name(name)
}

/// True also for a symbolic link that leads nowhere.
fn exists(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}

fn is_empty_folder(path: &Path) -> bool {
    fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_none())
}

fn remove(path: &Path) -> io::Result<()> {
    let removed = match path.symlink_metadata() {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// Brings the files in a folder to disk, those in its folders too.
fn sync_all(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder).map_err(Error::io("read", folder))? {
        let path = entry.map_err(Error::io("read", folder))?.path();
        if path.is_dir() {
            sync_all(&path)?;
        } else if path.is_file() {
            // Some systems sync only what is open for writing.
            File::options()
                .write(true)
                .open(&path)
                .and_then(|file| file.sync_all())
                .map_err(Error::io("sync", &path))?;
        }
    }
    sync_folder(folder).map_err(Error::io("sync", folder))
}

/// Brings the names in a folder to disk.
#[cfg(unix)]
fn sync_folder(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// Elsewhere folders cannot be synced.
#[cfg(not(unix))]
fn sync_folder(_path: &Path) -> io::Result<()> {
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_appears_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let destination = dir.path().join("a/adapter");
        let create = |overwrite| PendingFolder::create(&destination, overwrite);
        let mark = || fs::read_to_string(destination.join("mark")).unwrap();

        let folder = create(Overwrite::Never).unwrap();
        folder.write("mark", b"one").unwrap();
        fs::create_dir(folder.path().join("inner")).unwrap();
        fs::write(folder.path().join("inner/file"), "kept").unwrap();
        assert!(!destination.exists());
        assert!(matches!(create(Overwrite::Never), Err(Error::Busy { .. })));
        assert_eq!(folder.persist().unwrap(), destination);
        assert_eq!(mark(), "one");
        assert!(destination.join("inner/file").exists());

        assert!(matches!(
            create(Overwrite::Never),
            Err(Error::Exists { .. })
        ));
        let marked = |marker| Overwrite::IfHolds {
            marker,
            owns: |name| name != "notes.txt",
        };
        let refused = create(marked("another mark"));
        assert!(matches!(refused, Err(Error::NotReplaceable { .. })));

        let folder = create(marked("mark")).unwrap();
        folder.write("mark", b"half").unwrap();
        let outside = folder.write("../mark", b"");
        assert!(matches!(outside, Err(Error::FileName { .. })));
        drop(folder);
        assert_eq!(mark(), "one");

        let folder = create(marked("mark")).unwrap();
        folder.write("mark", b"two").unwrap();
        fs::write(destination.join("notes.txt"), "of the user").unwrap();
        folder.persist().unwrap();
        assert_eq!(mark(), "two");
        assert!(!destination.join("inner").exists());
        assert!(destination.join("notes.txt").exists());

        // A process that was killed between the renames left the old folder whole.
        let old = sibling(&destination, "old");
        fs::rename(&destination, &old).unwrap();
        fs::create_dir(&destination).unwrap();
        fs::write(destination.join("mark"), "three").unwrap();
        drop(create(marked("mark")).unwrap());
        assert_eq!(mark(), "three");
        assert!(destination.join("notes.txt").exists() && !old.exists());
        let left = fs::read_dir(destination.parent().unwrap()).unwrap();
        assert_eq!(left.count(), 1);
    }
}
