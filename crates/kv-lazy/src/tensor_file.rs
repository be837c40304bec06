//! Safetensors files of this crate: traces and statistics, read and written in one way.

use crate::error::{Error, Result};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use std::collections::HashMap;
use std::path::Path;

/// A tensor to be written.
pub(crate) struct Named {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    /// Little-endian elements.
    pub(crate) bytes: Vec<u8>,
}

/// Writes tensors and perhaps an entry of metadata; the file appears whole or not at all.
pub(crate) fn write(
    path: &Path,
    tensors: &[Named],
    metadata: Option<(&str, String)>,
) -> Result<()> {
    let bad = |e: safetensors::SafeTensorError| Error::Trace {
        path: path.display().to_string(),
        problem: e.to_string(),
    };
    let mut views = Vec::with_capacity(tensors.len());
    for tensor in tensors {
        let view = TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.bytes);
        views.push((tensor.name.as_str(), view.map_err(bad)?));
    }
    let metadata = metadata.map(|(key, text)| HashMap::from([(key.to_owned(), text)]));
    let bytes = safetensors::serialize(views, metadata).map_err(bad)?;
    Ok(tensor_io::atomic::write(path, &bytes)?)
}

/// A file that has been read.
pub(crate) struct TensorFile {
    path: String,
    bytes: Vec<u8>,
}

/// A tensor of a file.
pub(crate) struct Found<'a> {
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: &'a [u8],
}

impl TensorFile {
    /// Reads a file; its header is checked by [`open`](Self::open).
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let name = path.display().to_string();
        let bytes = std::fs::read(path).map_err(|source| Error::Io {
            path: name.clone(),
            source,
        })?;
        Ok(Self { path: name, bytes })
    }

    /// An error that names the file.
    pub(crate) fn bad(&self, problem: impl std::fmt::Display) -> Error {
        Error::Trace {
            path: self.path.clone(),
            problem: problem.to_string(),
        }
    }

    /// The metadata under `key`.
    pub(crate) fn metadata(&self, key: &str) -> Result<Option<String>> {
        let (_, header) = SafeTensors::read_metadata(&self.bytes).map_err(|e| self.bad(e))?;
        let entry = header.metadata().as_ref().and_then(|all| all.get(key));
        Ok(entry.cloned())
    }

    /// The tensors.
    pub(crate) fn open(&self) -> Result<Tensors<'_>> {
        let tensors = SafeTensors::deserialize(&self.bytes).map_err(|e| self.bad(e))?;
        Ok(Tensors {
            file: self,
            tensors,
        })
    }
}

/// The tensors of a file.
pub(crate) struct Tensors<'a> {
    file: &'a TensorFile,
    tensors: SafeTensors<'a>,
}

impl Tensors<'_> {
    /// Whether there is a tensor of this name.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.tensors.names().contains(&name)
    }

    /// A tensor of that type and number of dimensions.
    pub(crate) fn get(&self, name: &str, dtype: Dtype, rank: usize) -> Result<Found<'_>> {
        let view = self.tensors.tensor(name);
        let view = view.map_err(|_| self.file.bad(format!("no tensor `{name}`")))?;
        if view.dtype() != dtype || view.shape().len() != rank {
            return Err(self.file.bad(format!(
                "`{name}` is {:?} {:?}, expected {dtype:?} of rank {rank}",
                view.dtype(),
                view.shape()
            )));
        }
        Ok(Found {
            shape: view.shape().to_vec(),
            bytes: view.data(),
        })
    }

    /// The layers L that have a tensor `l{L}.{part}`.
    pub(crate) fn layers(&self, part: &str) -> Result<Vec<usize>> {
        let suffix = format!(".{part}");
        let mut layers = Vec::new();
        for name in self.tensors.names() {
            let index = name.strip_prefix('l').and_then(|n| n.strip_suffix(&suffix));
            let Some(index) = index else { continue };
            let index = index.parse();
            layers.push(
                index.map_err(|_| self.file.bad(format!("`{name}` names no layer by number")))?,
            );
        }
        layers.sort_unstable();
        Ok(layers)
    }
}

impl Found<'_> {
    /// Elements of 4 bytes.
    pub(crate) fn map4<T>(&self, of: impl Fn([u8; 4]) -> T) -> Vec<T> {
        self.bytes
            .as_chunks::<4>()
            .0
            .iter()
            .map(|b| of(*b))
            .collect()
    }

    /// Elements of 2 bytes.
    pub(crate) fn map2<T>(&self, of: impl Fn([u8; 2]) -> T) -> Vec<T> {
        self.bytes
            .as_chunks::<2>()
            .0
            .iter()
            .map(|b| of(*b))
            .collect()
    }
}
