//! Files of statistics and searches: written whole or not at all, and refused when a byte of them has changed since.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tensor_io::{Checkpoint, ContentHash, Hasher, TensorInfo, atomic};

use crate::{Error, Result};

/// Writes `value` as JSON with its checksum.
pub(crate) fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    Ok(atomic::write_sealed_json(path, value)?)
}

/// Reads what [`write_json`] wrote; `None` where there is no such file.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    atomic::read_sealed_json(path).map_err(|error| match error {
        tensor_io::Error::Io { source, .. } => damaged(path, source),
        tensor_io::Error::Checksum { .. } => damaged(path, CHANGED),
        other => other.into(),
    })
}

const CHANGED: &str =
    "its checksum does not match: the file is damaged; delete it to compute it again";

/// Writes named tensors with a checksum for each.
pub(crate) fn write_tensors(path: &Path, tensors: &[(String, Tensor)]) -> Result<()> {
    let mut checksums = BTreeMap::new();
    for (name, tensor) in tensors {
        checksums.insert(checksum_key(name), checksum(name, tensor)?.to_string());
    }
    let tensors = tensors.iter().map(|(name, tensor)| (name.clone(), tensor));
    Ok(tensor_io::write_file(path, tensors, &checksums)?)
}

/// A file that [`write_tensors`] wrote.
pub(crate) struct Tensors {
    file: Checkpoint,
}

impl Tensors {
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let file = Checkpoint::open_file(path)?;
        Ok(Self { file })
    }

    pub(crate) fn contains(&self, name: &str) -> bool {
        self.file.contains(name)
    }

    /// A tensor on the CPU in its stored dtype, checked against its checksum.
    pub(crate) fn load(&self, name: &str) -> Result<Tensor> {
        let info = self.file.info(name)?;
        let bytes = self.file.bytes(name)?;
        let stored = self.file.metadata().get(&checksum_key(name));
        if stored.is_none_or(|stored| *stored != of_bytes(name, info, &bytes).to_string()) {
            return Err(damaged(&self.file.shards()[info.shard], CHANGED));
        }
        Ok(self.file.tensor(name, &Device::Cpu)?)
    }
}

fn checksum_key(name: &str) -> String {
    format!("blake3 {name}")
}

fn checksum(name: &str, tensor: &Tensor) -> Result<ContentHash> {
    let flat = tensor.to_device(&Device::Cpu)?.flatten_all()?;
    let bytes: Vec<u8> = match tensor.dtype() {
        DType::U32 => little_endian(&flat.to_vec1::<u32>()?, |x| x.to_le_bytes()),
        DType::F64 => little_endian(&flat.to_vec1::<f64>()?, |x| x.to_le_bytes()),
        _ => little_endian(&flat.to_dtype(DType::F32)?.to_vec1::<f32>()?, |x| {
            x.to_le_bytes()
        }),
    };
    Ok(hash(name, tensor.dims(), &bytes))
}

fn little_endian<T: Copy, const N: usize>(values: &[T], bytes: impl Fn(T) -> [u8; N]) -> Vec<u8> {
    values.iter().flat_map(|&value| bytes(value)).collect()
}

fn of_bytes(name: &str, info: &TensorInfo, bytes: &[u8]) -> ContentHash {
    hash(name, &info.shape, bytes)
}

fn hash(name: &str, shape: &[usize], bytes: &[u8]) -> ContentHash {
    let mut hasher = Hasher::new();
    hasher
        .part(name.as_bytes())
        .part(format!("{shape:?}").as_bytes())
        .part(bytes);
    hasher.finish()
}

/// A file that cannot be used, and why.
pub(crate) fn damaged(path: &Path, reason: impl ToString) -> Error {
    Error::StateFile {
        path: path.into(),
        reason: reason.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every byte that is changed makes the file unreadable, or leaves what is read from it as it was.
    fn no_change_goes_unnoticed<T: PartialEq>(path: &Path, read: impl Fn() -> Result<T>) {
        let (bytes, value) = (std::fs::read(path).unwrap(), read().unwrap());
        for place in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[place] ^= 1;
            std::fs::write(path, &changed).unwrap();
            assert!(read().is_err() || read().unwrap() == value, "byte {place}");
        }
        std::fs::write(path, &bytes).unwrap();
    }

    #[test]
    fn a_changed_byte_of_a_state_file_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.json");
        assert_eq!(read_json::<Vec<f64>>(&path).unwrap(), None);
        write_json(&path, &vec![1.5, 0.1 + 0.2, -3e-7]).unwrap();
        assert_eq!(read_json(&path).unwrap(), Some(vec![1.5, 0.1 + 0.2, -3e-7]));
        no_change_goes_unnoticed(&path, || read_json::<Vec<f64>>(&path));
    }

    #[test]
    fn a_changed_byte_of_a_stored_tensor_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.safetensors");
        let units = Tensor::new(&[3u32, 1, 4], &Device::Cpu).unwrap();
        let weight = Tensor::new(&[[0.5f32, -1.0], [2.0, 7.0]], &Device::Cpu).unwrap();
        let tensors = [("units".to_string(), units), ("weight".to_string(), weight)];
        write_tensors(&path, &tensors).unwrap();
        let read = |name: &str| -> Result<(Vec<usize>, Vec<f32>)> {
            let tensor = Tensors::open(&path)?.load(name)?;
            let values = tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
            Ok((tensor.dims().to_vec(), values))
        };
        no_change_goes_unnoticed(&path, || Ok((read("units")?, read("weight")?)));
    }
}
