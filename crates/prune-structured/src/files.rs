//! Files that appear whole or not at all.

use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fs::File;
use std::io::{Error, ErrorKind, Result, Write};
use std::path::Path;

/// Writes a file beside `path`, then gives it that name; returns its size in bytes. When `fill`
/// fails nothing is left and what was at `path` stays.
pub(crate) fn write_with(path: &Path, fill: impl FnOnce(&mut File) -> Result<()>) -> Result<u64> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(format!(".partial-{}", std::process::id()));
    let run = || {
        let mut file = File::create(&beside)?;
        fill(&mut file)?;
        file.sync_all()?;
        let bytes = file.metadata()?.len();
        std::fs::rename(&beside, path)?;
        Ok(bytes)
    };
    run().inspect_err(|_| drop(std::fs::remove_file(&beside)))
}

/// Writes bytes.
pub(crate) fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    write_with(path, |file| file.write_all(bytes)).map(drop)
}

/// Writes a value as JSON.
pub(crate) fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    write(path, &serde_json::to_vec(value)?)
}

/// Reads a value from JSON, `None` where there is no such file.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::new(error.kind(), error)),
    }
}
