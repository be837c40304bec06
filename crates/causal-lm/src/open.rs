//! Opening a model by its path, whatever it is stored as.

use std::path::Path;

use tensor_io::Checkpoint;

use crate::{Result, compressed, gguf};

/// Opens the model at `path`: a GGUF file, or a folder in the layout of Hugging Face, with weights as floats or compressed
/// (GPTQ, compressed-tensors).
///
/// # Errors
/// What [`compressed::open`] and [`gguf::open`] report.
pub fn open(path: impl AsRef<Path>) -> Result<Checkpoint> {
    let path = path.as_ref();
    let named = path
        .extension()
        .is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"));
    match gguf::is_gguf(path) || named && !path.is_dir() {
        true => gguf::open(path),
        false => compressed::open(path),
    }
}

/// The files that a checkpoint carries, by name.
pub(crate) fn carried_files(checkpoint: &Checkpoint) -> tensor_io::Result<Vec<(String, Vec<u8>)>> {
    if let Some(source) = checkpoint.source() {
        return source.files();
    }
    let read = |path: &std::path::PathBuf| {
        let name = path.file_name().unwrap_or_default();
        let contents = std::fs::read(path).map_err(tensor_io::Error::io("read", path))?;
        Ok((name.to_string_lossy().into_owned(), contents))
    };
    checkpoint.files_to_carry().iter().map(read).collect()
}
