//! Lists the tensors of a checkpoint folder or a safetensors file:
//! `cargo run --example inspect -- CHECKPOINT_FOLDER|FILE.safetensors`. Without a path it writes a small one and lists it.

use std::collections::BTreeMap;
use std::env;
use std::path::PathBuf;

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use tensor_io::Checkpoint;

fn main() -> Result<()> {
    let path = match env::args_os().nth(1) {
        Some(path) => PathBuf::from(path),
        None => written()?,
    };
    let checkpoint = if path.is_file() {
        Checkpoint::open_file(&path)?
    } else {
        Checkpoint::open(&path)?
    };
    let width = checkpoint.names().map(str::len).max().unwrap_or(0);
    for name in checkpoint.names() {
        let info = checkpoint.info(name)?;
        println!(
            "{name:width$}  {:>5}  {:>12}  {:?}",
            info.dtype.to_string(),
            info.bytes,
            info.shape
        );
    }
    println!(
        "{} tensors, {} parameters, {} bytes in {} file(s)",
        checkpoint.names().count(),
        checkpoint.parameters(),
        checkpoint.total_bytes(),
        checkpoint.shards().len()
    );
    if let Some(model_type) = checkpoint.config().opt_str("model_type")? {
        println!("model type {model_type}");
    }
    for file in checkpoint.files_to_carry() {
        println!("carries {}", file.display());
    }
    Ok(())
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
