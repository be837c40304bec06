//! JSON files with a checksum of what is in them, for work that is saved to be resumed: a file that was damaged on disk, or
//! edited, is an error instead of a different result.

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::file::{read_json, write_json};
use crate::error::{Error, Result};
use crate::hash::ContentHash;

/// A value and the hash of its JSON text.
#[derive(Serialize, Deserialize)]
struct Sealed {
    blake3: String,
    value: serde_json::Value,
}

/// Writes `value` as JSON with its checksum to `path`, whole or not at all.
///
/// # Errors
/// [`Error::Io`] that names the path, also for a value that has no JSON form.
pub fn write_sealed_json(path: impl Into<PathBuf>, value: &impl Serialize) -> Result<()> {
    let path = path.into();
    let value = serde_json::to_value(value);
    let value = value.map_err(|error| Error::io("write", &path)(error.into()))?;
    let blake3 = hash(&value);
    write_json(path, &Sealed { blake3, value })
}

/// Reads what [`write_sealed_json`] wrote; `None` where there is no such file.
///
/// # Errors
/// [`Error::Checksum`] where the contents are not those that were written; [`Error::Io`] that names the path, also for a
/// file that does not hold such a value.
pub fn read_sealed_json<T: DeserializeOwned>(path: impl AsRef<Path>) -> Result<Option<T>> {
    let path = path.as_ref();
    let Some(Sealed { blake3, value }) = read_json(path)? else {
        return Ok(None);
    };
    let found = hash(&value);
    if found != blake3 {
        return Err(Error::Checksum {
            path: path.into(),
            expected: Some(blake3),
            found,
        });
    }
    let value = serde_json::from_value(value);
    value
        .map(Some)
        .map_err(|error| Error::io("read", path)(error.into()))
}

fn hash(value: &serde_json::Value) -> String {
    ContentHash::of(value.to_string().as_bytes()).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_byte_of_a_sealed_file_is_an_error_or_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.json");
        assert_eq!(read_sealed_json::<Vec<f64>>(&path).unwrap(), None);
        let value = vec![1.5, 0.1 + 0.2, -3e-7, f64::from(0.1f32)];
        write_sealed_json(&path, &value).unwrap();
        let read = || read_sealed_json::<Vec<f64>>(&path);
        assert_eq!(read().unwrap().as_ref(), Some(&value));
        let bytes = std::fs::read(&path).unwrap();
        for place in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[place] ^= 1;
            std::fs::write(&path, &changed).unwrap();
            let same =
                |read: Result<Option<Vec<f64>>>| read.is_ok_and(|r| r.as_ref() == Some(&value));
            assert!(read().is_err() || same(read()), "byte {place}");
        }
        let text = String::from_utf8(bytes).unwrap();
        std::fs::write(&path, text.replace("1.5", "2.5")).unwrap();
        let error = read().unwrap_err();
        assert!(matches!(error, Error::Checksum { .. }));
        assert!(error.to_string().contains("state.json"), "{error}");
    }

    #[test]
    fn a_file_without_a_checksum_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("plain.json");
        write_json(&path, &[1.0]).unwrap();
        let error = read_sealed_json::<Vec<f64>>(&path).unwrap_err();
        assert!(error.to_string().contains("plain.json"), "{error}");
    }
}
