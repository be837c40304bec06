//! Writing beside the destination and renaming at the end.
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

use crate::config::CONFIG_FILE;
use crate::error::{Error, Result};

/// What is being written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A checkpoint folder; one is only replaced if it holds a `config.json` or nothing.
    Folder,
    /// A single file.
    File,
}

/// A destination that is being written. Dropped without [`Staging::publish`], it leaves the destination as it was.
#[derive(Debug)]
pub(crate) struct Staging {
    destination: PathBuf,
    partial: PathBuf,
    old: PathBuf,
    kind: Kind,
    overwrite: bool,
    // Dropped last: fields are dropped in order, after `Drop::drop` has removed the partial files.
    _lock: LockFile,
}

impl Staging {
    /// Takes the lock, cleans up after killed writers and checks that the destination may be written. For a folder, the
    /// partial folder exists on return; for a file it is the caller's to create.
    pub(crate) fn begin(destination: &Path, kind: Kind, overwrite: bool) -> Result<Self> {
        let destination = resolve(destination)?;
        let lock = LockFile::acquire(&destination)?;
        let staging = Self {
            partial: sibling(&destination, "partial"),
            old: sibling(&destination, "old"),
            destination,
            kind,
            overwrite,
            _lock: lock,
        };
        staging.recover()?;
        staging.check_destination()?;
        if kind == Kind::Folder {
            fs::create_dir(&staging.partial).map_err(Error::io("create", &staging.partial))?;
        }
        Ok(staging)
    }

    /// Where to write.
    pub(crate) fn partial(&self) -> &Path {
        &self.partial
    }

    /// Where it will be.
    pub(crate) fn destination(&self) -> &Path {
        &self.destination
    }

    /// Gives what was written the destination's name. Its files must have been synced to disk by the caller.
    pub(crate) fn publish(self) -> Result<PathBuf> {
        self.check_destination()?;
        let parent = parent(&self.destination);
        if self.kind == Kind::Folder {
            sync_folder(&self.partial).map_err(Error::io("sync", &self.partial))?;
        }
        // A file replaces a file by a plain rename; a folder with something in it cannot be replaced so.
        let aside = self.kind == Kind::Folder && exists(&self.destination);
        if aside {
            fs::rename(&self.destination, &self.old)
                .map_err(Error::io("rename", &self.destination))?;
        }
        if let Err(source) = fs::rename(&self.partial, &self.destination) {
            if aside {
                // If this fails too, the next writer puts the old checkpoint back.
                drop(fs::rename(&self.old, &self.destination));
            }
            return Err(Error::io("rename", &self.partial)(source));
        }
        sync_folder(parent).map_err(Error::io("sync", parent))?;
        if aside {
            // The new checkpoint is in place; a remainder of the old one is the next writer's to remove.
            drop(remove(&self.old));
        }
        Ok(self.destination.clone())
    }

    /// Puts right what a killed writer left behind.
    fn recover(&self) -> Result<()> {
        if exists(&self.old) && !exists(&self.destination) {
            fs::rename(&self.old, &self.destination).map_err(Error::io("restore", &self.old))?;
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
        if !self.overwrite {
            return Err(Error::Exists { path: path.clone() });
        }
        let (replaceable, expected) = match self.kind {
            Kind::File => (path.is_file(), "a file"),
            Kind::Folder => (
                path.join(CONFIG_FILE).is_file() || is_empty_folder(path),
                "a checkpoint folder (with config.json) or an empty one",
            ),
        };
        if replaceable {
            Ok(())
        } else {
            Err(Error::NotReplaceable {
                path: path.clone(),
                expected,
            })
        }
    }
}

impl Drop for Staging {
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

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
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
