//! Writing one safetensors file: masks, statistics, traces, the weights of a small network.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;

use candle_core::Tensor;
use safetensors::Dtype;

use crate::atomic::PendingFile;
use crate::error::{Error, Result};
use crate::shard_writer::ShardWriter;
use crate::spec::TensorSpec;

/// A tensor to be written to a file.
#[derive(Debug, Clone, Copy)]
pub enum TensorData<'a> {
    /// A tensor, stored in its own dtype.
    Tensor(&'a Tensor),
    /// A tensor in its stored form: little endian, row-major.
    Bytes {
        /// Dtype.
        dtype: Dtype,
        /// Shape, outermost dimension first.
        shape: &'a [usize],
        /// As many bytes as dtype and shape need.
        bytes: &'a [u8],
    },
}

impl TensorData<'_> {
    pub(crate) fn spec(&self, name: String) -> TensorSpec {
        match self {
            Self::Tensor(tensor) => TensorSpec::new(name, tensor.dtype(), tensor.dims()),
            Self::Bytes { dtype, shape, .. } => TensorSpec::new(name, *dtype, *shape),
        }
    }
}

impl<'a> From<&'a Tensor> for TensorData<'a> {
    fn from(tensor: &'a Tensor) -> Self {
        Self::Tensor(tensor)
    }
}

/// Writes named tensors and free text to a safetensors file, which appears under its name when it is complete.
/// Missing parent folders are made, an existing file is replaced. [`Checkpoint::open_file`](crate::Checkpoint::open_file) reads it.
///
/// # Errors
/// As [`CheckpointWriter`](crate::CheckpointWriter): a name twice or a shape that overflows, floats that are not finite,
/// bytes that do not fill the shape, a failing disk.
pub fn write_file<'a, N, T>(
    path: impl AsRef<Path>,
    tensors: impl IntoIterator<Item = (N, T)>,
    metadata: &BTreeMap<String, String>,
) -> Result<()>
where
    N: Into<String>,
    T: Into<TensorData<'a>>,
{
    let tensors: Vec<(TensorSpec, TensorData<'a>)> = tensors
        .into_iter()
        .map(|(name, data)| {
            let data = data.into();
            (data.spec(name.into()), data)
        })
        .collect();
    let specs: Vec<&TensorSpec> = tensors.iter().map(|(spec, _)| spec).collect();
    let mut by_name: HashMap<&str, TensorData<'a>> = HashMap::new();
    for (spec, data) in &tensors {
        if by_name.insert(&spec.name, *data).is_some() {
            return Err(spec.refuse("it is declared twice"));
        }
    }

    let path = path.as_ref();
    let folder = path.parent().unwrap_or(Path::new(""));
    fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
    let pending = PendingFile::create(path)?;
    let mut file = ShardWriter::create(pending.partial().to_path_buf(), &specs, metadata.clone())?;
    for i in 0..specs.len() {
        match by_name[file.entries()[i].name.as_str()] {
            TensorData::Tensor(tensor) => file.write_tensor(i, tensor, path)?,
            TensorData::Bytes { bytes, .. } => file.write_bytes(i, bytes, path)?,
        }
    }
    file.sync()?;
    pending.persist().map(drop)
}
