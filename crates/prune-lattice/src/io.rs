//! Tensors from and to safetensors files: the only place that touches them.

use crate::error::{Error, Result};
use candle_core::{Device, Tensor};
use std::{collections::HashMap, fs, path::Path};

/// All tensors of a safetensors file, on the CPU.
///
/// # Errors
/// The file cannot be read or is not a safetensors file.
pub fn load(file: &Path) -> Result<HashMap<String, Tensor>> {
    fs::metadata(file).map_err(|source| Error::Io {
        file: file.into(),
        source,
    })?;
    candle_core::safetensors::load(file, &Device::Cpu).map_err(|e| Error::Data {
        file: file.into(),
        reason: e.to_string(),
    })
}

/// Writes tensors to a safetensors file: beside it first, then renamed, so that no half-written file is left.
///
/// # Errors
/// The file cannot be written.
pub fn save(tensors: &HashMap<String, Tensor>, file: &Path) -> Result<()> {
    let mut partial = file.as_os_str().to_owned();
    partial.push(".partial");
    let written = candle_core::safetensors::save(tensors, &partial)
        .map_err(|e| Error::Data {
            file: file.into(),
            reason: e.to_string(),
        })
        .and_then(|()| {
            fs::rename(&partial, file).map_err(|source| Error::Io {
                file: file.into(),
                source,
            })
        });
    if written.is_err() {
        // Nothing more can be done about a partial file that cannot be removed.
        let _ = fs::remove_file(&partial);
    }
    written
}
