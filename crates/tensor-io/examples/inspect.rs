//! Lists what a checkpoint folder, a safetensors file or a GGUF file holds:
//! `cargo run --example inspect -- CHECKPOINT_FOLDER|FILE.safetensors|FILE.gguf`. Without a path it writes a small one and lists
//! it.

use std::collections::BTreeMap;
use std::env;
use std::fmt::Write;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use tensor_io::Checkpoint;
use tensor_io::gguf::{DEFAULT_ALIGNMENT, Gguf, MAGIC, Metadata, Value};

fn main() -> Result<()> {
    let path = match env::args_os().nth(1) {
        Some(path) => PathBuf::from(path),
        None => written()?,
    };
    print!("{}", listing(&path)?);
    Ok(())
}

/// What the folder or file holds, line by line.
pub(crate) fn listing(path: &Path) -> Result<String> {
    let mut out = String::new();
    match path.is_file() {
        true if is_gguf(path)? => gguf(&Gguf::open(path)?, &mut out)?,
        true => checkpoint(&Checkpoint::open_file(path)?, &mut out)?,
        false => checkpoint(&Checkpoint::open(path)?, &mut out)?,
    }
    Ok(out)
}

fn checkpoint(checkpoint: &Checkpoint, out: &mut String) -> Result<()> {
    let width = checkpoint.names().map(str::len).max().unwrap_or(0);
    for name in checkpoint.names() {
        let info = checkpoint.info(name)?;
        writeln!(
            out,
            "{name:width$}  {:>5}  {:>12}  {:?}",
            info.dtype.to_string(),
            info.bytes,
            info.shape
        )?;
    }
    writeln!(
        out,
        "{} tensors, {} parameters, {} bytes in {} file(s)",
        checkpoint.names().count(),
        checkpoint.parameters(),
        checkpoint.total_bytes(),
        checkpoint.shards().len()
    )?;
    if let Some(model_type) = checkpoint.config().opt_str("model_type")? {
        writeln!(out, "model type {model_type}")?;
    }
    for file in checkpoint.files_to_carry() {
        writeln!(out, "carries {}", file.display())?;
    }
    Ok(())
}

fn gguf(file: &Gguf, out: &mut String) -> Result<()> {
    let metadata = file.metadata();
    let width = metadata.keys().map(str::len).max().unwrap_or(0);
    for key in metadata.keys() {
        writeln!(out, "{key:width$}  {}", shown(&metadata, key)?)?;
    }
    let width = file.tensors().iter().map(|tensor| tensor.name.len()).max();
    let width = width.unwrap_or(0);
    // Tensors, elements and bytes of each type.
    let mut types: BTreeMap<&str, [usize; 3]> = BTreeMap::new();
    for tensor in file.tensors() {
        let (name, ty) = (&tensor.name, tensor.layout.name);
        writeln!(
            out,
            "{name:width$}  {ty:>7}  {:>12}  {:?}",
            tensor.bytes, tensor.shape
        )?;
        let sums = types.entry(ty).or_default();
        for (sum, more) in sums.iter_mut().zip([1, tensor.elements(), tensor.bytes]) {
            *sum += more;
        }
    }
    for (ty, [tensors, elements, bytes]) in types {
        writeln!(
            out,
            "{ty}: {tensors} tensors, {elements} parameters, {bytes} bytes"
        )?;
    }
    let (parameters, bytes) = (file.parameters(), file.total_bytes());
    let alignment = metadata.get_u64("general.alignment")?;
    let alignment = alignment.unwrap_or(DEFAULT_ALIGNMENT.into());
    writeln!(
        out,
        "{} tensors, {parameters} parameters, {bytes} bytes, {:.3} bits a parameter, in {} file(s) of version {}, aligned to \
         {alignment}",
        file.tensors().len(),
        8.0 * bytes as f64 / parameters.max(1) as f64,
        file.parts().count(),
        file.version(),
    )?;
    Ok(())
}

/// A value in a line: of a list its length, of a long text its beginning.
fn shown(metadata: &Metadata<'_>, key: &str) -> Result<String> {
    if let Some((ty, Some(element))) = metadata.value_type(key) {
        let count = metadata.len_of(key)?.unwrap_or(0);
        return Ok(format!("{}, {count} of {}", ty.name(), element.name()));
    }
    Ok(match metadata.get(key)? {
        Some(Value::String(text)) => {
            let start: String = text.chars().take(80).collect();
            match start.len() < text.len() {
                true => format!("{start:?}..."),
                false => format!("{start:?}"),
            }
        }
        Some(value) => format!("{value:?}"),
        None => String::new(),
    })
}

fn is_gguf(path: &Path) -> Result<bool> {
    let mut start = Vec::new();
    File::open(path)?
        .take(MAGIC.len() as u64)
        .read_to_end(&mut start)?;
    Ok(start == MAGIC)
}

/// A file of two tensors.
fn written() -> Result<PathBuf> {
    let path = env::temp_dir().join("tensor-io-inspect.safetensors");
    let weight = Tensor::zeros((4, 3), DType::BF16, &Device::Cpu)?;
    let bias = Tensor::ones(4, DType::F32, &Device::Cpu)?;
    let tensors = [("linear.weight", &weight), ("linear.bias", &bias)];
    tensor_io::write_file(&path, tensors, &BTreeMap::new())?;
    Ok(path)
}
