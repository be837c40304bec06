//! Tensors from and to safetensors files: the only place that touches them.

use crate::error::Result;
use candle_core::{Device, Tensor};
use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use tensor_io::Checkpoint;

/// All tensors of a safetensors file, on the CPU.
///
/// # Errors
/// The file cannot be read, is malformed, or holds values that are not finite.
pub fn load(file: &Path) -> Result<HashMap<String, Tensor>> {
    let checkpoint = Checkpoint::open_file(file)?;
    checkpoint
        .names()
        .map(|name| Ok((name.to_owned(), checkpoint.tensor(name, &Device::Cpu)?)))
        .collect()
}

/// Writes tensors to a safetensors file, which appears under its name when it is complete.
///
/// # Errors
/// The file cannot be written.
pub fn save(tensors: &HashMap<String, Tensor>, file: &Path) -> Result<()> {
    Ok(tensor_io::write_file(file, tensors, &BTreeMap::new())?)
}
