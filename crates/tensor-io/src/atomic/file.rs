//! Single files: written under a temporary name in the same folder, synced, renamed.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;
use tempfile::NamedTempFile;

use super::parent;
use crate::error::{Error, Result};

/// A file being written. Dropped without [`PendingFile::persist`], it leaves nothing and what was at the path stays.
#[derive(Debug)]
pub struct PendingFile {
    file: NamedTempFile,
    path: PathBuf,
}

impl PendingFile {
    /// Makes a temporary file beside `path`, whose folder must exist. Where `path` is a symbolic link, the file that it
    /// leads to is replaced, not the link.
    ///
    /// # Errors
    /// [`Error::Io`] that names `path`.
    pub fn create(path: impl Into<PathBuf>) -> Result<Self> {
        let mut path = path.into();
        if let Ok(target) = fs::canonicalize(&path) {
            path = target;
        }
        // Hidden, and named after the file, so that whoever finds one after a power failure knows what it was.
        let mut prefix = OsString::from(".");
        prefix.push(path.file_name().unwrap_or_default());
        prefix.push(".partial-");
        let mut builder = tempfile::Builder::new();
        builder.prefix(&prefix);
        // The umask decides who may read the file, as for any other; temporary files are private by default.
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        let file = builder
            .tempfile_in(parent(&path))
            .map_err(Error::io("write", &path))?;
        Ok(Self { file, path })
    }

    /// Where the file is until it is persisted.
    pub(crate) fn partial(&self) -> &Path {
        self.file.path()
    }

    /// Where the file will be.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The open file, for writers that seek.
    pub fn as_file_mut(&mut self) -> &mut File {
        self.file.as_file_mut()
    }

    /// Brings the contents to disk and gives the file its name, replacing an older file; returns its size in bytes.
    ///
    /// # Errors
    /// [`Error::Io`] that names the path.
    pub fn persist(self) -> Result<u64> {
        let Self { file, path } = self;
        let io = || Error::io("write", &path);
        file.as_file().sync_all().map_err(io())?;
        let bytes = file.as_file().metadata().map_err(io())?.len();
        file.persist(&path).map_err(|failed| io()(failed.error))?;
        Ok(bytes)
    }
}

impl Write for PendingFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// Writes `bytes` to `path`, whole or not at all.
///
/// # Errors
/// [`Error::Io`] that names the path.
pub fn write(path: impl Into<PathBuf>, bytes: &[u8]) -> Result<()> {
    let mut file = PendingFile::create(path)?;
    if let Err(source) = file.write_all(bytes) {
        return Err(Error::io("write", &file.path)(source));
    }
    file.persist().map(drop)
}

/// Writes `value` as JSON to `path`, whole or not at all.
///
/// # Errors
/// [`Error::Io`] that names the path, also for a value that has no JSON form.
pub fn write_json(path: impl Into<PathBuf>, value: &impl Serialize) -> Result<()> {
    let path = path.into();
    match serde_json::to_vec(value) {
        Ok(bytes) => write(path, &bytes),
        Err(error) => Err(Error::io("write", &path)(error.into())),
    }
}

/// Reads a value from JSON; `None` where there is no such file.
///
/// # Errors
/// [`Error::Io`] that names the path, also for a file that does not hold such a value.
pub fn read_json<T: DeserializeOwned>(path: impl AsRef<Path>) -> Result<Option<T>> {
    let path = path.as_ref();
    match fs::read(path) {
        Ok(bytes) => match serde_json::from_slice(&bytes) {
            Ok(value) => Ok(Some(value)),
            Err(error) => Err(Error::io("read", path)(error.into())),
        },
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io("read", path)(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_reads_back_and_a_file_without_the_value_is_an_error_that_names_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        assert_eq!(read_json::<Vec<u32>>(&path).unwrap(), None);
        write_json(&path, &[1, 2]).unwrap();
        assert_eq!(read_json(&path).unwrap(), Some(vec![1, 2]));
        let error = read_json::<String>(&path).unwrap_err();
        assert!(error.to_string().contains("a.json"), "{error}");
    }

    #[cfg(unix)]
    #[test]
    fn a_link_to_a_file_keeps_leading_to_it() {
        let dir = tempfile::tempdir().unwrap();
        let (real, link) = (dir.path().join("real"), dir.path().join("link"));
        write(&real, b"old").unwrap();
        std::os::unix::fs::symlink(&real, &link).unwrap();
        write(&link, b"new").unwrap();
        assert_eq!(fs::read(&real).unwrap(), b"new");
        assert!(link.symlink_metadata().unwrap().is_symlink());
    }

    #[test]
    fn a_file_that_is_not_persisted_leaves_the_old_one_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        write_json(&path, &[1, 2]).unwrap();
        let mut pending = PendingFile::create(&path).unwrap();
        pending.write_all(b"half").unwrap();
        drop(pending);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "[1,2]");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        write(&path, b"new").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "new");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_missing_folder_is_an_error_that_names_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("no/such/a.json");
        let error = write(&path, b"x").unwrap_err();
        assert!(error.to_string().contains("no/such/a.json"), "{error}");
    }

    #[cfg(unix)]
    #[test]
    fn a_file_is_readable_as_the_umask_allows() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let (ours, plain) = (dir.path().join("ours"), dir.path().join("plain"));
        write(&ours, b"x").unwrap();
        std::fs::write(&plain, b"x").unwrap();
        let mode = |path: &Path| path.metadata().unwrap().permissions().mode();
        assert_eq!(mode(&ours), mode(&plain));
    }
}
