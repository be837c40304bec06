//! Safetensors files with a checksum of everything in them, for work that is saved to be resumed.
//!
//! The metadata entry `checksum` holds the BLAKE3 hash of all other metadata and of all tensors. A file that was damaged
//! on disk, or edited, is an error instead of a different result.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::View;

use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::hash::{ContentHash, Hasher};
use crate::single::{TensorData, write_file};

const CHECKSUM: &str = "checksum";

/// As [`write_file`], with a checksum of metadata and tensors among the metadata.
/// [`Checkpoint::open_checked_file`] reads it and compares.
///
/// # Errors
/// As [`write_file`]; [`Error::BadDeclaration`] where the metadata has a `checksum` already.
pub fn write_checked_file<'a, N, T>(
    path: impl AsRef<Path>,
    tensors: impl IntoIterator<Item = (N, T)>,
    metadata: &BTreeMap<String, String>,
) -> Result<()>
where
    N: Into<String>,
    T: Into<TensorData<'a>>,
{
    if metadata.contains_key(CHECKSUM) {
        return Err(Error::BadDeclaration {
            tensor: CHECKSUM.to_string(),
            reason: "this metadata entry holds the file's checksum",
        });
    }
    let mut tensors: Vec<(String, TensorData<'a>)> = (tensors.into_iter())
        .map(|(name, data)| (name.into(), data.into()))
        .collect();
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    let mut hasher = hash_metadata(metadata);
    for (name, data) in &tensors {
        let spec = data.spec(name.clone());
        match data {
            TensorData::Tensor(tensor) => {
                hasher.tensor(name, spec.dtype, &spec.shape, &View::data(tensor));
            }
            TensorData::Bytes { bytes, .. } => {
                hasher.tensor(name, spec.dtype, &spec.shape, bytes);
            }
        }
    }
    let mut metadata = metadata.clone();
    metadata.insert(CHECKSUM.to_string(), hasher.finish().to_string());
    write_file(path, tensors, &metadata)
}

impl Checkpoint {
    /// Opens a file of [`write_checked_file`] and reads all of it to compare the checksum.
    ///
    /// # Errors
    /// As [`Checkpoint::open_file`]; [`Error::Checksum`] where the contents are not those that were written.
    pub fn open_checked_file(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let file = Self::open_file(path)?;
        let mut metadata = file.metadata().clone();
        let expected = metadata.remove(CHECKSUM);
        let found = file.add_tensors(hash_metadata(&metadata))?.to_string();
        // Compared as text: a hash in capitals is not what was written either.
        if expected.as_ref() == Some(&found) {
            Ok(file)
        } else {
            Err(Error::Checksum {
                path: path.to_path_buf(),
                expected,
                found,
            })
        }
    }

    /// Hashes all tensors in the order of their names.
    pub(crate) fn add_tensors(&self, mut hasher: Hasher) -> Result<ContentHash> {
        let mut names: Vec<&str> = self.names().collect();
        names.sort_unstable();
        for name in names {
            let info = self.info(name)?;
            let bytes = match self.source() {
                Some(source) => source.stored(name)?,
                None => self.bytes(name)?,
            };
            hasher.tensor(name, info.dtype, &info.shape, &bytes);
            self.release([name]);
        }
        Ok(hasher.finish())
    }
}

fn hash_metadata(metadata: &BTreeMap<String, String>) -> Hasher {
    let mut hasher = Hasher::new();
    for (key, value) in metadata {
        hasher.part(key.as_bytes()).part(value.as_bytes());
    }
    hasher
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Tensor};

    use super::*;

    #[test]
    fn a_flipped_bit_anywhere_in_a_checked_file_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.safetensors");
        let a = Tensor::arange(0f32, 12.0, &Device::Cpu)
            .unwrap()
            .reshape((3, 4))
            .unwrap();
        // Views are hashed as they are written.
        let tensors = [
            ("b", a.t().unwrap().to_dtype(DType::F16).unwrap()),
            ("a", a.t().unwrap()),
        ];
        let metadata = BTreeMap::from([("report".to_string(), "[1, 2]".to_string())]);
        let pairs = tensors.iter().map(|(name, tensor)| (*name, tensor));
        write_checked_file(&path, pairs, &metadata).unwrap();

        let file = Checkpoint::open_checked_file(&path).unwrap();
        assert_eq!(file.metadata()["report"], "[1, 2]");
        let read = file.tensor("a", &Device::Cpu).unwrap();
        assert_eq!(
            read.to_vec2::<f32>().unwrap(),
            a.t().unwrap().to_vec2::<f32>().unwrap()
        );
        drop((read, file));

        let bytes = std::fs::read(&path).unwrap();
        for at in 0..bytes.len() {
            for bit in 0..8 {
                let mut damaged = bytes.clone();
                damaged[at] ^= 1 << bit;
                std::fs::write(&path, &damaged).unwrap();
                assert!(
                    Checkpoint::open_checked_file(&path).is_err(),
                    "bit {bit} of byte {at}"
                );
            }
        }
    }

    #[test]
    fn a_file_without_a_checksum_is_refused_and_a_second_one_is_not_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("plain.safetensors");
        let none: [(&str, TensorData<'_>); 0] = [];
        write_file(&path, none, &BTreeMap::new()).unwrap();
        let error = Checkpoint::open_checked_file(&path).unwrap_err();
        assert!(matches!(error, Error::Checksum { expected: None, .. }));
        let metadata = BTreeMap::from([(CHECKSUM.to_string(), String::new())]);
        let error = write_checked_file(&path, none, &metadata).unwrap_err();
        assert!(matches!(error, Error::BadDeclaration { .. }));
    }
}
