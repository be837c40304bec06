//! Opening a model by its path, whatever it is stored as.

use std::path::Path;

use tensor_io::Checkpoint;

use crate::{Result, gguf};

/// Opens the model at `path`: a folder in the layout of Hugging Face, or a GGUF file.
///
/// # Errors
/// What [`Checkpoint::open`] and [`gguf::open`] report.
pub fn open(path: impl AsRef<Path>) -> Result<Checkpoint> {
    let path = path.as_ref();
    let named = path
        .extension()
        .is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"));
    match gguf::is_gguf(path) || named && !path.is_dir() {
        true => gguf::open(path),
        false => Ok(Checkpoint::open(path)?),
    }
}
